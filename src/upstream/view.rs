//! Keeps the routing [`View`] up to date: accounts when the bus says so, quota whenever this replica learns something.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::{
    FutureExt as _,
    future::{Fuse, FusedFuture as _},
};
use tokio::{sync::watch, time::sleep};

use crate::{
    account::{AccountEntry, Accounts},
    bus::{Bus, Topic},
    db,
    ids::AccountId,
    quota::Quota,
    routing::{Account, Load, View, Weights},
    task::Tasks,
};

/// Between two rebuilds: a busy pool learns something with every answer.
const THROTTLE: Duration = Duration::from_millis(20);
/// After the database could not be asked.
const PAUSE: Duration = Duration::from_secs(1);

/// Which accounts were merged into which.
pub(super) type Merges = Arc<HashMap<AccountId, AccountId>>;

/// Builds the first view and starts the task that keeps it. An account is not missing from the view before its merge is known.
pub(super) async fn keep(
    accounts: Accounts,
    quota: Quota,
    weights: Weights,
    bus: &Bus,
    tasks: &Tasks,
) -> Result<(watch::Receiver<Arc<View>>, watch::Receiver<Merges>), db::Error> {
    let mut moved = bus.subscribe(Topic::Accounts);
    let mut models = bus.subscribe(Topic::Models);
    let mut observed = quota.changed();
    let mut entries = accounts.load_all().await?;
    let (merges, merged) = watch::channel(Arc::new(accounts.merges().await?));
    quota.inherit(&merged.borrow());
    let mut kept = HashMap::new();
    let (sender, receiver) = watch::channel(Arc::new(build(&entries, &quota, &weights, &mut kept)));
    let stop = tasks.stopping();
    tasks.essential("view", async move {
        let read = |after| {
            let accounts = &accounts;
            async move {
                sleep(after).await;
                let entries = accounts.load_all().await?;
                Ok::<_, db::Error>((entries, accounts.merges().await?))
            }
        };
        let follow = async {
            let mut stale = false;
            let mut reading = pin!(Fuse::terminated());
            loop {
                // Quota is followed also while the database takes its time.
                tokio::select! {
                    biased;
                    result = &mut reading => match result {
                        Ok((read, moves)) => {
                            entries = read;
                            let moves = Arc::new(moves);
                            quota.inherit(&moves);
                            merges.send_replace(moves);
                        }
                        Err(error) => {
                            tracing::warn!(%error, "the view of the pool is old");
                            reading.set(read(PAUSE).fuse());
                        }
                    },
                    version = moved.changed() => stale |= version.is_some(),
                    version = models.changed() => stale |= version.is_some(),
                    changed = observed.changed() => if changed.is_err() { return },
                }
                if stale && reading.is_terminated() {
                    stale = false;
                    reading.set(read(Duration::ZERO).fuse());
                }
                sender.send_replace(Arc::new(build(&entries, &quota, &weights, &mut kept)));
                sleep(THROTTLE).await;
            }
        };
        stop.run_until_cancelled(follow).await;
    });
    Ok((receiver, merged))
}

/// One snapshot; `kept` is carried from one to the next.
fn build(
    entries: &[AccountEntry],
    quota: &Quota,
    weights: &Weights,
    kept: &mut HashMap<AccountId, Arc<Load>>,
) -> View {
    let plans = models_of_plans(entries);
    let accounts: BTreeMap<AccountId, Account> = entries
        .iter()
        .map(|entry| {
            let (windows, blocks) = quota.snapshot(entry.id);
            let of_plan = || plans.get(entry.plan.as_str()).cloned();
            let account = Account {
                id: entry.id,
                lifecycle: entry.lifecycle,
                plan: entry.plan.clone(),
                weight: weights.of(&entry.plan),
                windows,
                blocks,
                credits: quota.credits(entry.id),
                models: entry.models.clone().or_else(of_plan),
                load: Arc::clone(kept.entry(entry.id).or_default()),
            };
            (entry.id, account)
        })
        .collect();
    kept.retain(|id, _| accounts.contains_key(id));
    View {
        accounts: accounts.into_values().collect(),
    }
}

/// What the accounts of each plan list together: what an account may serve whose own catalogue has not come yet.
fn models_of_plans(entries: &[AccountEntry]) -> HashMap<&str, Arc<BTreeSet<String>>> {
    let mut plans: HashMap<&str, Arc<BTreeSet<String>>> = HashMap::new();
    for entry in entries {
        let Some(models) = &entry.models else {
            continue;
        };
        plans
            .entry(&entry.plan)
            .and_modify(|known| {
                if !models.is_subset(known) {
                    Arc::make_mut(known).extend(models.iter().cloned());
                }
            })
            .or_insert_with(|| Arc::clone(models));
    }
    plans
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::Lifecycle;

    #[test]
    fn an_account_without_a_catalogue_may_serve_what_its_plan_lists() {
        let entry = |plan: &str, models: Option<&[&str]>| AccountEntry {
            id: AccountId::new(),
            lifecycle: Lifecycle::Active,
            plan: plan.into(),
            models: models.map(|models| Arc::new(models.iter().map(|&m| m.to_owned()).collect())),
        };
        let entries = [
            entry("pro", Some(&["a"])),
            entry("pro", None),
            entry("plus", Some(&["b"])),
            entry("pro", Some(&["a", "c"])),
            entry("free", None),
        ];
        let plans = models_of_plans(&entries);
        let of = |plan| {
            plans
                .get(plan)
                .map(|models| models.iter().map(String::as_str).collect::<Vec<_>>())
        };
        assert_eq!(of("pro"), Some(vec!["a", "c"]));
        assert_eq!(of("plus"), Some(vec!["b"]));
        assert_eq!(of("free"), None);
    }
}

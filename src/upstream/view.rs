//! Keeps the routing [`View`] up to date: accounts when the bus says so, quota whenever this replica learns something.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    account::{AccountEntry, Accounts},
    bus::{Bus, Topic},
    db,
    ids::AccountId,
    quota::Quota,
    routing::{Account, Penalty, View},
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
    bus: &Bus,
    tasks: &Tasks,
) -> Result<(watch::Receiver<Arc<View>>, watch::Receiver<Merges>), db::Error> {
    let mut moved = bus.subscribe(Topic::Accounts);
    let mut models = bus.subscribe(Topic::Models);
    let mut observed = quota.changed();
    let mut entries = accounts.load_all().await?;
    let (merges, merged) = watch::channel(Arc::new(accounts.merges().await?));
    let mut kept = HashMap::new();
    let (sender, receiver) = watch::channel(Arc::new(build(&entries, &quota, &mut kept)));
    let stop = tasks.stopping();
    tasks.essential("view", async move {
        let follow = async {
            let mut stale = false;
            loop {
                tokio::select! {
                    version = moved.changed() => stale |= version.is_some(),
                    version = models.changed() => stale |= version.is_some(),
                    changed = observed.changed() => if changed.is_err() { return },
                    () = tokio::time::sleep(PAUSE), if stale => {}
                }
                if stale {
                    let read = async {
                        let entries = accounts.load_all().await?;
                        Ok::<_, db::Error>((entries, accounts.merges().await?))
                    };
                    match read.await {
                        Ok((read, moves)) => {
                            (entries, stale) = (read, false);
                            merges.send_replace(Arc::new(moves));
                        }
                        Err(error) => tracing::warn!(%error, "the view of the pool is old"),
                    }
                }
                sender.send_replace(Arc::new(build(&entries, &quota, &mut kept)));
                tokio::time::sleep(THROTTLE).await;
            }
        };
        stop.run_until_cancelled(follow).await;
    });
    Ok((receiver, merged))
}

/// What is carried from snapshot to snapshot: the turns in flight and what is held against the account.
type Kept = (Arc<AtomicU32>, Arc<Penalty>);

/// One snapshot.
fn build(entries: &[AccountEntry], quota: &Quota, kept: &mut HashMap<AccountId, Kept>) -> View {
    let accounts: BTreeMap<AccountId, Account> = entries
        .iter()
        .map(|entry| {
            let (windows, blocks) = quota.snapshot(entry.id);
            let (in_flight, penalty) = kept.entry(entry.id).or_default().clone();
            let account = Account {
                id: entry.id,
                lifecycle: entry.lifecycle,
                plan: entry.plan.clone(),
                windows,
                blocks,
                models: entry.models.clone(),
                in_flight,
                penalty,
            };
            (entry.id, account)
        })
        .collect();
    kept.retain(|id, _| accounts.contains_key(id));
    View {
        accounts: accounts.into_values().collect(),
    }
}

//! The pool's quota as clients see it: many accounts as if they were one.

use std::collections::BTreeSet;

use crate::{
    protocol::limits::{
        Credits, Family, PoolFamily, PoolView, PoolWindow, QuotaVisibility, Window,
    },
    routing::{Account, Lifecycle, Standing, View, effective_used, family_name, status},
};

/// The quota of ordinary traffic over the active accounts at `now` (epoch seconds), those that the client may use, and beside it that of
/// each further family. Use is the mean weighted by plan over the accounts whose window is known, the reset is the earliest; the limit is
/// reached when every account is blocked.
#[must_use]
pub fn pool_view(view: &View, now: i64, seen: QuotaVisibility<'_>) -> PoolView {
    let active: Vec<&Account> = view
        .accounts
        .iter()
        .filter(|account| account.lifecycle == Lifecycle::Active && seen.covers(account.id))
        .collect();
    let largest = active
        .iter()
        .max_by(|one, other| one.weight.total_cmp(&other.weight));
    let Some(largest) = largest else {
        return PoolView {
            plan_type: "guest".into(),
            ..PoolView::default()
        };
    };
    let codex = Family::CODEX.as_str();
    let windows = active.iter().flat_map(|account| &account.windows);
    let others: BTreeSet<&str> = windows
        .map(|window| window.family.as_str())
        .filter(|family| *family != codex)
        .collect();
    let family = |active: &[&Account], id: &str| {
        let window = |kind| pool_window(active, id, kind, now);
        PoolFamily {
            id: id.to_owned(),
            name: family_name(id).to_owned(),
            primary: window(Window::FiveHour),
            secondary: window(Window::Weekly),
            monthly: window(Window::Monthly),
            limit_reached: exhausted(active, id, now),
        }
    };
    let own = family(&active, codex);
    PoolView {
        plan_type: largest.plan.clone(),
        primary: own.primary,
        secondary: own.secondary,
        monthly: own.monthly,
        limit_reached: own.limit_reached,
        credits: credits(&active),
        families: others
            .into_iter()
            .map(|id| {
                // Whoever has no window of it is not entitled to it.
                let mut entitled = active.clone();
                entitled.retain(|account| account.windows.iter().any(|one| one.family == id));
                family(&entitled, id)
            })
            .collect(),
    }
}

/// Whether all of these are blocked for the family, told as in selection; which asks every account also for a family that some have no window of.
fn exhausted(active: &[&Account], family: &str, now: i64) -> bool {
    let mut standing = Standing::default();
    for account in active {
        standing.add(&status(account, family, now));
    }
    standing.exhausted().is_some()
}

/// Together they have what any of them has.
fn credits(active: &[&Account]) -> Option<Credits> {
    let known = active.iter().filter_map(|account| account.credits);
    known.reduce(|one, other| {
        let balances = one.balance.into_iter().chain(other.balance);
        Credits {
            has_credits: one.has_credits || other.has_credits,
            unlimited: one.unlimited || other.unlimited,
            balance: balances.reduce(|sum, balance| sum + balance),
        }
    })
}

fn pool_window(active: &[&Account], family: &str, kind: Window, now: i64) -> Option<PoolWindow> {
    let (mut used, mut size, mut resets_at) = (0.0, 0.0, None);
    for account in active {
        let mut windows = account.windows.iter();
        let Some(window) =
            windows.find(|window| window.family == family && window.minutes == kind.minutes())
        else {
            continue;
        };
        used += account.weight * effective_used(window, now);
        size += account.weight;
        resets_at = resets_at
            .into_iter()
            .chain(window.resets_at.filter(|at| *at > now))
            .min();
    }
    (size > 0.0).then(|| PoolWindow {
        used_percent: used / size,
        window_minutes: kind.minutes(),
        resets_at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ids::AccountId,
        routing::{self, Block},
    };

    const NOW: i64 = 1_800_000_000;

    fn of(accounts: Option<&[AccountId]>) -> QuotaVisibility<'_> {
        QuotaVisibility::new(None, accounts, false)
    }

    fn account(plan: &str, windows: &[(u32, f64, i64)]) -> Account {
        let window = |&(minutes, used_percent, resets_in): &(u32, f64, i64)| routing::Window {
            family: "codex".into(),
            minutes,
            used_percent,
            resets_at: Some(NOW + resets_in),
            observed_at: NOW - 1,
        };
        Account {
            id: AccountId::new(),
            lifecycle: Lifecycle::Active,
            plan: plan.into(),
            weight: routing::plan_weight(plan),
            windows: windows.iter().map(window).collect(),
            blocks: Vec::new(),
            credits: None,
            models: None,
            load: Default::default(),
        }
    }

    fn blocked(mut account: Account) -> Account {
        account.blocks.push(Block {
            family: "codex".into(),
            until: NOW + 60,
            reason: "usage_limit_reached".into(),
        });
        account
    }

    #[test]
    fn windows_are_weighted_by_plan_and_told_apart_by_length() {
        let mut paused = account("pro", &[(300, 100.0, 5)]);
        paused.lifecycle = Lifecycle::Paused;
        let accounts = vec![
            account("plus", &[(300, 90.0, 500), (10_080, 50.0, 900)]),
            account("prolite", &[(300, 30.0, 700)]),
            account("free", &[(43_200, 20.0, 800)]),
            account("plus", &[(10_080, 80.0, -1)]),
            paused,
        ];
        let view = pool_view(&View { accounts }, NOW, of(None));
        let window = |used_percent, window_minutes, resets_in| {
            Some(PoolWindow {
                used_percent,
                window_minutes,
                resets_at: Some(NOW + resets_in),
            })
        };
        assert_eq!(view.plan_type, "prolite");
        assert_eq!(view.primary, window(40.0, 300, 500));
        assert_eq!(
            view.secondary,
            window(25.0, 10_080, 900),
            "a passed reset reads as unused"
        );
        assert_eq!(view.monthly, window(20.0, 43_200, 800));
        assert!(!view.limit_reached);
    }

    #[test]
    fn the_limit_is_reached_when_every_account_of_the_key_is_blocked() {
        let accounts = vec![
            blocked(account("plus", &[])),
            account("plus", &[(300, 100.0, 60)]),
        ];
        let first = accounts[0].id;
        let view = View { accounts };
        assert!(
            !pool_view(&view, NOW, of(None)).limit_reached,
            "samples do not block"
        );
        assert!(pool_view(&view, NOW, of(Some(&[first]))).limit_reached);
        assert!(!pool_view(&view, NOW + 60, of(Some(&[first]))).limit_reached);
        assert_eq!(pool_view(&view, NOW, of(Some(&[]))).plan_type, "guest");
    }
}

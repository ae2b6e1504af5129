//! The pool's quota as clients see it: many accounts as if they were one.

use crate::{
    protocol::limits::{Family, PoolView, PoolWindow, QuotaVisibility, Window},
    routing::{Account, Lifecycle, Status, View, effective_used, plan_weight, status},
};

/// The quota of ordinary traffic over the active accounts at `now` (epoch seconds), those that the client may use. Use is
/// the mean weighted by plan over the accounts whose window is known, the reset is the earliest; the limit is reached when every account
/// is blocked.
#[must_use]
pub fn pool_view(view: &View, now: i64, seen: QuotaVisibility<'_>) -> PoolView {
    let active = || {
        view.accounts
            .iter()
            .filter(|account| account.lifecycle == Lifecycle::Active && seen.covers(account.id))
    };
    let Some(largest) =
        active().max_by(|one, other| plan_weight(&one.plan).total_cmp(&plan_weight(&other.plan)))
    else {
        return PoolView {
            plan_type: "guest".into(),
            ..PoolView::default()
        };
    };
    PoolView {
        plan_type: largest.plan.clone(),
        primary: pool_window(active(), Window::FiveHour, now),
        secondary: pool_window(active(), Window::Weekly, now),
        monthly: pool_window(active(), Window::Monthly, now),
        limit_reached: active()
            .all(|account| status(account, Family::CODEX.as_str(), now) != Status::Active),
        credits: None,
    }
}

fn pool_window<'a>(
    accounts: impl Iterator<Item = &'a Account>,
    kind: Window,
    now: i64,
) -> Option<PoolWindow> {
    let (mut used, mut size, mut resets_at) = (0.0, 0.0, None);
    for account in accounts {
        let codex = Family::CODEX;
        let mut windows = account
            .windows
            .iter()
            .filter(|window| window.family == codex.as_str());
        let Some(window) = windows.find(|window| window.minutes == kind.minutes()) else {
            continue;
        };
        let weight = plan_weight(&account.plan);
        used += weight * effective_used(window, now);
        size += weight;
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
            windows: windows.iter().map(window).collect(),
            blocks: Vec::new(),
            models: None,
            in_flight: Default::default(),
            penalty: Default::default(),
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

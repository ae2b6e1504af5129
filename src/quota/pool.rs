//! The pool's quota as clients see it: many accounts as if they were one.

use crate::{
    ids::AccountId,
    protocol::limits::{Family, PoolView, PoolWindow, Window},
    routing::{Account, Lifecycle, Status, View, effective_used, plan_weight, status},
};

/// The quota of ordinary traffic over the active accounts at `now` (epoch seconds), those of a key's grants if `allowed` names them. Use is
/// the mean weighted by plan over the accounts whose window is known, the reset is the earliest; the limit is reached when every account
/// is blocked.
#[must_use]
pub fn pool_view(view: &View, now: i64, allowed: Option<&[AccountId]>) -> PoolView {
    let active = || {
        view.accounts.iter().filter(|account| {
            account.lifecycle == Lifecycle::Active
                && allowed.is_none_or(|allowed| allowed.contains(&account.id))
        })
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

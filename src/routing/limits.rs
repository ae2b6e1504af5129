//! What windows, blocks and plans mean: the one place that turns them into a status and into capacity.

use super::{Account, Lifecycle, Window};

/// The status of an account for one family, as shown and as selection sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status<'a> {
    /// May serve.
    Active,
    /// Upstream refused it for the family.
    RateLimited {
        /// Epoch seconds.
        until: i64,
        /// Upstream's code.
        reason: &'a str,
    },
    /// Set aside by the operator.
    Paused,
    /// Needs a new login.
    ReauthRequired,
    /// Closed by upstream.
    Deactivated,
}

impl Status<'_> {
    /// The word in JSON and in texts.
    #[must_use]
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Active => Lifecycle::Active.as_str(),
            Self::RateLimited { .. } => "rate_limited",
            Self::Paused => Lifecycle::Paused.as_str(),
            Self::ReauthRequired => Lifecycle::ReauthRequired.as_str(),
            Self::Deactivated => Lifecycle::Deactivated.as_str(),
        }
    }
}

/// The status of an account for a family at `now` (epoch seconds): life cycle first, then the family's own block.
#[must_use]
pub fn status<'a>(account: &'a Account, family: &str, now: i64) -> Status<'a> {
    match account.lifecycle {
        Lifecycle::Active => account
            .blocks
            .iter()
            .find(|block| block.until > now && block.family == family)
            .map_or(Status::Active, |block| Status::RateLimited {
                until: block.until,
                reason: &block.reason,
            }),
        Lifecycle::Paused => Status::Paused,
        Lifecycle::ReauthRequired => Status::ReauthRequired,
        Lifecycle::Deactivated => Status::Deactivated,
    }
}

/// How many accounts may serve a family and how many are blocked: the one place that tells an exhausted pool and its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// May serve.
    pub serving: u32,
    /// Refused by upstream for the family.
    pub limited: u32,
    until: Option<i64>,
}

impl Standing {
    /// Counts an account.
    pub fn add(&mut self, status: &Status<'_>) {
        match status {
            Status::Active => self.serving += 1,
            Status::RateLimited { until, .. } => {
                self.limited += 1;
                self.until = self.until.into_iter().chain([*until]).min();
            }
            Status::Paused | Status::ReauthRequired | Status::Deactivated => {}
        }
    }

    /// Epoch seconds at which the first account returns, if all that are in service are blocked.
    #[must_use]
    pub fn exhausted(&self) -> Option<i64> {
        self.until.filter(|_| self.serving == 0)
    }
}

/// Percent used at `now` (epoch seconds). A window whose reset has passed reads as unused; one without a reset ends at the latest its own
/// length after it was seen.
#[must_use]
pub fn effective_used(window: &Window, now: i64) -> f64 {
    let longest = || {
        window
            .observed_at
            .saturating_add(i64::from(window.minutes) * 60)
    };
    if window.resets_at.unwrap_or_else(longest) <= now {
        0.0
    } else {
        window.used_percent
    }
}

/// Percent used of the scarcest window of a family; `None` if none is known.
pub(super) fn scarcest_used(account: &Account, family: &str, now: i64) -> Option<f64> {
    account
        .windows
        .iter()
        .filter(|window| window.family == family)
        .map(|window| effective_used(window, now))
        .reduce(f64::max)
}

/// When the longest window of a family that is running ends, epoch seconds: what is left of it by then is lost.
pub(super) fn next_loss(account: &Account, family: &str, now: i64) -> Option<i64> {
    let windows = account.windows.iter();
    let running = windows.filter_map(|window| {
        let resets_at = window.resets_at.filter(|at| *at > now)?;
        (window.family == family).then_some((window.minutes, resets_at))
    });
    running
        .max_by_key(|(minutes, _)| *minutes)
        .map(|(_, at)| at)
}

/// The size of each plan's windows relative to `plus`. Estimates of the community, of which only the ratios matter.
pub(super) const PLANS: [(&str, f64); 15] = [
    ("free", 0.15),
    ("go", 0.15),
    ("guest", 0.15),
    ("free_workspace", 0.15),
    ("quorum", 0.15),
    ("plus", 1.0),
    ("team", 1.0),
    ("business", 1.0),
    ("edu", 1.0),
    ("education", 1.0),
    ("k12", 1.0),
    ("prolite", 5.0),
    ("pro", 6.67),
    ("enterprise", 6.67),
    ("unknown", 1.0),
];

fn listed_weight(plan: &str) -> Option<f64> {
    let mut plans = PLANS.iter();
    plans
        .find(|(name, _)| *name == plan)
        .map(|(_, weight)| *weight)
}

/// The size of a plan's windows relative to `plus`; an unknown plan counts as `plus`.
#[must_use]
pub fn plan_weight(plan: &str) -> f64 {
    listed_weight(plan).unwrap_or(1.0)
}

/// Whether upstream is known to have such a plan.
#[must_use]
pub fn knows_plan(plan: &str) -> bool {
    plan != "unknown" && listed_weight(plan).is_some()
}

/// The families beside the default one: id, name for people, and what is part of the names of the models that draw on it.
const FAMILIES: [(&str, &str, &[&str]); 1] = [(
    "codex_bengalfox",
    "GPT-5.3-Codex-Spark",
    &["-spark", "bengalfox"],
)];

/// The quota family that a model draws on.
#[must_use]
pub fn family_of(model: &str) -> &'static str {
    let mut families = FAMILIES.iter();
    families
        .find(|(_, _, parts)| parts.iter().any(|part| model.contains(part)))
        .map_or("codex", |(family, ..)| family)
}

/// The name of a family for people; its id where none is known.
#[must_use]
pub fn family_name(family: &str) -> &str {
    let mut families = FAMILIES.iter();
    families
        .find(|(id, ..)| *id == family)
        .map_or(family, |(_, name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(used_percent: f64, resets_at: Option<i64>) -> Window {
        Window {
            family: "codex".into(),
            minutes: 300,
            used_percent,
            resets_at,
            observed_at: 1_000,
        }
    }

    #[test]
    fn a_window_reads_as_unused_from_its_reset_on() {
        let cases = [
            (Some(5_000), 4_999, 80.0),
            (Some(5_000), 5_000, 0.0),
            // Without a reset it cannot outlast its own length.
            (None, 1_000 + 300 * 60 - 1, 80.0),
            (None, 1_000 + 300 * 60, 0.0),
        ];
        for (resets_at, now, used) in cases {
            assert_eq!(
                effective_used(&window(80.0, resets_at), now),
                used,
                "{resets_at:?} {now}"
            );
        }
    }

    #[test]
    fn a_model_draws_on_its_own_family() {
        for (model, family) in [
            ("gpt-5.3-codex", "codex"),
            ("gpt-5.3-codex-spark", "codex_bengalfox"),
            ("codex-bengalfox", "codex_bengalfox"),
            ("", "codex"),
        ] {
            assert_eq!(family_of(model), family, "{model}");
        }
    }

    #[test]
    fn plans_weigh_by_their_windows_and_unknown_ones_as_plus() {
        assert_eq!(plan_weight("business"), plan_weight("plus"));
        assert_eq!(plan_weight("no such plan"), plan_weight("plus"));
        assert!(
            plan_weight("free") < plan_weight("plus") && plan_weight("plus") < plan_weight("pro")
        );
    }
}

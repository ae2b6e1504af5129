//! What the holder of a key reads of the pool in `GET /v1/usage`.

use jiff::Timestamp;
use serde::Serialize;

use super::{PoolView, PoolWindow, QuotaVisibility};

/// A window of the pool, in the form in which a key's own limits are told.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UpstreamLimit {
    limit_type: &'static str,
    limit_window: &'static str,
    /// Percent.
    max_value: u8,
    current_value: Option<f64>,
    remaining_value: Option<f64>,
    model_filter: Option<()>,
    reset_at: Option<Timestamp>,
    source: &'static str,
}

/// How much of the pool is left, in percent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Remaining {
    /// Of the five-hour window.
    primary: Option<f64>,
    /// Of the week, or of the month where there is no week.
    secondary: Option<f64>,
}

impl PoolView {
    /// The windows, the shortest first; without how much is used where that may not be seen, none where windows may not.
    #[must_use]
    pub fn upstream_limits(&self, seen: QuotaVisibility<'_>) -> Vec<UpstreamLimit> {
        let named = [
            ("5h", self.primary),
            ("7d", self.secondary),
            ("monthly", self.monthly),
        ];
        let limit = |(limit_window, window): (_, Option<PoolWindow>)| {
            let window = window?;
            let used = window.used_percent.clamp(0.0, 100.0);
            seen.limits(UpstreamLimit {
                limit_type: "percent",
                limit_window,
                max_value: 100,
                current_value: seen.pool(used),
                remaining_value: seen.pool(100.0 - used),
                model_filter: None,
                reset_at: window
                    .resets_at
                    .and_then(|at| Timestamp::from_second(at).ok()),
                source: "aggregate",
            })
        };
        named.into_iter().filter_map(limit).collect()
    }

    /// How much is left, if that may be seen.
    #[must_use]
    pub fn remaining(&self, seen: QuotaVisibility<'_>) -> Option<Remaining> {
        let left = |window: PoolWindow| (100.0 - window.used_percent).clamp(0.0, 100.0);
        seen.pool(Remaining {
            primary: self.primary.map(left),
            secondary: self.secondary.or(self.monthly).map(left),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::Section, *};

    #[test]
    fn each_section_tells_its_own_part() {
        let window = |used_percent, window_minutes, resets_at| PoolWindow {
            used_percent,
            window_minutes,
            resets_at,
        };
        let pool = PoolView {
            primary: Some(window(40.0, 300, Some(1_800_000_000))),
            monthly: Some(window(130.0, 43_200, None)),
            ..PoolView::default()
        };
        let limit = |window, used: [Option<f64>; 2], reset: Option<&str>| {
            json!({ "limit_type": "percent", "limit_window": window, "max_value": 100, "current_value": used[0],
                "remaining_value": used[1], "model_filter": null, "reset_at": reset, "source": "aggregate" })
        };
        let limits = |five: [Option<f64>; 2], month: [Option<f64>; 2]| {
            json!([
                limit("5h", five, Some("2027-01-15T08:00:00Z")),
                limit("monthly", month, None)
            ])
        };
        let left = json!({ "primary": 60.0, "secondary": 0.0 });
        let seen = limits([Some(40.0), Some(60.0)], [Some(100.0), Some(0.0)]);
        for (sections, hidden, expected) in [
            (&Section::ALL[..], false, (seen, left.clone())),
            (&[Section::Pool], false, (json!([]), left)),
            (
                &[Section::Limits],
                false,
                (limits([None; 2], [None; 2]), json!(null)),
            ),
            (&[], false, (json!([]), json!(null))),
            (&Section::ALL, true, (json!([]), json!(null))),
        ] {
            let seen = QuotaVisibility::new(Some(sections), None, hidden);
            let told = (
                json!(pool.upstream_limits(seen)),
                json!(pool.remaining(seen)),
            );
            assert_eq!(told, expected, "{sections:?} {hidden}");
        }
    }
}

//! The three feeds and the one normaliser behind them.

use std::collections::BTreeSet;

use http::HeaderMap;
use serde_json::Value;

use super::{Credits, Family, Observation, Window, WindowSample};
use crate::protocol::lenient::{HORIZON, deadline, flag, number, text, whole};

/// Where upstream put a window. It says what the window usually is, for the feeds that give no duration.
#[derive(Clone, Copy)]
enum Slot {
    Primary,
    Secondary,
    Monthly,
}

const SLOTS: [(Slot, &str); 3] = [
    (Slot::Primary, "primary"),
    (Slot::Secondary, "secondary"),
    (Slot::Monthly, "monthly"),
];

impl Slot {
    fn usual(self) -> Window {
        match self {
            Self::Primary => Window::FiveHour,
            Self::Secondary => Window::Weekly,
            Self::Monthly => Window::Monthly,
        }
    }
}

/// The answer of `GET /wham/usage`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UsageReport {
    /// The default family, and after it the others that are listed.
    pub observations: Vec<Observation>,
    /// Whether other families were listed at all: then those that are not in the list are gone; else they are unknown.
    pub lists_families: bool,
    /// The workspace that answered, which must be the account's.
    pub workspace_id: Option<String>,
}

/// Reads `GET /wham/usage`; `None` where it is no JSON object.
pub fn from_usage(json: &[u8], now: i64) -> Option<UsageReport> {
    let usage: Value = serde_json::from_slice(json).ok().filter(Value::is_object)?;
    let main = Observation {
        credits: credits(&usage["credits"]),
        plan_type: text(&usage["plan_type"]),
        ..rate_limit(Family::CODEX, &usage["rate_limit"], now)
    };
    let review = rate_limit(
        Family::new("code_review"),
        &usage["code_review_rate_limit"],
        now,
    );
    let listed = usage["additional_rate_limits"].as_array();
    let additional = listed.into_iter().flatten().filter_map(|limit| {
        let id = text(&limit["metered_feature"]).or_else(|| text(&limit["limit_name"]))?;
        Some(rate_limit(Family::new(&id), &limit["rate_limit"], now))
    });
    let others = std::iter::once(review)
        .chain(additional)
        .filter(|observation| !observation.is_empty());
    Some(UsageReport {
        observations: std::iter::once(main).chain(others).collect(),
        lists_families: listed.is_some(),
        workspace_id: text(&usage["workspace_id"]),
    })
}

/// Reads a `codex.rate_limits` event; empty where it says nothing.
pub fn from_event(data: &[u8], now: i64) -> Vec<Observation> {
    let event: Value = serde_json::from_slice(data).unwrap_or_default();
    let id = ["limit_id", "metered_limit_name", "limit_name"]
        .into_iter()
        .find_map(|name| text(&event[name]));
    let family = Family::new(&id.unwrap_or_default());
    let main = Observation {
        credits: credits(&event["credits"]).or_else(|| credits(&event["rate_limits"]["credits"])),
        plan_type: text(&event["plan_type"]),
        ..rate_limit(family, &event["rate_limits"], now)
    };
    let reviews = ["code_review_rate_limits", "code_review_rate_limit"].map(|name| &event[name]);
    let reviews = reviews
        .into_iter()
        .map(|limits| rate_limit(Family::new("code_review"), limits, now));
    std::iter::once(main)
        .chain(reviews)
        .filter(|observation| !observation.is_empty())
        .collect()
}

/// Reads the rate-limit headers of any upstream response, of all families in them; refusals carry them too.
pub fn from_headers(headers: &HeaderMap, now: i64) -> Vec<Observation> {
    let prefixes: BTreeSet<&str> = headers
        .keys()
        .filter_map(|name| family_prefix(name.as_str()))
        .collect();
    let get = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map_or(Value::Null, Value::from)
    };
    let mut observations: Vec<Observation> = prefixes
        .into_iter()
        .map(|prefix| {
            let windows = SLOTS.into_iter().filter_map(|(slot, name)| {
                let field = |field: &str| get(&format!("x-{prefix}-{name}-{field}"));
                sample(
                    slot,
                    number(&field("used-percent")),
                    whole(&field("window-minutes")),
                    reset(field, now),
                    now,
                )
            });
            Observation {
                family: Family::new(prefix),
                windows: unique(windows),
                ..Observation::default()
            }
        })
        .filter(|observation| !observation.windows.is_empty())
        .collect();

    let account = Observation {
        credits: credits_of(|field| get(&format!("x-codex-credits-{}", field.replace('_', "-")))),
        plan_type: text(&get("x-codex-plan-type")),
        ..Observation::default()
    };
    match observations
        .iter_mut()
        .find(|observation| observation.family == Family::CODEX)
    {
        Some(codex) => {
            let windows = std::mem::take(&mut codex.windows);
            *codex = Observation { windows, ..account };
        }
        None if !account.is_empty() => observations.push(account),
        None => {}
    }
    observations
}

/// The family that a refusal belongs to: the active limit, if the headers say more of it than its name. [`Family::CODEX`] is one as any.
pub fn active_family(headers: &HeaderMap) -> Option<Family> {
    let named = headers
        .get("x-codex-active-limit")
        .and_then(|value| value.to_str().ok())
        .filter(|name| !name.is_empty())
        .map(Family::new);
    let described = |family: &Family| {
        headers
            .keys()
            .filter_map(|name| family_prefix(name.as_str()))
            .any(|prefix| Family::new(prefix) == *family)
    };
    named.filter(described)
}

/// `codex-other` of `x-codex-other-primary-used-percent`.
fn family_prefix(header: &str) -> Option<&str> {
    let (prefix, slot) = header
        .strip_prefix("x-")?
        .strip_suffix("-used-percent")?
        .rsplit_once('-')?;
    (!prefix.is_empty() && SLOTS.iter().any(|(_, name)| *name == slot)).then_some(prefix)
}

/// A `rate_limit` object: of the event with bare slot names, of the usage answer with `_window` behind them.
fn rate_limit(family: Family, limit: &Value, now: i64) -> Observation {
    let windows = SLOTS.into_iter().filter_map(|(slot, name)| {
        let window = [&limit[name], &limit[format!("{name}_window")]]
            .into_iter()
            .find(|window| window.is_object())?;
        let seconds = whole(&window["limit_window_seconds"])
            .map(|seconds| seconds.max(0).unsigned_abs().div_ceil(60));
        let minutes = whole(&window["window_minutes"])
            .or_else(|| seconds.and_then(|minutes| i64::try_from(minutes).ok()));
        let resets_at = reset(|field| window[field.replace('-', "_")].clone(), now);
        sample(
            slot,
            number(&window["used_percent"]),
            minutes,
            resets_at,
            now,
        )
    });
    let allowed = flag(&limit["allowed"]);
    Observation {
        family,
        windows: unique(windows),
        limit_reached: flag(&limit["limit_reached"]).or_else(|| allowed.map(|allowed| !allowed)),
        ..Observation::default()
    }
}

/// The reset of a window as upstream wrote it, absolute before relative, unless nobody can believe it.
fn reset(field: impl Fn(&str) -> Value, now: i64) -> Option<i64> {
    let absolute = whole(&field("reset-at"))
        .or_else(|| whole(&field("resets-at")))
        .filter(|at| *at > 0 && *at <= now.saturating_add(HORIZON));
    absolute.or_else(|| Some(now.saturating_add(whole(&field("reset-after-seconds"))?.max(0))))
}

/// The normaliser: one window out of what any feed says of it.
fn sample(
    slot: Slot,
    used: Option<f64>,
    minutes: Option<i64>,
    resets_at: Option<i64>,
    now: i64,
) -> Option<WindowSample> {
    const YEAR: i64 = 366 * 24 * 60;
    let used_percent = used?.max(0.0);
    let minutes = minutes
        .filter(|minutes| (1..=YEAR).contains(minutes))
        .and_then(|minutes| u32::try_from(minutes).ok());
    // Zero of nothing is upstream's way to say that there is no such window.
    if used_percent == 0.0 && minutes.is_none() && resets_at.is_none() {
        return None;
    }
    let window = minutes.map_or_else(|| slot.usual(), Window::from_minutes);
    let window_minutes = minutes.unwrap_or_else(|| window.minutes());
    let resets_at = resets_at.filter(|at| *at <= now || deadline(*at, now).is_some());
    Some(
        WindowSample {
            window,
            used_percent,
            window_minutes,
            resets_at,
        }
        .at(now),
    )
}

/// Each window once; of two the fuller.
fn unique(samples: impl Iterator<Item = WindowSample>) -> Vec<WindowSample> {
    let mut windows: Vec<WindowSample> = Vec::with_capacity(SLOTS.len());
    for sample in samples {
        match windows
            .iter_mut()
            .find(|window| window.window == sample.window)
        {
            Some(twin) if twin.used_percent < sample.used_percent => *twin = sample,
            Some(_) => {}
            None => windows.push(sample),
        }
    }
    windows
}

fn credits(credits: &Value) -> Option<Credits> {
    credits_of(|field| credits[field].clone())
}

fn credits_of(field: impl Fn(&str) -> Value) -> Option<Credits> {
    let [has_credits, unlimited] = ["has_credits", "unlimited"].map(|name| flag(&field(name)));
    let balance = number(&field("balance")).map(|balance| balance.max(0.0));
    (has_credits.is_some() || unlimited.is_some() || balance.is_some()).then(|| Credits {
        has_credits: has_credits.unwrap_or(false),
        unlimited: unlimited.unwrap_or(false),
        balance,
    })
}

#[cfg(test)]
mod tests;

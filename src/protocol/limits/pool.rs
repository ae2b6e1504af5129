//! What clients see of the pool's quota, in the three spellings that Codex reads.

use bytes::Bytes;
use http::{HeaderName, HeaderValue};
use serde::Serialize;

use super::{Credits, QuotaVisibility};

/// One window of the pool.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PoolWindow {
    /// Percent used, weighted over the accounts.
    pub used_percent: f64,
    /// Its length in minutes.
    pub window_minutes: u32,
    /// The earliest reset, epoch seconds; `None` while nothing is used.
    pub resets_at: Option<i64>,
}

/// The quota that a client may use, as one account's would look.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PoolView {
    /// The plan shown. `guest` where the pool is empty, `api_key` where the limits are the key's own.
    pub plan_type: String,
    /// The five-hour window.
    pub primary: Option<PoolWindow>,
    /// The weekly window.
    pub secondary: Option<PoolWindow>,
    /// The monthly window.
    pub monthly: Option<PoolWindow>,
    /// Every account is blocked by upstream's refusals; what windows say does not count.
    pub limit_reached: bool,
    /// Credits of all accounts together.
    pub credits: Option<Credits>,
    /// The limits of single models or features.
    pub families: Vec<PoolFamily>,
}

/// The pool's quota of one family beside the default one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PoolFamily {
    /// Its id, e.g. `codex_bengalfox`.
    pub id: String,
    /// Its name for people.
    pub name: String,
    /// The five-hour window.
    pub primary: Option<PoolWindow>,
    /// The weekly window.
    pub secondary: Option<PoolWindow>,
    /// The monthly window.
    pub monthly: Option<PoolWindow>,
    /// As in [`PoolView`].
    pub limit_reached: bool,
}

impl PoolView {
    /// The `x-codex-*` headers, for every answer: Codex blanks its display after one without them.
    pub fn headers(&self, seen: QuotaVisibility<'_>) -> Vec<(HeaderName, HeaderValue)> {
        let mut pairs = Vec::with_capacity(12);
        for (window, [used_percent, window_minutes, reset_at]) in [
            (self.primary, names::PRIMARY),
            (self.secondary, names::SECONDARY),
            (self.monthly, names::MONTHLY),
        ] {
            let Some(window) = window else { continue };
            let mut push = |name, value: Option<HeaderValue>| {
                pairs.extend(value.map(|value| (HeaderName::from_static(name), value)));
            };
            push(used_percent, seen.pool(decimal(window.used_percent)));
            push(
                window_minutes,
                seen.limits(HeaderValue::from(window.window_minutes)),
            );
            push(
                reset_at,
                seen.limits(window.resets_at)
                    .flatten()
                    .map(HeaderValue::from),
            );
        }
        if let Some(credits) = seen.pool(self.credits).flatten() {
            let flag = |flag: bool| HeaderValue::from_static(if flag { "true" } else { "false" });
            pairs.push((
                HeaderName::from_static("x-codex-credits-has-credits"),
                flag(credits.has_credits),
            ));
            pairs.push((
                HeaderName::from_static("x-codex-credits-unlimited"),
                flag(credits.unlimited),
            ));
            pairs.extend(credits.balance.map(|sum| {
                (
                    HeaderName::from_static("x-codex-credits-balance"),
                    decimal(sum),
                )
            }));
        }
        pairs
    }

    /// The `codex.rate_limits` event that Codex reads on a WebSocket, where answers have no headers; `None` where nothing of it may be
    /// seen. Its readers demand the use of every window, so without that there is no window.
    pub fn event(&self, seen: QuotaVisibility<'_>) -> Option<Bytes> {
        let window = |window: PoolWindow| {
            seen.pool(EventWindow {
                used_percent: window.used_percent,
                window_minutes: seen.limits(window.window_minutes),
                reset_at: seen.limits(window.resets_at).flatten(),
            })
        };
        let limit_reached = seen.both(self.limit_reached).unwrap_or_default();
        seen.either(json(&Event {
            kind: "codex.rate_limits",
            plan_type: &self.plan_type,
            rate_limits: Limit {
                allowed: !limit_reached,
                limit_reached,
                windows: EventWindows {
                    primary: self.primary.and_then(window),
                    secondary: self.secondary.and_then(window),
                    monthly: self.monthly.and_then(window),
                },
            },
            credits: seen.pool(self.credits).flatten().map(CreditsShown::from),
        }))
    }

    /// The answer of `GET /api/codex/usage` and `GET /wham/usage`. Its readers demand integers throughout, so a window is seen whole or not
    /// at all.
    pub fn usage(&self, now: i64, seen: QuotaVisibility<'_>) -> Bytes {
        let window = |window: PoolWindow| {
            let length = i64::from(window.window_minutes) * 60;
            let reset_at = window
                .resets_at
                .unwrap_or_else(|| now.saturating_add(length));
            seen.both(UsageWindow {
                used_percent: window.used_percent.round().clamp(0.0, 100.0) as u8,
                limit_window_seconds: length,
                reset_after_seconds: reset_at.saturating_sub(now).max(0),
                reset_at,
            })
        };
        let limit = |limit_reached: bool, windows: [Option<PoolWindow>; 3]| {
            let [primary_window, secondary_window, monthly_window] =
                windows.map(|shown| shown.and_then(window));
            let limit_reached = seen.both(limit_reached).unwrap_or_default();
            Limit {
                allowed: !limit_reached,
                limit_reached,
                windows: UsageWindows {
                    primary_window,
                    secondary_window,
                    monthly_window,
                },
            }
        };
        json(&Usage {
            plan_type: &self.plan_type,
            rate_limit: limit(
                self.limit_reached,
                [self.primary, self.secondary, self.monthly],
            ),
            credits: seen.pool(self.credits).flatten().map(CreditsShown::from),
            rate_limit_reset_credits: None,
            additional_rate_limits: self
                .families
                .iter()
                .filter(|_| seen.both(()).is_some())
                .map(|family| AdditionalLimit {
                    limit_name: &family.name,
                    metered_feature: &family.id,
                    rate_limit: limit(
                        family.limit_reached,
                        [family.primary, family.secondary, family.monthly],
                    ),
                })
                .collect(),
        })
    }
}

/// Header names per slot: used percent, window minutes, reset.
mod names {
    type Slot = [&'static str; 3];
    pub(super) const PRIMARY: Slot = [
        "x-codex-primary-used-percent",
        "x-codex-primary-window-minutes",
        "x-codex-primary-reset-at",
    ];
    pub(super) const SECONDARY: Slot = [
        "x-codex-secondary-used-percent",
        "x-codex-secondary-window-minutes",
        "x-codex-secondary-reset-at",
    ];
    pub(super) const MONTHLY: Slot = [
        "x-codex-monthly-used-percent",
        "x-codex-monthly-window-minutes",
        "x-codex-monthly-reset-at",
    ];
}

#[derive(Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    plan_type: &'a str,
    rate_limits: Limit<EventWindows>,
    credits: Option<CreditsShown>,
}

#[derive(Serialize)]
struct Usage<'a> {
    plan_type: &'a str,
    rate_limit: Limit<UsageWindows>,
    credits: Option<CreditsShown>,
    rate_limit_reset_credits: Option<()>,
    additional_rate_limits: Vec<AdditionalLimit<'a>>,
}

#[derive(Serialize)]
struct AdditionalLimit<'a> {
    limit_name: &'a str,
    metered_feature: &'a str,
    rate_limit: Limit<UsageWindows>,
}

#[derive(Serialize)]
struct Limit<W> {
    allowed: bool,
    limit_reached: bool,
    #[serde(flatten)]
    windows: W,
}

#[derive(Serialize)]
struct EventWindows {
    primary: Option<EventWindow>,
    secondary: Option<EventWindow>,
    #[serde(skip_serializing_if = "Option::is_none")]
    monthly: Option<EventWindow>,
}

#[derive(Serialize)]
struct UsageWindows {
    primary_window: Option<UsageWindow>,
    secondary_window: Option<UsageWindow>,
    monthly_window: Option<UsageWindow>,
}

#[derive(Serialize)]
struct EventWindow {
    used_percent: f64,
    window_minutes: Option<u32>,
    reset_at: Option<i64>,
}

#[derive(Serialize)]
struct UsageWindow {
    used_percent: u8,
    limit_window_seconds: i64,
    reset_after_seconds: i64,
    reset_at: i64,
}

#[derive(Serialize)]
struct CreditsShown {
    has_credits: bool,
    unlimited: bool,
    balance: Option<String>,
    approx_local_messages: Option<()>,
    approx_cloud_messages: Option<()>,
}

impl From<Credits> for CreditsShown {
    fn from(credits: Credits) -> Self {
        Self {
            has_credits: credits.has_credits,
            unlimited: credits.unlimited,
            balance: credits.balance.map(|balance| balance.to_string()),
            approx_local_messages: None,
            approx_cloud_messages: None,
        }
    }
}

fn decimal(number: f64) -> HeaderValue {
    HeaderValue::from_str(&number.to_string()).expect("a number is printable ASCII")
}

fn json(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value)
        .expect("plain data with string keys serialises")
        .into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::event::{Kind, kind};
    use crate::protocol::limits::{Section, Window, from_event, from_headers, from_usage};
    use serde_json::{Value, json};

    const NOW: i64 = 1_800_000_000;

    fn all() -> QuotaVisibility<'static> {
        QuotaVisibility::new(None, None, false)
    }

    fn view() -> PoolView {
        let window = |used_percent, window_minutes, after| PoolWindow {
            used_percent,
            window_minutes,
            resets_at: Some(NOW + after),
        };
        PoolView {
            plan_type: "pro".into(),
            primary: Some(window(31.4, 300, 4_200)),
            secondary: Some(window(55.0, 10_080, 90_000)),
            monthly: None,
            limit_reached: false,
            credits: Some(Credits {
                has_credits: true,
                unlimited: false,
                balance: Some(12.5),
            }),
            families: Vec::new(),
        }
    }

    #[test]
    fn the_usage_answer_is_the_documented_one() {
        let usage: Value = serde_json::from_slice(&view().usage(NOW, all())).expect("JSON");
        assert_eq!(
            usage,
            json!({"plan_type": "pro", "rate_limit": {"allowed": true, "limit_reached": false,
                "primary_window": {"used_percent": 31, "limit_window_seconds": 18_000, "reset_after_seconds": 4_200, "reset_at": NOW + 4_200},
                "secondary_window": {"used_percent": 55, "limit_window_seconds": 604_800, "reset_after_seconds": 90_000, "reset_at": NOW + 90_000},
                "monthly_window": null},
              "credits": {"has_credits": true, "unlimited": false, "balance": "12.5", "approx_local_messages": null, "approx_cloud_messages": null},
              "rate_limit_reset_credits": null, "additional_rate_limits": []})
        );
    }

    #[test]
    fn a_window_without_a_reset_starts_now() {
        let fresh = PoolWindow {
            used_percent: 0.0,
            window_minutes: 300,
            resets_at: None,
        };
        let view = PoolView {
            primary: Some(fresh),
            ..PoolView::default()
        };
        let usage: Value = serde_json::from_slice(&view.usage(NOW, all())).expect("JSON");
        assert_eq!(
            usage["rate_limit"]["primary_window"]["reset_at"],
            NOW + 18_000
        );
    }

    #[test]
    fn what_we_say_reads_back_as_what_we_meant() {
        let view = view();
        let event = view.event(all()).expect("everything may be seen");
        assert_eq!(kind(&event), Kind::RateLimits);
        let observations = [
            from_headers(&view.headers(all()).into_iter().collect(), NOW).remove(0),
            from_event(&event, NOW).remove(0),
            from_usage(&view.usage(NOW, all()), NOW)
                .expect("an object")
                .observations
                .remove(0),
        ];
        for observation in observations {
            assert_eq!(observation.credits, view.credits);
            let windows: Vec<_> = observation
                .windows
                .iter()
                .map(|w| (w.window, w.used_percent.floor(), w.resets_at))
                .collect();
            assert_eq!(
                windows,
                [
                    (Window::FiveHour, 31.0, Some(NOW + 4_200)),
                    (Window::Weekly, 55.0, Some(NOW + 90_000))
                ]
            );
        }
    }

    #[test]
    fn nothing_known_says_nothing() {
        assert!(PoolView::default().headers(all()).is_empty());
        let event = PoolView::default().event(all()).expect("all may be seen");
        let event: Value = serde_json::from_slice(&event).expect("JSON");
        assert_eq!(event["rate_limits"]["primary"], Value::Null);
    }

    /// Names and non-null places, so that nothing is told under any name.
    fn told(json: &Value, path: &str, out: &mut Vec<String>) {
        match json {
            Value::Object(fields) => {
                for (name, value) in fields {
                    told(value, &format!("{path}/{name}"), out);
                }
            }
            Value::Null => {}
            Value::Array(items) if items.is_empty() => {}
            _ => out.push(path.trim_start_matches('/').to_owned()),
        }
    }

    #[test]
    fn each_spelling_tells_what_may_be_seen_and_nothing_else() {
        use Section::{Limits, Pool};
        let exhausted = PoolView {
            limit_reached: true,
            secondary: None,
            ..view()
        };
        let slots = ["used-percent", "window-minutes", "reset-at"];
        let credits = ["has-credits", "unlimited", "balance"];
        let named = |slots: &[&str], credits: &[&str]| {
            let slots = slots.iter().map(|slot| format!("x-codex-primary-{slot}"));
            let credits = credits.iter().map(|name| format!("x-codex-credits-{name}"));
            slots.chain(credits).collect::<Vec<_>>()
        };
        let event = ["rate_limits/allowed", "rate_limits/limit_reached"];
        let windows = ["used_percent", "window_minutes", "reset_at"];
        let balance = [
            "credits/balance",
            "credits/has_credits",
            "credits/unlimited",
        ];
        let granted: [(&[Section], [usize; 3], bool); 4] = [
            // Of the headers: slots and credits; of the event: fields of its window.
            (&[Pool, Limits], [3, 3, 3], true),
            (&[Pool], [1, 3, 1], true),
            (&[Limits], [0, 0, 0], true),
            (&[], [0, 0, 0], false),
        ];
        for hidden in [false, true] {
            for (sections, [shown, paid, fields], is_told) in granted {
                let seen = QuotaVisibility::new(Some(sections), None, hidden);
                let [shown, paid, fields] = match hidden {
                    false => [shown, paid, fields],
                    true => [0, 0, 0],
                };
                let both = sections.len() == 2 && !hidden;
                let case = format!("{sections:?} {hidden}");

                let names: Vec<_> = exhausted
                    .headers(seen)
                    .into_iter()
                    .map(|(name, _)| name.as_str().to_owned())
                    .collect();
                let mut expected = named(&slots[..shown], &credits[..paid]);
                if sections == [Limits] && !hidden {
                    expected = named(&slots[1..], &[]);
                }
                assert_eq!(names, expected, "{case}");

                let sent = exhausted.event(seen);
                assert_eq!(sent.is_some(), is_told && !hidden, "{case}");
                if let Some(sent) = sent {
                    let sent: Value = serde_json::from_slice(&sent).expect("JSON");
                    let mut places = Vec::new();
                    told(&sent, "", &mut places);
                    let mut expected: Vec<String> = ["type", "plan_type"]
                        .into_iter()
                        .chain(event)
                        .map(str::to_owned)
                        .collect();
                    expected.extend(balance[..paid].iter().map(|&name| name.to_owned()));
                    expected.extend(
                        windows[..fields]
                            .iter()
                            .map(|name| format!("rate_limits/primary/{name}")),
                    );
                    places.sort();
                    expected.sort();
                    assert_eq!(places, expected, "{case}");
                    assert_eq!(sent["rate_limits"]["limit_reached"], both, "{case}");
                    assert_eq!(sent["rate_limits"]["allowed"], !both, "{case}");
                }

                let usage: Value =
                    serde_json::from_slice(&exhausted.usage(NOW, seen)).expect("JSON");
                assert_eq!(usage["rate_limit"]["limit_reached"], both, "{case}");
                assert_eq!(usage["rate_limit"]["allowed"], !both, "{case}");
                assert_eq!(
                    usage["rate_limit"]["primary_window"].is_object(),
                    both,
                    "{case}"
                );
                assert_eq!(usage["credits"].is_object(), paid > 0, "{case}");
            }
        }
    }
}

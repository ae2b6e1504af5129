//! What upstream says about the quota of an account, from three feeds into one shape.
//!
//! Response headers (`x-codex-*`), `codex.rate_limits` events and the `/wham/usage` answer all read as [`Observation`]s. A
//! window is told by its **duration**, never by the slot in which it came: free plans report a weekly or a monthly window as
//! primary. The way back, what clients see of the pool, is [`PoolView`].
//!
//! Invariants: percentages are finite and not negative; a reset lies ahead within 366 days, or there is none; a window whose
//! reset has passed reads as unused; no family has the same window twice.

mod feed;
mod key_usage;
mod pool;
mod visibility;

use std::borrow::Cow;
use std::fmt;

pub use feed::{UsageReport, active_family, from_event, from_headers, from_usage};
pub use key_usage::{Remaining, UpstreamLimit};
pub use pool::{PoolFamily, PoolView, PoolWindow};
pub use visibility::{QuotaVisibility, Section};

/// The limit that a quota belongs to: `codex`, or that of a model or feature such as `codex_bengalfox`.
#[derive(
    Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub struct Family(Cow<'static, str>);

impl Family {
    /// The family of ordinary traffic.
    pub const CODEX: Self = Self(Cow::Borrowed("codex"));

    /// A family by any of its spellings: lower case, with underscores, and no longer than a name. Nothing said means [`Family::CODEX`].
    pub fn new(name: &str) -> Self {
        let letters = name.trim().chars().filter(|letter| !letter.is_control());
        let name: String = letters.take(64).collect();
        match name.to_ascii_lowercase().replace('-', "_") {
            name if name.is_empty() || name == "codex" => Self::CODEX,
            name => Self(Cow::Owned(name)),
        }
    }

    /// Its name, e.g. `codex_bengalfox`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for Family {
    fn default() -> Self {
        Self::CODEX
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A quota window by its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Window {
    /// 300 minutes.
    FiveHour,
    /// 10 080 minutes.
    Weekly,
    /// 43 200 minutes, or a calendar month.
    Monthly,
    /// Any other length, in minutes.
    Other(u32),
}

impl Window {
    /// The window of about so many minutes; upstream is a minute or a few days off at times.
    pub fn from_minutes(minutes: u32) -> Self {
        match minutes {
            285..=315 => Self::FiveHour,
            9_576..=10_584 => Self::Weekly,
            38_880..=46_080 => Self::Monthly, // 27 to 32 days
            other => Self::Other(other),
        }
    }

    /// Its nominal length in minutes; [`Window::from_minutes`] reads it back.
    pub fn minutes(self) -> u32 {
        match self {
            Self::FiveHour => 300,
            Self::Weekly => 10_080,
            Self::Monthly => 43_200,
            Self::Other(minutes) => minutes,
        }
    }
}

/// One window as observed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WindowSample {
    /// Which window.
    pub window: Window,
    /// Percent used: finite, >= 0; upstream goes over 100 at times.
    pub used_percent: f64,
    /// Its length as upstream gave it, in minutes.
    pub window_minutes: u32,
    /// When it resets, epoch seconds; unknown or already passed is `None`.
    pub resets_at: Option<i64>,
}

impl WindowSample {
    /// The sample as it reads at `now`: upstream may never report a window again whose reset has passed.
    pub fn at(self, now: i64) -> Self {
        match self.resets_at {
            Some(reset) if reset <= now => Self {
                used_percent: 0.0,
                resets_at: None,
                ..self
            },
            _ => self,
        }
    }
}

/// Credits that keep an account usable beyond its windows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Credits {
    /// Upstream says that there are some.
    pub has_credits: bool,
    /// They never run out.
    pub unlimited: bool,
    /// How many: finite, >= 0.
    pub balance: Option<f64>,
}

impl Credits {
    /// Whether an exhausted window does not matter.
    pub fn usable(&self) -> bool {
        self.unlimited || self.has_credits || self.balance.is_some_and(|balance| balance > 0.0)
    }
}

/// What one feed said of one family of one account.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observation {
    /// Whose limit it is.
    pub family: Family,
    /// The windows, each at most once.
    pub windows: Vec<WindowSample>,
    /// Credits, where the feed tells.
    pub credits: Option<Credits>,
    /// The account's plan, where the feed tells.
    pub plan_type: Option<String>,
    /// Upstream's own verdict, where the feed tells. It ranks; only errors block.
    pub limit_reached: Option<bool>,
}

impl Observation {
    /// Whether nothing was said.
    fn is_empty(&self) -> bool {
        let told = self.credits.is_some() || self.plan_type.is_some();
        self.windows.is_empty() && !told && self.limit_reached.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_is_told_by_its_length() {
        use Window::*;
        let cases = [
            (300, FiveHour),
            (299, FiveHour),
            (10_080, Weekly),
            (10_079, Weekly),
            (43_200, Monthly),
            (44_640, Monthly),
            (40_320, Monthly),
            (60, Other(60)),
            (1_440, Other(1_440)),
        ];
        for (minutes, window) in cases {
            assert_eq!(Window::from_minutes(minutes), window, "{minutes}");
            assert_eq!(
                Window::from_minutes(window.minutes()),
                window,
                "{minutes} survives storage"
            );
        }
    }

    #[test]
    fn a_family_has_one_spelling() {
        assert_eq!(Family::new("a\0b").as_str(), "ab");
        assert_eq!(Family::new(&"é".repeat(1_000)).as_str().chars().count(), 64);
        for name in ["", " codex ", "CODEX"] {
            assert_eq!(Family::new(name), Family::default(), "{name}");
        }
        assert_eq!(
            Family::new("Codex-Bengalfox"),
            Family::new("codex_bengalfox")
        );
        assert_eq!(
            Family::new("codex-bengalfox").to_string(),
            "codex_bengalfox"
        );
    }

    #[test]
    fn a_window_whose_reset_has_passed_reads_as_unused() {
        let sample = WindowSample {
            window: Window::FiveHour,
            used_percent: 99.0,
            window_minutes: 300,
            resets_at: Some(1_000),
        };
        assert_eq!(sample.at(999), sample);
        let passed = sample.at(1_000);
        assert_eq!((passed.used_percent, passed.resets_at), (0.0, None));
    }

    #[test]
    fn any_kind_of_credit_is_usable() {
        let none = Credits::default();
        let cases = [
            (none, false),
            (
                Credits {
                    balance: Some(0.0),
                    ..none
                },
                false,
            ),
            (
                Credits {
                    balance: Some(0.5),
                    ..none
                },
                true,
            ),
            (
                Credits {
                    unlimited: true,
                    ..none
                },
                true,
            ),
            (
                Credits {
                    has_credits: true,
                    ..none
                },
                true,
            ),
        ];
        for (credits, usable) in cases {
            assert_eq!(credits.usable(), usable, "{credits:?}");
        }
    }
}

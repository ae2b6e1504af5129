//! One try of a turn at one account, and what the tries of a turn add up to.
//!
//! The array in `turns.attempts` is written as a whole by the one process that holds the open turn; the next holder is handed it when it
//! reopens the turn.

use std::{borrow::Cow, time::Duration};

use serde::{Deserialize, Serialize};

use super::price::{self, Tier};
use crate::{
    ids::{AccountId, BootId, TurnId},
    protocol::usage::Usage,
};

/// What is about to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Try {
    /// Where to.
    pub account: AccountId,
    /// `http` or `websocket`.
    pub transport: &'static str,
    /// Length of the body, decoded, without images and files that stand in it.
    pub request_bytes: u64,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug)]
pub struct End {
    /// Upstream's HTTP status, if it answered with one.
    pub status: Option<u16>,
    /// `completed`, or the failure class.
    pub class: &'static str,
    /// What it used.
    pub metered: Metered,
    /// As upstream billed it.
    pub tier: Tier,
    /// From its begin.
    pub took: Duration,
}

/// What is known of an attempt's usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metered {
    /// Upstream said.
    Reported(Usage),
    /// Nothing was sent, or upstream refused it before it began a response.
    Nothing,
    /// It was cut: upstream may have charged it and will not say.
    Unknown {
        /// Bytes of output seen until then.
        visible_bytes: u64,
    },
}

/// An element of `turns.attempts`. While `class` is absent it runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// The request on whose behalf; several of them are a turn and its retries.
    pub request: TurnId,
    /// Where to.
    pub account_id: AccountId,
    /// By which incarnation.
    pub boot_id: BootId,
    /// `http` or `websocket`.
    pub transport: Cow<'static, str>,
    /// What an estimate of its input starts from.
    pub request_bytes: u64,
    /// Upstream's HTTP status.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    /// `completed`, or the failure class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<Cow<'static, str>>,
    /// Zero while it runs.
    #[serde(default, with = "UsageJson", skip_serializing_if = "unused")]
    pub usage: Usage,
    /// Nano-dollars; absent where there is no price.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost: Option<i64>,
    /// Whether `usage` is our guess.
    #[serde(default)]
    pub estimated: bool,
    /// How long it took.
    #[serde(default)]
    pub ms: i32,
}

/// [`Usage`] as it is kept.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Usage")]
struct UsageJson {
    input: u64,
    cached_input: u64,
    output: u64,
    reasoning: u64,
    total: u64,
}

fn unused(usage: &Usage) -> bool {
    *usage == Usage::default()
}

impl Attempt {
    pub(super) fn begin(request: TurnId, boot: BootId, next: Try) -> Self {
        Self {
            request,
            account_id: next.account,
            boot_id: boot,
            transport: next.transport.into(),
            request_bytes: next.request_bytes,
            status: None,
            class: None,
            usage: Usage::default(),
            cost: None,
            estimated: false,
            ms: 0,
        }
    }

    pub(super) fn runs(&self) -> bool {
        self.class.is_none()
    }

    pub(super) fn end(&mut self, model: &str, end: End) {
        self.status = end.status;
        self.class = Some(end.class.into());
        self.ms = millis(end.took);
        (self.usage, self.estimated) = match end.metered {
            Metered::Reported(usage) => (usage, false),
            Metered::Nothing => (Usage::default(), false),
            Metered::Unknown { visible_bytes } => {
                (estimate(self.request_bytes, visible_bytes), true)
            }
        };
        // What used nothing costs nothing, also where nobody knows the price.
        self.cost = if unused(&self.usage) {
            Some(0)
        } else {
            price::cost(model, end.tier, &self.usage)
        };
    }

    /// Ends an attempt of which nobody will say more.
    pub(super) fn lose(&mut self, model: &str) {
        self.end(
            model,
            End {
                status: None,
                class: "lost",
                metered: Metered::Unknown { visible_bytes: 0 },
                tier: Tier::Standard,
                took: Duration::ZERO,
            },
        );
    }
}

/// A guess at the tokens of a cut attempt: four bytes a token.
fn estimate(request_bytes: u64, visible_bytes: u64) -> Usage {
    let (input, output) = (request_bytes.div_ceil(4), visible_bytes.div_ceil(4));
    Usage {
        input,
        output,
        total: input + output,
        ..Usage::default()
    }
}

/// Sums over attempts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// How many.
    pub attempts: i32,
    /// Tokens.
    pub usage: Usage,
    /// Nano-dollars; `None` if one of them has no price.
    pub cost: Option<i64>,
    /// Whether one of them is our guess.
    pub estimated: bool,
}

impl Totals {
    /// Adds up.
    #[must_use]
    pub fn of<'a>(attempts: impl IntoIterator<Item = &'a Attempt>) -> Self {
        let none = Self {
            cost: Some(0),
            ..Self::default()
        };
        attempts.into_iter().fold(none, |sum, attempt| Self {
            attempts: sum.attempts + 1,
            usage: sum.usage + attempt.usage,
            cost: sum.cost.zip(attempt.cost).map(|(a, b)| a.saturating_add(b)),
            estimated: sum.estimated || attempt.estimated,
        })
    }
}

/// Whole milliseconds, as columns hold them.
pub(super) fn millis(duration: Duration) -> i32 {
    i32::try_from(duration.as_millis()).unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(request_bytes: u64) -> Attempt {
        let next = Try {
            account: AccountId::new(),
            transport: "http",
            request_bytes,
        };
        Attempt::begin(TurnId::new(), BootId::new(), next)
    }

    fn ended(model: &str, metered: Metered) -> Attempt {
        let mut attempt = attempt(9);
        attempt.end(
            model,
            End {
                status: Some(200),
                class: "completed",
                metered,
                tier: Tier::Standard,
                took: Duration::from_millis(7),
            },
        );
        attempt
    }

    #[test]
    fn only_what_upstream_reported_is_not_marked() {
        let reported = Usage {
            input: 10,
            output: 2,
            total: 12,
            ..Usage::default()
        };
        let guessed = Usage {
            input: 3,
            output: 1,
            total: 4,
            ..Usage::default()
        };
        for (metered, usage, estimated, cost, unpriced) in [
            (
                Metered::Reported(reported),
                reported,
                false,
                Some(45_500),
                None,
            ),
            (Metered::Nothing, Usage::default(), false, Some(0), Some(0)),
            (
                Metered::Unknown { visible_bytes: 1 },
                guessed,
                true,
                Some(19_250),
                None,
            ),
        ] {
            let attempt = ended("gpt-5.2", metered);
            assert_eq!(
                (attempt.usage, attempt.estimated),
                (usage, estimated),
                "{metered:?}"
            );
            assert_eq!(attempt.cost, cost, "{metered:?}");
            assert_eq!(ended("unheard-of", metered).cost, unpriced, "{metered:?}");
        }
    }

    #[test]
    fn one_attempt_without_price_makes_the_sum_unpriced_and_one_guess_marks_it() {
        let known = ended("gpt-5.2", Metered::Unknown { visible_bytes: 0 });
        let unknown = ended(
            "unheard-of",
            Metered::Reported(Usage {
                input: 5,
                ..Usage::default()
            }),
        );
        let free = ended("unheard-of", Metered::Nothing);
        let totals = Totals::of([&known, &free]);
        assert_eq!(
            (totals.attempts, totals.cost, totals.estimated),
            (2, Some(5_250), true)
        );
        let totals = Totals::of([&unknown, &free]);
        assert_eq!(
            (totals.cost, totals.estimated, totals.usage.input),
            (None, false, 5)
        );
        assert_eq!(Totals::of([]).cost, Some(0));
    }

    #[test]
    fn an_attempt_survives_its_way_through_json_and_one_of_a_newer_release_is_read() {
        for attempt in [
            attempt(9),
            ended("gpt-5.2", Metered::Unknown { visible_bytes: 5 }),
        ] {
            let mut json = serde_json::to_value(&attempt).unwrap();
            json["something_new"] = 1.into();
            assert_eq!(serde_json::from_value::<Attempt>(json).unwrap(), attempt);
        }
    }
}

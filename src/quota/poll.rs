//! Whether it is worth asking the usage endpoint about an account. Pure.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::{
    Source,
    merge::{POLL_MARGIN, is_of_quota},
    state::Limits,
};
use crate::{protocol::limits::Family, routing::effective_used};

/// What turns bring stands in for this many answers; only the endpoint tells of plans, further families and credits.
const AT_LEAST_EVERY: u32 = 10;

/// Why the endpoint need not be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Skip {
    /// Turns have told the same lately.
    Fresh,
    /// The account is blocked, and an answer could not end that (yet).
    Blocked,
}

/// `every` is the interval, `answered_at` when the endpoint last answered.
pub(super) fn skip(
    limits: &Limits,
    answered_at: Option<Timestamp>,
    every: Duration,
    now: Timestamp,
) -> Option<Skip> {
    let every = SignedDuration::try_from(every).unwrap_or(SignedDuration::MAX);
    let age = |at: Timestamp| now.duration_since(at);
    let answered_at = answered_at?;
    let blocked = limits.blocks.get(&Family::CODEX);
    if let Some(block) = blocked.filter(|block| block.stands() && block.until > now.as_second()) {
        let hopeless = !is_of_quota(&block.reason) || age(block.blocked_at) < POLL_MARGIN;
        return hopeless.then_some(Skip::Blocked);
    }
    if age(answered_at) >= every * i32::try_from(AT_LEAST_EVERY).unwrap_or(i32::MAX) {
        return None;
    }
    let mut fresh = limits.windows.iter().filter(|((family, minutes), sample)| {
        let passive = matches!(sample.source, Source::Header | Source::Event);
        let window = sample.view(family, *minutes);
        // A window that has just been reset reads as unused until somebody looks.
        let reset = sample.used_percent > 0.0 && effective_used(&window, now.as_second()) == 0.0;
        *family == Family::CODEX && passive && age(sample.observed_at) < every && !reset
    });
    fresh.next().map(|_| Skip::Fresh)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Block, Sample};

    const NOW: i64 = 1_800_000_000;
    const EVERY: Duration = Duration::from_secs(60);

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(NOW + seconds).unwrap()
    }

    fn seen(family: &str, observed_at: i64, resets_in: i64, source: Source) -> Limits {
        let sample = Sample {
            used_percent: 40.0,
            resets_at: Some(NOW + resets_in),
            observed_at: at(observed_at),
            source,
        };
        Limits {
            windows: [((Family::new(family), 300), sample)].into(),
            ..Limits::default()
        }
    }

    fn blocked(mut limits: Limits, blocked_at: i64, until: i64, reason: &str) -> Limits {
        let block = Block {
            blocked_at: at(blocked_at),
            until: NOW + until,
            reason: reason.into(),
            lifted_at: None,
        };
        limits.blocks.insert(Family::CODEX, block);
        limits
    }

    #[test]
    fn the_endpoint_is_asked_unless_turns_have_told_or_it_could_not_help() {
        use Source::{Error, Event, Header, Poll};
        let fresh = || seen("codex", -10, 900, Header);
        for (what, limits, answered_at, expected) in [
            ("it never answered", fresh(), None, None),
            ("nothing is known", Limits::default(), Some(-70), None),
            ("a turn told", fresh(), Some(-70), Some(Skip::Fresh)),
            (
                "an event told",
                seen("codex", -10, 900, Event),
                Some(-70),
                Some(Skip::Fresh),
            ),
            ("it is the tenth time", fresh(), Some(-600), None),
            (
                "that is old",
                seen("codex", -60, 900, Header),
                Some(-70),
                None,
            ),
            (
                "its reset has passed",
                seen("codex", -10, 0, Header),
                Some(-70),
                None,
            ),
            (
                "only a poll told",
                seen("codex", -10, 900, Poll),
                Some(-70),
                None,
            ),
            (
                "only a refusal told",
                seen("codex", -10, 900, Error),
                Some(-70),
                None,
            ),
            (
                "it was of another family",
                seen("codex_bengalfox", -10, 900, Header),
                Some(-70),
                None,
            ),
            (
                "a throttle ends by itself",
                blocked(Limits::default(), -300, 60, "rate_limit_exceeded"),
                Some(-700),
                Some(Skip::Blocked),
            ),
            (
                "the refusal is too fresh",
                blocked(Limits::default(), -119, 900, "usage_limit_reached"),
                Some(-700),
                Some(Skip::Blocked),
            ),
            (
                "the quota may have been reset early",
                blocked(fresh(), -120, 900, "usage_limit_reached"),
                Some(-70),
                None,
            ),
            (
                "the block has ended",
                blocked(Limits::default(), -300, 0, "rate_limit_exceeded"),
                Some(-70),
                None,
            ),
        ] {
            let answered_at = answered_at.map(at);
            assert_eq!(skip(&limits, answered_at, EVERY, at(0)), expected, "{what}");
        }
    }
}

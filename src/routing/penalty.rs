//! Which accounts rank last for a while because they failed.

use std::sync::atomic::{AtomicI64, Ordering};

/// The first penalty, seconds; doubled by every failure after it has passed.
const FIRST: i64 = 30;
/// The longest.
const LONGEST: i64 = 300;
/// Bits of the state that count the penalties since the last success; the others hold the end, epoch seconds.
const COUNT_BITS: u32 = 3;

/// What this process holds against an account. It ranks, it never excludes.
#[derive(Debug, Default)]
pub struct Penalty(AtomicI64);

impl Penalty {
    /// Whether the account ranks last at `now`, epoch seconds.
    #[must_use]
    pub fn lasts(&self, now: i64) -> bool {
        self.ends_at() > now
    }

    /// The end of the last one, epoch seconds.
    pub(super) fn ends_at(&self) -> i64 {
        self.0.load(Ordering::Relaxed) >> COUNT_BITS
    }

    /// Notes a failure that is the account's fault; yields the end of the penalty, epoch seconds, if one begins. Failures during a penalty
    /// change nothing: turns that fail together are one failure.
    pub fn strike(&self, now: i64) -> Option<i64> {
        let mut end = None;
        let strike = |state: i64| {
            let (until, count) = (state >> COUNT_BITS, state & ((1 << COUNT_BITS) - 1));
            end = (until <= now).then(|| now + (FIRST << count).min(LONGEST));
            end.map(|end| (end << COUNT_BITS) | (count + 1).min(4))
        };
        // Refused only where a penalty lasts.
        let _ = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, strike);
        end
    }

    /// Forgets everything: the account has served.
    pub fn lift(&self) {
        self.0.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_penalty_doubles_to_five_minutes_and_a_success_lifts_it() {
        let penalty = Penalty::default();
        let mut now = 1_800_000_000;
        assert!(!penalty.lasts(now));
        for seconds in [30, 60, 120, 240, 300, 300, 300] {
            assert_eq!(penalty.strike(now), Some(now + seconds));
            assert_eq!(penalty.strike(now + seconds - 1), None, "one failure");
            assert!(penalty.lasts(now + seconds - 1));
            now += seconds;
            assert!(!penalty.lasts(now));
        }
        penalty.strike(now);
        penalty.lift();
        assert!(!penalty.lasts(now));
        assert_eq!(penalty.strike(now), Some(now + 30), "the count is gone too");
    }
}

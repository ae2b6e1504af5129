//! The database's time of local instants.
//!
//! The offset to the database is learnt anew with every heartbeat and trembles. One instant must always read as the same time, or two
//! feeds of one attempt would seem to have begun apart: so instants are read from a fixed pair that is only replaced when it has drifted.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

/// How far the pair may be off.
const TOLERANCE: Duration = Duration::from_millis(250);

/// An instant and the database's time at it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Anchor {
    instant: Instant,
    time: Timestamp,
}

impl Anchor {
    pub(super) fn new(instant: Instant, time: Timestamp) -> Self {
        Self { instant, time }
    }

    /// The time of `instant`, where it is `now` and the database's clock shows `time`. In whole microseconds, as Postgres keeps it.
    pub(super) fn time_of(&mut self, instant: Instant, now: Instant, time: Timestamp) -> Timestamp {
        if self.at(now).duration_since(time).unsigned_abs() > TOLERANCE {
            *self = Self::new(now, time);
        }
        let time = self.at(instant);
        Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(time)
    }

    fn at(&self, instant: Instant) -> Timestamp {
        let ahead = signed(instant.saturating_duration_since(self.instant));
        let behind = signed(self.instant.saturating_duration_since(instant));
        self.time
            .saturating_add(ahead - behind)
            .unwrap_or(Timestamp::MAX)
    }
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instant_keeps_its_time_while_the_offset_trembles_and_follows_a_leap() {
        let start = Instant::now();
        let time = Timestamp::from_second(1_800_000_000).unwrap();
        let mut anchor = Anchor::new(start, time);
        let began = start + Duration::from_secs(5);
        let first = anchor.time_of(
            began,
            start + Duration::from_secs(6),
            time + SignedDuration::from_millis(6_100),
        );
        assert_eq!(first, time + SignedDuration::from_secs(5));
        let again = anchor.time_of(
            began,
            start + Duration::from_secs(7),
            time + SignedDuration::from_millis(6_900),
        );
        assert_eq!(again, first);
        let leapt = anchor.time_of(
            began,
            start + Duration::from_secs(8),
            time + SignedDuration::from_secs(68),
        );
        assert_eq!(leapt, first + SignedDuration::from_secs(60));
        assert_eq!(
            anchor.time_of(
                start,
                start + Duration::from_secs(8),
                time + SignedDuration::from_secs(68)
            ),
            time + SignedDuration::from_secs(60)
        );
    }
}

//! What this process does at an account now.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::Penalty;

/// The turns of this process at an account, and what it holds against it. Shared by all views.
#[derive(Debug, Default)]
pub struct Load {
    in_flight: AtomicU32,
    last: AtomicU64,
    /// What failed of late.
    pub penalty: Penalty,
}

impl Load {
    /// Turns in flight.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// When a turn last began here, as a number that grows with every turn; 0 = never.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last.load(Ordering::Relaxed)
    }

    /// Begins a turn, the `turn`th of this process, unless `at_most` run already; true if it did. Who begins one ends it with
    /// [`Load::leave`].
    pub fn enter(&self, turn: u64, at_most: Option<u32>) -> bool {
        let room = |running: u32| {
            at_most
                .is_none_or(|most| running < most)
                .then_some(running + 1)
        };
        let entered = self
            .in_flight
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, room)
            .is_ok();
        if entered {
            self.last.store(turn, Ordering::Relaxed);
        }
        entered
    }

    /// Ends a turn that [`Load::enter`] began.
    pub fn leave(&self) {
        self.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where draws fall: numbers in 0..1 that fill it evenly however many are taken (multiples of the golden ratio), so that shares come out
/// right over a few turns already. Replicas begin at random, hence do not draw alike.
#[derive(Debug)]
pub struct Points {
    start: u64,
    taken: AtomicU64,
}

impl Points {
    /// 2^64 over the golden ratio.
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

    /// Beginning anywhere.
    #[must_use]
    pub fn new(start: u64) -> Self {
        Self {
            start,
            taken: AtomicU64::new(0),
        }
    }

    /// How many were taken with this one, and the next.
    #[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
    pub fn take(&self) -> (u64, f64) {
        let number = self.taken.fetch_add(1, Ordering::Relaxed) + 1;
        let point = self.start.wrapping_add(number.wrapping_mul(Self::STEP));
        (number, (point >> 11) as f64 / (1_u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_turns_run_at_an_account_than_may() {
        let load = Load::default();
        assert!(load.enter(1, Some(2)) && load.enter(2, Some(2)));
        assert!(!load.enter(3, Some(2)));
        assert_eq!((load.in_flight(), load.last()), (2, 2));
        load.leave();
        assert!(load.enter(4, Some(2)) && load.enter(5, None));
        assert_eq!((load.in_flight(), load.last()), (3, 5));
    }

    #[test]
    fn points_fill_their_range_evenly_from_any_start() {
        for start in [0, 7, u64::MAX / 3, u64::MAX] {
            let points = Points::new(start);
            let mut tenths = [0_u32; 10];
            for number in 1..=1_000 {
                let (taken, point) = points.take();
                assert_eq!(taken, number);
                tenths[(point * 10.0) as usize] += 1;
            }
            assert!(
                tenths.iter().all(|count| (97..=103).contains(count)),
                "{start}: {tenths:?}"
            );
        }
    }
}

//! The bytes of request bodies that one replica holds at once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// All bodies together.
const TOTAL: usize = 512 << 20;
/// The unit in which the budget is counted.
const UNIT: usize = 1 << 10;

/// The replica's budget. Clones share it.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Semaphore>);

/// Bytes taken from the budget, given back when dropped.
#[derive(Debug, Default)]
pub struct Held(Option<OwnedSemaphorePermit>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(TOTAL / UNIT)))
    }
}

impl Budget {
    /// Takes room for `bytes`, rounded up to KiB; `None` when the replica holds as much as it may.
    #[must_use]
    pub fn take(&self, bytes: usize) -> Option<Held> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        Arc::clone(&self.0)
            .try_acquire_many_owned(units)
            .ok()
            .map(|permit| Held(Some(permit)))
    }

    /// Bytes that are taken, and that may be.
    #[must_use]
    pub fn used(&self) -> (usize, usize) {
        (TOTAL - self.free(), TOTAL)
    }

    /// Bytes that could be taken now.
    #[must_use]
    pub fn free(&self) -> usize {
        self.0.available_permits() * UNIT
    }
}

/// A message that is arriving in pieces: what has come of it is counted before it is whole. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Inbox(Arc<Mutex<Arriving>>);

#[derive(Debug, Default)]
struct Arriving {
    budget: Budget,
    /// Bytes so far.
    bytes: usize,
    /// For what is more than [`FREE`] of them.
    held: Held,
}

/// What may arrive uncounted, and the step in which the rest is counted.
const FREE: usize = 64 << 10;

impl Inbox {
    /// Counts on this budget.
    #[must_use]
    pub fn new(budget: &Budget) -> Self {
        Self(Arc::new(Mutex::new(Arriving {
            budget: budget.clone(),
            ..Arriving::default()
        })))
    }

    /// Notes that bytes have come. False when the replica holds as much as it may.
    #[must_use]
    pub fn arrived(&self, bytes: usize) -> bool {
        let mut arriving = self.lock();
        arriving.bytes += bytes;
        arriving.hold(FREE)
    }

    /// Notes that these bytes were none of a message.
    pub fn forget(&self, bytes: usize) {
        let mut arriving = self.lock();
        arriving.bytes = arriving.bytes.saturating_sub(bytes);
    }

    /// The message is whole, and this is its size: the next begins. `None` when the replica holds as much as it may.
    #[must_use]
    pub fn whole(&self, bytes: usize) -> Option<Held> {
        let mut arriving = self.lock();
        arriving.bytes = bytes;
        let fits = arriving.hold(0);
        arriving.bytes = 0;
        let held = std::mem::take(&mut arriving.held);
        fits.then_some(held)
    }

    fn lock(&self) -> MutexGuard<'_, Arriving> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arriving {
    /// Takes what is missing of the bytes, beyond those that are free.
    fn hold(&mut self, free: usize) -> bool {
        let missing = self.bytes.saturating_sub(free + self.held.bytes());
        if missing == 0 {
            return true;
        }
        let more = self.budget.take(missing.max(free));
        more.map(|more| self.held.merge(more)).is_some()
    }
}

impl Held {
    fn bytes(&self) -> usize {
        self.0
            .as_ref()
            .map_or(0, |permit| permit.num_permits() * UNIT)
    }

    /// Adds what was taken later.
    pub fn merge(&mut self, other: Self) {
        match (&mut self.0, other.0) {
            (Some(mine), Some(more)) => mine.merge(more),
            (mine @ None, more) => *mine = more,
            (Some(_), None) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_counts_while_it_arrives_and_is_given_back_with_what_it_became() {
        let budget = Budget::default();
        let inbox = Inbox::new(&budget);
        for _ in 0..100 {
            assert!(inbox.arrived(1 << 10));
            inbox.forget(1 << 10);
        }
        assert_eq!(budget.used().0, 0, "what is no message costs nothing");
        let size = 10 << 20;
        for _ in 0..size >> 10 {
            assert!(inbox.arrived(1 << 10));
        }
        assert!(budget.used().0 >= size - FREE, "before it is whole");
        let held = inbox.whole(size).unwrap();
        assert!((size..size + FREE).contains(&budget.used().0));
        drop(held);
        assert_eq!(budget.used().0, 0);

        let others = budget.take(TOTAL - (1 << 20)).unwrap();
        assert!(inbox.arrived(1 << 20) && !inbox.arrived(1 << 20));
        drop((others, inbox));
        assert_eq!(budget.used().0, 0, "nor does one that never became whole");
    }
}

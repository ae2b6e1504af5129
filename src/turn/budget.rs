//! The bytes of request bodies that one replica holds at once.

use std::sync::Arc;

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

impl Held {
    /// Adds what was taken later.
    pub fn merge(&mut self, other: Self) {
        match (&mut self.0, other.0) {
            (Some(mine), Some(more)) => mine.merge(more),
            (mine @ None, more) => *mine = more,
            (Some(_), None) => {}
        }
    }
}

//! The machine's monotonic clock, which two processes share.

use rustix::time::{ClockId, clock_gettime};

/// Microseconds since some fixed moment.
#[must_use]
pub fn micros() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000
        + u64::try_from(now.tv_nsec).unwrap_or(0) / 1_000
}

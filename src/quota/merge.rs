//! How two states of one window, or of one block, become one. `store` says the same in SQL.

use std::{cmp::Ordering, fmt, str::FromStr};

use jiff::{SignedDuration, Timestamp};

use crate::protocol::limits::Credits;

/// The longest believed block, in seconds: upstream has named the year 2446.
const HORIZON: i64 = 366 * 24 * 3_600;
/// A block whose end upstream did not name, in seconds; up to a fifth more, so that replicas do not return in step.
const GUESS: f64 = 60.0;
/// What began so little after a refusal may have begun before it: replicas know the database's clock to within this.
const CLOCK_MARGIN: SignedDuration = SignedDuration::from_secs(1);
/// The usage endpoint counts late: so soon after a refusal it may still say that something is left.
pub(super) const POLL_MARGIN: SignedDuration = SignedDuration::from_mins(2);

/// Where a sample comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// The headers of an answer that refused the turn.
    Error,
    /// An event of a running turn.
    Event,
    /// The headers of an answer that accepted the turn.
    Header,
    /// An answer that served no turn: the usage endpoint, the headers of a document or of a socket's handshake.
    Poll,
    /// The usage endpoint, by leaving it out: the account has no such window any more.
    Unlisted,
}

impl Source {
    /// The word in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Event => "event",
            Self::Header => "header",
            Self::Poll => "poll",
            Self::Unlisted => "unlisted",
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Source {
    type Err = UnknownSource;

    fn from_str(text: &str) -> Result<Self, UnknownSource> {
        [
            Self::Error,
            Self::Event,
            Self::Header,
            Self::Poll,
            Self::Unlisted,
        ]
        .into_iter()
        .find(|source| source.as_str() == text)
        .ok_or(UnknownSource)
    }
}

/// A word that names no [`Source`].
#[derive(Debug, thiserror::Error)]
#[error("unknown source of a sample")]
pub struct UnknownSource;

/// What is known of one window.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Finite, not negative; over 100 at times.
    pub used_percent: f64,
    /// Epoch seconds.
    pub resets_at: Option<i64>,
    /// When the observation began, in whole microseconds.
    pub observed_at: Timestamp,
    /// Its feed.
    pub source: Source,
}

/// What is known of an account's credits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CreditSample {
    /// What upstream said.
    pub credits: Credits,
    /// As in [`Sample`].
    pub observed_at: Timestamp,
    /// Its feed.
    pub source: Source,
}

/// What is known of the block of one family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// When upstream last refused, in whole microseconds.
    pub blocked_at: Timestamp,
    /// Epoch seconds.
    pub until: i64,
    /// Upstream's code of the refusal that lasts longest.
    pub reason: String,
    /// Refusals from before it are over: when the newest observation began that proved so, less a margin for clocks.
    pub lifted_at: Option<Timestamp>,
}

impl Block {
    /// Whether nothing has lifted it; it may have ended by itself.
    #[must_use]
    pub fn stands(&self) -> bool {
        self.lifted_at
            .is_none_or(|lifted_at| self.blocked_at >= lifted_at)
    }
}

/// The newer of two samples by the beginning of their observation. Two feeds of one attempt began together: then the later reset counts,
/// then the higher use, since use only grows until a reset.
#[must_use]
pub fn merge_window(one: Sample, other: Sample) -> Sample {
    let newer = one
        .observed_at
        .cmp(&other.observed_at)
        .then(one.resets_at.cmp(&other.resets_at))
        .then(one.used_percent.total_cmp(&other.used_percent))
        .then(one.source.cmp(&other.source));
    if newer == Ordering::Less { other } else { one }
}

/// Both blocks as one: it ends with the later of them, and began with the later refusal, so that only what began after that lifts it. What
/// the newest lift has ended does not count.
#[must_use]
pub fn merge_block(one: Block, other: Block) -> Block {
    let lifted_at = one.lifted_at.max(other.lifted_at);
    let blocked_at = one.blocked_at.max(other.blocked_at);
    let lifted = |block: &Block| lifted_at.is_some_and(|lifted_at| block.blocked_at < lifted_at);
    let (longer, shorter) = if (one.until, &one.reason) >= (other.until, &other.reason) {
        (one, other)
    } else {
        (other, one)
    };
    // If the newest refusal is itself lifted, both are, and their order does not matter.
    let counts = if lifted(&longer) && !lifted(&shorter) {
        shorter
    } else {
        longer
    };
    Block {
        blocked_at,
        lifted_at,
        ..counts
    }
}

/// Whether a refusal means that a quota is used up, which a report of the quota can disprove; any other is a throttle or a verdict.
pub(super) fn is_of_quota(reason: &str) -> bool {
    matches!(
        reason,
        "usage_limit_reached" | "insufficient_quota" | "quota_exceeded"
    )
}

/// What an observation says against a block.
#[derive(Clone, Copy, Debug)]
pub struct Evidence {
    /// When it began.
    pub observed_at: Timestamp,
    /// Its feed.
    pub source: Source,
    /// Percent used of the fullest window of the family, as far as is known after it.
    pub worst_used: f64,
    /// Whether credits stand in for a full window.
    pub credits: bool,
    /// Upstream's own verdict, where the feed tells.
    pub limit_reached: Option<bool>,
}

/// The new `lifted_at` if an observation proves that a block is over: it began after upstream refused, no window of the family reads as full
/// by it (or credits stand in), upstream does not call the limit reached, and it is more than a poll, unless the block was one of quota. A
/// turn that upstream served after the refusal disproves any kind of throttle; a usage report disproves only that the quota is used up, and
/// not at once.
#[must_use]
pub fn lifts(block: &Block, evidence: &Evidence) -> Option<Timestamp> {
    let margin = match evidence.source {
        Source::Header | Source::Event => CLOCK_MARGIN,
        Source::Poll if is_of_quota(&block.reason) => POLL_MARGIN,
        Source::Poll | Source::Error | Source::Unlisted => return None,
    };
    let room = evidence.worst_used < 100.0 || evidence.credits;
    let began_after = evidence.observed_at.saturating_sub(margin).ok()? > block.blocked_at;
    let lifted_at = evidence.observed_at.saturating_sub(CLOCK_MARGIN).ok()?;
    (room && began_after && evidence.limit_reached != Some(true)).then_some(lifted_at)
}

/// The end of a block in epoch seconds: upstream's own, if it lies ahead and is believable; else a guess, where `jitter` is in 0..1.
#[must_use]
pub fn block_until(named: Option<i64>, now: Timestamp, jitter: f64) -> i64 {
    let seconds = now.as_second();
    named
        .filter(|until| (seconds + 1..=seconds + HORIZON).contains(until))
        .unwrap_or_else(|| {
            let now = now.as_microsecond() as f64 / 1e6;
            (now + GUESS * (1.0 + jitter / 5.0)).ceil() as i64
        })
}

#[cfg(test)]
mod tests;

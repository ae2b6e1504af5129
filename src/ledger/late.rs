//! Turns that Postgres cannot record when they begin: they are recorded when they are settled, which goes on until it succeeds.
//!
//! Few of them, and not for long: a process that dies meanwhile takes what it has not booked with it.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::turn::Opening;

/// For how long turns begin unrecorded.
const LONGEST: Duration = Duration::from_secs(60);
/// Timers are late by less, unless the process itself was stopped.
const LATE: Duration = Duration::from_secs(1);
/// How many may wait to be booked.
const MOST: usize = 1000;

/// Whether Postgres answers, and how many turns wait for it.
#[derive(Debug, Default)]
pub(super) struct Away {
    silence: Mutex<Option<Silence>>,
    waiting: AtomicUsize,
}

/// Answers that were missed in a row.
#[derive(Clone, Copy, Debug)]
struct Silence {
    first: Instant,
    last: Instant,
}

impl Away {
    /// Postgres gave no answer, for which somebody waited since `asked` and at most for `patience`. Who was stopped in between has heard
    /// nothing, and knows nothing.
    pub(super) fn missed(&self, asked: Instant, patience: Duration) {
        let now = Instant::now();
        if now - asked > patience + LATE {
            return;
        }
        self.with(|silence| {
            // Nobody asked for long after the last one: what came between is not known.
            let same = silence.filter(|silence| now - silence.last < LONGEST);
            let first = same.map_or(now, |silence| silence.first);
            *silence = Some(Silence { first, last: now });
        });
    }

    /// Postgres answered.
    pub(super) fn answered(&self) {
        self.with(|silence| *silence = None);
    }

    /// Whether its last answer is still missing, and not for too long.
    pub(super) fn is_bridged(&self) -> bool {
        self.with(|silence| silence.is_some_and(|silence| silence.first.elapsed() < LONGEST))
    }

    /// Room for one more turn.
    pub(super) fn place(self: &Arc<Self>) -> Option<Place> {
        if !self.is_bridged() {
            return None;
        }
        let more = |waiting| (waiting < MOST).then_some(waiting + 1);
        self.waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()?;
        Some(Place(Arc::clone(self)))
    }

    /// How many wait to be booked.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    fn with<T>(&self, look: impl FnOnce(&mut Option<Silence>) -> T) -> T {
        look(&mut self.silence.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A turn that waits; booked when it is dropped, or lost with the process.
#[derive(Debug)]
pub(super) struct Place(Arc<Away>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the recording of a late turn still needs.
#[derive(Debug)]
pub(super) struct Late {
    pub(super) opening: Opening,
    _place: Place,
}

impl Late {
    pub(super) fn new(opening: Opening, place: Place) -> Self {
        Self {
            opening,
            _place: place,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_only_while_postgres_is_away_and_for_so_many() {
        let away = Arc::new(Away::default());
        assert!(away.place().is_none(), "it answers");
        let slept = Duration::from_secs(17);
        away.missed(Instant::now() - slept, Duration::from_secs(2));
        assert!(away.place().is_none(), "that was our own sleep");
        let missed = || away.missed(Instant::now(), Duration::ZERO);
        missed();
        let places: Vec<_> = std::iter::from_fn(|| away.place()).collect();
        assert_eq!(places.len(), MOST);
        drop(places);
        assert!(away.place().is_some());
        away.answered();
        assert!(away.place().is_none());
        let ago = |seconds| Instant::now() - Duration::from_secs(seconds);
        let silent = |first, last| {
            away.with(|silence| *silence = Some(Silence { first, last }));
            missed();
        };
        silent(ago(61), ago(1));
        assert!(away.place().is_none(), "for too long");
        silent(ago(600), ago(599));
        assert!(away.place().is_some(), "that was another time");
        assert_eq!(away.waiting.load(Ordering::Relaxed), 0);
    }
}

//! Counting.

use std::{collections::BTreeMap, time::Duration};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// What a load showed. Times are in microseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Turns started.
    pub turns: u64,
    /// Turns whose `response.completed` was seen.
    pub completed: u64,
    /// What became of the others.
    pub errors: BTreeMap<String, u64>,
    /// Text deltas seen.
    pub deltas: u64,
    /// From the first start to the last end.
    pub seconds: f64,
    /// From the request being sent to its first text delta.
    pub ttft: Quantiles,
    /// From the fake sending a text delta to its being read here.
    pub hop: Quantiles,
    /// From the moment a turn was due to the moment it started; open loop only.
    pub late: Quantiles,
}

/// A distribution in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub struct Quantiles {
    /// How many were measured.
    pub count: u64,
    /// Half were quicker.
    pub p50: u64,
    /// One in ten was slower.
    pub p90: u64,
    /// One in a hundred was slower.
    pub p99: u64,
    /// The slowest.
    pub max: u64,
}

impl Quantiles {
    fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile);
        Self {
            count: histogram.len(),
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: histogram.max(),
        }
    }
}

/// Ten minutes; longer times count as this.
const LONGEST: u64 = 600_000_000;

/// The counters of a load that runs.
pub(super) struct Tally {
    turns: u64,
    completed: u64,
    errors: BTreeMap<String, u64>,
    deltas: u64,
    ttft: Histogram<u64>,
    hop: Histogram<u64>,
    late: Histogram<u64>,
}

/// One thing that was seen.
pub(super) enum Seen {
    /// The first text of a turn, after so long.
    First(Duration),
    /// A text delta, so many microseconds after it was sent, if that is known.
    Delta(Option<u64>),
    /// The end.
    Completed,
}

impl Default for Tally {
    fn default() -> Self {
        let histogram = || {
            Histogram::new_with_bounds(1, LONGEST, 3)
                .expect("the bounds are apart and the digits few")
        };
        Self {
            turns: 0,
            completed: 0,
            errors: BTreeMap::new(),
            deltas: 0,
            ttft: histogram(),
            hop: histogram(),
            late: histogram(),
        }
    }
}

impl Tally {
    pub(super) fn started(&mut self, late: Duration) {
        self.turns += 1;
        self.late.saturating_record(micros(late));
    }

    pub(super) fn saw(&mut self, seen: Seen) {
        match seen {
            Seen::First(after) => self.ttft.saturating_record(micros(after)),
            Seen::Delta(hop) => {
                self.deltas += 1;
                if let Some(hop) = hop {
                    self.hop.saturating_record(hop);
                }
            }
            Seen::Completed => self.completed += 1,
        }
    }

    pub(super) fn failed(&mut self, error: &str) {
        *self.errors.entry(error.to_owned()).or_default() += 1;
    }

    pub(super) fn report(self, took: Duration) -> Report {
        Report {
            turns: self.turns,
            completed: self.completed,
            errors: self.errors,
            deltas: self.deltas,
            seconds: took.as_secs_f64(),
            ttft: Quantiles::of(&self.ttft),
            hop: Quantiles::of(&self.hop),
            late: Quantiles::of(&self.late),
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

//! The time between two events of a turn, counted as they pass: two additions to atomics, about 12 ns, because this is done for every
//! event of every stream. The recorder would keep each sample until somebody folds it.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use super::Scrape;

/// Upper bounds in microseconds; what is longer goes into the last place.
const BOUNDS: [u64; 12] = [
    1_000,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    1_000_000,
    2_500_000,
    10_000_000,
    30_000_000,
    120_000_000,
];

static COUNTS: [AtomicU64; BOUNDS.len() + 1] = [const { AtomicU64::new(0) }; BOUNDS.len() + 1];
static SUM: AtomicU64 = AtomicU64::new(0);

/// An event came, so long after the one before it.
pub fn event_gap(gap: Duration) {
    let micros = gap.as_secs() * 1_000_000 + u64::from(gap.subsec_micros());
    COUNTS[BOUNDS.partition_point(|bound| *bound < micros)].fetch_add(1, Relaxed);
    SUM.fetch_add(micros, Relaxed);
}

#[expect(clippy::cast_precision_loss, reason = "as Prometheus counts")]
pub(super) fn write(scrape: &mut Scrape) {
    let bounds = BOUNDS.iter().map(|bound| *bound as f64 / 1e6);
    let counts = COUNTS.each_ref().map(|count| count.load(Relaxed));
    let sum = SUM.load(Relaxed) as f64 / 1e6;
    scrape.histogram("drawbridge_turn_event_gap_seconds", bounds, &counts, sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_counted_up_to_its_bound() {
        for gap in [0, 1_000, 1_001, 999_999_999_999] {
            event_gap(Duration::from_micros(gap));
        }
        let mut scrape = Scrape::new(String::new());
        write(&mut scrape);
        let text = scrape.end();
        let count = |le: &str| -> u64 {
            let (_, rest) = text.split_once(&format!("{{le=\"{le}\"}} ")).unwrap();
            rest.lines().next().unwrap().parse().unwrap()
        };
        assert!(count("0.001") >= 2, "{text}");
        assert!(count("0.005") > count("0.001"), "{text}");
        assert!(count("+Inf") > count("120"), "{text}");
    }
}

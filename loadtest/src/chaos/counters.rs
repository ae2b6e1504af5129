//! What the replicas count themselves, kept when their processes end.

use std::collections::BTreeMap;

/// What of a replica's counters is of interest here.
const COUNTED: [&str; 3] = [
    "drawbridge_bridge_outcomes_total{",
    "drawbridge_fence_rejections_total{",
    "drawbridge_takes_total{",
];

/// Counters of all processes there were, by replica and series: what ended processes have counted, and what the present one has.
#[derive(Default)]
pub(super) struct Counters(BTreeMap<(String, String), (u64, u64)>);

impl Counters {
    /// Takes in what a replica says of itself now.
    pub(super) fn read(&mut self, replica: &str, text: &str) {
        for line in text.lines() {
            let Some((series, value)) = line.rsplit_once(' ') else {
                continue;
            };
            if !COUNTED.iter().any(|name| series.starts_with(name)) {
                continue;
            }
            let value = value.parse().unwrap_or_default();
            let key = (replica.to_owned(), series.to_owned());
            let (ended, present) = self.0.entry(key).or_default();
            if value < *present {
                *ended += *present;
            }
            *present = value;
        }
    }

    /// The sums over all replicas.
    pub(super) fn sums(&self) -> BTreeMap<String, u64> {
        let mut sums = BTreeMap::new();
        for ((_, series), (ended, present)) in &self.0 {
            *sums.entry(series.clone()).or_default() += ended + present;
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_a_process_that_ended_are_kept() {
        let mut counters = Counters::default();
        let series = "drawbridge_takes_total{result=\"taken\"}";
        for (replica, value) in [("r0", 2), ("r0", 5), ("r0", 1), ("r1", 4)] {
            counters.read(replica, &format!("{series} {value}\nother 7\n"));
        }
        assert_eq!(counters.sums(), BTreeMap::from([(series.to_owned(), 10)]));
    }
}

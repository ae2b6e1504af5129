//! What the kernel says of this process, under the names that every Prometheus client uses. Only Linux says it; elsewhere nothing is told.

use std::fs::{read_dir, read_to_string};

use rustix::{
    param::{clock_ticks_per_second, page_size},
    process::{Resource, getrlimit},
};

use super::Scrape;

pub(super) fn write(scrape: &mut Scrape) {
    let stat = read_to_string("/proc/self/stat").ok();
    if let Some(stat) = stat.as_deref().and_then(Stat::parse) {
        let ticks = float(clock_ticks_per_second());
        scrape.value("process_cpu_seconds_total", stat.cpu / ticks);
        scrape.value(
            "process_resident_memory_bytes",
            stat.pages * float(page_size() as u64),
        );
        scrape.value("process_threads", stat.threads);
        if let Some(boot) = boot_time() {
            scrape.value("process_start_time_seconds", boot + stat.start / ticks);
        }
    }
    if let Ok(files) = read_dir("/proc/self/fd") {
        // Reading the folder takes one itself.
        scrape.count("process_open_fds", files.count().saturating_sub(1));
    }
    let most = getrlimit(Resource::Nofile).current;
    scrape.value("process_max_fds", most.map_or(f64::INFINITY, float));
}

/// Fields of `/proc/self/stat`.
#[derive(Debug, PartialEq)]
struct Stat {
    /// Ticks.
    cpu: f64,
    threads: f64,
    /// Ticks since the machine booted.
    start: f64,
    /// Resident.
    pages: f64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The name of the program may hold anything, and ends at the last parenthesis; the third field follows.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu: field(14)? + field(15)?,
            threads: field(20)?,
            start: field(22)?,
            pages: field(24)?,
        })
    }
}

/// Epoch seconds.
fn boot_time() -> Option<f64> {
    let stat = read_to_string("/proc/stat").ok()?;
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    line.parse().ok()
}

#[expect(clippy::cast_precision_loss, reason = "as Prometheus counts")]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_read_whatever_the_program_is_called() {
        let line = "7 (a) b ( c) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 4 0 99 1000 25 18446744073709551615";
        let stat = Stat {
            cpu: 23.0,
            threads: 4.0,
            start: 99.0,
            pages: 25.0,
        };
        assert_eq!(Stat::parse(line), Some(stat));
        assert_eq!(Stat::parse("7 (a"), None);
    }
}

//! Replicas behind a balancer without affinity behave like one that never restarts.
#![expect(clippy::print_stdout, reason = "times are worth knowing")]

mod cli;
mod commands;
mod history;
mod outages;
mod partitions;
mod pause;
mod recovery;
mod script;
mod tokens;

/// How often something is done: often enough for a test, and as often as the promise says where `DRAWBRIDGE_TEST_FULL` is set.
fn times(test: usize, full: usize) -> usize {
    match std::env::var_os("DRAWBRIDGE_TEST_FULL") {
        Some(_) => full,
        None => test,
    }
}

//! The `drawbridge` program.

use std::process::ExitCode;

use clap::Parser as _;

/// Bodies come and go in all sizes on all threads. What they leave behind goes back to the system within seconds (`.cargo/config.toml`).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[tokio::main]
async fn main() -> ExitCode {
    drawbridge::cli::run(drawbridge::cli::Cli::parse()).await
}

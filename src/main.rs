//! The `drawbridge` program.

use std::process::ExitCode;

use clap::Parser as _;

#[tokio::main]
async fn main() -> ExitCode {
    drawbridge::cli::run(drawbridge::cli::Cli::parse()).await
}

//! The `loadtest` program.

use std::net::SocketAddr;

use clap::{Parser, Subcommand};
use loadtest::upstream::{Config, Upstream};

/// Fake upstream, load generator and measurements for Drawbridge.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the fake upstream until it is killed
    Upstream {
        /// Where
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "a program for people and scripts")]
async fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Upstream { listen } => {
            let listener = tokio::net::TcpListener::bind(listen).await?;
            let upstream = Upstream::start_on(listener, Config::default());
            println!("{}", upstream.url());
            tokio::signal::ctrl_c().await?;
        }
    }
    Ok(())
}

//! The `loadtest` program.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand};
use loadtest::{
    bench, chaos, demo,
    drive::{Plan, Transport, drive},
    load, page,
    process::interrupted,
    upstream::{Config, Upstream},
};

/// Fake upstream, load generator and measurements for Drawbridge.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the fake upstream until it is killed; prints its URL
    Upstream {
        /// Where
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
        /// Text deltas of an ordinary answer
        #[arg(long, default_value_t = 4)]
        deltas: usize,
        /// What a completed response adds to its account's short window
        #[arg(long, default_value_t = 0.0)]
        percent_per_turn: f64,
        /// Forget what the requests said: for long runs
        #[arg(long)]
        lean: bool,
    },
    /// Put a load on a URL and print what a client would have felt, as JSON
    Drive(Drive),
    /// Compare the cost of a turn in nginx and in Drawbridge
    Bench {
        /// Release binary of Drawbridge
        #[arg(long, required_unless_present = "only")]
        drawbridge: Option<PathBuf>,
        /// Leave the other one out
        #[arg(long, value_parser = ["nginx"])]
        only: Option<String>,
        /// Rounds of each scenario; the medians count
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Size of a request
        #[arg(long, default_value_t = 40_000)]
        body_bytes: usize,
        /// Where the JSON goes
        #[arg(long, default_value = "loadtest/results/bench.json")]
        out: PathBuf,
    },
    /// Put kinds of load on nginx and on Drawbridge that the bench leaves out
    Load {
        /// Release binary of Drawbridge
        #[arg(long)]
        drawbridge: PathBuf,
        /// This scenario alone
        #[arg(long)]
        only: Option<String>,
        /// Where the JSON goes
        #[arg(long, default_value = "loadtest/results/load.json")]
        out: PathBuf,
    },
    /// Load one replica for long and see whether anything grows
    Soak {
        /// Release binary of Drawbridge
        #[arg(long)]
        drawbridge: PathBuf,
        /// How long
        #[arg(long, default_value_t = 30.0)]
        minutes: f64,
        /// Where the JSON goes
        #[arg(long, default_value = "loadtest/results/soak.json")]
        out: PathBuf,
    },
    /// Draw what the other commands have written: a page with plots
    Page {
        /// Where the JSON is and the page goes
        #[arg(long, default_value = "loadtest/results")]
        dir: PathBuf,
    },
    /// Do something to replicas and what they stand on while clients talk, and check that every promise was kept; fails if one was not
    Chaos {
        /// What is done
        #[arg(long, value_enum, default_value_t = chaos::Course::Random)]
        course: chaos::Course,
        /// Binary of Drawbridge
        #[arg(long)]
        drawbridge: PathBuf,
        /// How long clients talk
        #[arg(long, default_value_t = 10.0)]
        minutes: f64,
        /// What everything is drawn from; unset = a new one
        #[arg(long)]
        seed: Option<u64>,
        /// How many
        #[arg(long, default_value_t = 3)]
        replicas: usize,
        /// How many
        #[arg(long, default_value_t = 24)]
        clients: usize,
        /// Milliseconds between two of the ten deltas of an answer
        #[arg(long, default_value_t = 80)]
        pace: u64,
        /// Where the JSON goes
        #[arg(long, default_value = "loadtest/results/chaos.json")]
        out: PathBuf,
    },
    /// Two replicas, three accounts, traffic, and a view of it all, until Ctrl-C
    Demo {
        /// Binary of Drawbridge
        #[arg(long)]
        drawbridge: PathBuf,
        /// Stop by itself
        #[arg(long)]
        seconds: Option<u64>,
    },
}

#[derive(Args)]
struct Drive {
    /// Base URL of the Codex route
    #[arg(long, default_value = "http://127.0.0.1:2455/backend-api/codex")]
    url: String,
    /// Client key
    #[arg(long, env = "DRAWBRIDGE_KEY", hide_env_values = true)]
    key: String,
    /// Account id, to talk to the fake directly
    #[arg(long)]
    account_id: Option<String>,
    /// Connections
    #[arg(long, default_value_t = 16)]
    streams: usize,
    /// Turns started per second over all streams; 0 = each after the one before it
    #[arg(long, default_value_t = 0.0)]
    rate: f64,
    /// Turns of each stream
    #[arg(long, default_value_t = 10)]
    turns: usize,
    /// How turns travel
    #[arg(long, value_enum, default_value_t = Transport::Sse)]
    transport: Transport,
    /// Size of a request
    #[arg(long, default_value_t = 40_000)]
    body_bytes: usize,
}

#[tokio::main]
#[expect(clippy::print_stdout, reason = "a program for people and scripts")]
async fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Upstream {
            listen,
            deltas,
            percent_per_turn,
            lean,
        } => {
            let listener = tokio::net::TcpListener::bind(listen).await?;
            let config = Config {
                deltas,
                percent_per_turn,
                bodies: !lean,
                ..Config::default()
            };
            let upstream = Upstream::start_on(listener, config);
            println!("{}", upstream.url());
            tokio::signal::ctrl_c().await?;
        }
        Command::Drive(args) => {
            let plan = Plan {
                url: args.url,
                key: args.key,
                account_id: args.account_id,
                streams: args.streams,
                rate: args.rate,
                turns: args.turns,
                transport: args.transport,
                body_bytes: args.body_bytes,
                ramp: Duration::ZERO,
                timeout: Duration::from_secs(120),
                pause: Duration::ZERO,
            };
            println!("{}", serde_json::to_string_pretty(&drive(&plan).await?)?);
        }
        Command::Demo {
            drawbridge,
            seconds,
        } => tokio::select! {
            ended = demo::run(&drawbridge, seconds) => ended?,
            asked = interrupted() => asked?,
        },
        Command::Load {
            drawbridge,
            only,
            out,
        } => tokio::select! {
            ended = load::run(&drawbridge, only.as_deref(), &out) => ended?,
            asked = interrupted() => asked?,
        },
        Command::Soak {
            drawbridge,
            minutes,
            out,
        } => tokio::select! {
            ended = load::soak(&drawbridge, minutes, &out) => ended?,
            asked = interrupted() => asked?,
        },
        Command::Page { dir } => page::write(&dir)?,
        Command::Chaos {
            drawbridge,
            course,
            minutes,
            seed,
            replicas,
            clients,
            pace,
            out,
        } => {
            let options = chaos::Options {
                drawbridge,
                course,
                pace: Duration::from_millis(pace),
                length: Duration::from_secs_f64(minutes * 60.0),
                seed: seed.unwrap_or_else(|| rand::random::<u32>().into()),
                replicas,
                clients,
                gap: Duration::from_secs(3),
                scale: None,
            };
            let report = tokio::select! {
                ended = chaos::run(&options) => ended?,
                asked = interrupted() => return Ok(asked?),
            };
            println!("{report}");
            std::fs::write(&out, serde_json::to_string_pretty(&report)?)?;
            let broken = report.violations.len();
            anyhow::ensure!(broken == 0, "seed {}: {broken} violations", report.seed);
        }
        Command::Bench {
            drawbridge,
            only,
            rounds,
            body_bytes,
            out,
        } => {
            let drawbridge = drawbridge.filter(|_| only.is_none());
            let options = bench::Options {
                drawbridge,
                rounds,
                body_bytes,
                out,
            };
            tokio::select! {
                ended = bench::run(&options) => ended?,
                asked = interrupted() => asked?,
            }
        }
    }
    Ok(())
}

//! Kinds of load that the bench leaves out, on nginx and on Drawbridge in one run, and a soak that looks for what grows.
//!
//! A scenario is one or more loads at once; its figures are those of the proxy's own processes while it ran. Each runs once: these are
//! pictures of behaviour, the medians are the bench's.

mod soak;

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context as _, ensure};
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::sleep;

pub use self::soak::soak;
use crate::{
    bench::{Target, machine, nginx::Nginx, version, write},
    drive::{Plan, Report, Transport, drive},
    process::{RunDir, cpu, rss_kib},
    rig::{Drawbridge, Fake},
    say,
    upstream::{Fault, Kind},
};

/// Bytes of an ordinary request of the Codex CLI.
const ORDINARY: usize = 40_000;
/// Streams of which memory is told per thousand.
const MANY: usize = 2_000;

/// One part of a scenario.
#[derive(Clone, Copy, Debug)]
struct Load {
    label: &'static str,
    streams: usize,
    turns: usize,
    body_bytes: usize,
    transport: Transport,
    /// Over which the streams start, in seconds.
    ramp: u64,
    /// Who comes with a key that nobody has.
    stranger: bool,
    /// After each piece that is read, in milliseconds.
    pause: u64,
}

impl Load {
    const fn of(label: &'static str, streams: usize, turns: usize, body_bytes: usize) -> Self {
        Self {
            label,
            streams,
            turns,
            body_bytes,
            transport: Transport::Sse,
            ramp: 0,
            stranger: false,
            pause: 0,
        }
    }
}

/// A kind of load.
#[derive(Clone, Copy, Debug)]
struct Scenario {
    name: &'static str,
    what: &'static str,
    /// How upstream answers.
    answer: fn() -> Kind,
    loads: &'static [Load],
    /// Whether nginx can be asked for the same.
    on_nginx: bool,
}

const SMALL: Load = Load::of("small", 16, 50, 4_000);
const LARGE: Load = Load::of("large", 4, 12, 400_000);

const SCENARIOS: [Scenario; 9] = [
    // First, so that its memory is its own.
    Scenario {
        name: "many",
        what: "2,000 streams at once, one event a second each",
        answer: || Kind::Paced(40, 1_000),
        loads: &[Load {
            ramp: 15,
            ..Load::of("sse", MANY, 1, ORDINARY)
        }],
        on_nginx: true,
    },
    Scenario {
        name: "burst",
        what: "16 connections, one request after the other, 100 events at once",
        answer: || Kind::Burst(100),
        loads: &[Load::of("sse", 16, 100, ORDINARY)],
        on_nginx: true,
    },
    Scenario {
        name: "sockets",
        what: "the same over 16 WebSockets",
        answer: || Kind::Burst(100),
        loads: &[Load {
            transport: Transport::Ws,
            ..Load::of("websocket", 16, 100, ORDINARY)
        }],
        on_nginx: true,
    },
    Scenario {
        name: "paced",
        what: "200 streams of 100 events, 10 ms apart",
        answer: || Kind::Paced(100, 10),
        loads: &[Load {
            ramp: 1,
            ..Load::of("sse", 200, 4, ORDINARY)
        }],
        on_nginx: true,
    },
    Scenario {
        name: "small",
        what: "16 connections with requests of 4 kB",
        answer: || Kind::Burst(20),
        loads: &[SMALL],
        on_nginx: true,
    },
    Scenario {
        name: "small_beside_large",
        what: "the same beside 4 connections with requests of 100,000 tokens",
        answer: || Kind::Burst(20),
        loads: &[SMALL, LARGE],
        on_nginx: true,
    },
    Scenario {
        name: "small_beside_strangers",
        what: "the small ones beside 32 connections that try keys which nobody has",
        answer: || Kind::Burst(20),
        loads: &[
            SMALL,
            Load {
                stranger: true,
                ..Load::of("strangers", 32, 100, 4_000)
            },
        ],
        on_nginx: false,
    },
    Scenario {
        name: "huge_events",
        what: "8 connections, each answer one event of 4 MiB",
        answer: || Kind::Huge(4 << 20),
        loads: &[Load::of("sse", 8, 6, 4_000)],
        on_nginx: true,
    },
    Scenario {
        name: "slow_readers",
        what: "32 connections, answers of 1 MiB, read with pauses of 20 ms",
        answer: || Kind::Huge(1 << 20),
        loads: &[Load {
            pause: 20,
            ..Load::of("sse", 32, 3, 4_000)
        }],
        on_nginx: true,
    },
];

/// One scenario on one proxy.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// Of the scenario.
    pub scenario: String,
    /// In words.
    pub what: String,
    /// Which proxy.
    pub target: String,
    /// Processor time, in milliseconds.
    pub cpu_ms: u64,
    /// The same for each turn, refused ones included, in microseconds.
    pub cpu_us_per_turn: f64,
    /// Before.
    pub rss_before_kib: u64,
    /// The most that was seen.
    pub rss_peak_kib: u64,
    /// By label.
    pub loads: BTreeMap<String, Report>,
}

/// Runs every scenario and writes the JSON.
///
/// # Errors
/// If something does not start, or a turn ends otherwise than it must.
pub async fn run(binary: &Path, only: Option<&str>, out: &Path) -> anyhow::Result<()> {
    let dir = RunDir::make("load")?;
    let fake = Fake::start(dir.path(), &[]).await?;
    let nginx = Nginx::start(dir.path(), &fake).await?;
    let drawbridge = Drawbridge::start(binary, dir.path(), &fake).await?;
    drawbridge.import(&fake, &["alice", "bob", "carol"]).await?;
    let targets = [
        nginx.target()?,
        Target {
            name: "drawbridge",
            url: format!("{}/backend-api/codex", drawbridge.origin()),
            key: drawbridge.key("load").await?,
            pids: vec![drawbridge.pid()],
        },
    ];
    let mut measured = Vec::new();
    for scenario in SCENARIOS
        .iter()
        .filter(|scenario| only.is_none_or(|only| only == scenario.name))
    {
        fake.fault(&Fault::always((scenario.answer)())).await?;
        for target in &targets {
            if scenario.on_nginx || target.name != "nginx" {
                let one = measure(scenario, target).await;
                let one = one.with_context(|| format!("{} on {}", scenario.name, target.name))?;
                say(&one.line());
                measured.push(one);
            }
        }
        fake.no_faults().await?;
    }
    // Gauges are five seconds old at most.
    sleep(Duration::from_secs(6)).await;
    let idle = json!({
        "rss_kib": rss_kib(&[drawbridge.pid()])?,
        "sessions": drawbridge.sessions().await?,
    });
    let result = json!({
        "machine": machine(),
        "versions": { "nginx": version("nginx", "-v"), "drawbridge": version(binary, "--version") },
        "scenarios": measured,
        "idle": idle,
    });
    write(out, &result)
}

impl Measured {
    fn line(&self) -> String {
        let loads: Vec<String> = self
            .loads
            .iter()
            .map(|(label, report)| {
                format!(
                    "{label} {}/{}, first text {:.1}/{:.1} ms, hop {:.2}/{:.2} ms",
                    report.completed,
                    report.turns,
                    millis(report.ttft.p50),
                    millis(report.ttft.p99),
                    millis(report.hop.p50),
                    millis(report.hop.p99),
                )
            })
            .collect();
        format!(
            "{:<24}{:<11}{:>8.0} us a turn, {:>4} to {:>4} MiB; {}",
            self.scenario,
            self.target,
            self.cpu_us_per_turn,
            self.rss_before_kib >> 10,
            self.rss_peak_kib >> 10,
            loads.join("; ")
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "microseconds of one run")]
fn millis(micros: u64) -> f64 {
    micros as f64 / 1e3
}

async fn measure(scenario: &Scenario, target: &Target) -> anyhow::Result<Measured> {
    let rss_before_kib = rss_kib(&target.pids)?;
    let before = cpu(&target.pids)?;
    let mut rss_peak_kib = rss_before_kib;
    let watch = async {
        while let Ok(rss) = rss_kib(&target.pids) {
            rss_peak_kib = rss_peak_kib.max(rss);
            sleep(Duration::from_millis(250)).await;
        }
    };
    let loads = try_join_all(scenario.loads.iter().map(|load| put(load, target)));
    let loads: BTreeMap<String, Report> = tokio::select! {
        loads = loads => loads?.into_iter().collect(),
        () = watch => anyhow::bail!("the proxy has ended"),
    };
    let used = cpu(&target.pids)?.saturating_sub(before);
    let turns: u64 = loads.values().map(|report| report.turns).sum();
    #[expect(clippy::cast_precision_loss, reason = "counts of one run")]
    let cpu_us_per_turn = used.as_secs_f64() * 1e6 / turns.max(1) as f64;
    Ok(Measured {
        scenario: scenario.name.to_owned(),
        what: scenario.what.to_owned(),
        target: target.name.to_owned(),
        cpu_ms: u64::try_from(used.as_millis())?,
        cpu_us_per_turn,
        rss_before_kib,
        rss_peak_kib,
        loads,
    })
}

async fn put(load: &Load, target: &Target) -> anyhow::Result<(String, Report)> {
    let plan = Plan {
        url: target.url.clone(),
        key: match load.stranger {
            true => "dbk_nobody".to_owned(),
            false => target.key.clone(),
        },
        account_id: None,
        streams: load.streams,
        rate: 0.0,
        turns: load.turns,
        transport: load.transport,
        body_bytes: load.body_bytes,
        ramp: Duration::from_secs(load.ramp),
        timeout: Duration::from_secs(120),
        pause: Duration::from_millis(load.pause),
    };
    let report = drive(&plan).await?;
    let refused = report.errors.get("status 401").copied().unwrap_or_default();
    let right = if load.stranger {
        refused
    } else {
        report.completed
    };
    ensure!(
        right == report.turns,
        "{}: {right} of {} turns ended as they must: {:?}",
        load.label,
        report.turns,
        report.errors
    );
    Ok((load.label.to_owned(), report))
}

/// Reads what a run has written.
pub(crate) fn read(text: &str) -> anyhow::Result<(Vec<Measured>, Value)> {
    let all: Value = serde_json::from_str(text)?;
    let measured = serde_json::from_value(all["scenarios"].clone())?;
    Ok((measured, all))
}

//! What a turn costs in nginx and in Drawbridge, in one run: the same load on both, in turn, so that a slow moment of the machine hits both.
//!
//! nginx only hands bytes on; Drawbridge does so with keys, quota, ledger and request log on. Processor time and memory are those of the
//! proxy's own processes, without the database. Every figure is the median of the rounds; the rounds themselves are in the JSON.

mod hop;
pub(crate) mod nginx;
mod snapshot;
mod summary;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::{Map, Value, json};

use self::nginx::Nginx;
use crate::{
    drive::{Plan, Report, Transport, drive},
    process::{RunDir, cpu, rss_kib},
    rig::{Counts, Drawbridge, Fake, per_unit},
    say,
    upstream::{Fault, Kind},
};

/// Text deltas of every answer.
const EVENTS: usize = 100;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Release binary; `None` = nginx alone.
    pub drawbridge: Option<PathBuf>,
    /// Rounds of each scenario.
    pub rounds: usize,
    /// Size of a request.
    pub body_bytes: usize,
    /// Where the JSON goes.
    pub out: PathBuf,
}

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Scenario {
    /// All events of an answer at once: the cost of a request.
    Burst,
    /// Events ten milliseconds apart on many streams: the cost of an event.
    Paced,
}

impl Scenario {
    fn fault(self) -> Fault {
        Fault::always(match self {
            Self::Burst => Kind::Burst(EVENTS),
            Self::Paced => Kind::Paced(EVENTS, 10),
        })
    }

    /// Streams and turns of each.
    fn size(self) -> (usize, usize) {
        match self {
            Self::Burst => (16, 250),
            Self::Paced => (200, 5),
        }
    }

    fn ramp(self) -> Duration {
        match self {
            Self::Burst => Duration::ZERO,
            // As long as a turn: starts and ends are spread evenly from then on.
            Self::Paced => Duration::from_secs(1),
        }
    }
}

/// A proxy under load.
pub(crate) struct Target {
    pub(crate) name: &'static str,
    pub(crate) url: String,
    pub(crate) key: String,
    pub(crate) pids: Vec<u32>,
}

/// One scenario on one proxy, once.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Round {
    pub(crate) scenario: Scenario,
    pub(crate) target: &'static str,
    pub(crate) cpu_ms: u64,
    /// Per completed request in a burst, per event when paced.
    pub(crate) cpu_us_per_unit: f64,
    /// The most that was seen while the load ran.
    pub(crate) rss_kib: u64,
    /// What was sent to the database meanwhile, for each completed turn.
    pub(crate) statements_per_turn: BTreeMap<String, f64>,
    pub(crate) report: Report,
}

/// Runs everything, prints a table and writes the JSON.
///
/// # Errors
/// If something does not start, or a turn fails.
pub async fn run(options: &Options) -> anyhow::Result<()> {
    let dir = RunDir::make("bench")?;
    let fake = Fake::start(dir.path(), &[]).await?;
    let nginx = Nginx::start(dir.path(), &fake).await?;
    let mut targets = vec![nginx.target()?];
    let drawbridge = match &options.drawbridge {
        Some(binary) => Some(Drawbridge::start(binary, dir.path(), &fake).await?),
        None => None,
    };
    if let Some(drawbridge) = &drawbridge {
        drawbridge.import(&fake, &["alice", "bob", "carol"]).await?;
        let (name, key, url) = (
            "drawbridge",
            drawbridge.key("bench").await?,
            format!("{}/backend-api/codex", drawbridge.origin()),
        );
        targets.push(Target {
            name,
            url,
            key,
            pids: vec![drawbridge.pid()],
        });
    }

    let fresh = resident(&targets)?;
    let mut rounds = Vec::new();
    for scenario in [Scenario::Burst, Scenario::Paced] {
        fake.fault(&scenario.fault()).await?;
        for target in &targets {
            let (streams, _) = scenario.size();
            load(target, scenario, streams, 2, options)
                .await
                .with_context(|| format!("warming up {}", target.name))?;
        }
        for number in 1..=options.rounds {
            for target in &targets {
                let before = statements(drawbridge.as_ref()).await?;
                let mut round = measure(target, scenario, options).await?;
                let after = statements(drawbridge.as_ref()).await?;
                round.statements_per_turn = per_unit(&before, &after, round.report.completed);
                say(&format!(
                    "{scenario:?} {number}/{} {}: {:.1} us, {:.1} s",
                    options.rounds, target.name, round.cpu_us_per_unit, round.report.seconds
                ));
                rounds.push(round);
            }
        }
        fake.no_faults().await?;
    }
    tokio::time::sleep(Duration::from_secs(6)).await;
    let idle = resident(&targets)?;
    let sessions = match &drawbridge {
        Some(drawbridge) => Some(drawbridge.sessions().await?),
        None => None,
    };
    let hop = match (&options.drawbridge, &drawbridge, targets.last()) {
        (Some(binary), Some(owner), Some(target)) => {
            let other = Drawbridge::replica(binary, dir.path(), &fake, "other").await?;
            let hop = hop::measure(owner, &other, &target.key).await?;
            say(&format!("a hop adds {} ms", hop["added_ms"]));
            Some(hop)
        }
        _ => None,
    };

    let snapshot = match (&options.drawbridge, targets.get(1)) {
        (Some(binary), Some(target)) => {
            Some(snapshot::measure(binary, dir.path(), &fake, &target.key).await?)
        }
        _ => None,
    };

    let names: Vec<&str> = targets.iter().map(|target| target.name).collect();
    let rows = summary::rows(&rounds, &names, &idle);
    say(&format!("\n{}", summary::table(&rows, &names)));
    let result = json!({
        "machine": machine(),
        "versions": { "nginx": version("nginx", "-v"), "drawbridge": options.drawbridge.as_ref().map(|binary| version(binary, "--version")) },
        "load": { "events": EVENTS, "body_bytes": options.body_bytes, "rounds": options.rounds, "nginx_workers": nginx::WORKERS },
        "summary": rows,
        "snapshots": std::env::var("DRAWBRIDGE_SNAPSHOTS").unwrap_or_else(|_| "auto".into()),
        "hop": hop,
        "snapshot": snapshot,
        "fresh_rss_kib": fresh,
        "idle_rss_kib": idle,
        "idle_sessions": sessions,
        "rounds": rounds,
    });
    write(&options.out, &result)
}

async fn statements(drawbridge: Option<&Drawbridge>) -> anyhow::Result<Counts> {
    match drawbridge {
        Some(drawbridge) => drawbridge.statements().await,
        None => Ok(Counts::new()),
    }
}

/// Memory of each proxy by name, in KiB.
fn resident(targets: &[Target]) -> anyhow::Result<Map<String, Value>> {
    targets
        .iter()
        .map(|target| Ok((target.name.to_owned(), rss_kib(&target.pids)?.into())))
        .collect()
}

async fn load(
    target: &Target,
    scenario: Scenario,
    streams: usize,
    turns: usize,
    options: &Options,
) -> anyhow::Result<Report> {
    let plan = Plan {
        url: target.url.clone(),
        key: target.key.clone(),
        account_id: None,
        streams,
        rate: 0.0,
        turns,
        transport: Transport::Sse,
        body_bytes: options.body_bytes,
        ramp: scenario.ramp(),
        timeout: Duration::from_secs(60),
        pause: Duration::ZERO,
    };
    let report = drive(&plan).await?;
    anyhow::ensure!(
        report.completed == report.turns,
        "{}: {} of {} turns completed: {:?}",
        target.name,
        report.completed,
        report.turns,
        report.errors
    );
    Ok(report)
}

async fn measure(target: &Target, scenario: Scenario, options: &Options) -> anyhow::Result<Round> {
    let (streams, turns) = scenario.size();
    let before = cpu(&target.pids)?;
    let mut rss = 0;
    let watch = async {
        loop {
            rss = rss.max(rss_kib(&target.pids)?);
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        #[expect(unreachable_code, reason = "names the type of the errors")]
        anyhow::Ok(())
    };
    let report = tokio::select! {
        report = load(target, scenario, streams, turns, options) => report?,
        gone = watch => return Err(gone.err().context("the watch ends only by an error")?),
    };
    let used = cpu(&target.pids)?.saturating_sub(before);
    let units = match scenario {
        Scenario::Burst => report.completed,
        Scenario::Paced => report.deltas,
    };
    #[expect(clippy::cast_precision_loss, reason = "counts of one round")]
    let cpu_us_per_unit = used.as_secs_f64() * 1e6 / units.max(1) as f64;
    Ok(Round {
        scenario,
        target: target.name,
        cpu_ms: u64::try_from(used.as_millis())?,
        cpu_us_per_unit,
        rss_kib: rss,
        statements_per_turn: BTreeMap::new(),
        report,
    })
}

/// What this runs on.
pub(crate) fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let line = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    json!({
        "cpu": line(&read("/proc/cpuinfo"), "model name"),
        "cores": std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "memory": line(&read("/proc/meminfo"), "MemTotal"),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "load_average": read("/proc/loadavg").trim(),
    })
}

/// What a program says about itself; nginx does so on stderr.
pub(crate) fn version(program: impl AsRef<std::ffi::OsStr>, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).output().ok()?;
    let said = if output.stdout.is_empty() {
        output.stderr
    } else {
        output.stdout
    };
    Some(String::from_utf8_lossy(&said).trim().to_owned())
}

pub(crate) fn write(path: &Path, result: &Value) -> anyhow::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, format!("{result:#}\n")).with_context(|| path.display().to_string())?;
    say(&format!("written to {}", path.display()));
    Ok(())
}

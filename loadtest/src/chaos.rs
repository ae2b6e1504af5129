//! Real replicas on a faulty network under clients that remember what they meant; afterwards every history is compared.
//!
//! The plan of the faults and the clients' choices are functions of the seed; what the machine makes of them is not, so a seed finds the same
//! trouble again only often. Everything that runs is private to the run and ends with it.

mod check;
mod client;
mod counters;
mod database;
mod drill;
mod fleet;
mod history;
mod plan;
mod report;
mod servers;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::AtomicUsize},
    time::Duration,
};

use anyhow::Context as _;
use serde_json::json;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};

pub use self::{check::Violation, plan::Course, report::Report};
use self::{
    client::{Conversation, Crowd, talk},
    counters::Counters,
    fleet::Fleet,
    history::{History, Sighting},
};
use crate::{
    bench::{machine, version},
    clock,
    process::RunDir,
    say,
};

/// How long what is left may take to end by itself: an owner is buried, its turns are swept.
const QUIET: Duration = Duration::from_secs(120);
/// For how long nothing may be unfinished until that is believed.
const STILL: Duration = Duration::from_secs(4);
/// How long Postgres stays away in a drill.
const OUTAGE: Duration = Duration::from_secs(30);
/// Keys, each of a scope of its own.
const KEYS: [&str; 2] = ["one", "other"];

/// A run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The service.
    pub drawbridge: PathBuf,
    /// What is done.
    pub course: Course,
    /// How long clients talk.
    pub length: Duration,
    /// What everything is drawn from.
    pub seed: u64,
    /// How many.
    pub replicas: usize,
    /// How many.
    pub clients: usize,
    /// The mean time between two faults of a random course.
    pub gap: Duration,
    /// Between two of the ten deltas of an answer.
    pub pace: Duration,
    /// For tests alone: what multiplies the times of the protocol between replicas.
    pub scale: Option<f64>,
}

/// Runs it; the report says what was broken.
///
/// # Errors
/// If something cannot be started, or does not come back.
pub async fn run(options: &Options) -> anyhow::Result<Report> {
    let dir = RunDir::make(&format!("chaos-{}", options.seed))?;
    let ran = break_and_compare(options, dir.path()).await;
    if !ran
        .as_ref()
        .is_ok_and(|report| report.violations.is_empty())
    {
        let kept = dir.keep();
        say(&format!("histories and logs are in {}", kept.display()));
    }
    ran
}

async fn break_and_compare(options: &Options, dir: &Path) -> anyhow::Result<Report> {
    let Options {
        seed,
        replicas,
        clients,
        length,
        ..
    } = *options;
    // Both are promised the same; by turns, so that nobody has to choose.
    let snapshots = match seed % 2 {
        0 => "full",
        _ => "auto",
    };
    say(&format!("seed {seed}: starting {replicas} replicas .."));
    let fleet = Arc::new(Fleet::start(options, dir, snapshots).await?);
    let mut keys = Vec::new();
    for name in KEYS {
        keys.push(fleet.key(name).await?);
    }
    let (end, over) = watch::channel(false);
    let crowd = Arc::new(Crowd {
        fronts: fleet.fronts(),
        next: AtomicUsize::default(),
        keys,
        http: reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .build()?,
        seed,
        over,
        calls: Mutex::default(),
    });
    let mut talking = JoinSet::new();
    for number in 0..clients {
        talking.spawn(talk(Arc::clone(&crowd), number));
    }
    let url = fleet.database.as_str();
    let (mut sightings, mut counters) = (Vec::new(), Counters::default());
    tokio::select! {
        struck = strike(options, &fleet) => struck?,
        () = watch(url, &mut sightings) => {}
        () = fleet.count(&mut counters) => {}
        () = fleet.pulse() => {}
    }
    say("all faults are over ..");
    end.send_replace(true);
    let mut conversations = Vec::new();
    let left = async {
        while let Some(conversation) = talking.join_next().await {
            conversations.push(conversation?);
        }
        anyhow::Ok(())
    };
    tokio::select! {
        ended = timeout(Duration::from_secs(200), left) => ended.context("a client does not end")??,
        () = watch(url, &mut sightings) => {}
        () = fleet.count(&mut counters) => {}
        () = fleet.pulse() => {}
    }
    fleet.upstream.no_faults();
    fleet.upstream.release();
    let look = database::connect(url).await?;
    quiet(&look).await?;
    let unready = fleet.unready().await;
    say("every conversation goes on once more ..");
    let last: JoinSet<()> = conversations
        .into_iter()
        .map(Conversation::last_word)
        .collect();
    tokio::select! {
        _ = last.join_all() => {},
        () = watch(url, &mut sightings) => {}
        () = fleet.count(&mut counters) => {}
    }
    quiet(&look).await?;
    let accounts = database::accounts(&look).await?;
    let attempts = fleet.upstream.attempts();
    let mut turns = database::turns(&look, &accounts).await?;
    history::name(&mut turns, &attempts);
    let history = History {
        calls: crowd.taken(),
        attempts,
        upstream_violations: fleet.upstream.violations(),
        faults: fleet.struck(),
        turns,
        leases: database::leases(&look, true).await?,
        sightings,
        boots: database::boots(&look).await?,
        accounts: fleet.accounts.iter().map(ToString::to_string).collect(),
        unready,
    };
    let mut violations = check::check(&history);
    if options.course.is_silent() {
        violations.extend(check::unseen(&history));
    }
    let report = Report {
        course: options.course,
        seed,
        seconds: length.as_secs(),
        replicas,
        clients,
        bridge: database::outcomes(&look).await?,
        snapshots,
        machine: machine(),
        versions: json!({
            "drawbridge": version(&options.drawbridge, "--version"),
            "servers": servers::versions(),
        }),
        ..Report::of(&history, violations).with(counters.sums())
    };
    if !report.violations.is_empty() {
        let history = serde_json::to_vec(&history)?;
        std::fs::write(dir.join("history.json"), history)?;
    }
    Ok(report)
}

/// Does what is planned; returns when all of it is over.
async fn strike(options: &Options, fleet: &Arc<Fleet>) -> anyhow::Result<()> {
    let until = Instant::now() + options.length;
    match options.course {
        Course::Random => at_random(options, fleet).await?,
        Course::Rolling => drill::rolling(fleet, until).await?,
        Course::Rotation => drill::rotation(fleet).await?,
        Course::Outage => drill::outage(fleet, OUTAGE.min(options.length / 2)).await?,
        Course::Promotion => drill::promotion(fleet).await?,
    }
    sleep_until(until).await;
    Ok(())
}

async fn at_random(options: &Options, fleet: &Arc<Fleet>) -> anyhow::Result<()> {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let extent = plan::Extent {
        length: millis(options.length),
        replicas: options.replicas,
        accounts: fleet.accounts.len(),
        redis: fleet.has_redis(),
        gap: millis(options.gap),
    };
    let began = Instant::now();
    let mut striking = JoinSet::new();
    for fault in plan::plan(options.seed, extent) {
        sleep_until(began + Duration::from_millis(fault.at)).await;
        say(&format!(
            "{:>6.1} s  {:?} for {} ms",
            began.elapsed().as_secs_f64(),
            fault.what,
            fault.lasts
        ));
        striking.spawn(Arc::clone(fleet).strike(fault));
        while let Some(struck) = striking.try_join_next() {
            struck??;
        }
    }
    while let Some(struck) = striking.join_next().await {
        struck??;
    }
    Ok(())
}

/// Looks at the leases until it is dropped, whenever there is a database.
async fn watch(url: &str, seen: &mut Vec<Sighting>) {
    let mut newest = std::collections::BTreeMap::new();
    let mut look = None;
    loop {
        if look.is_none() {
            look = database::connect(url).await.ok();
        }
        let leases = match &look {
            Some(look) => database::leases(look, false).await.ok(),
            None => None,
        };
        if leases.is_none() {
            look = None;
        }
        for lease in leases.into_iter().flatten() {
            if newest.insert(lease.id.clone(), lease.clone()).as_ref() != Some(&lease) {
                let at = clock::epoch_millis();
                seen.push(Sighting { at, lease });
            }
        }
        sleep(Duration::from_millis(250)).await;
    }
}

/// Waits until nothing is unfinished, and for what is written late.
async fn quiet(look: &tokio_postgres::Client) -> anyhow::Result<()> {
    let deadline = Instant::now() + QUIET;
    let mut since = Instant::now();
    while since.elapsed() < STILL && Instant::now() < deadline {
        if database::unfinished(look).await? > 0 {
            since = Instant::now();
        }
        sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

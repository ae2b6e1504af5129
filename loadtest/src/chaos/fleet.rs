//! The replicas as an operator runs them, a faulty network between all of them.

mod faults;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use reqwest::Url;
use tokio::{
    io::AsyncWriteExt as _,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::{
    Options,
    counters::Counters,
    history::Struck,
    plan::{Course, What},
    servers::{self, Postgres, Server},
};
use crate::{
    clock,
    edge::{Edge, Mode},
    process::{Daemon, lasting_port},
    upstream::{self, Upstream},
};

/// How long a replica takes to say that it lives, if the machine has time for it.
const AT_ONCE: Duration = Duration::from_millis(300);
/// How long a replica may take to get ready once nothing is wrong any more.
const START: Duration = Duration::from_secs(120);

/// Everything that runs.
pub(super) struct Fleet {
    pub(super) upstream: Upstream,
    pub(super) accounts: Vec<&'static str>,
    pub(super) replicas: Vec<Replica>,
    /// How to look behind the replicas' back.
    pub(super) database: String,
    binary: PathBuf,
    dir: PathBuf,
    http: reqwest::Client,
    redis: Option<(u16, tokio::sync::Mutex<Option<Server>>)>,
    struck: Mutex<Vec<Struck>>,
    /// `DRAWBRIDGE_MASTER_KEYS` of what starts from now on.
    ring: Mutex<String>,
    _pooler: Option<Server>,
    postgres: tokio::sync::Mutex<Postgres>,
    /// What takes the place of Postgres, and the edge over which it follows.
    standby: Option<(tokio::sync::Mutex<Postgres>, Edge)>,
}

/// One replica, and the edges of the network around it.
pub(super) struct Replica {
    name: String,
    settings: Vec<(&'static str, String)>,
    admin: SocketAddr,
    /// Held while something happens to the process as a whole: what takes longer than planned delays what comes next.
    fate: tokio::sync::Mutex<()>,
    process: tokio::sync::Mutex<Option<Daemon>>,
    clients: Edge,
    peers: Edge,
    postgres: Edge,
    pooler: Option<Edge>,
    redis: Option<Edge>,
    upstream: Edge,
}

impl Fleet {
    /// Starts everything; returns when every replica is ready.
    pub(super) async fn start(
        options: &Options,
        dir: &Path,
        snapshots: &str,
    ) -> anyhow::Result<Self> {
        let Options { replicas, seed, .. } = *options;
        let config = upstream::Config {
            deltas: 10,
            pace: Some(options.pace),
            ..upstream::Config::default()
        };
        let upstream = Upstream::start(config).await;
        let postgres = Postgres::make(dir).await?;
        let database = postgres.url();
        let standby = if options.course == Course::Promotion {
            let edge = Edge::before(&[postgres.address], seed).await;
            let standby = postgres.standby(dir, edge.address).await?;
            Some((tokio::sync::Mutex::new(standby), edge))
        } else {
            None
        };
        let pooler = servers::pgbouncer(dir, postgres.address).await?;
        let redis = if servers::has_redis() {
            let port = lasting_port()?;
            let server = servers::redis(dir, port).await?;
            Some((port, tokio::sync::Mutex::new(Some(server))))
        } else {
            None
        };
        let mut common = vec![
            (
                "DRAWBRIDGE_DATA_DIR",
                dir.join("data").display().to_string(),
            ),
            ("DRAWBRIDGE_DATABASE_URL", database.clone()),
            ("DRAWBRIDGE_UPSTREAM_URL", upstream.url()),
            ("DRAWBRIDGE_AUTH_URL", upstream.auth_url()),
            ("DRAWBRIDGE_SNAPSHOTS", snapshots.to_owned()),
            ("DRAWBRIDGE_DRAIN_DELAY", "2s".to_owned()),
            ("DRAWBRIDGE_DRAIN_GRACE", "20s".to_owned()),
        ];
        common.extend(
            options
                .scale
                .map(|scale| ("DRAWBRIDGE_TEST_TIME_SCALE", scale.to_string())),
        );
        let mut all = Vec::new();
        for number in 0..replicas {
            let edge = async |target| Edge::before(&[target], seed ^ number as u64).await;
            let [clients, peers, admin] = [local()?, local()?, local()?];
            let mut replica = Replica {
                name: format!("r{number}"),
                settings: common.clone(),
                admin,
                fate: tokio::sync::Mutex::default(),
                process: tokio::sync::Mutex::new(None),
                clients: edge(clients).await,
                peers: edge(peers).await,
                postgres: edge(postgres.address).await,
                pooler: match &pooler {
                    Some(pooler) => Some(edge(pooler.address).await),
                    None => None,
                },
                redis: match &redis {
                    Some((port, _)) => Some(edge((Ipv4Addr::LOCALHOST, *port).into()).await),
                    None => None,
                },
                upstream: edge(target(&upstream.auth_url())?).await,
            };
            replica.configure(clients, peers, &database, &upstream)?;
            all.push(replica);
        }
        let fleet = Self {
            upstream,
            accounts: vec!["alice", "bob", "carol"],
            replicas: all,
            database,
            binary: options
                .drawbridge
                .canonicalize()
                .with_context(|| format!("{} is not there", options.drawbridge.display()))?,
            dir: dir.to_owned(),
            http: crate::rig::client()?,
            redis,
            struck: Mutex::default(),
            ring: Mutex::new(master_key("k1")),
            _pooler: pooler,
            postgres: tokio::sync::Mutex::new(postgres),
            standby,
        };
        fleet.cli(&common, &["migrate"], None).await?;
        for name in &fleet.accounts {
            let login = fleet.upstream.account(name).auth_json();
            let import = ["accounts", "import", "-", "--label", name];
            fleet.cli(&common, &import, Some(login)).await?;
        }
        for number in 0..replicas {
            fleet.up(number).await?;
        }
        Ok(fleet)
    }

    /// Where clients reach the replicas.
    pub(super) fn fronts(&self) -> Vec<SocketAddr> {
        let replicas = self.replicas.iter();
        replicas.map(|replica| replica.clients.address).collect()
    }

    /// Whether it has a Redis.
    pub(super) fn has_redis(&self) -> bool {
        self.redis.is_some()
    }

    /// Creates a client key of a scope of its own.
    pub(super) async fn key(&self, name: &str) -> anyhow::Result<String> {
        let create = ["keys", "create", "--name", name, "--quiet"];
        let said = self.operate(&create).await?;
        Ok(said.trim().to_owned())
    }

    /// A command of the operator, who reaches the database whatever happens.
    pub(super) async fn operate(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut settings = self.replicas[0].settings.clone();
        settings.push(("DRAWBRIDGE_DATABASE_URL", self.database.clone()));
        settings.push(("DRAWBRIDGE_DATABASE_DIRECT_URL", self.database.clone()));
        settings.retain(|(name, _)| *name != "DRAWBRIDGE_REDIS_URL");
        self.cli(&settings, args, None).await
    }

    async fn cli(
        &self,
        settings: &[(&'static str, String)],
        args: &[&str],
        input: Option<String>,
    ) -> anyhow::Result<String> {
        let mut command = tokio::process::Command::from(self.command(settings));
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn()?;
        if let Some(mut pipe) = child.stdin.take() {
            pipe.write_all(input.unwrap_or_default().as_bytes()).await?;
        }
        let output = timeout(START, child.wait_with_output()).await??;
        ensure!(
            output.status.success(),
            "drawbridge {}: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    fn command(&self, settings: &[(&'static str, String)]) -> Command {
        let mut command = Command::new(&self.binary);
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("DRAWBRIDGE_MASTER_KEYS", &*ring)
            .envs(settings.iter().map(|(name, value)| (name, value)));
        command
    }

    /// The master keys of whatever starts from now on.
    pub(super) fn keep(&self, keys: &[&str]) {
        let mut ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        *ring = keys.join(",");
    }

    /// The master keys that what starts now gets.
    pub(super) fn kept(&self) -> String {
        let ring = self.ring.lock().unwrap_or_else(PoisonError::into_inner);
        ring.clone()
    }

    /// Starts a replica, as often as it takes, and lets it be reached when it is ready.
    async fn up(&self, number: usize) -> anyhow::Result<()> {
        let replica = &self.replicas[number];
        let mut process = replica.process.lock().await;
        let deadline = Instant::now() + START;
        loop {
            if Instant::now() > deadline {
                let ended = process.as_mut().map(Daemon::alive).transpose();
                ended.with_context(|| replica.name.clone())?;
                bail!("{} does not get ready", replica.name);
            }
            let ended = match process.as_mut() {
                Some(daemon) => daemon.ended()?.is_some(),
                None => true,
            };
            if ended {
                let mut command = self.command(&replica.settings);
                command.arg("serve");
                let log = format!("{}.{}.log", replica.name, clock::epoch_millis());
                *process = Some(Daemon::start(command, self.dir.join(log))?);
            }
            sleep(Duration::from_millis(200)).await;
            if self.ready(replica).await {
                replica.clients.set(Mode::Pass);
                replica.peers.set(Mode::Pass);
                return Ok(());
            }
        }
    }

    async fn ready(&self, replica: &Replica) -> bool {
        let url = format!("http://{}/readyz", replica.admin);
        let asked = self.http.get(url).timeout(Duration::from_secs(2)).send();
        asked.await.is_ok_and(|answer| answer.status().is_success())
    }

    /// Reads counters until it is dropped. What a process counts between the last look and its death is lost.
    pub(super) async fn count(&self, counters: &mut Counters) {
        loop {
            for replica in &self.replicas {
                let url = format!("http://{}/metrics", replica.admin);
                let asked = self.http.get(url).timeout(Duration::from_secs(1)).send();
                if let Ok(answer) = asked.await
                    && let Ok(text) = answer.text().await
                {
                    counters.read(&replica.name, &text);
                }
            }
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// Asks every replica again and again whether it lives, and notes when that took long though nothing was wrong with it, until it is
    /// dropped.
    pub(super) async fn pulse(&self) {
        let beat = async |number: usize| {
            let url = format!("http://{}/livez", self.replicas[number].admin);
            loop {
                let from = clock::epoch_millis();
                let asked = self.http.get(&url).timeout(Duration::from_secs(20)).send();
                let answered = asked.await.is_ok();
                let to = clock::epoch_millis();
                if answered && Duration::from_millis(to - from) > AT_ONCE {
                    self.was_slow(number, from, to);
                }
                sleep(Duration::from_millis(100)).await;
            }
        };
        let beats = (0..self.replicas.len()).map(beat);
        futures_util::future::join_all(beats).await;
    }

    /// Notes it, unless something had been done to the process.
    fn was_slow(&self, number: usize, from: u64, to: u64) {
        let mut struck = self.struck.lock().unwrap_or_else(PoisonError::into_inner);
        let stopped = struck.iter().any(|fault| match fault.what {
            What::Kill(other) | What::Pause(other) | What::Drain(other) => {
                other == number && fault.from <= to && from <= fault.to
            }
            _ => false,
        });
        if !stopped {
            let what = What::Slow(number);
            struck.push(Struck { what, from, to });
        }
    }

    /// The replicas that are not ready a while after everything has healed.
    pub(super) async fn unready(&self) -> Vec<String> {
        let mut unready = Vec::new();
        for replica in &self.replicas {
            let deadline = Instant::now() + Duration::from_secs(30);
            while !self.ready(replica).await {
                if Instant::now() > deadline {
                    unready.push(replica.name.clone());
                    break;
                }
                sleep(Duration::from_millis(200)).await;
            }
        }
        unready
    }
}

impl Replica {
    fn configure(
        &mut self,
        clients: SocketAddr,
        peers: SocketAddr,
        database: &str,
        upstream: &Upstream,
    ) -> anyhow::Result<()> {
        let direct = over(&self.postgres, database)?;
        let pooled = match &self.pooler {
            Some(pooler) => over(pooler, database)?,
            None => direct.clone(),
        };
        self.settings.extend([
            ("DRAWBRIDGE_REPLICA_NAME", self.name.clone()),
            ("DRAWBRIDGE_LISTEN", clients.to_string()),
            ("DRAWBRIDGE_INTERNAL_LISTEN", peers.to_string()),
            (
                "DRAWBRIDGE_INTERNAL_URL",
                format!("http://{}", self.peers.address),
            ),
            ("DRAWBRIDGE_ADMIN_LISTEN", self.admin.to_string()),
            ("DRAWBRIDGE_DATABASE_URL", pooled),
            ("DRAWBRIDGE_DATABASE_DIRECT_URL", direct),
            (
                "DRAWBRIDGE_UPSTREAM_URL",
                over(&self.upstream, &upstream.url())?,
            ),
            (
                "DRAWBRIDGE_AUTH_URL",
                over(&self.upstream, &upstream.auth_url())?,
            ),
        ]);
        let redis = self.redis.as_ref();
        self.settings.extend(
            redis.map(|edge| ("DRAWBRIDGE_REDIS_URL", format!("redis://{}", edge.address))),
        );
        Ok(())
    }
}

fn local() -> anyhow::Result<SocketAddr> {
    Ok((Ipv4Addr::LOCALHOST, lasting_port()?).into())
}

/// A new master key.
pub(super) fn master_key(id: &str) -> String {
    let halves = [Uuid::new_v4(), Uuid::new_v4()];
    let bytes: Vec<u8> = halves.iter().flat_map(|half| *half.as_bytes()).collect();
    format!("{id}:{}", BASE64_STANDARD.encode(bytes))
}

/// Where a URL leads.
fn target(url: &str) -> anyhow::Result<SocketAddr> {
    let url: Url = url.parse()?;
    let addresses = url.socket_addrs(|| None)?;
    addresses.first().copied().context("an address")
}

/// A URL by way of an edge.
fn over(edge: &Edge, url: &str) -> anyhow::Result<String> {
    let mut url: Url = url.parse()?;
    url.set_port(Some(edge.address.port()))
        .ok()
        .context("a URL with a host")?;
    Ok(url.to_string().trim_end_matches('/').to_owned())
}

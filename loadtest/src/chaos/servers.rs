//! The servers around the replicas, each private to the run: Postgres, and `PgBouncer` and Redis where they are installed.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Signal, geteuid};
use tokio::net::TcpStream;

use crate::{
    bench::version,
    process::{Daemon, lasting_port},
};

/// The OS user for what refuses root.
const NOBODY: u32 = 65534;
const USER: &str = "drawbridge";

/// A server that listens on a port.
pub(super) struct Server {
    daemon: Daemon,
    pub(super) address: SocketAddr,
    /// How it is asked to end at once.
    end: Signal,
}

impl Server {
    async fn start(
        mut command: Command,
        port: u16,
        log: PathBuf,
        end: Signal,
    ) -> anyhow::Result<Self> {
        command.current_dir("/").stdin(Stdio::null());
        let mut server = Self {
            daemon: Daemon::start(command, log)?,
            address: (Ipv4Addr::LOCALHOST, port).into(),
            end,
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(server.address).await.is_err() {
            server.daemon.alive()?;
            ensure!(Instant::now() < deadline, "it does not listen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The daemon's own drop waits for it, and makes sure.
        drop(self.daemon.signal(self.end));
    }
}

/// A Postgres, whose data outlives its process.
pub(super) struct Postgres {
    bin: PathBuf,
    data: PathBuf,
    pub(super) address: SocketAddr,
    server: Option<Server>,
}

impl Postgres {
    /// An empty one, started.
    pub(super) async fn make(dir: &Path) -> anyhow::Result<Self> {
        let mut postgres = Self::at(private(dir, "postgres")?)?;
        let options = [
            "--no-sync",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--username",
            USER,
            "--pgdata",
        ];
        postgres.program("initdb", &options).await?;
        postgres.start().await?;
        Ok(postgres)
    }

    /// A copy that follows this one by way of an address, without being waited for.
    pub(super) async fn standby(&self, dir: &Path, by: SocketAddr) -> anyhow::Result<Self> {
        let mut standby = Self::at(private(dir, "standby")?)?;
        let host = format!("--host={}", by.ip());
        let port = format!("--port={}", by.port());
        let options = [
            "--checkpoint=fast",
            "--write-recovery-conf",
            "--no-sync",
            "--username",
            USER,
            &host,
            &port,
            "--pgdata",
        ];
        standby.program("pg_basebackup", &options).await?;
        standby.spawn().await?;
        Ok(standby)
    }

    fn at(data: PathBuf) -> anyhow::Result<Self> {
        Ok(Self {
            bin: programs().context("Postgres is not installed")?,
            data,
            address: (Ipv4Addr::LOCALHOST, lasting_port()?).into(),
            server: None,
        })
    }

    /// Where clients find it.
    pub(super) fn url(&self) -> String {
        format!("postgres://{USER}@{}/postgres", self.address)
    }

    /// Starts it; returns when it takes connections.
    pub(super) async fn start(&mut self) -> anyhow::Result<()> {
        self.spawn().await?;
        let (url, deadline) = (self.url(), Instant::now() + Duration::from_secs(60));
        while tokio_postgres::connect(&url, tokio_postgres::NoTls)
            .await
            .is_err()
        {
            ensure!(Instant::now() < deadline, "Postgres takes no connections");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Ends it as a crash of its machine would: nobody is told, nothing is written.
    pub(super) fn crash(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.end = Signal::QUIT;
        }
    }

    /// Takes the place of another, with what it has got from it.
    pub(super) async fn replace(&mut self, other: &mut Self) -> anyhow::Result<()> {
        other.crash();
        self.server = None;
        self.address = other.address;
        // Before it takes connections it is no standby yet, which could be promoted.
        self.start().await?;
        self.program("pg_ctl", &["promote", "--wait", "--pgdata"])
            .await
    }

    async fn spawn(&mut self) -> anyhow::Result<()> {
        let port = self.address.port();
        let mut command = Command::new(self.bin.join("postgres"));
        command.arg("-D").arg(&self.data).args(["-k", ""]);
        for setting in [
            "listen_addresses=127.0.0.1",
            &format!("port={port}"),
            "max_connections=300",
            "fsync=off",
        ] {
            command.args(["-c", setting]);
        }
        demoted(&mut command);
        let log = self.data.with_extension("log");
        self.server = Some(Server::start(command, port, log, Signal::INT).await?);
        Ok(())
    }

    /// Runs one of its programs on its data.
    async fn program(&self, name: &str, options: &[&str]) -> anyhow::Result<()> {
        let mut command = Command::new(self.bin.join(name));
        command.args(options).arg(&self.data).current_dir("/");
        demoted(&mut command);
        let done = tokio::process::Command::from(command).output().await?;
        ensure!(
            done.status.success(),
            "{name}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        Ok(())
    }
}

/// A pooler in transaction mode before a Postgres; `None` where the program is missing.
pub(super) async fn pgbouncer(dir: &Path, postgres: SocketAddr) -> anyhow::Result<Option<Server>> {
    let Some(program) = find("pgbouncer") else {
        return Ok(None);
    };
    let home = private(dir, "pgbouncer")?;
    let port = lasting_port()?;
    let (config, users) = (home.join("pgbouncer.ini"), home.join("users"));
    let text = format!(
        "[databases]\n* = host={} port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
         pool_mode = transaction\nserver_login_retry = 1\nauth_type = trust\nauth_file = {}\nmax_client_conn = 1000\n",
        postgres.ip(),
        postgres.port(),
        users.display(),
    );
    fs::write(&config, text)?;
    fs::write(&users, format!("\"{USER}\" \"\"\n"))?;
    let mut command = Command::new(program);
    command.arg("--quiet").arg(&config);
    demoted(&mut command);
    let log = dir.join("pgbouncer.log");
    Server::start(command, port, log, Signal::TERM)
        .await
        .map(Some)
}

/// Whether there can be a Redis.
pub(super) fn has_redis() -> bool {
    find("redis-server").is_some()
}

/// A Redis that keeps nothing, on a port.
pub(super) async fn redis(dir: &Path, port: u16) -> anyhow::Result<Server> {
    let Some(program) = find("redis-server") else {
        bail!("Redis is not installed");
    };
    let mut command = Command::new(program);
    command
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--port", &port.to_string()]);
    let log = dir.join("redis.log");
    Server::start(command, port, log, Signal::KILL).await
}

/// What the servers' programs say of themselves.
pub(super) fn versions() -> Vec<String> {
    let postgres = programs().map(|bin| bin.join("postgres"));
    let all = [postgres, find("pgbouncer"), find("redis-server")];
    let said = all.into_iter().flatten();
    said.filter_map(|program| version(program, "--version"))
        .map(|said| said.lines().next().unwrap_or_default().to_owned())
        .collect()
}

/// A directory that the server's user owns.
fn private(dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    fs::create_dir_all(&path)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700))?;
    if geteuid().is_root() {
        chown(&path, Some(NOBODY), Some(NOBODY))?;
    }
    Ok(path)
}

fn demoted(command: &mut Command) {
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
}

/// A program on the path, or where Debian keeps those of administrators.
fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    let further = ["/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin"].map(PathBuf::from);
    places
        .into_iter()
        .chain(further)
        .map(|place| place.join(name))
        .find(|program| program.is_file())
}

/// Where the newest Postgres has its programs.
fn programs() -> Option<PathBuf> {
    let families = fs::read_dir("/usr/lib/postgresql").into_iter().flatten();
    let versions = families.filter_map(|entry| Some(entry.ok()?.path().join("bin")));
    let debian = versions.filter(|bin| bin.join("initdb").is_file()).max();
    debian.or_else(|| find("initdb").and_then(|program| Some(program.parent()?.to_owned())))
}

//! The private Postgres of a single machine: what `drawbridge` uses when no database is configured.
//!
//! Owns one cluster under `DATA_DIR/postgres`, run from the Postgres programs that the machine has and reached over a unix socket
//! alone. Any number of processes use it at once. It knows nothing of what the database holds.
//!
//! Two `flock`s carry its life, so that the kernel cleans up after `kill -9`: every user holds `postgres.lock` shared, and whoever
//! starts, stops, joins or leaves holds `postgres.start.lock` exclusively meanwhile. Hence a server is started once, is stopped only
//! by its last user, and one left behind is adopted by the next. Access is by the socket's directory, which is 0700 (the data
//! directory itself, as a rule): within it everyone is trusted, so there is no password to keep.

mod home;
mod programs;
mod server;

use std::fmt;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::Config;

use self::home::Home;
use self::programs::Programs;

/// The only role and the only database of an embedded cluster.
const NAME: &str = "drawbridge";
/// How long a server may recover, and how long its neighbours may take to start or stop it.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// Why there is no embedded cluster.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No server programs on this machine.
    #[error(
        "Postgres 14 or newer is not installed: run `apt-get install postgresql`, or set DRAWBRIDGE_DATABASE_URL"
    )]
    NotInstalled,
    /// The data belongs to a major version that is not installed.
    #[error(
        "the data in {data} needs Postgres {major}, which is not installed: run `apt-get install postgresql-{major}`"
    )]
    MissingMajor {
        /// The data directory.
        data: PathBuf,
        /// Its `PG_VERSION`.
        major: u32,
    },
    /// We are root, which Postgres refuses, and there is nobody else to run it as.
    #[error(
        "Postgres does not run as root and this machine has no user `postgres`: run `apt-get install postgresql`"
    )]
    NoAccount,
    /// The account that runs the server cannot get to its data.
    #[error(
        "{path} is closed to the OS user that runs Postgres: choose a DRAWBRIDGE_DATA_DIR that others may pass through"
    )]
    Unreachable {
        /// The first directory on the way that it may not pass.
        path: PathBuf,
    },
    /// The short directory for the socket is not ours alone.
    #[error("{path} is not a private directory of the OS user that runs Postgres: remove it")]
    SocketDirectory {
        /// That directory.
        path: PathBuf,
    },
    /// Another process has been starting or stopping the cluster for a minute.
    #[error("{path} has been held by another process for a minute")]
    Held {
        /// The lock file.
        path: PathBuf,
    },
    /// A program failed; `output` is the end of what it said.
    #[error("{program} failed: {output}")]
    Program {
        /// `initdb`, `postgres` or `pg_ctl`.
        program: &'static str,
        /// Its last lines.
        output: String,
    },
    /// A file or directory could not be made, read or locked.
    #[error("{path}: {source}")]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The server refused a statement.
    #[error("embedded Postgres: {0}")]
    Database(#[from] tokio_postgres::Error),
}

/// A running embedded cluster, with this process among its users. Prefer [`Cluster::close`] to dropping it.
#[derive(Debug)]
pub struct Cluster {
    home: Home,
    programs: Programs,
    config: Config,
    /// Locked shared as long as we use the cluster; `None` once we have left.
    users: Option<File>,
}

impl Cluster {
    /// Joins the cluster under `data_dir`: creates, starts or adopts it as needed.
    ///
    /// # Errors
    /// Without suitable Postgres programs, and when the server does not start: then with the end of its log.
    pub async fn open(data_dir: &Path) -> Result<Self, Error> {
        Self::open_with(data_dir, &[], &[]).await
    }

    /// [`Cluster::open`] with further arguments for `initdb` and for `postgres`: a throw-away cluster has other wishes.
    ///
    /// # Errors
    /// As [`Cluster::open`].
    pub async fn open_with(
        data_dir: &Path,
        initdb: &[&str],
        postgres: &[&str],
    ) -> Result<Self, Error> {
        let home = Home::open(data_dir)?;
        let _gate = locked(&home.gate, File::try_lock).await?;
        let users = locked(&home.users, File::try_lock_shared).await?;
        let programs = Programs::find(&home)?;
        if home.major()?.is_none() {
            create(&home, &programs, initdb).await?;
        }
        let config = server::start(&home, &programs, postgres).await?;
        Ok(Self {
            home,
            programs,
            config,
            users: Some(users),
        })
    }

    /// How to connect, as the owner of the database `drawbridge`.
    #[must_use]
    pub fn config(&self) -> Config {
        self.config.clone()
    }

    /// Leaves the cluster; its last user stops it and waits until it has.
    ///
    /// # Errors
    /// When the server does not stop within a minute.
    pub async fn close(mut self) -> Result<(), Error> {
        let Some(users) = self.users.take() else {
            return Ok(());
        };
        let _gate = locked(&self.home.gate, File::try_lock).await?;
        if !alone(&users) {
            return Ok(());
        }
        let stop = tokio::process::Command::from(self.stop()).output().await;
        programs::checked("pg_ctl", stop)
    }

    fn stop(&self) -> std::process::Command {
        let mut command = self.programs.command("pg_ctl", &self.home);
        command
            .args(["stop", "-w", "-m", "fast", "-D"])
            .arg(&self.home.data);
        command
    }
}

/// Stops the server as [`Cluster::close`] does, blocking meanwhile, unless another process is starting or stopping it just now:
/// a server that nobody uses is adopted by the next user.
impl Drop for Cluster {
    fn drop(&mut self) {
        let Some(users) = self.users.take() else {
            return;
        };
        let Ok(gate) = home::lock_file(&self.home.gate) else {
            return;
        };
        if gate.try_lock().is_ok() && alone(&users) {
            // Nobody is left to be told.
            let _ = self.stop().output();
        }
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "embedded Postgres {} in {}",
            self.programs.major,
            self.home.data.display()
        )
    }
}

/// Whether no other process uses the cluster. The caller holds the gate, so nobody can come in between.
fn alone(users: &File) -> bool {
    users.unlock().is_ok() && users.try_lock().is_ok()
}

/// Opens and locks `path`; waits for those who hold it now.
async fn locked(
    path: &Path,
    lock: impl Fn(&File) -> Result<(), TryLockError>,
) -> Result<File, Error> {
    let file = home::lock_file(path)?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        match lock(&file) {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(source)) => {
                return Err(Error::File {
                    path: path.into(),
                    source,
                });
            }
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => sleep(POLL).await,
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Held { path: path.into() });
            }
        }
    }
}

/// Makes a new cluster beside its place and moves it there when complete, so that one half made is never taken for one.
///
/// Locale `C`: the order of text is the same on every system and survives its upgrades.
async fn create(home: &Home, programs: &Programs, initdb: &[&str]) -> Result<(), Error> {
    let staging = home.staging()?;
    let mut command = programs.command("initdb", home);
    command
        .args([
            "--auth-local=trust",
            "--auth-host=reject",
            "--encoding=UTF8",
            "--locale=C",
            "--data-checksums",
        ])
        .arg("--username")
        .arg(NAME)
        .arg("--pgdata")
        .arg(&staging)
        .args(initdb);
    programs::checked(
        "initdb",
        tokio::process::Command::from(command).output().await,
    )?;
    home.install(&staging)
}

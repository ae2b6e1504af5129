//! The server of an embedded cluster: who answers for it, and starting one where nobody does.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Config, NoTls, SimpleQueryMessage};

use super::home::Home;
use super::programs::{self, Programs};
use super::{Error, NAME, PATIENCE, POLL};

/// Refusals of a server that only say that its predecessor is still going, or that a rival is coming.
const NOT_YET: [&str; 2] = ["\"postmaster.pid\" already exists", "shared memory block"];

/// What the server is told beyond Postgres' own defaults. Statements and the values of rows stay out of its log: errors go to the
/// client that caused them, and `log` ranks above them.
const SETTINGS: [&str; 12] = [
    "listen_addresses=",
    "unix_socket_permissions=0700",
    "max_connections=100",
    "shared_buffers=64MB",
    "jit=off",
    "timezone=UTC",
    "log_timezone=UTC",
    "logging_collector=off",
    "log_min_messages=log",
    "log_error_verbosity=terse",
    "log_checkpoints=off",
    "cluster_name=drawbridge",
];

/// Returns once the server takes statements and has our database: the one that runs, or a new one.
pub(super) async fn start(
    home: &Home,
    programs: &Programs,
    arguments: &[&str],
) -> Result<Config, Error> {
    let deadline = Instant::now() + PATIENCE;
    let mut attempt: Option<Attempt> = None;
    loop {
        let starting = attempt
            .as_mut()
            .map(Attempt::is_alive)
            .transpose()?
            .unwrap_or(false);
        match probe(home).await? {
            Probe::Ready(config) => return Ok(*config),
            Probe::Nobody if !starting => {
                if let Some(output) = attempt.as_mut().map(Attempt::output)
                    && !NOT_YET.iter().any(|reason| output.contains(reason))
                {
                    return Err(Error::Program {
                        program: "postgres",
                        output,
                    });
                }
                attempt = Some(Attempt::spawn(home, programs, arguments)?);
            }
            Probe::Nobody | Probe::Busy => {}
        }
        if Instant::now() > deadline {
            let output = attempt.map_or_else(
                || "no answer for a minute".into(),
                |mut running| running.output(),
            );
            return Err(Error::Program {
                program: "postgres",
                output,
            });
        }
        sleep(POLL).await;
    }
}

/// What answers for the cluster at the moment.
enum Probe {
    Ready(Box<Config>),
    /// A server that recovers, stops, or is full: it says so itself.
    Busy,
    Nobody,
}

/// Asks whoever `postmaster.pid` names, and makes sure that it serves this data and not that of a copied directory.
async fn probe(home: &Home) -> Result<Probe, Error> {
    let Some((port, socket)) = home.postmaster() else {
        return Ok(Probe::Nobody);
    };
    let mut config = Config::new();
    config
        .host_path(socket)
        .port(port)
        .user(NAME)
        .dbname(NAME)
        .connect_timeout(Duration::from_secs(5));
    match ask(&config, "show data_directory").await {
        Ok(Some(data)) if Path::new(&data) == home.data => Ok(Probe::Ready(config.into())),
        Ok(_) => Ok(Probe::Nobody),
        Err(error) if error.code() == Some(&SqlState::INVALID_CATALOG_NAME) => {
            // A missing database is the sign of a cluster that has never been open: we hold the gate, so nobody else makes it.
            ask(
                config.clone().dbname("postgres"),
                &format!("create database {NAME}"),
            )
            .await?;
            Ok(Probe::Ready(config.into()))
        }
        Err(error) if error.as_db_error().is_some() => Ok(Probe::Busy),
        Err(_) => Ok(Probe::Nobody),
    }
}

/// The first column of the first row of one statement on a connection of its own.
async fn ask(config: &Config, sql: &str) -> Result<Option<String>, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    let messages = tokio::select! {
        messages = client.simple_query(sql) => messages?,
        Err(error) = connection => return Err(error),
    };
    Ok(messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    }))
}

/// A server that we have started and that may not be ready yet. It outlives us, and the runtime buries it if we outlive it.
struct Attempt {
    server: Child,
    /// Reads the server's log from where this attempt begins.
    log: File,
}

impl Attempt {
    fn spawn(home: &Home, programs: &Programs, arguments: &[&str]) -> Result<Self, Error> {
        let (stderr, log) = home.log()?;
        let mut command = programs.command("postgres", home);
        command
            .arg("-D")
            .arg(&home.data)
            .arg("-c")
            .arg(home.socket_setting()?);
        command
            .args(SETTINGS.iter().flat_map(|setting| ["-c", setting]))
            .args(arguments);
        // Out of reach of the terminal's Ctrl-C: other processes may use the server.
        command
            .process_group(0)
            .stdout(Stdio::null())
            .stderr(stderr);
        match Command::from(command).spawn() {
            Ok(server) => Ok(Self { server, log }),
            Err(source) => Err(Error::File {
                path: programs.bin.join("postgres"),
                source,
            }),
        }
    }

    fn is_alive(&mut self) -> Result<bool, Error> {
        match self.server.try_wait() {
            Ok(status) => Ok(status.is_none()),
            Err(error) => Err(Error::Program {
                program: "postgres",
                output: error.to_string(),
            }),
        }
    }

    fn output(&mut self) -> String {
        let mut text = Vec::new();
        match self.log.read_to_end(&mut text) {
            Ok(_) => programs::tail(&text),
            Err(error) => error.to_string(),
        }
    }
}

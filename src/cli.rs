//! The commands. Each works on the database of the settings, the embedded cluster included, whether `serve` runs or not.

#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the commands talk to people"
)]

/// Prints a line. Who reads no further, as `head` does, has read enough: the command goes on. So it does after another error, but it fails in the end.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write as _;
        crate::cli::said(writeln!(std::io::stdout().lock(), $($text)*));
    }};
}

mod accounts;
mod doctor;
mod explain;
mod keys;
mod leases;
mod quota;
mod replicas;

use std::{fmt, io, path::Path, process::ExitCode, sync::OnceLock};

use anyhow::{Context as _, anyhow};
use clap::{Parser, Subcommand};
use secrecy::{ExposeSecret as _, SecretString};

use crate::{
    bus::Redis,
    config::{self, Config, Database, MasterKeys, Settings},
    db::{Db, Endpoint, Installation, OpenError, embedded::Cluster, migrate},
    ids::TurnId,
    replica::Timing,
    secret::KeyRing,
    server, telemetry, upstream,
};

/// Exit code of a bad configuration or a wrong master key (`EX_USAGE`).
const BAD_CONFIGURATION: u8 = 64;

/// Lets many Codex clients share a pool of ChatGPT accounts.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    settings: Box<Settings>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the service
    Serve,
    #[command(flatten)]
    Work(Work),
    /// Look at everything that the service stands on, and say what to do
    Doctor(doctor::DoctorArgs),
    /// Bring the database schema up to date
    Migrate,
    /// Check the settings and print them
    Config {
        /// Fail on unknown DRAWBRIDGE_* names, and on keys, certificates and URLs that cannot be read
        #[arg(long)]
        strict: bool,
    },
}

/// The commands that work on the database.
#[derive(Debug, Subcommand)]
enum Work {
    /// The pool's accounts
    #[command(subcommand)]
    Accounts(accounts::AccountsCommand),
    /// What is known of an account's limits, each value with its source and age
    Quota {
        /// Label, e-mail address, id, or at least 8 digits of the id's start; unset = every account
        account: Option<String>,
    },
    /// Client keys
    #[command(subcommand)]
    Keys(keys::KeysCommand),
    /// The processes that share the pool
    #[command(subcommand)]
    Replicas(replicas::ReplicasCommand),
    /// Who may continue which conversation
    #[command(subcommand)]
    Leases(leases::LeasesCommand),
    /// What became of a turn, and why
    Explain {
        /// The id of a turn or of a request, as the log has it
        id: TurnId,
    },
}

impl Work {
    async fn run(self, context: &Context) -> anyhow::Result<()> {
        match self {
            Self::Accounts(command) => accounts::run(command, context).await,
            Self::Quota { account } => quota::run(account.as_deref(), context).await,
            Self::Keys(command) => keys::run(command, context).await,
            Self::Replicas(command) => replicas::run(command, context).await,
            Self::Leases(command) => leases::run(command, context).await,
            Self::Explain { id } => explain::run(id, context).await,
        }
    }
}

/// What a command works with.
pub struct Context {
    /// The database.
    pub db: Db,
    /// The master keys.
    pub ring: KeyRing,
    /// The installation's secrets.
    pub installation: Installation,
    /// The upstream.
    pub upstream: config::Upstream,
    /// The times of the protocol between replicas.
    pub timing: Timing,
    /// Whether to print JSON.
    pub json: bool,
}

/// A fault of the configuration, as opposed to one of the work.
#[derive(Debug)]
struct BadConfiguration(Vec<String>);

impl BadConfiguration {
    fn none(faults: Vec<String>) -> Result<(), Self> {
        if faults.is_empty() {
            Ok(())
        } else {
            Err(Self(faults))
        }
    }
}

impl fmt::Display for BadConfiguration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for BadConfiguration {}

/// Why a line was not printed, if one was not.
static UNSAID: OnceLock<io::Error> = OnceLock::new();

fn said(written: io::Result<()>) {
    if let Err(error) = written
        && error.kind() != io::ErrorKind::BrokenPipe
    {
        drop(UNSAID.set(error));
    }
}

/// Runs the command line; yields the exit code.
pub async fn run(cli: Cli) -> ExitCode {
    let ended = cli.dispatch().await.and_then(|code| match UNSAID.get() {
        None => Ok(code),
        Some(error) => Err(anyhow!("what was done could not all be printed: {error}")),
    });
    match ended {
        Ok(code) => code,
        Err(error) => {
            eprintln!("drawbridge: {error:#}");
            if error.is::<BadConfiguration>() {
                ExitCode::from(BAD_CONFIGURATION)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

impl Cli {
    async fn dispatch(self) -> anyhow::Result<ExitCode> {
        let environment = std::env::vars_os().filter_map(|(name, value)| {
            Some((
                name.into_string().ok()?,
                value.to_string_lossy().into_owned(),
            ))
        });
        let unknown = config::unknown_names(environment);
        let config = self.settings.check().map_err(BadConfiguration)?;
        match self.command {
            Command::Config { strict } => {
                if strict {
                    let faults = unfit(&config).into_iter().chain(unknown).collect();
                    BadConfiguration::none(faults)?;
                } else {
                    unknown
                        .iter()
                        .for_each(|warning| eprintln!("drawbridge: {warning}"));
                }
                if self.json {
                    say!("{}", serde_json::to_string(&config)?);
                } else {
                    say!("{config:#?}");
                }
            }
            Command::Serve => {
                telemetry::start_logs(&config.log.filter, config.log.format)?;
                unknown
                    .iter()
                    .for_each(|warning| tracing::warn!("{warning}"));
                BadConfiguration::none(unfit(&config))?;
                return serve(config).await;
            }
            Command::Work(work) => {
                with_context(&config, self.json, async |context| work.run(context).await).await?;
            }
            Command::Doctor(args) => {
                return doctor::run(args, &config, &unknown, self.json).await;
            }
            Command::Migrate => {
                let data = Data::open(&config).await?;
                let applied = migrate(&data.direct).await?;
                data.close().await;
                say!(
                    "{}",
                    if self.json {
                        format!("{{\"applied\":{applied}}}")
                    } else {
                        format!("{applied} migrations applied")
                    }
                );
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The opened database of the settings.
struct Data {
    pooled: Endpoint,
    direct: Endpoint,
    /// Kept while the embedded cluster is used: the last user stops it.
    cluster: Option<Cluster>,
}

impl Data {
    async fn open(config: &Config) -> anyhow::Result<Self> {
        match &config.database {
            Database::Embedded => {
                let cluster = Cluster::open(&config.data_dir)
                    .await
                    .context("the embedded database")?;
                let endpoint = Endpoint::local(cluster.config());
                Ok(Self {
                    pooled: endpoint.clone(),
                    direct: endpoint,
                    cluster: Some(cluster),
                })
            }
            Database::External { pooled, direct } => Ok(Self {
                pooled: endpoint("DRAWBRIDGE_DATABASE_URL", pooled)?,
                direct: endpoint("DRAWBRIDGE_DATABASE_DIRECT_URL", direct)?,
                cluster: None,
            }),
        }
    }

    async fn close(self) {
        if let Some(cluster) = self.cluster
            && let Err(error) = cluster.close().await
        {
            tracing::warn!(%error, "the embedded database");
        }
    }
}

fn endpoint(name: &str, url: &SecretString) -> Result<Endpoint, BadConfiguration> {
    Endpoint::parse(url.expose_secret())
        .map_err(|error| BadConfiguration(vec![format!("{name} {error}")]))
}

/// What `serve` refuses beyond the settings' form: what they name must be there, and of its own form.
fn unfit(config: &Config) -> Vec<String> {
    let mut faults: Vec<anyhow::Error> = Vec::new();
    if let Database::External { pooled, direct } = &config.database {
        faults.extend(
            endpoint("DRAWBRIDGE_DATABASE_URL", pooled)
                .err()
                .map(Into::into),
        );
        if direct.expose_secret() != pooled.expose_secret() {
            faults.extend(
                endpoint("DRAWBRIDGE_DATABASE_DIRECT_URL", direct)
                    .err()
                    .map(Into::into),
            );
        }
    }
    // Generated ones are made by whoever needs them first.
    if !matches!(config.master_keys, MasterKeys::Generated(_)) {
        faults.extend(key_ring(&config.master_keys).err());
    }
    faults.extend(upstream::client(&config.upstream).err());
    faults.iter().map(|fault| format!("{fault:#}")).collect()
}

async fn serve(config: Config) -> anyhow::Result<ExitCode> {
    let ring = key_ring(&config.master_keys)?;
    let data = Data::open(&config).await?;
    if config.migrate_on_start {
        migrate(&data.direct).await?;
    }
    let db = Db::new(&data.pooled, &data.direct)?;
    let installation = open_installation(&db, &ring, &config).await?;
    let clean = server::run(config, db, ring, installation).await?;
    data.close().await;
    Ok(if clean {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Opens the database for a command, runs it, and closes the database.
async fn with_context(
    config: &Config,
    json: bool,
    work: impl AsyncFnOnce(&Context) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let ring = key_ring(&config.master_keys)?;
    let data = Data::open(config).await?;
    if data.cluster.is_some() {
        migrate(&data.direct).await?;
    }
    let db = Db::new(&data.pooled, &data.direct)?;
    let installation = open_installation(&db, &ring, config).await?;
    db.learn_time().await?;
    let context = Context {
        db,
        ring,
        installation,
        upstream: config.upstream.clone(),
        timing: Timing::FULL.scaled(config.time_scale),
        json,
    };
    let announced = context.db.announced();
    let result = work(&context).await;
    if let Some(url) = &config.redis
        && announced.has_changed().unwrap_or(false)
    {
        let redis = Redis::new(&url.0).context("DRAWBRIDGE_REDIS_URL")?;
        redis.tell(&context.db).await;
    }
    context.db.close();
    data.close().await;
    result
}

async fn open_installation(
    db: &Db,
    ring: &KeyRing,
    config: &Config,
) -> anyhow::Result<Installation> {
    Installation::open(db, ring).await.map_err(|error| match error {
        OpenError::Keys(error) => {
            let from = match &config.master_keys {
                MasterKeys::Given(_) => "DRAWBRIDGE_MASTER_KEYS".to_owned(),
                MasterKeys::File(path) | MasterKeys::Generated(path) => path.display().to_string(),
            };
            BadConfiguration(vec![format!(
                "{from} does not belong to this database ({error}); an installation that began with the embedded database has its \
                 key in DATA_DIR/master.key"
            )])
            .into()
        }
        error @ OpenError::Db(_) => anyhow::Error::from(error),
    })
}

fn key_ring(source: &MasterKeys) -> anyhow::Result<KeyRing> {
    let (name, text) = match source {
        MasterKeys::Given(text) => ("DRAWBRIDGE_MASTER_KEYS".to_owned(), text.clone()),
        MasterKeys::File(path) => (path.display().to_string(), read_keys(path)?),
        MasterKeys::Generated(path) => {
            create_keys(path)?;
            (path.display().to_string(), read_keys(path)?)
        }
    };
    let text = SecretString::from(text.expose_secret().trim());
    KeyRing::parse(&text).map_err(|error| BadConfiguration(vec![format!("{name}: {error}")]).into())
}

fn read_keys(path: &Path) -> anyhow::Result<SecretString> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(SecretString::from(text)),
        Err(error) => Err(BadConfiguration(vec![format!(
            "cannot read master keys from {}: {error}",
            path.display()
        )])
        .into()),
    }
}

/// Draws the first master key of an embedded installation. Racing processes: one creates the file, the others read it.
fn create_keys(path: &Path) -> anyhow::Result<()> {
    use std::{fs, io::Write as _, os::unix::fs::OpenOptionsExt as _};

    if path.exists() {
        return Ok(());
    }
    let folder = path.parent().context("the data directory")?;
    fs::create_dir_all(folder).with_context(|| {
        format!(
            "cannot create {}: set DRAWBRIDGE_DATA_DIR to where the embedded Postgres may keep its data, or DRAWBRIDGE_DATABASE_URL to a Postgres of yours",
            folder.display()
        )
    })?;
    // Written beside and linked into place: nobody ever reads half a key, and an existing one is never replaced.
    let draft = folder.join(format!("master.key.{}", std::process::id()));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&draft)?;
    writeln!(file, "{}", KeyRing::generate("k1").expose_secret())?;
    file.sync_all()?;
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft)?;
    match linked {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(error).context("cannot write the master key")
        }
        _ => Ok(()),
    }
}

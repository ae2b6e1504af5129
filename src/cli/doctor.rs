//! `drawbridge doctor`: looks at everything that the service stands on, and says of each what was seen and what to do.
//!
//! Here and in `through` and `live` things are asked; `judge` says what the answers mean. Nothing is changed but what a turn of `--live`
//! leaves in the account's limits, and no answer, token, key or password is shown.

mod expect;
mod judge;
mod live;
mod through;

use std::{
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use rustix::process::Resource;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;

use self::judge::{Finding, Verdict, fail, ok, warn};
use super::{Data, key_ring};
use crate::{
    account::Accounts,
    bus::Redis,
    config::{Config, Database, MasterKeys},
    db::{
        self, Db, Installation, OpenError, migrations, probe,
        sealed::{Counts, SEALED},
    },
    replica::{self, Timing},
    secret::KeyRing,
    upstream,
};

/// What to do about a database that does not answer.
const UNREACHABLE: &str = "is the server up, and are host, user and database of the URL right?";
/// For a peer, and for an origin.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is looked at beside what the settings name.
#[derive(Args, Debug)]
pub(super) struct DoctorArgs {
    /// Also run one tiny turn per transport on this account, straight at upstream, and say where that differs from what tests assume
    #[arg(long, value_name = "ACCOUNT")]
    live: Option<String>,
    /// What --live asks
    #[arg(long, default_value = "gpt-5.5", value_name = "MODEL")]
    model: String,
    /// Also look whether this URL, at which clients reach the service, lets everything pass; with --live and a key, also a streamed turn
    #[arg(long, value_name = "URL")]
    through: Option<String>,
    /// A client's key for --through
    #[arg(
        long,
        env = "DRAWBRIDGE_KEY",
        hide_env_values = true,
        value_name = "KEY"
    )]
    key: Option<SecretString>,
}

/// Looks, and prints what was found; 1 if something failed.
///
/// # Errors
/// If the configuration cannot be used.
pub(super) async fn run(
    args: DoctorArgs,
    config: &Config,
    unknown: &[String],
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let mut found = vec![judge::settings(unknown)];
    let embedded = matches!(config.database, Database::Embedded);
    if embedded && !config.data_dir.join("postgres/PG_VERSION").exists() {
        let seen = format!("nothing in {} yet", config.data_dir.display());
        found.push(warn(
            "database",
            seen,
            "`drawbridge serve` makes an embedded one; or set DRAWBRIDGE_DATABASE_URL",
        ));
    } else if let MasterKeys::Generated(path) = &config.master_keys
        && !path.exists()
    {
        // To go on would draw a new one.
        let seen = format!("{} is gone", path.display());
        found.push(fail(
            "master-keys",
            seen,
            "restore it from your backup: without it the database cannot be read",
        ));
    } else {
        let ring = key_ring(&config.master_keys)?;
        match Data::open(config).await {
            Ok(data) => {
                let db = Db::new(&data.pooled, &data.direct)?;
                database(&mut found, &db, &ring, config).await;
                if let Some(account) = &args.live {
                    found.extend(live::run(account, &args.model, &db, &ring, config).await);
                }
                db.close();
                data.close().await;
            }
            Err(error) if error.is::<super::BadConfiguration>() => return Err(error),
            Err(error) => found.push(fail(
                "database",
                format!("{error:#}"),
                "see DATA_DIR/postgres.log",
            )),
        }
    }
    if let Some(url) = &config.redis {
        found.push(redis(&url.0).await);
    }
    found.extend(origins(&config.upstream).await);
    found.extend(machine(config));
    if let Some(url) = &args.through {
        let (url, key) = (url.trim_end_matches('/'), args.key.as_ref());
        let model = args.live.as_ref().map(|_| args.model.as_str());
        found.extend(through::run(url, key, model, &config.upstream).await);
    }
    let worst = found
        .iter()
        .map(|finding| finding.verdict)
        .max()
        .unwrap_or(Verdict::Ok);
    if as_json {
        say!("{}", json!({ "verdict": worst, "findings": found }));
    } else {
        found.iter().for_each(|finding| say!("{}", line(finding)));
    }
    Ok(if worst == Verdict::Fail {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn line(finding: &Finding) -> String {
    let verdict = match finding.verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "fail",
    };
    let line = format!("{verdict:<4}  {:<12}  {}", finding.name, finding.seen);
    if finding.advice.is_empty() {
        line
    } else {
        format!("{line}  -> {}", finding.advice)
    }
}

/// Everything that the database tells.
async fn database(found: &mut Vec<Finding>, db: &Db, ring: &KeyRing, config: &Config) {
    let separate = match &config.database {
        Database::Embedded => false,
        Database::External { pooled, direct } => pooled.expose_secret() != direct.expose_secret(),
    };
    let pooled = probe::server(db).await;
    found.push(match &pooled {
        Ok(server) => judge::server("database", server),
        Err(error) => fail("database", error.to_string(), UNREACHABLE),
    });
    let direct = probe::server(&db.vital()).await;
    match &direct {
        Ok(server) if separate => found.push(judge::server("direct", server)),
        Err(error) if separate => found.push(fail("direct", error.to_string(), UNREACHABLE)),
        _ => {}
    }
    if direct.is_ok() {
        found.push(match probe::direct(db).await {
            Ok(direct) => judge::direct(direct, config.redis.is_some()),
            Err(error) => fail("direct-url", error.to_string(), UNREACHABLE),
        });
    }
    if pooled.is_ok()
        && let Err(error) = stored(found, db, ring, config, direct.ok(), separate).await
    {
        found.push(fail("database", error.to_string(), UNREACHABLE));
    }
}

/// What the tables tell; no more than the schema, where that is not ours.
async fn stored(
    found: &mut Vec<Finding>,
    db: &Db,
    ring: &KeyRing,
    config: &Config,
    server: Option<probe::Server>,
    separate: bool,
) -> Result<(), db::Error> {
    db.learn_time().await?;
    found.push(judge::clock(db.clock().offset()));
    let schema = judge::schema(&migrations(), &probe::applied(db).await?);
    let usable = schema.verdict != Verdict::Fail;
    found.push(schema);
    if !usable {
        return Ok(());
    }
    let timing = Timing::FULL.scaled(config.time_scale);
    let listed = replica::list(db, timing).await?;
    let running: Vec<_> = listed.iter().filter(|listed| listed.may_run()).collect();
    if let Some(server) = server {
        let replicas = running.len().max(1);
        found.push(judge::connections(&server, replicas, separate));
    }
    found.push(keys(db, ring).await);
    let ids: Vec<_> = ring.ids().collect();
    found.push(judge::sealed(&counts(db).await?, ring.current_id(), &ids));
    let late = timing.heartbeat * 2 + timing.patience;
    found.extend(judge::replicas(&listed, &ring.fingerprints(), late));
    for replica in running.iter().filter(|replica| replica.state != "silent") {
        if running.len() > 1 {
            let endpoint = replica.endpoint.as_deref();
            let answer = match endpoint {
                Some(url) => peer(url).await,
                None => Err(String::new()),
            };
            let shown = endpoint.map(bare);
            found.push(judge::peer(&replica.name, shown.as_deref(), answer));
        }
    }
    found.extend(judge::stored(
        &probe::stored(db).await?,
        config.retention_days,
    ));
    if let Ok(Some(Installation { pepper })) = Installation::known(db, ring).await {
        let accounts = Accounts::new(db.clone(), ring.clone(), pepper);
        let all = accounts.load_all().await?;
        let all: Vec<_> = all.iter().map(|account| account.lifecycle).collect();
        found.push(judge::accounts(&all));
    }
    Ok(())
}

/// Whether the ring is this database's.
async fn keys(db: &Db, ring: &KeyRing) -> Finding {
    let ids = ring.ids().collect::<Vec<_>>().join(", ");
    match Installation::known(db, ring).await {
        Ok(Some(_)) => ok("master-keys", format!("{ids}: they open this installation")),
        Ok(None) => warn(
            "master-keys",
            format!("{ids}: nothing to open yet"),
            "the first `serve` or command makes the installation's secrets",
        ),
        Err(OpenError::Keys(error)) => fail(
            "master-keys",
            error.to_string(),
            "use the master keys of this database; an embedded one had its own in DATA_DIR/master.key",
        ),
        Err(OpenError::Db(error)) => fail(
            "master-keys",
            error.to_string(),
            "look at the database first",
        ),
    }
}

async fn counts(db: &Db) -> Result<Counts, db::Error> {
    let mut all = Counts::new();
    for sealed in SEALED {
        for (key, count) in sealed.count(db).await? {
            *all.entry(key).or_default() += count;
        }
    }
    Ok(all)
}

/// The status of a peer's answer to what it does not serve. Peers are asked without proxies, as turns are.
async fn peer(url: &str) -> Result<u16, String> {
    // reqwest asks for one, even where no TLS is spoken; only the first call counts.
    drop(rustls::crypto::ring::default_provider().install_default());
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(PATIENCE / 5)
        .build();
    let answer = client.map_err(said)?.get(format!("{url}/")).send().await;
    Ok(answer.map_err(said)?.status().as_u16())
}

async fn redis(url: &SecretString) -> Finding {
    let advice =
        "changes are heard of without it, more slowly; correct DRAWBRIDGE_REDIS_URL or start Redis";
    let redis = match Redis::new(url) {
        Ok(redis) => redis,
        Err(error) => return fail("redis", error.to_string(), advice),
    };
    match redis.probe().await {
        Ok(took) => ok(
            "redis",
            format!("a message to ourselves took {} us", took.as_micros()),
        ),
        Err(error) => fail("redis", error.to_string(), advice),
    }
}

/// Both origins, by the client that turns use, without credentials.
async fn origins(config: &crate::config::Upstream) -> Vec<Finding> {
    let client = match upstream::client(config) {
        Ok(client) => client,
        Err(error) => {
            return vec![fail(
                "upstream",
                format!("{error:#}"),
                "correct DRAWBRIDGE_CA_FILE",
            )];
        }
    };
    let mut found = Vec::new();
    for (name, url, path) in [
        ("upstream", &config.url, "/codex/models"),
        ("auth", &config.auth_url, "/"),
    ] {
        let began = Instant::now();
        let answer = client
            .get(format!("{url}{path}"))
            .timeout(PATIENCE)
            .send()
            .await;
        let answer = answer.map(|answer| (answer.status().as_u16(), began.elapsed()));
        found.push(judge::origin(name, &bare(url), answer.map_err(said)));
    }
    found
}

/// What this host gives the service.
fn machine(config: &Config) -> Vec<Finding> {
    let limit = rustix::process::getrlimit(Resource::Nofile).current;
    let mut found = vec![judge::files(limit, config.max_sessions)];
    let mode = |path: &Path| Some(path.metadata().ok()?.permissions().mode());
    if let MasterKeys::File(path) | MasterKeys::Generated(path) = &config.master_keys
        && let Some(mode) = mode(path)
    {
        let generated = matches!(config.master_keys, MasterKeys::Generated(_));
        found.push(judge::key_file(
            &path.display().to_string(),
            mode,
            generated,
        ));
    }
    if matches!(config.database, Database::Embedded)
        && let Ok(disk) = rustix::fs::statvfs(&config.data_dir)
    {
        found.push(judge::disk(
            disk.f_bavail * disk.f_frsize,
            disk.f_blocks * disk.f_frsize,
        ));
    }
    found
}

/// A URL without user and password.
fn bare(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = authority.rsplit('@').next().unwrap_or_default();
            format!("{scheme}://{host}{path}")
        }
        None => url.to_owned(),
    }
}

/// What went wrong, without a URL.
fn said(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

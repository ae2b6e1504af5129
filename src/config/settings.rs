//! The settings as they are given: text.

use std::{fmt, path::PathBuf};

use clap::{
    Args,
    builder::{OsStringValueParser, TypedValueParser},
};
use secrecy::SecretString;

/// The settings as given. Each is a flag and an environment variable.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Settings")]
pub struct Settings {
    /// Address for clients [default: 127.0.0.1:2455]
    #[arg(long, global = true, env = "DRAWBRIDGE_LISTEN", value_name = "ADDR")]
    pub(super) listen: Option<String>,
    /// Address for other replicas, which must reach it; unset = turns are not forwarded to this one
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_INTERNAL_LISTEN",
        value_name = "ADDR"
    )]
    pub(super) internal_listen: Option<String>,
    /// How other replicas reach it [default: <http://the> address above]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_INTERNAL_URL",
        value_name = "URL"
    )]
    pub(super) internal_url: Option<String>,
    /// Address for /metrics, /livez and /readyz [default: 127.0.0.1:9464]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_ADMIN_LISTEN",
        value_name = "ADDR"
    )]
    pub(super) admin_listen: Option<String>,
    /// Name of this replica in logs and tables [default: the host name]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_REPLICA_NAME",
        value_name = "NAME"
    )]
    pub(super) replica_name: Option<String>,
    /// Postgres, possibly through a transaction pooler; unset = an embedded cluster in the data directory
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_DATABASE_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(super) database_url: Option<SecretText>,
    /// Postgres itself, for heartbeats and notifications [default: the same as above]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_DATABASE_DIRECT_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(super) database_direct_url: Option<SecretText>,
    /// Redis, which tells replicas of changes faster where the database cannot; redis:// or rediss://
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_REDIS_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(super) redis_url: Option<SecretText>,
    /// Whether `serve` applies migrations [default: true]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_MIGRATE_ON_START",
        value_name = "BOOL"
    )]
    pub(super) migrate_on_start: Option<String>,
    /// Embedded cluster and generated master key [default: ~/.drawbridge, as root /var/lib/drawbridge]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_DATA_DIR",
        value_name = "DIR",
        value_parser = path()
    )]
    pub(super) data_dir: Option<PathBuf>,
    /// id:base64(32 bytes), comma separated, the current one first
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_MASTER_KEYS",
        value_name = "KEYS",
        hide_env_values = true
    )]
    pub(super) master_keys: Option<SecretText>,
    /// A file with the same content
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_MASTER_KEYS_FILE",
        value_name = "FILE",
        value_parser = path()
    )]
    pub(super) master_keys_file: Option<PathBuf>,
    /// The Codex backend [default: <https://chatgpt.com/backend-api>]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_UPSTREAM_URL",
        value_name = "URL"
    )]
    pub(super) upstream_url: Option<String>,
    /// The token endpoint's origin [default: <https://auth.openai.com>]
    #[arg(long, global = true, env = "DRAWBRIDGE_AUTH_URL", value_name = "URL")]
    pub(super) auth_url: Option<String>,
    /// PEM file with further roots for upstream's certificates
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_CA_FILE",
        value_name = "FILE",
        value_parser = path()
    )]
    pub(super) ca_file: Option<PathBuf>,
    /// auto, http or websocket [default: auto]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_UPSTREAM_TRANSPORT",
        value_name = "WORD"
    )]
    pub(super) upstream_transport: Option<String>,
    /// How often upstream is asked what an account has used, where turns do not tell; off = never [default: 60s]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_USAGE_POLL",
        value_name = "TIME"
    )]
    pub(super) usage_poll: Option<String>,
    /// Sizes of plans relative to plus, where those that are known are wrong: pro=6.67,free=0.15
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_PLAN_WEIGHTS",
        value_name = "LIST"
    )]
    pub(super) plan_weights: Option<String>,
    /// Which account serves a new conversation: capacity, soonest-reset or round-robin [default: capacity]
    #[arg(long, global = true, env = "DRAWBRIDGE_ROUTING", value_name = "WORD")]
    pub(super) routing: Option<String>,
    /// Turns of this replica at one account at once; 0 = any number [default: 0]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_TURNS_PER_ACCOUNT",
        value_name = "N"
    )]
    pub(super) turns_per_account: Option<String>,
    /// Further names of models: fast=gpt-5.4-mini
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_MODEL_ALIASES",
        value_name = "LIST"
    )]
    pub(super) model_aliases: Option<String>,
    /// auto (loopback may go without until a key exists) or always [default: auto]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_REQUIRE_API_KEY",
        value_name = "WORD"
    )]
    pub(super) require_api_key: Option<String>,
    /// After SIGTERM: still served, but unready [default: 5s]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_DRAIN_DELAY",
        value_name = "TIME"
    )]
    pub(super) drain_delay: Option<String>,
    /// Then running turns may end [default: 600s]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_DRAIN_GRACE",
        value_name = "TIME"
    )]
    pub(super) drain_grace: Option<String>,
    /// Age at which the request log is deleted [default: 30]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_RETENTION_DAYS",
        value_name = "DAYS"
    )]
    pub(super) retention_days: Option<String>,
    /// Tracing filter [default: info]
    #[arg(long, global = true, env = "DRAWBRIDGE_LOG", value_name = "FILTER")]
    pub(super) log: Option<String>,
    /// text or json [default: text]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_LOG_FORMAT",
        value_name = "WORD"
    )]
    pub(super) log_format: Option<String>,
    /// Whether metrics show each account's quota, by the end of its id [default: false]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_METRICS_ACCOUNTS",
        value_name = "BOOL"
    )]
    pub(super) metrics_accounts: Option<String>,
    /// What is kept of finished responses: auto, full or off [default: auto]
    #[arg(long, global = true, env = "DRAWBRIDGE_SNAPSHOTS", value_name = "MODE")]
    pub(super) snapshots: Option<String>,
    /// Whether no client sees anything of the pool's quota, whatever its key's grants say [default: false]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_HIDE_QUOTA",
        value_name = "BOOL"
    )]
    pub(super) hide_quota: Option<String>,
    /// Sessions at once [default: 4096]
    #[arg(long, global = true, env = "DRAWBRIDGE_MAX_SESSIONS", value_name = "N")]
    pub(super) max_sessions: Option<String>,
    /// At least 16 characters; opens /api on the admin address to who sends it as a bearer; unset = there is no such API
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_OPERATOR_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true
    )]
    pub(super) operator_token: Option<SecretText>,
    /// For tests: multiplies the times of the protocol between replicas, which must all use the same
    #[arg(
        long,
        global = true,
        hide = true,
        env = "DRAWBRIDGE_TEST_TIME_SCALE",
        value_name = "FACTOR"
    )]
    pub(super) test_time_scale: Option<String>,
}

/// Of any text: clap would refuse an empty one by itself, not as a fault among the others.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}

/// Text that does not print, without the line break that a file or a `Secret` may end in.
#[derive(Clone)]
pub(super) struct SecretText(pub(super) SecretString);

impl From<&str> for SecretText {
    fn from(text: &str) -> Self {
        Self(SecretString::from(text.trim()))
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

/// Every name that [`Settings`] reads from the environment.
pub(super) const NAMES: [&str; 34] = [
    "DRAWBRIDGE_LISTEN",
    "DRAWBRIDGE_INTERNAL_LISTEN",
    "DRAWBRIDGE_INTERNAL_URL",
    "DRAWBRIDGE_ADMIN_LISTEN",
    "DRAWBRIDGE_REPLICA_NAME",
    "DRAWBRIDGE_DATABASE_URL",
    "DRAWBRIDGE_DATABASE_DIRECT_URL",
    "DRAWBRIDGE_REDIS_URL",
    "DRAWBRIDGE_MIGRATE_ON_START",
    "DRAWBRIDGE_DATA_DIR",
    "DRAWBRIDGE_MASTER_KEYS",
    "DRAWBRIDGE_MASTER_KEYS_FILE",
    "DRAWBRIDGE_UPSTREAM_URL",
    "DRAWBRIDGE_AUTH_URL",
    "DRAWBRIDGE_CA_FILE",
    "DRAWBRIDGE_UPSTREAM_TRANSPORT",
    "DRAWBRIDGE_USAGE_POLL",
    "DRAWBRIDGE_PLAN_WEIGHTS",
    "DRAWBRIDGE_ROUTING",
    "DRAWBRIDGE_TURNS_PER_ACCOUNT",
    "DRAWBRIDGE_MODEL_ALIASES",
    "DRAWBRIDGE_REQUIRE_API_KEY",
    "DRAWBRIDGE_DRAIN_DELAY",
    "DRAWBRIDGE_DRAIN_GRACE",
    "DRAWBRIDGE_RETENTION_DAYS",
    "DRAWBRIDGE_LOG",
    "DRAWBRIDGE_LOG_FORMAT",
    "DRAWBRIDGE_METRICS_ACCOUNTS",
    "DRAWBRIDGE_SNAPSHOTS",
    "DRAWBRIDGE_HIDE_QUOTA",
    "DRAWBRIDGE_MAX_SESSIONS",
    "DRAWBRIDGE_OPERATOR_TOKEN",
    "DRAWBRIDGE_TEST_TIME_SCALE",
    "DRAWBRIDGE_KEY",
];

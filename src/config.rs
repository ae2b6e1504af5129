//! Settings: flags or environment, read once, checked together, handed down in parts.
//!
//! Every setting is text until [`Settings::check`] has looked at all of them; all faults are reported at once. Names that look like ours
//! but are not are warned about, with the nearest real one; those that Kubernetes injects for a Service are ignored.

mod faults;
mod settings;
#[cfg(test)]
mod tests;
mod unknown;

use std::{collections::BTreeMap, fmt, net::SocketAddr, path::PathBuf, time::Duration};

use redis::IntoConnectionInfo as _;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Serialize, Serializer};
use tracing_subscriber::EnvFilter;

use self::faults::{Faults, address, duration, url};
use self::settings::NAMES;
pub use self::{settings::Settings, unknown::unknown_names};
use crate::{
    routing::{Policy, Weights},
    telemetry::LogFormat,
};

/// The checked settings.
#[derive(Clone, Debug, Serialize)]
pub struct Config {
    /// Client listener.
    pub listen: SocketAddr,
    /// Listener for other replicas; none = turns are not forwarded to this one.
    pub internal: Option<Internal>,
    /// Admin listener.
    pub admin_listen: SocketAddr,
    /// Name of this replica.
    pub replica_name: String,
    /// Where the data is.
    #[serde(serialize_with = "as_printed")]
    pub database: Database,
    /// Redis, for hints between replicas.
    pub redis: Option<RedisUrl>,
    /// Whether `serve` migrates.
    pub migrate_on_start: bool,
    /// Embedded cluster and generated master key.
    pub data_dir: PathBuf,
    /// Where the master keys come from.
    pub master_keys: MasterKeys,
    /// The upstream.
    pub upstream: Upstream,
    /// Whether callers on this machine may go without a key while none was ever created.
    pub key_rule: KeyRule,
    /// The end of the process.
    pub drain: Drain,
    /// Age in days at which the request log is deleted.
    pub retention_days: u16,
    /// Logs.
    pub log: Log,
    /// Whether metrics show each account's quota.
    pub metrics_accounts: bool,
    /// What is kept of finished responses.
    pub snapshots: Snapshots,
    /// Whether no client sees anything of the pool's quota, whatever its key's grants say.
    pub hide_quota: bool,
    /// Sessions at once.
    pub max_sessions: usize,
    /// What models are called here beside their own names: alias -> model.
    pub model_aliases: BTreeMap<String, String>,
    /// How accounts are chosen.
    pub routing: Policy,
    /// Opens the operators' HTTP API; none = there is none.
    pub operator_token: Option<OperatorToken>,
    /// Multiplies the times of the protocol between replicas: 1 but in tests.
    pub time_scale: f64,
}

/// How other replicas reach this one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Internal {
    /// The listener.
    pub listen: SocketAddr,
    /// Given where the listener's address is not the one that others use.
    url: Option<String>,
}

impl Internal {
    /// What others are told, once the listener is bound; without a trailing slash.
    #[must_use]
    pub fn endpoint(&self, bound: SocketAddr) -> String {
        self.url
            .clone()
            .unwrap_or_else(|| format!("http://{bound}"))
    }
}

/// The URL of a Redis; may hold a password.
#[derive(Clone)]
pub struct RedisUrl(pub SecretString);

impl RedisUrl {
    fn is_valid(&self) -> bool {
        let url = self.0.expose_secret();
        (url.starts_with("redis://") || url.starts_with("rediss://"))
            && redis::parse_redis_url(url).is_some_and(|url| url.into_connection_info().is_ok())
    }
}

impl fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

impl Serialize for RedisUrl {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        as_printed(self, serializer)
    }
}

/// Whoever has it is an operator.
#[derive(Clone)]
pub struct OperatorToken(pub SecretString);

/// The shortest that is not to be guessed.
const OPERATOR_TOKEN: usize = 16;

impl fmt::Debug for OperatorToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

impl Serialize for OperatorToken {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        as_printed(self, serializer)
    }
}

/// Where the data is.
#[derive(Clone)]
pub enum Database {
    /// A private cluster under the data directory.
    Embedded,
    /// A server somewhere.
    External {
        /// For ordinary work; may be a transaction pooler.
        pooled: SecretString,
        /// For heartbeats and notifications.
        direct: SecretString,
    },
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Embedded => "embedded",
            Self::External { .. } => "external",
        })
    }
}

/// Where the master keys come from.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum MasterKeys {
    /// Given as text.
    Given(#[serde(skip_serializing)] SecretString),
    /// In a file.
    File(PathBuf),
    /// Generated in the data directory when it does not exist; embedded mode only.
    Generated(PathBuf),
}

/// The upstream and how to reach it.
#[derive(Clone, Debug, Serialize)]
pub struct Upstream {
    /// Base of the backend, without a trailing slash.
    pub url: String,
    /// Origin of the token endpoint, without a trailing slash.
    pub auth_url: String,
    /// Further roots.
    pub ca_file: Option<PathBuf>,
    /// How turns travel.
    pub transport: Transport,
    /// How often the usage endpoint is asked about an account; none = never.
    #[serde(serialize_with = "as_printed")]
    pub usage_poll: Option<Duration>,
    /// The sizes of plans.
    pub plan_weights: Weights,
}

/// How turns travel to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// A WebSocket client gets an upstream WebSocket, an HTTP client upstream HTTP.
    Auto,
    /// Always HTTP.
    Http,
    /// Always a WebSocket.
    WebSocket,
}

/// What is kept of finished responses, so that a conversation can be told again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Snapshots {
    /// What the client has not proved to keep itself.
    Auto,
    /// Everything.
    Full,
    /// Nothing.
    Off,
}

/// Whether a request may go without a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum KeyRule {
    /// Only on a loopback listener, from this machine, and while no key was ever created.
    Auto,
    /// Never.
    Always,
}

/// The end of the process.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Drain {
    /// Unready, but still served.
    #[serde(serialize_with = "as_printed")]
    pub delay: Duration,
    /// For running turns, after the listener has closed.
    #[serde(serialize_with = "as_printed")]
    pub grace: Duration,
}

/// Logs.
#[derive(Clone, Debug, Serialize)]
pub struct Log {
    /// Tracing filter.
    pub filter: String,
    /// Text or JSON.
    pub format: LogFormat,
}

/// As it prints: what is secret does not, and times read as in the settings.
fn as_printed<S: Serializer>(value: &impl fmt::Debug, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{value:?}"))
}

impl Settings {
    /// Checks all settings together.
    ///
    /// # Errors
    /// Every fault, each a sentence that names its variable. Values of secrets are not quoted.
    pub fn check(self) -> Result<Config, Vec<String>> {
        let mut faults = Faults::default();
        let database = match (self.database_url, self.database_direct_url) {
            (None, None) => Database::Embedded,
            (None, Some(_)) => {
                faults.add(
                    "DRAWBRIDGE_DATABASE_DIRECT_URL is set but DRAWBRIDGE_DATABASE_URL is not",
                );
                Database::Embedded
            }
            (Some(pooled), direct) => Database::External {
                direct: direct.unwrap_or_else(|| pooled.clone()).0,
                pooled: pooled.0,
            },
        };
        let data_dir = faults.path("DRAWBRIDGE_DATA_DIR", self.data_dir);
        let data_dir = data_dir.or_else(default_data_dir).unwrap_or_else(|| {
            faults.add("DRAWBRIDGE_DATA_DIR is not set and there is no home directory");
            PathBuf::new()
        });
        let keys_file = faults.path("DRAWBRIDGE_MASTER_KEYS_FILE", self.master_keys_file);
        let master_keys = match (self.master_keys, keys_file, &database) {
            (Some(_), Some(path), _) => {
                faults.add(
                    "DRAWBRIDGE_MASTER_KEYS and DRAWBRIDGE_MASTER_KEYS_FILE are both set; keep one",
                );
                MasterKeys::File(path)
            }
            (Some(text), None, _) => MasterKeys::Given(text.0),
            (None, Some(path), _) => MasterKeys::File(path),
            (None, None, Database::Embedded) => MasterKeys::Generated(data_dir.join("master.key")),
            (None, None, Database::External { .. }) => {
                faults.add(
                    "DRAWBRIDGE_MASTER_KEYS is not set; make one with: printf 'k1:%s\\n' \"$(openssl rand -base64 32)\" \
                     (coming from the embedded database, use the content of DATA_DIR/master.key)",
                );
                MasterKeys::File(PathBuf::new())
            }
        };
        let internal = faults.internal(self.internal_listen, self.internal_url);
        let redis = self.redis_url.map(|url| RedisUrl(url.0));
        if redis.as_ref().is_some_and(|url| !url.is_valid()) {
            // Not quoted: it may hold a password.
            faults.add("DRAWBRIDGE_REDIS_URL is not a redis:// or rediss:// URL");
        }
        let operator_token = self.operator_token.map(|token| OperatorToken(token.0));
        let unfit = |token: &OperatorToken| {
            let token = token.0.expose_secret();
            // No header could carry another.
            token.len() < OPERATOR_TOKEN || !token.bytes().all(|byte| byte.is_ascii_graphic())
        };
        if operator_token.as_ref().is_some_and(unfit) {
            faults.add("DRAWBRIDGE_OPERATOR_TOKEN is not 16 or more visible ASCII characters; make one with: openssl rand -hex 32");
        }
        let config = Config {
            listen: faults.parse(
                "DRAWBRIDGE_LISTEN",
                self.listen,
                "127.0.0.1:2455",
                "an address such as 127.0.0.1:2455",
                address,
            ),
            internal,
            admin_listen: faults.parse(
                "DRAWBRIDGE_ADMIN_LISTEN",
                self.admin_listen,
                "127.0.0.1:9464",
                "an address such as 127.0.0.1:9464",
                address,
            ),
            replica_name: self.replica_name.unwrap_or_else(host_name),
            database,
            redis,
            migrate_on_start: faults.parse(
                "DRAWBRIDGE_MIGRATE_ON_START",
                self.migrate_on_start,
                "true",
                "true or false",
                |text| text.parse().ok(),
            ),
            data_dir,
            master_keys,
            upstream: Upstream {
                url: faults.parse(
                    "DRAWBRIDGE_UPSTREAM_URL",
                    self.upstream_url,
                    "https://chatgpt.com/backend-api",
                    "an http(s) URL",
                    url,
                ),
                auth_url: faults.parse(
                    "DRAWBRIDGE_AUTH_URL",
                    self.auth_url,
                    "https://auth.openai.com",
                    "an http(s) URL",
                    url,
                ),
                ca_file: faults.path("DRAWBRIDGE_CA_FILE", self.ca_file),
                transport: faults.parse(
                    "DRAWBRIDGE_UPSTREAM_TRANSPORT",
                    self.upstream_transport,
                    "auto",
                    "auto, http or websocket",
                    |text| match text {
                        "auto" => Some(Transport::Auto),
                        "http" => Some(Transport::Http),
                        "websocket" => Some(Transport::WebSocket),
                        _ => None,
                    },
                ),
                usage_poll: faults.parse(
                    "DRAWBRIDGE_USAGE_POLL",
                    self.usage_poll,
                    "60s",
                    "off, or a time from 1s",
                    |text| match text {
                        "off" => Some(None),
                        time => Some(Some(duration(time).filter(|time| *time >= SECOND)?)),
                    },
                ),
                plan_weights: faults.parse(
                    "DRAWBRIDGE_PLAN_WEIGHTS",
                    self.plan_weights,
                    "",
                    "plans and their sizes relative to plus, such as pro=6.67,free=0.15",
                    |text| text.parse().ok(),
                ),
            },
            key_rule: faults.parse(
                "DRAWBRIDGE_REQUIRE_API_KEY",
                self.require_api_key,
                "auto",
                "auto or always",
                |text| match text {
                    "auto" => Some(KeyRule::Auto),
                    "always" => Some(KeyRule::Always),
                    _ => None,
                },
            ),
            drain: Drain {
                delay: faults.parse(
                    "DRAWBRIDGE_DRAIN_DELAY",
                    self.drain_delay,
                    "5s",
                    "a time such as 5s",
                    duration,
                ),
                grace: faults.parse(
                    "DRAWBRIDGE_DRAIN_GRACE",
                    self.drain_grace,
                    "600s",
                    "a time such as 10m",
                    duration,
                ),
            },
            retention_days: faults.parse(
                "DRAWBRIDGE_RETENTION_DAYS",
                self.retention_days,
                "30",
                "a number of days from 1",
                |text| text.parse().ok().filter(|days| *days > 0),
            ),
            log: Log {
                filter: faults.parse(
                    "DRAWBRIDGE_LOG",
                    self.log,
                    "info",
                    "a filter such as info,drawbridge=debug",
                    |text| EnvFilter::try_new(text).ok().map(|_| text.to_owned()),
                ),
                format: faults.parse(
                    "DRAWBRIDGE_LOG_FORMAT",
                    self.log_format,
                    "text",
                    "text or json",
                    |text| match text {
                        "text" => Some(LogFormat::Text),
                        "json" => Some(LogFormat::Json),
                        _ => None,
                    },
                ),
            },
            metrics_accounts: faults.parse(
                "DRAWBRIDGE_METRICS_ACCOUNTS",
                self.metrics_accounts,
                "false",
                "true or false",
                |text| text.parse().ok(),
            ),
            snapshots: faults.parse(
                "DRAWBRIDGE_SNAPSHOTS",
                self.snapshots,
                "auto",
                "auto, full or off",
                |text| match text {
                    "auto" => Some(Snapshots::Auto),
                    "full" => Some(Snapshots::Full),
                    "off" => Some(Snapshots::Off),
                    _ => None,
                },
            ),
            hide_quota: faults.parse(
                "DRAWBRIDGE_HIDE_QUOTA",
                self.hide_quota,
                "false",
                "true or false",
                |text| text.parse().ok(),
            ),
            max_sessions: faults.parse(
                "DRAWBRIDGE_MAX_SESSIONS",
                self.max_sessions,
                "4096",
                "a number from 1",
                |text| text.parse().ok().filter(|most| *most > 0),
            ),
            model_aliases: faults.parse(
                "DRAWBRIDGE_MODEL_ALIASES",
                self.model_aliases,
                "",
                "names and the models they stand for, such as fast=gpt-5.4-mini",
                aliases,
            ),
            routing: Policy {
                strategy: faults.parse(
                    "DRAWBRIDGE_ROUTING",
                    self.routing,
                    "capacity",
                    "capacity, soonest-reset or round-robin",
                    |text| text.parse().ok(),
                ),
                turns_per_account: faults.parse(
                    "DRAWBRIDGE_TURNS_PER_ACCOUNT",
                    self.turns_per_account,
                    "0",
                    "a number, 0 for no limit",
                    |text| {
                        text.parse()
                            .ok()
                            .map(|most: u32| (most > 0).then_some(most))
                    },
                ),
            },
            operator_token,
            time_scale: faults.parse(
                "DRAWBRIDGE_TEST_TIME_SCALE",
                self.test_time_scale,
                "1",
                "a number from 0.01 to 1",
                |text| text.parse().ok().filter(|by| (0.01..=1.0).contains(by)),
            ),
        };
        faults.none().map(|()| config)
    }
}

/// Reads `fast=gpt-5.4-mini,other=..`.
fn aliases(text: &str) -> Option<BTreeMap<String, String>> {
    let pairs = text
        .split(',')
        .map(str::trim)
        .filter(|pair| !pair.is_empty());
    let alias = |pair: &str| {
        let (alias, model) = pair.split_once('=')?;
        let (alias, model) = (alias.trim(), model.trim());
        let fine = !alias.is_empty() && !model.is_empty() && !model.contains('=');
        fine.then(|| (alias.to_owned(), model.to_owned()))
    };
    pairs.map(alias).collect()
}

const SECOND: Duration = Duration::from_secs(1);

fn default_data_dir() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some("/var/lib/drawbridge".into());
    }
    std::env::home_dir().map(|home| home.join(".drawbridge"))
}

fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

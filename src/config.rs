//! Settings: flags or environment, read once, checked together, handed down in parts.
//!
//! Every setting is text until [`Settings::check`] has looked at all of them; all faults are reported at once. Names that look like ours
//! but are not are warned about, with the nearest real one; those that Kubernetes injects for a Service are ignored.

use std::{collections::BTreeSet, fmt, net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;
use secrecy::SecretString;

use crate::telemetry::LogFormat;

/// The settings as given. Each is a flag and an environment variable.
#[derive(Args, Clone, Debug, Default)]
#[command(next_help_heading = "Settings")]
pub struct Settings {
    /// Address for clients [default: 127.0.0.1:2455]
    #[arg(long, global = true, env = "DRAWBRIDGE_LISTEN", value_name = "ADDR")]
    listen: Option<String>,
    /// Address for /metrics, /livez and /readyz [default: 127.0.0.1:9464]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_ADMIN_LISTEN",
        value_name = "ADDR"
    )]
    admin_listen: Option<String>,
    /// Name of this replica in logs and tables [default: the host name]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_REPLICA_NAME",
        value_name = "NAME"
    )]
    replica_name: Option<String>,
    /// Postgres, possibly through a transaction pooler; unset = an embedded cluster in the data directory
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_DATABASE_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    database_url: Option<SecretText>,
    /// Postgres itself, for heartbeats and notifications [default: the same as above]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_DATABASE_DIRECT_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    database_direct_url: Option<SecretText>,
    /// Whether `serve` applies migrations [default: true]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_MIGRATE_ON_START",
        value_name = "BOOL"
    )]
    migrate_on_start: Option<String>,
    /// Embedded cluster and generated master key [default: ~/.drawbridge, as root /var/lib/drawbridge]
    #[arg(long, global = true, env = "DRAWBRIDGE_DATA_DIR", value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// id:base64(32 bytes), comma separated, the current one first
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_MASTER_KEYS",
        value_name = "KEYS",
        hide_env_values = true
    )]
    master_keys: Option<SecretText>,
    /// A file with the same content
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_MASTER_KEYS_FILE",
        value_name = "FILE"
    )]
    master_keys_file: Option<PathBuf>,
    /// The Codex backend [default: <https://chatgpt.com/backend-api>]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_UPSTREAM_URL",
        value_name = "URL"
    )]
    upstream_url: Option<String>,
    /// The token endpoint's origin [default: <https://auth.openai.com>]
    #[arg(long, global = true, env = "DRAWBRIDGE_AUTH_URL", value_name = "URL")]
    auth_url: Option<String>,
    /// PEM file with further roots for upstream's certificates
    #[arg(long, global = true, env = "DRAWBRIDGE_CA_FILE", value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// auto, http or websocket [default: auto]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_UPSTREAM_TRANSPORT",
        value_name = "WORD"
    )]
    upstream_transport: Option<String>,
    /// auto (loopback may go without until a key exists) or always [default: auto]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_REQUIRE_API_KEY",
        value_name = "WORD"
    )]
    require_api_key: Option<String>,
    /// After SIGTERM: still served, but unready [default: 5s]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_DRAIN_DELAY",
        value_name = "TIME"
    )]
    drain_delay: Option<String>,
    /// Then running turns may end [default: 600s]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_DRAIN_GRACE",
        value_name = "TIME"
    )]
    drain_grace: Option<String>,
    /// Age at which the request log is deleted [default: 30]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_RETENTION_DAYS",
        value_name = "DAYS"
    )]
    retention_days: Option<String>,
    /// Tracing filter [default: info]
    #[arg(long, global = true, env = "DRAWBRIDGE_LOG", value_name = "FILTER")]
    log: Option<String>,
    /// text or json [default: text]
    #[arg(
        long,
        global = true,
        env = "DRAWBRIDGE_LOG_FORMAT",
        value_name = "WORD"
    )]
    log_format: Option<String>,
}

/// Text that does not print.
#[derive(Clone)]
struct SecretText(SecretString);

impl From<&str> for SecretText {
    fn from(text: &str) -> Self {
        Self(SecretString::from(text))
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("..")
    }
}

/// Every name that [`Settings`] reads from the environment.
const NAMES: [&str; 20] = [
    "DRAWBRIDGE_LISTEN",
    "DRAWBRIDGE_ADMIN_LISTEN",
    "DRAWBRIDGE_REPLICA_NAME",
    "DRAWBRIDGE_DATABASE_URL",
    "DRAWBRIDGE_DATABASE_DIRECT_URL",
    "DRAWBRIDGE_MIGRATE_ON_START",
    "DRAWBRIDGE_DATA_DIR",
    "DRAWBRIDGE_MASTER_KEYS",
    "DRAWBRIDGE_MASTER_KEYS_FILE",
    "DRAWBRIDGE_UPSTREAM_URL",
    "DRAWBRIDGE_AUTH_URL",
    "DRAWBRIDGE_CA_FILE",
    "DRAWBRIDGE_UPSTREAM_TRANSPORT",
    "DRAWBRIDGE_REQUIRE_API_KEY",
    "DRAWBRIDGE_DRAIN_DELAY",
    "DRAWBRIDGE_DRAIN_GRACE",
    "DRAWBRIDGE_RETENTION_DAYS",
    "DRAWBRIDGE_LOG",
    "DRAWBRIDGE_LOG_FORMAT",
    "DRAWBRIDGE_KEY",
];

/// The checked settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Client listener.
    pub listen: SocketAddr,
    /// Admin listener.
    pub admin_listen: SocketAddr,
    /// Name of this replica.
    pub replica_name: String,
    /// Where the data is.
    pub database: Database,
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
#[derive(Clone, Debug)]
pub enum MasterKeys {
    /// Given as text.
    Given(SecretString),
    /// In a file.
    File(PathBuf),
    /// Generated in the data directory when it does not exist; embedded mode only.
    Generated(PathBuf),
}

/// The upstream and how to reach it.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Base of the backend, without a trailing slash.
    pub url: String,
    /// Origin of the token endpoint, without a trailing slash.
    pub auth_url: String,
    /// Further roots.
    pub ca_file: Option<PathBuf>,
    /// How turns travel.
    pub transport: Transport,
}

/// How turns travel to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A WebSocket client gets an upstream WebSocket, an HTTP client upstream HTTP.
    Auto,
    /// Always HTTP.
    Http,
    /// Always a WebSocket.
    WebSocket,
}

/// Whether a request may go without a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyRule {
    /// Only on a loopback listener, from this machine, and while no key was ever created.
    Auto,
    /// Never.
    Always,
}

/// The end of the process.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// Unready, but still served.
    pub delay: Duration,
    /// For running turns, after the listener has closed.
    pub grace: Duration,
}

/// Logs.
#[derive(Clone, Debug)]
pub struct Log {
    /// Tracing filter.
    pub filter: String,
    /// Text or JSON.
    pub format: LogFormat,
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
        let data_dir = self.data_dir.or_else(default_data_dir).unwrap_or_else(|| {
            faults.add("DRAWBRIDGE_DATA_DIR is not set and there is no home directory");
            PathBuf::new()
        });
        let master_keys = match (self.master_keys, self.master_keys_file, &database) {
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
        let config = Config {
            listen: faults.parse(
                "DRAWBRIDGE_LISTEN",
                self.listen,
                "127.0.0.1:2455",
                "an address such as 127.0.0.1:2455",
                address,
            ),
            admin_listen: faults.parse(
                "DRAWBRIDGE_ADMIN_LISTEN",
                self.admin_listen,
                "127.0.0.1:9464",
                "an address such as 127.0.0.1:9464",
                address,
            ),
            replica_name: self.replica_name.unwrap_or_else(host_name),
            database,
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
                ca_file: self.ca_file,
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
                filter: self.log.unwrap_or_else(|| "info".into()),
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
        };
        faults.none().map(|()| config)
    }
}

/// Collects what is wrong.
#[derive(Default)]
struct Faults(Vec<String>);

impl Faults {
    fn add(&mut self, fault: &str) {
        self.0.push(fault.to_owned());
    }

    /// The value, or a fault and the default.
    fn parse<T>(
        &mut self,
        name: &str,
        given: Option<String>,
        default: &str,
        wanted: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> T {
        let value = given.and_then(|text| {
            let value = read(text.trim());
            if value.is_none() {
                self.0.push(format!("{name}={text} is not {wanted}"));
            }
            value
        });
        value.unwrap_or_else(|| read(default).expect("defaults are valid"))
    }

    fn none(self) -> Result<(), Vec<String>> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(self.0)
        }
    }
}

fn address(text: &str) -> Option<SocketAddr> {
    text.parse().ok()
}

fn url(text: &str) -> Option<String> {
    let parsed: http::Uri = text.parse().ok()?;
    let known = matches!(parsed.scheme_str(), Some("http" | "https"));
    (known && parsed.authority().is_some() && parsed.query().is_none())
        .then(|| text.trim_end_matches('/').to_owned())
}

fn duration(text: &str) -> Option<Duration> {
    text.parse::<jiff::SignedDuration>().ok()?.try_into().ok()
}

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

/// Sentences about names in `environment` that look like settings but are none, each naming the nearest real one.
#[must_use]
pub fn unknown_names(environment: impl Iterator<Item = (String, String)>) -> Vec<String> {
    let names: BTreeSet<String> = environment
        .filter(|(name, value)| {
            name.starts_with("DRAWBRIDGE_")
                && !NAMES.contains(&name.as_str())
                && !is_service_link(name, value)
        })
        .map(|(name, _)| name)
        .collect();
    let nearest = |name: &str| {
        NAMES
            .into_iter()
            .min_by_key(|known| distance(name, known))
            .unwrap_or_default()
    };
    names
        .iter()
        .map(|name| format!("{name} is not a setting; did you mean {}?", nearest(name)))
        .collect()
}

/// Whether Kubernetes injects such a name for a Service called `drawbridge` or `drawbridge-..`.
fn is_service_link(name: &str, value: &str) -> bool {
    let port = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let tcp = |suffix: &str| {
        name.rsplit_once("_PORT_")
            .is_some_and(|(_, rest)| rest.strip_suffix(suffix).is_some_and(port))
    };
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || (name.ends_with("_PORT") && value.starts_with("tcp://"))
        || ["_TCP", "_TCP_ADDR", "_TCP_PORT", "_TCP_PROTO"]
            .into_iter()
            .any(tcp)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Probe {
        #[command(flatten)]
        settings: Settings,
    }

    #[test]
    fn the_list_of_names_is_complete() {
        let command = Probe::command();
        let mut names: Vec<_> = command
            .get_arguments()
            .filter_map(|arg| arg.get_env())
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        // Not a setting of the service: the variable that README's client configuration reads the key from.
        names.push("DRAWBRIDGE_KEY".into());
        assert_eq!(names, NAMES);
    }

    #[test]
    fn nothing_set_is_a_working_configuration() {
        let config = Settings::default().check().unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.1:2455");
        assert!(matches!(config.database, Database::Embedded));
        assert!(matches!(config.master_keys, MasterKeys::Generated(_)));
    }

    #[test]
    fn all_faults_are_reported_at_once_and_no_secret_is_quoted() {
        let faults = Settings {
            listen: Some("nowhere".into()),
            drain_grace: Some("soon".into()),
            database_url: Some("postgres://u:hunter2@h/db".into()),
            log_format: Some("xml".into()),
            ..Settings::default()
        }
        .check()
        .unwrap_err();
        assert_eq!(faults.len(), 4, "{faults:?}");
        assert!(
            faults
                .iter()
                .any(|fault| fault.contains("openssl rand -base64 32"))
        );
        assert!(!faults.concat().contains("hunter2"));
    }

    #[test]
    fn a_misspelt_name_is_warned_about_and_service_links_are_not() {
        let environment = [
            ("DRAWBRIDGE_LISTN", "x"),
            ("DRAWBRIDGE_SERVICE_HOST", "10.0.0.1"),
            ("DRAWBRIDGE_SERVICE_PORT_HTTP", "2455"),
            ("DRAWBRIDGE_PORT", "tcp://10.0.0.1:2455"),
            ("DRAWBRIDGE_PORT_2455_TCP_ADDR", "10.0.0.1"),
            ("DRAWBRIDGE_LOG", "info"),
        ];
        let warnings = unknown_names(
            environment
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        assert_eq!(
            warnings,
            ["DRAWBRIDGE_LISTN is not a setting; did you mean DRAWBRIDGE_LISTEN?"]
        );
    }
}

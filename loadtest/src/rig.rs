//! What the bench and the demo bring up: the fake upstream in its own process, and Drawbridge before it on an embedded database.

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};

use crate::{
    process::{Daemon, free_port},
    upstream::Fault,
};

/// How long a server may take to answer for the first time: an embedded cluster has to be made.
const START: Duration = Duration::from_secs(90);

/// An HTTP client for small requests.
///
/// # Errors
/// If it cannot be made.
pub fn client() -> anyhow::Result<reqwest::Client> {
    // Fails only if one is installed already, which is as good.
    drop(rustls::crypto::ring::default_provider().install_default());
    Ok(reqwest::Client::builder()
        .timeout(Duration::from_secs(20))
        .build()?)
}

/// The fake upstream in a process of its own.
pub struct Fake {
    _daemon: Daemon,
    client: reqwest::Client,
    origin: String,
}

impl Fake {
    /// Starts it as a child of this program, with further options of `loadtest upstream`.
    ///
    /// # Errors
    /// If it does not come up.
    pub async fn start(dir: &Path, options: &[&str]) -> anyhow::Result<Self> {
        let address = format!("127.0.0.1:{}", free_port()?);
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["upstream", "--lean", "--listen", &address])
            .args(options);
        let mut daemon = Daemon::start(command, dir.join("fake.log"))?;
        let client = client()?;
        let origin = format!("http://{address}");
        answers(&client, &format!("{origin}/__fake/ready"), &mut daemon)
            .await
            .context("the fake upstream")?;
        Ok(Self {
            _daemon: daemon,
            client,
            origin,
        })
    }

    /// Scheme and address; also what `DRAWBRIDGE_AUTH_URL` takes.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The `auth.json` of an account, made on first use.
    ///
    /// # Errors
    /// If the fake does not answer.
    pub async fn account(&self, name: &str) -> anyhow::Result<Value> {
        let answer = self
            .client
            .post(format!("{}/__fake/accounts", self.origin))
            .json(&json!({ "name": name }))
            .send()
            .await?;
        Ok(answer.error_for_status()?.json().await?)
    }

    /// What each account has paid for, by name.
    ///
    /// # Errors
    /// If the fake does not answer.
    pub async fn paid(&self) -> anyhow::Result<Value> {
        let answer = self
            .client
            .get(format!("{}/__fake/accounts", self.origin))
            .send()
            .await?;
        Ok(answer.error_for_status()?.json().await?)
    }

    /// Lets an account's access token expire.
    ///
    /// # Errors
    /// If the fake does not answer.
    pub async fn expire(&self, name: &str) -> anyhow::Result<()> {
        self.client
            .post(format!("{}/__fake/accounts/{name}/expire", self.origin))
            .send()
            .await?
            .error_for_status()?;
        Ok(())
    }

    /// Queues a fault.
    ///
    /// # Errors
    /// If the fake does not answer.
    pub async fn fault(&self, fault: &Fault) -> anyhow::Result<()> {
        self.client
            .post(format!("{}/__fake/faults", self.origin))
            .json(fault)
            .send()
            .await?
            .error_for_status()?;
        Ok(())
    }

    /// Forgets the faults that are left.
    ///
    /// # Errors
    /// If the fake does not answer.
    pub async fn no_faults(&self) -> anyhow::Result<()> {
        self.client
            .delete(format!("{}/__fake/faults", self.origin))
            .send()
            .await?
            .error_for_status()?;
        Ok(())
    }
}

/// Counts by name.
pub type Counts = BTreeMap<String, u64>;

/// What came on top between two counts, for each of `units`: those of some weight.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "counts of one run")]
pub fn per_unit(before: &Counts, after: &Counts, units: u64) -> BTreeMap<String, f64> {
    let share = |(name, count): (&String, &u64)| {
        let more = count - before.get(name).copied().unwrap_or_default();
        let share = more as f64 / units.max(1) as f64;
        (share >= 0.01).then(|| (name.clone(), (share * 100.0).round() / 100.0))
    };
    after.iter().filter_map(share).collect()
}

/// Drawbridge, serving, with its own embedded database.
pub struct Drawbridge {
    daemon: Daemon,
    binary: PathBuf,
    data: PathBuf,
    settings: Vec<(&'static str, String)>,
    listen: String,
    admin: String,
}

impl Drawbridge {
    /// Starts it with its data below `dir`, which must be enterable for every user.
    ///
    /// # Errors
    /// If it does not get ready.
    pub async fn start(binary: &Path, dir: &Path, fake: &Fake) -> anyhow::Result<Self> {
        Self::replica(binary, dir, fake, "drawbridge").await
    }

    /// The same as one of several replicas: those of one `dir` share the database, and send turns to each other.
    ///
    /// # Errors
    /// If it does not get ready.
    pub async fn replica(
        binary: &Path,
        dir: &Path,
        fake: &Fake,
        name: &str,
    ) -> anyhow::Result<Self> {
        Self::with(binary, dir, fake, name, &[]).await
    }

    /// The same with settings of its own.
    ///
    /// # Errors
    /// If it does not get ready.
    pub async fn with(
        binary: &Path,
        dir: &Path,
        fake: &Fake,
        name: &str,
        settings: &[(&'static str, &str)],
    ) -> anyhow::Result<Self> {
        let own = settings;
        let binary = binary
            .canonicalize()
            .with_context(|| format!("{} is not there", binary.display()))?;
        let listen = format!("127.0.0.1:{}", free_port()?);
        let admin = format!("127.0.0.1:{}", free_port()?);
        let internal = format!("127.0.0.1:{}", free_port()?);
        let data = dir.join("data");
        let settings = [
            ("DRAWBRIDGE_REPLICA_NAME", name.to_owned()),
            ("DRAWBRIDGE_LISTEN", listen.clone()),
            ("DRAWBRIDGE_INTERNAL_LISTEN", internal),
            ("DRAWBRIDGE_ADMIN_LISTEN", admin.clone()),
            ("DRAWBRIDGE_DATA_DIR", data.display().to_string()),
            (
                "DRAWBRIDGE_UPSTREAM_URL",
                format!("{}/backend-api", fake.origin()),
            ),
            ("DRAWBRIDGE_AUTH_URL", fake.origin().to_owned()),
            ("DRAWBRIDGE_LOG", "warn".to_owned()),
            ("DRAWBRIDGE_DRAIN_DELAY", "0s".to_owned()),
            ("DRAWBRIDGE_DRAIN_GRACE", "3s".to_owned()),
        ];
        let own = own.iter().map(|(name, value)| (*name, (*value).to_owned()));
        let settings: Vec<_> = settings.into_iter().chain(own).collect();
        let mut command = Command::new(&binary);
        command
            .arg("serve")
            .envs(settings.iter().map(|(name, value)| (name, value)));
        let mut daemon = Daemon::start(command, dir.join(format!("{name}.log")))?;
        answers(&client()?, &format!("http://{admin}/readyz"), &mut daemon)
            .await
            .context("drawbridge serve")?;
        Ok(Self {
            daemon,
            binary,
            data,
            settings,
            listen,
            admin,
        })
    }

    /// Its own process, without the database.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Where clients go: scheme and address.
    #[must_use]
    pub fn origin(&self) -> String {
        format!("http://{}", self.listen)
    }

    /// Where `/metrics` is: scheme and address.
    #[must_use]
    pub fn admin(&self) -> String {
        format!("http://{}", self.admin)
    }

    /// How often each statement was sent to the database so far, by its name.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn statements(&self) -> anyhow::Result<Counts> {
        let page = client()?.get(format!("{}/metrics", self.admin())).send();
        let page = page.await?.text().await?;
        let counts = page.lines().filter_map(|line| {
            let line = line.strip_prefix("drawbridge_db_statements_total{statement=\"")?;
            let (name, count) = line.split_once("\"} ")?;
            Some((name.to_owned(), count.parse().ok()?))
        });
        Ok(counts.collect())
    }

    /// Conversations that it keeps, as it tells the metrics.
    ///
    /// # Errors
    /// If it does not answer.
    pub async fn sessions(&self) -> anyhow::Result<u64> {
        let page = client()?.get(format!("{}/metrics", self.admin())).send();
        let page = page.await?.text().await?;
        let mut lines = page.lines();
        let sessions = lines.find_map(|line| line.strip_prefix("drawbridge_sessions "));
        Ok(sessions.context("no gauge of sessions")?.parse()?)
    }

    /// The settings that a command beside it needs.
    #[must_use]
    pub fn settings(&self) -> &[(&'static str, String)] {
        &self.settings
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// If not.
    pub fn alive(&mut self) -> anyhow::Result<()> {
        self.daemon.alive().context("drawbridge serve")
    }

    /// How conversations were continued, by the request log: outcomes and how often, the most frequent first.
    ///
    /// # Errors
    /// If the embedded database does not answer.
    pub async fn outcomes(&self) -> anyhow::Result<Vec<(String, i64)>> {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(self.data.canonicalize()?.join("postgres"))
            .user("drawbridge")
            .dbname("drawbridge");
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        // Ends with the client.
        tokio::spawn(connection);
        let query =
            "select bridge_outcome, count(*) from request_log where bridge_outcome is not null
            group by 1 order by 2 desc, 1";
        let rows = client.query(query, &[]).await?;
        let outcomes = rows
            .iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
        outcomes.collect()
    }

    /// Runs a command beside the service; yields its output.
    ///
    /// # Errors
    /// If the command fails.
    pub async fn cli(&self, args: &[&str], stdin: Option<String>) -> anyhow::Result<String> {
        let mut command = Command::new(&self.binary);
        command
            .args(args)
            .envs(self.settings.iter().map(|(name, value)| (name, value)));
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let what = args.join(" ");
        let ran = tokio::task::spawn_blocking(move || {
            let mut child = command.spawn()?;
            if let Some(mut pipe) = child.stdin.take() {
                pipe.write_all(stdin.unwrap_or_default().as_bytes())?;
            }
            child.wait_with_output()
        });
        let output = ran.await??;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "drawbridge {what}: {}",
            said.trim()
        );
        Ok(String::from_utf8(output.stdout)?)
    }

    /// Imports accounts of the fake.
    ///
    /// # Errors
    /// If the command fails.
    pub async fn import(&self, fake: &Fake, names: &[&str]) -> anyhow::Result<()> {
        for name in names {
            let auth = fake.account(name).await?;
            self.cli(
                &["accounts", "import", "--label", name, "-"],
                Some(auth.to_string()),
            )
            .await?;
        }
        Ok(())
    }

    /// Creates a client key.
    ///
    /// # Errors
    /// If the command fails.
    pub async fn key(&self, name: &str) -> anyhow::Result<String> {
        let said = self
            .cli(&["keys", "create", "--name", name, "--quiet"], None)
            .await?;
        Ok(said.trim().to_owned())
    }
}

/// Waits until a server answers well.
///
/// # Errors
/// If it ends, or takes too long.
pub async fn answers(
    client: &reqwest::Client,
    url: &str,
    daemon: &mut Daemon,
) -> anyhow::Result<()> {
    let deadline = Instant::now() + START;
    while Instant::now() < deadline {
        daemon.alive()?;
        if client
            .get(url)
            .send()
            .await
            .is_ok_and(|answer| answer.status().is_success())
        {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    bail!("{url} does not answer")
}

//! The real program: its commands, `serve` as a process of its own, and the data directory that survives them.

use std::{
    fs::Permissions,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use loadtest::upstream::Upstream;
use reqwest::Response;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    process::{Child, Command},
    sync::watch,
    time::timeout,
};
use tokio_postgres::{Client, NoTls};

use super::{codex_socket::CodexSocket, house::codex_body, pg::NOBODY};

/// For whatever a process is waited for.
const PATIENCE: Duration = Duration::from_secs(60);
/// The Codex route.
const CODEX: &str = "/backend-api/codex/responses";

/// A data directory, the upstream beside it, and how the program is run on both.
pub(crate) struct Home {
    pub(crate) upstream: Upstream,
    directory: TempDir,
    /// What to run, and as whom: the program itself, or `setpriv .. program`.
    program: Vec<String>,
    /// Further settings.
    environment: Vec<(String, String)>,
}

impl Home {
    /// One for whoever runs the tests.
    pub(crate) async fn new() -> Self {
        // reqwest asks for one, even where no TLS is spoken; only the first call counts.
        drop(rustls::crypto::ring::default_provider().install_default());
        let directory = tempfile::Builder::new()
            .prefix("process-")
            .permissions(Permissions::from_mode(0o755))
            .tempdir()
            .unwrap();
        Self {
            upstream: Upstream::start(loadtest::upstream::Config::default()).await,
            directory,
            program: vec![env!("CARGO_BIN_EXE_drawbridge").to_owned()],
            environment: Vec::new(),
        }
    }

    /// One for an ordinary user; only root can make it.
    pub(crate) async fn of_nobody() -> Self {
        let mut home = Self::new().await;
        let program = home.path().join("drawbridge");
        std::fs::copy(&home.program[0], &program).unwrap();
        chown(home.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        home.program = vec![
            "setpriv".into(),
            format!("--reuid={NOBODY}"),
            format!("--regid={NOBODY}"),
            "--clear-groups".into(),
            "--".into(),
            program.display().to_string(),
        ];
        home
    }

    /// With a further setting.
    pub(crate) fn set(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// The data directory.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The program with nothing in its environment but the settings.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program[0]);
        command
            .args(&self.program[1..])
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("DRAWBRIDGE_DATA_DIR", self.path())
            .env("DRAWBRIDGE_LISTEN", "127.0.0.1:0")
            .env("DRAWBRIDGE_ADMIN_LISTEN", "127.0.0.1:0")
            .env("DRAWBRIDGE_UPSTREAM_URL", self.upstream.url())
            .env("DRAWBRIDGE_AUTH_URL", self.upstream.auth_url())
            // Who tests the end sets it otherwise; nobody else waits for it.
            .env("DRAWBRIDGE_DRAIN_DELAY", "0s")
            .envs(self.environment.iter().cloned())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    /// Runs a command to its end.
    pub(crate) async fn run(&self, arguments: &[&str]) -> Said {
        Said::of(self.command(arguments), "").await
    }

    /// Runs a command that must succeed; yields what it printed.
    pub(crate) async fn ok(&self, arguments: &[&str]) -> String {
        self.run(arguments).await.ok()
    }

    /// Runs a command that must succeed and print JSON.
    pub(crate) async fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[arguments, &["--json"]].concat()).await).unwrap()
    }

    /// Imports an account, by standard input.
    pub(crate) async fn import(&self, name: &str) {
        let login = self.upstream.account(name).auth_json();
        let command = self.command(&["accounts", "import", "-", "--label", name]);
        Said::of(command, &login).await.ok();
    }

    /// Creates a key.
    pub(crate) async fn key(&self, name: &str) -> String {
        let printed = self
            .ok(&["keys", "create", "--name", name, "--quiet"])
            .await;
        printed.trim_end().to_owned()
    }

    /// Starts the service; returns when it is ready.
    pub(crate) async fn serve(&self) -> Service {
        Service::start(self.command(&["serve"])).await
    }

    /// A connection to the embedded database, which must run. It does not count as one of its users.
    pub(crate) async fn connect(&self) -> Client {
        let mut config = tokio_postgres::Config::new();
        config
            .host_path(self.path().canonicalize().unwrap().join("postgres"))
            .user("drawbridge")
            .dbname("drawbridge");
        let (client, connection) = config.connect(NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }

    /// The ledger, oldest turn first, as JSON rows.
    pub(crate) async fn turns(&self) -> Vec<Value> {
        let rows = self
            .connect()
            .await
            .query("select to_jsonb(t) from turns t order by turn_id", &[])
            .await
            .unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// The embedded server, if it has not been stopped.
    pub(crate) fn postmaster(&self) -> Option<Pid> {
        let text = std::fs::read_to_string(self.path().join("postgres/postmaster.pid")).ok()?;
        let pid = Pid::from_raw(text.lines().next()?.parse().ok()?)?;
        working_directory(pid)
            .is_some_and(|cwd| cwd.starts_with(self.path().canonicalize().unwrap()))
            .then_some(pid)
    }
}

/// Ends a server that a killed service left behind.
impl Drop for Home {
    fn drop(&mut self) {
        let Some(server) = self.postmaster() else {
            return;
        };
        // It may have gone just now.
        let _ = kill_process(server, Signal::QUIT);
        while self.postmaster().is_some() {
            std::thread::yield_now();
        }
    }
}

fn working_directory(pid: Pid) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())).ok()
}

/// What a command said.
pub(crate) struct Said {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    async fn of(mut command: Command, input: &str) -> Self {
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        // A command that reads nothing closes its end.
        drop(
            child
                .stdin
                .take()
                .unwrap()
                .write_all(input.as_bytes())
                .await,
        );
        let output = timeout(PATIENCE, child.wait_with_output()).await;
        let output = output.expect("the command ends").unwrap();
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// What it printed, if it succeeded.
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.err);
        self.out
    }
}

/// A running `serve`, killed when dropped.
pub(crate) struct Service {
    child: Child,
    pid: Pid,
    log: watch::Receiver<String>,
    pub(crate) address: String,
    pub(crate) admin: String,
    pub(crate) http: reqwest::Client,
}

impl Service {
    /// Runs `serve`; returns when it is ready.
    pub(crate) async fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (written, log) = watch::channel(String::new());
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                written.send_modify(|log| {
                    log.push_str(&line);
                    log.push('\n');
                });
            }
        });
        let pid = Pid::from_raw(child.id().unwrap().cast_signed()).unwrap();
        let mut service = Self {
            child,
            pid,
            log,
            address: String::new(),
            admin: String::new(),
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
        };
        let ready = service.logged(" ready address=").await;
        let value = |name: &str| {
            let (_, rest) = ready.split_once(name).unwrap();
            rest.split_whitespace().next().unwrap().to_owned()
        };
        service.address = value(" address=");
        service.admin = value(" admin=");
        let readiness = service.get("/readyz").await;
        assert_eq!(readiness.status(), 200);
        service
    }

    /// Everything logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.borrow().clone()
    }

    /// Waits for a line with this text.
    pub(crate) async fn logged(&mut self, text: &str) -> String {
        let has = |log: &String| log.lines().any(|line| line.contains(text));
        let found = match timeout(PATIENCE, self.log.wait_for(has)).await {
            Ok(Ok(log)) => log
                .lines()
                .find(|line| line.contains(text))
                .map(str::to_owned),
            _ => None,
        };
        found.unwrap_or_else(|| panic!("`{text}` was never logged:\n{}", self.log()))
    }

    /// GETs a path of the admin listener.
    pub(crate) async fn watch(&self, path: &str) -> Response {
        let url = format!("http://{}{path}", self.admin);
        self.http.get(url).send().await.unwrap()
    }

    /// GETs a path without a key.
    pub(crate) async fn get(&self, path: &str) -> Response {
        let url = format!("http://{}{path}", self.address);
        self.http.get(url).send().await.unwrap()
    }

    /// A turn as the Codex CLI asks for it over HTTP; an error if the service dies before its answer begins.
    pub(crate) async fn try_turn(
        &self,
        key: &str,
        turn: &str,
        text: &str,
    ) -> reqwest::Result<Response> {
        let metadata = json!({ "turn_id": turn, "thread_id": turn, "request_kind": "turn" });
        self.http
            .post(format!("http://{}{CODEX}", self.address))
            .bearer_auth(key)
            .header("x-codex-turn-metadata", metadata.to_string())
            .json(&codex_body(text))
            .send()
            .await
    }

    /// A turn of a service that lives.
    pub(crate) async fn turn(&self, key: &str, turn: &str, text: &str) -> Response {
        let answer = self.try_turn(key, turn, text).await;
        answer.unwrap_or_else(|error| panic!("{turn}: {error:?}\n{}", self.log()))
    }

    /// A socket as the Codex CLI opens it.
    pub(crate) async fn socket(&self, key: &str) -> CodexSocket {
        CodexSocket::connect(&self.address, CODEX, key)
            .await
            .unwrap()
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).unwrap();
    }

    /// Waits for the end of the process.
    pub(crate) async fn ended(&mut self) -> ExitStatus {
        let ended = timeout(PATIENCE, self.child.wait()).await;
        ended
            .unwrap_or_else(|_| panic!("it does not end:\n{}", self.log()))
            .unwrap()
    }

    /// `kill -9`, and the process is gone.
    pub(crate) async fn kill(mut self) {
        self.signal(Signal::KILL);
        self.ended().await;
    }

    /// SIGTERM; yields the exit code and the whole log.
    pub(crate) async fn stop(mut self) -> (Option<i32>, String) {
        self.signal(Signal::TERM);
        let status = self.ended().await;
        // The channel closes with the last line.
        let whole = async { while self.log.changed().await.is_ok() {} };
        timeout(PATIENCE, whole).await.expect("its log ends");
        (status.code(), self.log())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            drop(self.child.start_kill());
            while matches!(self.child.try_wait(), Ok(None)) {
                std::thread::yield_now();
            }
        }
    }
}

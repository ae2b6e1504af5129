//! The real Codex CLI, in a home of its own, talking to the house.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

/// How the CLI talks to the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    Sse,
    WebSocket,
}

/// Both, for tests that must hold on either.
pub(crate) const WIRES: [Wire; 2] = [Wire::Sse, Wire::WebSocket];

/// A CLI with its own home and work directory.
pub(crate) struct Codex {
    home: TempDir,
    key: String,
}

/// What one run of the CLI said.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) success: bool,
    /// The lines of `--json`.
    pub(crate) lines: Vec<Value>,
    #[expect(dead_code, reason = "shown when a test fails")]
    pub(crate) stderr: String,
}

impl Codex {
    /// A CLI that is configured as README says.
    pub(crate) fn new(base_url: &str, key: &str, wire: Wire) -> Self {
        let home = TempDir::new().unwrap();
        let websockets = wire == Wire::WebSocket;
        let config = format!(
            r#"
model = "gpt-5.5"
model_provider = "drawbridge"
check_for_update_on_startup = false
[model_providers.drawbridge]
name = "drawbridge"
base_url = "{base_url}"
wire_api = "responses"
env_key = "DRAWBRIDGE_KEY"
supports_websockets = {websockets}
[analytics]
enabled = false
[otel]
exporter = "none"
metrics_exporter = "none"
trace_exporter = "none"
[features]
plugins = false
apps = false
"#
        );
        std::fs::write(home.path().join("config.toml"), config).unwrap();
        std::fs::create_dir(home.path().join("work")).unwrap();
        Self {
            home,
            key: key.to_owned(),
        }
    }

    /// A CLI with a ChatGPT login of its own, which asks the service whatever it would ask ChatGPT.
    pub(crate) fn with_login(house: &str, auth_json: &str) -> Self {
        let codex = Self::new(&format!("{house}/backend-api/codex"), "", Wire::Sse);
        let path = codex.home.path().join("config.toml");
        let config = std::fs::read_to_string(&path).unwrap();
        let config = config.replace(
            r#"env_key = "DRAWBRIDGE_KEY""#,
            "requires_openai_auth = true",
        );
        let config = format!("chatgpt_base_url = \"{house}/backend-api/\"\n{config}");
        std::fs::write(path, config).unwrap();
        std::fs::write(codex.home.path().join("auth.json"), auth_json).unwrap();
        codex
    }

    /// `codex exec PROMPT`.
    pub(crate) async fn exec(&self, prompt: &str) -> Run {
        let work = self.home.path().join("work");
        self.run(&[
            "exec",
            "--json",
            "--skip-git-repo-check",
            BYPASS,
            "-C",
            work.to_str().unwrap(),
            prompt,
        ])
        .await
    }

    /// `codex exec resume --last PROMPT`.
    pub(crate) async fn resume(&self, prompt: &str) -> Run {
        self.run(&[
            "exec",
            "resume",
            "--last",
            "--json",
            "--skip-git-repo-check",
            BYPASS,
            prompt,
        ])
        .await
    }

    /// Several turns in one process, by the app server's protocol.
    pub(crate) async fn app_server(&self) -> AppServer {
        let mut child = self
            .command(&["app-server"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut server = AppServer {
            _child: child,
            input,
            lines: BufReader::new(output).lines(),
            next_id: 0,
            errors: Vec::new(),
        };
        server
            .call(
                "initialize",
                json!({ "clientInfo": { "name": "test", "version": "1" } }),
            )
            .await;
        server.notify("initialized", json!({})).await;
        server
    }

    async fn run(&self, arguments: &[&str]) -> Run {
        let output = timeout(
            Duration::from_secs(90),
            self.command(arguments).stdin(Stdio::null()).output(),
        )
        .await;
        let output = output.expect("the CLI ends within 90 s").unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        Run {
            success: output.status.success(),
            lines: text
                .lines()
                .filter_map(|line| serde_json::from_str(line).ok())
                .collect(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program());
        let home = self.home.path();
        command
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", home)
            .env("CODEX_HOME", home)
            .env("TMPDIR", home)
            .env("LANG", "C.UTF-8")
            .env("DRAWBRIDGE_KEY", &self.key)
            .current_dir(home.join("work"))
            .kill_on_drop(true);
        command
    }
}

const BYPASS: &str = "--dangerously-bypass-approvals-and-sandbox";

impl Run {
    /// What the agent said, last.
    pub(crate) fn answer(&self) -> String {
        let mut messages = self.lines.iter().rev().filter(|line| {
            line["type"] == "item.completed" && line["item"]["type"] == "agent_message"
        });
        messages
            .next()
            .and_then(|line| line["item"]["text"].as_str())
            .unwrap_or_default()
            .to_owned()
    }

    /// The errors that the user saw, reconnects included.
    pub(crate) fn errors(&self) -> Vec<String> {
        let failed = self
            .lines
            .iter()
            .filter(|line| line["type"] == "error" || line["type"] == "turn.failed");
        failed
            .map(|line| {
                line["message"]
                    .as_str()
                    .or_else(|| line["error"]["message"].as_str())
                    .unwrap_or_default()
                    .to_owned()
            })
            .collect()
    }

    /// The answer, or everything that was said if there was none.
    pub(crate) fn expect_answer(&self) -> String {
        assert!(self.success, "the CLI failed: {self:#?}");
        self.answer()
    }
}

/// A running `codex app-server`.
pub(crate) struct AppServer {
    _child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
    next_id: u64,
    /// What its user was told that went wrong, reconnects included.
    pub(crate) errors: Vec<Value>,
}

impl AppServer {
    /// A call and its result.
    pub(crate) async fn call(&mut self, method: &str, params: Value) -> Value {
        self.next_id += 1;
        let id = self.next_id;
        self.write(&json!({ "id": id, "method": method, "params": params }))
            .await;
        loop {
            let message = self.read().await;
            if message["id"] == id {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].clone();
            }
        }
    }

    /// A thread to talk in.
    pub(crate) async fn thread(&mut self, work: &Path) -> String {
        let params = json!({ "model": "gpt-5.5", "approvalPolicy": "never", "sandbox": "danger-full-access", "cwd": work });
        let result = self.call("thread/start", params).await;
        result["thread"]["id"]
            .as_str()
            .unwrap_or_else(|| panic!("{result}"))
            .to_owned()
    }

    /// A turn to its end; yields what the agent said.
    pub(crate) async fn turn(&mut self, thread: &str, text: &str) -> String {
        self.next_id += 1;
        let params = json!({ "threadId": thread, "input": [{ "type": "text", "text": text }] });
        self.write(&json!({ "id": self.next_id, "method": "turn/start", "params": params }))
            .await;
        let mut said = String::new();
        loop {
            let message = self.read().await;
            match message["method"].as_str() {
                Some("item/completed") if message["params"]["item"]["type"] == "agentMessage" => {
                    said = message["params"]["item"]["text"]
                        .as_str()
                        .unwrap_or_default()
                        .to_owned();
                }
                Some("turn/completed") => {
                    assert_eq!(
                        message["params"]["turn"]["status"], "completed",
                        "{message}"
                    );
                    return said;
                }
                _ => {}
            }
        }
    }

    async fn notify(&mut self, method: &str, params: Value) {
        self.write(&json!({ "method": method, "params": params }))
            .await;
    }

    async fn write(&mut self, message: &Value) {
        self.input
            .write_all(format!("{message}\n").as_bytes())
            .await
            .unwrap();
    }

    async fn read(&mut self) -> Value {
        let line = timeout(Duration::from_secs(60), self.lines.next_line())
            .await
            .expect("a line within 60 s");
        let message: Value =
            serde_json::from_str(&line.unwrap().expect("the app server runs")).unwrap();
        if let Some("error" | "warning") = message["method"].as_str() {
            self.errors.push(message["params"].clone());
        }
        message
    }
}

/// The installed CLI; `scripts/install-tools codex` puts it there.
fn program() -> PathBuf {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join(".tools/node_modules");
    let native = tools.join("@openai/codex-linux-x64/vendor/x86_64-unknown-linux-musl/bin/codex");
    let program = if native.exists() {
        native
    } else {
        tools.join(".bin/codex")
    };
    assert!(
        program.exists(),
        "the Codex CLI is not installed: run scripts/install-tools codex"
    );
    program
}

//! A whole service in this process: real listeners, a real database, and the fake upstream behind it.

use std::time::Duration;

use drawbridge::{
    account::{Accounts, AuthFile},
    api_key::{self, Grants, NewKey},
    config::{Config, Drain, KeyRule, OperatorToken, Settings, Transport},
    db::{Db, Endpoint, Installation, migrate},
    ids::AccountId,
    secret::KeyRing,
    server::{Listeners, Server},
};
use loadtest::upstream::Upstream;
use reqwest::{RequestBuilder, Response};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_postgres::Client;

use super::pg::TestDb;

/// A running service and what is around it.
pub(crate) struct House {
    pub(crate) upstream: Upstream,
    pub(crate) server: Server,
    pub(crate) db: Db,
    /// For looking behind the service's back.
    pub(crate) client: Client,
    pub(crate) ring: KeyRing,
    /// The same as text.
    pub(crate) keys: SecretString,
    pub(crate) installation: Installation,
    pub(crate) http: reqwest::Client,
    key: Option<String>,
    config: Config,
    endpoint: Endpoint,
    _test: TestDb,
}

/// What opens the operators' API of every house.
pub(crate) const OPERATOR: &str = "operator-of-the-tests";

/// How a house differs from the ordinary one.
pub(crate) struct Plan {
    pub(crate) upstream: loadtest::upstream::Config,
    pub(crate) accounts: &'static [&'static str],
    pub(crate) transport: Transport,
    pub(crate) key_rule: KeyRule,
    /// Whether a key is created, which the helpers then send.
    pub(crate) key: bool,
    /// Whatever else is set otherwise.
    pub(crate) settings: fn(&mut Config),
    /// What upstream is told before the service starts.
    pub(crate) before: fn(&Upstream),
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            upstream: loadtest::upstream::Config::default(),
            accounts: &["alice"],
            transport: Transport::Auto,
            key_rule: KeyRule::Auto,
            key: true,
            settings: |_| {},
            before: |_| {},
        }
    }
}

impl House {
    /// One account, one key.
    pub(crate) async fn start() -> Self {
        Self::planned(Plan::default()).await
    }

    /// These accounts, one key.
    pub(crate) async fn with(accounts: &'static [&'static str]) -> Self {
        Self::planned(Plan {
            accounts,
            ..Plan::default()
        })
        .await
    }

    pub(crate) async fn planned(plan: Plan) -> Self {
        // reqwest asks for one, even where no TLS is spoken; only the first call counts.
        drop(rustls::crypto::ring::default_provider().install_default());
        let test = TestDb::migrated(async |url| {
            migrate(&Endpoint::parse(&url).unwrap()).await.unwrap();
        })
        .await;
        let upstream = Upstream::start(plan.upstream.clone()).await;
        let endpoint = Endpoint::parse(&test.url).unwrap();
        let db = Db::new(&endpoint, &endpoint).unwrap();
        let keys = KeyRing::generate("k1");
        let ring = KeyRing::parse(&keys).unwrap();
        let installation = Installation::open(&db, &ring).await.unwrap();
        db.learn_time().await.unwrap();
        let accounts = Accounts::new(db.clone(), ring.clone(), installation.pepper.clone());
        for name in plan.accounts {
            import(&accounts, &upstream, name).await;
        }
        let key = if plan.key {
            Some(create_key(&db, &installation, "test", Grants::default()).await)
        } else {
            None
        };
        (plan.before)(&upstream);
        let config = config(&plan, &upstream);
        let server = serve(&config, &endpoint, &ring, &installation).await;
        Self {
            upstream,
            server,
            client: test.connect().await,
            db,
            ring,
            keys,
            installation,
            http: reqwest::Client::builder().no_proxy().build().unwrap(),
            key,
            config,
            endpoint,
            _test: test,
        }
    }

    /// A further replica of this house.
    pub(crate) async fn neighbour(&self) -> Server {
        serve(&self.config, &self.endpoint, &self.ring, &self.installation).await
    }

    /// A URL of the service.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.address)
    }

    /// The key that the helpers send.
    pub(crate) fn key(&self) -> &str {
        self.key.as_deref().unwrap_or_default()
    }

    /// A POST with the key.
    pub(crate) fn post(&self, path: &str) -> RequestBuilder {
        let request = self.http.post(self.url(path));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// A GET with the key.
    pub(crate) fn get(&self, path: &str) -> RequestBuilder {
        let request = self.http.get(self.url(path));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    /// A turn as the Codex CLI asks for it over HTTP.
    pub(crate) async fn codex_turn(&self, thread: &str, turn: &str, text: &str) -> Response {
        self.codex_turn_at(&self.server, thread, turn, text).await
    }

    /// The same at some replica.
    pub(crate) async fn codex_turn_at(
        &self,
        server: &Server,
        thread: &str,
        turn: &str,
        text: &str,
    ) -> Response {
        let url = format!("http://{}/backend-api/codex/responses", server.address);
        let request = self
            .http
            .post(url)
            .bearer_auth(self.key())
            .header("thread-id", thread)
            .header("session-id", thread);
        let metadata = json!({ "turn_id": turn, "thread_id": thread, "session_id": thread, "request_kind": "turn" });
        request
            .header("x-codex-turn-metadata", metadata.to_string())
            .json(&codex_body(text))
            .send()
            .await
            .unwrap()
    }

    /// Accounts of this house.
    pub(crate) fn accounts(&self) -> Accounts {
        Accounts::new(
            self.db.clone(),
            self.ring.clone(),
            self.installation.pepper.clone(),
        )
    }

    /// The id of an account by the name it has upstream.
    pub(crate) async fn account_id(&self, name: &str) -> AccountId {
        let row = self
            .client
            .query_one(
                "select account_id::text from accounts where chatgpt_account_id = $1",
                &[&format!("acct-{name}")],
            )
            .await
            .unwrap();
        row.get::<_, String>(0).parse().unwrap()
    }

    /// A further key.
    pub(crate) async fn another_key(&self, name: &str, grants: Grants) -> String {
        create_key(&self.db, &self.installation, name, grants).await
    }

    /// The ledger, oldest turn first, as JSON rows.
    pub(crate) async fn turns(&self) -> Vec<Value> {
        let rows = self
            .client
            .query("select to_jsonb(t) from turns t order by turn_id", &[])
            .await
            .unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// How the account of a turn was chosen, as its client names it.
    pub(crate) async fn explanation(&self, client_turn: &str) -> Value {
        let query = "
            select l.explanation from request_log l join turns t using (turn_id)
            where t.client_turn_id = $1 order by l.request_id desc limit 1";
        let started = std::time::Instant::now();
        loop {
            if let Some(row) = self.client.query_opt(query, &[&client_turn]).await.unwrap() {
                return row.get(0);
            }
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "{client_turn} is never logged"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Runs one turn and waits until the pool's limits are known from it.
    pub(crate) async fn learn_limits(&self) {
        events(self.codex_turn("warm-up", "warm-up", "hi").await).await;
        let started = std::time::Instant::now();
        loop {
            let usage: Value = self
                .get("/api/codex/usage")
                .send()
                .await
                .unwrap()
                .json()
                .await
                .unwrap();
            if usage["rate_limit"]["primary_window"].is_object() {
                return;
            }
            assert!(
                started.elapsed() < Duration::from_secs(10),
                "the limits never became known: {usage}"
            );
        }
    }

    /// Waits until no turn runs.
    pub(crate) async fn server_idle(&self) {
        assert!(
            self.server.idle(Duration::from_secs(10)).await,
            "a turn does not end"
        );
    }

    /// Drains and stops as on SIGTERM, without the lame duck's waiting.
    pub(crate) async fn stop(self) -> bool {
        self.server
            .stop(Drain {
                delay: Duration::ZERO,
                grace: Duration::from_secs(10),
            })
            .await
    }
}

/// The body that the Codex CLI 0.169 sends, shortened.
pub(crate) fn codex_body(text: &str) -> Value {
    json!({
        "model": "gpt-5.5",
        "input": [
            { "type": "message", "role": "developer", "content": [{ "type": "input_text", "text": "be brief" }] },
            { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": text }] },
        ],
        "tools": [{ "type": "function", "name": "exec_command", "parameters": { "type": "object" } }],
        "tool_choice": "auto",
        "parallel_tool_calls": true,
        "reasoning": { "effort": "medium" },
        "store": false,
        "stream": true,
        "include": ["reasoning.encrypted_content"],
    })
}

/// The events of a stream, in order.
pub(crate) async fn events(response: Response) -> Vec<Value> {
    let text = response.text().await.unwrap();
    let data = text
        .split("\n\n")
        .filter_map(|block| block.lines().find_map(|line| line.strip_prefix("data: ")));
    data.filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

/// The text that the model said.
pub(crate) fn text_of(events: &[Value]) -> String {
    let deltas = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta");
    deltas.filter_map(|event| event["delta"].as_str()).collect()
}

async fn import(accounts: &Accounts, upstream: &Upstream, name: &str) {
    let file = AuthFile::parse(upstream.account(name).auth_json().as_bytes()).unwrap();
    accounts.import(&file, Some(name)).await.unwrap();
}

async fn serve(
    config: &Config,
    endpoint: &Endpoint,
    ring: &KeyRing,
    installation: &Installation,
) -> Server {
    let listen = async || TcpListener::bind("127.0.0.1:0").await.unwrap();
    let listeners = Listeners {
        client: listen().await,
        admin: listen().await,
        internal: None,
    };
    let db = Db::new(endpoint, endpoint).unwrap();
    let started = Server::start(config, db, ring.clone(), installation.clone(), listeners);
    started.await.unwrap()
}

async fn create_key(db: &Db, installation: &Installation, name: &str, grants: Grants) -> String {
    let new = NewKey {
        name: name.to_owned(),
        expires_at: None,
        scope_of: None,
        grants,
    };
    let created = api_key::create(db, &installation.pepper, &new)
        .await
        .unwrap();
    created.secret.expose_secret().to_owned()
}

fn config(plan: &Plan, upstream: &Upstream) -> Config {
    let mut config = Settings::default().check().unwrap();
    config.upstream.url = upstream.url();
    config.upstream.auth_url = upstream.auth_url();
    config.upstream.transport = plan.transport;
    config.key_rule = plan.key_rule;
    // Upstream is asked what a test asks it, unless the test says otherwise.
    config.upstream.usage_poll = None;
    config.operator_token = Some(OperatorToken(OPERATOR.into()));
    (plan.settings)(&mut config);
    config
}

//! A Codex backend for tests: as strict as the real one, scriptable, and it keeps count of everything.
//!
//! It refuses what the real backend refuses, knows only the latest completed response of a socket and forgets it after a failed turn, runs
//! one response at a time per socket, and hands out single-use refresh tokens. What it was asked and what it answered can be read from the
//! same process ([`Upstream`]) or over HTTP (`/__fake/state`).

mod account;
mod answer;
mod connection;
mod control;
mod fault;
mod http;
mod login;
mod state;
mod strict;
mod websocket;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    routing::{get, post},
};
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};

pub use self::{
    account::Account,
    fault::{Fault, Kind, Stage},
    state::{Attempt, State, Usage},
};
use self::{
    connection::{Link, Listener},
    state::Shared,
};

/// How a fake behaves when no fault is due.
#[derive(Clone, Debug)]
pub struct Config {
    /// Text deltas of an ordinary answer.
    pub deltas: usize,
    /// Time before each of them; at once where there is none.
    pub pace: Option<Duration>,
    /// After which a socket refuses further responses.
    pub socket_age: Option<Duration>,
    /// Percent used that every answer reports for the short window.
    pub used_percent: f64,
    /// What each completed response of an account adds to that.
    pub percent_per_turn: f64,
    /// Whether attempts keep their bodies and histories, which long runs cannot afford.
    pub bodies: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            deltas: 4,
            pace: None,
            socket_age: None,
            used_percent: 12.0,
            percent_per_turn: 0.0,
            bodies: true,
        }
    }
}

/// A running fake; it stops when dropped.
pub struct Upstream {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Upstream {
    /// Starts on a free port of the loopback interface.
    ///
    /// # Panics
    /// If no port can be had.
    pub async fn start(config: Config) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        Self::start_on(listener, config)
    }

    /// Starts on a bound listener.
    ///
    /// # Panics
    /// If the listener has no address.
    pub fn start_on(listener: TcpListener, config: Config) -> Self {
        let address = listener
            .local_addr()
            .expect("a bound listener has an address");
        let shared = Arc::new(Shared::new(config));
        let router = Router::new()
            .route("/oauth/token", post(account::token))
            .route("/api/accounts/deviceauth/usercode", post(login::device))
            .route("/api/accounts/deviceauth/token", post(login::device_token))
            .route(
                "/backend-api/codex/responses",
                post(http::create).get(websocket::accept),
            )
            .route("/backend-api/codex/models", get(http::models))
            .route("/backend-api/wham/usage", get(http::usage))
            .route("/__fake/ready", get(async || "ready"))
            .route("/__fake/state", get(control::state))
            .route(
                "/__fake/faults",
                post(control::fault).delete(control::no_faults),
            )
            .route("/__fake/release", post(control::release))
            .route(
                "/__fake/accounts",
                post(control::account).get(control::accounts),
            )
            .route("/__fake/accounts/{name}/expire", post(control::expire))
            .layer(axum::extract::DefaultBodyLimit::max(128 << 20))
            .with_state(Arc::clone(&shared));
        let server = tokio::spawn(async move {
            let service = router.into_make_service_with_connect_info::<Link>();
            let served = axum::serve(Listener(listener), service).await;
            served.expect("accepting goes on for ever");
        });
        Self {
            address,
            shared,
            server,
        }
    }

    /// What `DRAWBRIDGE_UPSTREAM_URL` takes.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}/backend-api", self.address)
    }

    /// What `DRAWBRIDGE_AUTH_URL` takes.
    #[must_use]
    pub fn auth_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// An account by name, made on first use.
    #[must_use]
    pub fn account(&self, name: &str) -> Account {
        Account::of(&self.shared, name)
    }

    /// From now on devices get no codes.
    pub fn no_devices(&self) {
        self.shared.change(|state| state.no_devices = true);
    }

    /// Queues a fault.
    pub fn fault(&self, fault: Fault) {
        self.shared.change(|state| state.faults.push(fault));
    }

    /// Forgets what is left of a fault that was queued.
    pub fn no_fault(&self, fault: &Fault) {
        let same = |left: &Fault| left.kind == fault.kind && left.account == fault.account;
        self.shared
            .change(|state| state.faults.retain(|left| !same(left)));
    }

    /// Forgets the faults that are left.
    pub fn no_faults(&self) {
        self.shared.change(|state| state.faults.clear());
    }

    /// From now on an account's usage document is silent until it is released, each time.
    pub fn hold_usage(&self, account: &str) {
        self.shared
            .change(|state| state.usage_held.insert(account.to_owned()));
    }

    /// Lets responses that a fault keeps silent now go on.
    pub fn release(&self) {
        self.shared.release();
    }

    /// Everything known now.
    #[must_use]
    pub fn state(&self) -> State {
        self.shared.read(State::clone)
    }

    /// Every attempt so far, in order of arrival.
    #[must_use]
    pub fn attempts(&self) -> Vec<Attempt> {
        self.shared.read(|state| state.attempts.clone())
    }

    /// What a real backend would not have forgiven.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.shared.read(|state| state.violations.clone())
    }

    /// Waits until the state satisfies `condition`, at most 10 s.
    ///
    /// # Panics
    /// If it does not come to that.
    pub async fn wait(&self, what: &str, condition: impl Fn(&State) -> bool) {
        let mut changes = self.shared.changes();
        let reached = async {
            while !self.shared.read(&condition) {
                changes
                    .changed()
                    .await
                    .expect("the fake outlives its waiters");
            }
        };
        assert!(
            timeout(Duration::from_secs(10), reached).await.is_ok(),
            "upstream never saw: {what}"
        );
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.server.abort();
        self.shared.stop();
    }
}

//! What the fake knows and counts.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use super::{
    Config,
    account::Login,
    fault::Fault,
    login::{Device, Grant},
};

/// Tokens as the backend bills them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Including cached ones.
    pub input: u64,
    /// Of the input.
    pub cached: u64,
    /// Including reasoning.
    pub output: u64,
    /// Of the output.
    pub reasoning: u64,
}

/// One request or frame that asked for a response.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Attempt {
    /// From 0.
    pub n: usize,
    /// When it arrived, in milliseconds since 1970.
    pub at: u64,
    /// Name of the account.
    pub account: String,
    /// `http` or `websocket`.
    pub transport: String,
    /// From the client's turn metadata.
    pub client_turn_id: Option<String>,
    /// As asked for.
    pub model: String,
    /// What was answered; 200 also for a response that failed later.
    pub status: u16,
    /// As received; of the handshake for frames.
    pub headers: BTreeMap<String, String>,
    /// As received.
    pub body: Value,
    /// The whole conversation as the backend knows it.
    pub history: Vec<Value>,
    /// The answer's id.
    pub response_id: Option<String>,
    /// What a terminal event said.
    pub usage: Option<Usage>,
    /// Whether a terminal event was sent.
    pub completed: bool,
    /// Whether the fake, or its peer, cut it short.
    pub cut: bool,
    /// Which socket.
    pub socket: Option<usize>,
}

/// Everything the fake knows.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// By name.
    pub logins: BTreeMap<String, Login>,
    /// Those not used up.
    pub faults: Vec<Fault>,
    /// In order of arrival.
    pub attempts: Vec<Attempt>,
    /// What a real backend would not have forgiven.
    pub violations: Vec<String>,
    /// Sockets opened, and how many are open.
    pub sockets: usize,
    /// Open now.
    pub open_sockets: usize,
    /// Responses that a fault keeps silent now.
    pub silent: usize,
    /// Frames of types the fake does not know.
    pub unknown_frames: usize,
    /// Turn states handed out: value -> the account it may come back to.
    pub turn_states: BTreeMap<String, String>,
    /// Requests for the model catalogue.
    pub models_reads: usize,
    /// Requests for the usage document by account, and whose are silent until all silences are released.
    pub usage_reads: BTreeMap<String, usize>,
    pub(super) usage_held: BTreeSet<String>,
    /// Exchanges of refresh tokens that have arrived.
    pub exchanging: usize,
    /// Whether devices get no codes.
    pub no_devices: bool,
    /// Codes of logins that are out.
    pub(super) grants: BTreeMap<String, Grant>,
    /// Devices that wait for a person, by their ids.
    pub(super) devices: BTreeMap<String, Device>,
    next_id: u64,
}

impl State {
    /// A fresh id with a prefix.
    pub(super) fn id(&mut self, prefix: &str) -> String {
        self.next_id += 1;
        format!("{prefix}_{:06}", self.next_id)
    }

    /// A fresh turn state for an account.
    pub(super) fn turn_state(&mut self, account: &str) -> String {
        let value = self.id("ts");
        self.turn_states.insert(value.clone(), account.to_owned());
        value
    }

    /// Attempts of one turn of the client.
    #[must_use]
    pub fn of_turn(&self, client_turn_id: &str) -> Vec<&Attempt> {
        self.attempts
            .iter()
            .filter(|attempt| attempt.client_turn_id.as_deref() == Some(client_turn_id))
            .collect()
    }
}

/// The state of one fake, and news of its changes.
pub(super) struct Shared {
    pub(super) config: Config,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    stopped: watch::Sender<bool>,
    released: watch::Sender<()>,
}

impl Shared {
    pub(super) fn new(config: Config) -> Self {
        Self {
            config,
            state: Mutex::default(),
            changed: watch::Sender::new(0),
            stopped: watch::Sender::new(false),
            released: watch::Sender::new(()),
        }
    }

    pub(super) fn read<T>(&self, read: impl FnOnce(&State) -> T) -> T {
        read(&self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.send_modify(|changes| *changes += 1);
        result
    }

    pub(super) fn attempt(&self, n: usize, change: impl FnOnce(&mut Attempt)) {
        self.change(|state| change(&mut state.attempts[n]));
    }

    /// A response is complete: its account pays.
    pub(super) fn bill(&self, n: usize, usage: Usage) {
        self.change(|state| {
            let attempt = &mut state.attempts[n];
            attempt.usage = Some(usage);
            attempt.completed = true;
            if let Some(login) = state.logins.get_mut(&attempt.account) {
                login.turns += 1;
                login.tokens += usage.input + usage.output;
            }
        });
    }

    /// What an account has used of its short window.
    pub(super) fn used_percent(&self, account: &str) -> f64 {
        let turns = self.read(|state| state.logins.get(account).map_or(0, |login| login.turns));
        (self.config.used_percent + self.config.percent_per_turn * f64::from(turns)).min(99.0)
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn stop(&self) {
        self.stopped.send_replace(true);
    }

    /// Ends every silence that lasts now.
    pub(super) fn release(&self) {
        self.released.send_replace(());
    }

    /// Silence; yields whether it was released and not ended by the fake's own end.
    pub(super) async fn silence(&self) -> bool {
        struct Silent<'a>(&'a Shared);
        impl Drop for Silent<'_> {
            fn drop(&mut self) {
                self.0.change(|state| state.silent -= 1);
            }
        }

        let mut released = self.released.subscribe();
        self.change(|state| state.silent += 1);
        let _silent = Silent(self);
        tokio::select! {
            _ = released.changed() => true,
            () = self.stopped() => false,
        }
    }

    /// Ends when the fake stops.
    pub(super) async fn stopped(&self) {
        let mut stopped = self.stopped.subscribe();
        drop(stopped.wait_for(|stopped| *stopped).await);
    }
}

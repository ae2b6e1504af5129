//! What goes wrong, when it is told to.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::state::State;

/// Where in a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Before the status.
    BeforeHeaders,
    /// After the status, before the first event.
    BeforeCreated,
    /// After `response.created` and `in_progress`.
    AfterCreated,
    /// After some text.
    Visible,
    /// After an item is done.
    ItemDone,
    /// After everything but the terminal event.
    BeforeTerminal,
}

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// 429 `usage_limit_reached` with a reset in so many seconds.
    RateLimit {
        /// Seconds.
        resets_in: u64,
    },
    /// 429 `rate_limit_exceeded` with `Retry-After` alone, and headers that show so many percent used.
    RetryAfter {
        /// Seconds.
        seconds: u64,
        /// Percent of the short window.
        used_percent: f64,
    },
    /// 401 although the token is fine.
    Unauthorized,
    /// A status with an error of this code.
    Status(u16, String),
    /// 503 `server_is_overloaded`.
    Overloaded,
    /// 400: the account's plan does not have the model.
    ModelUnsupported,
    /// 400: the model is at capacity, told by its sentence alone.
    ModelCapacity,
    /// `response.failed` with this code, before anything visible.
    Failed(String),
    /// A lost anchor, as `response.failed`.
    NotFoundAsFailed,
    /// A lost anchor, told by its sentence alone.
    NotFoundByText,
    /// Silence until the peer leaves or all silences are released.
    Silence(Stage),
    /// The connection breaks.
    Cut(Stage),
    /// The stream, or the socket, ends politely and early.
    End(Stage),
    /// The socket is closed with a code.
    Close(u16, Stage),
    /// An event of the stream says so many percent of the short window, whatever the headers say.
    Told(f64),
    /// Each event takes so long, in milliseconds.
    Slow(u64),
    /// One event of so many bytes.
    Huge(usize),
    /// So many deltas at once.
    Burst(usize),
    /// So many deltas, each after so many milliseconds.
    Paced(usize, u64),
}

/// A fault, for whom and how often.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// What.
    pub kind: Kind,
    /// Only at this account.
    #[serde(default)]
    pub account: Option<String>,
    /// Only for this turn of the client.
    #[serde(default)]
    pub client_turn_id: Option<String>,
    /// Strikes the handshake of a socket instead of a turn.
    #[serde(default)]
    pub handshake: bool,
    /// How often; 0 = always.
    #[serde(default = "once")]
    pub times: usize,
}

fn once() -> usize {
    1
}

impl Fault {
    /// Once, for anybody.
    #[must_use]
    pub fn once(kind: Kind) -> Self {
        Self {
            kind,
            account: None,
            client_turn_id: None,
            handshake: false,
            times: 1,
        }
    }

    /// Every time, for anybody.
    #[must_use]
    pub fn always(kind: Kind) -> Self {
        Self {
            times: 0,
            ..Self::once(kind)
        }
    }

    /// So often.
    #[must_use]
    pub fn times(mut self, times: usize) -> Self {
        self.times = times;
        self
    }

    /// At the handshake of a socket: a refusal, or a connection that breaks or stays silent before it is answered.
    #[must_use]
    pub fn at_handshake(mut self) -> Self {
        self.handshake = true;
        self
    }

    /// Only at this account.
    #[must_use]
    pub fn at(mut self, account: &str) -> Self {
        self.account = Some(account.to_owned());
        self
    }

    /// Only for this turn of the client.
    #[must_use]
    pub fn for_turn(mut self, client_turn_id: &str) -> Self {
        self.client_turn_id = Some(client_turn_id.to_owned());
        self
    }
}

impl State {
    /// Takes the first fault that is due.
    pub(super) fn due(
        &mut self,
        account: &str,
        client_turn_id: Option<&str>,
        handshake: bool,
    ) -> Option<Kind> {
        let due = |fault: &Fault| {
            fault.handshake == handshake
                && fault
                    .account
                    .as_deref()
                    .is_none_or(|wanted| wanted == account)
                && fault
                    .client_turn_id
                    .as_deref()
                    .is_none_or(|wanted| Some(wanted) == client_turn_id)
        };
        let index = self.faults.iter().position(due)?;
        let fault = &mut self.faults[index];
        let kind = fault.kind.clone();
        match fault.times {
            0 => {}
            1 => drop(self.faults.remove(index)),
            _ => fault.times -= 1,
        }
        Some(kind)
    }
}

impl Kind {
    /// Time between two events.
    pub(super) fn pace(&self) -> Option<Duration> {
        match self {
            Self::Slow(ms) | Self::Paced(_, ms) => Some(Duration::from_millis(*ms)),
            _ => None,
        }
    }
}

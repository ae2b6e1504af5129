//! The life of a turn in the ledger: what is known when it opens, while it is open, and when it settles.

use std::{borrow::Cow, sync::Arc, time::Duration};

use serde_json::Value;

use super::{
    attempt::{Attempt, End, Totals, Try},
    late::Late,
};
use crate::db::Error;
use crate::ids::{AccountId, ApiKeyId, BootId, ChainId, LeaseId, ScopeId, TurnId};

/// One request of a client, answered or not.
#[derive(Clone, Debug)]
pub struct Request {
    /// Drawn on arrival. It is the turn's id, too, unless the request turns out to be a retry.
    pub id: TurnId,
    /// Whose.
    pub scope: ScopeId,
    /// Under which key.
    pub api_key: Option<ApiKeyId>,
    /// Which of our routes.
    pub route: &'static str,
    /// The client's: `http` or `websocket`.
    pub transport: &'static str,
    /// As asked for; empty where the request was not understood.
    pub model: String,
    /// The client's own description of itself.
    pub user_agent: Option<String>,
}

/// What is known of a turn when it begins.
#[derive(Clone, Debug)]
pub struct Opening {
    /// The request.
    pub request: Request,
    /// The turn's id as the client counts, where it has one: how a retry is recognised.
    pub client_turn: Option<String>,
    /// The lease on which the turn runs, if any.
    pub fence: Option<Fence>,
    /// The first attempt.
    pub first: Try,
}

/// The lease on which a turn runs, as its owner knows it. The turn opens only if that is still true.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fence {
    /// Which.
    pub lease: LeaseId,
    /// The fencing token.
    pub generation: i64,
    /// How long the row is kept after the turn.
    pub retain: Duration,
}

/// Why a turn did not open. Nothing of it may be sent.
#[derive(Debug, thiserror::Error)]
pub enum NotOpened {
    /// The lease is not ours any more, or busy.
    #[error("the lease has another owner")]
    Fenced,
    /// The same request was opened before, here or on another replica.
    #[error("the request was begun elsewhere")]
    Begun,
    /// Of the statement; whether it landed is unknown.
    #[error(transparent)]
    Db(#[from] Error),
}

/// A turn that this process holds open. It owns the list of attempts.
#[derive(Clone, Debug)]
pub struct Opened {
    request: Request,
    turn: TurnId,
    client_turn: Option<String>,
    fence: Option<Fence>,
    boot: BootId,
    attempts: Vec<Attempt>,
    late: Option<Arc<Late>>,
}

impl Opened {
    pub(super) fn new(
        opening: Opening,
        turn: TurnId,
        earlier: Vec<Attempt>,
        first: Attempt,
    ) -> Self {
        let boot = first.boot_id;
        let mut attempts = earlier;
        attempts.push(first);
        Self {
            request: opening.request,
            turn,
            client_turn: opening.client_turn,
            fence: opening.fence,
            boot,
            attempts,
            late: None,
        }
    }

    /// One that is not recorded yet. It has no lease: what was not begun on it does not move it.
    pub(super) fn late(late: Late, first: Attempt) -> Self {
        let Opening {
            request,
            client_turn,
            ..
        } = late.opening.clone();
        Self {
            turn: request.id,
            request,
            client_turn,
            fence: None,
            boot: first.boot_id,
            attempts: vec![first],
            late: Some(Arc::new(late)),
        }
    }

    /// Whether it began while Postgres was away, and is recorded at its end.
    #[must_use]
    pub fn is_late(&self) -> bool {
        self.late.is_some()
    }

    /// The lease that its opening asked for, if its recording is still to come.
    pub(super) fn unrecorded(&self) -> Option<&Late> {
        self.late.as_deref()
    }

    pub(super) fn client_turn(&self) -> Option<&str> {
        self.client_turn.as_deref()
    }

    /// The row of the ledger: the id of the first request of this turn.
    #[must_use]
    pub fn turn(&self) -> TurnId {
        self.turn
    }

    /// The request.
    #[must_use]
    pub fn request(&self) -> &Request {
        &self.request
    }

    /// Whether an earlier request of the same turn did not complete.
    #[must_use]
    pub fn is_retry(&self) -> bool {
        self.turn != self.request.id
    }

    /// The attempts of this request, in order.
    pub fn attempts(&self) -> impl Iterator<Item = &Attempt> {
        let request = self.request.id;
        self.attempts
            .iter()
            .filter(move |attempt| attempt.request == request)
    }

    /// Ends the attempt that runs; nothing is written until the next one or the settlement.
    pub fn end(&mut self, end: End) {
        if let Some(attempt) = self.attempts.last_mut() {
            attempt.end(&self.request.model, end);
        }
    }

    pub(super) fn begin(&mut self, next: Attempt) {
        self.lose_running();
        self.attempts.push(next);
    }

    /// The same with no attempt running.
    pub(super) fn closed(&self) -> Cow<'_, Self> {
        if self.attempts.iter().any(Attempt::runs) {
            let mut closed = self.clone();
            closed.lose_running();
            Cow::Owned(closed)
        } else {
            Cow::Borrowed(self)
        }
    }

    /// The same as a turn of its own, which repeats nothing.
    pub(super) fn alone(&self) -> Self {
        let attempts = self.attempts().cloned().collect();
        Self {
            turn: self.request.id,
            attempts,
            ..self.clone()
        }
    }

    fn lose_running(&mut self) {
        for attempt in self.attempts.iter_mut().filter(|attempt| attempt.runs()) {
            attempt.lose(&self.request.model);
        }
    }

    pub(super) fn fence(&self) -> Option<&Fence> {
        self.fence.as_ref()
    }

    /// The incarnation that opened it.
    pub(super) fn boot(&self) -> BootId {
        self.boot
    }

    pub(super) fn all_attempts(&self) -> &[Attempt] {
        &self.attempts
    }

    /// Where the last attempt went.
    pub(super) fn account(&self) -> Option<AccountId> {
        self.attempts.last().map(|attempt| attempt.account_id)
    }

    pub(super) fn totals(&self) -> Totals {
        Totals::of(&self.attempts)
    }
}

/// How a request ended for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The response is whole.
    Completed,
    /// The response ended early by upstream's own rules.
    Incomplete,
    /// An error of the upstream, or of ours.
    Failed,
    /// The client went away.
    Cancelled,
    /// Refused before an attempt could be made.
    Refused,
    /// The process died, or never said.
    Lost,
    /// The client did not read what it asked for.
    SlowConsumer,
}

impl Outcome {
    /// The word in the database, in JSON and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Refused => "refused",
            Self::Lost => "lost",
            Self::SlowConsumer => "slow_consumer",
        }
    }
}

/// What the client got.
#[derive(Clone, Debug)]
pub struct Answer {
    /// In a word.
    pub outcome: Outcome,
    /// The HTTP status; over a WebSocket the one in the frame, 200 for a response.
    pub status: u16,
    /// Why, where that is not obvious: a bounded set of words.
    pub reason: Option<&'static str>,
    /// The code in the error that the client saw.
    pub error_code: Option<Cow<'static, str>>,
    /// From arrival to the first event that went out.
    pub first_event: Option<Duration>,
    /// From arrival to the end.
    pub total: Duration,
    /// How the conversation was continued, and why.
    pub bridge: Option<Bridge>,
    /// Why this account, for `explain`.
    pub explanation: Option<Value>,
}

/// What became of the conversation's session: bounded sets of words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bridge {
    /// The named outcome.
    pub outcome: &'static str,
    /// What led to it.
    pub reason: &'static str,
}

/// How a turn is closed.
#[derive(Clone, Debug)]
pub struct Settlement {
    /// What the client got.
    pub answer: Answer,
    /// Upstream's id of the response.
    pub response_id: Option<String>,
    /// Where the next turn of the same conversation should go.
    pub sticky: Option<Sticky>,
    /// Whether `response_id` is complete: then it is the head of the lease.
    pub complete: bool,
    /// What the next turn can be rebuilt from.
    pub snapshot: Option<Snapshot>,
}

/// A row of `response_snapshots`, under the scope and the response id of its turn.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The response that it continues.
    pub parent: Option<String>,
    /// The chain.
    pub chain: ChainId,
    /// The lease under which the conversation is found again.
    pub lease: Option<LeaseId>,
    /// Its input was whole by itself.
    pub is_root: bool,
    /// The body is there.
    pub complete: bool,
    /// Plain bytes.
    pub bytes: i32,
    /// The master key that sealed it.
    pub key_id: Option<String>,
    /// Sealed.
    pub body: Option<Vec<u8>>,
}

/// What FINISH found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Booked {
    /// This call booked the turn, or replaced what a sweep had guessed; else it was booked before, by a call whose reply was lost, or a
    /// retry has it.
    pub turn: bool,
    /// The lease was still ours, or there was none. If not, this replica is fenced: it moved no head.
    pub lease: bool,
}

/// A durable preference, in the scope of the turn.
#[derive(Clone, Copy, Debug)]
pub struct Sticky {
    /// What the key is: `thread`, `prompt_cache_key`...
    pub kind: &'static str,
    /// SHA-256 of the length-framed kind and value.
    pub hash: [u8; 32],
    /// The account.
    pub account: AccountId,
    /// How long it holds from now.
    pub ttl: Duration,
}

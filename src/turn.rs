//! The engine: a turn from the moment it is asked for to its one settlement.
//!
//! A turn runs in a task of its own and yields [`Item`]s: a head, events, one typed [`End`]. It survives its client by two seconds, its
//! upstream by the table of failures, and never sends upstream what the ledger has not recorded. It knows nothing of HTTP statuses or of
//! how its items are encoded.

mod affinity;
mod budget;
mod carrier;
mod event;
mod hop;
mod log;
mod refuse;
mod registry;
pub mod relay;
pub mod resolve;
mod route;
mod run;
mod session;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, header};
use tokio::{sync::Notify, time::timeout};
use tokio_util::sync::CancellationToken;

pub use self::{
    budget::{Budget, Held, Inbox},
    event::Event,
    hop::{Peers, Receiving},
    registry::Sessions,
    resolve::Reject,
};
use self::{registry::Registry, relay::Receiver};
use crate::{
    account::{Accounts, sticky::Sticky},
    api_key::{ApiKeys, Key},
    ids::{AccountId, ApiKeyId, BootId, LeaseId, ScopeId, TurnId},
    lease::Leases,
    ledger::{self, Ledger},
    protocol::{
        failure::Failure,
        limits::QuotaVisibility,
        request::{Invalid, Request},
        trace,
    },
    quota::Quota,
    replica::Replica,
    routing,
    snapshot::Snapshots,
    task::Tasks,
    token,
    upstream::Upstream,
};

/// Who asks, and what they may use.
#[derive(Clone, Debug)]
pub struct Caller(Option<Arc<Key>>);

impl Caller {
    /// Somebody on this machine without a key.
    #[must_use]
    pub fn anonymous() -> Self {
        Self(None)
    }

    /// The holder of a key.
    #[must_use]
    pub fn of(key: &Arc<Key>) -> Self {
        Self(Some(Arc::clone(key)))
    }

    /// Whose conversations these are.
    #[must_use]
    pub fn scope(&self) -> ScopeId {
        self.0.as_ref().map_or(ScopeId::ANONYMOUS, |key| key.scope)
    }

    /// The key.
    #[must_use]
    pub fn api_key(&self) -> Option<ApiKeyId> {
        self.0.as_ref().map(|key| key.id)
    }

    /// What the client may see of quota; `hidden` = nobody sees any.
    fn sees(&self, hidden: bool) -> QuotaVisibility<'_> {
        let grants = self.0.as_ref().map(|key| &key.grants);
        let sections = grants.and_then(|grants| grants.quota.as_deref());
        QuotaVisibility::new(sections, self.accounts(), hidden)
    }

    /// The accounts the key may use; `None` = all.
    #[must_use]
    pub fn accounts(&self) -> Option<&[AccountId]> {
        self.0.as_ref()?.grants.accounts.as_deref()
    }

    /// Whether the key may use a model.
    #[must_use]
    pub fn may_use(&self, model: &str) -> bool {
        let models = self.0.as_ref().and_then(|key| key.grants.models.as_ref());
        models.is_none_or(|models| models.iter().any(|allowed| allowed == model))
    }
}

/// The client's side of the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A request.
    Http,
    /// A frame.
    WebSocket,
}

impl Transport {
    /// The word in the ledger and in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::WebSocket => "websocket",
        }
    }
}

/// One request of a client, understood and normalised.
pub struct Ask {
    /// Drawn on arrival.
    pub id: TurnId,
    /// Who.
    pub caller: Caller,
    /// Which of our routes.
    pub route: &'static str,
    /// How it came.
    pub transport: Transport,
    /// What.
    pub request: Request,
    /// The client's headers.
    pub headers: HeaderMap,
    /// The turn-state token that it came with, unread.
    pub turn_state: Option<Bytes>,
    /// The lease that the client's socket rode before.
    pub line: Option<LeaseId>,
    /// The lease for whose sake a peer sent it here.
    pub forwarded: Option<LeaseId>,
    /// It went to a peer that gave no answer: whether it was begun there only the ledger can tell.
    pub sent: bool,
    /// The body's share of the replica's bytes.
    pub held: Held,
    /// When it came.
    pub arrived: Instant,
}

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ask")
            .field("id", &self.id)
            .field("request", &self.request)
            .finish_non_exhaustive()
    }
}

impl Ask {
    /// The id under which the client finds its request in our log.
    fn request_id(&self) -> Option<&str> {
        self.headers.get("x-request-id")?.to_str().ok()
    }

    /// Whether the client has shown itself to be Codex, which keeps the whole conversation itself.
    #[must_use]
    pub fn is_codex(&self) -> bool {
        let beta = || {
            let named = self.headers.get("openai-beta");
            let named = named.and_then(|beta| beta.to_str().ok());
            named.is_some_and(|beta| beta.contains("responses_websockets"))
        };
        let client = &self.request.facts.client;
        client.turn_id.is_some() || client.window_id.is_some() || beta()
    }

    /// The trace that the client's request is part of.
    fn trace_id(&self) -> Option<&str> {
        let of_message = self.request.facts.client.trace_id.as_deref();
        of_message.or_else(|| trace::id(&self.headers))
    }

    fn record(&self) -> ledger::Request {
        let user_agent = self
            .headers
            .get(header::USER_AGENT)
            .and_then(|agent| agent.to_str().ok());
        ledger::Request {
            id: self.id,
            scope: self.caller.scope(),
            api_key: self.caller.api_key(),
            route: self.route,
            transport: self.transport.as_str(),
            model: self.request.facts.model.clone(),
            user_agent: user_agent.map(str::to_owned),
        }
    }
}

/// How a client comes back to its conversation.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Token {
    /// The lease that it names.
    pub lease: LeaseId,
    /// The value of `x-codex-turn-state`.
    pub text: String,
    /// Whether the client did not have it before.
    pub fresh: bool,
}

/// What a turn yields, in this order: at most one begin, at most one head, events, one end.
#[derive(Debug)]
pub enum Item {
    /// The turn has begun; nothing was sent upstream yet.
    Begun(Option<Token>),
    /// Upstream's headers, filtered; just before the first event.
    Head(HeaderMap),
    /// An event of the response.
    Event(Event),
    /// Nothing follows.
    End(End),
}

impl relay::Weight for Item {
    fn weight(&self) -> usize {
        match self {
            Self::Event(event) => event.len(),
            Self::Begun(_) | Self::Head(_) | Self::End(_) => 0,
        }
    }
}

/// How a turn ended.
#[derive(Debug)]
pub enum End {
    /// Its terminal event has been yielded.
    Complete,
    /// There was none that a client should see as it was.
    Failed(Box<Stop>),
}

/// Why a turn has no terminal event.
#[derive(Debug)]
pub enum Stop {
    /// Upstream refused or failed, and no other attempt could help. The event is its own account of it, where it sent one.
    Upstream(Failure, Option<Event>),
    /// Every account that could serve has used up its limit.
    Exhausted {
        /// Epoch seconds of the earliest reset, if the client may see it.
        resets_at: Option<i64>,
    },
    /// No account can serve.
    Nobody {
        /// For the operator.
        why: String,
    },
    /// Every account that could serve runs as many turns as it may.
    Busy,
    /// `previous_response_id` names what no upstream socket at hand remembers.
    PreviousResponseNotFound,
    /// The conversation cannot be continued here and now, and when to come back.
    Rejected(Reject, Option<Duration>),
    /// What the request continues and what it says do not fit together.
    Invalid(Box<Invalid>),
    /// Nothing can be booked now, so nothing may be sent.
    Unavailable,
    /// The client read nothing for a minute.
    SlowConsumer,
    /// The process is ending.
    Cancelled,
}

/// Runs turns. Clones share one engine.
#[derive(Clone)]
pub struct Engine(Arc<Inner>);

/// What the engine is made of.
pub struct Parts {
    /// Accounts, connections and the pool's view.
    pub upstream: Upstream,
    /// For their life cycle.
    pub accounts: Accounts,
    /// The single truth about limits.
    pub quota: Quota,
    /// Which account served a conversation last.
    pub sticky: Sticky,
    /// Turns.
    pub ledger: Ledger,
    /// This incarnation.
    pub replica: Replica,
    /// Who owns which conversation.
    pub leases: Leases,
    /// What conversations are rebuilt from.
    pub snapshots: Snapshots,
    /// Turn-state tokens.
    pub tokens: token::Keys,
    /// Client keys, for turns that peers send.
    pub keys: ApiKeys,
    /// The way to the owners of other leases; `None` = nothing is forwarded.
    pub peers: Option<Peers>,
    /// Sessions at most.
    pub max_sessions: usize,
    /// Whether no client sees anything of quota.
    pub hide_quota: bool,
    /// How accounts are chosen.
    pub policy: routing::Policy,
}

struct Inner {
    upstream: Upstream,
    accounts: Accounts,
    quota: Quota,
    sticky: Sticky,
    ledger: Ledger,
    replica: Replica,
    leases: Leases,
    snapshots: Snapshots,
    tokens: token::Keys,
    keys: ApiKeys,
    peers: Option<Peers>,
    sessions: Registry,
    hide_quota: bool,
    chooser: run::Chooser,
    tasks: Tasks,
    /// No session is opened any more.
    closing: AtomicBool,
    /// Ends every turn.
    cancel: CancellationToken,
    running: AtomicUsize,
    /// Told when the last running turn has ended.
    idle: Notify,
}

impl Inner {
    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }
}

impl Engine {
    /// An engine over its parts.
    #[must_use]
    pub fn new(parts: Parts, tasks: &Tasks) -> Self {
        Self(Arc::new(Inner {
            upstream: parts.upstream,
            accounts: parts.accounts,
            quota: parts.quota,
            sticky: parts.sticky,
            ledger: parts.ledger,
            replica: parts.replica,
            leases: parts.leases,
            snapshots: parts.snapshots,
            tokens: parts.tokens,
            keys: parts.keys,
            peers: parts.peers,
            sessions: Registry::new(parts.max_sessions),
            hide_quota: parts.hide_quota,
            chooser: run::Chooser::new(parts.policy),
            tasks: tasks.clone(),
            closing: AtomicBool::new(false),
            cancel: CancellationToken::new(),
            running: AtomicUsize::new(0),
            idle: Notify::new(),
        }))
    }

    /// Starts a turn. Dropping the receiver is how a client leaves.
    #[must_use]
    pub fn start(&self, ask: Ask) -> Receiver<Item> {
        let (sender, receiver) = relay::channel();
        let running = Running::start(&self.0);
        route::start(&self.0, Box::new(ask), sender, running);
        receiver
    }

    /// From here on no session is opened, and those that are idle give their lease back.
    pub fn close(&self) {
        self.0.closing.store(true, Ordering::Release);
        self.0.sessions.retire_all();
    }

    /// Sessions now.
    #[must_use]
    pub fn sessions(&self) -> Sessions {
        self.0.sessions.count()
    }

    /// Gives up what other incarnations of this process owned.
    pub fn retire_others(&self, boot: BootId) {
        self.0.sessions.retire_others(boot);
    }

    /// What a client may see of quota: the one place where its grants and the setting meet.
    #[must_use]
    pub fn visibility<'a>(&self, caller: &'a Caller) -> QuotaVisibility<'a> {
        caller.sees(self.0.hide_quota)
    }

    /// Turns that run now.
    #[must_use]
    pub fn running(&self) -> usize {
        self.0.running.load(Ordering::Acquire)
    }

    /// Waits until no turn runs, at most `grace`. True if none does.
    pub async fn idle(&self, grace: Duration) -> bool {
        let ended = async {
            loop {
                let notified = self.0.idle.notified();
                if self.running() == 0 {
                    return;
                }
                notified.await;
            }
        };
        timeout(grace, ended).await.is_ok()
    }

    /// Ends every turn with [`Stop::Cancelled`], and every session.
    pub fn cancel_all(&self) {
        self.0.cancel.cancel();
    }
}

/// Counts a turn while it lives.
struct Running(Arc<Inner>);

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Running")
    }
}

impl Running {
    fn start(engine: &Arc<Inner>) -> Self {
        engine.running.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(engine))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

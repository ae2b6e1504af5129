//! The engine: a turn from the moment it is asked for to its one settlement.
//!
//! A turn runs in a task of its own and yields [`Item`]s: a head, events, one typed [`End`]. It survives its client by two seconds, its
//! upstream by the table of failures, and never sends upstream what the ledger has not recorded. It knows nothing of HTTP statuses or of
//! how its items are encoded.

mod budget;
mod carrier;
mod event;
pub mod relay;
mod run;
mod session;

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use http::{HeaderMap, header};
use tokio::{sync::Notify, time::timeout};
use tokio_util::sync::CancellationToken;

use self::relay::Receiver;
pub use self::{
    budget::{Budget, Held},
    event::Event,
    session::{Session, Unavailable},
};
use crate::{
    account::{Accounts, sticky::Sticky},
    api_key::Key,
    ids::{AccountId, ApiKeyId, ScopeId, TurnId},
    ledger::{self, Ledger},
    protocol::{failure::Failure, request::Request},
    quota::Quota,
    task::Tasks,
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
    /// The body's share of the replica's bytes.
    pub held: Held,
    /// When it came.
    pub arrived: Instant,
}

impl Ask {
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

/// What a turn yields, in this order: at most one head, events, one end.
#[derive(Debug)]
pub enum Item {
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
            Self::Head(_) | Self::End(_) => 0,
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
        /// Epoch seconds of the earliest reset.
        resets_at: i64,
    },
    /// No account can serve.
    Nobody {
        /// For the operator.
        why: String,
    },
    /// `previous_response_id` names what no upstream socket at hand remembers.
    PreviousResponseNotFound,
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

struct Inner {
    upstream: Upstream,
    accounts: Accounts,
    quota: Quota,
    sticky: Sticky,
    ledger: Ledger,
    tasks: Tasks,
    /// Ends every turn.
    cancel: CancellationToken,
    running: AtomicUsize,
    /// Told when the last running turn has ended.
    idle: Notify,
}

impl Engine {
    /// An engine over its parts.
    #[must_use]
    pub fn new(
        upstream: Upstream,
        accounts: Accounts,
        quota: Quota,
        sticky: Sticky,
        ledger: Ledger,
        tasks: &Tasks,
    ) -> Self {
        Self(Arc::new(Inner {
            upstream,
            accounts,
            quota,
            sticky,
            ledger,
            tasks: tasks.clone(),
            cancel: CancellationToken::new(),
            running: AtomicUsize::new(0),
            idle: Notify::new(),
        }))
    }

    /// Starts a turn. Dropping the receiver is how a client leaves.
    #[must_use]
    pub fn start(&self, ask: Ask) -> Receiver<Item> {
        let (sender, receiver) = relay::channel();
        let engine = Arc::clone(&self.0);
        let running = Running::start(&engine);
        drop(self.0.tasks.spawn("turn", async move {
            let mut carrier = carrier::Carrier::for_http(&engine.upstream);
            run::run(&engine, ask, &sender, &mut carrier).await;
            drop(running);
        }));
        receiver
    }

    /// Opens a session: a client's WebSocket and the upstream socket that remembers its conversation.
    #[must_use]
    pub fn session(&self) -> Session {
        Session::open(&self.0)
    }

    /// Starts a turn in a session, after those that wait there.
    ///
    /// # Errors
    /// [`Unavailable`]; the client should come back on another socket.
    pub fn start_in(&self, session: &Session, ask: Ask) -> Result<Receiver<Item>, Unavailable> {
        session.start(Running::start(&self.0), ask)
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

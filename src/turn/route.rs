//! Where a turn runs: the evidence is read, `resolve` decides, and what it says is done. Every step that acts on a lease is a
//! compare-and-set of its own, so a decision that is out of date by then only leads back here.

mod look;

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use self::look::{Known, NoSession};
use super::{
    Ask, Inner, Item, Running, Stop, Token,
    carrier::Carrier,
    hop, refuse,
    registry::Handle,
    relay::Sender,
    resolve::{Continuity, Evidence, Outcome, Reject, Resolution, Step, owner_silent, resolve},
    run::{self, Seat},
    session::{self, Job, NotTaken},
};
use crate::{
    ids::{LeaseId, ScopeId},
    lease::{self, Held, Owner},
    ledger::Bridge,
    telemetry, token,
};

/// How often a decision may turn out to be out of date.
const ROUNDS: usize = 6;
/// Between two of them, doubled each time: what is in the way may be a statement on its way.
const PAUSE: Duration = Duration::from_millis(10);
/// How long the end of an abandoned turn is waited for.
const HURRY: Duration = Duration::from_secs(1);

/// Starts a turn on its way.
pub(super) fn start(engine: &Arc<Inner>, ask: Box<Ask>, out: Sender<Item>, running: Running) {
    let task = Router::new(engine, ask, out, running, None).route();
    drop(engine.tasks.spawn("turn", task));
}

/// Starts a turn that a peer sent to the owner of a lease: it is served here or refused, never sent on.
pub(super) fn forwarded(
    engine: &Arc<Inner>,
    ask: Box<Ask>,
    out: Sender<Item>,
    running: Running,
    lease: LeaseId,
) {
    let task = Router::new(engine, ask, out, running, Some(lease)).route();
    drop(engine.tasks.spawn("turn", task));
}

/// Routes a turn anew that its session could not begin.
pub(super) fn again(engine: &Arc<Inner>, job: Job) {
    let Job {
        ask, out, running, ..
    } = job;
    let forwarded = ask.forwarded;
    let mut router = Router::new(engine, ask, out, running, forwarded);
    router.again = true;
    drop(engine.tasks.spawn("turn", router.route()));
}

struct Router {
    engine: Arc<Inner>,
    ask: Box<Ask>,
    out: Sender<Item>,
    running: Running,
    scope: ScopeId,
    /// The lease for which a peer sent it here.
    forwarded: Option<LeaseId>,
    /// A session found that its lease is not ours: the row must be read.
    again: bool,
    /// An abandoned turn was waited for already.
    hurried: bool,
    /// The owner was asked and refused, or the lease could not be taken for a socket.
    asked: bool,
}

impl Router {
    fn new(
        engine: &Arc<Inner>,
        mut ask: Box<Ask>,
        out: Sender<Item>,
        running: Running,
        forwarded: Option<LeaseId>,
    ) -> Self {
        ask.forwarded = forwarded;
        Self {
            engine: Arc::clone(engine),
            scope: ask.caller.scope(),
            ask,
            out,
            running,
            forwarded,
            again: false,
            hurried: false,
            asked: false,
        }
    }

    async fn route(mut self) {
        for round in 0..ROUNDS {
            if round > 1 {
                sleep(PAUSE * (1 << round)).await;
            }
            let known = match self.look().await {
                Ok(known) => known,
                // Its conversation may come back: it is given a name, which becomes a lease when it does.
                Err(NoSession) => {
                    let why = bridge(Outcome::FreshStart, "no_session");
                    return self.detached(why, Some(LeaseId::new())).await;
                }
            };
            let resolution = resolve(&known.inputs);
            tracing::debug!(turn_id = %self.ask.id, inputs = ?known.inputs, ?resolution, "resolved");
            match self.take(known, resolution).await {
                Some(back) => self = back,
                None => return,
            }
        }
        self.refuse(
            Reject::OwnerUnreachable,
            bridge(Outcome::OwnerUnreachable, "contended"),
            Some(Duration::from_secs(1)),
        );
    }

    /// Does what was decided. Yields itself back when that turned out to be out of date.
    async fn take(mut self, known: Known, resolution: Resolution) -> Option<Self> {
        let why = bridge(resolution.outcome, resolution.reason);
        match resolution.step {
            Step::Reuse | Step::Rebuild => match known.local {
                Some(handle) => self.send(&handle, why),
                None => Some(self),
            },
            Step::Hurry => {
                self.hurried = true;
                if let Some(handle) = &known.local {
                    handle.hurry(HURRY).await;
                }
                Some(self)
            }
            Step::Evict => {
                if let Some(handle) = &known.local {
                    handle.retire.cancel();
                    self.engine.sessions.remove(self.scope, &handle.held);
                }
                self.again = true;
                Some(self)
            }
            Step::Claim => self.claim(&known, why).await,
            Step::Fork => {
                let engine = Arc::clone(&self.engine);
                let me = engine.replica.boot();
                let claim = engine.leases.claim(me, self.scope, lease::Key::fork());
                match engine.within(claim).await {
                    Some(Some(held)) => self.serve(held, why),
                    Some(None) => Some(self),
                    None => self.without_postgres().await,
                }
            }
            Step::Take => self.take_over(known, why).await,
            Step::Forward => self.forward(known, why).await,
            Step::Detached => {
                self.detached(why, None).await;
                None
            }
            Step::Reject(reject) => {
                let wait = retry_after(reject, known.row.as_ref());
                self.refuse(reject, why, wait);
                None
            }
        }
    }

    /// Claims the lease that the evidence names, by one claim of its key at a time.
    async fn claim(mut self, known: &Known, why: Bridge) -> Option<Self> {
        let engine = Arc::clone(&self.engine);
        let me = engine.replica.boot();
        // A token too old to bring its conversation back brings only the request.
        let stale = known.inputs.evidence == Evidence::Old
            && known.inputs.continuity == Continuity::Optional;
        let by_id = known.lease.filter(|_| !stale);
        let row = known.row.as_ref().filter(|_| !stale);
        let key = match (by_id, row, known.key) {
            (_, Some(row), _) => row.key,
            (Some(lease), None, _) => lease::Key::of_lease(lease),
            (None, None, Some((key, _))) => key,
            (None, None, None) => lease::Key::fork(),
        };
        let claiming = engine.sessions.claiming(self.scope, key).await;
        // Whoever was first may have started the session.
        let started = match by_id {
            Some(lease) => engine.sessions.by_lease(self.scope, lease),
            None => engine.sessions.by_key(self.scope, key),
        };
        if started.is_some_and(|started| started.held.boot == me) {
            self.again = true;
            return Some(self);
        }
        let claim = async {
            match by_id {
                Some(lease) => engine.leases.claim_id(me, self.scope, lease).await,
                None => engine.leases.claim(me, self.scope, key).await,
            }
        };
        match engine.within(claim).await {
            Some(Some(held)) => self.serve(held, why),
            Some(None) => {
                // It has an owner, or we are busy on it: now the row must be read.
                self.again = true;
                Some(self)
            }
            None => {
                drop(claiming);
                self.without_postgres().await
            }
        }
    }

    /// Takes an idle lease to this replica; what the owner's silence allows else.
    async fn take_over(mut self, known: Known, why: Bridge) -> Option<Self> {
        let engine = Arc::clone(&self.engine);
        let me = engine.replica.boot();
        let Some(row) = &known.row else {
            self.again = true;
            return Some(self);
        };
        let claiming = engine.sessions.claiming(self.scope, row.key).await;
        let started = engine.sessions.by_lease(self.scope, row.lease);
        if started.is_some_and(|started| started.held.boot == me) {
            self.again = true;
            return Some(self);
        }
        // A row that was busy when it was read stays its owner's.
        let taken = if row.busy_turn.is_none() {
            match engine.within(engine.leases.take(me, self.scope, row)).await {
                Some(taken) => taken,
                None => {
                    drop(claiming);
                    return self.without_postgres().await;
                }
            }
        } else {
            None
        };
        telemetry::take(taken.is_some());
        if let Some(held) = taken {
            return self.serve(held, why);
        }
        // What serves it else may take as long as a turn.
        drop(claiming);
        if known.inputs.socket && !self.asked {
            // Only its convenience was at stake: the owner may serve it.
            self.asked = true;
            return Some(self);
        }
        let resolution = owner_silent(&known.inputs, Some(false));
        Box::pin(self.take(known, resolution)).await
    }

    /// Sends the turn to the owner of its lease.
    async fn forward(mut self, known: Known, why: Bridge) -> Option<Self> {
        let Some(row) = &known.row else {
            self.again = true;
            return Some(self);
        };
        let elsewhere = known.inputs.continuity != Continuity::Required { snapshot: false };
        let peers = self.engine.peers.as_ref();
        let sent = if elsewhere && peers.is_some_and(|peers| peers.is_spared(&row.owner)) {
            hop::Sent::Silent
        } else {
            self.ask.sent = true;
            hop::forward(&self.engine, &mut self.ask, &self.out, row).await
        };
        match sent {
            hop::Sent::Served => {
                telemetry::bridge(why.outcome, why.reason);
                None
            }
            hop::Sent::NotOwner if !self.asked => {
                (self.asked, self.again) = (true, true);
                Some(self)
            }
            hop::Sent::Begun => {
                let why = bridge(Outcome::OwnerUnreachable, "begun_elsewhere");
                self.refuse(Reject::OwnerUnreachable, why, Some(Duration::from_secs(1)));
                None
            }
            hop::Sent::Busy => {
                let why = bridge(Outcome::Overloaded, "owner_full");
                self.refuse(Reject::Overloaded, why, Some(Duration::from_secs(1)));
                None
            }
            // An incarnation that the row still names and that denies it is gone: its successor answers at its address.
            hop::Sent::NotOwner | hop::Sent::Silent => {
                let resolution = owner_silent(&known.inputs, None);
                self.asked = true;
                Box::pin(self.take(known, resolution)).await
            }
        }
    }

    /// Postgres went away between two statements.
    async fn without_postgres(self) -> Option<Self> {
        if self.ask.sent {
            let why = bridge(Outcome::MetadataUnavailable, "postgres_away");
            let wait = Some(Duration::from_secs(1));
            self.refuse(Reject::MetadataUnavailable, why, wait);
            return None;
        }
        let known = self.away();
        let resolution = resolve(&known.inputs);
        Box::pin(self.take(known, resolution)).await
    }

    /// Starts a session on a lease that is ours now.
    fn serve(self, held: Held, why: Bridge) -> Option<Self> {
        let handle = session::start(&self.engine, self.scope, held);
        self.send(&handle, why)
    }

    fn send(self, handle: &Handle, why: Bridge) -> Option<Self> {
        let seat = self.seat(Some(handle.held.lease), why);
        let job = Job {
            ask: self.ask,
            out: self.out,
            seat,
            running: self.running,
        };
        match handle.send(Box::new(job)) {
            Ok(()) => {
                telemetry::bridge(why.outcome, why.reason);
                None
            }
            Err(not_taken) => {
                let (job, full) = match not_taken {
                    NotTaken::Full(job) => (job, true),
                    NotTaken::Ended(job) => (job, false),
                };
                let mut back =
                    Self::new(&self.engine, job.ask, job.out, job.running, self.forwarded);
                (back.again, back.hurried, back.asked) = (self.again, self.hurried, self.asked);
                if full {
                    let why = bridge(Outcome::Overloaded, "queue_full");
                    back.refuse(Reject::Overloaded, why, Some(Duration::from_secs(1)));
                    return None;
                }
                self.engine.sessions.remove(self.scope, &handle.held);
                Some(back)
            }
        }
    }

    /// Runs the turn here, without a session; under the name of a lease that it may become.
    async fn detached(self, why: Bridge, lease: Option<LeaseId>) {
        telemetry::bridge(why.outcome, why.reason);
        let seat = self.seat(lease, why);
        let mut carrier = Carrier::for_one(&self.engine.upstream);
        let ran = run::run(&self.engine, self.ask, &self.out, &mut carrier, seat).await;
        if let run::Ran::Ended(mut ending) = ran {
            ending.tell(&self.out);
        }
        drop(self.out);
        carrier.close().await;
        drop(self.running);
    }

    fn seat(&self, lease: Option<LeaseId>, why: Bridge) -> Seat {
        Seat {
            held: None,
            lease,
            token: lease.map(|lease| self.token(lease)),
            bridge: why,
        }
    }

    /// The client's own token where it names the lease: Codex keeps the first that it sees.
    fn token(&self, lease: LeaseId) -> Token {
        let now = self.engine.upstream.clock().now().as_second();
        let presented = self.ask.turn_state.as_deref();
        let same = self.engine.tokens.read(presented, self.scope, now) == token::Token::Good(lease);
        let text = presented
            .filter(|_| same)
            .and_then(|text| std::str::from_utf8(text).ok())
            .map(str::to_owned);
        let fresh = text.is_none();
        Token {
            lease,
            text: text.unwrap_or_else(|| self.engine.tokens.mint(lease, self.scope, now)),
            fresh,
        }
    }

    fn refuse(self, reject: Reject, why: Bridge, wait: Option<Duration>) {
        telemetry::bridge(why.outcome, why.reason);
        refuse::refuse(
            &self.engine,
            &self.ask,
            &self.out,
            why,
            Stop::Rejected(reject, wait),
        );
        drop(self.running);
    }
}

/// How long until the owner is back, or buried.
fn retry_after(reject: Reject, row: Option<&lease::Row>) -> Option<Duration> {
    match (reject, row.map(|row| &row.owner)) {
        (Reject::OwnerUnreachable, Some(Owner::Other { alive_for, .. })) => Some(
            (*alive_for + Duration::from_secs(3))
                .clamp(Duration::from_secs(1), Duration::from_secs(20)),
        ),
        (
            Reject::OwnerUnreachable
            | Reject::MetadataUnavailable
            | Reject::Draining
            | Reject::Overloaded,
            _,
        ) => Some(Duration::from_secs(1)),
        _ => None,
    }
}

fn bridge(outcome: Outcome, reason: &'static str) -> Bridge {
    Bridge {
        outcome: outcome.as_str(),
        reason,
    }
}

//! A session: one task that owns a lease and the upstream socket of its conversation, and runs its turns one after the other.
//!
//! Its socket may come and go while it lives: cold, it connects again for the next turn. It ends when it has been idle for long, when it is
//! asked to retire, or when a turn finds that the lease is no longer ours; then what waits is routed anew.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    Ask, Inner, Item, Running,
    carrier::Carrier,
    registry::{Handle, State},
    relay, route,
    run::{self, Ran, Seat},
};
use crate::{
    ids::ScopeId,
    lease::{Held, Kind},
    telemetry,
};

/// Turns that may wait.
const MAILBOX: usize = 8;

/// How long the end of a session waits for its lease to be given back.
const RELEASE_TIME: Duration = Duration::from_secs(2);
/// How long the next turn waits for a statement about the one before, without which its lease is busy.
const BOOKING_TIME: Duration = Duration::from_secs(5);
/// How long an idle session is kept: one that a Codex client leads, and any other.
const IDLE_HARD: Duration = Duration::from_secs(900);
const IDLE_SOFT: Duration = Duration::from_secs(120);

/// A turn for a session. Boxed while it waits: a mailbox has room for many.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) ask: Box<Ask>,
    pub(super) out: relay::Sender<Item>,
    pub(super) seat: Seat,
    /// A turn that waits counts as running: nobody may stop over its head.
    pub(super) running: Running,
}

/// Counts a job while it waits or runs.
struct Queued(Arc<AtomicUsize>);

impl Drop for Queued {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Why a session takes no job; the job comes back.
#[derive(Debug)]
pub(super) enum NotTaken {
    /// Its mailbox is full.
    Full(Box<Job>),
    /// It has ended.
    Ended(Box<Job>),
}

impl Handle {
    /// Sends a turn, after those that wait.
    pub(super) fn send(&self, mut job: Box<Job>) -> Result<(), NotTaken> {
        job.seat.held = Some(self.held);
        self.queued.fetch_add(1, Ordering::AcqRel);
        self.jobs.try_send(job).map_err(|error| {
            self.queued.fetch_sub(1, Ordering::AcqRel);
            match error {
                mpsc::error::TrySendError::Full(job) => NotTaken::Full(job),
                mpsc::error::TrySendError::Closed(job) => NotTaken::Ended(job),
            }
        })
    }
}

/// Starts the session of a lease that was just claimed.
pub(super) fn start(engine: &Arc<Inner>, scope: ScopeId, held: Held) -> Handle {
    let (jobs, mailbox) = mpsc::channel(MAILBOX);
    let (state, seen) = watch::channel(State {
        running: None,
        head: None,
        since: Instant::now(),
    });
    let handle = Handle {
        scope,
        held,
        jobs,
        state: seen,
        queued: Arc::default(),
        retire: CancellationToken::new(),
    };
    engine.sessions.insert(handle.clone());
    let session = Session {
        engine: Arc::clone(engine),
        scope,
        held,
        state,
        queued: Arc::clone(&handle.queued),
        retire: handle.retire.clone(),
        carrier: Carrier::for_session(),
        fenced: false,
    };
    drop(engine.tasks.spawn("session", session.serve(mailbox)));
    handle
}

struct Session {
    engine: Arc<Inner>,
    scope: ScopeId,
    held: Held,
    state: watch::Sender<State>,
    queued: Arc<AtomicUsize>,
    retire: CancellationToken,
    carrier: Carrier,
    /// A turn found that the lease is not ours.
    fenced: bool,
}

/// What a session does next.
enum Step {
    Run(Box<Job>),
    /// Upstream gave the socket up.
    Cold,
    End,
}

impl Session {
    async fn serve(mut self, mut mailbox: mpsc::Receiver<Box<Job>>) {
        loop {
            match self.next(&mut mailbox).await {
                Step::Run(job) => self.run(job).await,
                Step::Cold => self.note(None),
                Step::End => break,
            }
            if self.fenced {
                break;
            }
        }
        // Nobody finds it any more; what was sent until now is routed anew.
        self.engine.sessions.remove(self.scope, &self.held);
        self.note(None);
        mailbox.close();
        // Also a job whose sender has its place already and has not put it there yet.
        while let Some(job) = mailbox.recv().await {
            let _queued = Queued(Arc::clone(&self.queued));
            route::again(&self.engine, *job);
        }
        if !self.fenced {
            let released = timeout(RELEASE_TIME, self.engine.leases.release(&self.held)).await;
            if !matches!(released, Ok(Ok(_))) {
                tracing::debug!(lease_id = %self.held.lease, "a lease is not given back; it is free when we are gone");
            }
        }
        self.carrier.close().await;
    }

    async fn next(&mut self, mailbox: &mut mpsc::Receiver<Box<Job>>) -> Step {
        let patience = match self.held.key.kind {
            Kind::Thread | Kind::Session => IDLE_HARD,
            Kind::PromptCache | Kind::Fork | Kind::Lease => IDLE_SOFT,
        };
        tokio::select! {
            biased;
            job = mailbox.recv() => job.map_or(Step::End, Step::Run),
            () = self.retire.cancelled() => Step::End,
            () = self.engine.cancel.cancelled() => Step::End,
            // An idle socket is polled too: it answers pings, and its end is noticed before the next turn needs it.
            () = self.carrier.rest() => Step::Cold,
            () = sleep(patience) => Step::End,
        }
    }

    async fn run(&mut self, job: Box<Job>) {
        let queued = Queued(Arc::clone(&self.queued));
        let Job {
            ask,
            out,
            seat,
            running,
        } = *job;
        self.state
            .send_modify(|state| state.running = Some(out.watch()));
        // An idle session is small: what a turn needs lives as long as the turn.
        let ran = Box::pin(run::run(&self.engine, ask, &out, &mut self.carrier, seat)).await;
        self.note(self.carrier.head());
        self.state.send_modify(|state| {
            state.running = None;
            state.since = Instant::now();
        });
        match ran {
            Ran::Ended(mut ending) => {
                self.fenced = ending.lost;
                // Before the client knows: its next turn may come at once.
                drop(queued);
                ending.tell(&out);
                drop((out, running));
                if let Some(booking) = ending.booking {
                    drop(timeout(BOOKING_TIME, booking).await);
                }
            }
            Ran::Fenced(ask, seat) => {
                telemetry::fenced("begin");
                self.fenced = true;
                // Found before anything was sent: whoever owns the lease now may serve it.
                self.engine.sessions.remove(self.scope, &self.held);
                let job = Job {
                    ask,
                    out,
                    seat,
                    running,
                };
                route::again(&self.engine, job);
            }
        }
    }

    /// The socket remembers another response now, or none.
    fn note(&self, head: Option<Arc<str>>) {
        let before = self.state.borrow().head.clone();
        if before != head {
            self.engine
                .sessions
                .moved(self.scope, self.held.lease, before.as_ref(), head.as_ref());
            self.state.send_modify(|state| state.head = head);
        }
    }
}

//! Runs one turn: choose, reserve, send, relay, settle; again at another account where the table of failures says so.

mod attempt;
mod choose;
mod history;
mod settle;

use std::time::{Duration, Instant};

use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

pub(super) use self::choose::Chooser;
use self::{choose::Slot, history::History};
use super::{
    Ask, Event, Inner, Item, Reject, Stop, Token, Transport,
    affinity::affinity,
    carrier::{self, Carrier},
    log,
    relay::Sender,
};
use crate::{
    account::sticky,
    ids::{AccountId, LeaseId},
    lease::Held,
    ledger::{self, Bridge, Metered, Opened, price::Tier},
    protocol::{
        event::Terminal,
        failure::{Class, Effect, Failure, Next, Phase, Tries, decide},
        limits::Family,
    },
    routing::{Choice, Lifecycle, family_of},
    snapshot::Capture,
    telemetry,
    upstream::credential::Freshness,
};

/// How long a turn may go on after its client has left, in case it is about to complete.
const AFTERLIFE: Duration = Duration::from_secs(2);
/// What a piece of output weighs in an estimate.
const BYTES_OF_A_TOKEN: u64 = 4;
/// How long it may take to note what became of an account.
const NOTE_TIME: Duration = Duration::from_secs(2);
/// Before the first repeat at the same account; doubled for the second.
const BACKOFF: Duration = Duration::from_millis(200);

/// Where a turn runs, and how it came there.
#[derive(Clone, Debug)]
pub(super) struct Seat {
    /// The lease of the session that runs it.
    pub(super) held: Option<Held>,
    /// The lease under which the conversation is found again; it may not have a row yet.
    pub(super) lease: Option<LeaseId>,
    /// What the client is told of it.
    pub(super) token: Option<Token>,
    /// How the conversation was continued, and why.
    pub(super) bridge: Bridge,
}

/// What became of a turn.
#[derive(Debug)]
pub(super) enum Ran {
    /// It is over.
    Ended(Ending),
    /// It did not begin: the lease is not ours.
    Fenced(Box<Ask>, Seat),
}

/// The end of a turn.
#[derive(Debug, Default)]
pub(super) struct Ending {
    /// What the client still has to be sent: last, so that its next turn finds the session as this one leaves it.
    last: Vec<Item>,
    /// A statement about this turn that goes on in the background; until it has landed its lease is busy.
    pub(super) booking: Option<JoinHandle<()>>,
    /// The lease is no longer ours.
    pub(super) lost: bool,
}

impl Ending {
    /// Lets the client know.
    pub(super) fn tell(&mut self, out: &Sender<Item>) {
        for item in self.last.drain(..) {
            out.last(item);
        }
    }
}

/// Runs a turn to its end; unless it is fenced, it is settled once and yields one [`Item::End`], whatever happens.
pub(super) async fn run(
    engine: &Inner,
    ask: Box<Ask>,
    out: &Sender<Item>,
    carrier: &mut Carrier,
    seat: Seat,
) -> Ran {
    let mut turn = Turn::new(engine, ask, out, seat);
    match turn.attempts(carrier).await {
        Finish::Fenced => {
            // Whoever serves it tells the conversation anew.
            if let Some(history) = turn.history.take() {
                turn.ask.request.body = history.body;
            }
            Ran::Fenced(turn.ask, turn.seat)
        }
        finish => Ran::Ended(turn.finish(finish, carrier).await),
    }
}

/// One turn while it runs.
struct Turn<'a> {
    engine: &'a Inner,
    ask: Box<Ask>,
    out: &'a Sender<Item>,
    seat: Seat,
    /// The ledger's row, from the first attempt on.
    open: Open<'a>,
    tried: Vec<AccountId>,
    tries: Tries,
    /// What goes on about this turn in the background.
    booking: Option<JoinHandle<()>>,
    /// Where the conversation's preference is kept.
    key: Option<sticky::Key>,
    /// What came before, where upstream has to be told all of it.
    history: Option<History>,
    /// What the next turn can be rebuilt from.
    capture: Option<Capture>,
    /// The newest choice.
    choice: Option<Choice>,
    /// Its place there.
    slot: Option<Slot<'a>>,
    /// Whether the conversation is only visiting the account that serves it.
    detour: bool,
    /// The attempt that runs.
    seen: Seen,
    /// From arrival to the first visible event.
    first_event: Option<Duration>,
    head_sent: bool,
}

/// The open row of the ledger. A turn that panics, or whose task is dropped, is booked all the same.
struct Open<'a> {
    engine: &'a Inner,
    arrived: Instant,
    turn: Option<Opened>,
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Some(opened) = self.turn.take() {
            let settlement = settle::lost(self.arrived.elapsed());
            log::counted(opened.request().transport, &settlement.answer);
            let (ledger, tasks) = (self.engine.ledger.clone(), &self.engine.tasks);
            ledger.settle_until_booked(opened, settlement, tasks);
        }
    }
}

/// What an attempt has shown so far.
struct Seen {
    phase: Phase,
    response_id: Option<String>,
    /// Pieces of output that the client may have seen, about a token each.
    pieces: u64,
    /// Events held back until something visible comes: an attempt that fails before leaves no trace.
    held: Vec<Event>,
}

impl Default for Seen {
    fn default() -> Self {
        Self {
            phase: Phase::BeforeSend,
            response_id: None,
            pieces: 0,
            held: Vec::new(),
        }
    }
}

/// Upstream's own account of the end.
struct Told {
    terminal: Terminal,
    event: Event,
}

/// How an attempt ended.
enum Attempted {
    /// Upstream completed the response, early or whole; the event has not been sent on.
    Done(Told),
    /// It failed, by upstream's account or by what we saw.
    Failed(Failure, Option<Told>),
    /// It ended for a reason that no other attempt can mend.
    Over(Over),
}

/// Ends that are not upstream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    /// The client left.
    Left,
    /// The client does not read.
    Slow,
    /// The process ends.
    Stopped,
    /// Nothing can be booked.
    Unbooked,
    /// The lease is not ours; nothing was booked.
    Fenced,
    /// The request was begun on another replica.
    Begun,
}

/// How the turn ends.
enum Finish {
    Done(Told),
    Stop(Stop),
    Left,
    /// It never began.
    Fenced,
}

impl From<Over> for Finish {
    fn from(over: Over) -> Self {
        match over {
            Over::Left => Self::Left,
            Over::Slow => Self::Stop(Stop::SlowConsumer),
            Over::Stopped => Self::Stop(Stop::Cancelled),
            Over::Unbooked => Self::Stop(Stop::Unavailable),
            Over::Fenced => Self::Fenced,
            Over::Begun => Self::Stop(Stop::Rejected(Reject::OwnerUnreachable, None)),
        }
    }
}

/// Ends two seconds after the client has left, or when another request waits: until then the turn may still complete.
async fn gone(out: &Sender<Item>) {
    out.abandoned(AFTERLIFE).await;
}

impl<'a> Turn<'a> {
    fn new(engine: &'a Inner, ask: Box<Ask>, out: &'a Sender<Item>, seat: Seat) -> Self {
        let key = affinity(&ask).map(|affinity| affinity.sticky());
        let open = Open {
            engine,
            arrived: ask.arrived,
            turn: None,
        };
        Self {
            engine,
            ask,
            out,
            seat,
            open,
            booking: None,
            history: None,
            capture: None,
            tried: Vec::new(),
            tries: Tries::default(),
            key,
            choice: None,
            slot: None,
            detour: false,
            seen: Seen::default(),
            first_event: None,
            head_sent: false,
        }
    }

    /// Attempts until one completes or none can help.
    async fn attempts(&mut self, carrier: &mut Carrier) -> Finish {
        // Upstream remembers one response per socket. Anything else it is told again.
        if let Some(id) = &self.ask.request.facts.previous_response_id
            && !(carrier.remembers(id) && carrier::fits(&self.ask))
            && let Err(stop) = self.recall().await
        {
            return Finish::Stop(stop);
        }
        self.capture = self.captured(carrier);
        // A conversation that was only visiting goes home when it brings everything with it.
        let visiting = carrier.is_detour() && !self.is_anchored();
        self.detour = carrier.is_detour() && !visiting;
        let preferred = match carrier.account() {
            Some(account) if !visiting => Some(account),
            visited => self.preferred().await.or(visited),
        };
        let mut freshness = Freshness::Any;
        let mut again = None;
        // Of the failures that are not one account's limit: those say nothing of the pool.
        let mut last: Option<(Failure, Option<Told>)> = None;
        loop {
            if self.engine.cancel.is_cancelled() {
                return Over::Stopped.into();
            }
            if self.out.is_closed() {
                return Finish::Left;
            }
            // Accounts may be merged at any moment.
            let canonical = |account| self.engine.upstream.canonical(account);
            carrier.rename(canonical);
            let account = match again.take().map(canonical) {
                Some(account) => account,
                None => match self.choose(preferred).await {
                    Ok(account) => {
                        self.tries = self.tries.at_next_account();
                        freshness = Freshness::Any;
                        account
                    }
                    Err(Finish::Stop(stop)) => return Finish::Stop(last_word(last, stop)),
                    Err(over) => return over,
                },
            };
            if self.is_anchored() && carrier.account() != Some(account) {
                carrier.hang_up();
                if let Err(stop) = self.recall().await {
                    return Finish::Stop(stop);
                }
            }
            if let Err(stop) = self.retell(account).await {
                return Finish::Stop(stop);
            }
            let began = Instant::now();
            let (generation, attempted) = self.attempt(account, freshness, carrier, began).await;
            let (failure, told) = match attempted {
                Attempted::Done(told) => {
                    self.engine.upstream.lift_penalty(account);
                    self.end_attempt("completed", Some(200), Some(&told.terminal), began);
                    return Finish::Done(told);
                }
                Attempted::Over(over) => {
                    carrier.hang_up();
                    if !matches!(over, Over::Unbooked | Over::Fenced | Over::Begun) {
                        self.end_attempt("cancelled", None, None, began);
                    }
                    return over.into();
                }
                Attempted::Failed(failure, told) => (failure, told),
            };
            let phase = self.seen.phase;
            let (next, effect) = self.decide(&failure, phase);
            telemetry::attempt_failed(failure.class.name(), next_word(next));
            tracing::debug!(turn_id = %self.ask.id, account_id = %account, %failure, ?phase, ?next, "an attempt failed");
            let terminal = told.as_ref().map(|told| &told.terminal);
            self.end_attempt(failure.class.name(), failure.status, terminal, began);
            self.apply(effect, account, &failure, generation).await;
            if failure.class != Class::Request {
                carrier.hang_up();
            }
            let forgotten = self.is_anchored() && is_miss(&failure);
            if self.is_anchored() && (next != Next::Surface || forgotten) {
                // The socket that remembered is gone, or did not: upstream is told everything, on another one.
                carrier.hang_up();
                if let Err(stop) = self.recall().await {
                    return Finish::Stop(stop);
                }
            }
            let disowned = phase < Phase::Visible && self.disown(&failure, carrier);
            let next = if forgotten || disowned { RETELL } else { next };
            match next {
                Next::Surface => return Finish::Stop(Stop::upstream(failure, told)),
                Next::NextAccount => self.tried.push(account),
                Next::SameAccount {
                    after_refresh: true,
                } => {
                    self.tries.refreshed = true;
                    freshness = generation.map_or(Freshness::Any, Freshness::NotGeneration);
                    again = Some(account);
                }
                Next::SameAccount {
                    after_refresh: false,
                } => {
                    if failure.class == Class::Transient {
                        let pause = BACKOFF * 2u32.pow(u32::from(self.tries.same_account));
                        if let Err(over) = self.unless_over(sleep(pause)).await {
                            return over.into();
                        }
                    }
                    self.tries.same_account += 1;
                    again = Some(account);
                }
            }
            if !failure.is_limit() {
                last = Some((failure, told));
            }
        }
    }

    /// Runs `work` unless the client has left for good or the process ends.
    async fn unless_over<T>(&self, work: impl Future<Output = T>) -> Result<T, Over> {
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = gone(self.out) => Err(Over::Left),
            () = self.engine.cancel.cancelled() => Err(Over::Stopped),
        }
    }

    /// The table of failures, but for a client that waits for one object: a stream that breaks off is told at once.
    fn decide(&self, failure: &Failure, phase: Phase) -> (Next, Effect) {
        let (next, effect) = decide(failure, phase, self.tries);
        let collected = !self.ask.request.facts.stream && self.ask.transport == Transport::Http;
        if collected && failure.class == Class::Truncated {
            (Next::Surface, effect)
        } else {
            (next, effect)
        }
    }

    /// Ends the attempt in the ledger. What upstream reported counts; a refusal came before any work; else it is unknown.
    fn end_attempt(
        &mut self,
        class: &'static str,
        status: Option<u16>,
        terminal: Option<&Terminal>,
        began: Instant,
    ) {
        let Some(opened) = &mut self.open.turn else {
            return;
        };
        let visible_bytes = self.seen.pieces * BYTES_OF_A_TOKEN;
        let metered = match (terminal.map(|terminal| terminal.usage), self.seen.phase) {
            (Some(Some(usage)), _) => Metered::Reported(usage),
            (_, Phase::BeforeSend) => Metered::Nothing,
            (told, Phase::Sent) if told.is_some() || status.is_some() => Metered::Nothing,
            _ => Metered::Unknown { visible_bytes },
        };
        let billed = terminal.and_then(|terminal| terminal.service_tier.as_deref());
        let asked = self.ask.request.facts.service_tier.as_deref();
        opened.end(ledger::End {
            status,
            class,
            metered,
            tier: Tier::parse(billed.or(asked)),
            took: began.elapsed(),
        });
    }

    /// What a failure means for the account.
    async fn apply(
        &self,
        effect: Effect,
        account: AccountId,
        failure: &Failure,
        generation: Option<i64>,
    ) {
        let lifecycle = match effect {
            Effect::None | Effect::RefreshCredential => return,
            Effect::Penalise => return self.engine.upstream.penalise(account),
            Effect::Block { until } => {
                let reason = failure.word();
                let family = self.family(failure);
                let account = self.engine.upstream.canonical(account);
                self.engine.quota.block(account, &family, until, reason);
                return self.engine.upstream.shows_block(account, &family).await;
            }
            Effect::ReauthRequired => Lifecycle::ReauthRequired,
            Effect::Deactivate => Lifecycle::Deactivated,
        };
        let Some(generation) = generation else { return };
        let reason = failure.word();
        let noting = self
            .engine
            .accounts
            .set_lifecycle(account, lifecycle, reason, generation);
        let Ok(noted) = timeout(NOTE_TIME, noting).await else {
            return tracing::warn!(account_id = %account, "cannot note in time that an account is out of service");
        };
        if let Err(error) = noted {
            tracing::warn!(account_id = %account, %error, "cannot note that an account is out of service");
        }
    }

    /// The limit that was hit: the one upstream named, else that of the model.
    fn family(&self, failure: &Failure) -> Family {
        let of_model = || Family::new(family_of(&self.ask.request.facts.model));
        failure.family.clone().unwrap_or_else(of_model)
    }

    fn now(&self) -> i64 {
        self.engine.upstream.clock().now().as_second()
    }
}

/// What the client is told when there is nothing left to try: the pool's exhaustion, else the last failure that was no account's limit.
fn last_word(last: Option<(Failure, Option<Told>)>, otherwise: Stop) -> Stop {
    match (last, otherwise) {
        (Some((failure, told)), Stop::Nobody { .. } | Stop::Busy) => Stop::upstream(failure, told),
        (_, otherwise) => otherwise,
    }
}

impl Stop {
    fn upstream(failure: Failure, told: Option<Told>) -> Self {
        Self::Upstream(failure, told.map(|told| told.event))
    }
}

/// Upstream is told everything again, in another way; that is no fault of the account's.
const RETELL: Next = Next::SameAccount {
    after_refresh: false,
};

/// Upstream does not know the response that the turn continues.
fn is_miss(failure: &Failure) -> bool {
    failure.class == Class::PreviousResponseNotFound
}

fn next_word(next: Next) -> &'static str {
    match next {
        Next::SameAccount { .. } => "same_account",
        Next::NextAccount => "next_account",
        Next::Surface => "surface",
    }
}

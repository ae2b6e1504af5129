//! Runs one turn: choose, reserve, send, relay, settle; again at another account where the table of failures says so.

mod attempt;
mod settle;

use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};

use self::settle::affinity;
use super::{Ask, Event, Inner, Item, Stop, Transport, carrier::Carrier, relay::Sender};
use crate::{
    account::sticky,
    ids::AccountId,
    ledger::{self, Metered, Opened, price::Tier},
    protocol::{
        event::Terminal,
        failure::{Class, Effect, Failure, Next, Phase, Tries, decide},
        limits::Family,
    },
    routing::{self, Choice, Decision, Lifecycle, family_of},
    telemetry,
    upstream::credential::Freshness,
};

/// How long a turn may go on after its client has left, in case it is about to complete.
const AFTERLIFE: Duration = Duration::from_secs(2);
/// How long the preference of a conversation is waited for.
const PREFERENCE_TIME: Duration = Duration::from_secs(1);
/// What a piece of output weighs in an estimate.
const BYTES_OF_A_TOKEN: u64 = 4;
/// Before the first repeat at the same account; doubled for the second.
const BACKOFF: Duration = Duration::from_millis(200);

/// A turn that panics, or whose task is dropped, is booked all the same.
impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(opened) = self.opened.take() {
            let settlement = self.lost();
            let (ledger, tasks) = (self.engine.ledger.clone(), &self.engine.tasks);
            ledger.settle_until_booked(opened, settlement, tasks);
        }
    }
}

/// Runs a turn to its end; whatever happens, it is settled once and one [`Item::End`] is sent.
pub(super) async fn run(engine: &Inner, ask: Ask, out: &Sender<Item>, carrier: &mut Carrier) {
    let mut turn = Turn::new(engine, ask, out);
    let finish = turn.attempts(carrier).await;
    turn.finish(finish, carrier).await;
}

/// One turn while it runs.
struct Turn<'a> {
    engine: &'a Inner,
    ask: Ask,
    out: &'a Sender<Item>,
    /// The ledger's row, from the first attempt on.
    opened: Option<Opened>,
    tried: Vec<AccountId>,
    tries: Tries,
    /// Where the conversation's preference is kept.
    key: Option<sticky::Key>,
    /// The newest choice.
    choice: Option<Choice>,
    /// Whether the conversation is only visiting the account that serves it.
    detour: bool,
    /// The attempt that runs.
    seen: Seen,
    /// From arrival to the first visible event.
    first_event: Option<Duration>,
    head_sent: bool,
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
}

/// How the turn ends.
enum Finish {
    Done(Told),
    Stop(Stop),
    Left,
}

impl From<Over> for Finish {
    fn from(over: Over) -> Self {
        match over {
            Over::Left => Self::Left,
            Over::Slow => Self::Stop(Stop::SlowConsumer),
            Over::Stopped => Self::Stop(Stop::Cancelled),
            Over::Unbooked => Self::Stop(Stop::Unavailable),
        }
    }
}

/// Ends two seconds after the client has left: until then the turn may still complete.
async fn gone(out: &Sender<Item>) {
    out.closed().await;
    sleep(AFTERLIFE).await;
}

impl<'a> Turn<'a> {
    fn new(engine: &'a Inner, ask: Ask, out: &'a Sender<Item>) -> Self {
        let key = affinity(&ask);
        Self {
            engine,
            ask,
            out,
            opened: None,
            tried: Vec::new(),
            tries: Tries::default(),
            key,
            choice: None,
            detour: false,
            seen: Seen::default(),
            first_event: None,
            head_sent: false,
        }
    }

    /// Attempts until one completes or none can help.
    async fn attempts(&mut self, carrier: &mut Carrier) -> Finish {
        // Upstream remembers one response per socket. Anything else is rebuilt by the client, which has it all.
        if let Some(id) = &self.ask.request.facts.previous_response_id
            && !carrier.remembers(id)
        {
            return Finish::Stop(Stop::PreviousResponseNotFound);
        }
        let anchored = self.ask.request.facts.previous_response_id.is_some();
        self.detour = carrier.is_detour();
        let preferred = match carrier.account() {
            Some(account) => Some(account),
            None => self.preferred().await,
        };
        let mut freshness = Freshness::Any;
        let mut again = None;
        let mut last: Option<(Failure, Option<Told>)> = None;
        loop {
            if last.is_some() && self.out.is_closed() {
                return Finish::Left;
            }
            let account = match again.take() {
                Some(account) => account,
                None => match self.choose(preferred) {
                    Ok(account) => {
                        self.tries = Tries {
                            accounts: self.tries.accounts + 1,
                            ..Tries::default()
                        };
                        freshness = Freshness::Any;
                        account
                    }
                    Err(stop) => return Finish::Stop(last_word(last, stop)),
                },
            };
            if anchored && carrier.account() != Some(account) {
                carrier.hang_up();
                return Finish::Stop(Stop::PreviousResponseNotFound);
            }
            let began = Instant::now();
            let (generation, attempted) = self.attempt(account, freshness, carrier, began).await;
            let (failure, told) = match attempted {
                Attempted::Done(told) => {
                    self.end_attempt("completed", Some(200), Some(&told.terminal), began);
                    return Finish::Done(told);
                }
                Attempted::Over(over) => {
                    carrier.hang_up();
                    if over != Over::Unbooked {
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
            if anchored && next != Next::Surface {
                // The socket that remembered is gone; the client resends everything, to any account.
                return Finish::Stop(Stop::PreviousResponseNotFound);
            }
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
            last = Some((failure, told));
        }
    }

    /// The account that served the conversation before.
    async fn preferred(&self) -> Option<AccountId> {
        let key = self.key?;
        let scope = self.ask.caller.scope();
        let asked = self.engine.sticky.get(scope, &key);
        timeout(PREFERENCE_TIME, asked).await.ok().flatten()
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

    /// The account for the next attempt.
    fn choose(&mut self, preferred: Option<AccountId>) -> Result<AccountId, Stop> {
        let view = self.engine.upstream.view();
        let model = &self.ask.request.facts.model;
        let ask = routing::Ask {
            now: self.now(),
            model,
            family: family_of(model),
            sticky: preferred,
            tried: &self.tried,
            allowed: self.ask.caller.accounts(),
        };
        match routing::select(&view, &ask, &mut rand::rng()) {
            Decision::Use(choice) => {
                let account = choice.account;
                self.detour |= choice.sticky == routing::Sticky::Detour;
                self.choice = Some(choice);
                Ok(account)
            }
            Decision::Exhausted { resets_at, .. } => Err(Stop::Exhausted { resets_at }),
            Decision::Nobody { explanation } => {
                // Accounts that failed in this turn may all be at their limits by now: then that is what the client should read.
                let ask = routing::Ask { tried: &[], ..ask };
                match routing::select(&view, &ask, &mut rand::rng()) {
                    Decision::Exhausted { resets_at, .. } => Err(Stop::Exhausted { resets_at }),
                    _ => Err(Stop::Nobody {
                        why: explanation.to_string(),
                    }),
                }
            }
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
        let Some(opened) = &mut self.opened else {
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
            Effect::None | Effect::RefreshCredential | Effect::Penalise => return,
            Effect::Block { until } => {
                let reason = failure.word();
                let family = self.family(failure);
                self.engine.quota.block(account, &family, until, reason);
                return self.engine.upstream.shows_block(account, &family).await;
            }
            Effect::ReauthRequired => Lifecycle::ReauthRequired,
            Effect::Deactivate => Lifecycle::Deactivated,
        };
        let Some(generation) = generation else { return };
        let reason = failure.word();
        if let Err(error) = self
            .engine
            .accounts
            .set_lifecycle(account, lifecycle, reason, generation)
            .await
        {
            tracing::warn!(account_id = %account, %error, "cannot note that an account is out of service");
        }
    }

    /// The limit that was hit: the one upstream named, else that of the model.
    fn family(&self, failure: &Failure) -> Family {
        if failure.family == Family::CODEX {
            Family::new(family_of(&self.ask.request.facts.model))
        } else {
            failure.family.clone()
        }
    }

    fn now(&self) -> i64 {
        self.engine.upstream.clock().now().as_second()
    }
}

/// What the client is told when there is nothing left to try: the pool's exhaustion, else the last real failure.
fn last_word(last: Option<(Failure, Option<Told>)>, otherwise: Stop) -> Stop {
    match (last, otherwise) {
        (Some((failure, told)), Stop::Nobody { .. }) => Stop::upstream(failure, told),
        (_, otherwise) => otherwise,
    }
}

impl Stop {
    fn upstream(failure: Failure, told: Option<Told>) -> Self {
        Self::Upstream(failure, told.map(|told| told.event))
    }
}

fn next_word(next: Next) -> &'static str {
    match next {
        Next::SameAccount { .. } => "same_account",
        Next::NextAccount => "next_account",
        Next::Surface => "surface",
    }
}

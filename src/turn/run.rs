//! Runs one turn: choose, reserve, send, relay, settle; again at another account where the table of failures says so.

mod attempt;
mod settle;

use std::time::{Duration, Instant};

use tokio::time::sleep;

use self::settle::affinity;
use super::{Ask, Event, Inner, Item, Stop, Transport, carrier::Carrier, relay::Sender};
use crate::{
    account::sticky,
    ids::AccountId,
    ledger::{self, Metered, Opened, price::Tier},
    protocol::{
        event::Terminal,
        failure::{Class, Effect, Failure, Next, Phase, Tries, decide},
    },
    routing::{self, Choice, Decision, Lifecycle, family_of},
    telemetry,
    upstream::credential::Freshness,
};

/// Before the first repeat at the same account; doubled for the second.
const BACKOFF: Duration = Duration::from_millis(200);

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
    /// The attempt that runs.
    seen: Seen,
    /// From arrival to the first visible event.
    first_event: Option<Duration>,
    head_sent: bool,
}

/// What an attempt has shown so far.
#[derive(Default)]
struct Seen {
    phase: Option<Phase>,
    response_id: Option<String>,
    /// Bytes of events that the client may have seen.
    bytes: u64,
    /// Events held back until something visible comes: an attempt that fails before leaves no trace.
    held: Vec<Event>,
}

impl Seen {
    fn phase(&self) -> Phase {
        self.phase.unwrap_or(Phase::BeforeSend)
    }
}

/// How an attempt ended.
enum Attempted {
    /// Upstream completed the response, early or whole; the event has not been sent on.
    Done(Terminal, Event),
    /// It failed. The event is upstream's own account of it.
    Failed(Failure, Option<Event>),
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
    Done(Terminal, Event),
    /// Upstream's own terminal event, after something visible.
    FailedVisibly(Failure, Event),
    Stop(Stop),
    Left,
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
        let preferred = match (carrier.account(), &self.key) {
            (Some(account), _) => Some(account),
            (None, Some(key)) => self.engine.sticky.get(self.ask.caller.scope(), key).await,
            (None, None) => None,
        };
        let anchored = self.ask.request.facts.previous_response_id.is_some();
        let mut freshness = Freshness::Any;
        let mut again = None;
        let mut last: Option<(Failure, Option<Event>)> = None;
        loop {
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
                    Err(stop) => return Finish::Stop(self.last_word(last, stop)),
                },
            };
            if anchored && carrier.account() != Some(account) {
                carrier.hang_up();
                return Finish::Stop(Stop::PreviousResponseNotFound);
            }
            let began = Instant::now();
            let (generation, attempted) = self.attempt(account, freshness, carrier, began).await;
            let (failure, event) = match attempted {
                Attempted::Done(terminal, event) => {
                    self.close_attempt(
                        "completed",
                        Some(200),
                        metered(&terminal, self.seen.bytes),
                        &terminal,
                        began,
                    );
                    return Finish::Done(terminal, event);
                }
                Attempted::Over(over) => {
                    carrier.hang_up();
                    if self.opened.is_some() && over != Over::Unbooked {
                        self.end_attempt("cancelled", None, self.unknown(), Tier::Standard, began);
                    }
                    return match over {
                        Over::Left => Finish::Left,
                        Over::Slow => Finish::Stop(Stop::SlowConsumer),
                        Over::Stopped => Finish::Stop(Stop::Cancelled),
                        Over::Unbooked => Finish::Stop(Stop::Unavailable),
                    };
                }
                Attempted::Failed(failure, event) => (failure, event),
            };
            let phase = self.seen.phase();
            let (next, effect) = self.decide(&failure, phase);
            telemetry::attempt_failed(failure.class.name(), next_word(next));
            tracing::debug!(turn_id = %self.ask.id, account_id = %account, %failure, ?phase, ?next, "an attempt failed");
            let usage = event
                .as_ref()
                .map(|event| Terminal::parse(event.kind(), &event.data()))
                .and_then(|terminal| terminal.usage);
            let metered = match (usage, phase) {
                (Some(usage), _) => Metered::Reported(usage),
                (None, Phase::BeforeSend) => Metered::Nothing,
                // A refusal with a status came before any work; a cut or silence did not say.
                (None, Phase::Sent) if failure.status.is_some() || event.is_some() => {
                    Metered::Nothing
                }
                (None, _) => self.unknown(),
            };
            self.end_attempt(
                failure.class.name(),
                failure.status,
                metered,
                Tier::Standard,
                began,
            );
            self.apply(effect, account, &failure, generation).await;
            if failure.class != Class::Request {
                carrier.hang_up();
            }
            if phase == Phase::Visible {
                return match event {
                    Some(event) => Finish::FailedVisibly(failure, event),
                    None => Finish::Stop(Stop::Upstream(failure, None)),
                };
            }
            if anchored && next != Next::Surface {
                // The socket that remembered is gone; the client resends everything, to any account.
                return Finish::Stop(Stop::PreviousResponseNotFound);
            }
            match next {
                Next::Surface => {
                    return Finish::Stop(self.last_word(Some((failure, event)), Stop::Cancelled));
                }
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
                        let pause = sleep(BACKOFF * 2u32.pow(u32::from(self.tries.same_account)));
                        tokio::select! {
                            () = pause => {}
                            () = self.out.closed() => return Finish::Left,
                            () = self.engine.cancel.cancelled() => return Finish::Stop(Stop::Cancelled),
                        }
                    }
                    self.tries.same_account += 1;
                    again = Some(account);
                }
            }
            last = Some((failure, event));
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
            now: self.engine.upstream.clock().now().as_second(),
            model,
            family: family_of(model),
            sticky: preferred,
            tried: &self.tried,
            allowed: self.ask.caller.accounts(),
        };
        match routing::select(&view, &ask, &mut rand::rng()) {
            Decision::Use(choice) => {
                let account = choice.account;
                self.choice = Some(choice);
                Ok(account)
            }
            Decision::Exhausted { resets_at, .. } => Err(Stop::Exhausted { resets_at }),
            Decision::Nobody { explanation } => {
                // Accounts that failed in this turn may all be at their limits by now: then that is what the client should read.
                match routing::select(&view, &routing::Ask { tried: &[], ..ask }, &mut rand::rng())
                {
                    Decision::Exhausted { resets_at, .. } => Err(Stop::Exhausted { resets_at }),
                    _ => Err(Stop::Nobody {
                        why: explanation.to_string(),
                    }),
                }
            }
        }
    }

    /// What the client is told when there is nothing left to try: the pool's exhaustion, else the last real failure.
    fn last_word(&self, last: Option<(Failure, Option<Event>)>, otherwise: Stop) -> Stop {
        match (last, otherwise) {
            (_, exhausted @ Stop::Exhausted { .. }) => exhausted,
            (Some((failure, event)), _) => Stop::Upstream(failure, event),
            (None, otherwise) => otherwise,
        }
    }

    fn close_attempt(
        &mut self,
        class: &'static str,
        status: Option<u16>,
        metered: Metered,
        terminal: &Terminal,
        began: Instant,
    ) {
        let tier = Tier::parse(
            terminal
                .service_tier
                .as_deref()
                .or(self.ask.request.facts.service_tier.as_deref()),
        );
        self.end_attempt(class, status, metered, tier, began);
    }

    fn end_attempt(
        &mut self,
        class: &'static str,
        status: Option<u16>,
        metered: Metered,
        tier: Tier,
        began: Instant,
    ) {
        if let Some(opened) = &mut self.opened {
            opened.end(ledger::End {
                status,
                class,
                metered,
                tier,
                took: began.elapsed(),
            });
        }
    }

    fn unknown(&self) -> Metered {
        match self.seen.phase() {
            Phase::BeforeSend => Metered::Nothing,
            _ => Metered::Unknown {
                visible_bytes: self.seen.bytes,
            },
        }
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
                let reason = failure.code.as_deref().unwrap_or(failure.class.name());
                self.engine
                    .quota
                    .block(account, &failure.family, until, reason);
                return self.engine.upstream.shows_block(account).await;
            }
            Effect::ReauthRequired => Lifecycle::ReauthRequired,
            Effect::Deactivate => Lifecycle::Deactivated,
        };
        let Some(generation) = generation else { return };
        let reason = failure.code.as_deref().unwrap_or(failure.class.name());
        if let Err(error) = self
            .engine
            .accounts
            .set_lifecycle(account, lifecycle, reason, generation)
            .await
        {
            tracing::warn!(account_id = %account, %error, "cannot note that an account is out of service");
        }
    }

    fn now(&self) -> i64 {
        self.engine.upstream.clock().now().as_second()
    }
}

fn metered(terminal: &Terminal, visible_bytes: u64) -> Metered {
    terminal
        .usage
        .map_or(Metered::Unknown { visible_bytes }, Metered::Reported)
}

fn next_word(next: Next) -> &'static str {
    match next {
        Next::SameAccount { .. } => "same_account",
        Next::NextAccount => "next_account",
        Next::Surface => "surface",
    }
}

//! Runs one turn: choose, reserve, send, relay, settle; again at another account where the table of failures says so.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use http::HeaderMap;
use serde_json::Value;
use tokio::time::{sleep, timeout};

use super::{
    Ask, End, Event, Inner, Item, Stop,
    carrier::{Carrier, Source, Unsent},
    relay::{Lost, Sender},
};
use crate::{
    account::sticky,
    db,
    ids::AccountId,
    ledger::{self, Answer, Metered, Opened, Opening, Outcome, Settlement, Try, price::Tier},
    protocol::{
        event::{self, Kind, Terminal},
        failure::{Class, Deadline, Effect, Failure, Next, Phase, Tries, decide},
        headers, limits,
    },
    quota,
    routing::{self, Choice, Decision, Lifecycle, family_of},
    telemetry,
    upstream::{
        credential::{CredentialError, Freshness},
        deadline,
    },
};

/// How long a turn may go on after its client has left, in case it is about to complete.
const AFTERLIFE: Duration = Duration::from_secs(2);
/// How long the terminal event waits for its settlement.
const SETTLE_TIME: Duration = Duration::from_secs(2);
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
                        self.tries = Tries { accounts: self.tries.accounts + 1, ..Tries::default() };
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
                    self.close_attempt("completed", Some(200), metered(&terminal, self.seen.bytes), &terminal, began);
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
            let (next, effect) = decide(&failure, phase, self.tries);
            telemetry::attempt_failed(failure.class.name(), next_word(next));
            tracing::debug!(turn_id = %self.ask.id, account_id = %account, %failure, ?phase, ?next, "an attempt failed");
            let usage = event.as_ref().map(|event| Terminal::parse(event.kind(), &event.data())).and_then(|terminal| terminal.usage);
            let metered = match (usage, phase) {
                (Some(usage), _) => Metered::Reported(usage),
                (None, Phase::BeforeSend) => Metered::Nothing,
                // A refusal with a status came before any work; a cut or silence did not say.
                (None, Phase::Sent) if failure.status.is_some() || event.is_some() => Metered::Nothing,
                (None, _) => self.unknown(),
            };
            self.end_attempt(failure.class.name(), failure.status, metered, Tier::Standard, began);
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
                Next::Surface => return Finish::Stop(self.last_word(Some((failure, event)), Stop::Cancelled)),
                Next::NextAccount => self.tried.push(account),
                Next::SameAccount { after_refresh: true } => {
                    self.tries.refreshed = true;
                    freshness = generation.map_or(Freshness::Any, Freshness::NotGeneration);
                    again = Some(account);
                }
                Next::SameAccount { after_refresh: false } => {
                    if failure.class == Class::Transient {
                        sleep(BACKOFF * 2u32.pow(u32::from(self.tries.same_account))).await;
                    }
                    self.tries.same_account += 1;
                    again = Some(account);
                }
            }
            last = Some((failure, event));
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
                match routing::select(&view, &routing::Ask { tried: &[], ..ask }, &mut rand::rng()) {
                    Decision::Exhausted { resets_at, .. } => Err(Stop::Exhausted { resets_at }),
                    _ => Err(Stop::Nobody { why: explanation.to_string() }),
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

    /// One attempt at one account. Yields the credential's generation, if it came so far.
    async fn attempt(
        &mut self,
        account: AccountId,
        freshness: Freshness,
        carrier: &mut Carrier,
        began: Instant,
    ) -> (Option<i64>, Attempted) {
        self.seen = Seen::default();
        let engine = self.engine;
        let credential = engine.upstream.credentials().fresh(account, freshness);
        let (credential, reserved) = tokio::join!(credential, self.reserve(account, carrier.transport()));
        if let Err(over) = reserved {
            return (None, Attempted::Over(over));
        }
        let credential = match credential {
            Ok(credential) => credential,
            Err(error) => return (None, Attempted::Failed(self.no_credential(&error), None)),
        };
        let generation = Some(credential.generation);
        let _slot = self.slot(account);
        let sending = carrier.send(&engine.upstream, account, &credential, &self.ask);
        let sent = tokio::select! {
            sent = sending => sent,
            () = self.out.closed() => return (generation, Attempted::Over(Over::Left)),
            () = engine.cancel.cancelled() => return (generation, Attempted::Over(Over::Stopped)),
        };
        let source = match sent {
            Ok(source) => source,
            Err(Unsent::Nothing(failure)) => return (generation, Attempted::Failed(failure, None)),
            Err(Unsent::Perhaps(failure)) => {
                self.seen.phase = (failure.class != Class::Network).then_some(Phase::Sent);
                return (generation, Attempted::Failed(failure, None));
            }
        };
        self.seen.phase = Some(Phase::Sent);
        (generation, self.relay(source, account, began).await)
    }

    /// Records the attempt in the ledger, before anything of it is sent.
    async fn reserve(&mut self, account: AccountId, transport: &'static str) -> Result<(), Over> {
        let next = Try { account, transport, request_bytes: self.ask.request.body.len() as u64 };
        if let Some(opened) = &mut self.opened {
            return match self.engine.ledger.attempt(opened, next).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(Over::Unbooked),
                Err(error) => Err(unbooked(&error)),
            };
        }
        let request = self.ask.record();
        let facts = &self.ask.request.facts;
        let client_turn = facts.client.turn_id.clone().filter(|id| !id.is_empty() && facts.generate);
        match self.engine.ledger.open(Opening { request: request.clone(), client_turn, first: next }).await {
            Ok(opened) => {
                self.opened = Some(opened);
                Ok(())
            }
            Err(error) => {
                self.engine.ledger.clone().withdraw(&request, &self.engine.tasks);
                Err(unbooked(&error))
            }
        }
    }

    /// Relays events until the attempt ends.
    async fn relay(&mut self, mut source: Source<'_>, account: AccountId, began: Instant) -> Attempted {
        let mut quiet = Quiet::new(deadline::FIRST_EVENT, Deadline::FirstEvent);
        let mut leaving: Option<Instant> = None;
        loop {
            let next = match source.ready() {
                Ok(Some(event)) => Ok(Some(event)),
                Err(failure) => Err(failure),
                Ok(None) => {
                    let until = leaving.map_or_else(|| quiet.at(), |left| left + AFTERLIFE);
                    tokio::select! {
                        biased;
                        next = source.next() => next,
                        () = quiet.wait(until) => match leaving {
                            Some(_) => return Attempted::Over(Over::Left),
                            None => Err(Failure::timeout(quiet.name, self.now())),
                        },
                        () = self.out.closed(), if leaving.is_none() => {
                            leaving = Some(Instant::now());
                            continue;
                        }
                        () = self.engine.cancel.cancelled() => return Attempted::Over(Over::Stopped),
                    }
                }
            };
            let event = match next {
                Ok(Some(event)) => event,
                Ok(None) => return Attempted::Failed(Failure::truncated(self.now()), None),
                Err(failure) => return Attempted::Failed(failure, None),
            };
            quiet.heard();
            match self.take(event, account, began, source.headers()).await {
                Ok(None) => {}
                Ok(Some(ended)) => return ended,
                Err(Lost::Gone) => leaving = leaving.or_else(|| Some(Instant::now())),
                Err(Lost::Slow) => return Attempted::Over(Over::Slow),
            }
        }
    }

    /// Takes one event: sends it on, holds it back, or ends the attempt with it.
    async fn take(
        &mut self,
        event: Event,
        account: AccountId,
        began: Instant,
        headers: &HeaderMap,
    ) -> Result<Option<Attempted>, Lost> {
        match event.kind() {
            Kind::Completed | Kind::Incomplete => {
                let terminal = Terminal::parse(event.kind(), &event.data());
                self.seen.bytes += event.len() as u64;
                self.show(headers).await?;
                return Ok(Some(Attempted::Done(terminal, event)));
            }
            Kind::Failed | Kind::Error => {
                let terminal = Terminal::parse(event.kind(), &event.data());
                let error = terminal.error.unwrap_or_default();
                for observation in limits::from_headers(&error.headers, self.now()) {
                    self.engine.quota.observe(account, &observation, began, quota::Source::Error);
                }
                return Ok(Some(Attempted::Failed(Failure::from_event(&error, self.now()), Some(event))));
            }
            Kind::Created => {
                self.seen.response_id = event::Created::parse(&event.data()).and_then(|created| created.response_id);
                self.seen.phase = Some(self.seen.phase().after(Kind::Created));
                self.hold_or_send(event).await
            }
            Kind::InProgress => {
                self.seen.phase = Some(self.seen.phase().after(Kind::InProgress));
                self.hold_or_send(event).await
            }
            Kind::RateLimits => {
                for observation in limits::from_event(&event.data(), self.now()) {
                    self.engine.quota.observe(account, &observation, began, quota::Source::Event);
                }
                self.hold_or_send(Event::from_json(self.pool_event())).await
            }
            Kind::Metadata => match headers::metadata_to_client(&event.data(), &self.ask.request.facts.model) {
                Some(json) => self.hold_or_send(Event::from_json(json)).await,
                None => Ok(()),
            },
            Kind::Done => Ok(()),
            // Upstream's own keep-alives; ours are made where the stream is encoded.
            Kind::Codex if !self.head_sent => Ok(()),
            Kind::Unknown if event.data().is_empty() => Ok(()),
            _ => {
                if self.first_event.is_none() {
                    self.first_event = Some(self.ask.arrived.elapsed());
                }
                self.seen.phase = Some(self.seen.phase().after(event.kind()));
                self.seen.bytes += event.len() as u64;
                self.show(headers).await?;
                self.out.send(Item::Event(event)).await
            }
        }
        .map(|()| None)
    }

    /// From here on the client has seen this attempt: the head and what was held go out, the body is no longer needed.
    async fn show(&mut self, headers: &HeaderMap) -> Result<(), Lost> {
        if !self.head_sent {
            self.head_sent = true;
            self.ask.request.body = bytes::Bytes::new();
            self.ask.held = super::Held::default();
            self.out.send(Item::Head(headers::to_client(headers, &self.ask.request.facts.model))).await?;
        }
        for event in std::mem::take(&mut self.seen.held) {
            self.out.send(Item::Event(event)).await?;
        }
        Ok(())
    }

    async fn hold_or_send(&mut self, event: Event) -> Result<(), Lost> {
        if self.head_sent {
            return self.out.send(Item::Event(event)).await;
        }
        self.seen.held.push(event);
        Ok(())
    }

    /// Settles the turn, then lets the client know of its end.
    async fn finish(mut self, finish: Finish, carrier: &mut Carrier) {
        let (outcome, status, reason, code) = match &finish {
            Finish::Done(terminal, _) if terminal.kind == Kind::Completed => (Outcome::Completed, 200, None, None),
            Finish::Done(..) => (Outcome::Incomplete, 200, None, None),
            Finish::FailedVisibly(failure, _) => (Outcome::Failed, 200, Some(failure.class.name()), failure.code.clone()),
            Finish::Left => (Outcome::Cancelled, 499, Some("client_gone"), None),
            Finish::Stop(stop) => stop.record(),
        };
        let response_id = match &finish {
            Finish::Done(terminal, _) => terminal.response_id.clone().or_else(|| self.seen.response_id.clone()),
            _ => self.seen.response_id.clone(),
        };
        let completed = outcome == Outcome::Completed;
        let sticky = self.preference().filter(|_| completed && self.ask.request.facts.generate);
        let total = self.ask.arrived.elapsed();
        telemetry::turn_ended(self.ask.transport.as_str(), outcome.as_str(), total, self.first_event);
        let answer = Answer {
            outcome,
            status,
            reason,
            error_code: code.map(Into::into),
            first_event: self.first_event,
            total,
            explanation: self.choice.as_ref().map(|choice| serde_json::to_value(&choice.explanation).unwrap_or(Value::Null)),
        };
        if let (Some(preference), Some(key)) = (sticky, self.key) {
            self.engine.sticky.put(self.ask.caller.scope(), &key, preference.account);
        }
        self.log(&answer);
        match self.opened.take() {
            None => self.engine.ledger.refuse(&self.ask.record(), &answer),
            Some(opened) => {
                let settlement = Settlement { answer, response_id: response_id.clone(), sticky };
                let settled = timeout(SETTLE_TIME, self.engine.ledger.settle(&opened, &settlement)).await;
                if !matches!(settled, Ok(Ok(_))) {
                    self.engine.ledger.clone().settle_until_booked(opened, settlement, &self.engine.tasks);
                }
            }
        }
        if completed {
            carrier.completed(response_id.as_deref());
        }
        // The client may be gone; then nobody needs to know.
        let end = match finish {
            Finish::Done(_, event) | Finish::FailedVisibly(_, event) => {
                let _ = self.out.send(Item::Event(event)).await;
                End::Complete
            }
            Finish::Stop(stop) => End::Failed(Box::new(stop)),
            Finish::Left => return,
        };
        let _ = self.out.send(Item::End(end)).await;
    }

    /// One line per turn.
    fn log(&self, answer: &Answer) {
        tracing::info!(
            turn_id = %self.ask.id,
            api_key_id = self.ask.caller.api_key().map(tracing::field::display),
            account_id = self.choice.as_ref().map(|choice| tracing::field::display(choice.account)),
            model = self.ask.request.facts.model,
            route = self.ask.route,
            transport = self.ask.transport.as_str(),
            outcome = answer.outcome.as_str(),
            reason = answer.reason,
            attempts = self.opened.as_ref().map_or(0, |opened| opened.attempts().count()),
            first_event_ms = answer.first_event.map(|time| time.as_millis()),
            total_ms = answer.total.as_millis(),
            "turn"
        );
    }

    /// What the ledger writes as the conversation's preference.
    fn preference(&self) -> Option<ledger::Sticky> {
        let choice = self.choice.as_ref().filter(|choice| choice.sticky.rewrites())?;
        let key = self.key?;
        Some(ledger::Sticky { kind: key.kind.as_str(), hash: key.hash, account: choice.account, ttl: key.kind.ttl() })
    }

    fn close_attempt(&mut self, class: &'static str, status: Option<u16>, metered: Metered, terminal: &Terminal, began: Instant) {
        let tier = Tier::parse(terminal.service_tier.as_deref().or(self.ask.request.facts.service_tier.as_deref()));
        self.end_attempt(class, status, metered, tier, began);
    }

    fn end_attempt(&mut self, class: &'static str, status: Option<u16>, metered: Metered, tier: Tier, began: Instant) {
        if let Some(opened) = &mut self.opened {
            opened.end(ledger::End { status, class, metered, tier, took: began.elapsed() });
        }
    }

    fn unknown(&self) -> Metered {
        match self.seen.phase() {
            Phase::BeforeSend => Metered::Nothing,
            _ => Metered::Unknown { visible_bytes: self.seen.bytes },
        }
    }

    /// What a failure means for the account.
    async fn apply(&self, effect: Effect, account: AccountId, failure: &Failure, generation: Option<i64>) {
        let lifecycle = match effect {
            Effect::None | Effect::RefreshCredential | Effect::Penalise => return,
            Effect::Block { until } => {
                let reason = failure.code.as_deref().unwrap_or(failure.class.name());
                self.engine.quota.block(account, &failure.family, until, reason);
                return self.engine.upstream.shows_block(account).await;
            }
            Effect::ReauthRequired => Lifecycle::ReauthRequired,
            Effect::Deactivate => Lifecycle::Deactivated,
        };
        let Some(generation) = generation else { return };
        let reason = failure.code.as_deref().unwrap_or(failure.class.name());
        if let Err(error) = self.engine.accounts.set_lifecycle(account, lifecycle, reason, generation).await {
            tracing::warn!(account_id = %account, %error, "cannot note that an account is out of service");
        }
    }

    /// The pool's limits in the form in which Codex reads one account's.
    fn pool_event(&self) -> bytes::Bytes {
        quota::pool_view(&self.engine.upstream.view(), self.now(), self.ask.caller.accounts()).event()
    }

    /// A credential that cannot be had is upstream's refusal in other words.
    fn no_credential(&self, error: &CredentialError) -> Failure {
        let class = if error.is_final() { Class::ReauthRequired } else { Class::Timeout(Deadline::Connect) };
        Failure::local(class, "No fresh credential for an account", self.now())
    }

    fn slot(&self, account: AccountId) -> Option<Slot> {
        let view = self.engine.upstream.view();
        let index = view.accounts.binary_search_by_key(&account, |account| account.id).ok()?;
        Some(Slot::take(&view.accounts[index].in_flight))
    }

    fn now(&self) -> i64 {
        self.engine.upstream.clock().now().as_second()
    }
}

impl Stop {
    /// How the ledger and the request log describe it.
    fn record(&self) -> (Outcome, u16, Option<&'static str>, Option<String>) {
        match self {
            Self::Upstream(failure, _) => {
                (Outcome::Failed, failure.status.unwrap_or(502), Some(failure.class.name()), failure.code.clone())
            }
            Self::Exhausted { .. } => (Outcome::Refused, 429, Some("exhausted"), Some("usage_limit_reached".into())),
            Self::Nobody { .. } => (Outcome::Refused, 503, Some("no_accounts"), Some("no_accounts".into())),
            Self::PreviousResponseNotFound => {
                (Outcome::Refused, 400, Some("previous_response_not_found"), Some("previous_response_not_found".into()))
            }
            Self::Unavailable => (Outcome::Refused, 503, Some("unbooked"), Some("continuity_unavailable".into())),
            Self::SlowConsumer => (Outcome::SlowConsumer, 200, Some("slow_consumer"), Some("slow_consumer".into())),
            Self::Cancelled => (Outcome::Cancelled, 503, Some("shutdown"), Some("cancelled".into())),
        }
    }
}

/// A turn in flight at an account.
struct Slot(Arc<AtomicU32>);

impl Slot {
    fn take(counter: &Arc<AtomicU32>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counter))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The deadline of silence. Events only note the time; the timer is set anew when it fires early.
struct Quiet {
    limit: Duration,
    name: Deadline,
    since: Instant,
}

impl Quiet {
    fn new(limit: Duration, name: Deadline) -> Self {
        Self { limit, name, since: Instant::now() }
    }

    fn heard(&mut self) {
        self.since = Instant::now();
        (self.limit, self.name) = (deadline::IDLE, Deadline::Idle);
    }

    fn at(&self) -> Instant {
        self.since + self.limit
    }

    async fn wait(&self, until: Instant) {
        tokio::time::sleep_until(until.into()).await;
    }
}

/// Where the conversation's preference is kept: by thread, else by session, else by prompt cache key.
fn affinity(ask: &Ask) -> Option<sticky::Key> {
    let facts = &ask.request.facts;
    let header = |name: &str| ask.headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let thread = header("thread-id").or_else(|| facts.client.thread_id.clone());
    let session = || {
        let named = ["session-id", "session_id", "x-session-id"].into_iter().find_map(header);
        named.or_else(|| facts.client.session_id.clone())
    };
    let key = |kind, value: Option<String>| value.filter(|value| !value.is_empty()).map(|value| sticky::Key::new(kind, &value));
    key(sticky::Kind::Thread, thread)
        .or_else(|| key(sticky::Kind::Session, session()))
        .or_else(|| key(sticky::Kind::PromptCache, facts.prompt_cache_key.clone()))
}

fn metered(terminal: &Terminal, visible_bytes: u64) -> Metered {
    terminal.usage.map_or(Metered::Unknown { visible_bytes }, Metered::Reported)
}

fn next_word(next: Next) -> &'static str {
    match next {
        Next::SameAccount { .. } => "same_account",
        Next::NextAccount => "next_account",
        Next::Surface => "surface",
    }
}

fn unbooked(error: &db::Error) -> Over {
    tracing::warn!(%error, "a turn cannot be booked, so it is not sent");
    Over::Unbooked
}

//! One attempt of a turn at one account: reserve, send, relay.

use std::{
    pin::Pin,
    time::{Duration, Instant},
};

use http::HeaderMap;

use tokio::time::{Instant as Moment, Sleep, sleep_until, timeout};

use super::{Attempted, Over, Seen, Told, Turn, gone};
use crate::{
    db,
    ids::AccountId,
    ledger::{Fence, NotOpened, Opened, Opening, Try},
    protocol::{
        event::{self, ErrorBody, Kind, Terminal},
        failure::{Class, Deadline, Failure, Phase},
        headers, limits,
    },
    quota, telemetry,
    turn::{
        Event, Held, Item,
        carrier::{Carrier, Source},
        relay::Lost,
    },
    upstream::{
        Unsent,
        credential::{Credential, CredentialError, Freshness},
        deadline,
    },
};

/// How long a reservation may take.
const RESERVE_TIME: Duration = Duration::from_secs(5);
/// How long Postgres may take before a turn that can begins without it.
const ANSWER_TIME: Duration = Duration::from_secs(2);

impl Turn<'_> {
    /// One attempt at one account. Yields the credential's generation, if it came so far.
    pub(super) async fn attempt(
        &mut self,
        account: AccountId,
        freshness: Freshness,
        carrier: &mut Carrier,
        began: Instant,
    ) -> (Option<i64>, Attempted) {
        self.seen = Seen::default();
        let (engine, out) = (self.engine, self.out);
        let credential = async {
            let fresh = engine.upstream.credentials().fresh(account, freshness);
            tokio::select! {
                biased;
                fresh = fresh => Ok(fresh),
                () = gone(out) => Err(Over::Left),
                () = engine.cancel.cancelled() => Err(Over::Stopped),
            }
        };
        // The reservation is never abandoned half-way: it lands, or it is taken back.
        let (credential, reserved) = tokio::join!(
            credential,
            self.reserve(account, carrier.transport(&self.ask))
        );
        let credential = match (reserved, credential) {
            (Err(over), _) | (Ok(()), Err(over)) => return (None, Attempted::Over(over)),
            (Ok(()), Ok(Err(error))) => {
                return (None, Attempted::Failed(self.no_credential(&error), None));
            }
            (Ok(()), Ok(Ok(credential))) => credential,
        };
        let generation = Some(credential.generation);
        let attempted = self.exchange(account, &credential, carrier, began).await;
        (generation, attempted)
    }

    /// Sends the turn and relays the answer.
    async fn exchange(
        &mut self,
        account: AccountId,
        credential: &Credential,
        carrier: &mut Carrier,
        began: Instant,
    ) -> Attempted {
        let upstream = &self.engine.upstream;
        let opening = carrier.open(upstream, account, credential, &self.ask, self.detour, began);
        match self.unless_over(opening).await {
            Err(over) => return Attempted::Over(over),
            Ok(Err(failure)) => return Attempted::Failed(failure, None),
            Ok(Ok(())) => {}
        }
        // Whoever left while the turn waited for its place pays for nothing.
        if self.out.is_closed() {
            return Attempted::Over(Over::Left);
        }
        // From here on upstream may have it, unless it is certain that it has not.
        self.seen.phase = Phase::Sent;
        let sending = carrier.send(upstream, account, credential, &self.ask, began);
        match self.unless_over(sending).await {
            Err(over) => Attempted::Over(over),
            Ok(Ok(source)) => self.relay(source, account, began).await,
            Ok(Err(Unsent::Nothing(failure))) => {
                self.seen.phase = Phase::BeforeSend;
                Attempted::Failed(failure, None)
            }
            Ok(Err(Unsent::Perhaps(failure))) => Attempted::Failed(failure, None),
        }
    }

    /// Records the attempt in the ledger, before anything of it is sent.
    async fn reserve(&mut self, account: AccountId, transport: &'static str) -> Result<(), Over> {
        let next = Try {
            account,
            transport,
            request_bytes: (self.ask.request.body.len() as u64)
                .saturating_sub(self.ask.request.facts.inline_bytes),
        };
        if let Some(opened) = &mut self.open.turn {
            let attempt = self.engine.ledger.attempt(opened, next);
            return match timeout(RESERVE_TIME, attempt).await {
                Ok(Ok(true)) => Ok(()),
                Ok(Ok(false)) => Err(unbooked("it is no longer ours")),
                Ok(Err(error)) => Err(unbooked(&error)),
                Err(_) => Err(unbooked("the database does not answer")),
            };
        }
        let request = self.ask.record();
        let facts = &self.ask.request.facts;
        let client_turn = facts.client.turn_id.clone();
        let fence = self.seat.held.map(|held| Fence {
            lease: held.lease,
            generation: held.generation,
            retain: held.key.kind.retain(),
        });
        let opening = Opening {
            request: request.clone(),
            client_turn: client_turn.filter(|id| !id.is_empty() && facts.generate),
            fence,
            first: next,
        };
        let ledger = &self.engine.ledger;
        // A request that brings everything needs no Postgres for a while, and no lease then; unless it may have begun elsewhere.
        let elsewhere = self.ask.forwarded.is_some() || self.ask.sent;
        let bridged = facts.previous_response_id.is_none() && !elsewhere;
        if bridged && let Some(opened) = ledger.open_late(opening.clone()) {
            return self.begun(opened).await;
        }
        let time = if bridged { ANSWER_TIME } else { RESERVE_TIME };
        let asked = Instant::now();
        let over = match timeout(time, ledger.open(opening.clone())).await {
            Ok(Ok(opened)) => return self.begun(opened).await,
            Ok(Err(NotOpened::Fenced)) => return Err(Over::Fenced),
            Ok(Err(NotOpened::Begun)) => return Err(Over::Begun),
            Ok(Err(NotOpened::Db(error))) if *error.class() != db::Class::Unavailable => {
                unbooked(&error)
            }
            unanswered => {
                ledger.missed(asked, time);
                if bridged && let Some(opened) = ledger.open_late(opening) {
                    return self.begun(opened).await;
                }
                match unanswered {
                    Ok(Err(error)) => unbooked(&error),
                    _ => unbooked("the database does not answer"),
                }
            }
        };
        let withdrawing = ledger.clone().withdraw(&request, fence, &self.engine.tasks);
        self.booking = Some(withdrawing);
        Err(over)
    }

    async fn begun(&mut self, opened: Opened) -> Result<(), Over> {
        self.open.turn = Some(opened);
        // Nobody may be there to hear it; then the turn ends as for any client that left.
        let _ = self.out.send(Item::Begun(self.seat.token.take())).await;
        Ok(())
    }

    /// Relays events until the attempt ends.
    async fn relay(
        &mut self,
        mut source: Source<'_>,
        account: AccountId,
        began: Instant,
    ) -> Attempted {
        let mut quiet = Quiet::new(self.ask.arrived + deadline::TOTAL);
        let engine = self.engine;
        let (gone, stopped) = (gone(self.out), engine.cancel.cancelled());
        tokio::pin!(gone, stopped);
        loop {
            let next = match source.ready() {
                Ok(Some(event)) => Ok(Some(event)),
                Err(failure) => Err(failure),
                Ok(None) => tokio::select! {
                    biased;
                    next = source.next() => next,
                    deadline = quiet.passed() => Err(Failure::timeout(deadline, self.now())),
                    () = &mut gone => return Attempted::Over(Over::Left),
                    () = &mut stopped => return Attempted::Over(Over::Stopped),
                },
            };
            let event = match next {
                Ok(Some(event)) => event,
                Ok(None) => return Attempted::Failed(Failure::truncated(self.now()), None),
                Err(failure) => return Attempted::Failed(failure, None),
            };
            if event.kind() == Kind::Comment {
                continue;
            }
            quiet.heard();
            let taken = tokio::select! {
                biased;
                taken = self.take(event, account, began, source.headers()) => taken,
                () = &mut stopped => return Attempted::Over(Over::Stopped),
            };
            match taken {
                Ok(None) => {}
                Ok(Some(ended)) => return ended,
                // Upstream is still listened to: the turn may be about to complete.
                Err(Lost::Gone) => {}
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
                // A client that is gone does not make the response any less complete.
                let _ = self.show(headers).await;
                return Ok(Some(Attempted::Done(Told { terminal, event })));
            }
            Kind::Failed | Kind::Error => {
                let terminal = Terminal::parse(event.kind(), &event.data());
                let unknown = ErrorBody::default();
                let error = terminal.error.as_ref().unwrap_or(&unknown);
                for observation in limits::from_headers(&error.headers, self.now()) {
                    let quota = &self.engine.quota;
                    quota.observe(account, &observation, began, quota::Source::Error);
                }
                let failure = Failure::from_event(error, self.now());
                return Ok(Some(Attempted::Failed(
                    failure,
                    Some(Told { terminal, event }),
                )));
            }
            Kind::Created => {
                self.seen.response_id =
                    event::Created::parse(&event.data()).and_then(|created| created.response_id);
                self.seen.phase = self.seen.phase.after(Kind::Created);
                self.hold_or_send(event).await
            }
            Kind::InProgress => {
                self.seen.phase = self.seen.phase.after(Kind::InProgress);
                self.hold_or_send(event).await
            }
            Kind::RateLimits => {
                for observation in limits::from_event(&event.data(), self.now()) {
                    self.engine
                        .quota
                        .observe(account, &observation, began, quota::Source::Event);
                }
                match self.pool_event() {
                    Some(json) => self.hold_or_send(Event::from_json(json)).await,
                    None => Ok(()),
                }
            }
            Kind::Metadata => {
                match headers::metadata_to_client(
                    &event.data(),
                    self.ask.request.facts.asked_model(),
                ) {
                    Some(json) => self.hold_or_send(Event::from_json(json)).await,
                    None => Ok(()),
                }
            }
            Kind::Done => Ok(()),
            // Our own keep-alives are made where the stream is encoded.
            Kind::Codex if is_keepalive(&event) => Ok(()),
            Kind::Codex => self.hold_or_send(event).await,
            kind => {
                // An attempt that came so far is the last one of its turn.
                if kind == Kind::OutputItemDone
                    && let Some(capture) = &mut self.capture
                    && let Some(item) = event::done_item(&event.data())
                {
                    capture.push_output(item);
                }
                if self.first_event.is_none() {
                    self.first_event = Some(self.ask.arrived.elapsed());
                }
                self.seen.phase = self.seen.phase.after(event.kind());
                self.seen.pieces += 1;
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
            // What was told needs not be told again; that it was is still known.
            if let Some(history) = &mut self.history {
                history.body = bytes::Bytes::new();
            }
            self.ask.held = Held::default();
            self.out
                .send(Item::Head(headers::to_client(
                    headers,
                    self.ask.request.facts.asked_model(),
                )))
                .await?;
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

    /// The pool's limits in the form in which Codex reads one account's.
    fn pool_event(&self) -> Option<bytes::Bytes> {
        let seen = self.ask.caller.sees(self.engine.hide_quota);
        quota::pool_view(&self.engine.upstream.view(), self.now(), seen).event(seen)
    }

    /// A credential that cannot be had is upstream's refusal in other words, or our own trouble.
    fn no_credential(&self, error: &CredentialError) -> Failure {
        let (class, message) = match error {
            CredentialError::Unknown | CredentialError::LoginRequired => (
                Class::Deactivated,
                "No account of the pool is signed in upstream at the moment.",
            ),
            CredentialError::Db(error) if error.is_passing() => (
                Class::Database,
                "The service cannot read an account's login at the moment, so the request was not sent; try again.",
            ),
            CredentialError::Transient | CredentialError::Db(_) => {
                (Class::Transient, "Upstream cannot be asked at the moment.")
            }
        };
        tracing::warn!(turn_id = %self.ask.id, %error, "no fresh credential");
        Failure::local(class, message, self.now())
    }
}

/// The deadlines of silence and of the whole. Events only note the time; the timer is moved when it fires.
struct Quiet {
    limit: Duration,
    name: Deadline,
    since: Moment,
    end: Moment,
    timer: Pin<Box<Sleep>>,
}

impl Quiet {
    fn new(end: Instant) -> Self {
        let (since, end) = (Moment::now(), end.into());
        Self {
            limit: deadline::FIRST_EVENT,
            name: Deadline::FirstEvent,
            since,
            end,
            timer: Box::pin(sleep_until(end.min(since + deadline::FIRST_EVENT))),
        }
    }

    fn heard(&mut self) {
        let now = Moment::now();
        // What comes before the first event is another metric.
        if self.name == Deadline::Idle {
            telemetry::event_gap(now - self.since);
        }
        self.since = now;
        (self.limit, self.name) = (deadline::IDLE, Deadline::Idle);
    }

    /// Waits for whichever passes first. Cancel-safe.
    async fn passed(&mut self) -> Deadline {
        loop {
            self.timer.as_mut().await;
            let silence = self.since + self.limit;
            let due = silence.min(self.end);
            if Moment::now() < due {
                self.timer.as_mut().reset(due);
            } else if due == silence {
                return self.name;
            } else {
                return Deadline::Total;
            }
        }
    }
}

fn is_keepalive(event: &Event) -> bool {
    event::event_type(&event.data()).as_deref() == Some("codex.keepalive")
}

fn unbooked(why: impl std::fmt::Display) -> Over {
    tracing::warn!(%why, "a turn cannot be booked, so it is not sent");
    Over::Unbooked
}

//! One attempt of a turn at one account: reserve, send, relay.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use http::HeaderMap;

use super::{Attempted, Over, Seen, Turn};
use crate::{
    db,
    ids::AccountId,
    ledger::{Opening, Try},
    protocol::{
        event::{self, Kind, Terminal},
        failure::{Class, Deadline, Failure, Phase},
        headers, limits,
    },
    quota,
    turn::{
        Event, Held, Item,
        carrier::{Carrier, Source, Unsent},
        relay::Lost,
    },
    upstream::{
        credential::{CredentialError, Freshness},
        deadline,
    },
};

/// How long a turn may go on after its client has left, in case it is about to complete.
const AFTERLIFE: Duration = Duration::from_secs(2);

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
        let engine = self.engine;
        let credential = engine.upstream.credentials().fresh(account, freshness);
        let (credential, reserved) =
            tokio::join!(credential, self.reserve(account, carrier.transport()));
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
        let next = Try {
            account,
            transport,
            request_bytes: self.ask.request.body.len() as u64,
        };
        if let Some(opened) = &mut self.opened {
            return match self.engine.ledger.attempt(opened, next).await {
                Ok(true) => Ok(()),
                Ok(false) => Err(Over::Unbooked),
                Err(error) => Err(unbooked(&error)),
            };
        }
        let request = self.ask.record();
        let facts = &self.ask.request.facts;
        let client_turn = facts
            .client
            .turn_id
            .clone()
            .filter(|id| !id.is_empty() && facts.generate);
        match self
            .engine
            .ledger
            .open(Opening {
                request: request.clone(),
                client_turn,
                first: next,
            })
            .await
        {
            Ok(opened) => {
                self.opened = Some(opened);
                Ok(())
            }
            Err(error) => {
                self.engine
                    .ledger
                    .clone()
                    .withdraw(&request, &self.engine.tasks);
                Err(unbooked(&error))
            }
        }
    }

    /// Relays events until the attempt ends.
    async fn relay(
        &mut self,
        mut source: Source<'_>,
        account: AccountId,
        began: Instant,
    ) -> Attempted {
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
                    self.engine
                        .quota
                        .observe(account, &observation, began, quota::Source::Error);
                }
                return Ok(Some(Attempted::Failed(
                    Failure::from_event(&error, self.now()),
                    Some(event),
                )));
            }
            Kind::Created => {
                self.seen.response_id =
                    event::Created::parse(&event.data()).and_then(|created| created.response_id);
                self.seen.phase = Some(self.seen.phase().after(Kind::Created));
                self.hold_or_send(event).await
            }
            Kind::InProgress => {
                self.seen.phase = Some(self.seen.phase().after(Kind::InProgress));
                self.hold_or_send(event).await
            }
            Kind::RateLimits => {
                for observation in limits::from_event(&event.data(), self.now()) {
                    self.engine
                        .quota
                        .observe(account, &observation, began, quota::Source::Event);
                }
                self.hold_or_send(Event::from_json(self.pool_event())).await
            }
            Kind::Metadata => {
                match headers::metadata_to_client(&event.data(), &self.ask.request.facts.model) {
                    Some(json) => self.hold_or_send(Event::from_json(json)).await,
                    None => Ok(()),
                }
            }
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
            self.ask.held = Held::default();
            self.out
                .send(Item::Head(headers::to_client(
                    headers,
                    &self.ask.request.facts.model,
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
    fn pool_event(&self) -> bytes::Bytes {
        quota::pool_view(
            &self.engine.upstream.view(),
            self.now(),
            self.ask.caller.accounts(),
        )
        .event()
    }

    /// A credential that cannot be had is upstream's refusal in other words.
    fn no_credential(&self, error: &CredentialError) -> Failure {
        let class = if error.is_final() {
            Class::ReauthRequired
        } else {
            Class::Timeout(Deadline::Connect)
        };
        Failure::local(class, "No fresh credential for an account", self.now())
    }

    fn slot(&self, account: AccountId) -> Option<Slot> {
        let view = self.engine.upstream.view();
        let index = view
            .accounts
            .binary_search_by_key(&account, |account| account.id)
            .ok()?;
        Some(Slot::take(&view.accounts[index].in_flight))
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
        Self {
            limit,
            name,
            since: Instant::now(),
        }
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

fn unbooked(error: &db::Error) -> Over {
    tracing::warn!(%error, "a turn cannot be booked, so it is not sent");
    Over::Unbooked
}

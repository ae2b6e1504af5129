//! The request log: a bounded queue in memory, written in batches beside the requests.
//!
//! Nobody waits for it. When the queue is full an entry is dropped and counted; the sweep writes it later from the ledger.

use std::{
    borrow::Cow,
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::{Timestamp, civil::Date, tz::TimeZone};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

use super::{
    attempt::{Totals, millis},
    store::{self, columns, plain},
    turn::{Answer, Opened, Request},
};
use crate::{
    db::{Db, Error},
    ids::{AccountId, ApiKeyId, ScopeId, TurnId},
    telemetry,
};

/// Entries that wait at most.
const CAPACITY: usize = 10_000;
/// Entries of one statement.
const BATCH: usize = 500;
/// How long an entry waits for others.
const PERIOD: Duration = Duration::from_secs(1);

/// One row; the fields are its columns.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the columns, which the migration explains")]
pub struct Entry {
    pub day: Date,
    pub turn_id: TurnId,
    pub request_id: TurnId,
    pub scope_id: ScopeId,
    pub api_key_id: Option<ApiKeyId>,
    pub account_id: Option<AccountId>,
    pub route: Cow<'static, str>,
    pub transport: Cow<'static, str>,
    pub model: Option<String>,
    /// `None` where the process died with the answer.
    pub status: Option<u16>,
    pub outcome: Cow<'static, str>,
    pub reason: Option<Cow<'static, str>>,
    pub bridge_outcome: Option<Cow<'static, str>>,
    pub bridge_reason: Option<Cow<'static, str>>,
    pub error_code: Option<String>,
    pub attempts: i32,
    pub input_tokens: i64,
    pub cached_input_tokens: i64,
    pub output_tokens: i64,
    pub reasoning_tokens: i64,
    pub cost_nanodollars: Option<i64>,
    pub estimated: bool,
    pub first_event_ms: Option<i32>,
    pub total_ms: i32,
    pub user_agent: Option<String>,
    pub explanation: Option<Value>,
}

impl Entry {
    /// A request that was a turn, or a try of one: what its own attempts used.
    pub(super) fn of_turn(opened: &Opened, answer: &Answer) -> Self {
        Self {
            turn_id: opened.turn(),
            day: day(opened.turn()),
            account_id: opened.account(),
            ..Self::of_request(opened.request(), answer)
        }
        .with(&Totals::of(opened.attempts()))
    }

    /// A request that never became a turn.
    pub(super) fn of_request(request: &Request, answer: &Answer) -> Self {
        Self {
            day: day(request.id),
            turn_id: request.id,
            request_id: request.id,
            scope_id: request.scope,
            api_key_id: request.api_key,
            account_id: None,
            route: request.route.into(),
            transport: request.transport.into(),
            model: Some(plain(&request.model, 100).into_owned()).filter(|model| !model.is_empty()),
            status: Some(answer.status),
            outcome: answer.outcome.as_str().into(),
            reason: answer.reason.map(Into::into),
            bridge_outcome: answer.bridge.map(|bridge| bridge.outcome.into()),
            bridge_reason: answer.bridge.map(|bridge| bridge.reason.into()),
            error_code: answer
                .error_code
                .as_deref()
                .map(|code| plain(code, 100).into_owned()),
            attempts: 0,
            input_tokens: 0,
            cached_input_tokens: 0,
            output_tokens: 0,
            reasoning_tokens: 0,
            cost_nanodollars: Some(0),
            estimated: false,
            first_event_ms: answer.first_event.map(millis),
            total_ms: millis(answer.total),
            user_agent: request
                .user_agent
                .as_deref()
                .map(|agent| plain(agent, 300).into_owned()),
            explanation: answer.explanation.clone(),
        }
    }

    /// Tells the metrics what was used. They take the model's whole name.
    pub(super) fn count(&self, model: &str) {
        let count = |tokens: i64| u64::try_from(tokens).unwrap_or(0);
        let tokens = telemetry::Tokens {
            input: count(self.input_tokens),
            cached: count(self.cached_input_tokens),
            output: count(self.output_tokens),
            reasoning: count(self.reasoning_tokens),
        };
        telemetry::booked(model, tokens, self.cost_nanodollars);
    }

    /// The same with what was used.
    pub(super) fn with(self, totals: &Totals) -> Self {
        let [
            input_tokens,
            cached_input_tokens,
            output_tokens,
            reasoning_tokens,
        ] = columns(&totals.usage);
        Self {
            attempts: totals.attempts,
            input_tokens,
            cached_input_tokens,
            output_tokens,
            reasoning_tokens,
            cost_nanodollars: totals.cost,
            estimated: totals.estimated,
            ..self
        }
    }
}

/// The day (UTC) in a time-ordered id.
pub(super) fn day(id: TurnId) -> Date {
    let at = id.0.get_timestamp().map_or(0, |time| time.to_unix().0);
    let at = i64::try_from(at).unwrap_or(0);
    Timestamp::from_second(at)
        .unwrap_or(Timestamp::UNIX_EPOCH)
        .to_zoned(TimeZone::UTC)
        .date()
}

/// The queue and its writer. Clones share it.
#[derive(Clone)]
pub(super) struct RequestLog(Arc<Inner>);

struct Inner {
    db: Db,
    queue: Mutex<VecDeque<Entry>>,
    /// A batch is waiting.
    full: Notify,
    /// The batch that is being written. It stays here until it is written, whoever is interrupted.
    writing: tokio::sync::Mutex<Vec<Entry>>,
    closed: CancellationToken,
}

impl RequestLog {
    pub(super) fn new(db: &Db) -> Self {
        Self(Arc::new(Inner {
            db: db.clone(),
            queue: Mutex::default(),
            full: Notify::new(),
            writing: tokio::sync::Mutex::default(),
            closed: CancellationToken::new(),
        }))
    }

    /// Never waits.
    pub(super) fn push(&self, entry: Entry) {
        let waiting = {
            let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
            if queue.len() >= CAPACITY {
                telemetry::count("drawbridge_request_log_dropped_total");
                return;
            }
            queue.push_back(entry);
            queue.len()
        };
        if waiting == BATCH {
            self.0.full.notify_one();
        }
    }

    /// Entries that are not written yet, but for a batch that is on its way.
    pub(super) fn waiting(&self) -> usize {
        self.0
            .queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len()
    }

    /// Writes until closed.
    pub(super) async fn run(&self) {
        let work = async {
            loop {
                tokio::select! {
                    () = self.0.full.notified() => {}
                    () = sleep(PERIOD) => {}
                }
                if let Err(error) = self.write().await {
                    tracing::warn!(%error, "the request log waits");
                    sleep(PERIOD).await;
                }
            }
        };
        self.0.closed.run_until_cancelled(work).await;
    }

    /// Writes what is left, as often as it takes.
    pub(super) async fn close(&self) {
        self.0.closed.cancel();
        while self.write().await.is_err() {
            sleep(PERIOD / 4).await;
        }
    }

    /// Writes everything that waits.
    async fn write(&self) -> Result<(), Error> {
        let mut batch = self.0.writing.lock().await;
        loop {
            if batch.is_empty() {
                let mut queue = self.0.queue.lock().unwrap_or_else(PoisonError::into_inner);
                let count = queue.len().min(BATCH);
                batch.extend(queue.drain(..count));
            }
            if batch.is_empty() {
                return Ok(());
            }
            match store::log(&self.0.db, &batch).await {
                Ok(()) => batch.clear(),
                Err(error) if error.is_passing() => return Err(error),
                Err(error) => {
                    tracing::error!(%error, "a batch of the request log");
                    self.write_singly(&mut batch).await?;
                }
            }
        }
    }

    /// One entry spoils its batch: it is dropped, the others are written one by one.
    async fn write_singly(&self, batch: &mut Vec<Entry>) -> Result<(), Error> {
        while let Some(entry) = batch.last() {
            match store::log(&self.0.db, std::slice::from_ref(entry)).await {
                Ok(()) => {}
                Err(error) if error.is_passing() => return Err(error),
                Err(error) => {
                    telemetry::count("drawbridge_request_log_dropped_total");
                    tracing::error!(%error, turn_id = %entry.turn_id, "an entry of the request log was dropped");
                }
            }
            batch.pop();
        }
        Ok(())
    }
}

impl fmt::Debug for RequestLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RequestLog(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_day_of_an_id_is_that_of_its_time_in_utc() {
        for (millis, expected) in [
            (0_u128, "1970-01-01"),
            (1_767_225_599_999, "2025-12-31"),
            (1_767_225_600_000, "2026-01-01"),
        ] {
            let id = uuid::Uuid::from_u128((millis << 80) | (7 << 76) | (2 << 62));
            assert_eq!(day(TurnId(id)).to_string(), expected);
        }
    }
}

//! What nobody finished: turns of processes that died, log entries that were lost with them; the proof that both sides agree; retention.

use std::{collections::BTreeSet, ops, time::Duration};

use jiff::{Timestamp, civil::Date};
use serde::Serialize;
use uuid::Uuid;

use super::{
    Ledger,
    attempt::{Attempt, Totals},
    log::{Entry, day},
    store::{self, columns},
};
use crate::{
    db::Error,
    ids::{ApiKeyId, ScopeId, TurnId},
    telemetry,
};

/// Rows of one statement.
const BATCH: i64 = 200;
/// No turn runs longer, not even in a process that lives.
const LONGEST: Duration = Duration::from_secs(3 * 3600);

/// A turn as the sweep reads it.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) turn: TurnId,
    pub(super) request: TurnId,
    pub(super) scope: ScopeId,
    pub(super) api_key: Option<ApiKeyId>,
    pub(super) route: String,
    pub(super) transport: String,
    pub(super) model: String,
    pub(super) outcome: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) first_event_ms: Option<i32>,
    pub(super) total_ms: Option<i32>,
    pub(super) attempts: Vec<Attempt>,
}

/// What is booked of a lost turn; the fields are columns.
#[derive(Debug, Serialize)]
pub(super) struct Lost {
    turn_id: TurnId,
    request_id: TurnId,
    attempts: Vec<Attempt>,
    input_tokens: i64,
    cached_input_tokens: i64,
    output_tokens: i64,
    reasoning_tokens: i64,
    cost_nanodollars: Option<i64>,
}

/// Turns that began in a span of time, by their ids and days.
#[derive(Debug)]
pub(super) struct Range {
    pub(super) ids: ops::Range<TurnId>,
    pub(super) days: (Date, Date),
}

impl Range {
    fn new(from: Timestamp, to: Timestamp) -> Self {
        let first = |at: Timestamp| {
            let millis = u128::try_from(at.as_millisecond()).unwrap_or(0);
            TurnId(Uuid::from_u128((millis << 80) | (7 << 76) | (2 << 62)))
        };
        let ids = first(from)..first(to);
        let days = (day(ids.start), day(ids.end));
        Self { ids, days }
    }
}

/// Both sides of the books over a span of time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reconciliation {
    /// By the ledger: settled and released turns that had an attempt.
    pub turns: Side,
    /// By the request log.
    pub log: Side,
    /// Turns on which they disagree, at most 100.
    pub differing: Vec<TurnId>,
}

/// One side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Side {
    /// Turns.
    pub turns: i64,
    /// Attempts of them.
    pub attempts: i64,
    /// Input tokens, cached ones included.
    pub input_tokens: i64,
    /// Cached input tokens.
    pub cached_input_tokens: i64,
    /// Output tokens, reasoning included.
    pub output_tokens: i64,
    /// Reasoning tokens.
    pub reasoning_tokens: i64,
    /// Cost of the priced turns.
    pub cost_nanodollars: i64,
    /// Turns of which a part is our guess.
    pub estimated: i64,
}

impl Ledger {
    /// Settles as `lost`, by estimate, the open turns of incarnations that are dead or unknown, and any that has been open for 3 hours.
    /// Yields how many.
    ///
    /// # Errors
    /// Of a statement; what was swept before stays so.
    pub async fn sweep(&self) -> Result<u64, Error> {
        let mut swept = 0;
        loop {
            let mut found = store::find_lost(&self.db, LONGEST, BATCH).await?;
            let last = (found.len() as i64) < BATCH;
            for turn in &mut found {
                for attempt in turn.attempts.iter_mut().filter(|attempt| attempt.runs()) {
                    attempt.lose(&turn.model);
                }
                turn.outcome = Some("lost".into());
            }
            let entries: Vec<Entry> = found.iter().map(|turn| turn.entry(turn.request)).collect();
            let lost: Vec<Lost> = found.into_iter().map(Lost::from).collect();
            let booked = store::book_lost(&self.db, &lost, &entries).await?;
            swept += booked.unsigned_abs();
            // None of them: somebody else is at it.
            if last || booked == 0 {
                break;
            }
        }
        if swept > 0 {
            telemetry::count("drawbridge_ledger_sweeps_total");
        }
        Ok(swept)
    }

    /// Writes the log entries, where they were lost, of turns that began within `window` and were settled over a minute ago. Yields how
    /// many turns.
    ///
    /// # Errors
    /// Of a statement.
    pub async fn mend(&self, window: Duration) -> Result<u64, Error> {
        let now = self.db.clock().now();
        let since = now.checked_sub(window).unwrap_or(Timestamp::UNIX_EPOCH);
        let range = Range::new(since, now);
        let mut mended = 0;
        loop {
            let found = store::find_unlogged(&self.db, &range, BATCH).await?;
            let entries: Vec<Entry> = found.iter().flat_map(Found::entries).collect();
            store::log(&self.db, &entries).await?;
            mended += found.len() as u64;
            if (found.len() as i64) < BATCH {
                return Ok(mended);
            }
        }
    }

    /// Compares the ledger with the request log, turn by turn.
    ///
    /// # Errors
    /// Of the statement.
    pub async fn reconcile(&self, from: Timestamp, to: Timestamp) -> Result<Reconciliation, Error> {
        store::reconcile(&self.db, &Range::new(from, to)).await
    }

    /// Deletes log entries of days that ended more than `days` days ago. Yields how many; 0 also while another replica is at it.
    ///
    /// # Errors
    /// Of a statement; what was deleted stays so.
    pub async fn delete_older_than(&self, days: u16) -> Result<u64, Error> {
        const BATCH: i64 = 5_000;
        let mut deleted = 0;
        loop {
            let batch = store::prune(&self.db, days.into(), BATCH).await?;
            deleted += batch;
            if batch < BATCH.unsigned_abs() {
                return Ok(deleted);
            }
        }
    }
}

impl Found {
    /// One entry per request of the turn.
    fn entries(&self) -> Vec<Entry> {
        let requests: BTreeSet<TurnId> = self
            .attempts
            .iter()
            .map(|attempt| attempt.request)
            .chain([self.request])
            .collect();
        requests
            .into_iter()
            .map(|request| self.entry(request))
            .collect()
    }

    /// What can still be told of one request.
    fn entry(&self, request: TurnId) -> Entry {
        let attempts = || {
            self.attempts
                .iter()
                .filter(move |attempt| attempt.request == request)
        };
        let last = request == self.request;
        let took = attempts().map(|attempt| i64::from(attempt.ms)).sum::<i64>();
        let took = i32::try_from(took).unwrap_or(i32::MAX);
        Entry {
            day: day(self.turn),
            turn_id: self.turn,
            request_id: request,
            scope_id: self.scope,
            api_key_id: self.api_key,
            account_id: attempts().next_back().map(|attempt| attempt.account_id),
            route: self.route.clone().into(),
            transport: self.transport.clone().into(),
            model: Some(self.model.clone()).filter(|model| !model.is_empty()),
            status: None,
            // A request that was followed by a retry did not complete; how it ended is not kept.
            outcome: match &self.outcome {
                Some(outcome) if last => outcome.clone().into(),
                _ => "failed".into(),
            },
            reason: self.reason.clone().filter(|_| last).map(Into::into),
            bridge_outcome: None,
            bridge_reason: None,
            error_code: None,
            attempts: 0,
            input_tokens: 0,
            cached_input_tokens: 0,
            output_tokens: 0,
            reasoning_tokens: 0,
            cost_nanodollars: Some(0),
            estimated: false,
            first_event_ms: self.first_event_ms.filter(|_| last),
            total_ms: self.total_ms.filter(|_| last).unwrap_or(took),
            user_agent: None,
            explanation: None,
        }
        .with(&Totals::of(attempts()))
    }
}

impl From<Found> for Lost {
    fn from(found: Found) -> Self {
        let totals = Totals::of(&found.attempts);
        let [
            input_tokens,
            cached_input_tokens,
            output_tokens,
            reasoning_tokens,
        ] = columns(&totals.usage);
        Self {
            turn_id: found.turn,
            request_id: found.request,
            attempts: found.attempts,
            input_tokens,
            cached_input_tokens,
            output_tokens,
            reasoning_tokens,
            cost_nanodollars: totals.cost,
        }
    }
}

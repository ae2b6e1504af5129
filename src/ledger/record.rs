//! What the tables hold of one turn, for people: the turn and the log of its requests.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Attempt, Entry, store};
use crate::{
    db::{Db, Error},
    ids::{AccountId, BootId, LeaseId, ScopeId, TurnId},
};

/// A turn, or a request that never became one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// The row of the ledger; `None` for a request that was refused before it was one.
    pub turn: Option<Turn>,
    /// The log of its requests, the oldest first; rows come within a second of the answer, and go with the log's retention.
    pub requests: Vec<Entry>,
}

/// A row of `turns`, without what its attempts add up to.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the columns, which the migration explains")]
pub struct Turn {
    pub turn_id: TurnId,
    pub request_id: TurnId,
    pub scope_id: ScopeId,
    pub boot_id: BootId,
    pub lease_id: Option<LeaseId>,
    pub generation: Option<i64>,
    pub state: String,
    pub route: String,
    pub transport: String,
    pub model: String,
    pub account_id: Option<AccountId>,
    pub response_id: Option<String>,
    pub outcome: Option<String>,
    pub reason: Option<String>,
    pub attempts: Vec<Attempt>,
    pub requests: i32,
    pub input_tokens: i64,
    pub cached_input_tokens: i64,
    pub output_tokens: i64,
    pub reasoning_tokens: i64,
    pub cost_nanodollars: Option<i64>,
    pub estimated: bool,
    pub first_event_ms: Option<i32>,
    pub total_ms: Option<i32>,
    pub opened_at: Timestamp,
    pub settled_at: Option<Timestamp>,
}

/// The turn of an id, which is its own or that of one of its requests. `None` if the tables hold neither.
///
/// # Errors
/// If the database cannot be asked.
pub async fn record(db: &Db, id: TurnId) -> Result<Option<Record>, Error> {
    store::record(db, id).await
}

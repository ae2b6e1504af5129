//! What the turns of one key have used.

use super::{Ledger, store};
use crate::{db::Error, ids::ApiKeyId};

/// The booked turns of a key, added up. What is still open is not in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// Requests, repeats of a turn included.
    pub requests: i64,
    /// Input and output tokens.
    pub tokens: i64,
    /// Of the input.
    pub cached_input_tokens: i64,
    /// As far as prices are known.
    pub cost_nanodollars: i64,
}

impl Used {
    /// The cost in dollars, for people.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        reason = "exact below nine million dollars"
    )]
    pub fn cost_usd(&self) -> f64 {
        self.cost_nanodollars as f64 / 1e9
    }
}

impl Ledger {
    /// What a key has used so far.
    ///
    /// # Errors
    /// Of the statement.
    pub async fn used(&self, key: ApiKeyId) -> Result<Used, Error> {
        store::used(&self.db, key).await
    }
}

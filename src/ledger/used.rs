//! What the turns of one key have used.
//!
//! It is added up anew from every turn of the key, so who asks often must not make that a standing load: one sum of a key runs at a time, and
//! serves whoever asks for so much longer than it took that the work stays a small part of the time. While it is cheap it is fresh.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use super::{Ledger, store};
use crate::{db::Error, ids::ApiKeyId, task::Tasks};

/// How many times as long as it took a sum is good for.
const KEPT: u32 = 20;

/// A sum and until when it is good.
type Sum = Option<(Used, Instant)>;

/// The sums of one process by key. Who holds a key's lock is adding up.
#[derive(Debug, Default)]
pub(super) struct Sums(Mutex<HashMap<ApiKeyId, Arc<tokio::sync::Mutex<Sum>>>>);

impl Sums {
    fn of(&self, key: ApiKeyId) -> Arc<tokio::sync::Mutex<Sum>> {
        let mut sums = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(sums.entry(key).or_default())
    }
}

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
    /// What a key has used so far, or a moment ago. It is added up in a task: whoever gives up waiting leaves the sum to the next who asks.
    ///
    /// # Errors
    /// Of the statement.
    pub async fn used(&self, key: ApiKeyId, tasks: &Tasks) -> Result<Used, Error> {
        let mut sum = self.sums.of(key).lock_owned().await;
        let began = Instant::now();
        if let Some((used, _)) = sum.filter(|(_, until)| began < *until) {
            return Ok(used);
        }
        let db = self.db.clone();
        let adding = tasks.spawn("usage", async move {
            let used = store::used(&db, key).await?;
            let ended = Instant::now();
            *sum = Some((used, ended + (ended - began) * KEPT));
            Ok(used)
        });
        adding
            .await
            .unwrap_or_else(|_| Err(Error::mute("adding up")))
    }
}

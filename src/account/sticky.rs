//! Which account served a conversation last, so that its prompt cache is used again. A preference, never a promise: what cannot be read
//! is treated as absent. The durable row is written by the ledger with the settlement of a turn; here it is read and remembered.

use std::time::Duration;

use moka::sync::Cache;

use super::store;
use crate::{
    db::{self, Db},
    ids::{AccountId, ScopeId},
    secret,
};

/// Conversations remembered, and for how long.
const REMEMBERED: u64 = 100_000;
const REMEMBERED_FOR: Duration = Duration::from_secs(10 * 60);
/// Rows of one DELETE.
const BATCH: u16 = 1000;

/// What identifies a conversation, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The client's thread.
    Thread,
    /// The client's session.
    Session,
    /// The request's `prompt_cache_key`.
    PromptCache,
}

impl Kind {
    /// The word in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Thread => "thread",
            Self::Session => "session",
            Self::PromptCache => "prompt_cache",
        }
    }

    /// How long a preference holds after its last use.
    #[must_use]
    pub fn ttl(self) -> Duration {
        match self {
            Self::Thread | Self::Session => Duration::from_secs(24 * 60 * 60),
            Self::PromptCache => Duration::from_secs(30 * 60),
        }
    }
}

/// A conversation's identity within a scope, without its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// What the text was.
    pub kind: Kind,
    /// SHA-256 of the length-framed kind and text.
    pub hash: [u8; 32],
}

impl Key {
    /// The key of a client's text.
    #[must_use]
    pub fn new(kind: Kind, value: &str) -> Self {
        let hash = secret::digest(&[kind.as_str().as_bytes(), value.as_bytes()]);
        Self { kind, hash }
    }
}

/// The preferences. Clones share what is remembered.
#[derive(Clone, Debug)]
pub struct Sticky {
    db: Db,
    known: Cache<(ScopeId, Key), Option<AccountId>>,
}

impl Sticky {
    /// Nothing is remembered yet.
    #[must_use]
    pub fn new(db: Db) -> Self {
        let known = Cache::builder()
            .max_capacity(REMEMBERED)
            .time_to_live(REMEMBERED_FOR)
            .build();
        Self { db, known }
    }

    /// The preferred account, from memory or by one read. It may be gone or unfit by now.
    pub async fn get(&self, scope: ScopeId, key: &Key) -> Option<AccountId> {
        if let Some(known) = self.known.get(&(scope, *key)) {
            return known;
        }
        match store::sticky(&self.db, scope, key).await {
            // What was put during the read is newer.
            Ok(found) => self
                .known
                .entry((scope, *key))
                .or_insert(found)
                .into_value(),
            Err(error) => {
                tracing::debug!(%error, "a conversation's preference cannot be read");
                None
            }
        }
    }

    /// Remembers a preference in this process.
    pub fn put(&self, scope: ScopeId, key: &Key, account: AccountId) {
        self.known.insert((scope, *key), Some(account));
    }

    /// Deletes the rows that have expired, in batches; yields their number.
    ///
    /// # Errors
    /// If the database cannot be asked; the batches before are deleted.
    pub async fn purge_expired(&self) -> Result<u64, db::Error> {
        let mut purged = 0;
        loop {
            let batch = store::purge_sticky(&self.db, BATCH.into()).await?;
            purged += batch;
            if batch < BATCH.into() {
                return Ok(purged);
            }
        }
    }
}

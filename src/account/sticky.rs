//! Sticky sessions: a durable preference of a conversation for an account. It is a preference; nothing breaks when it is lost.

use std::time::Duration;

use moka::sync::Cache;

use super::store;
use crate::{
    db::{Db, Error},
    ids::{AccountId, ScopeId},
    secret,
};

/// Preferences kept in memory, and for how long they are believed.
const CACHED: u64 = 100_000;
const CACHE_TIME: Duration = Duration::from_secs(600);
/// Expired rows deleted by one statement.
const BATCH: u64 = 1_000;

/// What a key is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A thread of the client.
    Thread,
    /// A session of the client.
    Session,
    /// The client's `prompt_cache_key`.
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

    /// How long a preference lasts after it was written.
    #[must_use]
    pub fn ttl(self) -> Duration {
        match self {
            Self::Thread | Self::Session => Duration::from_secs(24 * 3600),
            Self::PromptCache => Duration::from_secs(1800),
        }
    }
}

/// What identifies a conversation; never the client's own text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// What it is made of.
    pub kind: Kind,
    /// SHA-256 of the length-framed kind and value.
    pub hash: [u8; 32],
}

impl Key {
    /// The key of a client's value.
    #[must_use]
    pub fn new(kind: Kind, value: &str) -> Self {
        Self {
            kind,
            hash: secret::digest(&[kind.as_str().as_bytes(), value.as_bytes()]),
        }
    }
}

/// The preferences. Clones share the cache.
#[derive(Clone, Debug)]
pub struct Sticky {
    db: Db,
    cache: Cache<(ScopeId, Key), Option<AccountId>>,
}

impl Sticky {
    /// Nothing cached.
    #[must_use]
    pub fn new(db: Db) -> Self {
        Self {
            db,
            cache: Cache::builder()
                .max_capacity(CACHED)
                .time_to_live(CACHE_TIME)
                .build(),
        }
    }

    /// The preferred account: from memory, else by one read. A database that is away prefers nothing.
    pub async fn get(&self, scope: ScopeId, key: &Key) -> Option<AccountId> {
        if let Some(known) = self.cache.get(&(scope, *key)) {
            return known;
        }
        match store::sticky(&self.db, scope, key.kind.as_str(), &key.hash).await {
            Ok(account) => {
                self.cache.insert((scope, *key), account);
                account
            }
            Err(error) => {
                tracing::debug!(%error, "a conversation's preference cannot be read");
                None
            }
        }
    }

    /// Remembers a preference that is being written.
    pub fn put(&self, scope: ScopeId, key: &Key, account: AccountId) {
        self.cache.insert((scope, *key), Some(account));
    }

    /// Deletes what has expired; yields how many.
    ///
    /// # Errors
    /// Of the database.
    pub async fn purge_expired(&self) -> Result<u64, Error> {
        let mut purged = 0;
        loop {
            let batch = store::purge_sticky(&self.db, BATCH.cast_signed()).await?;
            purged += batch;
            if batch < BATCH {
                return Ok(purged);
            }
        }
    }
}

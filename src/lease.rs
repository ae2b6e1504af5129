//! The durable right to own a bridge session: rows of `http_bridge_leases`.
//!
//! A lease belongs to one incarnation of a replica at a time. Its `generation` is the fencing token: it comes from one sequence, so it never
//! repeats, and everything an owner writes names the generation under which it owns. Ownership changes hands when the row is free, when its
//! owner has a tombstone, or when the owner is silent and provably idle ([`Leases::take`]). BEGIN and FINISH, which write a lease together
//! with its turn, stand in the ledger's store. This room knows nothing of sockets and of what a session remembers.

pub mod step;
mod store;

use std::time::Duration;

pub use self::store::STATEMENTS;
use crate::{
    db::{Db, Error},
    ids::{AccountId, BootId, LeaseId, ScopeId, TurnId},
    secret,
};

/// Rows of one DELETE.
const BATCH: u16 = 1000;

/// What a lease is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The client's thread.
    Thread,
    /// The client's session.
    Session,
    /// The request's `prompt_cache_key`: a hint that several conversations may share.
    PromptCache,
    /// A lane of its own, found by its token or by its responses alone.
    Fork,
    /// A lease whose row had been purged when its token came back.
    Lease,
}

impl Kind {
    /// The word in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Thread => "thread",
            Self::Session => "session",
            Self::PromptCache => "prompt_cache",
            Self::Fork => "fork",
            Self::Lease => "lease",
        }
    }

    fn of(word: &str) -> Self {
        match word {
            "thread" => Self::Thread,
            "session" => Self::Session,
            "prompt_cache" => Self::PromptCache,
            "lease" => Self::Lease,
            _ => Self::Fork,
        }
    }

    /// How long a row is kept after its last use.
    #[must_use]
    pub fn retain(self) -> Duration {
        match self {
            Self::Thread | Self::Session | Self::Lease => Duration::from_secs(24 * 3600),
            Self::PromptCache => Duration::from_secs(2 * 3600),
            Self::Fork => Duration::from_secs(600),
        }
    }
}

/// What a lease is found by, within a scope, without its text.
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

    /// A key that nothing else has.
    #[must_use]
    pub fn fork() -> Self {
        Self {
            kind: Kind::Fork,
            hash: rand::random(),
        }
    }

    /// The key of a lease that is known by its id alone.
    #[must_use]
    pub fn of_lease(lease: LeaseId) -> Self {
        Self::new(Kind::Lease, &lease.to_string())
    }
}

/// Who owns a lease, as far as the database knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// Nobody.
    Nobody,
    /// This incarnation.
    Me,
    /// Another one, without a tombstone.
    Other {
        /// Which.
        boot: BootId,
        /// Where peers reach it; `None` where it takes no forwarded turns.
        endpoint: Option<String>,
        /// It takes no new work.
        draining: bool,
        /// Until when its last heartbeat vouches for it, from now; zero when that has passed.
        alive_for: Duration,
    },
    /// An incarnation with a tombstone.
    Dead,
}

/// A row as it was read.
#[derive(Clone, Debug)]
pub struct Row {
    /// The lease.
    pub lease: LeaseId,
    /// What it is found by.
    pub key: Key,
    /// The fencing token.
    pub generation: i64,
    /// Turns begun so far.
    pub turn_seq: i64,
    /// Whose it is.
    pub owner: Owner,
    /// The request whose turn runs on it.
    pub busy_turn: Option<TurnId>,
    /// Where its last turn went.
    pub account: Option<AccountId>,
}

/// A lease that is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The lease.
    pub lease: LeaseId,
    /// What it is found by.
    pub key: Key,
    /// The fencing token of our ownership.
    pub generation: i64,
    /// By which incarnation of ours.
    pub boot: BootId,
    /// Where its last turn went.
    pub account: Option<AccountId>,
}

/// One lease as operators see it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Listed {
    /// The lease.
    pub lease_id: LeaseId,
    /// In whose conversations.
    pub scope_id: ScopeId,
    /// What it is found by.
    pub key_kind: String,
    /// The fencing token.
    pub generation: i64,
    /// The owner's name; `None` = free.
    pub owner: Option<String>,
    /// The owner's incarnation.
    pub owner_boot: Option<BootId>,
    /// `free`, `alive`, `draining`, `silent` or `dead`.
    pub owner_state: String,
    /// The request whose turn runs on it.
    pub busy_turn: Option<TurnId>,
    /// Since when, RFC 3339.
    pub busy_since: Option<jiff::Timestamp>,
    /// Turns begun so far.
    pub turn_seq: i64,
    /// Where its last turn went.
    pub account_id: Option<AccountId>,
    /// The last finished response.
    pub head_response_id: Option<String>,
    /// When it was last taken from a silent owner.
    pub taken_at: Option<jiff::Timestamp>,
    /// Its last turn.
    pub last_turn_at: jiff::Timestamp,
    /// When its row may be deleted.
    pub retain_until: jiff::Timestamp,
}

/// Which leases people want to see.
#[derive(Debug, Default)]
pub struct Which {
    /// This one alone.
    pub lease: Option<LeaseId>,
    /// Those in a turn, the longest first; otherwise the last used come first.
    pub busy: bool,
    /// Those of a replica, by its name.
    pub owner: Option<String>,
}

/// The leases. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Leases {
    db: Db,
}

impl Leases {
    /// The leases of a database.
    #[must_use]
    pub fn new(db: Db) -> Self {
        Self { db }
    }

    /// Claims the lease of a key, or makes it. `None`: it has a living owner, or is ours and busy; read it.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn claim(&self, me: BootId, scope: ScopeId, key: Key) -> Result<Option<Held>, Error> {
        store::claim(&self.db, me, scope, key).await
    }

    /// Claims a lease by its id; one that was purged is made again. `None` as for [`Leases::claim`].
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn claim_id(
        &self,
        me: BootId,
        scope: ScopeId,
        lease: LeaseId,
    ) -> Result<Option<Held>, Error> {
        store::claim_id(&self.db, me, scope, lease).await
    }

    /// Takes an idle lease from an owner that does not answer. `seen` was read before the owner was asked: if a row comes back, the owner
    /// has begun no turn since, and never can. `None`: it has, or somebody else took it, or it was taken within the last 5 s.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn take(
        &self,
        me: BootId,
        scope: ScopeId,
        seen: &Row,
    ) -> Result<Option<Held>, Error> {
        store::take(&self.db, me, scope, seen).await
    }

    /// Gives an idle lease back. False if it was no longer ours, or a turn runs on it.
    ///
    /// # Errors
    /// If the database cannot be asked; then it is free when this incarnation has its tombstone.
    pub async fn release(&self, held: &Held) -> Result<bool, Error> {
        store::release(&self.db, held).await
    }

    /// The row of a lease.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn by_id(
        &self,
        me: BootId,
        scope: ScopeId,
        lease: LeaseId,
    ) -> Result<Option<Row>, Error> {
        store::by_id(&self.db, me, scope, lease).await
    }

    /// The row of a key.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn by_key(&self, me: BootId, scope: ScopeId, key: Key) -> Result<Option<Row>, Error> {
        store::by_key(&self.db, me, scope, key).await
    }

    /// Deletes rows that nobody owns and nobody came back to, in batches; yields their number.
    ///
    /// # Errors
    /// If the database cannot be asked; the batches before are deleted.
    pub async fn purge(&self) -> Result<u64, Error> {
        let mut purged = 0;
        loop {
            let batch = store::purge(&self.db, BATCH.into()).await?;
            purged += batch;
            if batch < BATCH.into() {
                return Ok(purged);
            }
        }
    }

    /// Leases, at most `limit`.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn list(&self, which: &Which, limit: u32) -> Result<Vec<Listed>, Error> {
        store::list(&self.db, which, limit).await
    }

    /// One lease, as people see it.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn show(&self, lease: LeaseId) -> Result<Option<Listed>, Error> {
        let which = Which {
            lease: Some(lease),
            ..Which::default()
        };
        Ok(self.list(&which, 1).await?.pop())
    }

    /// Frees a lease whoever owns it: its owner is fenced from now on. False if there is no such lease.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn free(&self, lease: LeaseId) -> Result<bool, Error> {
        store::free(&self.db, lease).await
    }
}

//! The sealed record of finished responses, from which a conversation is told again when no upstream socket remembers it.
//!
//! A snapshot holds what one turn added: the items of its request and those of its answer. Snapshots hang together by the response that each
//! continues; a chain begins with a root, whose input was whole by itself. History is told whole or not at all: a gap, a cycle, a record that
//! was not kept or does not open all mean that there is none. The rows are written by FINISH, which is the ledger's.

mod body;
mod store;

use std::time::Duration;

use bytes::Bytes;

use self::body::Kept;
pub use self::{body::Capture, store::STATEMENTS};
use crate::{
    config::Snapshots as Mode,
    db::{Db, Error},
    ids::{AccountId, ChainId, LeaseId, ScopeId},
    protocol::request::history::{self, Turn, Untold},
    secret::{KeyRing, Place},
    task,
};

/// Links of one chain, and bytes of what they hold.
const LINKS: usize = 128;
const CHAIN_BYTES: usize = 8 << 20;
/// Bytes of what one turn adds.
const TURN_BYTES: usize = 2 << 20;
/// Links after which the whole conversation is kept anew.
pub const CHECKPOINT: usize = 32;
/// Work above this is done off the workers.
const LARGE: usize = 256 << 10;
/// Chains of one DELETE.
const BATCH: u16 = 200;
/// A chain goes so long after its newest link, and after its root.
const AFTER_NEWEST: Duration = Duration::from_secs(24 * 3600);
const AFTER_ROOT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Whether a turn's record is wanted. `codex`: the client has shown itself to be Codex; it resends everything, unless it says over HTTP
/// that it does not (`http_previous`).
#[must_use]
pub fn wanted(mode: Mode, codex: bool, http_previous: bool) -> bool {
    match mode {
        Mode::Off => false,
        Mode::Full => true,
        Mode::Auto => !codex || http_previous,
    }
}

/// The records of an installation. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Snapshots {
    db: Db,
    ring: KeyRing,
    mode: Mode,
}

/// What is known of a response without its history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where its conversation is found.
    pub lease: Option<LeaseId>,
    /// Its own record was kept.
    pub complete: bool,
}

/// A row to be written.
#[derive(Clone, Debug)]
pub struct Row {
    /// The response that it continues.
    pub parent: Option<String>,
    /// The chain that it begins; one that has a parent joins the parent's.
    pub chain: ChainId,
    /// Its input was whole by itself.
    pub is_root: bool,
    /// The body is there.
    pub complete: bool,
    /// Plain bytes.
    pub bytes: i32,
    /// The master key that sealed it.
    pub key_id: Option<String>,
    /// Sealed.
    pub body: Option<Vec<u8>>,
}

/// Why a conversation is not told.
#[derive(Debug)]
pub enum Missing {
    /// It is not there, or not whole.
    Incomplete,
    /// It cannot be read now.
    Unavailable(Error),
}

/// A whole conversation up to a response.
#[derive(Clone)]
pub struct Chain {
    /// Who answered last.
    pub account: Option<AccountId>,
    /// Turns, the oldest first.
    turns: Vec<Kept>,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a chain of {} turns", self.turns.len())
    }
}

impl Snapshots {
    /// The records of a database, sealed with a ring.
    #[must_use]
    pub fn new(db: Db, ring: KeyRing, mode: Mode) -> Self {
        Self { db, ring, mode }
    }

    /// What is kept.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Seals what a turn added.
    pub async fn seal(
        &self,
        scope: ScopeId,
        response_id: &str,
        capture: Capture,
        output: &[u8],
    ) -> Row {
        let parent = capture.parent().map(str::to_owned);
        let is_root = parent.is_none();
        let ring = self.ring.clone();
        let row = row_name(scope, response_id);
        let sealing = move |kept: Kept| {
            let body = kept.pack();
            (ring.seal(place(&row), &body), ring.current_id().to_owned())
        };
        let kept = capture.finish(output);
        let bytes = kept.as_ref().map_or(0, Kept::len);
        let sealed = match kept {
            None => None,
            Some(kept) if bytes > LARGE => Some(task::blocking(move || sealing(kept)).await),
            Some(kept) => Some(sealing(kept)),
        };
        let (body, key_id) = sealed.unzip();
        Row {
            parent,
            chain: ChainId::new(),
            is_root,
            complete: body.is_some(),
            bytes: i32::try_from(bytes).unwrap_or(i32::MAX),
            key_id,
            body,
        }
    }

    /// What is known of a response.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn find(&self, scope: ScopeId, response_id: &str) -> Result<Option<Found>, Error> {
        store::find(&self.db, scope, response_id).await
    }

    /// The whole conversation up to a response, within its scope.
    ///
    /// # Errors
    /// [`Missing`].
    pub async fn chain(&self, scope: ScopeId, response_id: &str) -> Result<Chain, Missing> {
        let links = store::chain(&self.db, scope, response_id, LINKS, CHAIN_BYTES)
            .await
            .map_err(Missing::Unavailable)?;
        let account = links.first().and_then(|link| link.account);
        let bytes: usize = links.iter().map(|link| link.bytes).sum();
        if !links.last().is_some_and(|root| root.is_root) || bytes > CHAIN_BYTES {
            return Err(Missing::Incomplete);
        }
        let ring = self.ring.clone();
        let open = move || {
            let turns = links.iter().rev().map(|link| {
                let sealed = link.body.as_deref().filter(|_| link.complete)?;
                let row = row_name(scope, &link.response_id);
                let body = ring.open(place(&row), sealed).ok()?;
                Kept::unpack(&body, CHAIN_BYTES)
            });
            turns.collect::<Option<Vec<_>>>()
        };
        let turns = if bytes > LARGE {
            task::blocking(open).await
        } else {
            open()
        };
        let turns = turns.ok_or(Missing::Incomplete)?;
        Ok(Chain { account, turns })
    }

    /// Deletes chains that are over, whole, in batches; yields the number of records.
    ///
    /// # Errors
    /// If the database cannot be asked; the batches before are deleted.
    pub async fn purge(&self) -> Result<u64, Error> {
        let mut purged = 0;
        loop {
            let (chains, records) =
                store::purge(&self.db, AFTER_NEWEST, AFTER_ROOT, BATCH.into()).await?;
            purged += records;
            if chains < u64::from(BATCH) {
                return Ok(purged);
            }
        }
    }
}

impl Chain {
    /// How many turns it has.
    #[must_use]
    pub fn len(&self) -> usize {
        self.turns.len()
    }

    /// Whether it has none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.turns.is_empty()
    }

    /// The body of a request that continues this conversation, with all of it in front.
    ///
    /// # Errors
    /// [`Untold`].
    pub fn rebuild(&self, body: &Bytes, same_account: bool) -> Result<Bytes, Untold> {
        let own = history::input(body).unwrap_or_else(|| Bytes::from_static(b"[]"));
        let own = std::str::from_utf8(&own).map_err(|_| Untold::Sealed)?;
        let items = history::items(&self.texts(), own, same_account)?;
        Ok(history::with_input(body, items))
    }

    /// Its items and those of a request, as one raw array.
    fn flat(&self, own: &str) -> Option<String> {
        history::items(&self.texts(), own, true).ok()
    }

    fn texts(&self) -> Vec<Turn<'_>> {
        self.turns.iter().map(Kept::turn).collect()
    }
}

fn row_name(scope: ScopeId, response_id: &str) -> String {
    format!("{scope}/{response_id}")
}

fn place(row: &str) -> Place<'_> {
    Place {
        table: "response_snapshots",
        row,
        column: "body",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_depends_on_who_keeps_it_else() {
        for (mode, codex, http_previous, kept) in [
            (Mode::Off, false, true, false),
            (Mode::Full, true, false, true),
            (Mode::Auto, false, false, true),
            (Mode::Auto, true, false, false),
            (Mode::Auto, true, true, true),
        ] {
            assert_eq!(
                wanted(mode, codex, http_previous),
                kept,
                "{mode:?} {codex} {http_previous}"
            );
        }
    }
}

//! Finished responses, sealed, from which a conversation is rebuilt where its upstream socket is gone.
//!
//! A row holds what one turn added; rows are linked to the response they continue, up to a root that says everything by itself. A chain is
//! read whole or not at all. The row is inserted by the statement that finishes its turn, so that no head points to what is not there;
//! here it is made, found, read and, with its whole chain, deleted.
//!
//! It must not know turns, leases or accounts beyond their ids. What was said leaves this room sealed, or in the body of a request.

mod body;
mod capture;
mod chain;
mod policy;
mod store;

use std::time::Duration;

use tokio::time::timeout;

pub use self::{
    capture::{Capture, Kept},
    chain::Chain,
    policy::{CHECKPOINT, CONVERSATION, LINKS, Link, Parent, TURN, wanted},
    store::STATEMENTS,
};
use self::{chain::Turn, policy::Plan, store::Stored};
pub use crate::{config::Snapshots as Mode, protocol::request::history::Untold};
use crate::{
    db::{Db, Error},
    ids::{AccountId, ChainId, LeaseId, ScopeId},
    secret::KeyRing,
    task,
};

/// How long a chain may take to be read: somebody waits for it.
const READ_TIME: Duration = Duration::from_secs(2);
/// Chains of one DELETE.
const BATCH: u16 = 100;
/// Texts over this many bytes are sealed and opened off the workers.
const LARGE: usize = 1 << 20;

/// The snapshots. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Snapshots {
    db: Db,
    keys: KeyRing,
    mode: Mode,
}

/// What the row of a response says in plain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The lease that it was served under.
    pub lease: Option<LeaseId>,
    /// The account that served it.
    pub account: Option<AccountId>,
    /// Its model.
    pub model: String,
    /// False if nothing can be rebuilt from it.
    pub complete: bool,
}

/// Why there is no history.
#[derive(Debug, thiserror::Error)]
pub enum Missing {
    /// Unknown, expired, of another scope, not kept, damaged, too long or too large: it cannot be told whole.
    #[error("the conversation is not kept whole")]
    Incomplete,
    /// It may be there.
    #[error(transparent)]
    Unavailable(#[from] Error),
    /// It may be there; the database did not answer in time.
    #[error("the database does not answer in time")]
    Late,
}

/// One row of `response_snapshots`, for the statement that finishes the turn.
#[derive(Clone, Debug)]
pub struct Row {
    /// The key, with the scope.
    pub response_id: String,
    /// The response that it continues.
    pub parent_response_id: Option<String>,
    /// The chain that it extends or begins.
    pub chain: ChainId,
    /// The lease that it was served under.
    pub lease: Option<LeaseId>,
    /// The account that served it.
    pub account: Option<AccountId>,
    /// Its model.
    pub model: String,
    /// It says everything by itself.
    pub is_root: bool,
    /// False if what was said is not kept.
    pub complete: bool,
    /// Plaintext of `body` in bytes.
    pub bytes: i32,
    /// The master key that sealed `body`.
    pub key_id: Option<String>,
    /// Sealed items.
    pub body: Option<Vec<u8>>,
    /// What the turn after this one continues. Not a column.
    pub next: Parent,
}

impl Snapshots {
    /// Snapshots in `db`, sealed with the first of `keys`; `mode` decides which are written, whatever is there can be read.
    #[must_use]
    pub fn new(db: Db, keys: KeyRing, mode: Mode) -> Self {
        Self { db, keys, mode }
    }

    /// [`wanted`] in this installation's mode.
    #[must_use]
    pub fn wanted(&self, codex: bool, http_previous_id: bool) -> bool {
        wanted(self.mode, codex, http_previous_id)
    }

    /// Makes the row of a finished turn. Once in [`CHECKPOINT`] links the history is read and told again, as a new root.
    pub async fn seal(
        &self,
        scope: ScopeId,
        kept: Kept,
        lease: Option<LeaseId>,
        account: Option<AccountId>,
        model: &str,
    ) -> Row {
        let Kept {
            response_id,
            parent,
            items,
        } = kept;
        let told = match items {
            Some(items) => self.tell(scope, parent.as_ref(), items, account).await,
            None => None,
        };
        let link = told.as_ref().map(|told| told.link);
        let (bytes, body) = match told {
            Some(Told { items, .. }) => {
                let (keys, id, bytes) = (self.keys.clone(), response_id.clone(), items.len());
                let sealed = off_worker(bytes, move || body::seal(&keys, scope, &id, &items)).await;
                (bytes, Some(sealed))
            }
            None => (0, None),
        };
        // Without its text a row goes with the chain that it would have extended.
        let chain = link.or_else(|| parent.as_ref().and_then(|parent| parent.link));
        Row {
            is_root: parent.is_none() || link.is_some_and(|link| link.depth == 1),
            parent_response_id: parent
                .map(|parent| parent.response_id)
                .filter(|id| policy::is_key(id)),
            chain: chain.map_or_else(ChainId::new, |link| link.chain),
            lease,
            account,
            model: model.to_owned(),
            complete: body.is_some(),
            bytes: i32::try_from(bytes).expect("no more than a conversation has"),
            key_id: body.is_some().then(|| self.keys.current_id().to_owned()),
            body,
            next: Parent {
                response_id: response_id.clone(),
                link,
            },
            response_id,
        }
    }

    /// What is known of a response, without what was said.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn find(&self, scope: ScopeId, response_id: &str) -> Result<Option<Found>, Error> {
        if !policy::is_key(response_id) {
            return Ok(None);
        }
        store::find(&self.db, scope, response_id).await
    }

    /// The history up to a response, in one round trip.
    ///
    /// # Errors
    /// Where it cannot be had whole.
    pub async fn chain(&self, scope: ScopeId, response_id: &str) -> Result<Chain, Missing> {
        if !policy::is_key(response_id) {
            return Err(Missing::Incomplete);
        }
        let read = store::chain(&self.db, scope, response_id);
        let links = timeout(READ_TIME, read)
            .await
            .map_err(|_| Missing::Late)??;
        let bytes = links.iter().map(|link| link.bytes).sum();
        let keys = self.keys.clone();
        off_worker(bytes, move || open(&keys, scope, links, bytes)).await
    }

    /// Deletes the chains that have expired, in batches; yields the number of rows.
    ///
    /// # Errors
    /// If the database cannot be asked; the batches before are deleted.
    pub async fn purge(&self) -> Result<u64, Error> {
        let mut purged = 0;
        loop {
            let rows = store::purge(&self.db, BATCH.into()).await?;
            purged += rows;
            // A chain has at least one row.
            if rows < BATCH.into() {
                return Ok(purged);
            }
        }
    }
}

impl Snapshots {
    /// What the row of a turn that added `items` holds, if anything.
    async fn tell(
        &self,
        scope: ScopeId,
        parent: Option<&Parent>,
        items: String,
        account: Option<AccountId>,
    ) -> Option<Told> {
        match policy::plan(parent, items.len()) {
            Plan::Root => Some(Told::root(items)),
            Plan::Extend(link) => Told::after(link, items),
            Plan::Checkpoint(parent, link) => match self.chain(scope, parent).await {
                Ok(chain) => {
                    off_worker(chain.bytes, move || match chain.told(account, &items) {
                        Some(whole) => Some(Told::root(whole)),
                        None => Told::after(link, items),
                    })
                    .await
                }
                Err(_) => Told::after(link, items),
            },
            Plan::Header => None,
        }
    }
}

/// What a row holds, and where that puts it.
struct Told {
    items: String,
    link: Link,
}

impl Told {
    fn root(items: String) -> Self {
        let link = Link {
            chain: ChainId::new(),
            depth: 1,
            bytes: items.len(),
        };
        Self { items, link }
    }

    fn after(link: Link, items: String) -> Option<Self> {
        let link = Link {
            depth: link.depth + 1,
            bytes: link.bytes + items.len(),
            ..link
        };
        (link.depth <= LINKS).then_some(Self { items, link })
    }
}

/// Opens every link; one that does not open takes the chain with it.
fn open(
    keys: &KeyRing,
    scope: ScopeId,
    links: Vec<Stored>,
    bytes: usize,
) -> Result<Chain, Missing> {
    let newest = links.last().ok_or(Missing::Incomplete)?;
    let mut chain = Chain {
        account: newest.account,
        lease: newest.lease,
        chain: newest.chain,
        depth: links.len(),
        bytes,
        response_id: newest.response_id.clone(),
        turns: Vec::with_capacity(links.len()),
    };
    for link in links {
        let sealed = link.body.as_deref().unwrap_or_default();
        let items = body::open(keys, scope, &link.response_id, sealed, link.bytes);
        let items = items.map_err(|error| {
            tracing::warn!(%error, response_id = link.response_id, "a snapshot does not open");
            Missing::Incomplete
        })?;
        chain.turns.push(Turn {
            account: link.account,
            items,
        });
    }
    Ok(chain)
}

async fn off_worker<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if bytes > LARGE {
        task::blocking(work).await
    } else {
        work()
    }
}

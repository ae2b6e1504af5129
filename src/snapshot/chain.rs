//! A conversation as it was kept: whole, from its root to one response.

use std::fmt;

use bytes::Bytes;

use super::policy::{Link, Parent};
use crate::{
    ids::{AccountId, ChainId, LeaseId},
    protocol::request::history::{self, Past, Untold},
};

/// The history of one response.
pub struct Chain {
    /// Who served it last: the account to prefer.
    pub account: Option<AccountId>,
    /// The lease it was served under.
    pub lease: Option<LeaseId>,
    /// The chain.
    pub chain: ChainId,
    /// Its links.
    pub depth: usize,
    /// Their plaintext in bytes.
    pub bytes: usize,
    pub(super) response_id: String,
    /// From the root on.
    pub(super) turns: Vec<Turn>,
}

/// One link, opened.
pub(super) struct Turn {
    pub(super) account: Option<AccountId>,
    pub(super) items: String,
}

impl Chain {
    /// What a turn continues that is rebuilt from this.
    #[must_use]
    pub fn parent(&self) -> Parent {
        Parent {
            response_id: self.response_id.clone(),
            link: Some(Link {
                chain: self.chain,
                depth: self.depth,
                bytes: self.bytes,
            }),
        }
    }

    /// The request for `account`, made whole: the history stands before its own items, `previous_response_id` is gone, and everything else
    /// is as in `body`. Turns that another account served are told without what only that one can read. Takes milliseconds per megabyte.
    ///
    /// # Errors
    /// [`Untold::Invalid`]: 400. [`Untold::Lost`]: there is no history for this account, as if the chain were incomplete.
    pub fn rebuild(&self, body: &Bytes, account: AccountId) -> Result<Bytes, Untold> {
        history::rebuild(body, self.past(Some(account)))
    }

    /// The history as `account` gets it, and `items`, as one array.
    pub(super) fn told(&self, account: Option<AccountId>, items: &str) -> Option<String> {
        let told = history::told(self.past(account)).ok()?;
        history::concat(&told, items)
    }

    fn past(&self, account: Option<AccountId>) -> impl Iterator<Item = Past<'_>> {
        self.turns.iter().map(move |turn| Past {
            items: &turn.items,
            own: turn.account.is_some() && turn.account == account,
        })
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("chain", &self.chain)
            .field("depth", &self.depth)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

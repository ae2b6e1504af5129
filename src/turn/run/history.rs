//! What came before a turn: which account served it, what upstream has to be told again, and what is kept for the next.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::timeout;

use super::Turn;
use crate::{
    ids::AccountId,
    protocol::{failure::Failure, request},
    snapshot::{Capture, Chain, Missing, Parent, Untold},
    task,
    turn::{Reject, Stop, Transport, carrier::Carrier},
};

/// How long the preference of a conversation is waited for.
const PREFERENCE_TIME: Duration = Duration::from_secs(1);
/// A longer conversation is told again off the workers.
const LARGE: usize = 1 << 20;

/// A conversation that is told again, and the request that continues it.
pub(super) struct History {
    pub(super) chain: Arc<Chain>,
    /// As the client sent it, normalised.
    pub(super) body: Bytes,
}

impl Turn<'_> {
    /// Whether upstream has to remember what this turn continues.
    pub(super) fn is_anchored(&self) -> bool {
        self.ask.request.facts.previous_response_id.is_some() && self.history.is_none()
    }

    /// Reads what the turn continues, to tell it again.
    pub(super) async fn recall(&mut self) -> Result<(), Stop> {
        let facts = &self.ask.request.facts;
        let Some(id) = &facts.previous_response_id else {
            return Ok(());
        };
        let scope = self.ask.caller.scope();
        let chain = self.engine.snapshots.chain(scope, id);
        let chain = match self.unless_over(chain).await {
            Ok(chain) => chain,
            // The client is gone, or the process ends: the turn ends as what it is.
            Err(_) => return Err(Stop::Cancelled),
        };
        match chain {
            Ok(chain) => {
                let body = self.ask.request.body.clone();
                let chain = Arc::new(chain);
                self.history = Some(History { chain, body });
                Ok(())
            }
            Err(Missing::Incomplete) => Err(Stop::PreviousResponseNotFound),
            Err(error @ (Missing::Unavailable(_) | Missing::Late)) => {
                tracing::warn!(%error, "a conversation cannot be read");
                Err(Stop::Rejected(Reject::MetadataUnavailable, None))
            }
        }
    }

    /// Tells the conversation again in the form in which this account understands it.
    pub(super) async fn retell(&mut self, account: AccountId) -> Result<(), Stop> {
        let Some(history) = &self.history else {
            return Ok(());
        };
        let (chain, body) = (Arc::clone(&history.chain), history.body.clone());
        let told = if chain.bytes > LARGE {
            task::blocking(move || chain.rebuild(&body, account)).await
        } else {
            chain.rebuild(&body, account)
        };
        self.ask.request.body = told.map_err(|untold| match untold {
            Untold::Invalid(invalid) => Stop::Invalid(Box::new(invalid)),
            Untold::Lost => Stop::PreviousResponseNotFound,
        })?;
        Ok(())
    }

    /// Drops from a request that brings everything what its account cannot read, if it has refused it for that; yields whether it did.
    pub(super) fn disown(&mut self, failure: &Failure, carrier: &Carrier) -> bool {
        let foreign = failure.code.as_deref() == Some("invalid_encrypted_content");
        if !foreign || self.is_anchored() || self.history.is_some() {
            return false;
        }
        let Some(body) = request::history::without_thoughts(&self.ask.request.body) else {
            return false;
        };
        self.ask.request.body = body;
        // Else it would be kept as this account's.
        self.capture = self.captured(carrier);
        true
    }

    /// What is kept of this turn, unless its client keeps everything itself.
    pub(super) fn captured(&self, carrier: &Carrier) -> Option<Capture> {
        let facts = &self.ask.request.facts;
        let previous = facts.previous_response_id.as_deref();
        let http_previous = self.ask.transport == Transport::Http && previous.is_some();
        let snapshots = &self.engine.snapshots;
        if !facts.generate || !snapshots.wanted(self.ask.is_codex(), http_previous) {
            return None;
        }
        let parent = previous.map(|id| match &self.history {
            Some(history) => history.chain.parent(),
            None => carrier.parent().unwrap_or_else(|| Parent::unknown(id)),
        });
        let input = request::history::input(&self.ask.request.body)?;
        Some(Capture::new(input, parent))
    }

    /// The account that served the conversation before.
    pub(super) async fn preferred(&self) -> Option<AccountId> {
        if let Some(History { chain, .. }) = &self.history {
            return chain.account;
        }
        let before = self.seat.held.and_then(|held| held.account);
        let Some(key) = self.key else { return before };
        let scope = self.ask.caller.scope();
        let asked = self.engine.sticky.get(scope, &key);
        // What is known here comes at once.
        let time = if self.engine.ledger.is_away() {
            Duration::ZERO
        } else {
            PREFERENCE_TIME
        };
        timeout(time, asked).await.ok().flatten().or(before)
    }
}

//! By what a conversation is known: its thread, else its session, else its prompt cache key.

use super::Ask;
use crate::{account::sticky, lease};

/// A conversation's name, the best that the request gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Affinity {
    kind: sticky::Kind,
    value: String,
}

impl Affinity {
    /// Where its account preference is kept.
    pub(super) fn sticky(&self) -> sticky::Key {
        sticky::Key::new(self.kind, &self.value)
    }

    /// Where its lease is kept.
    pub(super) fn lease(&self) -> lease::Key {
        let kind = match self.kind {
            sticky::Kind::Thread => lease::Kind::Thread,
            sticky::Kind::Session => lease::Kind::Session,
            sticky::Kind::PromptCache => lease::Kind::PromptCache,
        };
        lease::Key::new(kind, &self.value)
    }

    /// Whether one conversation alone has it; a prompt cache key may be shared.
    pub(super) fn is_hard(&self) -> bool {
        self.kind != sticky::Kind::PromptCache
    }
}

/// The affinity of a request.
pub(super) fn affinity(ask: &Ask) -> Option<Affinity> {
    let facts = &ask.request.facts;
    let header = |name: &str| {
        ask.headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    let thread = header("thread-id").or_else(|| facts.client.thread_id.clone());
    let session = || {
        let named = ["session-id", "session_id", "x-session-id"]
            .into_iter()
            .find_map(header);
        named.or_else(|| facts.client.session_id.clone())
    };
    let named = |kind, value: Option<String>| {
        value
            .filter(|value| !value.is_empty())
            .map(|value| Affinity { kind, value })
    };
    named(sticky::Kind::Thread, thread)
        .or_else(|| named(sticky::Kind::Session, session()))
        .or_else(|| named(sticky::Kind::PromptCache, facts.prompt_cache_key.clone()))
}

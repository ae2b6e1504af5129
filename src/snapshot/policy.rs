//! What is kept, and how: decisions as functions of values.

use crate::{config::Snapshots as Mode, ids::ChainId};

/// Most links that are followed to rebuild a conversation.
pub const LINKS: usize = 128;
/// Most plaintext of a conversation that is rebuilt, in bytes.
pub const CONVERSATION: usize = 8 << 20;
/// Most plaintext of what one turn adds, in bytes.
pub const TURN: usize = 2 << 20;
/// A chain of so many links is not continued but told again as a new root.
pub const CHECKPOINT: usize = 32;

/// Whether a turn is kept. `codex`: the request has `x-codex-turn-metadata` or `x-codex-window-id`, or came over the Codex WebSocket; such a
/// client resends everything when asked to, except over HTTP where it sent a `previous_response_id`.
#[must_use]
pub fn wanted(mode: Mode, codex: bool, http_previous_id: bool) -> bool {
    match mode {
        Mode::Auto => !codex || http_previous_id,
        Mode::Full => true,
        Mode::Off => false,
    }
}

/// The response that a turn continues.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    /// `previous_response_id`.
    pub response_id: String,
    /// How it is kept; `None` if it cannot be told again, and then nothing that continues it can.
    pub link: Option<Link>,
}

impl Parent {
    /// A response of which nothing is kept.
    #[must_use]
    pub fn unknown(response_id: impl Into<String>) -> Self {
        Self {
            response_id: response_id.into(),
            link: None,
        }
    }
}

/// The end of a chain that is kept whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its chain.
    pub chain: ChainId,
    /// Links from the root to here; at least 1.
    pub depth: usize,
    /// Their plaintext in bytes.
    pub bytes: usize,
}

/// How a turn is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Plan<'a> {
    /// It says everything by itself: a new chain.
    Root,
    /// It is the next link.
    Extend(Link),
    /// It is told with its whole history, up to this response, as a new chain; if that cannot be read, as the next link.
    Checkpoint(&'a str, Link),
    /// That it happened, not what was said.
    Header,
}

/// How a turn that added `bytes` is kept.
pub(super) fn plan(parent: Option<&Parent>, bytes: usize) -> Plan<'_> {
    let Some(parent) = parent else {
        return Plan::Root;
    };
    match parent.link {
        Some(link) if link.bytes + bytes > CONVERSATION => Plan::Header,
        Some(link) if link.depth >= CHECKPOINT => Plan::Checkpoint(&parent.response_id, link),
        Some(link) => Plan::Extend(link),
        None => Plan::Header,
    }
}

/// Whether an id may be a row's key: ours come from upstream, and nobody's word is a longer one.
pub(super) fn is_key(response_id: &str) -> bool {
    (1..=200).contains(&response_id.len()) && !response_id.contains('\0')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_resends_everything_is_not_kept_unless_asked_for() {
        for (mode, codex, http_previous_id, expected) in [
            (Mode::Auto, false, false, true),
            (Mode::Auto, false, true, true),
            (Mode::Auto, true, false, false),
            (Mode::Auto, true, true, true),
            (Mode::Full, true, false, true),
            (Mode::Full, false, false, true),
            (Mode::Off, false, true, false),
            (Mode::Off, true, true, false),
        ] {
            let got = wanted(mode, codex, http_previous_id);
            assert_eq!(got, expected, "{mode:?} {codex} {http_previous_id}");
        }
    }

    #[test]
    fn a_chain_is_continued_until_it_is_told_anew_or_grows_too_large() {
        let chain = ChainId::new();
        let link = |depth, bytes| Link {
            chain,
            depth,
            bytes,
        };
        let after = |link| {
            Some(Parent {
                response_id: "resp".into(),
                link,
            })
        };
        for (parent, bytes, expected) in [
            (None, TURN, Plan::Root),
            (after(None), 1, Plan::Header),
            (after(Some(link(1, 9))), 1, Plan::Extend(link(1, 9))),
            (after(Some(link(31, 9))), 1, Plan::Extend(link(31, 9))),
            (
                after(Some(link(32, 9))),
                1,
                Plan::Checkpoint("resp", link(32, 9)),
            ),
            (
                after(Some(link(2, CONVERSATION - 5))),
                5,
                Plan::Extend(link(2, CONVERSATION - 5)),
            ),
            (after(Some(link(2, CONVERSATION - 5))), 6, Plan::Header),
        ] {
            assert_eq!(plan(parent.as_ref(), bytes), expected, "{parent:?} {bytes}");
        }
    }
}

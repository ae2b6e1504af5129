//! One hop from the replica that received a turn to the replica that owns its lease.
//!
//! A forwarded turn is served or refused, never sent on. The envelope is signed with a key that every replica of the installation derives
//! from its master keys; it names origin, target, turn and time, and the digest of what it carries. A replay needs no memory here: a turn
//! begins once, by its own row in the ledger. What the turn says is opaque to this room; [`Owner`] is implemented where it is understood.

mod client;
mod envelope;
mod frame;
mod server;

pub use self::{
    client::{Answer, Client, Cut, NotSent},
    envelope::{About, Envelope, Keys},
    frame::{Frame, Frames},
    server::{Call, Owner, router},
};

/// Why the owner does not serve a turn. Nothing of it was begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The lease is not its own.
    NotOwner,
    /// It is leaving.
    Draining,
    /// It has no room.
    Full,
    /// It was begun before.
    Begun,
    /// The envelope is not one of ours, late, or for somebody else.
    Invalid,
}

impl Refusal {
    const ALL: [Self; 5] = [
        Self::NotOwner,
        Self::Draining,
        Self::Full,
        Self::Begun,
        Self::Invalid,
    ];

    fn status(self) -> http::StatusCode {
        match self {
            Self::NotOwner => http::StatusCode::MISDIRECTED_REQUEST,
            Self::Draining => http::StatusCode::CONFLICT,
            Self::Full => http::StatusCode::SERVICE_UNAVAILABLE,
            Self::Begun => http::StatusCode::GONE,
            Self::Invalid => http::StatusCode::BAD_REQUEST,
        }
    }

    fn of(status: http::StatusCode) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|refusal| refusal.status() == status)
    }

    /// The word in metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotOwner => "not_owner",
            Self::Draining => "draining",
            Self::Full => "full",
            Self::Begun => "begun",
            Self::Invalid => "bridge_forward_invalid",
        }
    }
}

/// Where peers take turns.
const PATH: &str = "/internal/v1/bridge/turn";
const ENVELOPE: http::HeaderName = http::HeaderName::from_static("x-drawbridge-envelope");
const MAC: http::HeaderName = http::HeaderName::from_static("x-drawbridge-mac");

//! One hop: from the replica that received a client's turn to the replica that owns its lease.
//!
//! A call is a sealed [`Envelope`] in one header and the client's body unchanged; the answer is a stream of [`Frame`]s, the last of
//! which is an end, so that a cut is never taken for one. This room carries calls and knows neither leases nor turns: an [`Owner`]
//! serves or refuses what arrives, and the caller decides what silence means. A forwarded call is never forwarded again: an owner has
//! nothing to say for it.

mod client;
mod envelope;
mod frame;
mod server;

use std::future::Future;

use bytes::Bytes;
use futures_util::Stream;
use http::StatusCode;

pub use self::{
    client::{Answer, Client, Cut, Patience},
    envelope::{Envelope, Keys},
    frame::Frame,
    server::router,
};

/// Where replicas call each other.
const PATH: &str = "/internal/v1/bridge/turn";
/// Carries the sealed envelope.
const HEADER: &str = "x-drawbridge-forward";
/// The type of an answer: what answers 200 with another one is no replica.
const FRAMES: &str = "application/x-drawbridge-frames";
/// A client's body, as at the edge.
const BODY_BYTES: usize = 64 << 20;

/// A call that was verified: who makes it, that it was made just now, for this incarnation, and with this body.
pub struct Call {
    /// What travelled beside the body.
    pub envelope: Envelope,
    /// The client's body.
    pub body: Bytes,
}

/// The receiving end.
pub trait Owner: Send + Sync + 'static {
    /// What answers a call. It is dropped when the caller is gone, or after its [`Frame::End`].
    type Frames: Stream<Item = Frame> + Send + Unpin + 'static;

    /// What a body takes while it is held.
    type Room: Send;

    /// Takes room for a body before it is read; `None` if there is none.
    fn room(&self, bytes: usize) -> Option<Self::Room>;

    /// Begins the call's turn, or refuses it. The caller waits about a second for this alone and then takes the lease: return as soon
    /// as the turn is begun, before upstream is asked. If the caller leaves earlier, the future is dropped at an await.
    fn accept(
        &self,
        call: Call,
        room: Self::Room,
    ) -> impl Future<Output = Result<Self::Frames, Refusal>> + Send;
}

/// Why an owner does not serve a call. Nothing was begun for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// 421: the lease is not, or no longer, the callee's. Read it again, once.
    NotOwner,
    /// 409: the callee takes no new work.
    Draining,
    /// 409: the turn id is in the ledger already. The one refusal that says nothing about what was begun: it may be a replay.
    Begun,
    /// 503: the callee has no room.
    Full,
    /// 400: the call is not authentic, late, damaged, or for another incarnation; so answers also who restarted at the same address.
    Invalid,
}

impl Refusal {
    const ALL: [Self; 5] = [
        Self::NotOwner,
        Self::Draining,
        Self::Begun,
        Self::Full,
        Self::Invalid,
    ];

    /// Its word on the wire and in metrics.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::NotOwner => "bridge_not_owner",
            Self::Draining => "bridge_draining",
            Self::Begun => "bridge_turn_begun",
            Self::Full => "bridge_full",
            Self::Invalid => "bridge_forward_invalid",
        }
    }

    fn status(self) -> StatusCode {
        match self {
            Self::NotOwner => StatusCode::MISDIRECTED_REQUEST,
            Self::Draining | Self::Begun => StatusCode::CONFLICT,
            Self::Full => StatusCode::SERVICE_UNAVAILABLE,
            Self::Invalid => StatusCode::BAD_REQUEST,
        }
    }

    /// The refusal that a peer answered.
    fn read(status: StatusCode, code: &[u8]) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|refusal| refusal.status() == status && refusal.code().as_bytes() == code)
    }
}

/// Why a call brought no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No replica answered in time, or at all: whether it has begun the turn, only the database knows.
    Silent,
    /// The peer said no.
    Refused(Refusal),
}

//! The receiving end: an internal listener that takes turns from peers and nothing else.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use axum::{
    Router,
    body::Body,
    extract::{DefaultBodyLimit, State},
    response::{IntoResponse as _, Response},
    routing::post,
};
use bytes::{Bytes, BytesMut};
use futures_util::Stream;
use http::HeaderMap;
use tokio::sync::watch;

use super::{
    ENVELOPE, Envelope, Keys, MAC, PATH, Refusal,
    frame::{Frame, Frames},
};
use crate::{db::Clock, ids::BootId, telemetry};

/// A body and what goes with it.
const PAYLOAD_BYTES: usize = 66 << 20;
/// Frames that are ready together go out in one write of about this size.
const WRITE: usize = 16 << 10;

/// A turn that a peer sent, verified.
#[derive(Debug)]
pub struct Call {
    /// Whom and what it is about.
    pub envelope: Envelope,
    /// What it carries.
    pub payload: Bytes,
}

/// Serves the turns of leases that this replica owns.
pub trait Owner: Send + Sync + 'static {
    /// Comes back when the turn has begun, or cannot. Dropping the frames tells it that the client is gone.
    ///
    /// # Errors
    /// [`Refusal`]: nothing of it was begun.
    fn accept(&self, call: Call) -> impl Future<Output = Result<Frames, Refusal>> + Send;
}

struct Receiving<O> {
    owner: O,
    keys: Keys,
    me: watch::Receiver<BootId>,
    clock: Clock,
}

/// The internal listener's one route.
pub fn router<O: Owner>(owner: O, keys: Keys, me: watch::Receiver<BootId>, clock: Clock) -> Router {
    let state = Arc::new(Receiving {
        owner,
        keys,
        me,
        clock,
    });
    Router::new()
        .route(PATH, post(receive::<O>))
        .layer(DefaultBodyLimit::max(PAYLOAD_BYTES))
        .with_state(state)
}

async fn receive<O: Owner>(
    State(state): State<Arc<Receiving<O>>>,
    headers: HeaderMap,
    payload: Bytes,
) -> Response {
    match state.serve(&headers, payload).await {
        Ok(frames) => Body::from_stream(Encoded {
            frames,
            ended: false,
        })
        .into_response(),
        Err(refusal) => {
            telemetry::forward_refused(refusal.as_str());
            (refusal.status(), refusal.as_str()).into_response()
        }
    }
}

impl<O: Owner> Receiving<O> {
    async fn serve(&self, headers: &HeaderMap, payload: Bytes) -> Result<Frames, Refusal> {
        let text = headers.get(ENVELOPE).ok_or(Refusal::Invalid)?;
        let mac = headers.get(MAC).and_then(|mac| mac.to_str().ok());
        let mac = mac.ok_or(Refusal::Invalid)?;
        let (me, now) = (*self.me.borrow(), self.clock.now().as_millisecond());
        let envelope = self.keys.open(text.as_bytes(), mac, me, now, &payload)?;
        self.owner.accept(Call { envelope, payload }).await
    }
}

/// Frames as bytes.
struct Encoded {
    frames: Frames,
    ended: bool,
}

impl Stream for Encoded {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut out = BytesMut::new();
        while !self.ended && out.len() < WRITE {
            match self.frames.as_mut().poll_next(context) {
                Poll::Ready(Some(frame)) => {
                    frame.write(&mut out);
                    self.ended = matches!(frame, Frame::End(_));
                }
                Poll::Ready(None) => self.ended = true,
                Poll::Pending if out.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        if out.is_empty() {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(Ok(out.freeze())))
    }
}

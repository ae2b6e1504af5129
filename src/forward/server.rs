//! The receiving end: verifies a call, hands it to the owner, writes its frames.
//!
//! The envelope is checked before the body is read, and the body is hashed while it arrives. Dropping what is written here (the caller
//! closed its connection) drops the owner's future or its frames.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
    routing::post,
};
use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Body as _;
use sha2::{Digest as _, Sha256};
use tokio::{sync::watch, time::timeout};

use super::{
    BODY_BYTES, Call, FRAMES, HEADER, Owner, PATH, Refusal,
    envelope::{self, Invalid, Keys, Opened, WINDOW},
    frame::Encoder,
};
use crate::{db::Clock, ids::BootId, telemetry};

/// A body that takes longer is no longer of now.
const BODY_TIME: Duration = Duration::from_millis(WINDOW.unsigned_abs());

/// The internal listener's route; everything else is not found. `me` is this process's incarnation.
pub fn router<O: Owner>(
    owner: Arc<O>,
    keys: Keys,
    me: watch::Receiver<BootId>,
    clock: Clock,
) -> Router {
    let door = Arc::new(Door { keys, me, clock });
    Router::new()
        .route(
            PATH,
            post(serve::<O>).fallback(async || StatusCode::NOT_FOUND),
        )
        .with_state((door, owner))
}

struct Door {
    keys: Keys,
    me: watch::Receiver<BootId>,
    clock: Clock,
}

async fn serve<O: Owner>(
    State((door, owner)): State<(Arc<Door>, Arc<O>)>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    match admit(&door, &*owner, &headers, body).await {
        Ok(frames) => {
            let mut response = Response::new(Body::new(Encoder::new(frames)));
            let frames = HeaderValue::from_static(FRAMES);
            response.headers_mut().insert(header::CONTENT_TYPE, frames);
            response
        }
        Err(refusal) => {
            telemetry::forward_refused(refusal.code());
            (refusal.status(), refusal.code()).into_response()
        }
    }
}

/// Verifies a call and hands it over. Only who is authentic gets room for a body.
async fn admit<O: Owner>(
    door: &Door,
    owner: &O,
    headers: &HeaderMap,
    mut body: Body,
) -> Result<O::Frames, Refusal> {
    let invalid = |invalid: Invalid| {
        tracing::warn!(%invalid, "a forwarded call was refused");
        Refusal::Invalid
    };
    let opened = door.open(headers).map_err(invalid)?;
    let length = length(&body).ok_or_else(|| invalid(Invalid::Body))?;
    let Some(room) = owner.room(length) else {
        // A caller that still sends would not hear the refusal.
        let rest = async { while let Some(Ok(_)) = body.frame().await {} };
        drop(timeout(BODY_TIME, rest).await);
        return Err(Refusal::Full);
    };
    let read = timeout(BODY_TIME, read(body, length)).await;
    let whole = read.ok().flatten();
    let (body, _) = whole
        .filter(|(_, hash)| *hash == opened.body_sha256)
        .ok_or_else(|| invalid(Invalid::Body))?;
    let envelope = opened.envelope;
    owner.accept(Call { envelope, body }, room).await
}

impl Door {
    fn open(&self, headers: &HeaderMap) -> Result<Opened, Invalid> {
        let sealed = headers.get(HEADER).ok_or(Invalid::Seal)?;
        let now = self.clock.now().as_millisecond();
        let me = *self.me.borrow();
        envelope::open(&self.keys, sealed.as_bytes(), me, now)
    }
}

/// How long a body says it is; `None` if it does not, or it is too large.
fn length(body: &Body) -> Option<usize> {
    let length = usize::try_from(body.size_hint().exact()?).ok()?;
    (length <= BODY_BYTES).then_some(length)
}

/// A body of this length and its SHA-256; `None` if it is cut.
async fn read(mut body: Body, length: usize) -> Option<(Bytes, [u8; 32])> {
    let mut hash = Sha256::new();
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let chunk = frame.ok()?.into_data().ok()?;
        hash.update(&chunk);
        if chunk.len() == length {
            return Some((chunk, hash.finalize().into()));
        }
        whole.reserve(length - whole.len());
        whole.extend_from_slice(&chunk);
    }
    (whole.len() == length).then(|| (whole.freeze(), hash.finalize().into()))
}

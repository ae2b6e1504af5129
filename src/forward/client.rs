//! The calling end: pooled HTTP/1.1 connections to peers, and the patience with them.
//!
//! A peer is silent when for one [`Patience::silence`] nothing has moved: no connection came up, no piece of the body was taken, no head
//! arrived. So a large body has the time that it needs as long as it moves, up to [`Patience::total`]; a stopped process, which takes
//! what fits into the kernel's buffers and no more, has not.

use std::{
    convert::Infallible,
    fmt,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{self, Body, Incoming, SizeHint};
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use sha2::{Digest as _, Sha256};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::{
    FRAMES, Failure, HEADER, PATH, Refusal,
    envelope::{self, Envelope, Keys},
    frame::{Decoder, Frame},
};
use crate::{db::Clock, task, telemetry};

/// Idle connections are closed before the listener closes them (30 s), so that no call meets a connection that is going away.
const IDLE: Duration = Duration::from_secs(20);
/// Idle connections to one peer.
const POOLED: usize = 64;
/// The body is handed over in such pieces: what was taken tells whether it moves.
const PIECE: usize = 64 << 10;
/// Hashing more than this leaves the worker to others.
const HASHED_INLINE: usize = 1 << 20;
/// The word of a refusal.
const CODE_BYTES: usize = 64;

/// How long a peer is waited for. Tests use a tenth.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// While nothing moves.
    pub silence: Duration,
    /// For the head of an answer, however the body moves.
    pub total: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            silence: Duration::from_secs(1),
            total: Duration::from_secs(10),
        }
    }
}

/// Calls peers. Clones share connections.
#[derive(Clone)]
pub struct Client {
    http: legacy::Client<HttpConnector, Pieces>,
    keys: Keys,
    clock: Clock,
    patience: Patience,
}

impl Client {
    /// A client without connections.
    #[must_use]
    pub fn new(keys: Keys, clock: Clock, patience: Patience) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(patience.silence));
        connector.set_keepalive(Some(Duration::from_secs(60)));
        let http = legacy::Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(POOLED)
            .build(connector);
        Self {
            http,
            keys,
            clock,
            patience,
        }
    }

    /// Calls the replica at `endpoint` (`http://host:port`); returns with the head of its answer. Dropping this future, or the answer,
    /// closes the connection, which tells the peer that the client is gone.
    ///
    /// # Errors
    /// [`Failure`]. An envelope that is too large to travel is [`Refusal::Invalid`].
    pub async fn send(
        &self,
        endpoint: &str,
        envelope: &Envelope,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        let began = Instant::now();
        let called = self.call(endpoint, envelope, body).await;
        let outcome = match &called {
            Ok(_) => "answered",
            Err(Failure::Silent) => "silent",
            Err(Failure::Refused(refusal)) => refusal.code(),
        };
        telemetry::forwarded(outcome, began.elapsed());
        called
    }

    async fn call(
        &self,
        endpoint: &str,
        envelope: &Envelope,
        body: Bytes,
    ) -> Result<Answer, Failure> {
        let body_sha256 = hash(&body).await;
        let now = self.clock.now().as_millisecond();
        let Some(sealed) = envelope::seal(&self.keys, envelope, &body_sha256, now) else {
            tracing::warn!(turn = %envelope.turn, "what comes with this turn is too large to be forwarded");
            return Err(Failure::Refused(Refusal::Invalid));
        };
        let (pieces, moved) = Pieces::new(body);
        let request = Request::post(format!("{}{PATH}", endpoint.trim_end_matches('/')))
            .header(HEADER, sealed)
            .body(pieces)
            .map_err(|error| silent(endpoint, &error))?;
        let answering = async {
            let response = self.http.request(request).await;
            read(response.map_err(|error| silent(endpoint, &error))?).await
        };
        let mut answering = std::pin::pin!(answering);
        let last = Instant::now() + self.patience.total;
        loop {
            let until = last.min(*moved.borrow() + self.patience.silence);
            match timeout_at(until, &mut answering).await {
                Ok(answered) => return answered,
                Err(_) if until < last && *moved.borrow() + self.patience.silence > until => {}
                Err(elapsed) => return Err(silent(endpoint, &elapsed)),
            }
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

fn silent(endpoint: &str, error: &(dyn std::error::Error + 'static)) -> Failure {
    tracing::debug!(endpoint, error, "a peer is silent");
    Failure::Silent
}

/// An answer or a refusal; whatever else speaks at this address is no replica.
async fn read(response: Response<Incoming>) -> Result<Answer, Failure> {
    let frames = HeaderValue::from_static(FRAMES);
    let (head, body) = response.into_parts();
    if head.status == StatusCode::OK && head.headers.get(header::CONTENT_TYPE) == Some(&frames) {
        let decoder = Decoder::default();
        return Ok(Answer { body, decoder });
    }
    let code = Limited::new(body, CODE_BYTES).collect().await;
    let refusal = code
        .ok()
        .and_then(|code| Refusal::read(head.status, &code.to_bytes()));
    Err(refusal.map_or(Failure::Silent, Failure::Refused))
}

async fn hash(body: &Bytes) -> [u8; 32] {
    if body.len() <= HASHED_INLINE {
        return Sha256::digest(body).into();
    }
    let body = body.clone();
    task::blocking(move || Sha256::digest(&body).into()).await
}

/// What a peer answers.
pub struct Answer {
    body: Incoming,
    decoder: Decoder,
}

/// The answer broke off, or went wrong, before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a forwarded answer was cut")]
pub struct Cut;

impl Answer {
    /// The next frame; nothing follows [`Frame::End`]. Cancel-safe.
    ///
    /// # Errors
    /// [`Cut`] where the answer stops without its end.
    pub async fn next(&mut self) -> Result<Frame, Cut> {
        loop {
            if let Some(frame) = self.decoder.next().map_err(|_| Cut)? {
                return Ok(frame);
            }
            let frame = self.body.frame().await.ok_or(Cut)?.map_err(|_| Cut)?;
            if let Some(chunk) = frame.data_ref() {
                self.decoder.push(chunk);
            }
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer").finish_non_exhaustive()
    }
}

/// A body in pieces that tells when the last one was taken.
struct Pieces {
    rest: Bytes,
    moved: watch::Sender<Instant>,
}

impl Pieces {
    fn new(body: Bytes) -> (Self, watch::Receiver<Instant>) {
        let (moved, at) = watch::channel(Instant::now());
        (Self { rest: body, moved }, at)
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<body::Frame<Bytes>, Infallible>>> {
        if self.rest.is_empty() {
            return Poll::Ready(None);
        }
        let length = self.rest.len().min(PIECE);
        let piece = self.rest.split_to(length);
        self.moved.send_replace(Instant::now());
        Poll::Ready(Some(Ok(body::Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.rest.len() as u64)
    }
}

//! What carries a turn to the upstream: a request of its own, or the socket of a session.

use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::{Ask, Event, Transport};
use crate::{
    config,
    ids::AccountId,
    protocol::{failure::Failure, headers},
    upstream::{self, Upstream, credential::Credential, websocket::Socket},
};

/// An idle socket is replaced before upstream ends it at 60 minutes.
const SOCKET_AGE: Duration = Duration::from_secs(55 * 60);

/// What carries the turns of one session, or one turn.
pub(super) enum Carrier {
    /// Each turn is a request of its own.
    Http,
    /// Turns share a socket; `None` while there is none.
    Socket(Option<Box<Line>>),
}

/// An open socket and what its upstream remembers.
pub(super) struct Line {
    socket: Socket,
    account: AccountId,
    /// The response that upstream remembers: the last one that completed on this socket.
    head: Option<String>,
}

/// An open stream of events, for one attempt.
pub(super) enum Source<'a> {
    Http(upstream::http::Events),
    Socket(&'a mut Line),
}

impl Carrier {
    /// The carrier of one turn that came over HTTP.
    pub(super) fn for_http(upstream: &Upstream) -> Self {
        match upstream.transport() {
            config::Transport::WebSocket => Self::Socket(None),
            config::Transport::Auto | config::Transport::Http => Self::Http,
        }
    }

    /// The carrier of a client's WebSocket.
    pub(super) fn for_session() -> Self {
        Self::Socket(None)
    }

    /// The word in the ledger.
    pub(super) fn transport(&self) -> &'static str {
        match self {
            Self::Http => Transport::Http.as_str(),
            Self::Socket(_) => Transport::WebSocket.as_str(),
        }
    }

    /// The account of the open socket.
    pub(super) fn account(&self) -> Option<AccountId> {
        match self {
            Self::Socket(Some(line)) => Some(line.account),
            _ => None,
        }
    }

    /// Whether upstream would know this response id.
    pub(super) fn remembers(&self, response_id: &str) -> bool {
        matches!(self, Self::Socket(Some(line)) if line.head.as_deref() == Some(response_id))
    }

    /// Sends a turn to an account: on the open socket if it is that account's, else anew.
    pub(super) async fn send(
        &mut self,
        upstream: &Upstream,
        account: AccountId,
        credential: &Credential,
        ask: &Ask,
    ) -> Result<Source<'_>, Unsent> {
        match self {
            Self::Http => {
                let headers = headers::to_upstream_http(&ask.headers);
                let events = upstream
                    .create(account, credential, headers, ask.request.body.clone())
                    .await?;
                Ok(Source::Http(events))
            }
            Self::Socket(place) => {
                if place.as_ref().is_none_or(|line| line.account != account) {
                    *place = None;
                    let headers = headers::to_upstream_websocket(&ask.headers);
                    let socket = upstream
                        .connect(account, credential, headers)
                        .await
                        .map_err(Unsent::Nothing)?;
                    *place = Some(Box::new(Line {
                        socket,
                        account,
                        head: None,
                    }));
                }
                let line = place.as_mut().expect("just opened");
                // Whatever becomes of this turn, upstream forgets the response before it.
                line.head = None;
                line.socket.send(frame(ask)).await?;
                Ok(Source::Socket(line))
            }
        }
    }

    /// The turn completed: upstream remembers its response.
    pub(super) fn completed(&mut self, response_id: Option<&str>) {
        if let Self::Socket(Some(line)) = self {
            line.head = response_id.map(str::to_owned);
        }
    }

    /// Gives up the open socket.
    pub(super) fn hang_up(&mut self) {
        if let Self::Socket(place) = self {
            *place = None;
        }
    }

    /// Polls the idle socket. Ends when it was given up: upstream closed it, spoke out of turn, or it is old.
    pub(super) async fn rest(&mut self) {
        match self {
            Self::Socket(place @ Some(_)) => {
                let line = place.as_mut().expect("just matched");
                let left = SOCKET_AGE.saturating_sub(line.socket.age());
                drop(tokio::time::timeout(left, line.socket.next()).await);
                *place = None;
            }
            _ => std::future::pending().await,
        }
    }

    /// Says goodbye to upstream.
    pub(super) async fn close(self) {
        if let Self::Socket(Some(line)) = self {
            line.socket.close().await;
        }
    }
}

/// Why nothing came back: with the certainty that nothing was sent, or without.
pub(super) enum Unsent {
    /// The connection or the handshake failed.
    Nothing(Failure),
    /// The request may have arrived.
    Perhaps(Failure),
}

impl From<Failure> for Unsent {
    fn from(failure: Failure) -> Self {
        Self::Perhaps(failure)
    }
}

fn frame(ask: &Ask) -> Utf8Bytes {
    let frame: Bytes = match ask.transport {
        Transport::WebSocket => ask.request.frame(),
        Transport::Http => ask.request.frame_with_headers(&ask.headers),
    };
    Utf8Bytes::try_from(frame).expect("a request that was parsed as JSON is UTF-8")
}

impl Source<'_> {
    /// The head of upstream's answer.
    pub(super) fn headers(&self) -> &HeaderMap {
        match self {
            Self::Http(events) => events.headers(),
            Self::Socket(line) => line.socket.headers(),
        }
    }

    /// The next event; `None` at the end of the stream. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Event>, Failure> {
        match self {
            Self::Http(events) => Ok(events.next().await?.map(Event::from_sse)),
            Self::Socket(line) => Ok(line
                .socket
                .next()
                .await?
                .map(|text| Event::from_json(Bytes::from(text)))),
        }
    }

    /// The next event if it is here already.
    pub(super) fn ready(&mut self) -> Result<Option<Event>, Failure> {
        match self {
            Self::Http(events) => Ok(events.ready()?.map(Event::from_sse)),
            Self::Socket(_) => Ok(None),
        }
    }
}

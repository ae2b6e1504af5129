//! What carries a turn to the upstream: a request of its own, or the socket of a session.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::HeaderMap;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::{Ask, Event, Transport};
use crate::{
    config,
    ids::AccountId,
    protocol::{event::Kind, failure::Failure, headers},
    snapshot::Parent,
    upstream::{self, Unsent, Upstream, credential::Credential, websocket::Socket},
};

/// An idle socket is replaced before upstream ends it at 60 minutes.
const SOCKET_AGE: Duration = Duration::from_secs(55 * 60);

/// Upstream closes a socket on which a larger frame comes.
const FRAME_BYTES: usize = 15 << 20;

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
    /// Whether the conversation prefers another account, which could not serve when this was opened.
    detour: bool,
    /// The response that upstream remembers: the last one that completed on this socket.
    head: Option<Arc<str>>,
    /// Where that response stands in what is kept of the conversation.
    parent: Option<Parent>,
    /// What upstream wants repeated, on this socket alone.
    turn_state: Option<String>,
}

/// An open stream of events, for one attempt.
pub(super) enum Source<'a> {
    Http(upstream::http::Events),
    Socket(&'a mut Line),
}

impl Carrier {
    /// The carrier of one turn without a session.
    pub(super) fn for_one(upstream: &Upstream) -> Self {
        match upstream.transport() {
            config::Transport::WebSocket => Self::Socket(None),
            config::Transport::Auto | config::Transport::Http => Self::Http,
        }
    }

    /// The carrier of a session.
    pub(super) fn for_session() -> Self {
        Self::Socket(None)
    }

    /// How a request goes to upstream: the word in the ledger.
    pub(super) fn transport(&self, ask: &Ask) -> &'static str {
        match self {
            Self::Socket(_) if fits(ask) => Transport::WebSocket.as_str(),
            Self::Socket(_) | Self::Http => Transport::Http.as_str(),
        }
    }

    /// The account of the open socket.
    pub(super) fn account(&self) -> Option<AccountId> {
        match self {
            Self::Socket(Some(line)) => Some(line.account),
            _ => None,
        }
    }

    /// The account of the open socket has another name since it was merged: the seat is the same, and so is what its socket remembers.
    pub(super) fn rename(&mut self, canonical: impl FnOnce(AccountId) -> AccountId) {
        if let Self::Socket(Some(line)) = self {
            line.account = canonical(line.account);
        }
    }

    /// Whether upstream would know this response id.
    pub(super) fn remembers(&self, response_id: &str) -> bool {
        matches!(self, Self::Socket(Some(line)) if line.head.as_deref() == Some(response_id))
    }

    /// The response that upstream remembers.
    pub(super) fn head(&self) -> Option<Arc<str>> {
        match self {
            Self::Socket(Some(line)) => line.head.clone(),
            _ => None,
        }
    }

    /// Where the response that upstream remembers stands in what is kept.
    pub(super) fn parent(&self) -> Option<Parent> {
        match self {
            Self::Socket(Some(line)) => line.parent.clone(),
            _ => None,
        }
    }

    /// Whether the conversation is only visiting the account of the open socket.
    pub(super) fn is_detour(&self) -> bool {
        matches!(self, Self::Socket(Some(line)) if line.detour)
    }

    /// Connects to an account, unless the open socket is that account's. Nothing of the turn is sent yet.
    pub(super) async fn open(
        &mut self,
        upstream: &Upstream,
        account: AccountId,
        credential: &Credential,
        ask: &Ask,
        detour: bool,
        began: Instant,
    ) -> Result<(), Failure> {
        let Self::Socket(place) = self else {
            return Ok(());
        };
        if !fits(ask) {
            return Ok(());
        }
        if place.as_ref().is_some_and(|line| line.account == account) {
            return Ok(());
        }
        *place = None;
        let headers = headers::to_upstream_websocket(&ask.headers);
        let socket = upstream
            .connect(account, credential, headers, began)
            .await?;
        let turn_state = socket.headers().get("x-codex-turn-state");
        let turn_state = turn_state.and_then(|value| value.to_str().ok());
        *place = Some(Box::new(Line {
            turn_state: turn_state.map(str::to_owned),
            socket,
            account,
            detour,
            head: None,
            parent: None,
        }));
        Ok(())
    }

    /// Sends a turn: on the open socket, or as a request. What upstream takes in no frame goes as a request, too.
    pub(super) async fn send(
        &mut self,
        upstream: &Upstream,
        account: AccountId,
        credential: &Credential,
        ask: &Ask,
        began: Instant,
    ) -> Result<Source<'_>, Unsent> {
        if !fits(ask) {
            // What a socket remembers ends with a turn that does not pass through it.
            self.hang_up();
        }
        match self {
            Self::Socket(Some(line)) => {
                // Whatever becomes of this turn, upstream forgets the response before it.
                line.head = None;
                line.socket
                    .send(frame(ask, line.turn_state.as_deref()))
                    .await
                    .map_err(Unsent::Perhaps)?;
                Ok(Source::Socket(line))
            }
            _ => {
                let headers = headers::to_upstream_http(&ask.headers);
                let body = ask.request.body.clone();
                let events = upstream.create(account, credential, headers, body, began);
                Ok(Source::Http(events.await?))
            }
        }
    }

    /// The turn completed: upstream remembers its response.
    pub(super) fn completed(&mut self, response_id: Option<&str>, parent: Option<Parent>) {
        if let Self::Socket(Some(line)) = self {
            line.parent = parent;
            line.head = response_id.map(Into::into);
        }
    }

    /// Gives up the open socket.
    pub(super) fn hang_up(&mut self) {
        if let Self::Socket(place) = self {
            *place = None;
        }
    }

    /// Polls the idle socket. Ends when it was given up: upstream closed it, or it is old.
    pub(super) async fn rest(&mut self) {
        match self {
            Self::Socket(place @ Some(_)) => {
                let line = place.as_mut().expect("just matched");
                let left = SOCKET_AGE.saturating_sub(line.socket.age());
                // What upstream says between two turns belongs to none.
                let ended = async { while let Ok(Some(_)) = line.socket.next().await {} };
                drop(tokio::time::timeout(left, ended).await);
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

/// The turn state in a `response.metadata` event.
fn turn_state(event: &[u8]) -> Option<String> {
    let event: serde_json::Value = serde_json::from_slice(event).ok()?;
    event["headers"]["x-codex-turn-state"]
        .as_str()
        .map(str::to_owned)
}

/// Whether upstream takes it in a frame. Images of clients that speak HTTP go as they came.
pub(super) fn fits(ask: &Ask) -> bool {
    let images = ask.transport == Transport::Http && ask.request.facts.input_images;
    ask.request.body.len() <= FRAME_BYTES && !images
}

fn frame(ask: &Ask, turn_state: Option<&str>) -> Utf8Bytes {
    let none = HeaderMap::new();
    let headers = match ask.transport {
        // What the handshake said is not of this turn.
        Transport::WebSocket => &none,
        Transport::Http => &ask.headers,
    };
    let frame = ask.request.frame_with(headers, turn_state);
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
            Self::Socket(line) => {
                let event = line.socket.next().await?;
                let event = event.map(|text| Event::from_json(Bytes::from(text)));
                if let Some(event) = event
                    .as_ref()
                    .filter(|event| event.kind() == Kind::Metadata)
                {
                    line.turn_state = turn_state(&event.data()).or_else(|| line.turn_state.take());
                }
                Ok(event)
            }
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

//! The Responses API over a WebSocket: one client, one turn at a time. Where its turns run is the engine's affair: the socket only
//! remembers which lease the newest one ran on.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Extension,
    extract::{
        self, FromRequestParts as _, Request,
        ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade, close_code},
    },
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use http::HeaderMap;
use tokio::time::{Instant as Deadline, sleep_until, timeout};
use tokio_tungstenite::tungstenite;

use super::{Dialect, Peer, Place, State, body, encode, gate, responses};
use crate::{
    config::Transport,
    error::{ApiError, Code, for_codex_socket},
    ids::{LeaseId, TurnId},
    protocol::{
        contract::failed_event,
        event::{self, Created, Kind},
        headers,
        request::Shape,
    },
    telemetry::{self, InFlight},
    turn::{
        self, Ask, Caller, End, Event, Held, Inbox, Item, Reject, Stop, Token, relay::Receiver,
    },
};

/// One message from the client; as large as a body.
const MESSAGE_BYTES: usize = 64 << 20;
/// Between two signs of life while the model thinks.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Of a client's ping or pong: two bytes and a mask.
const CONTROL_HEAD: usize = 6;
/// How long a client may take to take one frame.
const SEND_TIME: Duration = Duration::from_secs(60);

type Shared = extract::State<Arc<State>>;

/// `GET /backend-api/codex/responses` with an upgrade.
pub(super) async fn codex(state: Shared, peer: Extension<Peer>, request: Request) -> Response {
    accept(state, peer, request, Dialect::Codex).await
}

/// `GET /v1/responses` with an upgrade.
pub(super) async fn openai(state: Shared, peer: Extension<Peer>, request: Request) -> Response {
    accept(state, peer, request, Dialect::OpenAi).await
}

async fn accept(
    extract::State(state): Shared,
    Extension(peer): Extension<Peer>,
    request: Request,
    dialect: Dialect,
) -> Response {
    let (mut parts, _) = request.into_parts();
    let upgrade = match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => upgrade,
        Err(_) => {
            return ApiError::new(
                Code::UpgradeRequired,
                "This path takes POST, or GET with a WebSocket handshake.",
            )
            .into_response();
        }
    };
    let caller = match gate::authenticate(&state, peer, &parts.headers).await {
        Ok(caller) => caller,
        Err(error) => return error.into_response(),
    };
    if state.upstream.transport() == Transport::Http {
        // Codex then speaks HTTP for the rest of its life, without a word to its user.
        return ApiError::new(
            Code::UpgradeRequired,
            "This service is set to HTTP; use POST.",
        )
        .into_response();
    }
    let pool = responses::limits(&state, &caller);
    // The socket outlives its request: it counts as a task and as a connection until its end.
    let counted = (state.tasks.token(), InFlight::start("ws"));
    let place = parts.extensions.get::<Place>().cloned();
    let inbox = Inbox::new(&state.bytes);
    let counts = inbox.clone();
    let mut response = upgrade
        .max_message_size(MESSAGE_BYTES)
        .max_frame_size(MESSAGE_BYTES)
        .read_buffer_size(8 << 10)
        .on_upgrade(move |socket| async move {
            Client {
                state,
                peer,
                caller,
                headers: headers::detached(&parts.headers),
                dialect,
                line: None,
                codex: false,
                socket,
                inbox,
            }
            .serve()
            .await;
            drop((counted, place));
        });
    response.headers_mut().extend(pool);
    response.extensions_mut().insert(counts);
    response
}

/// One connected client.
struct Client {
    state: Arc<State>,
    peer: Peer,
    caller: Caller,
    /// Of the handshake.
    headers: HeaderMap,
    dialect: Dialect,
    /// The lease that the newest turn ran on.
    line: Option<LeaseId>,
    /// Whether the newest turn showed a Codex client.
    codex: bool,
    socket: WebSocket,
    /// What has arrived of the next message.
    inbox: Inbox,
}

/// A turn that runs on the socket.
struct Running {
    items: Receiver<Item>,
    response_id: Option<String>,
    /// Of the last event.
    sequence: i64,
    /// When the next sign of life is due.
    keepalive: Deadline,
}

/// What happened next.
enum Step {
    Item(Option<Item>),
    Message(Option<Result<Message, axum::Error>>),
    KeepAlive,
    Drain,
}

/// The client is gone, or no longer takes what it asked for.
struct Gone;

impl Client {
    /// Serves until the client leaves, or the process closes between two turns.
    async fn serve(mut self) {
        let mut running: Option<Running> = None;
        let closing = self.state.closing.clone();
        loop {
            let due = running.as_ref().map(|running| running.keepalive);
            let idle = running.is_none();
            let step = tokio::select! {
                biased;
                item = next(&mut running) => Step::Item(item),
                message = self.socket.recv() => Step::Message(message),
                () = keepalive_due(due) => Step::KeepAlive,
                // Between turns, so that the client reconnects elsewhere without noticing.
                () = closing.cancelled(), if idle => Step::Drain,
            };
            let done = match step {
                Step::Item(item) => self.relay(&mut running, item).await,
                Step::Message(Some(Ok(message))) => self.receive(&mut running, message).await,
                Step::Message(Some(Err(error))) => {
                    if let Some((code, reason)) = refused(error) {
                        self.close(code, reason).await;
                    }
                    Err(Gone)
                }
                Step::Message(None) => Err(Gone),
                Step::KeepAlive => self.keep_alive(&mut running).await,
                Step::Drain => {
                    self.close(close_code::RESTART, "the service is restarting")
                        .await;
                    Err(Gone)
                }
            };
            if done.is_err() {
                return;
            }
        }
    }

    async fn receive(
        &mut self,
        running: &mut Option<Running>,
        message: Message,
    ) -> Result<(), Gone> {
        let text = match message {
            Message::Text(text) => text,
            Message::Binary(bytes) => {
                drop(self.inbox.whole(bytes.len()));
                return self
                    .refuse(&ApiError::new(
                        Code::InvalidRequest,
                        "Binary frames are not understood; send JSON as text.",
                    ))
                    .await;
            }
            Message::Ping(bytes) | Message::Pong(bytes) => {
                self.inbox.forget(CONTROL_HEAD + bytes.len());
                return Ok(());
            }
            // The reply goes out with the next read, which then ends.
            Message::Close(_) => return Ok(()),
        };
        let held = self.inbox.whole(text.len());
        match event::event_type(text.as_bytes()).as_deref() {
            None => {
                self.refuse(&ApiError::new(
                    Code::InvalidJson,
                    "A frame must be a JSON object with a type.",
                ))
                .await
            }
            // What upstream would only acknowledge: it has no meaning without a turn.
            Some(kind) if kind != "response.create" => Ok(()),
            Some(_) if running.is_some() => {
                self.refuse(&ApiError::new(
                    Code::ResponseInProgress,
                    "A response is in progress on this socket; wait for its end.",
                ))
                .await
            }
            Some(_) => match self.create(text, held).await {
                Ok(items) => {
                    *running = Some(Running {
                        items,
                        response_id: None,
                        sequence: -1,
                        keepalive: Deadline::now() + KEEPALIVE,
                    });
                    Ok(())
                }
                Err(error) => self.refuse(&error).await,
            },
        }
    }

    /// Starts the turn of one `response.create`.
    async fn create(
        &mut self,
        text: Utf8Bytes,
        held: Option<Held>,
    ) -> Result<Receiver<Item>, ApiError> {
        let arrived = Instant::now();
        let held = held.ok_or_else(body::full)?;
        // The key may have been revoked, or the first one made, since the handshake.
        self.caller = gate::authenticate(&self.state, self.peer, &self.headers).await?;
        let caller = self.caller.clone();
        let body = Bytes::from(text);
        let request = responses::parse(&self.state, body, Shape::Frame, &self.headers).await?;
        responses::admit(&caller, &request.facts)?;
        let route = match self.dialect {
            Dialect::Codex => "codex/responses",
            Dialect::OpenAi => "v1/responses",
        };
        let headers = self.headers.clone();
        let turn_state = request.facts.client.turn_state.clone().map(Bytes::from);
        let ask = Ask {
            id: TurnId::new(),
            caller,
            route,
            transport: turn::Transport::WebSocket,
            request,
            headers,
            turn_state,
            line: self.line,
            forwarded: None,
            sent: false,
            held,
            arrived,
        };
        self.codex = ask.is_codex();
        Ok(self.state.engine.start(ask))
    }

    async fn relay(
        &mut self,
        running: &mut Option<Running>,
        item: Option<Item>,
    ) -> Result<(), Gone> {
        match item {
            Some(Item::Event(event)) => {
                if let Some(running) = running {
                    running.keepalive = Deadline::now() + KEEPALIVE;
                    running.sequence =
                        event::sequence_number(&event.data()).unwrap_or(running.sequence);
                    if event.kind() == Kind::Created {
                        running.response_id =
                            Created::parse(&event.data()).and_then(|created| created.response_id);
                    }
                }
                if self.dialect == Dialect::OpenAi
                    && matches!(
                        event.kind(),
                        Kind::Codex | Kind::RateLimits | Kind::Metadata
                    )
                {
                    return Ok(());
                }
                self.event(event).await
            }
            Some(Item::Begun(token)) => self.begun(token).await,
            Some(Item::Head(_)) => Ok(()),
            Some(Item::End(end)) => {
                let ended = running.take();
                match end {
                    End::Complete => Ok(()),
                    // Elsewhere the client finds a replica that stays, without noticing.
                    End::Failed(stop) if matches!(*stop, Stop::Rejected(Reject::Draining, _)) => {
                        self.close(close_code::RESTART, "the service is restarting")
                            .await;
                        Err(Gone)
                    }
                    End::Failed(stop) if self.codex && for_codex_socket(&stop).is_some() => {
                        let error = for_codex_socket(&stop).unwrap_or_else(|| (*stop).into());
                        self.fail(ended, &error).await
                    }
                    End::Failed(stop) => match encode::explain(*stop) {
                        (_, Some(event)) => self.event(event).await,
                        (error, None) => {
                            let pool = responses::limits(&self.state, &self.caller);
                            self.fail(ended, &error.headers(pool)).await
                        }
                    },
                }
            }
            None => {
                *running = None;
                self.refuse(&Stop::Cancelled.into()).await
            }
        }
    }

    /// A Codex client is told how to come back, once per turn that came without a token of ours, before anything of upstream's.
    async fn begun(&mut self, token: Option<Token>) -> Result<(), Gone> {
        self.line = token.as_ref().map(|token| token.lease);
        let Some(token) = token.filter(|token| token.fresh) else {
            return Ok(());
        };
        if self.dialect != Dialect::Codex || !self.codex {
            return Ok(());
        }
        let event = serde_json::json!({
            "type": "response.metadata",
            "headers": { "x-codex-turn-state": token.text },
        });
        self.event(Event::from_json(event.to_string())).await
    }

    /// Codex counts only events as signs of life; SDKs would stumble over one they do not know.
    async fn keep_alive(&mut self, running: &mut Option<Running>) -> Result<(), Gone> {
        let Some(running) = running else {
            return Ok(());
        };
        running.keepalive = Deadline::now() + KEEPALIVE;
        match self.dialect {
            Dialect::Codex => {
                self.send(Message::Text(Utf8Bytes::from_static(
                    r#"{"type":"codex.keepalive"}"#,
                )))
                .await
            }
            Dialect::OpenAi => self.send(Message::Ping(Bytes::new())).await,
        }
    }

    /// Ends a response that has begun with a well-formed failure, and one that has not with an error.
    async fn fail(&mut self, ended: Option<Running>, error: &ApiError) -> Result<(), Gone> {
        let begun = ended.and_then(|ended| Some((ended.response_id?, ended.sequence)));
        let Some((id, sequence)) = begun else {
            return self.refuse(error).await;
        };
        let now = self.state.clock.now().as_second();
        let json = failed_event(&id, None, sequence + 1, now, &error.object());
        self.event(Event::from_json(json)).await
    }

    async fn event(&mut self, event: Event) -> Result<(), Gone> {
        match event.into_text() {
            Some(text) => {
                self.send(Message::Text(
                    Utf8Bytes::try_from(Bytes::from(text)).map_err(|_| Gone)?,
                ))
                .await
            }
            None => {
                self.refuse(&ApiError::new(
                    Code::UpstreamError,
                    "Upstream sent an event that is not text.",
                ))
                .await
            }
        }
    }

    async fn refuse(&mut self, error: &ApiError) -> Result<(), Gone> {
        let text = Utf8Bytes::try_from(error.frame()).map_err(|_| Gone)?;
        self.send(Message::Text(text)).await
    }

    async fn send(&mut self, message: Message) -> Result<(), Gone> {
        match timeout(SEND_TIME, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
    }

    async fn close(&mut self, code: u16, reason: &'static str) {
        let frame = CloseFrame {
            code,
            reason: Utf8Bytes::from_static(reason),
        };
        drop(self.send(Message::Close(Some(frame))).await);
    }
}

async fn next(running: &mut Option<Running>) -> Option<Item> {
    match running {
        Some(running) => running.items.recv().await,
        None => std::future::pending().await,
    }
}

async fn keepalive_due(due: Option<Deadline>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// How a socket is closed that has sent more than can be taken.
fn refused(error: axum::Error) -> Option<(u16, &'static str)> {
    match *error.into_inner().downcast::<tungstenite::Error>().ok()? {
        tungstenite::Error::Capacity(_) => {
            Some((close_code::SIZE, "a message is larger than 64 MiB"))
        }
        tungstenite::Error::Io(error) if error.kind() == io::ErrorKind::OutOfMemory => {
            telemetry::limit_rejected("memory");
            Some((
                close_code::AGAIN,
                "this replica is holding as many messages as it may",
            ))
        }
        _ => None,
    }
}

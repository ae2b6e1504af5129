//! Responses over a WebSocket: stateful per connection, one at a time.

use std::{sync::Arc, time::Instant};

use axum::{
    Json,
    extract::{
        self, FromRequestParts as _, Request,
        ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade},
    },
    response::{IntoResponse as _, Response},
};
use futures_util::FutureExt as _;
use http::{HeaderMap, HeaderValue, StatusCode};
use serde_json::{Value, json};

use super::{
    account::authorize,
    answer::{self, Answer, Step},
    connection::{Break, Link},
    fault::{Kind, Stage},
    http::{check_turn_state, limits, record, refused},
    state::Shared,
    strict::{self, Transport},
};

const BETA: &str = "responses_websockets=2026-02-06";

/// `GET /backend-api/codex/responses`.
pub(super) async fn accept(
    extract::State(shared): extract::State<Arc<Shared>>,
    extract::ConnectInfo(link): extract::ConnectInfo<Link>,
    request: Request,
) -> Response {
    let (mut parts, _) = request.into_parts();
    let headers = parts.headers.clone();
    let account = match authorize(&shared, &headers) {
        Ok(account) => account,
        Err(refusal) => return refusal,
    };
    let beta = headers
        .get("openai-beta")
        .and_then(|beta| beta.to_str().ok())
        .unwrap_or_default();
    if !beta.contains(BETA) {
        return (
            StatusCode::UPGRADE_REQUIRED,
            Json(json!({ "error": { "message": "missing beta header" } })),
        )
            .into_response();
    }
    let fault = shared.change(|state| state.due(&account, None, true));
    if let Some((status, extra, error)) = refused(fault.as_ref()) {
        let mut response = (status, Json(json!({ "error": error }))).into_response();
        let out = response.headers_mut();
        out.extend(limits(fault.as_ref(), shared.used_percent(&account)));
        out.extend(extra);
        return response;
    }
    match fault {
        Some(Kind::Silence(_)) => drop(shared.silence().await),
        Some(Kind::Cut(_)) => link.sever(Break::Reset).await,
        Some(Kind::End(_)) => link.sever(Break::End).await,
        _ => {}
    }
    let Ok(upgrade) = WebSocketUpgrade::from_request_parts(&mut parts, &()).await else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let (number, turn_state) = shared.change(|state| {
        state.sockets += 1;
        state.open_sockets += 1;
        let turn_state = state.turn_state(&account);
        (state.sockets, turn_state)
    });
    let mut response = upgrade
        .max_message_size(128 << 20)
        .max_frame_size(128 << 20)
        .on_upgrade(move |socket| async move {
            let mut line = Line {
                shared: Arc::clone(&shared),
                account,
                headers,
                number,
                socket,
                opened: Instant::now(),
                head: None,
                history: Vec::new(),
            };
            drop(line.serve().await);
            shared.change(|state| state.open_sockets -= 1);
        });
    response.headers_mut().insert(
        "x-codex-turn-state",
        HeaderValue::from_str(&turn_state).expect("ASCII"),
    );
    response
}

/// One socket.
struct Line {
    shared: Arc<Shared>,
    account: String,
    headers: HeaderMap,
    number: usize,
    socket: WebSocket,
    opened: Instant,
    /// The only response that is remembered, and the conversation up to it.
    head: Option<String>,
    history: Vec<Value>,
}

/// The socket is done with.
struct Closed;

impl Line {
    async fn serve(&mut self) -> Result<(), Closed> {
        loop {
            let message = tokio::select! {
                message = self.socket.recv() => message,
                () = self.shared.stopped() => return Err(Closed),
            };
            match message {
                Some(Ok(Message::Text(text))) => {
                    let frame: Value = serde_json::from_str(&text).unwrap_or_default();
                    match frame["type"].as_str() {
                        Some("response.create") => self.create(frame, text.len()).await?,
                        _ => self.shared.change(|state| state.unknown_frames += 1),
                    }
                }
                Some(Ok(Message::Binary(_))) => {
                    self.shared
                        .change(|state| state.violations.push("a binary frame".into()));
                    return Err(Closed);
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Err(Closed),
                Some(Ok(_)) => {}
            }
        }
    }

    async fn create(&mut self, mut frame: Value, bytes: usize) -> Result<(), Closed> {
        if let Some(frame) = frame.as_object_mut() {
            frame.remove("type");
        }
        let shared = Arc::clone(&self.shared);
        let n = record(
            &shared,
            &self.account,
            Transport::WebSocket,
            &self.headers,
            &frame,
            Some(self.number),
            200,
        );
        check_turn_state(&shared, &self.headers, &frame, &self.account);
        let refuse = |status: u16| shared.attempt(n, |attempt| attempt.status = status);
        if let Some(error) = strict::refusal(&frame, Transport::WebSocket) {
            refuse(400);
            return self.error(400, error, None).await;
        }
        if shared
            .config
            .socket_age
            .is_some_and(|age| self.opened.elapsed() > age)
        {
            refuse(400);
            let error = json!({ "type": "invalid_request_error", "code": "websocket_connection_limit_reached", "message": "This connection is too old" });
            self.error(400, error, None).await?;
            return Err(Closed);
        }
        let fault = shared.change(|state| {
            let turn = state.attempts[n].client_turn_id.clone();
            // A prewarm uses up no fault: it generates nothing that could go wrong.
            if frame["generate"] == false {
                return None;
            }
            state.due(&self.account, turn.as_deref(), false)
        });
        if let Some(given) = frame["previous_response_id"].as_str()
            && self.head.as_deref() != Some(given)
        {
            refuse(400);
            self.forget();
            if fault
                .as_ref()
                .is_some_and(|fault| matches!(fault, Kind::NotFoundAsFailed))
            {
                let failed = json!({ "type": "response.failed", "sequence_number": 0, "response": { "id": "resp_none", "status": "failed",
                    "error": { "code": "previous_response_not_found", "message": "Previous response not found." } } });
                return self.send(&failed).await;
            }
            let error = if matches!(fault, Some(Kind::NotFoundByText)) {
                json!({ "type": "invalid_request_error", "message": "Invalid `previous_response_id`." })
            } else {
                json!({ "type": "invalid_request_error", "code": "previous_response_not_found", "param": "previous_response_id",
                    "message": format!("Previous response with id '{given}' not found.") })
            };
            return self.error(400, error, None).await;
        }
        if frame.get("previous_response_id").is_none_or(Value::is_null) {
            self.history.clear();
        }
        self.history
            .extend(frame["input"].as_array().cloned().unwrap_or_default());
        if shared.config.bodies {
            shared.attempt(n, |attempt| attempt.history.clone_from(&self.history));
        }
        if let Some(error) = strict::broken(&self.history, &self.account) {
            refuse(400);
            return self.error(400, error, None).await;
        }
        let model = frame["model"].as_str().unwrap_or_default().to_owned();
        let id = shared.change(|state| state.id("resp"));
        if frame["generate"] == false {
            return self.answer(n, answer::prewarm(id, &model), None).await;
        }
        if let Some((status, headers, error)) = refused(fault.as_ref()) {
            refuse(status.as_u16());
            self.forget();
            let mut all = limits(fault.as_ref(), shared.used_percent(&self.account));
            all.extend(headers);
            return self.error(status.as_u16(), error, Some(&all)).await;
        }
        let answer = answer::plan(
            id,
            &model,
            &self.account,
            &self.history,
            bytes,
            &shared.config,
            fault.as_ref(),
        );
        self.answer(n, answer, fault).await
    }

    async fn answer(
        &mut self,
        n: usize,
        answer: Answer,
        fault: Option<Kind>,
    ) -> Result<(), Closed> {
        let said = self.say(n, answer, fault).await;
        if said.is_err() {
            self.shared.attempt(n, |attempt| attempt.cut = true);
        }
        said
    }

    /// An error means that it was cut, by the fault or by the peer.
    async fn say(&mut self, n: usize, answer: Answer, fault: Option<Kind>) -> Result<(), Closed> {
        let shared = Arc::clone(&self.shared);
        shared.attempt(n, |attempt| attempt.response_id = Some(answer.id.clone()));
        self.head = None;
        if matches!(fault, Some(Kind::Silence(Stage::BeforeHeaders))) {
            self.silence().await?;
        }
        if matches!(
            fault,
            Some(Kind::Cut(Stage::BeforeHeaders) | Kind::End(Stage::BeforeHeaders))
        ) {
            return Err(Closed);
        }
        self.preamble().await?;
        for step in answer.steps {
            if let Some(message) = self.socket.recv().now_or_never()
                && self.interrupted(message).is_err()
            {
                return Err(Closed);
            }
            match step {
                Step::Reached(stage) => match &fault {
                    Some(Kind::Cut(at) | Kind::End(at)) if *at == stage => {
                        return Err(Closed);
                    }
                    Some(Kind::Close(code, at)) if *at == stage => {
                        let frame = CloseFrame {
                            code: *code,
                            reason: "scripted".into(),
                        };
                        drop(self.socket.send(Message::Close(Some(frame))).await);
                        return Err(Closed);
                    }
                    Some(Kind::Silence(at)) if *at == stage => self.silence().await?,
                    _ => {}
                },
                Step::Together(events) => {
                    for event in events {
                        self.send(&event).await?;
                    }
                }
                Step::Event(mut event) => {
                    let kind = event["type"].as_str().unwrap_or_default().to_owned();
                    if kind == "response.output_text.delta" {
                        if let Some(pace) = answer.pace {
                            self.pause(pace).await?;
                        }
                        event["sent_us"] = crate::clock::micros().into();
                    }
                    self.send(&event).await?;
                    if kind == "response.completed" {
                        shared.bill(n, answer.usage);
                        self.head = Some(answer.id.clone());
                        self.history.extend(answer.output.clone());
                    } else if kind == "response.failed" {
                        shared.attempt(n, |attempt| attempt.completed = true);
                    }
                }
            }
        }
        Ok(())
    }

    /// What the backend says over a socket in place of headers.
    async fn preamble(&mut self) -> Result<(), Closed> {
        let turn_state = self.shared.change(|state| state.turn_state(&self.account));
        self.send(&json!({ "type": "response.metadata", "headers": { "x-codex-turn-state": turn_state, "x-models-etag": "\"fake-1\"" } })).await?;
        let used = self.shared.used_percent(&self.account);
        self.send(&rate_limits(used)).await
    }

    /// Waits, and notices a peer that speaks out of turn or leaves.
    async fn pause(&mut self, time: std::time::Duration) -> Result<(), Closed> {
        tokio::select! {
            () = tokio::time::sleep(time) => Ok(()),
            message = self.socket.recv() => self.interrupted(message),
        }
    }

    /// Until it is released, or the peer has had enough.
    async fn silence(&mut self) -> Result<(), Closed> {
        let shared = Arc::clone(&self.shared);
        let released = shared.silence();
        tokio::pin!(released);
        loop {
            let message = tokio::select! {
                message = self.socket.recv() => message,
                released = &mut released => return if released { Ok(()) } else { Err(Closed) },
            };
            self.interrupted(message)?;
        }
    }

    fn interrupted(&self, message: Option<Result<Message, axum::Error>>) -> Result<(), Closed> {
        match message {
            Some(Ok(Message::Text(text))) if text.contains("response.create") => {
                self.shared.change(|state| {
                    state
                        .violations
                        .push("two responses at once on a socket".into())
                });
                Err(Closed)
            }
            Some(Ok(Message::Close(_)) | Err(_)) | None => Err(Closed),
            Some(Ok(_)) => Ok(()),
        }
    }

    fn forget(&mut self) {
        self.head = None;
        self.history.clear();
    }

    async fn error(
        &mut self,
        status: u16,
        error: Value,
        headers: Option<&HeaderMap>,
    ) -> Result<(), Closed> {
        self.forget();
        let mut frame = json!({ "type": "error", "status": status, "error": error });
        if let Some(headers) = headers {
            let map = headers
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_str().unwrap_or_default().into()));
            frame["headers"] = Value::Object(map.collect());
        }
        self.send(&frame).await
    }

    async fn send(&mut self, event: &Value) -> Result<(), Closed> {
        self.socket
            .send(Message::Text(event.to_string().into()))
            .await
            .map_err(|_| Closed)
    }
}

/// The account's windows as an event.
pub(super) fn rate_limits(used: f64) -> Value {
    let window = |used: f64, minutes: u64| json!({ "used_percent": used, "window_minutes": minutes, "reset_at": super::account::epoch() + 9_000 });
    json!({ "type": "codex.rate_limits", "rate_limits": { "primary": window(used, 300), "secondary": window(20.0, 10_080) } })
}

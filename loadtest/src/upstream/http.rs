//! Responses over HTTP, the catalogue and the usage document.

use std::{
    collections::BTreeMap,
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};

use axum::{
    Json,
    body::{Body, Bytes},
    extract,
    response::{IntoResponse as _, Response},
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::{
    account::{asked_for_models, asked_for_usage, authorize, epoch},
    answer::{self, Answer, Step},
    connection::{Break, Link},
    fault::{Kind, Stage},
    state::{Attempt, Shared, Usage},
    strict::{self, Transport},
};
use crate::clock;

/// What the writer of an answer hands over to its body.
type Chunks = mpsc::Sender<Result<Chunk, std::io::Error>>;

/// Bytes to be sent, and what is true once they are.
struct Chunk {
    bytes: Bytes,
    sent: Sent,
}

#[derive(Clone, Copy, Debug)]
enum Sent {
    Something,
    Completed(Usage),
    Failed,
}

/// `POST /backend-api/codex/responses`.
pub(super) async fn create(
    extract::State(shared): extract::State<Arc<Shared>>,
    extract::ConnectInfo(link): extract::ConnectInfo<Link>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let packed = headers
        .get(header::CONTENT_ENCODING)
        .is_some_and(|encoding| encoding == "zstd");
    let body = if packed {
        zstd::decode_all(body.as_ref()).unwrap_or_default()
    } else {
        body.into()
    };
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let bytes = body.to_string().len();
    let account = match authorize(&shared, &headers) {
        Ok(account) => account,
        Err(refusal) => {
            record(&shared, "?", Transport::Http, &headers, &body, None, 401);
            return refusal;
        }
    };
    let n = record(
        &shared,
        &account,
        Transport::Http,
        &headers,
        &body,
        None,
        200,
    );
    check_turn_state(&shared, &headers, &body, &account);
    if let Some(error) = strict::refusal(&body, Transport::Http) {
        shared.attempt(n, |attempt| attempt.status = 400);
        return (StatusCode::BAD_REQUEST, Json(json!({ "error": error }))).into_response();
    }
    let history = body["input"].as_array().cloned().unwrap_or_default();
    if let Some(error) = strict::broken(&history, &account) {
        shared.attempt(n, |attempt| attempt.status = 400);
        return (StatusCode::BAD_REQUEST, Json(json!({ "error": error }))).into_response();
    }
    let fault = shared.change(|state| {
        if shared.config.bodies {
            state.attempts[n].history.clone_from(&history);
        }
        let turn = state.attempts[n].client_turn_id.clone();
        state.due(&account, turn.as_deref(), false)
    });
    if let Some((status, extra, error)) = refused(fault.as_ref()) {
        shared.attempt(n, |attempt| attempt.status = status.as_u16());
        let mut response = (status, Json(json!({ "error": error }))).into_response();
        response
            .headers_mut()
            .extend(limits(fault.as_ref(), shared.used_percent(&account)));
        response.headers_mut().extend(extra);
        return response;
    }
    let outgoing = Outgoing {
        shared: Arc::clone(&shared),
        n,
        ended: false,
    };
    match &fault {
        Some(Kind::Silence(Stage::BeforeHeaders)) => drop(shared.silence().await),
        Some(Kind::Cut(Stage::BeforeHeaders)) => link.sever(Break::Reset).await,
        Some(Kind::End(Stage::BeforeHeaders)) => link.sever(Break::End).await,
        _ => {}
    }
    let model = body["model"].as_str().unwrap_or_default();
    let id = shared.change(|state| state.id("resp"));
    let answer = answer::plan(
        id,
        model,
        &account,
        &history,
        bytes,
        &shared.config,
        fault.as_ref(),
    );
    let mut response = stream(outgoing, answer, fault.clone());
    let out = response.headers_mut();
    out.extend(limits(fault.as_ref(), shared.used_percent(&account)));
    let state = shared.change(|state| state.turn_state(&account));
    out.insert(
        "x-codex-turn-state",
        HeaderValue::from_str(&state).expect("ASCII"),
    );
    out.insert("x-request-id", HeaderValue::from_static("req_fake"));
    out.insert("x-models-etag", HeaderValue::from_static("\"fake-1\""));
    out.insert("openai-processing-ms", HeaderValue::from_static("7"));
    if let Ok(model) = HeaderValue::from_str(model) {
        out.insert("openai-model", model);
    }
    response
}

fn stream(mut outgoing: Outgoing, answer: Answer, fault: Option<Kind>) -> Response {
    let (sender, mut receiver) = mpsc::channel(256);
    let shared = Arc::clone(&outgoing.shared);
    shared.attempt(outgoing.n, |attempt| {
        attempt.response_id = Some(answer.id.clone());
    });
    tokio::spawn(async move {
        if write(&shared, answer, fault, &sender).await == Err(true) {
            // What was written before must have left the buffers: breaking a body throws away what has not.
            tokio::time::sleep(Duration::from_millis(30)).await;
            drop(sender.send(Err(std::io::Error::other("cut"))).await);
        }
    });
    let chunks = futures_util::stream::poll_fn(move |context| {
        let chunk = ready!(receiver.poll_recv(context));
        // Counted as it goes out: whoever has read it may ask, and what nobody asked for was not sent.
        Poll::Ready(chunk.map(|chunk| chunk.map(|chunk| outgoing.sends(chunk))))
    });
    let mut response = Response::new(Body::from_stream(chunks));
    response.headers_mut().insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    response
}

/// An answer on its way out; dropped before its end was sent, it was cut.
struct Outgoing {
    shared: Arc<Shared>,
    n: usize,
    ended: bool,
}

impl Outgoing {
    fn sends(&mut self, chunk: Chunk) -> Bytes {
        match chunk.sent {
            Sent::Something => return chunk.bytes,
            Sent::Completed(usage) => self.shared.bill(self.n, usage),
            Sent::Failed => self
                .shared
                .attempt(self.n, |attempt| attempt.completed = true),
        }
        self.ended = true;
        chunk.bytes
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        if !self.ended {
            self.shared.attempt(self.n, |attempt| attempt.cut = true);
        }
    }
}

/// Writes the answer; an error means it was cut: hard or politely.
async fn write(
    shared: &Shared,
    answer: Answer,
    fault: Option<Kind>,
    out: &Chunks,
) -> Result<(), bool> {
    let send = async |text: String, sent: Sent| {
        let bytes = Bytes::from(text);
        out.send(Ok(Chunk { bytes, sent })).await.map_err(|_| false)
    };
    for step in answer.steps {
        match step {
            Step::Reached(stage) => match &fault {
                Some(Kind::Cut(at)) if *at == stage => return Err(true),
                Some(Kind::End(at)) if *at == stage => return Err(false),
                Some(Kind::Silence(at)) if *at == stage => {
                    let released = tokio::select! {
                        () = out.closed() => false,
                        released = shared.silence() => released,
                    };
                    if !released {
                        return Err(false);
                    }
                }
                _ => {}
            },
            // Each in a chunk of its own, as a server that flushes every event writes them.
            Step::Together(events) => {
                for event in &events {
                    send(sse(event), Sent::Something).await?;
                }
            }
            Step::Event(event) => {
                let sent = match event["type"].as_str() {
                    Some("response.completed") => Sent::Completed(answer.usage),
                    Some("response.failed") => Sent::Failed,
                    _ => Sent::Something,
                };
                if let Some(pace) = answer.pace
                    && event["type"] == "response.output_text.delta"
                {
                    tokio::time::sleep(pace).await;
                }
                send(sse(&stamped(event)), sent).await?;
            }
        }
    }
    Ok(())
}

/// Deltas carry the moment at which they were sent, in microseconds of the machine's monotonic clock, for measuring the hop.
fn stamped(mut event: Value) -> Value {
    if event["type"] == "response.output_text.delta" {
        event["sent_us"] = clock::micros().into();
    }
    event
}

fn sse(event: &Value) -> String {
    format!(
        "event: {}\ndata: {event}\n\n",
        event["type"].as_str().unwrap_or_default()
    )
}

/// What a fault answers instead of a stream.
pub(super) fn refused(fault: Option<&Kind>) -> Option<(StatusCode, HeaderMap, Value)> {
    let mut headers = HeaderMap::new();
    let error =
        |kind: &str, message: &str| json!({ "type": kind, "code": kind, "message": message });
    let (status, error) = match fault? {
        Kind::RateLimit { resets_in } => {
            let error = json!({ "type": "usage_limit_reached", "message": "The usage limit has been reached", "plan_type": "plus",
                "resets_at": epoch() + resets_in, "resets_in_seconds": resets_in });
            (StatusCode::TOO_MANY_REQUESTS, error)
        }
        Kind::RetryAfter { seconds, .. } => {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(*seconds));
            (
                StatusCode::TOO_MANY_REQUESTS,
                error("rate_limit_exceeded", "Rate limit reached"),
            )
        }
        Kind::Unauthorized => (
            StatusCode::UNAUTHORIZED,
            error("invalid_authentication", "Could not validate your token"),
        ),
        Kind::Overloaded => (
            StatusCode::SERVICE_UNAVAILABLE,
            error("server_is_overloaded", "Our servers are overloaded"),
        ),
        Kind::ModelUnsupported => {
            let text =
                "The 'gpt-5.5' model is not supported when using Codex with a ChatGPT account.";
            (
                StatusCode::BAD_REQUEST,
                json!({ "type": "invalid_request_error", "message": text, "code": null }),
            )
        }
        Kind::ModelCapacity => {
            let text = "Selected model is at capacity. Please try a different model.";
            (
                StatusCode::BAD_REQUEST,
                json!({ "type": "invalid_request_error", "message": text, "code": null }),
            )
        }
        Kind::Status(status, code) => (
            StatusCode::from_u16(*status).expect("a status"),
            error(code, "the script says so"),
        ),
        _ => return None,
    };
    Some((status, headers, error))
}

/// The account's windows as headers.
pub(super) fn limits(fault: Option<&Kind>, used_percent: f64) -> HeaderMap {
    let (used, reset) = match fault {
        Some(Kind::RateLimit { resets_in }) => (100.0, epoch() + resets_in),
        Some(Kind::RetryAfter { used_percent, .. }) => (*used_percent, epoch() + 9_000),
        _ => (used_percent, epoch() + 9_000),
    };
    let mut headers = HeaderMap::new();
    let mut put = |name: &'static str, value: String| {
        headers.insert(name, HeaderValue::from_str(&value).expect("ASCII"));
    };
    put("x-codex-primary-used-percent", used.to_string());
    put("x-codex-primary-window-minutes", "300".into());
    put("x-codex-primary-reset-at", reset.to_string());
    put("x-codex-secondary-used-percent", "20".into());
    put("x-codex-secondary-window-minutes", "10080".into());
    put(
        "x-codex-secondary-reset-at",
        (epoch() + 400_000).to_string(),
    );
    headers
}

/// Notes a request or frame; yields its number.
pub(super) fn record(
    shared: &Shared,
    account: &str,
    transport: Transport,
    headers: &HeaderMap,
    body: &Value,
    socket: Option<usize>,
    status: u16,
) -> usize {
    let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let metadata = match &body["client_metadata"]["x-codex-turn-metadata"] {
        Value::String(metadata) => metadata.clone(),
        _ => headers
            .get("x-codex-turn-metadata")
            .map(text)
            .unwrap_or_default(),
    };
    let metadata: Value = serde_json::from_str(&metadata).unwrap_or_default();
    let turn = metadata["turn_id"]
        .as_str()
        .or_else(|| body["client_metadata"]["turn_id"].as_str());
    let headers: BTreeMap<String, String> = headers
        .iter()
        .filter(|_| shared.config.bodies)
        .map(|(name, value)| (name.to_string(), text(value)))
        .collect();
    shared.change(|state| {
        let n = state.attempts.len();
        state.attempts.push(Attempt {
            n,
            at: clock::epoch_millis(),
            account: account.to_owned(),
            transport: if transport == Transport::Http {
                "http"
            } else {
                "websocket"
            }
            .to_owned(),
            client_turn_id: turn.filter(|turn| !turn.is_empty()).map(str::to_owned),
            model: body["model"].as_str().unwrap_or_default().to_owned(),
            status,
            headers,
            body: if shared.config.bodies {
                body.clone()
            } else {
                Value::Null
            },
            history: Vec::new(),
            response_id: None,
            usage: None,
            completed: false,
            cut: false,
            socket,
        });
        n
    })
}

/// A turn state belongs to the account that it was made for; it comes back in a header or in the metadata of a frame.
pub(super) fn check_turn_state(shared: &Shared, headers: &HeaderMap, body: &Value, account: &str) {
    let header = headers
        .get("x-codex-turn-state")
        .and_then(|value| value.to_str().ok());
    let metadata = body["client_metadata"]["x-codex-turn-state"].as_str();
    let Some(given) = metadata.or(header) else {
        return;
    };
    shared.change(|state| {
        if state
            .turn_states
            .get(given)
            .is_none_or(|owner| owner != account)
        {
            state
                .violations
                .push(format!("turn state {given} was sent to {account}"));
        }
    });
}

/// `GET /backend-api/codex/models`.
pub(super) async fn models(
    extract::State(shared): extract::State<Arc<Shared>>,
    headers: HeaderMap,
) -> Response {
    let account = match authorize(&shared, &headers) {
        Ok(account) => account,
        Err(refusal) => return refusal,
    };
    shared.change(|state| state.models_reads += 1);
    let own = asked_for_models(&shared, &account);
    if own.as_ref().is_some_and(Vec::is_empty) {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let model = |slug: &str, visibility: &str| {
        json!({
            "slug": slug, "display_name": slug, "description": "fake", "base_instructions": "", "default_reasoning_level": "low",
            "supported_reasoning_levels": [{ "effort": "low", "description": "quick" }], "supported_in_api": true, "priority": 1,
            "minimal_client_version": "0.100.0", "supports_reasoning_summaries": true, "support_verbosity": true,
            "default_verbosity": "low", "supports_parallel_tool_calls": true, "context_window": 272_000,
            "input_modalities": ["text", "image"], "available_in_plans": ["plus", "pro"], "prefer_websockets": true,
            "visibility": visibility, "truncation_policy": { "mode": "tokens", "limit": 10_000 }, "experimental_supported_tools": [],
            "shell_type": "shell_command",
        })
    };
    let models = match &own {
        Some(slugs) => slugs.iter().map(|slug| model(slug, "list")).collect(),
        None => vec![
            model("gpt-5.5", "list"),
            model("gpt-5.4-mini", "list"),
            model("gpt-5.6-sol", "hide"),
        ],
    };
    let body = json!({ "models": models });
    ([(header::ETAG, "\"fake-1\"")], Json(body)).into_response()
}

/// `GET /backend-api/wham/usage`.
pub(super) async fn usage(
    extract::State(shared): extract::State<Arc<Shared>>,
    headers: HeaderMap,
) -> Response {
    let account = match authorize(&shared, &headers) {
        Ok(account) => account,
        Err(refusal) => return refusal,
    };
    let held = shared.change(|state| {
        *state.usage_reads.entry(account.clone()).or_default() += 1;
        state.usage_held.contains(&account)
    });
    if held && !shared.silence().await {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if let Some((status, body)) = asked_for_usage(&shared, &account) {
        return (status, Json(body)).into_response();
    }
    let window = |used: f64, seconds: u64, after: u64| json!({ "used_percent": used, "limit_window_seconds": seconds, "reset_after_seconds": after, "reset_at": epoch() + after });
    let body = json!({ "plan_type": "plus", "rate_limit": { "allowed": true, "limit_reached": false,
        "primary_window": window(shared.used_percent(&account), 18_000, 9_000), "secondary_window": window(20.0, 604_800, 400_000) } });
    // As a turn carries them.
    let limits = limits(None, shared.used_percent(&account));
    (limits, Json(body)).into_response()
}

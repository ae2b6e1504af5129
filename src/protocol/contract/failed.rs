//! The events of our own making, in the forms that clients understand.

use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::protocol::event::ErrorBody;
use crate::protocol::failure::Failure;

/// The `error` object of the error envelope, in bodies, events and frames.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ErrorObject<'a> {
    /// The sentence for the user.
    pub message: &'a str,
    /// The type: what Codex goes by on a 429.
    pub r#type: &'a str,
    /// The code: what Codex goes by otherwise.
    pub code: &'a str,
    /// The request field at fault.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub param: Option<&'a str>,
    /// The plan that a usage limit belongs to; without one the client offers no upgrade.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan_type: Option<&'a str>,
    /// When the limit resets, epoch seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resets_at: Option<i64>,
    /// When to ask again; within a stream it travels as `error.headers`.
    #[serde(
        rename = "headers",
        skip_serializing_if = "Option::is_none",
        serialize_with = "retry_after"
    )]
    pub retry_after: Option<Duration>,
}

impl<'a> From<&'a ErrorBody> for ErrorObject<'a> {
    fn from(error: &'a ErrorBody) -> Self {
        let name = error
            .code
            .as_deref()
            .or(error.kind.as_deref())
            .unwrap_or("upstream_error");
        let wait = error
            .headers
            .get(http::header::RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        Self {
            message: error
                .message
                .as_deref()
                .unwrap_or("Upstream reported a failure"),
            r#type: error.kind.as_deref().unwrap_or("server_error"),
            code: name,
            param: error.param.as_deref(),
            plan_type: error.plan_type.as_deref(),
            resets_at: error.resets_at,
            retry_after: wait.map(Duration::from_secs),
        }
    }
}

impl<'a> From<&'a Failure> for ErrorObject<'a> {
    fn from(failure: &'a Failure) -> Self {
        Self {
            message: &failure.message,
            r#type: failure.kind.as_deref().unwrap_or("server_error"),
            code: failure.code.as_deref().unwrap_or("upstream_error"),
            param: failure.param.as_deref(),
            plan_type: failure.plan_type.as_deref(),
            resets_at: failure.resets_at,
            retry_after: failure.client_retry_after(),
        }
    }
}

/// The `{"retry-after":"3"}` that Codex reads out of an error: text, whole seconds, rounded up.
fn retry_after<S: serde::Serializer>(
    wait: &Option<Duration>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let wait = wait.unwrap_or_default();
    let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
    json!({"retry-after": seconds.to_string()}).serialize(serializer)
}

#[derive(Serialize)]
struct Event<'a> {
    r#type: &'static str,
    sequence_number: i64,
    response: Response<'a>,
}

#[derive(Serialize)]
struct Response<'a> {
    id: &'a str,
    object: &'static str,
    created_at: i64,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<&'a str>,
    output: [(); 0],
    incomplete_details: Option<()>,
    error: Option<&'a ErrorObject<'a>>,
}

/// A `response.failed` for a stream that is open: well-formed for strict parsers, which hang without the number.
pub fn failed_event(
    response_id: &str,
    model: Option<&str>,
    sequence_number: i64,
    created_at: i64,
    error: &ErrorObject<'_>,
) -> Bytes {
    event(
        "response.failed",
        "failed",
        response_id,
        model,
        sequence_number,
        created_at,
        Some(error),
    )
}

/// A `response.created` for a stream whose upstream left it out.
pub fn created_event(
    response_id: &str,
    model: Option<&str>,
    sequence_number: i64,
    created_at: i64,
) -> Bytes {
    event(
        "response.created",
        "in_progress",
        response_id,
        model,
        sequence_number,
        created_at,
        None,
    )
}

fn event(
    r#type: &'static str,
    status: &'static str,
    id: &str,
    model: Option<&str>,
    sequence_number: i64,
    created_at: i64,
    error: Option<&ErrorObject<'_>>,
) -> Bytes {
    let object = "response";
    let response = Response {
        id,
        object,
        created_at,
        status,
        model,
        output: [],
        incomplete_details: None,
        error,
    };
    bytes(&Event {
        r#type,
        sequence_number,
        response,
    })
}

/// An `error` frame for a WebSocket client. The status is part of it: Codex ignores a frame without one, and hangs.
pub fn error_frame(status: u16, error: &ErrorObject<'_>, headers: &HeaderMap) -> Bytes {
    #[derive(Serialize)]
    struct Frame<'a> {
        r#type: &'static str,
        status: u16,
        error: &'a ErrorObject<'a>,
        #[serde(skip_serializing_if = "Map::is_empty")]
        headers: Map<String, Value>,
    }
    let text = |value: &http::HeaderValue| value.to_str().ok().map(Value::from);
    let headers = headers
        .iter()
        .filter_map(|(name, value)| Some((name.to_string(), text(value)?)))
        .collect();
    bytes(&Frame {
        r#type: "error",
        status,
        error,
        headers,
    })
}

fn bytes(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value)
        .expect("plain data with string keys serialises")
        .into()
}

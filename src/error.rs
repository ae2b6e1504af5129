//! Every 4xx and 5xx that a client sees is chosen here, in three forms: an OpenAI error body, a `response.failed` event of an open
//! stream, and a WebSocket `error` frame.
//!
//! [`Code`] is the catalogue: one row per case, stable strings. Upstream's own refusals are passed on as upstream worded them. Nothing
//! here carries a token, a prompt or the text of an internal error.

use std::{fmt, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};

/// What went wrong, as clients can tell it apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The request is not valid.
    InvalidRequest,
    /// The body is not valid JSON, or not an object.
    InvalidJson,
    /// The body is compressed in a way we do not read, or damaged.
    InvalidEncoding,
    /// An image that upstream does not take.
    UnsupportedInputImage,
    /// `previous_response_id` is known to nobody here.
    PreviousResponseNotFound,
    /// No key, or not a valid one.
    InvalidApiKey,
    /// The key has expired.
    ExpiredApiKey,
    /// The key may not use this model.
    ModelNotAllowed,
    /// No account serves this model.
    ModelNotFound,
    /// No such path.
    NotFound,
    /// The path has another method.
    MethodNotAllowed,
    /// The body is larger than we take.
    PayloadTooLarge,
    /// The path speaks WebSocket only after a proper handshake.
    UpgradeRequired,
    /// Every eligible account has used up its limit.
    UsageLimitReached,
    /// This replica holds as many bytes of bodies as it may.
    Overloaded,
    /// One response at a time on a socket.
    ResponseInProgress,
    /// No account can serve.
    NoAccounts,
    /// The process is about to stop.
    Draining,
    /// Postgres is away, and without it this cannot be served.
    ContinuityUnavailable,
    /// Upstream answered in a way that is no answer.
    UpstreamError,
    /// Upstream could not be reached.
    UpstreamUnavailable,
    /// Upstream did not answer in time.
    UpstreamTimeout,
    /// Upstream ended its answer before it was complete.
    UpstreamPrematureClose,
    /// Upstream sent an event larger than we relay.
    StreamEventTooLarge,
    /// The client did not read for a minute.
    SlowConsumer,
    /// The turn was cancelled by the end of this process.
    Cancelled,
}

/// One row of the catalogue.
struct Row {
    status: StatusCode,
    code: &'static str,
    kind: &'static str,
    /// Advice where the case itself knows one, in seconds.
    retry_after: Option<u64>,
}

impl Code {
    /// Every code, for the documentation and its test.
    pub const ALL: [Self; 26] = [
        Self::InvalidRequest,
        Self::InvalidJson,
        Self::InvalidEncoding,
        Self::UnsupportedInputImage,
        Self::PreviousResponseNotFound,
        Self::InvalidApiKey,
        Self::ExpiredApiKey,
        Self::ModelNotAllowed,
        Self::ModelNotFound,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::PayloadTooLarge,
        Self::UpgradeRequired,
        Self::UsageLimitReached,
        Self::Overloaded,
        Self::ResponseInProgress,
        Self::NoAccounts,
        Self::Draining,
        Self::ContinuityUnavailable,
        Self::UpstreamError,
        Self::UpstreamUnavailable,
        Self::UpstreamTimeout,
        Self::UpstreamPrematureClose,
        Self::StreamEventTooLarge,
        Self::SlowConsumer,
        Self::Cancelled,
    ];

    fn row(self) -> Row {
        let row = |status, code, kind, retry_after| Row { status, code, kind, retry_after };
        let invalid = "invalid_request_error";
        let server = "server_error";
        match self {
            Self::InvalidRequest => row(StatusCode::BAD_REQUEST, invalid, invalid, None),
            Self::InvalidJson => row(StatusCode::BAD_REQUEST, "invalid_json", invalid, None),
            Self::InvalidEncoding => row(StatusCode::BAD_REQUEST, "invalid_encoding", invalid, None),
            Self::UnsupportedInputImage => row(StatusCode::BAD_REQUEST, "unsupported_input_image_format", invalid, None),
            Self::PreviousResponseNotFound => row(StatusCode::BAD_REQUEST, "previous_response_not_found", invalid, None),
            Self::InvalidApiKey => row(StatusCode::UNAUTHORIZED, "invalid_api_key", "authentication_error", None),
            Self::ExpiredApiKey => row(StatusCode::UNAUTHORIZED, "expired_api_key", "authentication_error", None),
            Self::ModelNotAllowed => row(StatusCode::FORBIDDEN, "model_not_allowed", "permission_error", None),
            Self::ModelNotFound => row(StatusCode::NOT_FOUND, "model_not_found", invalid, None),
            Self::NotFound => row(StatusCode::NOT_FOUND, "not_found", invalid, None),
            Self::MethodNotAllowed => row(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", invalid, None),
            Self::PayloadTooLarge => row(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", invalid, None),
            Self::UpgradeRequired => row(StatusCode::UPGRADE_REQUIRED, "upgrade_required", invalid, None),
            Self::UsageLimitReached => row(StatusCode::TOO_MANY_REQUESTS, "usage_limit_reached", "usage_limit_reached", None),
            Self::Overloaded => row(StatusCode::TOO_MANY_REQUESTS, "proxy_overloaded", "rate_limit_error", Some(5)),
            Self::ResponseInProgress => row(StatusCode::CONFLICT, "response_in_progress", invalid, None),
            Self::NoAccounts => row(StatusCode::SERVICE_UNAVAILABLE, "no_accounts", server, Some(30)),
            Self::Draining => row(StatusCode::SERVICE_UNAVAILABLE, "draining", server, Some(1)),
            Self::ContinuityUnavailable => {
                row(StatusCode::SERVICE_UNAVAILABLE, "continuity_unavailable", server, Some(2))
            }
            Self::UpstreamError => row(StatusCode::BAD_GATEWAY, "upstream_error", server, None),
            Self::UpstreamUnavailable => row(StatusCode::BAD_GATEWAY, "upstream_unavailable", server, None),
            Self::UpstreamTimeout => row(StatusCode::GATEWAY_TIMEOUT, "upstream_timeout", server, None),
            Self::UpstreamPrematureClose => {
                row(StatusCode::GATEWAY_TIMEOUT, "upstream_premature_close", server, None)
            }
            Self::StreamEventTooLarge => row(StatusCode::BAD_GATEWAY, "stream_event_too_large", server, None),
            Self::SlowConsumer => row(StatusCode::SERVICE_UNAVAILABLE, "slow_consumer", server, None),
            Self::Cancelled => row(StatusCode::SERVICE_UNAVAILABLE, "cancelled", server, Some(1)),
        }
    }

    /// The stable string that clients see.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        self.row().code
    }

    /// The status of a plain answer.
    #[must_use]
    pub fn status(self) -> StatusCode {
        self.row().status
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error as a client will see it.
#[derive(Clone, Debug)]
pub struct ApiError {
    status: StatusCode,
    /// The inner object: `message`, `type`, `code`, `param`...
    body: Map<String, Value>,
    retry_after: Option<Duration>,
    headers: Vec<(HeaderName, HeaderValue)>,
}

impl ApiError {
    /// An error of the catalogue. `message` says what happened and what to do.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let row = code.row();
        let mut body = Map::new();
        body.insert("message".into(), Value::String(message.into()));
        body.insert("type".into(), row.kind.into());
        body.insert("code".into(), row.code.into());
        Self { status: row.status, body, retry_after: row.retry_after.map(Duration::from_secs), headers: Vec::new() }
    }

    /// Upstream's own refusal, in its words and with its status. Server errors of upstream are 502 or 503 here.
    #[must_use]
    pub fn upstream(status: StatusCode, body: Map<String, Value>) -> Self {
        let status = match status {
            StatusCode::INTERNAL_SERVER_ERROR => StatusCode::BAD_GATEWAY,
            status => status,
        };
        Self { status, body, retry_after: None, headers: Vec::new() }
    }

    /// Names the offending field by its dotted path.
    #[must_use]
    pub fn param(mut self, param: Option<impl Into<String>>) -> Self {
        if let Some(param) = param {
            self.body.insert("param".into(), Value::String(param.into()));
        }
        self
    }

    /// A finer code within the same status, such as a validator's.
    #[must_use]
    pub fn code(mut self, code: &str) -> Self {
        self.body.insert("code".into(), code.into());
        self
    }

    /// When the limit ends, in epoch seconds.
    #[must_use]
    pub fn resets_at(mut self, at: Option<i64>) -> Self {
        if let Some(at) = at {
            self.body.insert("resets_at".into(), at.into());
        }
        self
    }

    /// How long to wait before trying again.
    #[must_use]
    pub fn retry_after(mut self, after: Option<Duration>) -> Self {
        self.retry_after = after.or(self.retry_after);
        self
    }

    /// Adds headers to the plain answer and to the `headers` of an error frame, such as the pool's limits.
    #[must_use]
    pub fn headers(mut self, headers: impl IntoIterator<Item = (HeaderName, HeaderValue)>) -> Self {
        self.headers.extend(headers);
        self
    }

    /// The status of the plain answer.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The code that clients see.
    #[must_use]
    pub fn code_str(&self) -> &str {
        self.body.get("code").or_else(|| self.body.get("type")).and_then(Value::as_str).unwrap_or("upstream_error")
    }

    /// A well-formed `response.failed` event for a stream whose head has gone out.
    #[must_use]
    pub fn failed_event(&self, response_id: Option<&str>, sequence_number: u64) -> Bytes {
        let mut error = self.body.clone();
        if let Some(after) = self.retry_after {
            error.insert("headers".into(), json!({ "retry-after": seconds(after) }));
        }
        let event = json!({
            "type": "response.failed",
            "sequence_number": sequence_number,
            "response": {
                "id": response_id.unwrap_or("resp_unknown"),
                "object": "response",
                "status": "failed",
                "output": [],
                "incomplete_details": null,
                "error": error,
            },
        });
        event.to_string().into()
    }

    /// A WebSocket `error` frame; it always has a `status`, or clients wait for ever.
    #[must_use]
    pub fn frame(&self) -> String {
        let mut frame = json!({ "type": "error", "status": self.status.as_u16(), "error": self.body });
        let mut headers: Map<String, Value> = self
            .headers
            .iter()
            .filter_map(|(name, value)| Some((name.as_str().to_owned(), value.to_str().ok()?.into())))
            .collect();
        if let Some(after) = self.retry_after {
            headers.insert("retry-after".into(), seconds(after).into());
        }
        if !headers.is_empty() {
            frame["headers"] = Value::Object(headers);
        }
        frame.to_string()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({ "error": self.body }).to_string();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_str(&seconds(after)).expect("digits"));
        }
        if self.status == StatusCode::CONFLICT {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        headers.extend(self.headers.into_iter().map(|(name, value)| (Some(name), value)).collect::<http::HeaderMap>());
        response
    }
}

/// Whole seconds, rounded up: never too early.
fn seconds(duration: Duration) -> String {
    duration.as_millis().div_ceil(1000).to_string()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_code_is_unique_and_none_is_a_500() {
        let codes: HashSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
        assert_eq!(codes.len(), Code::ALL.len());
        for code in Code::ALL {
            assert!(code.status().is_client_error() || code.status().is_server_error(), "{code}");
            assert_ne!(code.status(), StatusCode::INTERNAL_SERVER_ERROR, "{code}");
        }
    }

    #[test]
    fn the_three_forms_carry_the_same_error() {
        let error = ApiError::new(Code::UsageLimitReached, "all used up")
            .resets_at(Some(1_900_000_000))
            .retry_after(Some(Duration::from_millis(1500)));
        let frame: Value = serde_json::from_str(&error.frame()).unwrap();
        assert_eq!(frame["status"], 429);
        assert_eq!(frame["error"]["resets_at"], 1_900_000_000);
        assert_eq!(frame["headers"]["retry-after"], "2");
        let event: Value = serde_json::from_slice(&error.failed_event(Some("resp_1"), 7)).unwrap();
        assert_eq!(event["sequence_number"], 7);
        assert_eq!(event["response"]["error"]["code"], "usage_limit_reached");
        let response = error.into_response();
        assert_eq!(response.status(), 429);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }
}

//! Every 4xx and 5xx that a client sees is chosen here, in three forms: an OpenAI error body, a `response.failed` event of an open
//! stream, and a WebSocket `error` frame.
//!
//! [`Code`] is the catalogue: one row per case, stable strings. Upstream's own refusals are passed on as upstream worded them. Nothing
//! here carries a token, a prompt or the text of an internal error.

mod bridge;
#[cfg(test)]
mod tests;

use std::{borrow::Cow, fmt, time::Duration};

use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};

pub use self::bridge::for_codex_socket;
use crate::{
    protocol::{
        contract::{ErrorObject, error_frame},
        failure::{Class, Failure},
        request::Invalid,
    },
    turn::Stop,
};

/// Clients give up on longer ones, and limits are lifted early.
const LONGEST_WAIT: Duration = Duration::from_secs(300);

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
    /// The turn-state token is damaged, forged or of another scope.
    BridgeTokenInvalid,
    /// Another replica holds the conversation, and turns are not sent there.
    BridgeWrongInstance,
    /// The conversation of the token is gone.
    BridgeSessionExpired,
    /// Token and response name different conversations.
    ContinuityConflict,
    /// The replica that holds the conversation does not answer.
    BridgeOwnerUnreachable,
    /// This replica is leaving.
    BridgeDrainActive,
    /// There is no room for one more session, or turn of a session.
    BridgeCapacity,
    /// No key, or not a valid one.
    InvalidApiKey,
    /// The key has expired.
    ExpiredApiKey,
    /// The key may not use this model.
    ModelNotAllowed,
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
    /// This replica holds as many bytes of bodies as it may, or every account as many turns.
    Overloaded,
    /// The key has asked for this too often.
    RateLimited,
    /// A login of an account that is over, under way, or another seat's.
    LoginConflict,
    /// One response at a time on a socket.
    ResponseInProgress,
    /// No account can serve.
    NoAccounts,
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
    pub const ALL: [Self; 33] = [
        Self::InvalidRequest,
        Self::InvalidJson,
        Self::InvalidEncoding,
        Self::UnsupportedInputImage,
        Self::PreviousResponseNotFound,
        Self::BridgeTokenInvalid,
        Self::BridgeWrongInstance,
        Self::BridgeSessionExpired,
        Self::ContinuityConflict,
        Self::BridgeOwnerUnreachable,
        Self::BridgeDrainActive,
        Self::BridgeCapacity,
        Self::InvalidApiKey,
        Self::ExpiredApiKey,
        Self::ModelNotAllowed,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::PayloadTooLarge,
        Self::UpgradeRequired,
        Self::UsageLimitReached,
        Self::Overloaded,
        Self::RateLimited,
        Self::LoginConflict,
        Self::ResponseInProgress,
        Self::NoAccounts,
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
        let row = |status, code, kind, retry_after| Row {
            status,
            code,
            kind,
            retry_after,
        };
        let invalid = "invalid_request_error";
        let server = "server_error";
        match self {
            Self::InvalidRequest => row(StatusCode::BAD_REQUEST, invalid, invalid, None),
            Self::InvalidJson => row(StatusCode::BAD_REQUEST, "invalid_json", invalid, None),
            Self::InvalidEncoding => {
                row(StatusCode::BAD_REQUEST, "invalid_encoding", invalid, None)
            }
            Self::UnsupportedInputImage => row(
                StatusCode::BAD_REQUEST,
                "unsupported_input_image_format",
                invalid,
                None,
            ),
            Self::PreviousResponseNotFound => row(
                StatusCode::BAD_REQUEST,
                "previous_response_not_found",
                invalid,
                None,
            ),
            Self::BridgeTokenInvalid => {
                row(StatusCode::CONFLICT, "bridge_token_invalid", invalid, None)
            }
            Self::BridgeWrongInstance => {
                row(StatusCode::CONFLICT, "bridge_wrong_instance", server, None)
            }
            Self::BridgeSessionExpired => row(
                StatusCode::CONFLICT,
                "bridge_session_expired",
                invalid,
                None,
            ),
            Self::ContinuityConflict => {
                row(StatusCode::CONFLICT, "continuity_conflict", invalid, None)
            }
            Self::BridgeOwnerUnreachable => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "bridge_owner_unreachable",
                server,
                Some(1),
            ),
            Self::BridgeDrainActive => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "bridge_drain_active",
                server,
                Some(1),
            ),
            Self::BridgeCapacity => row(
                StatusCode::TOO_MANY_REQUESTS,
                "bridge_capacity",
                "rate_limit_error",
                Some(1),
            ),
            Self::InvalidApiKey => row(
                StatusCode::UNAUTHORIZED,
                "invalid_api_key",
                "authentication_error",
                None,
            ),
            Self::ExpiredApiKey => row(
                StatusCode::UNAUTHORIZED,
                "expired_api_key",
                "authentication_error",
                None,
            ),
            Self::ModelNotAllowed => row(
                StatusCode::FORBIDDEN,
                "model_not_allowed",
                "permission_error",
                None,
            ),
            Self::NotFound => row(StatusCode::NOT_FOUND, "not_found", invalid, None),
            Self::MethodNotAllowed => row(
                StatusCode::METHOD_NOT_ALLOWED,
                "method_not_allowed",
                invalid,
                None,
            ),
            Self::PayloadTooLarge => row(
                StatusCode::PAYLOAD_TOO_LARGE,
                "payload_too_large",
                invalid,
                None,
            ),
            Self::UpgradeRequired => row(
                StatusCode::UPGRADE_REQUIRED,
                "upgrade_required",
                invalid,
                None,
            ),
            Self::UsageLimitReached => row(
                StatusCode::TOO_MANY_REQUESTS,
                "usage_limit_reached",
                "usage_limit_reached",
                None,
            ),
            Self::Overloaded => row(
                StatusCode::TOO_MANY_REQUESTS,
                "proxy_overloaded",
                "rate_limit_error",
                Some(5),
            ),
            Self::RateLimited => row(
                StatusCode::TOO_MANY_REQUESTS,
                "rate_limit_exceeded",
                "rate_limit_error",
                Some(30),
            ),
            Self::LoginConflict => row(StatusCode::CONFLICT, "login_conflict", invalid, None),
            Self::ResponseInProgress => {
                row(StatusCode::CONFLICT, "response_in_progress", invalid, None)
            }
            Self::NoAccounts => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "no_accounts",
                server,
                Some(30),
            ),
            Self::ContinuityUnavailable => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "continuity_unavailable",
                server,
                Some(2),
            ),
            Self::UpstreamError => row(StatusCode::BAD_GATEWAY, "upstream_error", server, None),
            Self::UpstreamUnavailable => row(
                StatusCode::BAD_GATEWAY,
                "upstream_unavailable",
                server,
                None,
            ),
            Self::UpstreamTimeout => row(
                StatusCode::GATEWAY_TIMEOUT,
                "upstream_timeout",
                server,
                None,
            ),
            Self::UpstreamPrematureClose => row(
                StatusCode::GATEWAY_TIMEOUT,
                "upstream_premature_close",
                server,
                None,
            ),
            Self::StreamEventTooLarge => row(
                StatusCode::BAD_GATEWAY,
                "stream_event_too_large",
                server,
                None,
            ),
            Self::SlowConsumer => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "slow_consumer",
                server,
                None,
            ),
            Self::Cancelled => row(
                StatusCode::SERVICE_UNAVAILABLE,
                "cancelled",
                server,
                Some(1),
            ),
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
    message: String,
    kind: Cow<'static, str>,
    code: Cow<'static, str>,
    param: Option<String>,
    plan_type: Option<String>,
    resets_at: Option<i64>,
    retry_after: Option<Duration>,
    headers: HeaderMap,
    /// Upstream's own body, where it goes out as it came.
    body: Option<Bytes>,
}

impl ApiError {
    /// An error of the catalogue. `message` says what happened and what to do.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let row = code.row();
        Self {
            status: row.status,
            message: message.into(),
            kind: row.kind.into(),
            code: row.code.into(),
            param: None,
            plan_type: None,
            resets_at: None,
            retry_after: row.retry_after.map(Duration::from_secs),
            headers: HeaderMap::new(),
            body: None,
        }
    }

    /// Names the offending field by its dotted path.
    #[must_use]
    pub fn param(mut self, param: Option<String>) -> Self {
        self.param = param;
        self
    }

    /// A finer code within the same status, such as a validator's.
    #[must_use]
    pub fn code(mut self, code: &'static str) -> Self {
        self.code = code.into();
        self
    }

    /// When the limit ends, in epoch seconds.
    #[must_use]
    pub fn resets_at(mut self, at: Option<i64>) -> Self {
        self.resets_at = at;
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
        &self.code
    }

    /// The `error` object.
    #[must_use]
    pub fn object(&self) -> ErrorObject<'_> {
        ErrorObject {
            message: &self.message,
            r#type: &self.kind,
            code: &self.code,
            param: self.param.as_deref(),
            plan_type: self.plan_type.as_deref(),
            resets_at: self.resets_at,
            retry_after: self.retry_after,
        }
    }

    /// A WebSocket `error` frame; it always has a `status`, or clients wait for ever.
    #[must_use]
    pub fn frame(&self) -> Bytes {
        let mut headers = self.headers.clone();
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds(after));
        }
        error_frame(
            self.status.as_u16(),
            &ErrorObject {
                retry_after: None,
                ..self.object()
            },
            &headers,
        )
    }
}

/// Upstream's refusal, in its words. What upstream calls an internal error is a bad gateway here: Codex hides the text of a 500.
impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        let code = match failure.class {
            Class::Database => Code::ContinuityUnavailable,
            Class::Network => Code::UpstreamUnavailable,
            Class::Timeout(_) => Code::UpstreamTimeout,
            Class::Truncated => Code::UpstreamPrematureClose,
            Class::TooLarge => Code::StreamEventTooLarge,
            Class::PreviousResponseNotFound => Code::PreviousResponseNotFound,
            Class::Auth | Class::ReauthRequired | Class::Deactivated => Code::NoAccounts,
            _ => Code::UpstreamError,
        };
        let ours = Self::new(code, failure.message);
        let said = failure
            .status
            .and_then(|status| StatusCode::from_u16(status).ok());
        match (failure.class, said) {
            // An account's credential is no business of the client.
            (Class::Auth | Class::ReauthRequired | Class::Deactivated, _) => Self {
                message: "No account of the pool is signed in upstream at the moment.".into(),
                ..ours
            },
            // Nor is one account's limit, which others may not have reached: it is told only where it cut an answer short.
            (Class::RateLimit | Class::Quota, _) => Self {
                message: "The account that served this cannot go on; try again.".into(),
                ..ours
            },
            (Class::PreviousResponseNotFound, _) => ours,
            (_, None) if failure.code.is_none() => ours,
            (class, said) => {
                let status = match said {
                    Some(StatusCode::INTERNAL_SERVER_ERROR) => StatusCode::BAD_GATEWAY,
                    Some(status) if status.is_client_error() || status.is_server_error() => status,
                    _ if class == Class::Request => StatusCode::BAD_REQUEST,
                    _ => ours.status,
                };
                Self {
                    status,
                    kind: failure.kind.map_or(ours.kind, Cow::Owned),
                    code: failure.code.map_or(ours.code, Cow::Owned),
                    param: failure.param,
                    plan_type: failure.plan_type,
                    resets_at: failure.resets_at,
                    retry_after: failure
                        .retry_after
                        .map(|wait| wait.min(LONGEST_WAIT))
                        .or(ours.retry_after),
                    body: failure.body,
                    ..ours
                }
            }
        }
    }
}

impl From<Stop> for ApiError {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Upstream(failure, _) => failure.into(),
            Stop::Exhausted { resets_at } => Self::new(
                Code::UsageLimitReached,
                "Every account of the pool has reached its usage limit.",
            )
            .resets_at(resets_at),
            // Why is in the log: it speaks of accounts that are none of the client's business.
            Stop::Nobody { .. } => Self::new(
                Code::NoAccounts,
                "No account of the pool can serve this request at the moment.",
            ),
            Stop::Busy => Self::new(
                Code::Overloaded,
                "Every account of the pool runs as many turns as it may; try again.",
            ),
            Stop::PreviousResponseNotFound => bridge::not_found(),
            Stop::Rejected(reject, wait) => bridge::rejected(reject, wait),
            Stop::Invalid(invalid) => (*invalid).into(),
            Stop::Unavailable => Self::new(
                Code::ContinuityUnavailable,
                "The request cannot be booked at the moment, so it was not sent; try again.",
            ),
            Stop::SlowConsumer => Self::new(
                Code::SlowConsumer,
                "The response was not read for a minute, so it was cancelled.",
            ),
            Stop::Cancelled => Self::new(Code::Cancelled, "The service is restarting; try again."),
        }
    }
}

impl From<Invalid> for ApiError {
    fn from(invalid: Invalid) -> Self {
        Self::new(Code::InvalidRequest, invalid.message)
            .code(invalid.code)
            .param(invalid.param)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = self.body.clone().unwrap_or_else(|| {
            let object = ErrorObject {
                retry_after: None,
                ..self.object()
            };
            serde_json::json!({ "error": object }).to_string().into()
        });
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds(after));
        }
        if self.status == StatusCode::CONFLICT {
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        headers.extend(self.headers);
        response
    }
}

/// Whole seconds, rounded up: never too early.
fn seconds(duration: Duration) -> HeaderValue {
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    HeaderValue::from(seconds)
}

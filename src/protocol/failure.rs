//! What went wrong upstream, and what to do about it.
//!
//! [`Failure`] is one classified failure: from an HTTP answer, an event, a closed socket, a deadline. [`decide()`] is the table
//! from (class, phase, tries) to the next step and to the effect on the account. Neither knows accounts or clients.
//!
//! Invariants: nothing is replayed after something visible; an account is blamed only for what another account could have
//! answered differently; a reset that upstream names is kept to the second, within 366 days.

mod classify;
mod decide;
mod hint;

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};

use super::event::ErrorBody;
use super::limits::{Family, active_family};
pub use decide::{Effect, MAX_ACCOUNTS, MAX_SAME_ACCOUNT, Next, Phase, Tries, decide};

/// The deadlines of an attempt, each with a name of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Deadline {
    /// The connection was not up in time.
    Connect,
    /// No response headers, or no handshake, in time.
    Headers,
    /// No first event in time.
    FirstEvent,
    /// Silence between two events.
    Idle,
    /// The turn's whole budget is used up.
    Total,
}

impl Deadline {
    /// The name in metrics, logs and error codes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Connect => "upstream_connect_timeout",
            Self::Headers => "upstream_headers_timeout",
            Self::FirstEvent => "upstream_first_event_timeout",
            Self::Idle => "stream_idle_timeout",
            Self::Total => "upstream_request_timeout",
        }
    }
}

/// What kind of failure it is. It alone, with the phase, decides what happens next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Class {
    /// A usage or rate limit of the account, or a bare 429.
    RateLimit,
    /// The account's plan or credit does not cover the request.
    Quota,
    /// The access token was refused; a refresh may cure it.
    Auth,
    /// The login has ended: unless one refresh cures it, its owner must log in again.
    ReauthRequired,
    /// The account itself was deactivated, suspended or deleted.
    Deactivated,
    /// Upstream failed: 5xx and its codes.
    Transient,
    /// Upstream has no capacity, whoever asks.
    Overloaded,
    /// The model is not offered to this account.
    ModelUnsupported,
    /// The anchor is unknown to upstream.
    PreviousResponseNotFound,
    /// The upstream socket has reached its age or number; a new one will do.
    ConnectionLimit,
    /// The request is at fault.
    Request,
    /// Our own database did not answer before anything was sent.
    Database,
    /// Our way to upstream failed: DNS, connect, TLS, reset.
    Network,
    /// A deadline passed.
    Timeout(Deadline),
    /// The stream ended without a terminal event.
    Truncated,
    /// An event, or an answer, is larger than the limit.
    TooLarge,
    /// The client went away.
    Cancelled,
}

impl Class {
    /// The name in metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::RateLimit => "rate_limit",
            Self::Quota => "quota",
            Self::Auth => "auth",
            Self::ReauthRequired => "reauth_required",
            Self::Deactivated => "deactivated",
            Self::Transient => "transient",
            Self::Overloaded => "overloaded",
            Self::ModelUnsupported => "model_unsupported",
            Self::PreviousResponseNotFound => "previous_response_not_found",
            Self::ConnectionLimit => "connection_limit",
            Self::Request => "request",
            Self::Database => "database",
            Self::Network => "network",
            Self::Timeout(deadline) => deadline.name(),
            Self::Truncated => "truncated",
            Self::TooLarge => "too_large",
            Self::Cancelled => "cancelled",
        }
    }
}

/// One classified failure. Its `Display` names class, status and code; the message is for the client alone.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Failure {
    /// What kind it is.
    pub class: Class,
    /// The HTTP status, of the answer or of the frame.
    pub status: Option<u16>,
    /// Upstream's `code`, or its `type` where it sent no code: a word in lower case, which may stand in logs and tables.
    pub code: Option<String>,
    /// Upstream's error `type`.
    pub kind: Option<String>,
    /// The sentence for the client.
    pub message: String,
    /// The request field at fault.
    pub param: Option<String>,
    /// The plan that upstream named.
    pub plan_type: Option<String>,
    /// The limit that was hit, where upstream named it.
    pub family: Option<Family>,
    /// When the limit resets, epoch seconds, exactly as upstream said.
    pub resets_at: Option<i64>,
    /// After how long upstream wants to be asked again.
    pub retry_after: Option<Duration>,
    /// Upstream's own JSON body, where it is an error that a client understands.
    pub body: Option<Bytes>,
    /// When it was observed, epoch seconds.
    pub observed_at: i64,
}

impl Failure {
    /// A failure of our own observation, without a word of upstream.
    pub fn local(class: Class, message: impl Into<String>, now: i64) -> Self {
        let code = match class {
            Class::Network => Some("upstream_unavailable"),
            Class::Timeout(deadline) => Some(deadline.name()),
            Class::Truncated => Some("upstream_premature_close"),
            Class::TooLarge => Some("stream_event_too_large"),
            Class::Cancelled => Some("client_disconnected"),
            _ => None,
        };
        Self {
            class,
            status: None,
            code: code.map(str::to_owned),
            kind: None,
            message: message.into(),
            param: None,
            plan_type: None,
            family: None,
            resets_at: None,
            retry_after: None,
            body: None,
            observed_at: now,
        }
    }

    /// A deadline passed.
    pub fn timeout(deadline: Deadline, now: i64) -> Self {
        let message = match deadline {
            Deadline::Connect => "Upstream could not be reached in time",
            Deadline::Headers => "Upstream did not answer in time",
            Deadline::FirstEvent => "Upstream did not start its response in time",
            Deadline::Idle => "Upstream fell silent",
            Deadline::Total => "The time for this request is used up",
        };
        Self::local(Class::Timeout(deadline), message, now)
    }

    /// The stream ended, cleanly or not, without a terminal event.
    pub fn truncated(now: i64) -> Self {
        Self::local(
            Class::Truncated,
            "Upstream closed the stream without completing the response",
            now,
        )
    }

    /// An answer of upstream outside 2xx, or a refused WebSocket handshake. `body` may be cut short or not be JSON.
    pub fn from_http(status: StatusCode, headers: &HeaderMap, body: &Bytes, now: i64) -> Self {
        let parsed = ErrorBody::parse(body);
        let shaped = parsed.is_some();
        let mut error = parsed.unwrap_or_default();
        error.status = Some(status.as_u16());
        // The answer's own headers win over those that its body quotes.
        error.headers.extend(
            headers
                .iter()
                .map(|(name, value)| (name.clone(), value.clone())),
        );
        if !shaped {
            error.message = plain_text(body);
        }
        let message = || format!("Upstream answered {status}");
        let failure = Self::new(&error, message, now);
        Self {
            body: shaped.then(|| body.clone()),
            ..failure
        }
    }

    /// An `error` event or frame, or the error of `response.failed`.
    pub fn from_event(error: &ErrorBody, now: i64) -> Self {
        Self::new(
            error,
            || "Upstream reported a failure without saying which".to_owned(),
            now,
        )
    }

    /// The upstream WebSocket was closed inside a turn.
    pub fn from_close(code: Option<u16>, now: i64) -> Self {
        match code {
            // A 413 would make Codex repeat it in vain.
            Some(1009) => Self {
                status: Some(400),
                code: Some("payload_too_large".to_owned()),
                ..Self::local(
                    Class::Request,
                    "Upstream refused a message of this size",
                    now,
                )
            },
            _ => Self::truncated(now),
        }
    }

    fn new(error: &ErrorBody, message: impl FnOnce() -> String, now: i64) -> Self {
        let retry_after = hint::retry_after(error, now);
        let resets_at = hint::resets_at(error, now);
        Self {
            class: classify::class(error),
            status: error.status,
            code: [&error.code, &error.kind]
                .into_iter()
                .flatten()
                .find_map(|code| word(code)),
            kind: error.kind.clone(),
            message: error.message.clone().unwrap_or_else(message),
            param: error.param.clone(),
            plan_type: error.plan_type.clone(),
            family: active_family(&error.headers),
            // A refusal that names no time still comes with the windows that it is about.
            resets_at: resets_at.or_else(|| {
                retry_after
                    .is_none()
                    .then(|| hint::exhausted_until(error, now))?
            }),
            retry_after,
            body: None,
            observed_at: now,
        }
    }

    /// Whether it is one account's limit, or what its plan and credit cover: it says nothing of the other accounts.
    pub fn is_limit(&self) -> bool {
        matches!(self.class, Class::RateLimit | Class::Quota)
    }

    /// Upstream's code, else the class: the reason in tables and logs.
    pub fn word(&self) -> &str {
        self.code.as_deref().unwrap_or_else(|| self.class.name())
    }

    /// Until when upstream does not want this account, epoch seconds, rounded up; `None` where it gave no hint at all.
    pub fn blocked_until(&self) -> Option<i64> {
        self.resets_at.or_else(|| {
            let wait = self.retry_after?;
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            Some(
                self.observed_at
                    .saturating_add(i64::try_from(seconds).unwrap_or(i64::MAX)),
            )
        })
    }

    /// The wait that a client is told: at most five minutes, because limits are lifted early and clients give up on days.
    pub fn client_retry_after(&self) -> Option<Duration> {
        self.retry_after
            .map(|wait| wait.min(Duration::from_secs(300)))
    }
}

/// A code in lower case, unless it is more than a word: a sentence may name people.
fn word(code: &str) -> Option<String> {
    let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    (code.len() <= 64 && code.bytes().all(letter)).then(|| code.to_ascii_lowercase())
}

/// A body that is a plain sentence, not a page.
fn plain_text(body: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(body).ok()?.trim();
    (!text.is_empty() && text.len() <= 512 && !text.starts_with(['<', '{', '[']))
        .then(|| text.to_owned())
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.class.name())?;
        if let Some(status) = self.status {
            write!(f, " {status}")?;
        }
        if let Some(code) = &self.code {
            write!(f, " {code}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderName, HeaderValue};
    use serde_json::json;

    const NOW: i64 = 1_800_000_000;

    fn http(status: u16, headers: &[(&'static str, &'static str)], body: &'static str) -> Failure {
        let headers = headers.iter().map(|(name, value)| {
            (
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )
        });
        let status = StatusCode::from_u16(status).expect("a status");
        Failure::from_http(
            status,
            &headers.collect(),
            &Bytes::from_static(body.as_bytes()),
            NOW,
        )
    }

    #[test]
    fn a_usage_limit_keeps_upstreams_words_and_its_exact_reset() {
        let body = r#"{"error":{"type":"usage_limit_reached","message":"The usage limit has been reached","plan_type":"pro","resets_at":1800003600}}"#;
        let failure = http(429, &[("retry-after", "5")], body);
        assert_eq!(failure.class, Class::RateLimit);
        assert_eq!(failure.code.as_deref(), Some("usage_limit_reached"));
        assert_eq!(failure.message, "The usage limit has been reached");
        assert_eq!(failure.plan_type.as_deref(), Some("pro"));
        assert_eq!(failure.blocked_until(), Some(1_800_003_600));
        assert_eq!(failure.body.as_deref(), Some(body.as_bytes()));
        assert_eq!(failure.to_string(), "rate_limit 429 usage_limit_reached");
    }

    #[test]
    fn a_burst_limit_blocks_for_its_own_wait_rounded_up() {
        let failure = http(
            429,
            &[],
            r#"{"error":{"code":"rate_limit_exceeded","message":"Please try again in 1.5s."}}"#,
        );
        assert_eq!(failure.resets_at, None);
        assert_eq!(failure.blocked_until(), Some(NOW + 2));
        assert_eq!(http(429, &[], "").blocked_until(), None);
    }

    #[test]
    fn a_client_is_never_told_to_wait_for_days() {
        let failure = http(429, &[("retry-after", "90000")], "");
        assert_eq!(failure.blocked_until(), Some(NOW + 90_000));
        assert_eq!(failure.client_retry_after(), Some(Duration::from_secs(300)));
    }

    #[test]
    fn a_page_instead_of_json_is_not_passed_on() {
        let failure = http(403, &[], "<html>Cloudflare says no</html>");
        assert_eq!(
            (failure.class, failure.body, failure.status),
            (Class::Request, None, Some(403))
        );
        assert_eq!(failure.message, "Upstream answered 403 Forbidden");
    }

    #[test]
    fn a_plain_sentence_is_passed_on() {
        let failure = http(503, &[], "upstream connect error, try again in 2s\n");
        assert_eq!(failure.message, "upstream connect error, try again in 2s");
        assert_eq!(
            (failure.body, failure.retry_after),
            (None, Some(Duration::from_secs(2)))
        );
    }

    #[test]
    fn a_limit_without_a_time_lasts_until_its_exhausted_windows_reset() {
        let headers = [
            ("x-codex-primary-used-percent", "100"),
            ("x-codex-primary-window-minutes", "300"),
            ("x-codex-primary-reset-at", "1800000300"),
            ("x-codex-secondary-used-percent", "80"),
            ("x-codex-secondary-window-minutes", "10080"),
            ("x-codex-secondary-reset-at", "1800090000"),
        ];
        let body = r#"{"error":{"type":"usage_limit_reached"}}"#;
        assert_eq!(http(429, &headers, body).resets_at, Some(NOW + 300));
        assert_eq!(
            http(429, &headers, r#"{"error":{"code":"rate_limit_exceeded"}}"#).resets_at,
            None
        );
        assert_eq!(http(429, &headers, "").resets_at, None);
        let with_wait = [headers[0], headers[1], headers[2], ("retry-after", "5")];
        assert_eq!(http(429, &with_wait, body).blocked_until(), Some(NOW + 5));
    }

    #[test]
    fn a_refusal_belongs_to_the_limit_that_upstream_names() {
        let headers = [
            ("x-codex-active-limit", "codex_bengalfox"),
            ("x-codex-bengalfox-primary-used-percent", "100"),
        ];
        let spark = Some(Family::new("codex_bengalfox"));
        assert_eq!(http(429, &headers, "").family, spark);
        let frame = br#"{"type":"error","status":429,"error":{"type":"usage_limit_reached"},
            "headers":{"x-codex-active-limit":"codex_bengalfox","x-codex-bengalfox-primary-used-percent":"100"}}"#;
        let error = ErrorBody::parse(frame).expect("an error");
        assert_eq!(Failure::from_event(&error, NOW).family, spark);
        let main = [
            ("x-codex-active-limit", "codex"),
            ("x-codex-primary-used-percent", "100"),
        ];
        assert_eq!(http(429, &main, "").family, Some(Family::CODEX));
        assert_eq!(http(429, &main[1..], "").family, None);
    }

    #[test]
    fn a_sentence_in_place_of_a_code_reaches_the_client_alone() {
        let long = "x".repeat(65);
        for (error, expected) in [
            (json!("Too many requests from bob@example.test"), None),
            (json!({ "code": "ask bob@example.test" }), None),
            (
                json!({ "code": long, "type": "Usage_Limit.v2-b" }),
                Some("usage_limit.v2-b"),
            ),
        ] {
            let body = json!({ "error": error }).to_string();
            let status = StatusCode::TOO_MANY_REQUESTS;
            let failure = Failure::from_http(status, &HeaderMap::new(), &body.into(), NOW);
            assert_eq!(failure.code.as_deref(), expected, "{error}");
            assert_eq!(failure.word(), expected.unwrap_or("rate_limit"));
            assert!(!failure.to_string().contains("bob"), "{error}");
        }
    }

    #[test]
    fn a_close_is_a_truncation_unless_it_says_too_big() {
        assert_eq!(Failure::from_close(Some(1009), NOW).class, Class::Request);
        for code in [None, Some(1000), Some(1006), Some(1011)] {
            assert_eq!(Failure::from_close(code, NOW).class, Class::Truncated);
        }
    }

    #[test]
    fn an_error_text_never_shows_a_message() {
        let failure = Failure::local(Class::Network, "user@example.com", NOW);
        assert!(!failure.to_string().contains("user"));
    }
}

//! What an upstream event is, by a look at its head.
//!
//! Owns the kinds of events, and the few fields of life-cycle events that the engine acts on. Deltas are recognised without
//! being parsed and without an allocation; a terminal event is read past its outputs, never into a tree.
//!
//! Invariant: an event that is not understood is relayed and counts as visible, so that it is never sent twice.

mod error;
mod output;

use std::borrow::Cow;

use http::HeaderMap;
use memchr::{memchr2, memmem};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::lenient::{string, tree};
use super::usage::Usage;
pub use error::ErrorBody;
pub use output::{done_item, output};

/// What an event means to the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `response.created`: upstream has named the response.
    Created,
    /// `response.in_progress`, `response.queued`.
    InProgress,
    /// `response.output_item.added`.
    OutputItemAdded,
    /// `response.output_item.done`: clients act on it at once.
    OutputItemDone,
    /// `response.output_text.delta`.
    TextDelta,
    /// `response.completed`, terminal.
    Completed,
    /// `response.incomplete`, terminal.
    Incomplete,
    /// `response.failed`, terminal.
    Failed,
    /// `error`, terminal.
    Error,
    /// `response.metadata`: headers that upstream could not send as such.
    Metadata,
    /// `codex.rate_limits`: a quota observation.
    RateLimits,
    /// Any other `codex.*`, keep-alives among them.
    Codex,
    /// The `[DONE]` marker.
    Done,
    /// No data at all: a comment that keeps the connection alive.
    Comment,
    /// Any other typed event: part of the model's output.
    Other,
    /// Without a type that could be read.
    Unknown,
}

impl Kind {
    /// The kind of an event of type `name`.
    pub fn of_type(name: &str) -> Self {
        match name {
            "response.output_text.delta" => Self::TextDelta,
            "response.output_item.added" => Self::OutputItemAdded,
            "response.output_item.done" => Self::OutputItemDone,
            "response.created" => Self::Created,
            "response.in_progress" | "response.queued" => Self::InProgress,
            "response.completed" => Self::Completed,
            "response.incomplete" => Self::Incomplete,
            "response.failed" => Self::Failed,
            "error" => Self::Error,
            "response.metadata" => Self::Metadata,
            "codex.rate_limits" => Self::RateLimits,
            _ if name.starts_with("codex.") => Self::Codex,
            _ => Self::Other,
        }
    }

    /// Nothing of the response follows.
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Self::Completed | Self::Incomplete | Self::Failed | Self::Error
        )
    }

    /// The engine reads fields of it.
    pub fn is_lifecycle(self) -> bool {
        self.is_terminal() || matches!(self, Self::Created | Self::Metadata | Self::RateLimits)
    }

    /// Once a client has it, the turn must not be replayed: it has seen model output. Failures are no output; they end the
    /// stream or are held back.
    pub fn is_visible(self) -> bool {
        match self {
            Self::OutputItemAdded
            | Self::OutputItemDone
            | Self::TextDelta
            | Self::Completed
            | Self::Incomplete => true,
            Self::Other | Self::Unknown => true,
            Self::Created | Self::InProgress | Self::Failed | Self::Error => false,
            Self::Metadata | Self::RateLimits | Self::Codex | Self::Done | Self::Comment => false,
        }
    }
}

/// The kind of an event by its data. Free of allocations where `type` is the first key, as upstream writes it.
pub fn kind(data: &[u8]) -> Kind {
    match event_type(data) {
        Some(name) => Kind::of_type(&name),
        None => match data.trim_ascii() {
            b"" => Kind::Comment,
            b"[DONE]" => Kind::Done,
            _ => Kind::Unknown,
        },
    }
}

/// The `type` of an event; borrowed where it is the first key.
pub fn event_type(data: &[u8]) -> Option<Cow<'_, str>> {
    #[derive(Deserialize)]
    struct Head<'a> {
        #[serde(borrow, rename = "type")]
        name: Cow<'a, str>,
    }
    if let Some(rest) = data.strip_prefix(br#"{"type":""#)
        && let Some(end) = memchr2(b'"', b'\\', rest)
        && rest[end] == b'"'
        && let Ok(name) = std::str::from_utf8(&rest[..end])
    {
        return Some(Cow::Borrowed(name));
    }
    serde_json::from_slice::<Head<'_>>(data)
        .ok()
        .map(|head| head.name)
}

/// The event's `sequence_number`, found by a look from its end. Within JSON strings quotes are escaped, so that the key
/// can only be a key.
pub fn sequence_number(data: &[u8]) -> Option<i64> {
    const KEY: &[u8] = b"\"sequence_number\":";
    let value = data[memmem::rfind(data, KEY)? + KEY.len()..].trim_ascii_start();
    let digits = value
        .iter()
        .take_while(|byte| byte.is_ascii_digit())
        .count();
    std::str::from_utf8(&value[..digits]).ok()?.parse().ok()
}

/// What is read of a `response` object.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Response<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    status: Option<&'a RawValue>,
    #[serde(borrow)]
    model: Option<&'a RawValue>,
    #[serde(borrow)]
    service_tier: Option<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
    #[serde(borrow)]
    incomplete_details: Option<&'a RawValue>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Outer<'a> {
    #[serde(borrow)]
    response: Option<Response<'a>>,
}

/// The head of `response.created` and of any other event that carries a `response` object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Created {
    /// `response.id`.
    pub response_id: Option<String>,
    /// `response.model`: what upstream says it runs.
    pub model: Option<String>,
}

impl Created {
    /// `None` where the event carries no `response` object.
    pub fn parse(data: &[u8]) -> Option<Self> {
        let response = serde_json::from_slice::<Outer<'_>>(data).ok()?.response?;
        Some(Self {
            response_id: string(response.id),
            model: string(response.model),
        })
    }
}

/// What a terminal event says, its outputs left aside.
#[derive(Debug, Clone, PartialEq)]
pub struct Terminal {
    /// Which terminal event it is.
    pub kind: Kind,
    /// `response.id`.
    pub response_id: Option<String>,
    /// `response.status`.
    pub status: Option<String>,
    /// `response.model`.
    pub model: Option<String>,
    /// The tier that upstream served, which is the tier that it bills.
    pub service_tier: Option<String>,
    /// `response.usage`.
    pub usage: Option<Usage>,
    /// `response.incomplete_details.reason`.
    pub incomplete_reason: Option<String>,
    /// The error of a failure.
    pub error: Option<ErrorBody>,
}

impl Terminal {
    /// Reads a terminal event. One that does not parse has no fields: its kind alone is still true.
    pub fn parse(kind: Kind, data: &[u8]) -> Self {
        let outer = serde_json::from_slice::<Outer<'_>>(data).unwrap_or_default();
        let response = outer.response.unwrap_or_default();
        let failed = matches!(kind, Kind::Failed | Kind::Error);
        Self {
            kind,
            response_id: string(response.id),
            status: string(response.status),
            model: string(response.model),
            service_tier: string(response.service_tier),
            usage: Usage::parse(&tree(response.usage)),
            incomplete_reason: tree(response.incomplete_details)["reason"]
                .as_str()
                .map(str::to_owned),
            error: if failed { ErrorBody::parse(data) } else { None },
        }
    }
}

/// The headers of a `response.metadata` event, the upstream turn state among them.
pub fn metadata_headers(data: &[u8]) -> HeaderMap {
    #[derive(Deserialize)]
    struct Metadata {
        headers: Value,
    }
    serde_json::from_slice::<Metadata>(data)
        .map(|metadata| error::headers(&metadata.headers))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_is_told_by_the_head_wherever_the_type_stands() {
        let cases: &[(&str, Kind)] = &[
            (
                r#"{"type":"response.created","response":{}}"#,
                Kind::Created,
            ),
            (r#"{"type":"response.queued"}"#, Kind::InProgress),
            (r#"{"type":"response.in_progress"}"#, Kind::InProgress),
            (
                r#"{"type":"response.output_item.added"}"#,
                Kind::OutputItemAdded,
            ),
            (
                r#"{"type":"response.output_item.done"}"#,
                Kind::OutputItemDone,
            ),
            (
                r#"{"type":"response.output_text.delta","delta":"a"}"#,
                Kind::TextDelta,
            ),
            (r#"{"type":"response.completed"}"#, Kind::Completed),
            (r#"{"type":"response.incomplete"}"#, Kind::Incomplete),
            (r#"{"type":"response.failed"}"#, Kind::Failed),
            (r#"{"type":"error"}"#, Kind::Error),
            (r#"{"type":"response.metadata"}"#, Kind::Metadata),
            (r#"{"type":"codex.rate_limits"}"#, Kind::RateLimits),
            (r#"{"type":"codex.keepalive"}"#, Kind::Codex),
            (
                r#"{"type":"response.reasoning_summary_text.delta"}"#,
                Kind::Other,
            ),
            (r#"{ "type" : "response.completed" }"#, Kind::Completed),
            (
                r#"{"response":{"type":"x","output":[{"type":"y"}]},"type":"response.failed"}"#,
                Kind::Failed,
            ),
            (r#"{"type":"response\u002ecreated"}"#, Kind::Created),
            (
                r#"{"delta":"\"type\":\"error\"","type":"response.output_text.delta"}"#,
                Kind::TextDelta,
            ),
            (" [DONE]", Kind::Done),
            (r#"{"type":7}"#, Kind::Unknown),
            (r#"{"item":{"type":"error"}}"#, Kind::Unknown),
            ("{}", Kind::Unknown),
            ("", Kind::Comment),
            ("{\"type\":\"response.crea", Kind::Unknown),
        ];
        for (data, expected) in cases {
            assert_eq!(kind(data.as_bytes()), *expected, "{data}");
        }
    }

    #[test]
    fn nothing_but_the_quiet_kinds_may_be_replayed() {
        use Kind::*;
        let quiet = [
            Created, InProgress, Failed, Error, Metadata, RateLimits, Codex, Done, Comment,
        ];
        let visible = [
            OutputItemAdded,
            OutputItemDone,
            TextDelta,
            Completed,
            Incomplete,
            Other,
            Unknown,
        ];
        assert!(quiet.iter().all(|kind| !kind.is_visible()));
        assert!(visible.iter().all(|kind| kind.is_visible()));
    }

    #[test]
    fn sequence_numbers_are_found_as_keys_only() {
        let cases: &[(&str, Option<i64>)] = &[
            (r#"{"type":"a","sequence_number":17,"delta":"x"}"#, Some(17)),
            (r#"{"type":"a","delta":"x","sequence_number": 4}"#, Some(4)),
            (
                r#"{"type":"a","sequence_number":3,"delta":"\"sequence_number\":9"}"#,
                Some(3),
            ),
            (r#"{"type":"a","sequence_number":null}"#, None),
            (r#"{"type":"a"}"#, None),
        ];
        for (data, expected) in cases {
            assert_eq!(sequence_number(data.as_bytes()), *expected, "{data}");
        }
    }

    #[test]
    fn created_names_the_response() {
        let created = Created::parse(br#"{"type":"response.created","response":{"id":"resp_1","model":"gpt-5","tools":[{}]}}"#);
        let named = Created {
            response_id: Some("resp_1".into()),
            model: Some("gpt-5".into()),
        };
        assert_eq!(created, Some(named));
        assert_eq!(
            Created::parse(br#"{"type":"response.in_progress","response":{"id":7}}"#),
            Some(Created::default())
        );
        assert_eq!(
            Created::parse(br#"{"type":"response.output_text.delta"}"#),
            None
        );
    }

    #[test]
    fn a_terminal_event_is_read_past_its_outputs() {
        let data = br#"{"type":"response.incomplete","response":{"id":"resp_1","status":"incomplete","model":"gpt-5",
            "output":[{"id":"x","status":"y","usage":3}],"service_tier":"default","incomplete_details":{"reason":"max_output_tokens"},
            "usage":{"input_tokens":3,"output_tokens":2}}}"#;
        let terminal = Terminal::parse(Kind::Incomplete, data);
        assert_eq!(terminal.response_id.as_deref(), Some("resp_1"));
        assert_eq!(terminal.status.as_deref(), Some("incomplete"));
        assert_eq!(terminal.model.as_deref(), Some("gpt-5"));
        assert_eq!(terminal.service_tier.as_deref(), Some("default"));
        assert_eq!(
            terminal.incomplete_reason.as_deref(),
            Some("max_output_tokens")
        );
        assert_eq!(terminal.usage.map(|usage| usage.total), Some(5));
        assert_eq!(terminal.error, None);
    }

    #[test]
    fn a_field_of_the_wrong_type_costs_only_itself() {
        let data = br#"{"type":"response.completed","response":{"id":"resp_1","status":5,"usage":"none","incomplete_details":[]}}"#;
        let terminal = Terminal::parse(Kind::Completed, data);
        assert_eq!(terminal.response_id.as_deref(), Some("resp_1"));
        assert_eq!(
            (terminal.status, terminal.usage, terminal.incomplete_reason),
            (None, None, None)
        );
        assert_eq!(Terminal::parse(Kind::Completed, b"{oops").response_id, None);
    }

    #[test]
    fn a_failure_carries_its_error() {
        let data = br#"{"type":"response.failed","response":{"id":"resp_1","error":{"code":"server_error","message":"Oops"}}}"#;
        let error = Terminal::parse(Kind::Failed, data)
            .error
            .expect("it has one");
        assert_eq!(
            (error.code.as_deref(), error.message.as_deref()),
            (Some("server_error"), Some("Oops"))
        );
    }

    #[test]
    fn metadata_carries_headers() {
        let headers = metadata_headers(br#"{"type":"response.metadata","headers":{"X-Codex-Turn-State":"abc","n":3,"bad name":"x"}}"#);
        assert_eq!(headers["x-codex-turn-state"], "abc");
        assert_eq!(headers["n"], "3");
        assert_eq!(headers.len(), 2);
        assert!(metadata_headers(b"{}").is_empty());
    }
}

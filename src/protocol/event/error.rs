//! The shapes in which upstream reports an error, read into one.

use http::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::protocol::lenient::{text, tree, whole};

/// An error as upstream told it: an HTTP body, an `error` event or frame, or the `error` of a failed response.
///
/// Nested under `error` or flat; `type:"error"` of an event is its own type, never the error's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ErrorBody {
    /// `code`, e.g. `server_error`.
    pub code: Option<String>,
    /// `type` (or `error_type`), e.g. `usage_limit_reached`.
    pub kind: Option<String>,
    /// The sentence for the user.
    pub message: Option<String>,
    /// The request field at fault.
    pub param: Option<String>,
    /// The HTTP status that a WebSocket frame carries.
    pub status: Option<u16>,
    /// When the limit resets, epoch seconds, as sent.
    pub resets_at: Option<i64>,
    /// In how many seconds the limit resets, as sent.
    pub resets_in_seconds: Option<i64>,
    /// The plan of the account that was refused.
    pub plan_type: Option<String>,
    /// Headers that came inside the JSON: `retry-after`, `x-codex-*`.
    pub headers: HeaderMap,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Failed<'a> {
    #[serde(borrow)]
    error: Option<&'a RawValue>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Outer<'a> {
    #[serde(borrow)]
    error: Option<&'a RawValue>,
    #[serde(borrow)]
    response: Option<Failed<'a>>,
    #[serde(borrow)]
    detail: Option<&'a RawValue>,
    #[serde(borrow)]
    headers: Option<&'a RawValue>,
    code: Value,
    message: Value,
    param: Value,
    error_type: Value,
    error_description: Value,
    status: Value,
    status_code: Value,
    plan_type: Value,
    resets_at: Value,
    resets_in_seconds: Value,
}

impl ErrorBody {
    /// Reads any of the shapes; `None` where the JSON names neither a code nor a type nor a message.
    pub fn parse(json: &[u8]) -> Option<Self> {
        let outer: Outer<'_> = serde_json::from_slice(json).ok()?;
        let error = tree(outer.error.or_else(|| outer.response.as_ref()?.error));
        let detail = tree(outer.detail);
        let none = Map::new();
        let inner = error
            .as_object()
            .or_else(|| detail.as_object())
            .unwrap_or(&none);
        let field =
            |name: &str, flat: &Value| inner.get(name).and_then(text).or_else(|| text(flat));
        let count =
            |name: &str, flat: &Value| inner.get(name).and_then(whole).or_else(|| whole(flat));
        let status = whole(&outer.status)
            .or_else(|| count("status", &outer.status_code))
            .or_else(|| count("status_code", &Value::Null));
        let body = Self {
            // OAuth writes its code as a bare string.
            code: field("code", &outer.code).or_else(|| text(&error)),
            kind: inner
                .get("type")
                .or_else(|| inner.get("error_type"))
                .and_then(text)
                .or_else(|| text(&outer.error_type)),
            message: field("message", &outer.message)
                .or_else(|| text(&detail))
                .or_else(|| text(&outer.error_description)),
            param: field("param", &outer.param),
            status: status
                .and_then(|status| u16::try_from(status).ok())
                .filter(|status| (100..600).contains(status)),
            resets_at: count("resets_at", &outer.resets_at),
            resets_in_seconds: count("resets_in_seconds", &outer.resets_in_seconds),
            plan_type: field("plan_type", &outer.plan_type),
            headers: inner
                .get("headers")
                .map_or_else(|| headers(&tree(outer.headers)), headers),
        };
        (body.code.is_some() || body.kind.is_some() || body.message.is_some()).then_some(body)
    }
}

/// A JSON map as headers; what could not be one is left out.
pub(super) fn headers(map: &Value) -> HeaderMap {
    let pairs = map
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(name, value)| {
            let value = match value {
                Value::String(text) => HeaderValue::from_str(text).ok()?,
                Value::Number(number) => HeaderValue::from_str(&number.to_string()).ok()?,
                _ => return None,
            };
            Some((HeaderName::from_bytes(name.as_bytes()).ok()?, value))
        });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> ErrorBody {
        ErrorBody::parse(json.as_bytes()).unwrap_or_else(|| panic!("{json} is an error"))
    }

    #[test]
    fn every_observed_shape_names_code_type_and_message() {
        let nested = (Some("c"), Some("t"), Some("m"));
        let cases = [
            (r#"{"error":{"code":"c","type":"t","message":"m"}}"#, nested),
            (
                r#"{"type":"error","error":{"code":"c","type":"t","message":"m"}}"#,
                nested,
            ),
            (
                r#"{"type":"error","code":"c","error_type":"t","message":"m"}"#,
                nested,
            ),
            (
                r#"{"type":"response.failed","response":{"tools":[{}],"error":{"code":"c","type":"t","message":"m"}}}"#,
                nested,
            ),
            (
                r#"{"detail":{"code":"c","type":"t","message":"m"}}"#,
                nested,
            ),
            (
                r#"{"type":"response.failed","response":{"error":{"code":"c","message":"m"}}}"#,
                (Some("c"), None, Some("m")),
            ),
            (r#"{"detail":"m"}"#, (None, None, Some("m"))),
            (r#"{"message":"m"}"#, (None, None, Some("m"))),
            (
                r#"{"error":"c","error_description":"m"}"#,
                (Some("c"), None, Some("m")),
            ),
            (
                r#"{"error":{"type":"t","code":null,"message":7}}"#,
                (None, Some("t"), None),
            ),
        ];
        for (json, expected) in cases {
            let body = parse(json);
            assert_eq!(
                (
                    body.code.as_deref(),
                    body.kind.as_deref(),
                    body.message.as_deref()
                ),
                expected,
                "{json}"
            );
        }
    }

    #[test]
    fn what_is_no_error_is_none() {
        for json in [
            "",
            "{}",
            "<html>",
            "[]",
            "\"text\"",
            r#"{"type":"error"}"#,
            r#"{"error":null}"#,
            r#"{"error":[1]}"#,
        ] {
            assert_eq!(ErrorBody::parse(json.as_bytes()), None, "{json}");
        }
    }

    #[test]
    fn the_status_has_two_names_and_two_places() {
        for json in [
            r#"{"status":429,"message":"m"}"#,
            r#"{"status_code":429,"message":"m"}"#,
            r#"{"error":{"message":"m","status":"429"}}"#,
            r#"{"error":{"message":"m","status_code":429}}"#,
        ] {
            assert_eq!(parse(json).status, Some(429), "{json}");
        }
        assert_eq!(parse(r#"{"status":7,"message":"m"}"#).status, None);
        assert_eq!(parse(r#"{"status":"failed","message":"m"}"#).status, None);
    }

    #[test]
    fn hints_are_read_as_sent() {
        let body = parse(
            r#"{"type":"error","error":{"type":"usage_limit_reached","plan_type":"plus","resets_at":1893456000,"resets_in_seconds":"60.5"},
                "headers":{"Retry-After":3,"x-codex-primary-used-percent":"100"}}"#,
        );
        assert_eq!(
            (body.resets_at, body.resets_in_seconds),
            (Some(1_893_456_000), Some(61))
        );
        assert_eq!(body.plan_type.as_deref(), Some("plus"));
        assert_eq!(body.headers["retry-after"], "3");
        assert_eq!(body.headers["x-codex-primary-used-percent"], "100");
        assert_eq!(
            parse(r#"{"error":{"code":"c","headers":{"retry-after":"3"}}}"#).headers["retry-after"],
            "3"
        );
    }
}

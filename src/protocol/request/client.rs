//! Who asks, as Codex clients say it.

use http::HeaderMap;
use serde_json::Value;

use crate::protocol::trace;

const TURN_METADATA: &str = "x-codex-turn-metadata";
/// What a client repeats of the turn state, and what its upstream gave.
pub(super) const TURN_STATE: &str = "x-codex-turn-state";
pub(super) const TRACE: &str = "ws_request_header_traceparent";
const WINDOW_ID: &str = "x-codex-window-id";

/// What the client says about itself; all of it is optional, and an empty string is nothing said.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Client {
    /// The thread: one agent's conversation.
    pub thread_id: Option<String>,
    /// The session: a root thread and its sub-agents.
    pub session_id: Option<String>,
    /// The turn within the thread.
    pub turn_id: Option<String>,
    /// The context window; it changes with a compaction.
    pub window_id: Option<String>,
    /// `turn`, `prewarm` or `compaction`.
    pub request_kind: Option<String>,
    /// The trace that a message of a WebSocket says it is part of.
    pub trace_id: Option<String>,
    /// The turn state that a WebSocket client repeats, as it is: whether it is one of ours is not for this room to say.
    pub turn_state: Option<String>,
}

impl Client {
    /// What the body's `client_metadata` says, a raw value.
    pub(super) fn of_metadata(raw: &str) -> Self {
        let said: Value = serde_json::from_str(raw).unwrap_or_default();
        let mut client = Self {
            thread_id: identifier(said["thread_id"].as_str()),
            session_id: identifier(said["session_id"].as_str()),
            turn_id: identifier(said["turn_id"].as_str()),
            window_id: identifier(said[WINDOW_ID].as_str()),
            request_kind: None,
            trace_id: said[TRACE].as_str().and_then(trace::of).map(str::to_owned),
            turn_state: said[TURN_STATE].as_str().map(str::to_owned),
        };
        client.with_turn_metadata(said[TURN_METADATA].as_str());
        client
    }

    /// Fills in from the headers what the body did not say.
    pub fn with_headers(&mut self, headers: &HeaderMap) {
        let said = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        self.with_turn_metadata(said(TURN_METADATA));
        fill(&mut self.thread_id, said("thread-id"));
        fill(&mut self.session_id, said("session-id"));
        fill(&mut self.session_id, said("session_id"));
        fill(&mut self.window_id, said(WINDOW_ID));
    }

    fn with_turn_metadata(&mut self, json: Option<&str>) {
        let said: Value = json
            .and_then(|json| serde_json::from_str(json).ok())
            .unwrap_or_default();
        for (field, key) in [
            (&mut self.thread_id, "thread_id"),
            (&mut self.session_id, "session_id"),
            (&mut self.turn_id, "turn_id"),
            (&mut self.window_id, "window_id"),
            (&mut self.request_kind, "request_kind"),
        ] {
            fill(field, said[key].as_str());
        }
    }
}

fn fill(field: &mut Option<String>, said: Option<&str>) {
    if field.is_none() {
        *field = identifier(said);
    }
}

/// The longest identifier that is believed, in bytes: it becomes a key, and an index has its limits.
const IDENTIFIER: usize = 256;

/// What may be kept as it is: no database takes a zero byte, and no reader a megabyte.
fn identifier(said: Option<&str>) -> Option<String> {
    let said = said?.trim();
    let good = !said.is_empty() && said.len() <= IDENTIFIER && !said.contains(char::is_control);
    good.then(|| said.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some(text: &str) -> Option<String> {
        Some(text.to_owned())
    }

    #[test]
    fn the_body_speaks_first_then_its_turn_metadata_then_the_headers() {
        let raw = r#"{"ws_request_header_traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01","thread_id":"t","turn_id":"","x-codex-window-id":"w:0",
            "x-codex-turn-metadata":"{\"thread_id\":\"other\",\"turn_id\":\"u\",\"request_kind\":\"turn\"}"}"#;
        let mut client = Client::of_metadata(raw);
        let headers = [
            (TURN_METADATA, r#"{"request_kind":"prewarm","turn_id":"v"}"#),
            ("thread-id", "header"),
            ("session_id", "s"),
        ];
        let headers = headers
            .into_iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
        client.with_headers(&headers);
        let expected = Client {
            thread_id: some("t"),
            session_id: some("s"),
            turn_id: some("u"),
            window_id: some("w:0"),
            request_kind: some("turn"),
            trace_id: some("4bf92f3577b34da6a3ce929d0e0e4736"),
            turn_state: None,
        };
        assert_eq!(client, expected);
    }

    #[test]
    fn an_identifier_that_cannot_be_kept_says_nothing() {
        for id in [
            "a\0b".to_owned(),
            "a\nb".to_owned(),
            "i".repeat(IDENTIFIER + 1),
        ] {
            let raw = serde_json::json!({"turn_id": id, "thread_id": "t"}).to_string();
            let client = Client::of_metadata(&raw);
            assert_eq!((client.turn_id, client.thread_id), (None, some("t")));
        }
    }

    #[test]
    fn what_is_no_metadata_says_nothing() {
        for raw in [
            "null",
            "[]",
            "7",
            r#"{"thread_id":7}"#,
            r#"{"x-codex-turn-metadata":"{oops"}"#,
            r#"{"ws_request_header_traceparent":"00-xyzzy"}"#,
        ] {
            assert_eq!(Client::of_metadata(raw), Client::default(), "{raw}");
        }
    }
}

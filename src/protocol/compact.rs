//! The answer to a compaction.
//!
//! Upstream compacts within an ordinary response; the clients of `/responses/compact` want an object of its own. What upstream
//! encrypted is passed on as it is spelled, and no id is invented.

use std::collections::BTreeMap;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

/// The `response.compaction` object for a completed response object: its last compaction item alone, since anything beside it would
/// come back as history; `None` if there is none.
#[must_use]
pub fn answer(response: &[u8]) -> Option<Bytes> {
    let response: Response<'_> = serde_json::from_slice(response).ok()?;
    let items = response.output.into_iter().map(Item::new);
    let item = items.rev().find(|item| item.compaction)?;
    let answer = Answer {
        object: "response.compaction",
        id: response.id,
        created_at: response.created_at,
        output: [item.with_known_id()?],
        usage: response.usage,
    };
    serde_json::to_vec(&answer).map(Bytes::from).ok()
}

#[derive(Deserialize)]
struct Response<'a> {
    #[serde(borrow)]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    created_at: Option<&'a RawValue>,
    #[serde(borrow)]
    output: Vec<&'a RawValue>,
    #[serde(borrow)]
    usage: Option<&'a RawValue>,
}

#[derive(Serialize)]
struct Answer<'a> {
    object: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<&'a RawValue>,
    output: [Box<RawValue>; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<&'a RawValue>,
}

/// An item of the output.
struct Item<'a> {
    json: &'a RawValue,
    compaction: bool,
    /// Its id is absent, or one that clients may send back.
    known_id: bool,
}

impl<'a> Item<'a> {
    fn new(json: &'a RawValue) -> Self {
        #[derive(Deserialize)]
        struct Head {
            r#type: String,
            id: Option<String>,
            encrypted_content: Option<serde::de::IgnoredAny>,
        }
        let head = serde_json::from_str::<Head>(json.get()).ok();
        let compaction = head.as_ref().is_some_and(|head| {
            matches!(head.r#type.as_str(), "compaction" | "compaction_summary")
                && head.encrypted_content.is_some()
        });
        let known_id = !compaction
            || head
                .and_then(|head| head.id)
                .is_none_or(|id| id.starts_with("cmp_"));
        Self {
            json,
            compaction,
            known_id,
        }
    }

    fn with_known_id(self) -> Option<Box<RawValue>> {
        if self.known_id {
            return Some(self.json.to_owned());
        }
        let mut fields: BTreeMap<String, &RawValue> = serde_json::from_str(self.json.get()).ok()?;
        fields.remove("id");
        to_raw_value(&fields).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_gets_the_compaction_alone() {
        let item = r#"{"type":"compaction","id":"cmp_1","encrypted_content":"gA\u0041=","status":"completed"}"#;
        let message = r#"{"type":"message","id":"msg_1","content":[]}"#;
        let usage = r#"{"input_tokens":900,"output_tokens":40}"#;
        let response = format!(
            r#"{{"object":"response","id":"resp_9","created_at":7,"output":[{message},{item}],"usage":{usage},"model":"m"}}"#
        );
        let expected = format!(
            r#"{{"object":"response.compaction","id":"resp_9","created_at":7,"output":[{item}],"usage":{usage}}}"#
        );
        assert_eq!(
            answer(response.as_bytes()).as_deref(),
            Some(expected.as_bytes())
        );
    }

    #[test]
    fn only_an_id_of_a_compaction_is_kept_and_only_upstreams() {
        let cases = [
            (
                r#"{"type":"compaction","id":"cmp_1","encrypted_content":"x"}"#,
                r#"{"type":"compaction","id":"cmp_1","encrypted_content":"x"}"#,
            ),
            (
                r#"{"type":"compaction","id":"rs_1","encrypted_content":"x"}"#,
                r#"{"encrypted_content":"x","type":"compaction"}"#,
            ),
            (
                r#"{"type":"compaction","encrypted_content":"x"}"#,
                r#"{"type":"compaction","encrypted_content":"x"}"#,
            ),
            (
                r#"{"type":"compaction_summary","id":null,"encrypted_content":"x"}"#,
                r#"{"type":"compaction_summary","id":null,"encrypted_content":"x"}"#,
            ),
        ];
        for (given, expected) in cases {
            let response = format!(r#"{{"output":[{given}]}}"#);
            let expected = format!(r#"{{"object":"response.compaction","output":[{expected}]}}"#);
            assert_eq!(
                answer(response.as_bytes()).as_deref(),
                Some(expected.as_bytes()),
                "{given}"
            );
        }
    }

    #[test]
    fn a_client_gets_the_last_of_several_compactions() {
        let response = br#"{"output":[{"type":"compaction","encrypted_content":"a"},{"type":"compaction","encrypted_content":"b"},{"type":"message"}]}"#;
        let expected = br#"{"object":"response.compaction","output":[{"type":"compaction","encrypted_content":"b"}]}"#;
        assert_eq!(answer(response).as_deref(), Some(expected.as_slice()));
    }

    #[test]
    fn without_a_compaction_there_is_no_answer() {
        for response in [
            r#"{"output":[]}"#,
            r#"{"output":[{"type":"message","content":[]}]}"#,
            r#"{"output":[{"type":"compaction"}]}"#,
            r#"{"output":null}"#,
            "{}",
            "no JSON",
        ] {
            assert_eq!(answer(response.as_bytes()), None, "{response}");
        }
    }
}

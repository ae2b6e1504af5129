//! What holds for any body.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::*;

/// Any JSON, with the words that the rules look for among its strings.
fn any_json() -> impl Strategy<Value = Value> {
    let words = [
        "message",
        "role",
        "user",
        "assistant",
        "system",
        "developer",
        "tool",
        "type",
        "content",
        "text",
        "input_text",
        "output_text",
        "reasoning",
        "namespace",
        "function_call",
        "tool_call_id",
        "output",
        "additional_tools",
        "é\"\\\n",
    ];
    let word = proptest::sample::select(words.to_vec());
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, move |inner| {
        let member = (word.clone(), inner.clone());
        prop_oneof![
            proptest::collection::vec(inner, 0..4).prop_map(Value::from),
            proptest::collection::vec(member, 0..5).prop_map(|members| members
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect()),
        ]
    })
}

fn any_item() -> impl Strategy<Value = Value> {
    let role = proptest::sample::select(vec!["user", "assistant", "system", "developer", "tool"]);
    let kind = proptest::sample::select(vec![
        "message",
        "function_call",
        "additional_tools",
        "reasoning",
        "other",
    ]);
    let part =
        (any_json(), proptest::option::of("[a-z]{0,3}")).prop_map(|(extra, text)| match text {
            Some(text) => json!({"type": "text", "text": text, "reasoning_content": extra}),
            None => extra,
        });
    let content = prop_oneof![
        any_json(),
        proptest::collection::vec(part, 0..3).prop_map(Value::from),
        "[a-z]{0,5}".prop_map(Value::from),
    ];
    (
        proptest::option::of(role),
        proptest::option::of(kind),
        content,
        any_json(),
    )
        .prop_map(|(role, kind, content, extra)| {
            let mut item = json!({"content": content, "tool_call_id": "c", "tool_calls": extra});
            if let Some(role) = role {
                item["role"] = json!(role);
            }
            if let Some(kind) = kind {
                item["type"] = json!(kind);
            }
            item
        })
}

/// A body in no order, with fields that we have never heard of.
fn any_body() -> impl Strategy<Value = String> {
    let field =
        |name: &'static str, value: BoxedStrategy<Value>| (Just(name.to_owned()), value).boxed();
    let items = proptest::collection::vec(any_item(), 0..4).prop_map(Value::from);
    let optional = vec![
        field("stream", any::<bool>().prop_map(Value::from).boxed()),
        field("store", any::<bool>().prop_map(Value::from).boxed()),
        field("temperature", any_json().boxed()),
        field("instructions", "[a-z]{0,4}".prop_map(Value::from).boxed()),
        field("truncation", Just(json!("auto")).boxed()),
        field("service_tier", Just(json!("fast")).boxed()),
        field("reasoningEffort", Just(json!("minimal")).boxed()),
        field("verbosity", any_json().boxed()),
        field("tools", any_json().boxed()),
        field("client_metadata", any_json().boxed()),
        field(
            "previous_response_id",
            "[ a]{0,3}".prop_map(Value::from).boxed(),
        ),
        field("unheard_of", any_json().boxed()),
    ];
    let count = optional.len();
    (
        proptest::sample::subsequence(optional, 0..=count),
        items,
        "[a-z ]{0,2}",
    )
        .prop_flat_map(|(fields, items, space)| {
            let fixed = [("model", json!("m")), ("input", items)];
            let fixed =
                fixed.map(|(name, value)| (Just(name.to_owned()), Just(value).boxed()).boxed());
            let all: Vec<_> = fields.into_iter().chain(fixed).collect();
            let space = space.replace(|char: char| char != ' ', "\n");
            all.prop_shuffle().prop_map(move |members| {
                let members: Vec<_> = members
                    .iter()
                    .map(|(key, value)| format!("{}{space}:{space}{value}", quoted(key)))
                    .collect();
                format!(
                    "{{{space}{}{space}}}",
                    members.join(&format!("{space},{space}"))
                )
            })
        })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn normalising_twice_is_normalising_once(body in any_body()) {
        for shape in [Shape::Codex, Shape::OpenAi, Shape::Compact] {
            if let Ok(request) = read(Bytes::from(body.clone()), shape) {
                prop_assert!(serde_json::from_slice::<Value>(&request.body).is_ok());
                let again = read(request.body.clone(), shape).unwrap();
                prop_assert_eq!(&again.body, &request.body);
                prop_assert!(again.body.as_ptr() == request.body.as_ptr());
                prop_assert!(serde_json::from_slice::<Value>(&request.frame()).is_ok());
                let framed = read(request.frame(), Shape::Frame).unwrap();
                prop_assert_eq!(framed.frame(), request.frame());
            }
        }
    }

    #[test]
    fn unknown_fields_survive_byte_for_byte(body in any_body(), raw in any_json(), first in any::<bool>()) {
        let member = format!("\"unheard\\u005fof_too\" :\t{raw}");
        let inner = body.strip_prefix('{').and_then(|body| body.strip_suffix('}')).unwrap();
        let body = if first { format!("{{{member},{inner}}}") } else { format!("{{{inner},{member}}}") };
        if let Ok(request) = read(Bytes::from(body), Shape::OpenAi) {
            let text = std::str::from_utf8(&request.body).unwrap();
            prop_assert!(text.contains(&member), "{}", text);
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        let _ = read(Bytes::from(bytes), Shape::Codex);
    }
}

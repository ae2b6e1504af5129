//! What the real backend refuses.

use std::collections::BTreeSet;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use serde_json::{Value, json};

/// How a request came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Http,
    WebSocket,
}

const UNKNOWN: [&str; 9] = [
    "max_output_tokens",
    "metadata",
    "prompt_cache_retention",
    "prompt_cache_options",
    "safety_identifier",
    "temperature",
    "top_p",
    "truncation",
    "user",
];

const INCLUDES: [&str; 7] = [
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
];

/// The error object, if the body would be refused.
pub(super) fn refusal(body: &Value, transport: Transport) -> Option<Value> {
    let refuse = |param: &str, message: String| {
        Some(
            json!({ "message": message, "type": "invalid_request_error", "param": param, "code": null }),
        )
    };
    if let Some(name) = UNKNOWN.iter().find(|name| body.get(**name).is_some()) {
        return refuse(name, format!("Unsupported parameter: {name}"));
    }
    if body["store"] != false {
        return refuse("store", "Store must be set to false".into());
    }
    match transport {
        Transport::Http if body["stream"] != true => {
            return refuse("stream", "Stream must be set to true".into());
        }
        Transport::Http if body.get("previous_response_id").is_some() => {
            return refuse(
                "previous_response_id",
                "Unsupported parameter: previous_response_id".into(),
            );
        }
        // The CLI itself says `"stream": true` in its frames.
        Transport::WebSocket if body.get("stream").is_some_and(|stream| *stream != true) => {
            return refuse("stream", "Unsupported parameter: stream".into());
        }
        Transport::WebSocket if body.get("background").is_some() => {
            return refuse("background", "Unsupported parameter: background".into());
        }
        _ => {}
    }
    if !body["model"].is_string() {
        return refuse("model", "Missing required parameter: model".into());
    }
    if !(body["instructions"].is_null() || body["instructions"].is_string()) {
        return refuse("instructions", "Instructions are not valid".into());
    }
    let Some(input) = body["input"].as_array() else {
        return refuse("input", "Input must be a list".into());
    };
    if input.iter().any(|item| item["role"] == "system") {
        return refuse("input", "System messages are not allowed".into());
    }
    if input
        .iter()
        .any(|item| item["role"] == "tool" || item.get("reasoning_content").is_some())
    {
        return refuse("input", "Unknown parameter: 'input[0]'".into());
    }
    if matches!(
        body["service_tier"].as_str(),
        Some("fast" | "auto" | "default")
    ) {
        return refuse("service_tier", "Unsupported service_tier".into());
    }
    let includes = body["include"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if !includes.iter().all(|value| {
        value
            .as_str()
            .is_some_and(|value| INCLUDES.contains(&value))
    }) {
        return refuse("include", "Invalid value for include".into());
    }
    let tools = body["tools"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if tools
        .iter()
        .any(|tool| tool["type"] == "web_search_preview")
    {
        return refuse("tools", "Unsupported tool type: web_search_preview".into());
    }
    None
}

/// The error object, if the conversation is not whole (a tool call without its output, an output without its call) or holds an encrypted item that
/// was not made for this account.
pub(super) fn broken(history: &[Value], account: &str) -> Option<Value> {
    let refuse = |code: Option<&str>, message: String| {
        Some(
            json!({ "message": message, "type": "invalid_request_error", "param": "input", "code": code }),
        )
    };
    let ids = |kinds: [&str; 2]| -> BTreeSet<&str> {
        let of = history
            .iter()
            .filter(|item| kinds.iter().any(|kind| item["type"] == *kind));
        of.filter_map(|item| item["call_id"].as_str()).collect()
    };
    let calls = ids(["function_call", "custom_tool_call"]);
    let outputs = ids(["function_call_output", "custom_tool_call_output"]);
    if let Some(id) = calls.difference(&outputs).next() {
        return refuse(
            None,
            format!("No tool output found for function call {id}."),
        );
    }
    if let Some(id) = outputs.difference(&calls).next() {
        return refuse(
            None,
            format!("No tool call found for function call output with call_id {id}."),
        );
    }
    let sealed = sealed(account);
    let foreign = |item: &&Value| {
        item["encrypted_content"]
            .as_str()
            .is_some_and(|content| content != sealed)
    };
    history.iter().find(foreign).and_then(|item| {
        let message = format!(
            "The encrypted content for item {} could not be verified.",
            item["id"].as_str().unwrap_or_default()
        );
        refuse(Some("invalid_encrypted_content"), message)
    })
}

/// What a model thought, as only its account can send it back.
pub(super) fn sealed(account: &str) -> String {
    format!("gAAAA{}", BASE64_URL_SAFE_NO_PAD.encode(account))
}

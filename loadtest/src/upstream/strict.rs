//! What the real backend refuses.

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

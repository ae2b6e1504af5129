//! Chat messages as input items.
//!
//! Only the shape changes here; what the roles mean upstream is said in `input`, for both ways alike.

use serde_json::{Value, json};

use super::Invalid;

/// The items that `messages`, a raw value, stand for.
pub(super) fn items(messages: &str) -> Result<String, Invalid> {
    let messages: Vec<Value> =
        serde_json::from_str(messages).map_err(|_| wrong("`messages` must be an array."))?;
    let mut items = Vec::with_capacity(messages.len());
    for message in &messages {
        let role = message["role"].as_str().unwrap_or_default();
        match role {
            "system" | "developer" | "user" | "assistant" => {
                let content = parts(&message["content"], role == "assistant")?;
                let calls = message["tool_calls"]
                    .as_array()
                    .filter(|_| role == "assistant");
                if content != json!([]) || calls.is_none() {
                    items.push(json!({"type": "message", "role": role, "content": content}));
                }
                for call in calls.into_iter().flatten() {
                    items.push(tool_call(call)?);
                }
            }
            "tool" => items.push(message.clone()),
            _ => {
                return Err(wrong(
                    "`messages` take the roles system, developer, user, assistant, tool.",
                ));
            }
        }
    }
    Ok(Value::Array(items).to_string())
}

fn wrong(message: &str) -> Invalid {
    Invalid::new("messages", message)
}

fn parts(content: &Value, assistant: bool) -> Result<Value, Invalid> {
    let kind = if assistant {
        "output_text"
    } else {
        "input_text"
    };
    match content {
        Value::Null => Ok(json!([])),
        Value::String(text) => Ok(json!([{"type": kind, "text": text}])),
        Value::Array(parts) => parts.iter().map(|part| self::part(part, kind)).collect(),
        _ => Err(wrong(
            "The `content` of a message must be a string or an array.",
        )),
    }
}

fn part(part: &Value, kind: &str) -> Result<Value, Invalid> {
    match part["type"].as_str() {
        Some("text") => Ok(json!({"type": kind, "text": part["text"]})),
        Some("image_url") => {
            let image = &part["image_url"];
            let mut made = json!({"type": "input_image"});
            made["image_url"] = image.get("url").unwrap_or(image).clone();
            if let Some(detail) = image.get("detail") {
                made["detail"] = detail.clone();
            }
            Ok(made)
        }
        Some("file") => {
            let mut made = part["file"].clone();
            match made.as_object_mut() {
                Some(fields) => fields.insert("type".to_owned(), json!("input_file")),
                None => return Err(wrong("A part of type file must say which `file`.")),
            };
            Ok(made)
        }
        Some("input_audio") => Err(wrong("Audio input is not supported.")),
        Some(_) => Ok(part.clone()),
        None => Err(wrong("Every part of a message must have a `type`.")),
    }
}

fn tool_call(call: &Value) -> Result<Value, Invalid> {
    let id = call["id"]
        .as_str()
        .ok_or_else(|| wrong("Every tool call must have an `id`."))?;
    if let Some(custom) = call.get("custom") {
        let (name, input) = (&custom["name"], &custom["input"]);
        return Ok(
            json!({"type": "custom_tool_call", "call_id": id, "name": name, "input": input}),
        );
    }
    let (name, arguments) = (&call["function"]["name"], &call["function"]["arguments"]);
    if !name.is_string() {
        return Err(wrong("Every tool call must name its function."));
    }
    if !arguments.is_string() {
        return Err(wrong("The `arguments` of a tool call must be a string."));
    }
    Ok(json!({"type": "function_call", "call_id": id, "name": name, "arguments": arguments}))
}

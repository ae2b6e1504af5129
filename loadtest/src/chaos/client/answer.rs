//! What an event or a document says about the end of a call.

use serde_json::Value;

use crate::chaos::history::End;

/// The end that an event is, if it is one, and the output of a completed response.
pub(super) fn terminal(event: &Value) -> Option<(End, Vec<Value>)> {
    let response = &event["response"];
    match event["type"].as_str()? {
        "response.completed" => Some(completed(response)),
        "response.failed" | "response.incomplete" => {
            let flaw = response["id"].is_string() && response["error"].is_object();
            let flaw = (!flaw).then(|| "no id or error in the response".to_owned());
            Some((failed(200, &response["error"], flaw, false), Vec::new()))
        }
        "error" => {
            let status = event["status"]
                .as_u64()
                .and_then(|status| status.try_into().ok());
            let flaw = status.is_none().then(|| "no status".to_owned());
            let error = &event["error"];
            Some((failed(status.unwrap_or(0), error, flaw, true), Vec::new()))
        }
        _ => None,
    }
}

/// A response object.
pub(super) fn completed(response: &Value) -> (End, Vec<Value>) {
    if response["status"] != "completed" {
        return (failed(200, &response["error"], None, false), Vec::new());
    }
    let output = response["output"].as_array().cloned().unwrap_or_default();
    let texts = output
        .iter()
        .filter_map(|item| match item["type"].as_str()? {
            "message" => item["content"][0]["text"].as_str().map(str::to_owned),
            "function_call" => Some(format!("call: {}", item["arguments"].as_str()?)),
            _ => None,
        });
    let end = End::Completed {
        id: response["id"].as_str().unwrap_or_default().to_owned(),
        text: texts.collect(),
    };
    (end, output)
}

/// The body of a refusal.
pub(super) fn refused(status: u16, body: &[u8]) -> End {
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    failed(status, &body["error"], None, true)
}

fn failed(status: u16, error: &Value, flaw: Option<String>, typed: bool) -> End {
    let missing = |name: &str| {
        let empty = error[name].as_str().is_none_or(str::is_empty);
        empty.then(|| format!("no error.{name}"))
    };
    let kind = || typed.then(|| missing("type")).flatten();
    let flaw = flaw.or_else(|| missing("message")).or_else(kind);
    let code = error["code"].as_str().or_else(|| error["type"].as_str());
    End::Failed {
        status,
        code: code.unwrap_or_default().to_owned(),
        flaw,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_end_is_read_and_its_envelope_looked_at() {
        let fine = json!({ "message": "no", "type": "server_error", "code": "x" });
        let bare = json!({ "code": "x" });
        let end = |status, flaw: Option<&str>| End::Failed {
            status,
            code: "x".into(),
            flaw: flaw.map(str::to_owned),
        };
        let table = [
            (
                json!({ "type": "error", "status": 503, "error": fine }),
                end(503, None),
            ),
            (
                json!({ "type": "error", "error": fine }),
                end(0, Some("no status")),
            ),
            (
                json!({ "type": "error", "status": 400, "error": bare }),
                end(400, Some("no error.message")),
            ),
            (
                json!({ "type": "response.failed", "response": { "id": "r", "error": { "code": "x", "message": "no" } } }),
                end(200, None),
            ),
            (
                json!({ "type": "response.failed", "response": { "error": fine } }),
                end(200, Some("no id or error in the response")),
            ),
        ];
        for (event, expected) in table {
            assert_eq!(
                terminal(&event).map(|(end, _)| end),
                Some(expected),
                "{event}"
            );
        }
        assert_eq!(terminal(&json!({ "type": "response.created" })), None);
        let refusal = json!({ "error": fine }).to_string();
        assert_eq!(refused(429, refusal.as_bytes()), end(429, None));
    }
}

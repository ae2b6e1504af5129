//! The events of one response.

use std::time::Duration;

use serde_json::{Value, json};

use super::{
    Config,
    fault::{Kind, Stage},
    state::Usage,
    strict,
};

/// One thing to do.
#[derive(Clone, Debug)]
pub(super) enum Step {
    /// Send an event.
    Event(Value),
    /// A point at which a fault may strike.
    Reached(Stage),
    /// Send what follows at once, until [`Step::Reached`].
    Together(Vec<Value>),
}

/// A response as it will be sent.
pub(super) struct Answer {
    pub(super) id: String,
    pub(super) steps: Vec<Step>,
    pub(super) usage: Usage,
    /// What the conversation grows by.
    pub(super) output: Vec<Value>,
    /// Between two events.
    pub(super) pace: Option<Duration>,
}

/// Writes events with their numbers.
struct Writer {
    steps: Vec<Step>,
    sequence: u64,
}

impl Writer {
    fn number(&mut self, mut event: Value) -> Value {
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        event
    }

    fn event(&mut self, event: Value) {
        let event = self.number(event);
        self.steps.push(Step::Event(event));
    }

    fn reach(&mut self, stage: Stage) {
        self.steps.push(Step::Reached(stage));
    }
}

/// Plans the response to a request whose whole conversation is `history`.
pub(super) fn plan(
    id: String,
    model: &str,
    account: &str,
    history: &[Value],
    request_bytes: usize,
    config: &Config,
    fault: Option<&Kind>,
) -> Answer {
    let mut out = Writer {
        steps: Vec::new(),
        sequence: 0,
    };
    let response = |status: &str, output: &[Value], usage: Value| {
        json!({
            "id": id, "object": "response", "created_at": super::account::epoch(), "status": status, "model": model,
            "output": output, "usage": usage, "error": null, "incomplete_details": null, "parallel_tool_calls": true,
            "tool_choice": "auto", "tools": [], "store": false, "service_tier": "default",
        })
    };
    out.reach(Stage::BeforeCreated);
    out.event(json!({ "type": "response.created", "response": response("in_progress", &[], Value::Null) }));
    out.event(json!({ "type": "response.in_progress", "response": response("in_progress", &[], Value::Null) }));
    out.reach(Stage::AfterCreated);
    if let Some(Kind::Told(used)) = fault {
        out.event(super::websocket::rate_limits(*used));
    }
    if let Some(failed) = failure(&id, fault) {
        out.event(failed);
        return Answer {
            id,
            steps: out.steps,
            usage: Usage::default(),
            output: Vec::new(),
            pace: None,
        };
    }
    let mut output = Vec::new();
    if last_text(history).contains("[reasoning]") {
        let item = json!({ "id": id.replace("resp", "rs"), "type": "reasoning", "summary": [], "encrypted_content": strict::sealed(account) });
        for kind in ["response.output_item.added", "response.output_item.done"] {
            out.event(json!({ "type": kind, "output_index": 0, "item": item }));
        }
        output.push(item);
    }
    let index = output.len();
    let (item, words) = item(&id, account, history, config.deltas, fault);
    out.event(json!({ "type": "response.output_item.added", "output_index": index, "item": { "id": item["id"], "type": item["type"], "status": "in_progress", "role": item["role"], "content": [] } }));
    if item["type"] == "message" {
        text(
            &mut out,
            &item,
            index,
            &words,
            matches!(fault, Some(Kind::Burst(_))),
        );
    }
    out.event(json!({ "type": "response.output_item.done", "output_index": index, "item": item }));
    out.reach(Stage::ItemDone);
    out.reach(Stage::BeforeTerminal);
    let usage = Usage {
        input: (request_bytes / 4) as u64,
        cached: (request_bytes / 16) as u64,
        output: words.len() as u64 + 5,
        reasoning: 3,
    };
    output.push(item);
    out.event(json!({ "type": "response.completed", "response": response("completed", &output, billed(usage)) }));
    Answer {
        id,
        steps: out.steps,
        usage,
        output,
        pace: fault.and_then(Kind::pace).or(config.pace),
    }
}

/// The answer to a prewarm: nothing is generated.
pub(super) fn prewarm(id: String, model: &str) -> Answer {
    let response = |status: &str| json!({ "id": id, "object": "response", "status": status, "model": model, "output": [], "usage": billed(Usage::default()) });
    let mut out = Writer {
        steps: Vec::new(),
        sequence: 0,
    };
    out.event(json!({ "type": "response.created", "response": response("in_progress") }));
    out.event(json!({ "type": "response.completed", "response": response("completed") }));
    Answer {
        id,
        steps: out.steps,
        usage: Usage::default(),
        output: Vec::new(),
        pace: None,
    }
}

fn billed(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.input,
        "input_tokens_details": { "cached_tokens": usage.cached },
        "output_tokens": usage.output,
        "output_tokens_details": { "reasoning_tokens": usage.reasoning },
        "total_tokens": usage.input + usage.output,
    })
}

fn failure(id: &str, fault: Option<&Kind>) -> Option<Value> {
    let failed = |code: &str, message: &str| {
        json!({ "type": "response.failed", "response": { "id": id, "object": "response", "status": "failed", "output": [],
            "error": { "code": code, "message": message }, "incomplete_details": null } })
    };
    match fault? {
        Kind::Failed(code) => Some(failed(code, "the script says so")),
        Kind::NotFoundAsFailed => Some(failed(
            "previous_response_not_found",
            "Previous response not found.",
        )),
        _ => None,
    }
}

/// The output item and the words of its text.
fn item(
    id: &str,
    account: &str,
    history: &[Value],
    deltas: usize,
    fault: Option<&Kind>,
) -> (Value, Vec<String>) {
    let suffix = id.trim_start_matches("resp_");
    let last = history.last().cloned().unwrap_or_default();
    if last["type"] == "compaction_trigger" {
        let item = json!({ "id": format!("cmp_{suffix}"), "type": "compaction", "encrypted_content": strict::sealed(account), "status": "completed" });
        return (item, Vec::new());
    }
    let message = |words: &[String]| {
        json!({ "id": format!("msg_{suffix}"), "type": "message", "status": "completed", "role": "assistant",
            "content": [{ "type": "output_text", "text": words.concat(), "annotations": [] }] })
    };
    let asked = last_text(history);
    let words = match fault {
        Some(Kind::Huge(bytes)) => vec!["x".repeat(*bytes)],
        Some(Kind::Burst(count) | Kind::Paced(count, _)) => vec!["word ".to_owned(); *count],
        _ if last["type"] == "function_call_output"
            || last["type"] == "custom_tool_call_output" =>
        {
            vec![format!(
                "tool said: {}",
                last["output"]
                    .as_str()
                    .map_or_else(|| last["output"].to_string(), str::to_owned)
            )]
        }
        _ if let Some(command) = tool(&asked) => {
            let item = json!({ "id": format!("fc_{suffix}"), "type": "function_call", "status": "completed", "name": "exec_command",
                "call_id": format!("call_{suffix}"), "arguments": json!({ "cmd": command }).to_string() });
            return (item, Vec::new());
        }
        _ => {
            let mut words = vec!["echo: ".to_owned(), asked];
            words.extend(std::iter::repeat_n(
                ".".to_owned(),
                deltas.saturating_sub(2),
            ));
            words
        }
    };
    (message(&words), words)
}

fn text(out: &mut Writer, item: &Value, index: usize, words: &[String], together: bool) {
    let part = |text: &str| json!({ "type": "output_text", "text": text, "annotations": [] });
    out.event(json!({ "type": "response.content_part.added", "item_id": item["id"], "output_index": index, "content_index": 0, "part": part("") }));
    let delta = |word: &String| json!({ "type": "response.output_text.delta", "item_id": item["id"], "output_index": index, "content_index": 0, "delta": word });
    if together {
        let events = words.iter().map(|word| out.number(delta(word))).collect();
        out.steps.push(Step::Together(events));
        out.reach(Stage::Visible);
    } else {
        for (index, word) in words.iter().enumerate() {
            out.event(delta(word));
            if index == 0 {
                out.reach(Stage::Visible);
            }
        }
    }
    let whole = words.concat();
    out.event(json!({ "type": "response.output_text.done", "item_id": item["id"], "output_index": index, "content_index": 0, "text": whole }));
    out.event(json!({ "type": "response.content_part.done", "item_id": item["id"], "output_index": index, "content_index": 0, "part": part(&whole) }));
}

/// The command that a text asks for: `[tool COMMAND]`, or `[tool]` for a plain one.
fn tool(asked: &str) -> Option<&str> {
    let (_, rest) = asked.split_once("[tool")?;
    let (command, _) = rest.split_once(']')?;
    match command.trim() {
        "" => Some("echo drawbridge-tool"),
        command => Some(command),
    }
}

/// The newest text of a user.
fn last_text(history: &[Value]) -> String {
    let user = history.iter().rev().find(|item| item["role"] == "user");
    let Some(user) = user else {
        return String::new();
    };
    match &user["content"] {
        Value::String(text) => text.clone(),
        content => content
            .as_array()
            .and_then(|parts| parts.iter().rev().find_map(|part| part["text"].as_str()))
            .unwrap_or_default()
            .to_owned(),
    }
}

//! What everybody saw, as the checker reads it. Times are milliseconds of the machine's wall clock since 1970.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::plan::What;
use crate::upstream::Attempt;

/// Everything about a run.
#[derive(Clone, Debug, Default, Serialize)]
pub struct History {
    /// By the clients, in the order in which they ended.
    pub calls: Vec<Call>,
    /// By the fake upstream, in the order of arrival.
    pub attempts: Vec<Attempt>,
    /// What it would not have forgiven.
    pub upstream_violations: Vec<String>,
    /// What went wrong by plan.
    pub faults: Vec<Struck>,
    /// The ledger at the end, oldest turn first.
    pub turns: Vec<Turn>,
    /// The leases at the end.
    pub leases: Vec<Lease>,
    /// Leases as they were seen during the run, in order.
    pub sightings: Vec<Sighting>,
    /// Which replica an incarnation was, by its id.
    pub boots: BTreeMap<String, usize>,
    /// The names of the accounts.
    pub accounts: Vec<String>,
    /// Replicas that were alive at the end and not ready.
    pub unready: Vec<String>,
}

/// How a client goes on with its conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// HTTP, by `previous_response_id` alone.
    Chain,
    /// HTTP, by token and `previous_response_id`.
    Token,
    /// HTTP, everything again under a session header.
    Session,
    /// HTTP as the Codex CLI: everything again, client turns, retries.
    Codex,
    /// A WebSocket as the Codex CLI.
    CodexSocket,
    /// A WebSocket, by `previous_response_id` on whatever socket.
    ChainSocket,
}

/// One request of a client and its end.
#[derive(Clone, Debug, Serialize)]
pub struct Call {
    /// What it adds: a message of the user, or a tool's output, which no other call has; retries share it.
    pub tag: String,
    /// Under which key.
    pub key: usize,
    /// Which replica took the connection, if one did.
    pub entry: Option<usize>,
    /// How.
    pub style: Style,
    /// The client's turn, where it names one.
    pub client_turn: Option<String>,
    /// `previous_response_id`.
    pub continues: Option<String>,
    /// The conversation that it means, oldest message first, as [`said`] writes it.
    pub meant: Vec<String>,
    /// Whether it goes on with what is not its own.
    pub intrudes: bool,
    /// Whether it was made when everything had healed.
    pub healed: bool,
    /// When it was sent.
    pub began: u64,
    /// When its end was known.
    pub ended: u64,
    /// What came.
    pub end: End,
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// A completed response.
    Completed {
        /// Its id.
        id: String,
        /// Its text, or the tool that it calls.
        text: String,
    },
    /// An error, as status or in the stream.
    Failed {
        /// Of HTTP, or of the frame; 200 in a stream.
        status: u16,
        /// `error.code`, else `error.type`.
        code: String,
        /// What is missing of OpenAI's envelope.
        flaw: Option<String>,
    },
    /// The connection ended before the answer did.
    Broken(String),
    /// The client left.
    Left,
}

/// A fault that was done.
#[derive(Clone, Debug, Serialize)]
pub struct Struck {
    /// What.
    pub what: What,
    /// From.
    pub from: u64,
    /// To; later than planned where something took time to end.
    pub to: u64,
}

/// A row of the ledger.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Turn {
    /// `turn_id`.
    pub id: String,
    /// Which client turn, or user's message, if that is known.
    pub tag: Option<String>,
    /// `client_turn_id`.
    pub client_turn: Option<String>,
    /// `open`, `settled` or `released`.
    pub state: String,
    /// How it ended.
    pub outcome: Option<String>,
    /// The response's id.
    pub response: Option<String>,
    /// The request that held it last.
    pub request: String,
    /// Of the lease.
    pub lease: Option<String>,
    /// Of the lease.
    pub generation: Option<i64>,
    /// The incarnation that held it last.
    pub boot: String,
    /// Its tries.
    pub attempts: Vec<Booked>,
    /// Sums as they are booked: input, cached, output, reasoning.
    pub sums: [u64; 4],
    /// When it was opened first, from its id.
    pub born: u64,
    /// When it was opened last.
    pub opened: u64,
    /// When it was settled.
    pub settled: Option<u64>,
}

/// An element of `turns.attempts`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Booked {
    /// The account's name.
    pub account: String,
    /// By which incarnation.
    pub boot: String,
    /// `completed`, or a class of failure.
    pub class: Option<String>,
    /// Input, cached, output, reasoning.
    pub usage: [u64; 4],
    /// Whether that is a guess.
    pub estimated: bool,
}

/// A row of the leases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Lease {
    /// `lease_id`.
    pub id: String,
    /// The fencing token.
    pub generation: i64,
    /// `owner_boot`.
    pub owner: Option<String>,
    /// Whether that has a tombstone.
    pub dead: bool,
    /// The request whose turn runs on it.
    pub busy: Option<String>,
}

/// A lease that was not seen like this before.
#[derive(Clone, Debug, Serialize)]
pub struct Sighting {
    /// When.
    pub at: u64,
    /// What the row said.
    pub lease: Lease,
}

/// What a turn is called that answers a tool's call, after the message that led to it.
const ANSWERS: &str = " out";

/// What the call answers a tool's call with that was made for a message of this tag.
#[must_use]
pub(super) fn output(tag: &str) -> String {
    format!("{tag}{ANSWERS}")
}

/// The message that led to a call, by the call's tag; turns of Codex are named by it.
#[must_use]
pub(super) fn asked(tag: &str) -> &str {
    tag.strip_suffix(ANSWERS).unwrap_or(tag)
}

/// The conversation, by the tag of one of its calls.
#[must_use]
pub(super) fn conversation(tag: &str) -> &str {
    tag.split_once('-').map_or(tag, |(name, _)| name)
}

/// The items of a conversation as text: messages, calls of tools and their outputs. Thoughts are left out: whether they go with a
/// conversation is upstream's affair.
#[must_use]
pub(super) fn said(items: &[Value]) -> Vec<String> {
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let text = |item: &Value| match &item["content"] {
        Value::String(text) => text.clone(),
        content => {
            let parts = content.as_array().into_iter().flatten();
            parts.filter_map(|part| part["text"].as_str()).collect()
        }
    };
    let line = |item: &Value| match item["type"].as_str() {
        Some("function_call") => Some(format!("call: {}", word(&item["arguments"]))),
        Some("function_call_output") => Some(format!("tool: {}", word(&item["output"]))),
        _ if item["role"].is_string() => Some(format!("{}: {}", word(&item["role"]), text(item))),
        _ => None,
    };
    items.iter().filter_map(line).collect()
}

/// Gives turns that do not say what they answer the tag of the attempt that they got their response from.
pub(super) fn name(turns: &mut [Turn], attempts: &[Attempt]) {
    let answers = attempts.iter();
    let answers: BTreeMap<&str, &Attempt> = answers
        .filter_map(|attempt| Some((attempt.response_id.as_deref()?, attempt)))
        .collect();
    for turn in turns.iter_mut().filter(|turn| turn.tag.is_none()) {
        let answer = turn.response.as_deref().and_then(|id| answers.get(id));
        turn.tag = answer.and_then(|attempt| tag(attempt));
    }
}

/// What an attempt answers.
#[must_use]
pub(super) fn tag(attempt: &Attempt) -> Option<String> {
    let mut said = said(&attempt.history);
    if said.is_empty() {
        // Refused before it was looked at.
        said = attempt.body["input"]
            .as_array()
            .map(|items| self::said(items))
            .unwrap_or_default();
    }
    let asks = |line: &String| {
        let asked = line.strip_prefix("user: ");
        asked
            .or_else(|| line.strip_prefix("tool: "))
            .map(str::to_owned)
    };
    said.iter().rev().find_map(asks)
}

//! What the fake upstream of the tests assumes about the real one, as data: a name, and a look at what came. Differences are told by names,
//! types and numbers, never by text of the answer.

use std::collections::BTreeSet;

use http::HeaderMap;
use serde_json::Value;

/// One turn as it came.
#[derive(Default)]
pub(super) struct Seen {
    /// Of the answer, or of the handshake.
    pub(super) headers: HeaderMap,
    /// Every event, in order.
    pub(super) events: Vec<Value>,
}

/// An assumption; yields what was seen instead.
pub(super) type Assumption = (&'static str, fn(&Seen) -> Option<String>);

/// Of both transports.
pub(super) const EVERYWHERE: &[Assumption] = &[
    ("x-codex-turn-state is a header", |seen| {
        seen.lacks(&["x-codex-turn-state"])
    }),
    ("response.created comes first", |seen| {
        differs(
            seen.response_types().first().copied(),
            Some("response.created"),
        )
    }),
    ("response.in_progress follows", |seen| {
        differs(
            seen.response_types().get(1).copied(),
            Some("response.in_progress"),
        )
    }),
    ("response.completed comes last", |seen| {
        differs(
            seen.response_types().last().copied(),
            Some("response.completed"),
        )
    }),
    ("no other types of events", |seen| {
        let strange: BTreeSet<&str> = seen.types().filter(|kind| !TYPES.contains(kind)).collect();
        (!strange.is_empty()).then(|| Vec::from_iter(strange).join(", "))
    }),
    (
        "text arrives between content_part.added and content_part.done",
        |seen| {
            let at = |wanted: &str| seen.types().position(|kind| kind == wanted);
            let order = [
                "response.output_item.added",
                "response.content_part.added",
                "response.output_text.delta",
                "response.output_text.done",
                "response.content_part.done",
                "response.output_item.done",
            ]
            .map(|kind| seen.of_message(kind).or_else(|| at(kind)));
            (!order.is_sorted() || order.contains(&None)).then(|| format!("at {order:?}"))
        },
    ),
    ("sequence_number counts from 0", |seen| {
        let numbers = seen
            .events
            .iter()
            .filter_map(|event| event["sequence_number"].as_u64());
        let numbers: Vec<u64> = numbers.collect();
        let gap = numbers
            .iter()
            .enumerate()
            .find(|(at, number)| *at as u64 != **number);
        gap.map(|(at, number)| format!("{number} in place {at}"))
            .or_else(|| numbers.is_empty().then(|| "none".into()))
    }),
    ("one response id, resp_..", |seen| {
        let ids = seen
            .events
            .iter()
            .filter_map(|event| event["response"]["id"].as_str());
        let ids: BTreeSet<&str> = ids.collect();
        let good = ids.len() == 1 && ids.iter().all(|id| id.starts_with("resp_"));
        (!good).then(|| format!("{} ids, not all resp_..", ids.len()))
    }),
    (
        "the completed response has its status, no error and no incomplete_details",
        |seen| {
            let response = seen.completed()?;
            let fine = response["status"] == "completed"
                && response["error"].is_null()
                && response["incomplete_details"].is_null();
            (!fine).then(|| format!("status {}", response["status"]))
        },
    ),
    (
        "usage has input, cached, output, reasoning and total tokens, and adds up",
        |seen| {
            let usage = &seen.completed()?["usage"];
            let number = |pointer: &str| usage.pointer(pointer).and_then(Value::as_u64);
            let missing = USAGE
                .iter()
                .filter(|pointer| number(pointer).is_none())
                .copied();
            let missing: Vec<&str> = missing.collect();
            if !missing.is_empty() {
                return Some(format!("no {}", missing.join(", ")));
            }
            let total = number("/input_tokens")? + number("/output_tokens")?;
            (Some(total) != number("/total_tokens"))
                .then(|| "the total is not input and output".into())
        },
    ),
];

/// Of an answer over HTTP.
pub(super) const HTTP: &[Assumption] = &[
    ("it is text/event-stream", |seen| {
        let kind = seen
            .headers
            .get("content-type")
            .and_then(|kind| kind.to_str().ok());
        (!kind.is_some_and(|kind| kind.starts_with("text/event-stream")))
            .then(|| kind.unwrap_or("none").to_owned())
    }),
    ("limits are headers", |seen| {
        seen.lacks(&[
            "x-codex-primary-used-percent",
            "x-codex-primary-window-minutes",
            "x-codex-primary-reset-at",
            "x-codex-secondary-used-percent",
        ])
    }),
    (
        "x-request-id, x-models-etag and openai-model are headers",
        |seen| seen.lacks(&["x-request-id", "x-models-etag", "openai-model"]),
    ),
];

/// Of an answer over a WebSocket.
pub(super) const WEBSOCKET: &[Assumption] = &[
    ("response.metadata has a turn state", |seen| {
        let metadata = seen
            .events
            .iter()
            .find(|event| event["type"] == "response.metadata");
        let state = metadata.map(|event| event["headers"]["x-codex-turn-state"].is_string());
        (state != Some(true)).then(|| {
            if state.is_none() {
                "no such event"
            } else {
                "without"
            }
            .into()
        })
    }),
    ("codex.rate_limits has a primary window", |seen| {
        let limits = seen
            .events
            .iter()
            .find(|event| event["type"] == "codex.rate_limits");
        let primary = limits.map(|event| &event["rate_limits"]["primary"]);
        let whole = primary.is_some_and(|window| {
            ["used_percent", "window_minutes", "reset_at"]
                .iter()
                .all(|key| window[key].is_number())
        });
        (!whole).then(|| {
            if primary.is_none() {
                "no such event"
            } else {
                "incomplete"
            }
            .into()
        })
    }),
];

/// What is known to be said.
const TYPES: &[&str] = &[
    "codex.rate_limits",
    "response.metadata",
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.output_item.done",
    "response.content_part.added",
    "response.content_part.done",
    "response.output_text.delta",
    "response.output_text.done",
    "response.completed",
];

const USAGE: &[&str] = &[
    "/input_tokens",
    "/input_tokens_details/cached_tokens",
    "/output_tokens",
    "/output_tokens_details/reasoning_tokens",
    "/total_tokens",
];

impl Seen {
    /// The completed response.
    pub(super) fn completed(&self) -> Option<&Value> {
        let last = self
            .events
            .iter()
            .rfind(|event| event["type"] == "response.completed");
        last.map(|event| &event["response"])
    }

    fn types(&self) -> impl Iterator<Item = &str> {
        self.events
            .iter()
            .map(|event| event["type"].as_str().unwrap_or("?"))
    }

    /// Without what is said about the account, which may come at any time.
    fn response_types(&self) -> Vec<&str> {
        let about = |kind: &&str| !kind.starts_with("codex.") && *kind != "response.metadata";
        self.types().filter(about).collect()
    }

    /// Where an event of the message stands; a model may think before it.
    fn of_message(&self, kind: &str) -> Option<usize> {
        self.events
            .iter()
            .position(|event| event["type"] == kind && event["item"]["type"] == "message")
    }

    fn lacks(&self, names: &[&'static str]) -> Option<String> {
        let missing = names
            .iter()
            .filter(|name| !self.headers.contains_key(**name))
            .copied();
        let missing: Vec<&str> = missing.collect();
        (!missing.is_empty()).then(|| format!("no {}", missing.join(", ")))
    }
}

fn differs(seen: Option<&str>, wanted: Option<&str>) -> Option<String> {
    (seen != wanted).then(|| seen.unwrap_or("nothing").to_owned())
}

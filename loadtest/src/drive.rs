//! The load generator: streams of Codex-like turns against a base URL, and what a client would have felt.
//!
//! Each stream owns one connection and its turns follow each other on it. With a rate the turns start at fixed moments whatever the answers
//! do (open loop), and how late a start was is part of the report; without one a stream starts its next turn as soon as the last has ended.
//! Events are looked at with byte searches only: the generator shares two cores with what it measures.

mod event;
mod tally;
mod wire;

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until},
};
use uuid::Uuid;

pub use self::tally::{Quantiles, Report};
use self::{tally::Tally, wire::Wire};

/// How turns travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// One POST a turn.
    Sse,
    /// One frame a turn.
    Ws,
}

/// A load.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// `http://HOST:PORT/backend-api/codex`.
    pub url: String,
    /// The bearer token: a client key, or the fake's access token.
    #[serde(skip)]
    pub key: String,
    /// Sent as `chatgpt-account-id`, which the fake wants of who talks to it directly.
    #[serde(skip)]
    pub account_id: Option<String>,
    /// Connections.
    pub streams: usize,
    /// Turns started per second over all streams; 0 = each after the one before it.
    pub rate: f64,
    /// Turns of each stream.
    pub turns: usize,
    /// How they travel.
    pub transport: Transport,
    /// Size of a request.
    pub body_bytes: usize,
    /// Without a rate: the time over which the streams start.
    pub ramp: Duration,
    /// How long one turn may take.
    pub timeout: Duration,
    /// After each piece of an answer over HTTP: a client that is slow to read.
    pub pause: Duration,
}

/// Runs a load to its end.
///
/// # Errors
/// If the URL cannot be used. What goes wrong in a turn is counted in the report.
pub async fn drive(plan: &Plan) -> anyhow::Result<Report> {
    let target: Arc<wire::Target> = Arc::new(wire::Target::of(plan)?);
    let tally = Arc::new(Mutex::new(Tally::default()));
    let began = Instant::now();
    let mut streams = JoinSet::new();
    for index in 0..plan.streams {
        let stream = Stream {
            index,
            plan: plan.clone(),
            target: Arc::clone(&target),
            tally: Arc::clone(&tally),
            began,
            session: Uuid::now_v7(),
            last_response: None,
        };
        streams.spawn(stream.run());
    }
    while let Some(ended) = streams.join_next().await {
        ended.context("a stream")?;
    }
    let tally = std::mem::take(&mut *tally.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(tally.report(began.elapsed()))
}

/// One conversation on one connection.
struct Stream {
    index: usize,
    plan: Plan,
    target: Arc<wire::Target>,
    tally: Arc<Mutex<Tally>>,
    began: Instant,
    session: Uuid,
    /// What the next frame on a socket goes on from.
    last_response: Option<String>,
}

impl Stream {
    async fn run(mut self) {
        let mut wire = None;
        for turn in 0..self.plan.turns {
            let due = self.due(turn);
            sleep_until(due).await;
            let late = if self.plan.rate > 0.0 {
                due.elapsed()
            } else {
                Duration::ZERO
            };
            self.note(|tally| tally.started(late));
            let ended = tokio::time::timeout(self.plan.timeout, self.turn(&mut wire)).await;
            let error = match ended {
                Ok(Ok(())) => continue,
                Ok(Err(error)) => error.to_string(),
                Err(_) => "timeout".to_owned(),
            };
            self.note(|tally| tally.failed(&error));
            wire = None;
            self.last_response = None;
        }
    }

    /// When a turn starts: turns are dealt out to the streams like cards.
    fn due(&self, turn: usize) -> Instant {
        #[expect(clippy::cast_precision_loss, reason = "counts of turns are small")]
        let seconds = if self.plan.rate > 0.0 {
            (turn * self.plan.streams + self.index) as f64 / self.plan.rate
        } else if turn == 0 {
            self.plan.ramp.as_secs_f64() * self.index as f64 / self.plan.streams as f64
        } else {
            0.0
        };
        self.began + Duration::from_secs_f64(seconds)
    }

    async fn turn(&mut self, wire: &mut Option<Wire>) -> anyhow::Result<()> {
        let turn_id = Uuid::now_v7().to_string();
        let metadata = json!({ "session_id": self.session, "thread_id": self.session, "turn_id": turn_id, "request_kind": "turn" }).to_string();
        let body = self.body(&turn_id, &metadata);
        let wire = match wire {
            Some(wire) => wire,
            None => wire.insert(
                Wire::open(&self.target, self.plan.transport, self.session, &metadata).await?,
            ),
        };
        let tally = Arc::clone(&self.tally);
        let noted = move |event| {
            tally
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .saw(event)
        };
        self.last_response = wire
            .turn(
                &self.target,
                self.session,
                &metadata,
                body,
                self.plan.pause,
                noted,
            )
            .await?;
        Ok(())
    }

    /// A request as the Codex CLI writes it, filled up with instructions to the wanted size.
    fn body(&self, turn_id: &str, metadata: &str) -> String {
        let item = |role: &str, text: &str| json!({ "type": "message", "id": format!("msg_{}", Uuid::new_v4()), "role": role, "content": [{ "type": "input_text", "text": text }] });
        let tools = json!([
            { "type": "function", "name": "exec_command", "description": "Runs a command in a PTY", "strict": false,
              "parameters": { "type": "object", "properties": { "cmd": { "type": "string" }, "workdir": { "type": "string" } }, "required": ["cmd"] } },
            { "type": "custom", "name": "apply_patch", "description": "Edits files", "format": { "type": "grammar", "syntax": "lark", "definition": "start: patch" } },
        ]);
        let question = item("user", "Say something, please.");
        let build = |padding: usize| {
            let mut input = vec![question.clone()];
            if padding > 0 || self.last_response.is_none() {
                input.insert(
                    0,
                    item(
                        "developer",
                        &"You are a careful engineer.\n".repeat(padding / 28),
                    ),
                );
            }
            let mut body = json!({
                "model": "gpt-5.5", "input": input, "tools": tools, "tool_choice": "auto", "parallel_tool_calls": true,
                "reasoning": { "effort": "medium" }, "store": false, "include": ["reasoning.encrypted_content"],
                "prompt_cache_key": self.session, "text": { "verbosity": "low" },
                "client_metadata": { "session_id": self.session, "thread_id": self.session, "turn_id": turn_id, "x-codex-turn-metadata": metadata },
            });
            match self.plan.transport {
                Transport::Sse => body["stream"] = true.into(),
                Transport::Ws => {
                    body["type"] = "response.create".into();
                    if let Some(last) = &self.last_response {
                        body["previous_response_id"] = Value::from(last.clone());
                    }
                }
            }
            body.to_string()
        };
        let bare = build(0);
        let missing = self.plan.body_bytes.saturating_sub(bare.len());
        if missing == 0 { bare } else { build(missing) }
    }

    fn note(&self, note: impl FnOnce(&mut Tally)) {
        note(&mut self.tally.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

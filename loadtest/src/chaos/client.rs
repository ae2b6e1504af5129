//! Clients that know what they mean: conversations of several styles, each call of which is recorded with its end.

mod answer;
mod wire;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::{Value, json};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use self::wire::{Reply, Socket};
use super::history::{self, Call, End, Style, said};
use crate::clock;

const STYLES: [Style; 6] = [
    Style::Chain,
    Style::Token,
    Style::Session,
    Style::Codex,
    Style::CodexSocket,
    Style::ChainSocket,
];
/// How long one call may take: longer than any fault, and what it leaves behind.
const PATIENCE: Duration = Duration::from_secs(150);
/// How often a turn is tried.
const TRIES: u32 = 12;

/// What all clients share.
pub(super) struct Crowd {
    /// The replicas: connections go round, and one that is refused goes to the next, as at a balancer without affinity.
    pub(super) fronts: Vec<SocketAddr>,
    pub(super) next: AtomicUsize,
    /// Keys of different scopes.
    pub(super) keys: Vec<String>,
    pub(super) http: reqwest::Client,
    pub(super) seed: u64,
    /// Whether the clients shall come to an end.
    pub(super) over: watch::Receiver<bool>,
    /// What happened.
    pub(super) calls: Mutex<Vec<Call>>,
}

impl Crowd {
    fn note(&self, call: Call) {
        self.calls
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(call);
    }

    /// What happened until now.
    pub(super) fn taken(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// All replicas, the one whose turn it is first.
    fn fronts(&self) -> impl Iterator<Item = (usize, SocketAddr)> {
        let (all, first) = (self.fronts.len(), self.next.fetch_add(1, Ordering::Relaxed));
        (first..first + all).map(move |n| (n % all, self.fronts[n % all]))
    }

    fn is_over(&self) -> bool {
        *self.over.borrow()
    }
}

/// One client holds one conversation after another until it is over; yields the one that it was at.
pub(super) async fn talk(crowd: Arc<Crowd>, number: usize) -> Conversation {
    let mut random = StdRng::seed_from_u64(crowd.seed ^ (number as u64 + 1) << 32);
    let mut round = 0;
    loop {
        let mut conversation = Conversation {
            crowd: Arc::clone(&crowd),
            name: format!("c{number}.{round}"),
            style: STYLES[number % STYLES.len()],
            key: (number / STYLES.len()) % crowd.keys.len(),
            items: Vec::new(),
            last: None,
            token: None,
            socket: None,
        };
        let turns = random.random_range(3..14);
        conversation.hold(turns, &mut random).await;
        if crowd.is_over() {
            return conversation;
        }
        round += 1;
    }
}

/// A conversation, as its client has it.
pub(super) struct Conversation {
    crowd: Arc<Crowd>,
    name: String,
    style: Style,
    key: usize,
    /// All of it.
    items: Vec<Value>,
    /// The response to go on from.
    last: Option<String>,
    /// The turn state that came with it.
    token: Option<String>,
    /// The socket, and whether the last response came over it.
    socket: Option<(Socket, bool)>,
}

impl Conversation {
    async fn hold(&mut self, turns: usize, random: &mut StdRng) {
        for turn in 0..turns {
            let mut tag = format!("{}-t{turn}", self.name);
            if random.random_bool(0.15) {
                tag.push_str(" [reasoning]");
            }
            if random.random_bool(0.2) {
                tag.push_str(" [tool look]");
            }
            if !self.turn(&tag, message(&tag), random).await {
                return;
            }
            if let Some((tag, item)) = self.owed(&tag)
                && !self.turn(&tag, item, random).await
            {
                return;
            }
            if self.last.is_some() && random.random_bool(0.03) {
                self.intrude(turn).await;
            }
            sleep(Duration::from_millis(random.random_range(0..2_500))).await;
        }
    }

    /// The output of the tool that was called last, if the conversation waits for it.
    fn owed(&self, tag: &str) -> Option<(String, Value)> {
        let call = self.items.last()?;
        let tag = history::output(history::asked(tag));
        let waits = call["type"] == "function_call";
        waits.then(|| {
            let item = json!({ "type": "function_call_output", "call_id": call["call_id"], "output": tag });
            (tag, item)
        })
    }

    /// Goes on once more, on a new connection, when everything has healed: there is nothing left that could be in the way.
    pub(super) async fn last_word(mut self) {
        self.socket = None;
        let tag = format!("{}-end", self.name);
        let (tag, item) = self.owed(&tag).unwrap_or_else(|| {
            let item = message(&tag);
            (tag, item)
        });
        let ask = self.ask(&tag, item, true);
        // A busy machine may need a second try.
        for last in [false, false, true] {
            let mut call = self.call(&tag, &ask);
            let reply = self.send(&ask, false).await;
            let served = matches!(reply.end, End::Completed { .. });
            (call.entry, call.healed) = (reply.entry, served || last);
            (call.ended, call.end) = (clock::epoch_millis(), reply.end);
            self.crowd.note(call);
            if served {
                return;
            }
            self.socket = None;
            sleep(Duration::from_secs(3)).await;
        }
    }

    /// Until it succeeds; yields whether it did.
    async fn turn(&mut self, tag: &str, item: Value, random: &mut StdRng) -> bool {
        for tries in 0..TRIES {
            if self.crowd.is_over() {
                return false;
            }
            if self
                .socket
                .as_mut()
                .is_some_and(|(socket, _)| socket.is_closed())
            {
                self.socket = None;
            }
            let ask = self.ask(tag, item.clone(), random.random_bool(0.7));
            let leaves = tries == 0 && random.random_bool(0.02);
            let mut call = self.call(tag, &ask);
            let reply = self.send(&ask, leaves).await;
            (call.ended, call.end) = (clock::epoch_millis(), reply.end);
            call.entry = reply.entry;
            self.crowd.note(call.clone());
            if reply.token.is_some() {
                self.token = reply.token;
            }
            match call.end {
                End::Completed { id, .. } => {
                    self.items.push(ask.item);
                    self.items.extend(reply.output);
                    self.last = Some(id);
                    if let Some((_, fresh)) = &mut self.socket {
                        *fresh = true;
                    }
                    return true;
                }
                End::Failed { status, code, .. } => {
                    // What is not known any more is told from the start.
                    if (400..500).contains(&status) && status != 429 || code.contains("not_found") {
                        (self.last, self.token) = (None, None);
                    }
                    if let Some((_, fresh)) = &mut self.socket {
                        *fresh = false;
                    }
                }
                End::Broken(_) | End::Left => self.socket = None,
            }
            let longest = 400 << tries.min(4);
            let wait = Duration::from_millis(random.random_range(100..longest));
            sleep(wait.max(reply.wait.unwrap_or_default().min(Duration::from_secs(4)))).await;
        }
        false
    }

    /// The same with the other key.
    async fn intrude(&mut self, turn: usize) {
        let tag = format!("{}-x{turn}", self.name);
        if matches!(self.style, Style::CodexSocket | Style::ChainSocket) {
            return;
        }
        let mut ask = self.ask(&tag, message(&tag), true);
        if ask.continues.is_none() && ask.token().is_none() {
            return;
        }
        ask.key = (self.key + 1) % self.crowd.keys.len();
        let mut call = self.call(&tag, &ask);
        (call.key, call.intrudes) = (ask.key, true);
        let reply = self.send(&ask, false).await;
        (call.ended, call.end) = (clock::epoch_millis(), reply.end);
        call.entry = reply.entry;
        self.crowd.note(call);
    }

    fn call(&self, tag: &str, ask: &Ask) -> Call {
        let mut meant = said(&self.items);
        meant.extend(said(std::slice::from_ref(&ask.item)));
        Call {
            tag: tag.to_owned(),
            key: self.key,
            style: self.style,
            entry: None,
            client_turn: ask.turns.then(|| history::asked(tag).to_owned()),
            continues: ask.continues.clone(),
            meant,
            intrudes: false,
            healed: false,
            began: clock::epoch_millis(),
            ended: 0,
            end: End::Left,
        }
    }

    /// The next request.
    fn ask(&self, tag: &str, item: Value, stream: bool) -> Ask {
        let continues = match self.style {
            Style::Chain | Style::Token | Style::ChainSocket => self.last.clone(),
            Style::Session | Style::Codex => None,
            Style::CodexSocket => {
                let fresh = self.socket.as_ref().is_some_and(|(_, fresh)| *fresh);
                self.last.clone().filter(|_| fresh)
            }
        };
        let mut input = match continues {
            Some(_) => Vec::new(),
            None => self.items.clone(),
        };
        input.push(item.clone());
        let turns = matches!(self.style, Style::Codex | Style::CodexSocket);
        let mut body = json!({ "model": "gpt-5.5", "input": input });
        let mut headers = vec![(
            "user-agent",
            match turns {
                true => format!("codex_exec/0.169.0 (loadtest) tag={tag}"),
                false => format!("loadtest/1 tag={tag}"),
            },
        )];
        if let Some(id) = &continues {
            body["previous_response_id"] = id.as_str().into();
        }
        match self.style {
            Style::Chain | Style::Token | Style::Session => body["stream"] = stream.into(),
            Style::Codex => body["stream"] = true.into(),
            Style::CodexSocket | Style::ChainSocket => body["type"] = "response.create".into(),
        }
        if self.style == Style::Session {
            headers.push(("session-id", self.name.clone()));
        }
        if let (Style::Token | Style::Codex, Some(token)) = (self.style, &self.token) {
            headers.push(("x-codex-turn-state", token.clone()));
        }
        if self.style == Style::CodexSocket {
            let beta = "responses_websockets=2026-02-06";
            headers.push(("openai-beta", beta.to_owned()));
        }
        if turns {
            let metadata = json!({ "session_id": self.name, "thread_id": self.name, "turn_id": history::asked(tag), "request_kind": "turn" }).to_string();
            for name in ["session-id", "thread-id", "x-client-request-id"] {
                headers.push((name, self.name.clone()));
            }
            headers.push(("originator", "codex_exec".to_owned()));
            headers.push(("x-codex-turn-metadata", metadata.clone()));
            body["store"] = false.into();
            body["prompt_cache_key"] = self.name.as_str().into();
            body["include"] = json!(["reasoning.encrypted_content"]);
            body["client_metadata"] = json!({ "session_id": self.name, "thread_id": self.name, "turn_id": history::asked(tag), "x-codex-turn-metadata": metadata });
        }
        Ask {
            path: match turns {
                true => "/backend-api/codex/responses",
                false => "/v1/responses",
            },
            key: self.key,
            headers,
            body,
            item,
            continues,
            turns,
        }
    }

    async fn send(&mut self, ask: &Ask, leaves: bool) -> Reply {
        let sent = async {
            if !matches!(self.style, Style::CodexSocket | Style::ChainSocket) {
                return wire::post(&self.crowd, ask, leaves).await;
            }
            if self.socket.is_none() {
                match Socket::open(&self.crowd, ask).await {
                    Ok(socket) => self.socket = Some((socket, false)),
                    Err(reply) => return *reply,
                }
            }
            match &mut self.socket {
                Some((socket, _)) => socket.turn(ask, leaves).await,
                None => Reply::broken("no socket"),
            }
        };
        timeout(PATIENCE, sent)
            .await
            .unwrap_or_else(|_| Reply::broken("timeout"))
    }
}

/// What a user says.
fn message(tag: &str) -> Value {
    json!({ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": tag }] })
}

/// A request.
struct Ask {
    path: &'static str,
    key: usize,
    headers: Vec<(&'static str, String)>,
    body: Value,
    /// What it adds to the conversation.
    item: Value,
    continues: Option<String>,
    /// Whether it names its turn.
    turns: bool,
}

impl Ask {
    fn token(&self) -> Option<&str> {
        let token = self
            .headers
            .iter()
            .find(|(name, _)| *name == "x-codex-turn-state");
        token.map(|(_, token)| token.as_str())
    }
}

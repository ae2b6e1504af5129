//! Asks the fake over both of its transports.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use loadtest::upstream::{Account, Fault, Kind, Upstream};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Message, client::IntoClientRequest as _},
};

/// How an answer ended.
#[derive(Debug, PartialEq)]
pub(crate) enum End {
    /// Politely.
    Clean,
    /// The connection broke.
    Broken,
    /// By a close frame with this code.
    Closed(u16),
    /// Not at all, within the time given.
    Silent,
}

/// An answer over either transport.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: http::HeaderMap,
    pub(crate) events: Vec<Value>,
    pub(crate) end: End,
}

impl Answer {
    pub(crate) fn types(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter_map(|event| event["type"].as_str())
            .collect()
    }

    pub(crate) fn count(&self, kind: &str) -> usize {
        self.types().iter().filter(|found| **found == kind).count()
    }

    /// What the refusal says, wherever the transport puts it.
    pub(crate) fn error(&self) -> &Value {
        let event = self.events.last().unwrap_or(&Value::Null);
        if event["type"] == "response.failed" {
            &event["response"]["error"]
        } else {
            &event["error"]
        }
    }
}

pub(crate) fn client() -> reqwest::Client {
    loadtest::rig::client().unwrap()
}

/// The smallest body that is accepted.
pub(crate) fn body() -> Value {
    json!({ "model": "gpt-5.5", "input": [user("hello")], "store": false, "stream": true, "include": ["reasoning.encrypted_content"] })
}

pub(crate) fn user(text: &str) -> Value {
    json!({ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": text }] })
}

/// How long anything but a silence may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// How long a silence must last to be believed.
pub(crate) const SILENCE: Duration = Duration::from_millis(300);

pub(crate) async fn post(upstream: &Upstream, account: &Account, body: &Value) -> Answer {
    post_within(PATIENCE, upstream, account, body).await
}

pub(crate) async fn post_within(
    patience: Duration,
    upstream: &Upstream,
    account: &Account,
    body: &Value,
) -> Answer {
    let request = client()
        .post(format!("{}/codex/responses", upstream.url()))
        .bearer_auth(account.access_token())
        .header("chatgpt-account-id", account.id())
        .json(body);
    let mut answer = Answer {
        status: 0,
        headers: http::HeaderMap::new(),
        events: Vec::new(),
        end: End::Silent,
    };
    let mut response = match timeout(patience, request.send()).await {
        Err(_) => return answer,
        Ok(Err(_)) => {
            answer.end = End::Broken;
            return answer;
        }
        Ok(Ok(response)) => response,
    };
    answer.status = response.status().as_u16();
    answer.headers = response.headers().clone();
    let mut text = Vec::new();
    answer.end = loop {
        match timeout(patience, response.chunk()).await {
            Err(_) => break End::Silent,
            Ok(Err(_)) => break End::Broken,
            Ok(Ok(None)) => break End::Clean,
            Ok(Ok(Some(chunk))) => text.extend_from_slice(&chunk),
        }
    };
    let text = String::from_utf8(text).unwrap();
    answer.events = if answer.status == 200 {
        text.lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .map(|data| serde_json::from_str(data).unwrap())
            .collect()
    } else {
        vec![serde_json::from_str(&text).unwrap()]
    };
    answer
}

/// A socket, and how long an answer may take.
pub(crate) struct Socket(
    pub(crate) WebSocketStream<MaybeTlsStream<TcpStream>>,
    pub(crate) Duration,
);

impl Socket {
    pub(crate) async fn open(upstream: &Upstream, account: &Account) -> Self {
        let url = format!("{}/codex/responses", upstream.url()).replace("http://", "ws://");
        let mut request = url.into_client_request().unwrap();
        for (name, value) in [
            (
                "authorization",
                format!("Bearer {}", account.access_token()),
            ),
            ("chatgpt-account-id", account.id()),
            ("openai-beta", "responses_websockets=2026-02-06".to_owned()),
        ] {
            request.headers_mut().insert(name, value.parse().unwrap());
        }
        Self(connect_async(request).await.unwrap().0, PATIENCE)
    }

    /// One turn; a socket that still stands after a terminal event counts as a clean end.
    pub(crate) async fn create(&mut self, body: &Value) -> Answer {
        self.send(body).await;
        self.read().await
    }

    pub(crate) async fn send(&mut self, body: &Value) {
        let mut frame = body.clone();
        frame["type"] = "response.create".into();
        frame.as_object_mut().unwrap().remove("stream");
        self.0.send(Message::text(frame.to_string())).await.unwrap();
    }

    pub(crate) async fn read(&mut self) -> Answer {
        let mut events: Vec<Value> = Vec::new();
        let end = loop {
            match timeout(self.1, self.0.next()).await {
                Err(_) => break End::Silent,
                Ok(None | Some(Err(_))) => break End::Broken,
                Ok(Some(Ok(Message::Close(frame)))) => {
                    break frame.map_or(End::Broken, |frame| End::Closed(frame.code.into()));
                }
                Ok(Some(Ok(Message::Text(text)))) => {
                    events.push(serde_json::from_str(&text).unwrap());
                    if ["response.completed", "response.failed", "error"]
                        .iter()
                        .any(|end| events.last().unwrap()["type"] == *end)
                    {
                        break End::Clean;
                    }
                }
                Ok(Some(Ok(_))) => {}
            }
        };
        let refused = events.last().filter(|event| event["type"] == "error");
        let status = refused.map_or(200, |event| {
            u16::try_from(event["status"].as_u64().unwrap()).unwrap()
        });
        Answer {
            status,
            headers: http::HeaderMap::new(),
            events,
            end,
        }
    }
}

/// The same turn over both transports.
pub(crate) async fn both(
    upstream: &Upstream,
    account: &Account,
    fault: &Kind,
    body: &Value,
) -> [Answer; 2] {
    let patience = if matches!(fault, Kind::Silence(_)) {
        SILENCE
    } else {
        PATIENCE
    };
    upstream.fault(Fault::once(fault.clone()));
    let http = post_within(patience, upstream, account, body).await;
    upstream.fault(Fault::once(fault.clone()));
    let mut socket = Socket::open(upstream, account).await;
    socket.1 = patience;
    [http, socket.create(body).await]
}

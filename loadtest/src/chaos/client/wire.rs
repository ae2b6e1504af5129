//! One call over HTTP or a WebSocket, to the end of its answer.

use std::time::Duration;

use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Error, Message, client::IntoClientRequest as _},
};

use super::{Ask, Crowd, answer};
use crate::chaos::history::End;

/// What came back.
pub(super) struct Reply {
    /// Which replica took the connection.
    pub(super) entry: Option<usize>,
    pub(super) end: End,
    /// Of a completed response.
    pub(super) output: Vec<Value>,
    /// The turn state.
    pub(super) token: Option<String>,
    /// `Retry-After`.
    pub(super) wait: Option<Duration>,
}

impl Reply {
    fn of((end, output): (End, Vec<Value>)) -> Self {
        Self {
            entry: None,
            end,
            output,
            token: None,
            wait: None,
        }
    }

    pub(super) fn broken(how: impl ToString) -> Self {
        Self::of((End::Broken(how.to_string()), Vec::new()))
    }

    fn at(self, entry: usize) -> Self {
        let entry = Some(entry);
        Self { entry, ..self }
    }

    fn with(mut self, headers: &HeaderMap) -> Self {
        let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        self.token = text("x-codex-turn-state").map(str::to_owned);
        self.wait = text("retry-after")
            .and_then(|seconds| seconds.parse().ok())
            .map(Duration::from_secs);
        self
    }
}

fn headers(crowd: &Crowd, ask: &Ask) -> HeaderMap {
    let bearer = ("authorization", format!("Bearer {}", crowd.keys[ask.key]));
    let all = ask.headers.iter().cloned().chain([bearer]);
    all.filter_map(|(name, value)| {
        let value = HeaderValue::from_str(&value).ok()?;
        Some((HeaderName::from_static(name), value))
    })
    .collect()
}

/// A POST on a connection of its own. Who leaves does so when the answer has begun.
pub(super) async fn post(crowd: &Crowd, ask: &Ask, leaves: bool) -> Reply {
    let mut refused = Reply::broken("no replica");
    for (entry, address) in crowd.fronts() {
        let request = crowd
            .http
            .post(format!("http://{address}{}", ask.path))
            .headers(headers(crowd, ask))
            .header("connection", "close")
            .json(&ask.body);
        match request.send().await {
            Ok(response) => return read(response, leaves).await.at(entry),
            Err(error) if error.is_connect() => refused = Reply::broken(format!("{error:?}")),
            Err(error) => return Reply::broken(format!("{error:?}")).at(entry),
        }
    }
    refused
}

async fn read(mut response: reqwest::Response, leaves: bool) -> Reply {
    let (status, headers) = (response.status(), response.headers().clone());
    let mut body = Vec::new();
    let end = loop {
        match response.chunk().await {
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Ok(None) => break None,
            Err(error) => break Some(format!("{error:?}")),
        }
        if leaves {
            return Reply::of((End::Left, Vec::new())).with(&headers);
        }
    };
    let streamed = headers
        .get("content-type")
        .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
    let reply = match end {
        _ if streamed => {
            let text = String::from_utf8_lossy(&body);
            let events = text.lines().filter_map(|line| line.strip_prefix("data: "));
            let mut ends = events
                .filter_map(|data| serde_json::from_str(data).ok())
                .filter_map(|event| answer::terminal(&event));
            match ends.next_back() {
                Some(terminal) => Reply::of(terminal),
                None => Reply::broken(end.unwrap_or_else(|| "an early end".into())),
            }
        }
        Some(error) => Reply::broken(error),
        None if status.is_success() => match serde_json::from_slice(&body) {
            Ok(response) => Reply::of(answer::completed(&response)),
            Err(error) => Reply::broken(error),
        },
        None => Reply::of((answer::refused(status.as_u16(), &body), Vec::new())),
    };
    reply.with(&headers)
}

/// An open socket.
pub(super) struct Socket {
    socket: Box<WebSocketStream<TcpStream>>,
    entry: usize,
}

impl Socket {
    pub(super) async fn open(crowd: &Crowd, ask: &Ask) -> Result<Self, Box<Reply>> {
        let broken = |error: String| Box::new(Reply::broken(error));
        let mut connected = None;
        for (entry, address) in crowd.fronts() {
            if let Ok(tcp) = TcpStream::connect(address).await {
                connected = Some((entry, address, tcp));
                break;
            }
        }
        let (entry, address, tcp) = connected.ok_or_else(|| broken("no replica".into()))?;
        let mut request = format!("ws://{address}{}", ask.path)
            .into_client_request()
            .map_err(|error| broken(error.to_string()))?;
        request.headers_mut().extend(headers(crowd, ask));
        match tokio_tungstenite::client_async(request, tcp).await {
            Ok((socket, _)) => Ok(Self {
                socket: Box::new(socket),
                entry,
            }),
            Err(Error::Http(refusal)) => {
                let body = refusal.body().as_deref().unwrap_or_default();
                let end = answer::refused(refusal.status().as_u16(), body);
                let reply = Reply::of((end, Vec::new())).with(refusal.headers());
                Err(Box::new(reply.at(entry)))
            }
            Err(error) => Err(Box::new(Reply::broken(error).at(entry))),
        }
    }

    /// Whether the other side has closed it by now, as a client's reading task finds out at once.
    pub(super) fn is_closed(&mut self) -> bool {
        loop {
            match self.socket.next().now_or_never() {
                None => return false,
                Some(None | Some(Err(_) | Ok(Message::Close(_)))) => return true,
                Some(Some(Ok(_))) => {}
            }
        }
    }

    /// A frame and its answer.
    pub(super) async fn turn(&mut self, ask: &Ask, leaves: bool) -> Reply {
        self.exchange(ask, leaves).await.at(self.entry)
    }

    async fn exchange(&mut self, ask: &Ask, leaves: bool) -> Reply {
        if let Err(error) = self.socket.send(Message::text(ask.body.to_string())).await {
            return Reply::broken(error);
        }
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    let event: Value = serde_json::from_str(&text).unwrap_or_default();
                    if let Some(terminal) = answer::terminal(&event) {
                        return Reply::of(terminal);
                    }
                    if leaves {
                        return Reply::of((End::Left, Vec::new()));
                    }
                }
                Some(Ok(Message::Close(frame))) => {
                    let code = frame.map_or(1005, |frame| u16::from(frame.code));
                    return Reply::broken(format!("closed {code}"));
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Reply::broken(error),
                None => return Reply::broken("an early end"),
            }
        }
    }
}

//! A client that speaks the Responses API over a WebSocket as the Codex CLI does.

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{self, Message, client::IntoClientRequest as _, protocol::CloseFrame},
};

use super::house::{House, codex_body};

/// An open socket.
pub(crate) struct CodexSocket(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl CodexSocket {
    /// Opens a socket with the house's key.
    pub(crate) async fn open(house: &House, path: &str) -> Self {
        Self::try_open(house, path, house.key()).await.unwrap()
    }

    /// Tries to, with some key.
    pub(crate) async fn try_open(
        house: &House,
        path: &str,
        key: &str,
    ) -> Result<Self, tungstenite::Error> {
        Self::connect(&house.server.address.to_string(), path, key).await
    }

    /// The same at any address.
    pub(crate) async fn connect(
        address: &str,
        path: &str,
        key: &str,
    ) -> Result<Self, tungstenite::Error> {
        let mut request = format!("ws://{address}{path}")
            .into_client_request()
            .unwrap();
        let headers = request.headers_mut();
        headers.insert("authorization", format!("Bearer {key}").parse().unwrap());
        headers.insert(
            "openai-beta",
            "responses_websockets=2026-02-06".parse().unwrap(),
        );
        headers.insert("user-agent", "codex_exec/0.169.0".parse().unwrap());
        headers.insert("session-id", "session-1".parse().unwrap());
        headers.insert("thread-id", "thread-1".parse().unwrap());
        connect_async(request).await.map(|(socket, _)| Self(socket))
    }

    /// Sends a frame.
    pub(crate) async fn send(&mut self, frame: &Value) {
        self.try_send(frame).await.unwrap();
    }

    /// Sends a frame to a service that may be gone.
    pub(crate) async fn try_send(&mut self, frame: &Value) -> Result<(), tungstenite::Error> {
        self.0.send(Message::text(frame.to_string())).await
    }

    /// Sends any message.
    pub(crate) async fn send_raw(&mut self, message: Message) {
        self.0.send(message).await.unwrap();
    }

    /// The next frame; `None` when the socket was closed.
    pub(crate) async fn next(&mut self) -> Option<Value> {
        loop {
            let message = timeout(std::time::Duration::from_secs(20), self.0.next())
                .await
                .expect("a frame within 20 s");
            match message? {
                Ok(Message::Text(text)) => return Some(serde_json::from_str(&text).unwrap()),
                Ok(Message::Close(_)) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// The close frame that ends the socket.
    pub(crate) async fn closed(&mut self) -> Option<CloseFrame> {
        while let Some(message) = self.0.next().await {
            match message {
                Ok(Message::Close(frame)) => return frame,
                Ok(_) => {}
                Err(_) => return None,
            }
        }
        None
    }

    /// Frames up to a terminal event or an error, which is the last.
    pub(crate) async fn response(&mut self) -> Vec<Value> {
        let mut frames = Vec::new();
        while let Some(frame) = self.next().await {
            let last = matches!(
                frame["type"].as_str(),
                Some("response.completed" | "response.failed" | "response.incomplete" | "error")
            );
            frames.push(frame);
            if last {
                break;
            }
        }
        frames
    }

    /// One turn: a frame and its response.
    pub(crate) async fn turn(&mut self, frame: Value) -> Vec<Value> {
        self.send(&frame).await;
        self.response().await
    }
}

/// A `response.create` with the whole conversation, or what is new since `previous`.
pub(crate) fn create(turn: &str, text: &str, previous: Option<&str>) -> Value {
    let mut frame = codex_body(text);
    frame["type"] = "response.create".into();
    frame.as_object_mut().unwrap().remove("stream");
    frame["client_metadata"] = json!({
        "session_id": "session-1", "thread_id": "thread-1", "turn_id": turn,
        "x-codex-turn-metadata": json!({ "turn_id": turn, "thread_id": "thread-1", "request_kind": "turn" }).to_string(),
    });
    if let Some(previous) = previous {
        frame["previous_response_id"] = previous.into();
        frame["input"] = json!([{ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": text }] }]);
    }
    frame
}

/// The id of a completed response.
pub(crate) fn id_of(frames: &[Value]) -> String {
    frames.last().unwrap()["response"]["id"]
        .as_str()
        .unwrap()
        .to_owned()
}

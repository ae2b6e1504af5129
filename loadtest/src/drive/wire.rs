//! One connection, and a turn on it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderValue, Request, Uri, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::sleep};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, client::IntoClientRequest as _},
};
use uuid::Uuid;

use super::{
    Plan, Transport,
    event::{self, Event, Lines},
    tally::Seen,
};
use crate::clock;

/// Where turns go and as whom.
pub(super) struct Target {
    authority: String,
    path: String,
    headers: Vec<(&'static str, String)>,
}

impl Target {
    pub(super) fn of(plan: &Plan) -> anyhow::Result<Self> {
        let uri: Uri = plan.url.parse().context("the URL")?;
        let authority = uri.authority().context("the URL names no host")?;
        let port = authority.port_u16().unwrap_or(80);
        let mut headers = vec![
            ("authorization", format!("Bearer {}", plan.key)),
            ("user-agent", "codex_exec/0.169.0 (loadtest)".to_owned()),
        ];
        headers.extend(plan.account_id.clone().map(|id| ("chatgpt-account-id", id)));
        let path = format!("{}/responses", uri.path().trim_end_matches('/'));
        Ok(Self {
            authority: format!("{}:{port}", authority.host()),
            path,
            headers,
        })
    }

    fn decorate(
        &self,
        headers: &mut http::HeaderMap,
        session: Uuid,
        metadata: &str,
    ) -> anyhow::Result<()> {
        for (name, value) in &self.headers {
            headers.insert(*name, HeaderValue::from_str(value)?);
        }
        for name in ["session-id", "thread-id", "x-client-request-id"] {
            headers.insert(name, HeaderValue::from_str(&session.to_string())?);
        }
        headers.insert("originator", HeaderValue::from_static("codex_exec"));
        headers.insert("x-codex-turn-metadata", HeaderValue::from_str(metadata)?);
        Ok(())
    }
}

/// An open connection.
pub(super) enum Wire {
    Http(SendRequest<Full<Bytes>>),
    Socket(Box<WebSocketStream<TcpStream>>),
}

impl Wire {
    pub(super) async fn open(
        target: &Target,
        transport: Transport,
        session: Uuid,
        metadata: &str,
    ) -> anyhow::Result<Self> {
        let tcp = TcpStream::connect(&target.authority)
            .await
            .context("connect")?;
        tcp.set_nodelay(true)?;
        match transport {
            Transport::Sse => {
                let (sender, connection) = http1::handshake(TokioIo::new(tcp)).await?;
                // Ends with the sender, or with the peer.
                tokio::spawn(connection);
                Ok(Self::Http(sender))
            }
            Transport::Ws => {
                let mut request =
                    format!("ws://{}{}", target.authority, target.path).into_client_request()?;
                target.decorate(request.headers_mut(), session, metadata)?;
                request.headers_mut().insert(
                    "openai-beta",
                    HeaderValue::from_static("responses_websockets=2026-02-06"),
                );
                let (socket, _) = tokio_tungstenite::client_async(request, tcp)
                    .await
                    .context("handshake")?;
                Ok(Self::Socket(Box::new(socket)))
            }
        }
    }

    /// Sends a request and reads its answer to the end; yields the response's id.
    pub(super) async fn turn(
        &mut self,
        target: &Target,
        session: Uuid,
        metadata: &str,
        body: String,
        pause: Duration,
        saw: impl Fn(Seen),
    ) -> anyhow::Result<Option<String>> {
        let mut turn = Turn {
            saw,
            sent: Instant::now(),
            first: true,
            end: None,
        };
        match self {
            Self::Http(sender) => {
                let mut request = Request::post(&target.path).body(Full::from(body))?;
                let headers = request.headers_mut();
                target.decorate(headers, session, metadata)?;
                headers.insert(header::HOST, HeaderValue::from_str(&target.authority)?);
                headers.insert(
                    header::ACCEPT,
                    HeaderValue::from_static("text/event-stream"),
                );
                headers.insert(
                    header::CONTENT_TYPE,
                    HeaderValue::from_static("application/json"),
                );
                sender.ready().await.context("connection")?;
                let mut response = sender.send_request(request).await.context("request")?;
                let status = response.status();
                if !status.is_success() {
                    bail!("status {}", status.as_u16());
                }
                let mut lines = Lines::default();
                while let Some(frame) = response.frame().await {
                    if let Ok(data) = frame.context("body")?.into_data() {
                        lines.take(&data, |json| turn.event(json));
                    }
                    if !pause.is_zero() {
                        sleep(pause).await;
                    }
                }
            }
            Self::Socket(socket) => {
                socket.send(Message::text(body)).await.context("frame")?;
                while turn.end.is_none() {
                    match socket.next().await.context("closed")?.context("socket")? {
                        Message::Text(text) => turn.event(text.as_bytes()),
                        Message::Close(frame) => bail!(
                            "closed {}",
                            frame.map_or(1005, |frame| u16::from(frame.code))
                        ),
                        _ => {}
                    }
                }
            }
        }
        match turn.end {
            Some(Ok(id)) => Ok(Some(id)),
            Some(Err(code)) => bail!("failed {code}"),
            None => bail!("cut"),
        }
    }
}

/// The answer to one request, as it comes in.
struct Turn<F> {
    saw: F,
    sent: Instant,
    first: bool,
    end: Option<Result<String, String>>,
}

impl<F: Fn(Seen)> Turn<F> {
    fn event(&mut self, json: &[u8]) {
        match event::read(json) {
            Event::Delta(sent_us) => {
                if std::mem::take(&mut self.first) {
                    (self.saw)(Seen::First(self.sent.elapsed()));
                }
                (self.saw)(Seen::Delta(
                    sent_us.map(|sent| clock::micros().saturating_sub(sent)),
                ));
            }
            Event::Completed(id) => {
                (self.saw)(Seen::Completed);
                self.end = Some(Ok(id));
            }
            Event::Failed(code) => self.end = Some(Err(code)),
            Event::Other => {}
        }
    }
}

//! One upstream WebSocket.

use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, StreamExt as _};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message, Utf8Bytes,
        handshake::{client::generate_key, derive_accept_key},
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use super::{Unsent, Upstream, authorize, credential::Credential, deadline};
use crate::{
    db::Clock,
    ids::AccountId,
    protocol::{
        failure::{Class, Deadline, Failure},
        headers,
    },
    quota::Source,
};

/// For the closing handshake.
const CLOSE_TIME: Duration = Duration::from_secs(2);
/// One message or frame from upstream.
const MESSAGE_BYTES: usize = 64 << 20;

/// Read at once. As much is cleared before each read, and up to twice as much is held by an idle socket.
const READ: usize = 4 << 10;

/// A larger frame is written past the library's buffer, which would stay as large for as long as the socket is open.
const LARGE: usize = 16 << 10;
/// ... this much at a time, a multiple of four, behind the frame's head.
const PIECE: usize = 64 << 10;
const HEAD: usize = 14;

/// An open upstream WebSocket. It speaks text frames only.
pub struct Socket {
    stream: WebSocketStream<reqwest::Upgraded>,
    headers: HeaderMap,
    opened: Instant,
    clock: Clock,
}

impl Upstream {
    /// Opens a socket for an account. `headers` are the client's, filtered; `began` is when the attempt began that needs it.
    ///
    /// # Errors
    /// Classified: upstream's refusal of the handshake, or what the network did.
    pub async fn connect(
        &self,
        account: AccountId,
        credential: &Credential,
        mut headers: HeaderMap,
        began: Instant,
    ) -> Result<Socket, Failure> {
        let key = generate_key();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(
            header::SEC_WEBSOCKET_VERSION,
            HeaderValue::from_static("13"),
        );
        headers.insert(
            header::SEC_WEBSOCKET_KEY,
            HeaderValue::from_str(&key).expect("base64 is ASCII"),
        );
        authorize(&mut headers, credential);
        let request = self
            .client
            .get(format!("{}/codex/responses", self.base))
            .headers(headers);
        // That a socket opens proves no turn served.
        let answered = self.head(account, request, began, Source::Poll);
        let response = answered.await.map_err(Unsent::failure)?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(self.refused(response).await);
        }
        let headers = headers::detached(response.headers());
        if headers
            .get(header::SEC_WEBSOCKET_ACCEPT)
            .is_none_or(|accept| accept != derive_accept_key(key.as_bytes()).as_str())
        {
            return Err(Failure::local(
                Class::Network,
                "Upstream answered the handshake wrongly",
                self.now(),
            ));
        }
        let upgraded = response
            .upgrade()
            .await
            .map_err(|_| Failure::truncated(self.now()))?;
        let stream = WebSocketStream::from_raw_socket(upgraded, Role::Client, Some(config())).await;
        Ok(Socket {
            stream,
            headers,
            opened: Instant::now(),
            clock: self.clock.clone(),
        })
    }
}

/// Writes one masked text frame, piece by piece. If it is given up half-way, so must the connection be.
async fn write_text(
    stream: &mut (impl AsyncWrite + Unpin),
    text: &[u8],
    mask: [u8; 4],
) -> std::io::Result<()> {
    let mut piece = Vec::with_capacity(HEAD + text.len().min(PIECE));
    // The whole message in one frame; a client's are masked; the length follows in eight bytes.
    piece.extend([0x80 | 0x01, 0x80 | 127]);
    piece.extend((text.len() as u64).to_be_bytes());
    piece.extend(mask);
    for plain in text.chunks(PIECE) {
        let start = piece.len();
        piece.extend_from_slice(plain);
        // In groups of the mask's length, which the compiler turns into wide ones; a piece is a multiple of it.
        let (groups, rest) = piece[start..].as_chunks_mut();
        for group in groups {
            *group = (u32::from_ne_bytes(*group) ^ u32::from_ne_bytes(mask)).to_ne_bytes();
        }
        for (byte, mask) in rest.iter_mut().zip(mask) {
            *byte ^= mask;
        }
        stream.write_all(&piece).await?;
        piece.clear();
    }
    stream.flush().await
}

fn config() -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ)
        .max_message_size(Some(MESSAGE_BYTES))
        .max_frame_size(Some(MESSAGE_BYTES))
}

impl Socket {
    /// The head of the handshake's answer.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// How long it has been open.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.opened.elapsed()
    }

    /// Sends a text frame.
    ///
    /// # Errors
    /// If the connection is lost; the frame may or may not have arrived.
    pub async fn send(&mut self, text: Utf8Bytes) -> Result<(), Failure> {
        let sending = async {
            if text.len() < LARGE {
                return self.stream.send(Message::Text(text)).await;
            }
            self.stream.flush().await?;
            Ok(write_text(self.stream.get_mut(), text.as_bytes(), rand::random()).await?)
        };
        // A peer that reads nothing must not hold a turn for ever.
        match timeout(deadline::HEADERS, sending).await {
            Ok(sent) => sent.map_err(|error| self.broken(&error)),
            Err(_) => Err(Failure::timeout(
                Deadline::Headers,
                self.clock.now().as_second(),
            )),
        }
    }

    /// The next text frame; `None` when upstream closed the socket. Pings are answered here, so an idle socket must be polled too.
    /// Cancel-safe.
    ///
    /// # Errors
    /// If the connection breaks, or a message is too large.
    pub async fn next(&mut self) -> Result<Option<Utf8Bytes>, Failure> {
        loop {
            match self.stream.next().await {
                Some(Ok(Message::Text(text))) => return Ok(Some(text)),
                Some(Ok(Message::Close(Some(frame)))) if frame.code == CloseCode::Size => {
                    return Err(Failure::from_close(
                        Some(frame.code.into()),
                        self.clock.now().as_second(),
                    ));
                }
                Some(Ok(Message::Close(_))) | None => return Ok(None),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(self.broken(&error)),
            }
        }
    }

    /// Says goodbye and waits shortly for the answer.
    pub async fn close(mut self) {
        let frame = CloseFrame {
            code: CloseCode::Normal,
            reason: Utf8Bytes::default(),
        };
        let goodbye = async {
            self.stream.close(Some(frame)).await?;
            while self.stream.next().await.transpose()?.is_some() {}
            Ok::<_, tungstenite::Error>(())
        };
        drop(timeout(CLOSE_TIME, goodbye).await);
    }

    fn broken(&self, error: &tungstenite::Error) -> Failure {
        let now = self.clock.now().as_second();
        match error {
            tungstenite::Error::Capacity(_) => Failure::local(
                Class::TooLarge,
                format!("Upstream sent a message over {} MiB", MESSAGE_BYTES >> 20),
                now,
            ),
            _ => Failure::truncated(now),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_large_frame_arrives_as_one_message_between_others() {
        let (mut near, far) = tokio::io::duplex(1000);
        let large = "é{}".repeat(PIECE / 2);
        let sent = large.clone();
        let writing = tokio::task::unconstrained(async move {
            write_text(&mut near, sent.as_bytes(), [1, 2, 3, 4]).await?;
            write_text(&mut near, b"{}", [0; 4]).await?;
            std::io::Result::Ok(near)
        });
        let reading = async {
            let mut server = WebSocketStream::from_raw_socket(far, Role::Server, None).await;
            let mut texts = Vec::new();
            for _ in 0..2 {
                let message = server.next().await.unwrap().unwrap();
                texts.push(message.into_text().unwrap().to_string());
            }
            texts
        };
        let (written, texts) = tokio::join!(writing, reading);
        written.unwrap();
        assert_eq!(texts, [large, "{}".to_owned()]);
    }
}

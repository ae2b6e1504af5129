//! One hop between two replicas, on real sockets: what is answered, what is silence, what is a cut, who learns that somebody left.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::serve::ListenerExt as _;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use drawbridge::{
    db::Clock,
    forward::{self, Call, Client, Cut, Envelope, Failure, Frame, Keys, Owner, Patience, Refusal},
    ids::{BootId, LeaseId, ScopeId, TurnId},
    secret::KeyRing,
};
use futures_util::Stream;
use http::{HeaderMap, HeaderValue};
use secrecy::SecretString;
use serde_json::value::RawValue;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpSocket, TcpStream},
    sync::{mpsc, oneshot, watch},
    time::timeout,
};

/// A tenth of what replicas have.
const PATIENCE: Patience = Patience {
    silence: Duration::from_millis(100),
    total: Duration::from_secs(1),
};
/// Within this everything here has happened, on a busy machine too.
const SOON: Duration = Duration::from_secs(10);
/// The smallest body for which there is no room.
const FULL: usize = 60 << 20;

#[tokio::test]
async fn a_call_arrives_whole_and_its_answer_too() {
    let mut peer = Peer::start().await;
    let body = Bytes::from(vec![b'x'; 3 << 20]);
    let envelope = peer.envelope();
    let client = patient();
    let sending = client.send(&peer.url, &envelope, body.clone());
    let serving = async {
        let (call, answer) = called(&mut peer.calls).await;
        assert_eq!(call.body, body);
        assert_eq!(call.envelope.turn, envelope.turn);
        assert_eq!(call.envelope.details.get(), envelope.details.get());
        answer.accept()
    };
    let (answer, frames) = tokio::join!(sending, serving);
    let mut answer = answer.unwrap();

    let mut headers = HeaderMap::new();
    headers.append("x-request-id", HeaderValue::from_static("r"));
    let sent = [
        Frame::Token("token".into()),
        Frame::Head(headers),
        Frame::Json(Bytes::from(vec![b'e'; 1 << 20])),
        Frame::Json(Bytes::from_static(b"{}")),
        Frame::End(Bytes::from_static(b"\"completed\"")),
    ];
    for frame in &sent {
        frames.send(frame.clone()).unwrap();
        assert_eq!(answer.next().await.as_ref(), Ok(frame));
    }
    assert_eq!(answer.next().await, Err(Cut), "nothing follows an end");
}

#[tokio::test]
async fn calls_one_after_the_other_share_a_connection() {
    let mut peer = Peer::start().await;
    let client = patient();
    for _ in 0..10 {
        let envelope = peer.envelope();
        let sending = client.send(&peer.url, &envelope, Bytes::from_static(b"{}"));
        let (answer, frames) =
            tokio::join!(sending, async { called(&mut peer.calls).await.1.accept() });
        frames.send(Frame::End(Bytes::new())).unwrap();
        let end = answer.unwrap().next().await;
        assert_eq!(end, Ok(Frame::End(Bytes::new())));
        gone(frames).await;
    }
    // A call may overtake the return of the connection that the one before it used.
    let opened = peer.connections.load(Ordering::SeqCst);
    assert!(opened <= 3, "{opened} connections for 10 calls");
}

#[tokio::test]
async fn every_refusal_is_told() {
    let mut peer = Peer::start().await;
    for refusal in [
        Refusal::NotOwner,
        Refusal::Draining,
        Refusal::Begun,
        Refusal::Full,
        Refusal::Invalid,
    ] {
        let (client, envelope) = (patient(), peer.envelope());
        let sending = client.send(&peer.url, &envelope, Bytes::new());
        let (answer, ()) = tokio::join!(sending, async {
            called(&mut peer.calls).await.1.refuse(refusal)
        });
        assert_eq!(answer.unwrap_err(), Failure::Refused(refusal));
    }
    let (client, envelope, body) = (patient(), peer.envelope(), Bytes::from(vec![0; FULL]));
    let answer = client.send(&peer.url, &envelope, body).await;
    let full = Failure::Refused(Refusal::Full);
    assert_eq!(answer.unwrap_err(), full, "before it is held");
}

#[tokio::test]
async fn a_call_for_another_incarnation_or_under_another_key_never_reaches_the_owner() {
    let mut peer = Peer::start().await;
    let stranger = Client::new(keys(2), Clock::default(), Patience::default());
    let elsewhere = Envelope {
        target: BootId::new(),
        ..peer.envelope()
    };
    for (client, envelope) in [(patient(), elsewhere), (stranger, peer.envelope())] {
        let answer = client.send(&peer.url, &envelope, Bytes::new()).await;
        assert_eq!(answer.unwrap_err(), Failure::Refused(Refusal::Invalid));
    }
    assert!(peer.calls.try_recv().is_err());
}

#[tokio::test]
async fn a_captured_call_is_refused_with_another_body_and_at_another_replica() {
    let (mut peer, mut other) = (Peer::start().await, Peer::start().await);
    let head = captured(&peer).await;
    let with = |body: &str| format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    for (address, body) in [
        (peer.address(), "[]"),
        (peer.address(), ""),
        (peer.address(), "{} "),
        (other.address(), "{}"),
    ] {
        let answer = exchange(address, &with(body)).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{body}: {answer}");
        assert!(answer.ends_with("bridge_forward_invalid"), "{answer}");
    }
    assert!(peer.calls.try_recv().is_err() && other.calls.try_recv().is_err());
    // As it was, it is the ledger's to refuse.
    let (address, again) = (peer.address().to_owned(), with("{}"));
    let (answer, ()) = tokio::join!(exchange(&address, &again), async {
        called(&mut peer.calls).await.1.refuse(Refusal::Begun);
    });
    assert!(answer.starts_with("HTTP/1.1 409 "), "{answer}");
}

#[tokio::test]
async fn only_calls_are_served_at_the_internal_listener() {
    let peer = Peer::start().await;
    for (method, path, status) in [
        ("GET", "/internal/v1/bridge/turn", "404"),
        ("POST", "/responses", "404"),
        ("POST", "/internal/v1/bridge/turn", "400"),
    ] {
        let request = format!("{method} {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        let answer = exchange(peer.address(), &request).await;
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{method} {path}: {answer}"
        );
    }
}

#[tokio::test]
async fn nobody_at_the_address_is_silence_at_once() {
    // Bound, and nobody listens.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let url = format!("http://{}", socket.local_addr().unwrap());
    for endpoint in [url.as_str(), "http://", "not a url"] {
        let answer = client()
            .send(endpoint, &envelope(BootId::new()), Bytes::new())
            .await;
        assert_eq!(answer.unwrap_err(), Failure::Silent, "{endpoint}");
    }
}

#[tokio::test]
async fn a_stopped_process_is_silent_for_small_and_large_bodies() {
    // The kernel completes connections and takes bytes for it, up to some MiB.
    let (_listener, url) = listener().await;
    for size in [2, 16 << 20] {
        let (client, envelope) = (client(), envelope(BootId::new()));
        let began = Instant::now();
        let answer = client
            .send(&url, &envelope, Bytes::from(vec![b' '; size]))
            .await;
        let waited = began.elapsed();
        assert_eq!(answer.unwrap_err(), Failure::Silent);
        assert!(waited >= PATIENCE.silence, "{size} bytes: {waited:?}");
        assert!(waited < SOON, "{size} bytes: {waited:?}");
    }
}

#[tokio::test]
async fn an_owner_that_does_not_begin_is_silent_and_learns_that_the_caller_left() {
    let mut peer = Peer::start().await;
    let (client, envelope) = (client(), peer.envelope());
    let answer = client.send(&peer.url, &envelope, Bytes::new()).await;
    assert_eq!(answer.unwrap_err(), Failure::Silent);
    let (_, mut answer) = called(&mut peer.calls).await;
    timeout(SOON, answer.0.closed())
        .await
        .expect("accept is dropped");
}

#[tokio::test]
async fn what_is_no_replica_is_silence() {
    let (listener, url) = listener().await;
    let router = axum::Router::new().fallback(async || "hello");
    tokio::spawn(async { axum::serve(listener, router).await });
    let answer = patient()
        .send(&url, &envelope(BootId::new()), Bytes::new())
        .await;
    assert_eq!(answer.unwrap_err(), Failure::Silent);
}

#[tokio::test]
async fn a_large_body_has_the_time_that_it_needs_while_it_moves() {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(1).unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let client = Client::new(keys(1), Clock::default(), Patience::default());
    let envelope = envelope(BootId::new());
    let body = Bytes::from(vec![b' '; 32 << 20]);
    let slow = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let began = Instant::now();
        let mut buffer = vec![0; 4 << 20];
        for _ in 0..8 {
            // The pace of a slow network.
            tokio::time::sleep(Duration::from_millis(150)).await;
            stream.read_exact(&mut buffer).await.unwrap();
        }
        assert!(began.elapsed() > Patience::default().silence);
        let answer =
            b"HTTP/1.1 421 Misdirected Request\r\ncontent-length: 16\r\n\r\nbridge_not_owner";
        stream.write_all(answer).await.unwrap();
        stream
    };
    let (answer, _stream) = tokio::join!(client.send(&url, &envelope, body), slow);
    assert_eq!(answer.unwrap_err(), Failure::Refused(Refusal::NotOwner));
}

#[tokio::test]
async fn an_answer_whose_frames_stop_is_a_cut() {
    let mut peer = Peer::start().await;
    let frame = Frame::Json(Bytes::from_static(b"data: {}\n\n"));
    let (client, envelope) = (patient(), peer.envelope());
    let sending = client.send(&peer.url, &envelope, Bytes::new());
    let (answer, frames) =
        tokio::join!(sending, async { called(&mut peer.calls).await.1.accept() });
    let mut answer = answer.unwrap();
    frames.send(frame.clone()).unwrap();
    assert_eq!(answer.next().await.as_ref(), Ok(&frame));
    drop(frames);
    let cut = timeout(SOON, answer.next()).await;
    assert_eq!(cut.unwrap(), Err(Cut));
}

#[tokio::test]
async fn an_answer_of_a_peer_that_died_is_a_cut_wherever_it_stops() {
    let whole = b"\x04\0\0\0\x02{}";
    for (stops_at, frames) in [(0, 0), (3, 0), (6, 0), (7, 1)] {
        let (listener, url) = listener().await;
        let (client, envelope) = (patient(), envelope(BootId::new()));
        let dying = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert_ne!(stream.read(&mut [0; 1 << 10]).await.unwrap(), 0);
            let head = "HTTP/1.1 200 OK\r\ncontent-type: application/x-drawbridge-frames\r\n\
                        transfer-encoding: chunked\r\n\r\n7\r\n";
            let said = [head.as_bytes(), &whole[..stops_at]].concat();
            stream.write_all(&said).await.unwrap();
            stream.shutdown().await.unwrap();
            stream
        };
        let (answer, _stream) = tokio::join!(client.send(&url, &envelope, Bytes::new()), dying);
        let mut answer = answer.unwrap();
        for _ in 0..frames {
            assert!(answer.next().await.is_ok());
        }
        let cut = timeout(SOON, answer.next()).await;
        assert_eq!(cut.unwrap(), Err(Cut), "after {stops_at} bytes");
    }
}

#[tokio::test]
async fn a_caller_that_drops_its_answer_is_gone_for_the_owner() {
    let mut peer = Peer::start().await;
    let (client, envelope) = (patient(), peer.envelope());
    let sending = client.send(&peer.url, &envelope, Bytes::new());
    let (answer, frames) =
        tokio::join!(sending, async { called(&mut peer.calls).await.1.accept() });
    let mut answer = answer.unwrap();
    frames.send(Frame::Json(Bytes::new())).unwrap();
    let given_up = timeout(Duration::from_millis(1), async {
        answer.next().await.unwrap();
        answer.next().await
    });
    assert!(given_up.await.is_err(), "waiting can be given up");
    drop(answer);
    gone(frames).await;
}

/// A replica whose owner is this test.
struct Peer {
    url: String,
    boot: BootId,
    calls: Calls,
    connections: Arc<AtomicUsize>,
}

impl Peer {
    async fn start() -> Self {
        let (owner, calls) = mpsc::unbounded_channel();
        let boot = BootId::new();
        let me = watch::channel(boot).1;
        let router = forward::router(Arc::new(Toy(owner)), keys(1), me, Clock::default());
        let (listener, url) = listener().await;
        let connections = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&connections);
        let listener = listener.tap_io(move |stream| {
            stream.set_nodelay(true).unwrap();
            count.fetch_add(1, Ordering::SeqCst);
        });
        tokio::spawn(async { axum::serve(listener, router).await });
        Self {
            url,
            boot,
            calls,
            connections,
        }
    }

    fn envelope(&self) -> Envelope {
        envelope(self.boot)
    }

    fn address(&self) -> &str {
        &self.url["http://".len()..]
    }
}

type Calls = mpsc::UnboundedReceiver<(Call, Reply)>;

async fn called(calls: &mut Calls) -> (Call, Reply) {
    timeout(SOON, calls.recv()).await.unwrap().unwrap()
}

/// What the owner says to a call; while it is held, nothing.
struct Reply(oneshot::Sender<Result<Frames, Refusal>>);

impl Reply {
    fn accept(self) -> mpsc::UnboundedSender<Frame> {
        let (sender, frames) = mpsc::unbounded_channel();
        assert!(self.0.send(Ok(Frames(frames))).is_ok());
        sender
    }

    fn refuse(self, refusal: Refusal) {
        assert!(self.0.send(Err(refusal)).is_ok());
    }
}

struct Toy(mpsc::UnboundedSender<(Call, Reply)>);

impl Owner for Toy {
    type Frames = Frames;
    type Room = ();

    fn room(&self, bytes: usize) -> Option<()> {
        (bytes < FULL).then_some(())
    }

    async fn accept(&self, call: Call, (): ()) -> Result<Frames, Refusal> {
        let (reply, said) = oneshot::channel();
        self.0.send((call, Reply(reply))).unwrap();
        said.await.unwrap()
    }
}

struct Frames(mpsc::UnboundedReceiver<Frame>);

impl Stream for Frames {
    type Item = Frame;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Frame>> {
        self.0.poll_recv(context)
    }
}

/// Waits until the owner's frames are dropped.
async fn gone(frames: mpsc::UnboundedSender<Frame>) {
    timeout(SOON, frames.closed())
        .await
        .expect("the frames are dropped");
}

async fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}

fn client() -> Client {
    Client::new(keys(1), Clock::default(), PATIENCE)
}

/// For what must not end by silence on a busy machine.
fn patient() -> Client {
    let patience = Patience {
        silence: SOON,
        total: SOON,
    };
    Client::new(keys(1), Clock::default(), patience)
}

fn keys(secret: u8) -> Keys {
    let ring = format!("a:{}", BASE64_STANDARD.encode([secret; 32]));
    Keys::new(&KeyRing::parse(&SecretString::from(ring)).unwrap())
}

fn envelope(target: BootId) -> Envelope {
    Envelope {
        origin: BootId::new(),
        target,
        lease: LeaseId::new(),
        generation: 1,
        scope: ScopeId::ANONYMOUS,
        api_key: None,
        turn: TurnId::new(),
        details: RawValue::from_string(r#"{"route":"codex"}"#.to_owned()).unwrap(),
    }
}

/// The head, but for its length, of a call to `peer` with the body `{}`, as somebody on the wire sees it.
async fn captured(peer: &Peer) -> String {
    let (listener, url) = listener().await;
    let (client, envelope) = (client(), peer.envelope());
    let tapping = async {
        let mut stream = BufReader::new(listener.accept().await.unwrap().0);
        loop {
            let mut line = String::new();
            assert_ne!(stream.read_line(&mut line).await.unwrap(), 0);
            if line.starts_with("x-drawbridge-forward: ") {
                break line;
            }
        }
    };
    let (_, header) = tokio::join!(
        client.send(&url, &envelope, Bytes::from_static(b"{}")),
        tapping
    );
    format!("POST /internal/v1/bridge/turn HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{header}")
}

/// Sends bytes and reads until the peer closes.
async fn exchange(address: &str, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    let read = timeout(SOON, stream.read_to_string(&mut answer)).await;
    read.unwrap().unwrap();
    answer
}

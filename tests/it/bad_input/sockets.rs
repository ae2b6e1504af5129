//! Frames that are none, and clients that do not read.

use std::time::Duration;

use loadtest::upstream::{Fault, Kind, State};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tokio_tungstenite::tungstenite::Message;

use super::{CODEX, PATIENCE};
use crate::support::{
    codex_socket::{CodexSocket, create},
    house::House,
};

#[tokio::test]
async fn bad_frames_leave_nothing_behind() {
    let house = House::start().await;
    house.upstream.fault(Fault::once(Kind::Slow(20)));
    let mut socket = CodexSocket::open(&house, CODEX).await;
    for (message, code) in [
        (Message::text("{"), "invalid_json"),
        (Message::text(r#"{"type":5}"#), "invalid_json"),
        (
            Message::text(r#"{"type":"response.create"}"#),
            "invalid_request_error",
        ),
        (
            Message::text(r#"{"type":"response.create","model":"a","input":"hi","include":["x"]}"#),
            "invalid_request_error",
        ),
        (Message::binary(vec![0; 1 << 20]), "invalid_request_error"),
    ] {
        socket.send_raw(message).await;
        let error = socket.next().await.unwrap();
        assert_eq!(error["type"], "error");
        assert_eq!(error["status"], 400);
        assert_eq!(error["error"]["code"], code, "{error}");
    }
    socket.send(&create("turn-1", "one", None)).await;
    for n in 2..20 {
        socket
            .send(&create(&format!("turn-{n}"), "two", None))
            .await;
    }
    let (mut refusals, mut answer) = (0, Vec::new());
    while refusals < 18 || answer.is_empty() {
        let mut frames = socket.response().await;
        match frames.last().unwrap()["error"]["code"].as_str() {
            Some("response_in_progress") => refusals += 1,
            Some(other) => panic!("{other}"),
            None => answer.append(&mut frames),
        }
    }
    assert_eq!(answer.last().unwrap()["type"], "response.completed");
    assert_eq!(house.turns().await.len(), 1);
    house.unharmed().await;
}

#[tokio::test]
async fn a_frame_that_is_too_large_closes_its_socket_with_the_reason() {
    let house = House::start().await;
    let mut stream = TcpStream::connect(house.server.address).await.unwrap();
    let head = house.head(&format!("GET {CODEX}"));
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";
    stream
        .write_all(format!("{head}{upgrade}").as_bytes())
        .await
        .unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"\r\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    assert!(answer.starts_with(b"HTTP/1.1 101 "));
    // A masked text frame that announces 64 MiB and one byte.
    let mut frame = vec![0x81, 0xff];
    frame.extend(((64_u64 << 20) + 1).to_be_bytes());
    frame.extend([0; 4]);
    stream.write_all(&frame).await.unwrap();
    let mut close = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut close))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(close[0], 0x88, "a close frame: {close:?}");
    assert_eq!(u16::from_be_bytes([close[2], close[3]]), 1009);
    house.unharmed().await;
}

#[tokio::test]
async fn a_client_that_stops_reading_and_leaves_is_cancelled_and_booked() {
    let house = House::start().await;
    house.upstream.fault(Fault::once(Kind::Huge(8 << 20)));
    let mut response = house.codex_turn("t", "turn-1", "hi").await;
    response.chunk().await.unwrap().unwrap();
    drop(response);
    ended(&house, 1).await;

    house.upstream.fault(Fault::once(Kind::Huge(8 << 20)));
    let mut socket = CodexSocket::open(&house, CODEX).await;
    socket.send(&create("turn-2", "hi", None)).await;
    while socket.next().await.unwrap()["type"] != "codex.rate_limits" {}
    drop(socket);
    ended(&house, 2).await;
    house.unharmed().await;
}

/// So many turns have ended, each cancelled, or completed in the two seconds that a turn has when its client has left.
async fn ended(house: &House, count: usize) {
    house.server_idle().await;
    let turns = house.turns().await;
    assert_eq!(turns.len(), count);
    for turn in turns {
        assert_eq!(turn["state"], "settled");
        let cancelled = turn["outcome"] == "cancelled" && turn["estimated"] == true;
        assert!(cancelled || turn["outcome"] == "completed", "{turn}");
    }
}

/// Lets up to four minutes pass for the service, until its turn has ended without anybody reading and upstream has seen the end. After
/// five it would end anyway.
async fn minutes_pass(house: &House, seen: impl Fn(&State) -> bool) {
    let over = async || {
        house.server_idle().await;
        house.upstream.wait("the end", &seen).await;
    };
    for _ in 0..4 {
        if timeout(Duration::from_secs(2), over()).await.is_ok() {
            return;
        }
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(61)).await;
        tokio::time::resume();
    }
    over().await;
}

#[tokio::test]
async fn a_client_that_stops_reading_for_a_minute_loses_its_turn_and_reads_why() {
    let house = House::start().await;
    house.upstream.fault(Fault::once(Kind::Huge(8 << 20)));
    let mut response = house.codex_turn("t", "turn-1", "hi").await;
    response.chunk().await.unwrap().unwrap();
    minutes_pass(&house, |_| true).await;
    let turns = house.turns().await;
    assert_eq!(turns[0]["outcome"], "slow_consumer", "{turns:?}");
    assert_eq!(turns[0]["state"], "settled");
    assert_eq!(turns[0]["estimated"], true);
    let rest = response.bytes().await.unwrap();
    let tail = String::from_utf8_lossy(&rest[rest.len() - 1000..]).into_owned();
    assert!(tail.contains("event: response.failed"), "{tail}");
    assert!(tail.contains(r#""code":"slow_consumer""#), "{tail}");
}

#[tokio::test]
async fn a_client_that_never_reads_loses_its_connection_when_its_turn_is_over() {
    let house = House::start().await;
    house.upstream.fault(Fault::once(Kind::Huge(8 << 20)));
    let mut response = house.codex_turn("t", "turn-1", "hi").await;
    response.chunk().await.unwrap().unwrap();
    minutes_pass(&house, |_| true).await;
    for _ in 0..2 {
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(61)).await;
        tokio::time::resume();
        // Whatever has become due is done before the next minute passes.
        house.turns().await;
    }
    response.bytes().await.unwrap_err();
}

#[tokio::test]
async fn a_socket_that_is_not_read_for_a_minute_is_given_up() {
    let house = House::start().await;
    house.upstream.fault(Fault::once(Kind::Huge(8 << 20)));
    let mut socket = CodexSocket::open(&house, CODEX).await;
    socket.send(&create("turn-1", "hi", None)).await;
    // Before the first of what is huge: whoever reads once is sent as much again unread, into a receive window that has grown.
    while socket.next().await.unwrap()["type"] != "response.created" {}
    minutes_pass(&house, |_| true).await;
    let turns = house.turns().await;
    assert_eq!(turns[0]["state"], "settled");
    while let Some(event) = socket.next().await {
        assert_ne!(event["type"], "response.completed");
    }
}

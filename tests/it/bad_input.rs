//! Bad input: each kind gets one clear answer, reaches no account, leaves nothing behind, and the next turn is served.

mod keys;
mod sockets;

use std::{io::Read as _, time::Duration};

use futures_util::stream;
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    codex_socket::{CodexSocket, create},
    house::{House, codex_body, events, text_of},
};

const CODEX: &str = "/backend-api/codex/responses";
const OPENAI: &str = "/v1/responses";
const COMPACT: &str = "/v1/responses/compact";
const PATIENCE: Duration = Duration::from_secs(10);

/// An error as every client can read it; yields its message.
async fn refused(response: Response, status: u16, code: &str, param: Option<&str>) -> String {
    let what = format!("{} {code}", response.url());
    assert_eq!(response.status(), status, "{what}");
    assert!(response.headers().contains_key("x-request-id"), "{what}");
    assert_eq!(response.headers()["content-type"], "application/json");
    let body: Value = response.json().await.unwrap();
    let error = &body["error"];
    assert_eq!(error["code"], code, "{body}");
    assert_eq!(error["param"].as_str(), param, "{body}");
    assert!(error["type"].is_string(), "{body}");
    let message = error["message"].as_str().unwrap();
    assert!(!message.is_empty());
    message.to_owned()
}

impl House {
    /// A POST of bytes as JSON.
    fn bytes(&self, path: &str, body: impl Into<reqwest::Body>) -> RequestBuilder {
        let request = self.post(path).header("content-type", "application/json");
        request.body(body)
    }

    /// Nothing of what was refused is left: no turn runs or is open, no account is held, and the next turn is served.
    async fn unharmed(&self) {
        self.server_idle().await;
        let before = self.upstream.attempts().len();
        let answer = self.codex_turn("after", "turn-after", "still here").await;
        let answer = answer.text().await.unwrap();
        assert!(answer.contains("event: response.completed\n"), "{answer}");
        assert_eq!(self.upstream.attempts().len(), before + 1);
        let turns = self.turns().await;
        assert!(
            turns.iter().all(|turn| turn["state"] != "open"),
            "{turns:?}"
        );
        let explanation = self.explanation("turn-after").await;
        assert_eq!(explanation["chosen"]["in_flight"], 0, "{explanation}");
    }

    /// Sends bytes as they are, and reads until the service closes.
    async fn raw(&self, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.server.address).await.unwrap();
        // It may be answered, and closed, before all of it is sent.
        drop(stream.write_all(request).await);
        read_all(&mut stream).await
    }

    /// The head of a request up to its last header, which the caller may add to.
    fn head(&self, line: &str) -> String {
        let (address, key) = (self.server.address, self.key());
        format!("{line} HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {key}\r\n")
    }
}

async fn read_all(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    let answer = String::from_utf8(answer).unwrap();
    assert!(read.is_ok(), "the connection stays open after {answer:?}");
    answer
}

fn zstd(mut plain: impl std::io::Read) -> Vec<u8> {
    zstd::encode_all(&mut plain, 1).unwrap()
}

#[tokio::test]
async fn what_is_no_json_object_is_refused_on_every_route() {
    let house = House::start().await;
    let nested = |levels: usize| {
        let (open, close) = ("[".repeat(levels), "]".repeat(levels));
        format!(r#"{{"model":"gpt-5.5","input":{open}{close}}}"#).into_bytes()
    };
    let bodies = [
        b"".to_vec(),
        b"not json".to_vec(),
        br#"{"model":"gpt-5.5","input":"hi""#.to_vec(),
        br#"{"model":"gpt-5.5","input":"hi"} {}"#.to_vec(),
        b"[]".to_vec(),
        b"null".to_vec(),
        b"\"text\"".to_vec(),
        b"{\"model\":\"gpt-5.5\",\"input\":\"\xff\"}".to_vec(),
        nested(200),
        nested(1_000_000),
        "[".repeat(2_000_000).into_bytes(),
    ];
    for path in [CODEX, OPENAI, COMPACT] {
        for body in &bodies {
            let answer = house.bytes(path, body.clone()).send().await.unwrap();
            let message = refused(answer, 400, "invalid_json", None).await;
            assert!(!message.contains("gpt-5.5"), "the body is not quoted");
        }
    }
    assert!(house.turns().await.is_empty());
    assert!(house.upstream.attempts().is_empty());
    house.unharmed().await;
}

#[tokio::test]
async fn a_field_that_upstream_would_not_take_is_named() {
    let house = House::start().await;
    let invalid = "invalid_request_error";
    let cases = [
        (r#"{"input":"hi"}"#, "model"),
        (r#"{"model":"","input":"hi"}"#, "model"),
        (r#"{"model":5,"input":"hi"}"#, "model"),
        (r#"{"model":"a\r\nx-evil: 1","input":"hi"}"#, "model"),
        (r#"{"model":"a","model":"b","input":"hi"}"#, "model"),
        (r#"{"model":"a","input":"hi","input":"ho"}"#, "input"),
        (r#"{"model":"a"}"#, "input"),
        (r#"{"model":"a","input":7}"#, "input"),
        (r#"{"model":"a","input":"hi","stream":"yes"}"#, "stream"),
        (
            r#"{"model":"a","input":"hi","include":["nonsense"]}"#,
            "include",
        ),
        (r#"{"model":"a","input":"hi","include":"all"}"#, "include"),
        (
            r#"{"model":"a","input":"hi","conversation":"conv_1","previous_response_id":"resp_1"}"#,
            "previous_response_id",
        ),
    ];
    for path in [CODEX, OPENAI] {
        for (body, param) in cases {
            let answer = house.bytes(path, body).send().await.unwrap();
            refused(answer, 400, invalid, Some(param)).await;
        }
    }
    assert!(house.turns().await.is_empty());
    assert!(house.upstream.attempts().is_empty());
    house.unharmed().await;
}

#[tokio::test]
async fn strange_text_is_carried_and_does_no_harm() {
    let house = House::start().await;
    let strange = "\0 \u{2028} \u{202e} '; drop table turns; -- \u{10ffff}";
    let metadata = json!({ "turn_id": strange, "thread_id": strange, "session_id": strange });
    let mut body = codex_body(strange);
    body["prompt_cache_key"] = strange.into();
    body["client_metadata"] = json!({ "turn_id": strange, "thread_id": strange, "x-codex-turn-metadata": metadata.to_string() });
    let request = house
        .post(CODEX)
        .header("user-agent", &b"\xfc\xff \xf0\x9f\x98\x80"[..])
        .header("thread-id", &b"\xfc"[..])
        .header("x-codex-turn-metadata", metadata.to_string().into_bytes())
        .json(&body);
    let answer = events(request.send().await.unwrap()).await;
    assert_eq!(text_of(&answer), format!("echo: {strange}.."));
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let mut frame = create("turn-1", strange, None);
    frame["client_metadata"] = json!({ "turn_id": strange, "x-codex-turn-metadata": metadata.to_string(), "x-codex-window-id": "a\r\nx-evil: 1" });
    assert_eq!(
        text_of(&socket.turn(frame).await),
        format!("echo: {strange}..")
    );
    let attempts = house.upstream.attempts();
    assert!(
        attempts
            .iter()
            .all(|attempt| !attempt.headers.contains_key("x-evil"))
    );
    house.unharmed().await;
}

#[tokio::test]
async fn bombs_are_refused_one_after_the_other_and_hold_no_room() {
    let house = House::start().await;
    let bomb = zstd(std::io::repeat(b' ').take(200 << 20));
    assert!(bomb.len() < 1 << 20);
    // Each takes 64 MiB of the 512 MiB that a replica may hold before it is found out.
    for _ in 0..10 {
        let request = house.bytes(OPENAI, bomb.clone());
        let answer = request.header("content-encoding", "zstd").send().await;
        refused(answer.unwrap(), 413, "payload_too_large", None).await;
    }
    house.unharmed().await;
}

#[tokio::test]
async fn an_encoding_that_is_damaged_or_unknown_is_refused() {
    let house = House::start().await;
    let body = json!({ "model": "gpt-5.5", "input": "hi" }).to_string();
    let good = zstd(body.as_bytes());
    for (encoding, sent) in [
        ("zstd", body.clone().into_bytes()),
        ("zstd", good[..good.len() - 3].to_vec()),
        ("gzip", good.clone()),
        ("gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\x03broken".to_vec()),
        ("br", good.clone()),
        ("zstd, zstd", good.clone()),
        ("\u{fc}", good.clone()),
    ] {
        let request = house
            .bytes(OPENAI, sent)
            .header("content-encoding", encoding);
        let answer = request.send().await.unwrap();
        refused(answer, 400, "invalid_encoding", None).await;
    }
    let request = house.bytes(OPENAI, zstd(&b"not json"[..]));
    let answer = request.header("content-encoding", "zstd").send().await;
    refused(answer.unwrap(), 400, "invalid_json", None).await;
    let request = house.bytes(OPENAI, good).header("content-encoding", "zstd");
    assert_eq!(request.send().await.unwrap().status(), 200);
    house.unharmed().await;
}

#[tokio::test]
async fn a_body_of_200_mib_is_refused_whether_its_length_is_announced_or_not() {
    let house = House::start().await;
    let chunks = || {
        let chunk = bytes::Bytes::from(vec![b' '; 1 << 20]);
        reqwest::Body::wrap_stream(stream::iter(
            std::iter::repeat_n(chunk, 200).map(Ok::<_, std::io::Error>),
        ))
    };
    for path in [CODEX, OPENAI, COMPACT] {
        for announced in [true, false] {
            let mut request = house.bytes(path, chunks());
            if announced {
                request = request.header("content-length", 200 << 20);
            }
            let answer = request.send().await.unwrap();
            let message = refused(answer, 413, "payload_too_large", None).await;
            assert!(message.contains("64 MiB"), "{message}");
        }
    }
    house.unharmed().await;
}

#[tokio::test]
async fn an_announced_body_is_refused_before_any_of_it_is_sent() {
    let house = House::start().await;
    let head = house.head(&format!("POST {OPENAI}"));
    let answer = house
        .raw(format!("{head}content-length: 209715200\r\nconnection: close\r\n\r\n").as_bytes())
        .await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(answer.contains(r#""code":"payload_too_large""#), "{answer}");
    house.unharmed().await;
}

#[tokio::test]
async fn a_body_that_breaks_off_leaves_nothing() {
    let house = House::start().await;
    for body in [
        "content-length: 1000\r\n\r\n{",
        "transfer-encoding: chunked\r\n\r\n5\r\n{\"mod",
    ] {
        let mut stream = TcpStream::connect(house.server.address).await.unwrap();
        let head = house.head(&format!("POST {OPENAI}"));
        stream
            .write_all(format!("{head}{body}").as_bytes())
            .await
            .unwrap();
        stream.shutdown().await.unwrap();
        let answer = read_all(&mut stream).await;
        assert!(!answer.contains(" 200 "), "{answer}");
    }
    assert!(house.upstream.attempts().is_empty());
    house.unharmed().await;
}

#[tokio::test]
async fn no_header_can_be_smuggled_in() {
    let house = House::start().await;
    let head = house.head("GET /v1/models");
    // Neither line breaks nor zero bytes nor folded lines are part of a value.
    for injected in [
        "x-request-id: a\rx-evil: 1",
        "x-request-id: a\0b",
        "x-request-id: a\r\n folded",
        "x evil: 1",
        ": 1",
        "content-length: 1\r\ncontent-length: 2",
        "content-length: -1",
        "transfer-encoding: identity",
    ] {
        let request = format!("{head}{injected}\r\nconnection: close\r\n\r\n");
        let answer = house.raw(request.as_bytes()).await;
        assert!(
            answer.starts_with("HTTP/1.1 400 "),
            "{injected:?}: {answer}"
        );
        assert!(!answer.contains("x-evil"), "{answer}");
    }
    for encoded in ["a%0d%0ax-evil:%201", "a\\r\\nx-evil: 1"] {
        let request = house.get("/v1/models").header("x-request-id", encoded);
        let answer = request.send().await.unwrap();
        assert_eq!(answer.headers()["x-request-id"], encoded);
        assert!(!answer.headers().contains_key("x-evil"));
    }
    house.unharmed().await;
}

#[tokio::test]
async fn an_oversized_head_is_refused() {
    let house = House::start().await;
    let head = house.head("GET /v1/models");
    let large = format!("x-large: {}\r\n", "a".repeat(256 << 10));
    let many: String = (0..200).map(|n| format!("x-{n}: 1\r\n")).collect();
    for headers in [large, many] {
        let answer = house.raw(format!("{head}{headers}\r\n").as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    }
    house.unharmed().await;
}

#[tokio::test]
async fn two_lengths_make_no_second_request() {
    let house = House::start().await;
    let body = json!({ "model": "gpt-5.5", "input": "hi" }).to_string();
    let chunk = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
    let second = house.head("GET /v1/models");
    for lengths in [
        format!(
            "content-length: {}\r\ntransfer-encoding: chunked",
            chunk.len() + 10
        ),
        format!("transfer-encoding: chunked\r\ncontent-length: {}", 4),
    ] {
        let head = house.head(&format!("POST {OPENAI}"));
        let request = format!("{head}{lengths}\r\n\r\n{chunk}{second}\r\n");
        let answer = house.raw(request.as_bytes()).await;
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
    }
    house.unharmed().await;
}

#[tokio::test]
async fn paths_and_methods_that_do_not_exist_are_told_apart() {
    let house = House::start().await;
    for path in [
        "/responses",
        "/api/v1/responses",
        "/v1/v1/responses",
        "/backend-api/responses",
        "/v1/chat/completions",
        "/models",
    ] {
        let answer = house.post(path).json(&codex_body("hi")).send().await;
        let message = refused(answer.unwrap(), 404, "not_found", None).await;
        for base in ["/backend-api/codex", "/v1"] {
            assert!(
                message.contains(&format!("http://HOST:PORT{base}")),
                "{message}"
            );
        }
    }
    for path in [
        "/",
        "/v1",
        "/nonsense",
        "/v1/../secret",
        "//v1/responses%2f",
    ] {
        let answer = house.get(path).send().await.unwrap();
        let message = refused(answer, 404, "not_found", None).await;
        assert!(!message.contains("HOST"), "{message}");
    }
    for (method, path) in [
        ("DELETE", CODEX),
        ("PUT", OPENAI),
        ("GET", COMPACT),
        ("POST", "/v1/models"),
        ("POST", "/api/codex/usage"),
        ("BREW", OPENAI),
    ] {
        let method = method.parse().unwrap();
        let answer = house.http.request(method, house.url(path)).send().await;
        let answer = answer.unwrap();
        assert!(answer.headers().contains_key("allow"), "{path}");
        refused(answer, 405, "method_not_allowed", None).await;
    }
    house.unharmed().await;
}

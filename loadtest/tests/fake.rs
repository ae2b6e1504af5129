//! The fake is as strict as the backend it stands for, and each fault does what it says.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use loadtest::upstream::{Account, Config, Fault, Kind, Stage, Upstream};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async,
    tungstenite::{Message, client::IntoClientRequest as _},
};

/// How an answer ended.
#[derive(Debug, PartialEq)]
enum End {
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
struct Answer {
    status: u16,
    headers: http::HeaderMap,
    events: Vec<Value>,
    end: End,
}

impl Answer {
    fn types(&self) -> Vec<&str> {
        self.events
            .iter()
            .filter_map(|event| event["type"].as_str())
            .collect()
    }

    fn count(&self, kind: &str) -> usize {
        self.types().iter().filter(|found| **found == kind).count()
    }

    /// What the refusal says, wherever the transport puts it.
    fn error(&self) -> &Value {
        let event = self.events.last().unwrap_or(&Value::Null);
        if event["type"] == "response.failed" {
            &event["response"]["error"]
        } else {
            &event["error"]
        }
    }
}

fn client() -> reqwest::Client {
    loadtest::rig::client().unwrap()
}

/// The smallest body that is accepted.
fn body() -> Value {
    json!({ "model": "gpt-5.5", "input": [user("hello")], "store": false, "stream": true, "include": ["reasoning.encrypted_content"] })
}

fn user(text: &str) -> Value {
    json!({ "type": "message", "role": "user", "content": [{ "type": "input_text", "text": text }] })
}

/// How long anything but a silence may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long a silence must last to be believed.
const SILENCE: Duration = Duration::from_millis(300);

async fn post(upstream: &Upstream, account: &Account, body: &Value) -> Answer {
    post_within(PATIENCE, upstream, account, body).await
}

async fn post_within(
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

struct Socket(WebSocketStream<MaybeTlsStream<TcpStream>>, Duration);

impl Socket {
    async fn open(upstream: &Upstream, account: &Account) -> Self {
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
    async fn create(&mut self, body: &Value) -> Answer {
        let mut frame = body.clone();
        frame["type"] = "response.create".into();
        frame.as_object_mut().unwrap().remove("stream");
        self.0.send(Message::text(frame.to_string())).await.unwrap();
        self.read().await
    }

    async fn read(&mut self) -> Answer {
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
async fn both(upstream: &Upstream, account: &Account, fault: &Kind, body: &Value) -> [Answer; 2] {
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

#[tokio::test]
async fn what_the_backend_refuses_is_refused_over_both_transports() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let cases: &[(&str, Value)] = &[
        ("max_output_tokens", json!(10)),
        ("metadata", json!({})),
        ("prompt_cache_retention", json!("24h")),
        ("prompt_cache_options", json!({})),
        ("safety_identifier", json!("me")),
        ("temperature", json!(1)),
        ("top_p", json!(1)),
        ("truncation", json!("auto")),
        ("user", json!("me")),
        ("store", json!(true)),
        ("model", Value::Null),
        ("instructions", json!(["a"])),
        ("input", json!("hello")),
        ("input", json!([{ "role": "system", "content": "hello" }])),
        ("input", json!([{ "role": "tool", "content": "hello" }])),
        (
            "input",
            json!([{ "type": "reasoning", "reasoning_content": "hm" }]),
        ),
        ("service_tier", json!("fast")),
        ("service_tier", json!("auto")),
        ("include", json!(["output[*].secrets"])),
        ("tools", json!([{ "type": "web_search_preview" }])),
    ];
    for (name, value) in cases {
        let mut body = body();
        body[name] = value.clone();
        let http = post(&upstream, &account, &body).await;
        let socket = Socket::open(&upstream, &account).await.create(&body).await;
        for answer in [http, socket] {
            assert_eq!(answer.status, 400, "{name}: {value}: {answer:?}");
            assert_eq!(
                answer.error()["type"],
                "invalid_request_error",
                "{name}: {value}"
            );
        }
    }
    // What only one of the transports refuses.
    for (name, value) in [
        ("stream", json!(false)),
        ("previous_response_id", json!("resp_1")),
    ] {
        let mut body = body();
        body[name] = value;
        assert_eq!(
            post(&upstream, &account, &body).await.error()["param"],
            name
        );
    }
    for (name, value, status) in [
        ("stream", json!(false), 400),
        ("background", json!(true), 400),
        ("stream", json!(true), 200),
    ] {
        let mut frame = json!({ "type": "response.create", "model": "gpt-5.5", "input": [user("hi")], "store": false });
        frame[name] = value;
        let mut socket = Socket::open(&upstream, &account).await;
        socket
            .0
            .send(Message::text(frame.to_string()))
            .await
            .unwrap();
        assert_eq!(socket.read().await.status, status, "{frame}");
    }
    assert_eq!(
        post(&upstream, &account, &body())
            .await
            .count("response.completed"),
        1
    );
    assert!(
        upstream
            .attempts()
            .iter()
            .filter(|attempt| attempt.status == 400)
            .all(|attempt| !attempt.completed)
    );
}

#[tokio::test]
async fn credentials_must_be_of_one_account_and_alive() {
    let upstream = Upstream::start(Config::default()).await;
    let (alice, bob) = (upstream.account("alice"), upstream.account("bob"));
    let ask = async |token: String, id: String| {
        let request = client()
            .get(format!("{}/codex/models", upstream.url()))
            .bearer_auth(token)
            .header("chatgpt-account-id", id);
        request.send().await.unwrap().status().as_u16()
    };
    let old = alice.access_token();
    assert_eq!(ask(old.clone(), alice.id()).await, 200);
    assert_eq!(
        ask(old.clone(), bob.id()).await,
        401,
        "another account's id"
    );
    assert_eq!(ask("nonsense".into(), alice.id()).await, 401);
    alice.expire();
    assert_eq!(ask(old.clone(), alice.id()).await, 401);
    drop(alice.exchange_elsewhere());
    assert_eq!(ask(alice.access_token(), alice.id()).await, 200);
    assert_eq!(
        ask(old, alice.id()).await,
        401,
        "the token before the exchange"
    );
}

#[tokio::test]
async fn a_refresh_token_works_once() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let exchange = async |token: &str| {
        let request =
            json!({ "client_id": "app", "grant_type": "refresh_token", "refresh_token": token });
        let answer = client()
            .post(format!("{}/oauth/token", upstream.auth_url()))
            .json(&request)
            .send()
            .await
            .unwrap();
        (
            answer.status().as_u16(),
            answer.json::<Value>().await.unwrap(),
        )
    };
    let auth: Value = serde_json::from_str(&account.auth_json()).unwrap();
    let first = auth["tokens"]["refresh_token"].as_str().unwrap();
    let (status, renewed) = exchange(first).await;
    assert_eq!(
        (status, renewed["access_token"].as_str()),
        (200, Some(account.access_token().as_str()))
    );
    let (status, refused) = exchange(first).await;
    assert_eq!(
        (status, refused["error"]["code"].as_str()),
        (401, Some("refresh_token_reused"))
    );
    let second = renewed["refresh_token"].as_str().unwrap();
    account.fail_exchange(500);
    assert_eq!(exchange(second).await.0, 500);
    assert_eq!(
        exchange(second).await.0,
        200,
        "a failed exchange does not use the token up"
    );
    assert_eq!((account.exchanges(), account.reuses()), (2, 1));
    account.revoke();
    let auth: Value = serde_json::from_str(&account.auth_json()).unwrap();
    let (status, refused) = exchange(auth["tokens"]["refresh_token"].as_str().unwrap()).await;
    assert_eq!(
        (status, refused["error"]["code"].as_str()),
        (400, Some("refresh_token_invalidated"))
    );
}

#[tokio::test]
async fn two_exchanges_at_once_give_new_tokens_to_one() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    account.delay_exchange(Duration::from_millis(50));
    let exchange = async || {
        let body = json!({ "grant_type": "refresh_token", "refresh_token": "rt-alice-0" });
        client()
            .post(format!("{}/oauth/token", upstream.auth_url()))
            .json(&body)
            .send()
            .await
            .unwrap()
            .status()
            .as_u16()
    };
    let (a, b) = tokio::join!(exchange(), exchange());
    let mut statuses = [a, b];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 401]);
}

#[tokio::test]
async fn a_socket_remembers_its_latest_completed_response_and_nothing_else() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let follow = |id: &str, text: &str| {
        let mut body = body();
        body["previous_response_id"] = id.into();
        body["input"] = json!([user(text)]);
        body
    };
    let id = |answer: &Answer| {
        answer.events.last().unwrap()["response"]["id"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let mut socket = Socket::open(&upstream, &account).await;
    let first = id(&socket.create(&body()).await);
    let second = id(&socket.create(&follow(&first, "two")).await);
    assert_eq!(
        upstream.attempts()[1].history.len(),
        3,
        "question, answer, question"
    );
    assert_eq!(
        socket.create(&follow(&first, "again")).await.error()["code"],
        "previous_response_not_found"
    );
    assert_eq!(
        socket.create(&follow(&second, "late")).await.error()["code"],
        "previous_response_not_found",
        "a failed turn makes it forget"
    );
    let mut other = Socket::open(&upstream, &account).await;
    assert_eq!(
        other.create(&follow(&second, "three")).await.error()["code"],
        "previous_response_not_found",
        "no other socket knows it"
    );

    // The other two shapes of the same news.
    upstream.fault(Fault::once(Kind::NotFoundByText));
    assert_eq!(
        other.create(&follow("resp_x", "hi")).await.error()["code"],
        Value::Null
    );
    upstream.fault(Fault::once(Kind::NotFoundAsFailed));
    let answer = other.create(&follow("resp_x", "hi")).await;
    assert_eq!(
        (answer.types(), &answer.error()["code"]),
        (
            vec!["response.failed"],
            &json!("previous_response_not_found")
        )
    );
}

#[tokio::test]
async fn a_prewarm_generates_nothing_and_can_be_gone_on_from() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let mut socket = Socket::open(&upstream, &account).await;
    let mut warm = body();
    warm["generate"] = false.into();
    let answer = socket.create(&warm).await;
    assert_eq!(
        (
            answer.count("response.output_item.added"),
            answer.count("response.completed")
        ),
        (0, 1)
    );
    let mut next = body();
    next["previous_response_id"] = answer.events.last().unwrap()["response"]["id"].clone();
    assert_eq!(socket.create(&next).await.count("response.completed"), 1);
    assert_eq!(
        upstream.attempts()[1].history.len(),
        2,
        "what the prewarm said counts"
    );
}

#[tokio::test]
async fn a_socket_wants_the_beta_header_and_text_and_one_turn_at_a_time() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let url = format!("{}/codex/responses", upstream.url()).replace("http://", "ws://");
    let mut request = url.into_client_request().unwrap();
    request.headers_mut().insert(
        "authorization",
        format!("Bearer {}", account.access_token())
            .parse()
            .unwrap(),
    );
    request
        .headers_mut()
        .insert("chatgpt-account-id", account.id().parse().unwrap());
    let refused = connect_async(request).await.unwrap_err().to_string();
    assert!(refused.contains("426"), "{refused}");

    let mut socket = Socket::open(&upstream, &account).await;
    socket.0.send(Message::binary("{}")).await.unwrap();
    assert_eq!(socket.read().await.end, End::Broken);

    upstream.fault(Fault::once(Kind::Paced(50, 20)));
    let mut socket = Socket::open(&upstream, &account).await;
    let frame = json!({ "type": "response.create", "model": "gpt-5.5", "input": [user("hi")], "store": false }).to_string();
    for _ in 0..2 {
        socket.0.send(Message::text(frame.clone())).await.unwrap();
    }
    let answer = socket.read().await;
    assert_eq!(
        (answer.count("response.completed"), answer.end),
        (0, End::Broken)
    );
    assert_eq!(
        upstream.violations(),
        ["a binary frame", "two responses at once on a socket"]
    );
}

#[tokio::test]
async fn an_old_socket_says_so_and_closes() {
    let upstream = Upstream::start(Config {
        socket_age: Some(Duration::ZERO),
        ..Config::default()
    })
    .await;
    let account = upstream.account("alice");
    let mut socket = Socket::open(&upstream, &account).await;
    assert_eq!(
        socket.create(&body()).await.error()["code"],
        "websocket_connection_limit_reached"
    );
    assert_eq!(socket.read().await.end, End::Broken);
}

#[tokio::test]
async fn refusals_say_what_was_scripted() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let cases = [
        (
            Kind::RateLimit { resets_in: 60 },
            429,
            "type",
            json!("usage_limit_reached"),
        ),
        (
            Kind::RateLimit { resets_in: 60 },
            429,
            "resets_in_seconds",
            json!(60),
        ),
        (
            Kind::RetryAfter {
                seconds: 7,
                used_percent: 40.0,
            },
            429,
            "code",
            json!("rate_limit_exceeded"),
        ),
        (
            Kind::Unauthorized,
            401,
            "code",
            json!("invalid_authentication"),
        ),
        (
            Kind::Status(502, "bad_gateway".into()),
            502,
            "code",
            json!("bad_gateway"),
        ),
        (Kind::Overloaded, 503, "code", json!("server_is_overloaded")),
        (Kind::ModelUnsupported, 400, "code", Value::Null),
        (
            Kind::Failed("rate_limit_exceeded".into()),
            200,
            "code",
            json!("rate_limit_exceeded"),
        ),
    ];
    for (fault, status, field, value) in cases {
        for answer in both(&upstream, &account, &fault, &body()).await {
            assert_eq!(
                (answer.status, &answer.error()[field]),
                (status, &value),
                "{fault:?}: {answer:?}"
            );
            assert_eq!(answer.count("response.completed"), 0, "{fault:?}");
        }
    }
    let [http, socket] = both(
        &upstream,
        &account,
        &Kind::RetryAfter {
            seconds: 7,
            used_percent: 40.0,
        },
        &body(),
    )
    .await;
    let frame = socket.events.last().unwrap();
    for (name, value) in [("retry-after", "7"), ("x-codex-primary-used-percent", "40")] {
        assert_eq!(http.headers[name], value);
        assert_eq!(frame["headers"][name], value);
    }
}

#[tokio::test]
async fn a_response_breaks_off_where_it_was_scripted_to() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    // What has been seen by then: created, text, a finished item.
    let stages = [
        (Stage::BeforeHeaders, [0, 0, 0]),
        (Stage::BeforeCreated, [0, 0, 0]),
        (Stage::AfterCreated, [1, 0, 0]),
        (Stage::Visible, [1, 1, 0]),
        (Stage::ItemDone, [1, 4, 1]),
        (Stage::BeforeTerminal, [1, 4, 1]),
    ];
    for (stage, seen) in stages {
        for fault in [Kind::Cut(stage), Kind::End(stage), Kind::Silence(stage)] {
            for (transport, answer) in both(&upstream, &account, &fault, &body())
                .await
                .into_iter()
                .enumerate()
            {
                let case = format!("{fault:?} over transport {transport}: {answer:?}");
                let counts = [
                    "response.created",
                    "response.output_text.delta",
                    "response.output_item.done",
                ]
                .map(|kind| answer.count(kind));
                assert_eq!(counts, seen, "{case}");
                assert_eq!(answer.count("response.completed"), 0, "{case}");
                let end = match (&fault, transport) {
                    (Kind::Silence(_), _) => End::Silent,
                    (Kind::End(stage), 0) if *stage != Stage::BeforeHeaders => End::Clean,
                    _ => End::Broken,
                };
                assert_eq!(answer.end, end, "{case}");
            }
            upstream
                .wait("the attempts are marked as cut", |state| {
                    state
                        .attempts
                        .iter()
                        .all(|attempt| attempt.cut && !attempt.completed)
                })
                .await;
        }
    }
    for code in [1001, 1008, 1011, 1013] {
        upstream.fault(Fault::once(Kind::Close(code, Stage::Visible)));
        let answer = Socket::open(&upstream, &account)
            .await
            .create(&body())
            .await;
        assert_eq!(
            (answer.count("response.output_text.delta"), answer.end),
            (1, End::Closed(code))
        );
    }
}

#[tokio::test]
async fn answers_come_in_the_size_and_at_the_pace_that_was_scripted() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    for fault in [
        Kind::Burst(100),
        Kind::Paced(30, 5),
        Kind::Slow(5),
        Kind::Huge(1 << 20),
    ] {
        let began = std::time::Instant::now();
        let answers = both(&upstream, &account, &fault, &body()).await;
        let (deltas, at_least) = match &fault {
            Kind::Burst(count) => (*count, 0),
            Kind::Paced(count, ms) => (*count, 2 * 30 * ms),
            Kind::Slow(ms) => (4, 2 * 4 * ms),
            _ => (1, 0),
        };
        assert!(
            began.elapsed() >= Duration::from_millis(at_least),
            "{fault:?}"
        );
        for answer in answers {
            assert_eq!(
                (
                    answer.count("response.output_text.delta"),
                    answer.count("response.completed")
                ),
                (deltas, 1),
                "{fault:?}"
            );
            let numbers: Vec<u64> = answer
                .events
                .iter()
                .filter_map(|event| event["sequence_number"].as_u64())
                .collect();
            assert!(
                numbers
                    .iter()
                    .zip(0..)
                    .all(|(number, index)| *number == index),
                "{fault:?}: {numbers:?}"
            );
        }
    }
    let huge = &both(&upstream, &account, &Kind::Huge(1 << 20), &body()).await[0];
    assert!(huge.events.iter().any(|event| {
        event["delta"]
            .as_str()
            .is_some_and(|delta| delta.len() == 1 << 20)
    }));
}

#[tokio::test]
async fn a_fault_strikes_whom_and_as_often_as_it_says() {
    let upstream = Upstream::start(Config::default()).await;
    let (alice, bob) = (upstream.account("alice"), upstream.account("bob"));
    let ask = async |account: &Account| post(&upstream, account, &body()).await.status;
    upstream.fault(Fault::once(Kind::Overloaded).at("bob").times(2));
    assert_eq!(ask(&alice).await, 200);
    assert_eq!(
        [ask(&bob).await, ask(&bob).await, ask(&bob).await],
        [503, 503, 200]
    );
    upstream.fault(Fault::always(Kind::Overloaded).for_turn("t1"));
    let turn = async |id: &str| {
        let mut body = body();
        body["client_metadata"] =
            json!({ "x-codex-turn-metadata": json!({ "turn_id": id }).to_string() });
        post(&upstream, &alice, &body).await.status
    };
    assert_eq!(
        [turn("t1").await, turn("t2").await, turn("t1").await],
        [503, 200, 503]
    );
    assert_eq!(upstream.state().of_turn("t1").len(), 2);
    let cleared = client()
        .delete(format!("{}/__fake/faults", upstream.auth_url()))
        .send()
        .await
        .unwrap();
    assert!(cleared.status().is_success());
    assert_eq!(turn("t1").await, 200);
}

#[tokio::test]
async fn a_question_for_a_tool_is_answered_by_a_call_and_its_output_by_text() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let mut asked = body();
    asked["input"] = json!([user("please [tool]")]);
    let answer = post(&upstream, &account, &asked).await;
    let call = answer
        .events
        .iter()
        .find(|event| event["type"] == "response.output_item.done")
        .unwrap()["item"]
        .clone();
    assert_eq!(
        (&call["type"], &call["name"]),
        (&json!("function_call"), &json!("exec_command"))
    );
    asked["input"] = json!([user("please [tool]"), call, { "type": "function_call_output", "call_id": call["call_id"], "output": "done" }]);
    let answer = post(&upstream, &account, &asked).await;
    let text = answer
        .events
        .iter()
        .find(|event| event["type"] == "response.output_text.done")
        .unwrap();
    assert_eq!(text["text"], "tool said: done");
}

//! What goes wrong when it is scripted to.

use std::time::Duration;

use loadtest::upstream::{Account, Config, Fault, Kind, Stage, Upstream};
use serde_json::{Value, json};
use tokio_tungstenite::{connect_async, tungstenite::client::IntoClientRequest as _};

use crate::support::{End, Socket, body, both, client, post};

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
            Kind::ModelCapacity,
            400,
            "message",
            json!("Selected model is at capacity. Please try a different model."),
        ),
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
                if transport == 0 {
                    let head = stage > Stage::BeforeHeaders;
                    assert_eq!(answer.status, if head { 200 } else { 0 }, "{case}");
                }
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
async fn a_handshake_fails_as_scripted_and_turns_do_not() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    for (kind, seen) in [
        (Kind::RateLimit { resets_in: 60 }, "429"),
        (Kind::Unauthorized, "401"),
        (Kind::Cut(Stage::BeforeHeaders), "reset"),
        (Kind::End(Stage::BeforeHeaders), "Handshake not finished"),
    ] {
        upstream.fault(Fault::once(kind).at_handshake());
        assert_eq!(post(&upstream, &account, &body()).await.status, 200);
        let url = format!("{}/codex/responses", upstream.url()).replace("http://", "ws://");
        let mut request = url.into_client_request().unwrap();
        let headers = request.headers_mut();
        headers.insert(
            "authorization",
            format!("Bearer {}", account.access_token())
                .parse()
                .unwrap(),
        );
        headers.insert("chatgpt-account-id", account.id().parse().unwrap());
        headers.insert(
            "openai-beta",
            "responses_websockets=2026-02-06".parse().unwrap(),
        );
        let refused = connect_async(request).await.unwrap_err().to_string();
        assert!(refused.contains(seen), "{refused} does not contain {seen}");
        assert_eq!(
            Socket::open(&upstream, &account)
                .await
                .create(&body())
                .await
                .status,
            200
        );
    }
}

#[tokio::test]
async fn a_silence_that_is_released_goes_on_where_it_was() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let asked = body();
    for stage in [Stage::BeforeHeaders, Stage::Visible, Stage::BeforeTerminal] {
        upstream.fault(Fault::once(Kind::Silence(stage)).times(2));
        let mut socket = Socket::open(&upstream, &account).await;
        let (http, socket, ()) = tokio::join!(
            post(&upstream, &account, &asked),
            socket.create(&asked),
            async {
                upstream
                    .wait("two silences", |state| state.silent == 2)
                    .await;
                upstream.release();
            },
        );
        for answer in [http, socket] {
            assert_eq!(answer.count("response.output_text.delta"), 4, "{stage:?}");
            assert_eq!(answer.count("response.completed"), 1, "{stage:?}");
        }
    }
    let state = upstream.state();
    assert_eq!(state.silent, 0);
    assert!(state.attempts.iter().all(|attempt| !attempt.cut));
}

#[tokio::test]
async fn what_nobody_read_is_not_counted() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    // More than the buffers on the way hold, so that the end is still to be sent when the peer leaves.
    upstream.fault(Fault::once(Kind::Huge(16 << 20)).times(2));
    let request = client()
        .post(format!("{}/codex/responses", upstream.url()))
        .bearer_auth(account.access_token())
        .header("chatgpt-account-id", account.id())
        .json(&body());
    drop(request.send().await.unwrap());
    let mut socket = Socket::open(&upstream, &account).await;
    socket.send(&body()).await;
    drop(socket);
    upstream
        .wait("both are cut", |state| {
            state.attempts.len() == 2 && state.attempts.iter().all(|attempt| attempt.cut)
        })
        .await;
    let state = upstream.state();
    assert!(
        state
            .attempts
            .iter()
            .all(|attempt| !attempt.completed && attempt.usage.is_none())
    );
    assert_eq!(state.logins["alice"].turns, 0);
}

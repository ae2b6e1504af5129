//! What the backend takes and what it refuses.

use futures_util::SinkExt as _;
use loadtest::upstream::{Config, Upstream};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::support::{Socket, body, client, post, user};

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
async fn a_conversation_must_be_whole_and_its_thoughts_the_accounts_own() {
    let upstream = Upstream::start(Config::default()).await;
    let (alice, bob) = (upstream.account("alice"), upstream.account("bob"));
    let call = json!({ "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}" });
    let output = json!({ "type": "function_call_output", "call_id": "c", "output": "x" });
    let mut asks = body();
    asks["input"] = json!([user("[reasoning] why")]);
    let thought =
        post(&upstream, &alice, &asks).await.events.pop().unwrap()["response"]["output"][0].take();
    assert_eq!(thought["type"], "reasoning");
    for (account, input, status) in [
        (&alice, json!([user("go"), call, output]), 200),
        (&alice, json!([user("go"), call]), 400),
        (&alice, json!([user("go"), output]), 400),
        (&alice, json!([user("go"), thought]), 200),
        (&bob, json!([user("go"), thought]), 400),
    ] {
        let mut body = body();
        body["input"] = input;
        assert_eq!(
            post(&upstream, account, &body).await.status,
            status,
            "{body}"
        );
        let answer = Socket::open(&upstream, account).await.create(&body).await;
        assert_eq!(answer.status, status, "{body}");
    }
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

#[tokio::test]
async fn bodies_may_come_packed() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let answer = client()
        .post(format!("{}/codex/responses", upstream.url()))
        .bearer_auth(account.access_token())
        .header("chatgpt-account-id", account.id())
        .header("content-encoding", "zstd")
        .body(zstd::encode_all(body().to_string().as_bytes(), 1).unwrap());
    assert_eq!(answer.send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_turn_state_may_come_back_to_its_account_by_header_or_frame() {
    let upstream = Upstream::start(Config::default()).await;
    let (alice, bob) = (upstream.account("alice"), upstream.account("bob"));
    let first = Socket::open(&upstream, &alice).await.create(&body()).await;
    let metadata = first
        .events
        .iter()
        .find(|event| event["type"] == "response.metadata")
        .unwrap();
    let mut next = body();
    next["client_metadata"] =
        json!({ "x-codex-turn-state": metadata["headers"]["x-codex-turn-state"] });
    Socket::open(&upstream, &alice).await.create(&next).await;
    assert_eq!(upstream.violations(), [""; 0]);
    Socket::open(&upstream, &bob).await.create(&next).await;
    assert_eq!(upstream.violations().len(), 1);
}

//! What a socket remembers and what it wants.

use std::time::Duration;

use futures_util::SinkExt as _;
use loadtest::upstream::{Config, Fault, Kind, Upstream};
use serde_json::{Value, json};
use tokio_tungstenite::{
    connect_async,
    tungstenite::{Message, client::IntoClientRequest as _},
};

use crate::support::{Answer, End, Socket, body, user};

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
async fn a_second_response_is_noticed_however_fast_the_first_is() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    upstream.fault(Fault::once(Kind::Paced(2, 0)));
    let mut socket = Socket::open(&upstream, &account).await;
    let frame = json!({ "type": "response.create", "model": "gpt-5.5", "input": [user("hi")], "store": false }).to_string();
    for _ in 0..2 {
        socket.0.feed(Message::text(frame.clone())).await.unwrap();
    }
    socket.0.flush().await.unwrap();
    assert_eq!(socket.read().await.end, End::Broken);
    assert_eq!(upstream.violations(), ["two responses at once on a socket"]);
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

//! Turns over a WebSocket: the conversation lives on one upstream socket, and what ends it is told so that Codex repairs it silently.

use loadtest::upstream::{Config, Fault, Kind, Stage};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::frame::{
        Frame,
        coding::{Data, OpCode},
    },
};

use crate::support::{
    codex_socket::{CodexSocket, create, id_of},
    exposition::Page,
    house::{House, Plan, text_of},
    wait::until,
};

const CODEX: &str = "/backend-api/codex/responses";

#[tokio::test]
async fn a_conversation_rides_one_upstream_socket() {
    let house = House::with(&["alice", "bob"]).await;
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let first = socket.turn(create("turn-1", "one", None)).await;
    assert_eq!(text_of(&first), "echo: one..");
    let second = socket
        .turn(create("turn-2", "two", Some(&id_of(&first))))
        .await;
    assert_eq!(text_of(&second), "echo: two..");
    let state = house.upstream.state();
    assert_eq!(state.sockets, 1);
    assert_eq!(
        state.attempts[1].history.len(),
        4,
        "two items, the answer, one new item"
    );
    assert_eq!(state.violations, [""; 0]);
    let turns = house.turns().await;
    assert_eq!(turns.len(), 2);
    assert!(
        turns
            .iter()
            .all(|turn| turn["outcome"] == "completed" && turn["transport"] == "websocket")
    );
}

#[tokio::test]
async fn a_prewarm_is_remembered_and_costs_nothing() {
    let house = House::start().await;
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let mut prewarm = create("", "ignored", None);
    prewarm["generate"] = false.into();
    let warm = socket.turn(prewarm).await;
    let first = socket
        .turn(create("turn-1", "one", Some(&id_of(&warm))))
        .await;
    assert_eq!(text_of(&first), "echo: one..");
    assert_eq!(house.upstream.state().sockets, 1);
}

#[tokio::test]
async fn upstreams_turn_state_stays_here_and_limits_are_the_pools() {
    let house = House::with(&["alice", "bob"]).await;
    for (name, used) in [("alice", 20), ("bob", 60)] {
        let window = json!({ "used_percent": used, "limit_window_seconds": 18_000, "reset_after_seconds": 9_000 });
        let usage = json!({ "plan_type": "plus", "rate_limit": { "primary_window": window } });
        house.upstream.account(name).answer_usage(200, usage);
    }
    let refreshed = house.post("/api/fleet/refresh").send().await.unwrap();
    assert_eq!(refreshed.status(), 200);
    until("the pool's limits are known", async || {
        let usage = house.get("/api/codex/usage").send().await.unwrap();
        let usage: Value = usage.json().await.unwrap();
        usage["rate_limit"]["primary_window"]["used_percent"] == 40
    })
    .await;
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let frames = socket.turn(create("turn-1", "one", None)).await;
    let first = &frames[0]["headers"]["x-codex-turn-state"];
    assert!(first.as_str().unwrap().starts_with("http_turn_v3_"), "ours");
    let rest = Value::from(&frames[1..]).to_string();
    assert!(!rest.contains("x-codex-turn-state"), "{rest}");
    let limits = frames
        .iter()
        .find(|frame| frame["type"] == "codex.rate_limits")
        .unwrap();
    // Upstream said 12 % of the account that serves; whether that is in the mean already does not matter.
    let used = limits["rate_limits"]["primary"]["used_percent"].as_f64();
    assert!([40.0, 36.0, 16.0].map(Some).contains(&used), "{limits}");
}

#[tokio::test]
async fn a_response_that_upstream_forgot_makes_the_client_resend_everything() {
    let house = House::start().await;
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let lost = socket
        .turn(create("turn-1", "one", Some("resp_elsewhere")))
        .await;
    let error = lost.last().unwrap();
    assert_eq!(error["type"], "error");
    assert_eq!(error["status"], 400);
    assert_eq!(error["error"]["code"], "previous_response_not_found");
    assert!(
        house.upstream.attempts().is_empty(),
        "nothing was sent for it"
    );
    assert_eq!(
        text_of(&socket.turn(create("turn-1", "one", None)).await),
        "echo: one.."
    );
    assert_eq!(house.turns().await.len(), 1);
}

#[tokio::test]
async fn an_account_that_reaches_its_limit_in_a_conversation_moves_it_without_the_user_noticing() {
    let house = House::with(&["alice", "bob"]).await;
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let first = socket.turn(create("turn-1", "one", None)).await;
    house
        .upstream
        .fault(Fault::once(Kind::RateLimit { resets_in: 3600 }));
    let second = socket
        .turn(create("turn-2", "two", Some(&id_of(&first))))
        .await;
    assert_eq!(
        second.last().unwrap()["error"]["code"],
        "previous_response_not_found"
    );
    // What Codex does then, by itself.
    let second = socket.turn(create("turn-2", "one and two", None)).await;
    assert_eq!(text_of(&second), "echo: one and two..");
    let attempts = house.upstream.attempts();
    assert_ne!(attempts[0].account, attempts[2].account);
    let turns = house.turns().await;
    assert_eq!(turns.len(), 2, "the resend is an attempt of the same turn");
    assert_eq!(turns[1]["attempts"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_first_turn_fails_over_without_a_word() {
    for kind in [
        Kind::RateLimit { resets_in: 3600 },
        Kind::RetryAfter {
            seconds: 60,
            used_percent: 40.0,
        },
        Kind::Overloaded,
        Kind::Cut(Stage::BeforeCreated),
        Kind::Cut(Stage::AfterCreated),
        Kind::Unauthorized,
    ] {
        let house = House::with(&["alice", "bob"]).await;
        house.upstream.fault(Fault::once(kind.clone()));
        let mut socket = CodexSocket::open(&house, CODEX).await;
        let frames = socket.turn(create("turn-1", "one", None)).await;
        assert_eq!(text_of(&frames), "echo: one..", "{kind:?}");
    }
}

#[tokio::test]
async fn an_exhausted_pool_is_told_with_a_status_and_the_reset() {
    let house = House::start().await;
    house
        .upstream
        .fault(Fault::once(Kind::RateLimit { resets_in: 3600 }));
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let frames = socket.turn(create("turn-1", "one", None)).await;
    let error = frames.last().unwrap();
    assert_eq!(
        (error["type"].as_str(), error["status"].as_u64()),
        (Some("error"), Some(429))
    );
    assert_eq!(error["error"]["type"], "usage_limit_reached");
    assert!(error["error"]["resets_at"].is_i64());
    assert!(error["headers"]["x-codex-primary-used-percent"].is_string());
}

#[tokio::test]
async fn an_old_upstream_socket_is_replaced() {
    let upstream = Config {
        socket_age: Some(std::time::Duration::ZERO),
        ..Config::default()
    };
    let house = House::planned(Plan {
        upstream,
        ..Plan::default()
    })
    .await;
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let frames = socket.turn(create("turn-1", "one", None)).await;
    // Every socket of this upstream is too old at once: the client is told the way Codex repairs.
    assert_eq!(
        frames.last().unwrap()["error"]["code"],
        "websocket_connection_limit_reached"
    );
}

#[tokio::test]
async fn a_cut_after_something_visible_ends_the_turn_and_the_socket_lives_on() {
    let house = House::start().await;
    house.upstream.fault(Fault::once(Kind::Cut(Stage::Visible)));
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let frames = socket.turn(create("turn-1", "one", None)).await;
    let last = frames.last().unwrap();
    assert!(
        last["type"] == "response.failed" || last["status"].is_u64(),
        "{last}"
    );
    assert_eq!(
        text_of(&socket.turn(create("turn-1", "one", None)).await),
        "echo: one.."
    );
    let turns = house.turns().await;
    assert_eq!(turns.len(), 1);
    assert_eq!(turns[0]["outcome"], "completed");
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_turn_frees_everything() {
    let house = House::start().await;
    house
        .upstream
        .fault(Fault::once(Kind::Silence(Stage::Visible)));
    let mut socket = CodexSocket::open(&house, CODEX).await;
    socket.send(&create("turn-1", "one", None)).await;
    while socket.next().await.unwrap()["type"] != "response.output_text.delta" {}
    drop(socket);
    house
        .upstream
        .wait("the socket closed", |state| state.open_sockets == 0)
        .await;
    house.server_idle().await;
    assert_eq!(house.turns().await[0]["outcome"], "cancelled");
}

#[tokio::test]
async fn bad_frames_get_an_error_with_a_status_and_the_socket_lives_on() {
    let house = House::start().await;
    let mut socket = CodexSocket::open(&house, CODEX).await;
    for message in [
        Message::text("not json"),
        Message::text("[]"),
        Message::binary(vec![1, 2, 3]),
    ] {
        socket.send_raw(message).await;
        let error = socket.next().await.unwrap();
        assert_eq!(
            (error["type"].as_str(), error["status"].as_u64()),
            (Some("error"), Some(400))
        );
    }
    assert_eq!(
        text_of(&socket.turn(create("turn-1", "one", None)).await),
        "echo: one.."
    );
}

#[tokio::test]
async fn a_second_response_at_once_is_refused_and_the_first_goes_on() {
    let house = House::start().await;
    house.upstream.fault(Fault::once(Kind::Slow(50)));
    let mut socket = CodexSocket::open(&house, CODEX).await;
    socket.send(&create("turn-1", "one", None)).await;
    socket.send(&create("turn-2", "two", None)).await;
    let mut frames = socket.response().await;
    assert_eq!(
        frames.pop().unwrap()["error"]["code"],
        "response_in_progress"
    );
    frames.extend(socket.response().await);
    assert_eq!(text_of(&frames), "echo: one..");
    assert_eq!(house.upstream.attempts().len(), 1);
    assert_eq!(house.turns().await.len(), 1);
}

#[tokio::test]
async fn a_wrong_key_is_refused_before_the_upgrade() {
    let house = House::start().await;
    let error = CodexSocket::try_open(&house, CODEX, "dbk_wrong")
        .await
        .err()
        .unwrap();
    let tokio_tungstenite::tungstenite::Error::Http(response) = error else {
        panic!("{error}")
    };
    assert_eq!(response.status(), 401);
}

#[tokio::test]
async fn a_plain_get_is_told_to_upgrade() {
    let house = House::start().await;
    assert_eq!(house.get(CODEX).send().await.unwrap().status(), 426);
}

#[tokio::test]
async fn an_idle_socket_is_closed_for_a_restart_when_the_process_closes() {
    let house = House::start().await;
    let mut socket = CodexSocket::open(&house, CODEX).await;
    socket.turn(create("turn-1", "one", None)).await;
    let (stopped, closed) = tokio::join!(house.stop(), socket.closed());
    assert!(stopped);
    assert_eq!(u16::from(closed.unwrap().code), 1012);
}

#[tokio::test]
async fn a_service_that_is_set_to_http_sends_sockets_there() {
    let transport = drawbridge::config::Transport::Http;
    let house = House::planned(Plan {
        transport,
        ..Plan::default()
    })
    .await;
    let error = CodexSocket::try_open(&house, CODEX, house.key())
        .await
        .err()
        .unwrap();
    let tokio_tungstenite::tungstenite::Error::Http(response) = error else {
        panic!("{error}")
    };
    assert_eq!(response.status(), 426, "Codex falls back without a word");
}

#[tokio::test]
async fn an_http_client_may_ride_an_upstream_socket() {
    let transport = drawbridge::config::Transport::WebSocket;
    let house = House::planned(Plan {
        transport,
        ..Plan::default()
    })
    .await;
    let frames = crate::support::house::events(house.codex_turn("t", "turn-1", "hi").await).await;
    assert_eq!(text_of(&frames), "echo: hi..");
    let attempts = house.upstream.attempts();
    assert_eq!(attempts[0].transport, "websocket");
    assert_eq!(attempts[0].client_turn_id.as_deref(), Some("turn-1"));
}

#[tokio::test]
async fn a_message_is_counted_while_it_arrives() {
    let house = House::start().await;
    let mut socket = CodexSocket::open(&house, CODEX).await;
    let part = |bytes: Vec<u8>, data, last| {
        Message::Frame(Frame::message(bytes, OpCode::Data(data), last))
    };
    let held = async || {
        let admin = house.server.admin_address.to_string();
        let page = Page::of(&house.http, &admin).await;
        page.sum("drawbridge_body_bytes", &[])
    };
    let most = 10 << 20;
    let begin = part(vec![b' '; most], Data::Text, false);
    socket.send_raw(begin).await;
    until("what has come is counted", async || {
        held().await > (most - (100 << 10)) as f64
    })
    .await;
    let frame = create("turn-1", "one", None).to_string();
    socket
        .send_raw(part(frame.into_bytes(), Data::Continue, true))
        .await;
    assert_eq!(text_of(&socket.response().await), "echo: one..");
    until("it is given back", async || held().await == 0.0).await;
}

//! Turns over HTTP: what comes back, what upstream saw, what was booked.

use loadtest::upstream::{Attempt, Fault, Kind, Stage};
use serde_json::{Value, json};

use crate::support::house::{House, codex_body, events, text_of};

#[tokio::test]
async fn a_codex_turn_streams_and_is_booked_before_its_end() {
    let house = House::start().await;
    house.learn_limits().await;
    let response = house.codex_turn("thread-1", "turn-1", "say hi").await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert!(
        response
            .headers()
            .contains_key("x-codex-primary-used-percent")
    );
    assert!(response.headers().contains_key("x-request-id"));
    let token = response.headers()["x-codex-turn-state"].to_str().unwrap();
    assert!(
        token.starts_with("http_turn_v3_"),
        "upstream's turn state is not the client's"
    );
    let events = events(response).await;
    assert_eq!(events[0]["type"], "codex.rate_limits", "the pool's");
    assert_eq!(events[1]["type"], "response.created");
    assert_eq!(text_of(&events), "echo: say hi..");
    assert_eq!(events.last().unwrap()["type"], "response.completed");

    // The terminal event waited for the settlement: the row is there without waiting.
    let turn = house.turns().await.pop().unwrap();
    let usage = house.upstream.attempts()[1].usage.unwrap();
    assert_eq!(turn["client_turn_id"], "turn-1");
    assert_eq!(turn["state"], "settled");
    assert_eq!(turn["outcome"], "completed");
    assert_eq!(turn["input_tokens"], usage.input);
    assert_eq!(turn["cached_input_tokens"], usage.cached);
    assert_eq!(turn["output_tokens"], usage.output);
    assert_eq!(turn["reasoning_tokens"], usage.reasoning);
    assert_eq!(turn["estimated"], false);
    assert!(turn["cost_nanodollars"].as_i64().unwrap() > 0);
    assert_eq!(house.upstream.violations(), [""; 0]);
    assert!(house.stop().await);
}

#[tokio::test]
async fn upstream_sees_the_client_as_it_is_and_no_credential_of_ours() {
    let house = House::start().await;
    let request = house
        .post("/backend-api/codex/responses")
        .header("user-agent", "codex_exec/0.169.0 (Debian 12.0.0; x86_64)")
        .header("originator", "codex_exec")
        .header("x-codex-turn-state", "forged")
        .header("cookie", "a=b")
        .header("x-forwarded-for", "10.0.0.1")
        .json(&codex_body("hi"));
    events(request.send().await.unwrap()).await;
    let headers = &house.upstream.attempts()[0].headers;
    assert_eq!(
        headers["user-agent"],
        "codex_exec/0.169.0 (Debian 12.0.0; x86_64)"
    );
    assert_eq!(headers["originator"], "codex_exec");
    assert_eq!(headers["chatgpt-account-id"], "acct-alice");
    for absent in [
        "x-codex-turn-state",
        "cookie",
        "x-forwarded-for",
        "x-drawbridge-key",
    ] {
        assert!(!headers.contains_key(absent), "{absent}");
    }
    assert!(!headers["authorization"].contains("dbk_"));
}

#[tokio::test]
async fn an_sdk_request_is_made_fit_for_upstream_and_collected() {
    let house = House::start().await;
    let body = json!({ "model": "gpt-5.5", "input": "say hi", "temperature": 0.5, "max_output_tokens": 100, "store": true });
    let response = house
        .post("/v1/responses")
        .json(&body)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 200);
    let answer: Value = response.json().await.unwrap();
    assert_eq!(answer["object"], "response");
    assert_eq!(answer["status"], "completed");
    assert_eq!(answer["output"][0]["content"][0]["text"], "echo: say hi..");
    let sent = &house.upstream.attempts()[0].body;
    assert_eq!(sent["store"], false);
    assert_eq!(sent["stream"], true);
    assert!(sent.get("temperature").is_none());
}

#[tokio::test]
async fn an_sdk_stream_keeps_the_contract() {
    let house = House::start().await;
    let body = json!({ "model": "gpt-5.5", "input": "say hi", "stream": true });
    let events = events(
        house
            .post("/v1/responses")
            .json(&body)
            .send()
            .await
            .unwrap(),
    )
    .await;
    assert_eq!(events[0]["type"], "response.created");
    assert!(
        events
            .iter()
            .all(|event| !event["type"].as_str().unwrap().starts_with("codex."))
    );
    assert!(events.iter().all(|event| event["sequence_number"].is_i64()));
    assert_eq!(
        events.last().unwrap()["response"]["output"][0]["type"],
        "message"
    );
}

#[tokio::test]
async fn an_account_at_its_limit_hands_over_to_the_next_and_the_client_sees_nothing() {
    let house = House::with(&["alice", "bob"]).await;
    house
        .upstream
        .fault(Fault::once(Kind::RateLimit { resets_in: 3600 }));
    let events = events(house.codex_turn("t", "turn-1", "hi").await).await;
    assert_eq!(text_of(&events), "echo: hi..");
    let attempts = house.upstream.attempts();
    assert_eq!(
        attempts
            .iter()
            .map(|attempt| attempt.status)
            .collect::<Vec<_>>(),
        [429, 200]
    );
    assert_ne!(attempts[0].account, attempts[1].account);
    let turns = house.turns().await;
    assert_eq!(turns.len(), 1);
    assert_eq!(turns[0]["attempts"].as_array().unwrap().len(), 2);
    assert_eq!(turns[0]["attempts"][0]["class"], "rate_limit");
    // The account is blocked now: the next turns do not try it.
    for turn in ["turn-2", "turn-3", "turn-4"] {
        house.codex_turn(turn, turn, "hi").await;
    }
    assert!(
        house.upstream.attempts()[2..]
            .iter()
            .all(|attempt| attempt.account == attempts[1].account)
    );
}

#[tokio::test]
async fn one_accounts_limit_is_never_told_as_the_pools() {
    for limited_first in [true, false] {
        let house = House::with(&["alice", "bob"]).await;
        events(house.codex_turn("t", "turn-1", "hi").await).await;
        let home = house.upstream.attempts()[0].account.clone();
        let other = if home == "alice" { "bob" } else { "alice" };
        let (limited, failing) = match limited_first {
            true => (home.as_str(), other),
            false => (other, home.as_str()),
        };
        let limit = Fault::once(Kind::RateLimit { resets_in: 500_000 });
        house.upstream.fault(limit.at(limited));
        house
            .upstream
            .fault(Fault::once(Kind::Overloaded).at(failing));
        let refused = house.codex_turn("t", "turn-2", "hi").await;
        assert_eq!(house.upstream.attempts().len(), 3);
        // The other account serves the next turn: whoever reads a reset in some days would not come back.
        assert_eq!(refused.status(), 503, "{limited_first}");
        let error: Value = refused.json().await.unwrap();
        assert_eq!(error["error"]["code"], "server_is_overloaded");
        let next = events(house.codex_turn("t", "turn-3", "hi").await).await;
        assert_eq!(text_of(&next), "echo: hi..");
    }
}

#[tokio::test]
async fn an_exhausted_pool_is_a_429_with_the_earliest_reset_before_the_stream() {
    let house = House::with(&["alice", "bob"]).await;
    house
        .upstream
        .fault(Fault::once(Kind::RateLimit { resets_in: 7200 }).at("alice"));
    house
        .upstream
        .fault(Fault::once(Kind::RateLimit { resets_in: 3600 }).at("bob"));
    let response = house.codex_turn("t", "turn-1", "hi").await;
    assert_eq!(response.status(), 429);
    assert!(
        response
            .headers()
            .contains_key("x-codex-primary-used-percent")
    );
    let error: Value = response.json().await.unwrap();
    assert_eq!(error["error"]["type"], "usage_limit_reached");
    let now = jiff::Zoned::now().timestamp().as_second();
    let left = error["error"]["resets_at"].as_i64().unwrap() - now;
    assert!((3500..=3600).contains(&left), "{left}");
    assert!(error["error"].get("plan_type").is_none(), "no upsell");
}

#[tokio::test]
async fn an_expired_token_is_refreshed_once_and_the_turn_goes_on() {
    let house = House::start().await;
    let alice = house.upstream.account("alice");
    alice.expire();
    let events = events(house.codex_turn("t", "turn-1", "hi").await).await;
    assert_eq!(text_of(&events), "echo: hi..");
    assert_eq!((alice.exchanges(), alice.reuses()), (1, 0));
}

#[tokio::test]
async fn server_errors_are_repeated_and_then_go_elsewhere() {
    let house = House::with(&["alice", "bob"]).await;
    house
        .upstream
        .fault(Fault::once(Kind::Status(500, "server_error".into())).times(3));
    let events = events(house.codex_turn("t", "turn-1", "hi").await).await;
    assert_eq!(text_of(&events), "echo: hi..");
    let accounts: Vec<_> = house
        .upstream
        .attempts()
        .iter()
        .map(|attempt| attempt.account.clone())
        .collect();
    assert_eq!(accounts.len(), 4);
    assert!(
        accounts[0] == accounts[1] && accounts[1] == accounts[2] && accounts[2] != accounts[3],
        "{accounts:?}"
    );
}

#[tokio::test]
async fn an_account_that_fails_is_asked_once_and_the_next_turns_go_elsewhere() {
    let house = House::with(&["alice", "bob"]).await;
    let broken = || Kind::Status(503, "unavailable".into());
    house.upstream.fault(Fault::once(broken()));
    events(house.codex_turn("t", "turn-1", "hi").await).await;
    let failing = house.upstream.attempts()[0].account.clone();
    house.upstream.fault(Fault::always(broken()).at(&failing));
    for turn in ["turn-2", "turn-3", "turn-4", "turn-5", "turn-6", "turn-7"] {
        let events = events(house.codex_turn(turn, turn, "hi").await).await;
        assert_eq!(text_of(&events), "echo: hi..");
        assert_eq!(house.explanation(turn).await["penalised"], 1);
    }
    let attempts = house.upstream.attempts();
    assert_eq!(attempts.len(), 8);
    let asked = |attempt: &&Attempt| attempt.account == failing;
    assert_eq!(attempts.iter().filter(asked).count(), 1);
}

#[tokio::test]
async fn a_cut_before_anything_visible_is_repeated_and_leaves_no_trace() {
    for stage in [
        Stage::BeforeHeaders,
        Stage::BeforeCreated,
        Stage::AfterCreated,
    ] {
        let house = House::with(&["alice", "bob"]).await;
        house.upstream.fault(Fault::once(Kind::Cut(stage)));
        let events = events(house.codex_turn("t", "turn-1", "hi").await).await;
        assert_eq!(text_of(&events), "echo: hi..", "{stage:?}");
        assert_eq!(
            events
                .iter()
                .filter(|event| event["type"] == "response.created")
                .count(),
            1,
            "{stage:?}"
        );
        assert_eq!(house.turns().await[0]["outcome"], "completed");
    }
}

#[tokio::test]
async fn a_cut_after_something_visible_ends_with_one_well_formed_failure() {
    for stage in [Stage::Visible, Stage::ItemDone, Stage::BeforeTerminal] {
        let house = House::with(&["alice", "bob"]).await;
        house.upstream.fault(Fault::once(Kind::Cut(stage)));
        let events = events(house.codex_turn("t", "turn-1", "hi").await).await;
        let last = events.last().unwrap();
        assert_eq!(last["type"], "response.failed", "{stage:?}");
        assert_eq!(
            last["response"]["error"]["code"],
            "upstream_premature_close"
        );
        assert!(last["sequence_number"].is_i64());
        assert_eq!(house.upstream.attempts().len(), 1, "never replayed");
        let turns = house.turns().await;
        assert_eq!(turns[0]["outcome"], "failed");
        assert_eq!(turns[0]["estimated"], true, "upstream may have charged it");
    }
}

#[tokio::test]
async fn an_image_in_the_request_weighs_nothing_in_an_estimate() {
    let house = House::start().await;
    house
        .upstream
        .fault(Fault::once(Kind::Cut(Stage::BeforeTerminal)));
    let image = format!("data:image/png;base64,{}", "A".repeat(1 << 20));
    let content = json!([{ "type": "input_image", "image_url": image }]);
    let mut body = codex_body("what is this?");
    let message = json!({ "type": "message", "role": "user", "content": content });
    body["input"].as_array_mut().unwrap().push(message);
    let request = house.post("/backend-api/codex/responses").json(&body);
    events(request.send().await.unwrap()).await;
    let turn = house.turns().await.pop().unwrap();
    assert_eq!(turn["estimated"], true);
    let input = turn["input_tokens"].as_i64().unwrap();
    assert!((1..10_000).contains(&input), "{input}");
}

#[tokio::test]
async fn a_collected_request_that_is_cut_fails_fast_with_504() {
    let house = House::with(&["alice", "bob"]).await;
    house
        .upstream
        .fault(Fault::once(Kind::End(Stage::BeforeTerminal)));
    let response = house
        .post("/v1/responses")
        .json(&json!({ "model": "gpt-5.5", "input": "hi" }))
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 504);
    let error: Value = response.json().await.unwrap();
    assert_eq!(error["error"]["code"], "upstream_premature_close");
    assert_eq!(house.upstream.attempts().len(), 1);
}

#[tokio::test]
async fn a_retry_of_the_client_is_an_attempt_of_the_same_turn() {
    let house = House::start().await;
    house
        .upstream
        .fault(Fault::once(Kind::Cut(Stage::Visible)).times(2));
    for _ in 0..3 {
        events(house.codex_turn("t", "turn-1", "hi").await).await;
    }
    let turns = house.turns().await;
    assert_eq!(turns.len(), 1);
    assert_eq!(turns[0]["outcome"], "completed");
    assert_eq!(turns[0]["requests"], 3);
    assert_eq!(turns[0]["attempts"].as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_client_that_leaves_cancels_upstream_and_is_booked_as_cancelled() {
    let house = House::start().await;
    house
        .upstream
        .fault(Fault::once(Kind::Silence(Stage::Visible)));
    let mut response = house.codex_turn("t", "turn-1", "hi").await;
    assert!(response.chunk().await.unwrap().is_some());
    drop(response);
    house
        .upstream
        .wait("the cut", |state| state.attempts[0].cut)
        .await;
    house.server_idle().await;
    let turns = house.turns().await;
    assert_eq!(turns[0]["outcome"], "cancelled");
    assert_eq!(turns[0]["state"], "settled");
}

#[tokio::test]
async fn a_conversation_stays_with_its_account() {
    let house = House::with(&["alice", "bob", "carol"]).await;
    for turn in 0..6 {
        events(
            house
                .codex_turn("thread-1", &format!("turn-{turn}"), "hi")
                .await,
        )
        .await;
    }
    let accounts: std::collections::BTreeSet<_> = house
        .upstream
        .attempts()
        .iter()
        .map(|attempt| attempt.account.clone())
        .collect();
    assert_eq!(accounts.len(), 1);
}

#[tokio::test]
async fn previous_response_id_over_http_is_answered_truthfully() {
    let house = House::start().await;
    let body = json!({ "model": "gpt-5.5", "input": "hi", "previous_response_id": "resp_1" });
    let response = house
        .post("/v1/responses")
        .json(&body)
        .send()
        .await
        .unwrap();
    assert_eq!(response.status(), 400);
    let error: Value = response.json().await.unwrap();
    assert_eq!(error["error"]["code"], "previous_response_not_found");
    assert_eq!(error["error"]["param"], "previous_response_id");
    assert!(house.upstream.attempts().is_empty());
}

#[tokio::test]
async fn upstreams_own_failure_reaches_codex_whole() {
    let house = House::start().await;
    house
        .upstream
        .fault(Fault::once(Kind::Failed("invalid_prompt".into())));
    let response = house.codex_turn("t", "turn-1", "hi").await;
    assert_eq!(response.status(), 200);
    let events = events(response).await;
    assert_eq!(events.len(), 1);
    assert_eq!(events[0]["type"], "response.failed");
    assert_eq!(events[0]["response"]["error"]["code"], "invalid_prompt");
}

//! The real Codex CLI through the whole service, over both transports.

use std::path::Path;

use loadtest::upstream::{Fault, Kind, Stage};
use serde_json::json;

use crate::support::{
    codex::{Codex, WIRES, Wire},
    house::{House, Plan},
};

const ACCOUNTS: &[&str] = &["alice", "bob", "carol"];

/// A house and a CLI that is configured for it.
async fn meet(wire: Wire) -> (House, Codex) {
    let house = House::with(ACCOUNTS).await;
    let codex = Codex::new(&house.url("/backend-api/codex"), house.key(), wire);
    (house, codex)
}

/// Every turn booked and closed, nothing that upstream would not forgive.
async fn in_order(house: &House) {
    house.server_idle().await;
    for turn in house.turns().await {
        assert_ne!(turn["state"], "open", "{turn}");
    }
    assert_eq!(house.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn a_single_turn() {
    for wire in WIRES {
        let (house, codex) = meet(wire).await;
        let run = codex.exec("say hi").await;
        assert_eq!(run.expect_answer(), "echo: say hi..", "{wire:?}");
        assert_eq!(run.errors(), [""; 0], "{wire:?}");
        // A conversation has a socket, whichever way its client speaks.
        let attempts = house.upstream.attempts();
        assert!(
            attempts
                .iter()
                .all(|attempt| attempt.transport == "websocket")
        );
        in_order(&house).await;
    }
}

#[tokio::test]
async fn a_tool_call_and_a_resumed_conversation() {
    for wire in WIRES {
        let (house, codex) = meet(wire).await;
        let run = codex.exec("please [tool]").await;
        assert!(
            run.expect_answer().contains("drawbridge-tool"),
            "{wire:?}: {run:?}"
        );
        let run = codex.resume("and again").await;
        assert_eq!(run.expect_answer(), "echo: and again..", "{wire:?}");
        let accounts: std::collections::BTreeSet<_> = house
            .upstream
            .attempts()
            .into_iter()
            .map(|attempt| attempt.account)
            .collect();
        assert_eq!(accounts.len(), 1, "the conversation stays with its account");
        in_order(&house).await;
    }
}

#[tokio::test]
async fn several_turns_in_one_process() {
    for wire in WIRES {
        let (house, codex) = meet(wire).await;
        let mut server = codex.app_server().await;
        let thread = server.thread(Path::new("/tmp")).await;
        for text in ["one", "two", "three"] {
            assert_eq!(
                server.turn(&thread, text).await,
                format!("echo: {text}.."),
                "{wire:?}"
            );
        }
        assert_eq!(
            house.upstream.state().sockets,
            1,
            "{wire:?}: one upstream socket for the conversation"
        );
        in_order(&house).await;
    }
}

/// The user gets the answer of a conversation with a tool call while upstream misbehaves.
async fn conversation_survives(fault: &Fault) {
    for wire in WIRES {
        let (house, codex) = meet(wire).await;
        codex.exec("warm up").await.expect_answer();
        house.upstream.fault(fault.clone());
        let run = codex.resume("please [tool]").await;
        assert!(
            run.expect_answer().contains("drawbridge-tool"),
            "{wire:?} {fault:?}: {run:?}"
        );
        let run = codex.resume("thanks").await;
        assert_eq!(run.expect_answer(), "echo: thanks..", "{wire:?} {fault:?}");
        in_order(&house).await;
    }
}

#[tokio::test]
async fn the_chosen_account_reaches_its_limit() {
    conversation_survives(&Fault::once(Kind::RateLimit { resets_in: 3600 })).await;
}

#[tokio::test]
async fn the_access_token_expires() {
    for wire in WIRES {
        let (house, codex) = meet(wire).await;
        codex.exec("warm up").await.expect_answer();
        for name in ACCOUNTS {
            house.upstream.account(name).expire();
        }
        let run = codex.resume("please [tool]").await;
        assert!(
            run.expect_answer().contains("drawbridge-tool"),
            "{wire:?}: {run:?}"
        );
        assert!(
            ACCOUNTS
                .iter()
                .all(|name| house.upstream.account(name).reuses() == 0)
        );
        in_order(&house).await;
    }
}

#[tokio::test]
async fn upstream_answers_500() {
    conversation_survives(&Fault::once(Kind::Status(500, "server_error".into())).times(2)).await;
}

#[tokio::test]
async fn upstream_cuts_before_anything_visible() {
    conversation_survives(&Fault::once(Kind::Cut(Stage::AfterCreated))).await;
}

#[tokio::test]
async fn upstream_cuts_once_after_something_visible_and_the_cli_repairs_it() {
    for wire in WIRES {
        let (house, codex) = meet(wire).await;
        house.upstream.fault(Fault::once(Kind::Cut(Stage::Visible)));
        let run = codex.exec("say hi").await;
        assert_eq!(run.expect_answer(), "echo: say hi..", "{wire:?}");
        in_order(&house).await;
        let turns = house.turns().await;
        let cut: Vec<_> = turns
            .iter()
            .filter(|turn| turn["attempts"].as_array().unwrap().len() > 1)
            .collect();
        assert_eq!(
            cut.len(),
            1,
            "the retry is an attempt of the same turn: {turns:#?}"
        );
    }
}

#[tokio::test]
async fn upstream_cuts_every_time_and_the_user_reads_one_clear_error() {
    // Over a socket the CLI tries as often, and then again over HTTP.
    for (wire, tries) in [(Wire::Sse, 6), (Wire::WebSocket, 12)] {
        let (house, codex) = meet(wire).await;
        house
            .upstream
            .fault(Fault::always(Kind::Cut(Stage::Visible)));
        let run = codex.exec("say hi").await;
        assert!(!run.success);
        let last = run.errors().pop().unwrap();
        assert!(
            last.contains("stream disconnected before completion"),
            "{wire:?}: {last}"
        );
        let failed = run
            .lines
            .iter()
            .filter(|line| line["type"] == "turn.failed");
        assert_eq!(failed.count(), 1, "{wire:?}: {run:?}");
        // A prewarm generates nothing and belongs to no turn of the client.
        let mut turns = house.turns().await;
        turns.retain(|turn| turn["client_turn_id"].is_string());
        assert_eq!(turns.len(), 1, "{wire:?}: {turns:#?}");
        assert_eq!(turns[0]["outcome"], "failed", "{wire:?}");
        assert_eq!(
            turns[0]["attempts"].as_array().unwrap().len(),
            tries,
            "{wire:?}: every try of the CLI"
        );
        in_order(&house).await;
    }
}

#[tokio::test]
async fn an_exhausted_pool_is_the_usage_limit_sentence() {
    for wire in WIRES {
        let (house, codex) = meet(wire).await;
        house
            .upstream
            .fault(Fault::always(Kind::RateLimit { resets_in: 3600 }));
        let run = codex.exec("say hi").await;
        assert!(!run.success);
        let last = run.errors().pop().unwrap();
        assert!(last.contains("usage limit"), "{wire:?}: {last}");
        // The first account that returns is the one that counts, to the minute.
        let query = "
            select to_char(min(blocked_until) at time zone 'UTC', 'FMHH12:MI AM') from quota_blocks";
        let row = house.client.query_one(query, &[]).await.unwrap();
        let time: String = row.get(0);
        assert!(last.contains(&time), "{wire:?}: {time} is not in {last}");
        in_order(&house).await;
    }
}

#[tokio::test]
async fn the_status_of_a_cli_with_a_login_shows_the_pools_windows() {
    let house = House::planned(Plan {
        accounts: ACCOUNTS,
        key: false,
        ..Plan::default()
    })
    .await;
    house.learn_limits().await;
    // A login of its own, which the pool does not know and which is told to nobody.
    let login = house.upstream.account("visitor").auth_json();
    let codex = Codex::with_login(&house.url(""), &login);
    let mut server = codex.app_server().await;
    let limits = server.call("account/rateLimits/read", json!(null)).await;
    let shown = &limits["rateLimits"];
    for (slot, used, minutes) in [("primary", 12, 300), ("secondary", 20, 10_080)] {
        let window = &shown[slot];
        assert_eq!(window["usedPercent"], used, "{limits}");
        assert_eq!(window["windowDurationMins"], minutes, "{limits}");
        assert!(window["resetsAt"].as_i64() > Some(jiff::Timestamp::now().as_second()));
    }
    assert_eq!(shown["planType"], "plus", "{limits}");
}

#[tokio::test]
async fn a_wrong_key_is_a_clear_error() {
    let house = House::start().await;
    let codex = Codex::new(&house.url("/backend-api/codex"), "dbk_wrong", Wire::Sse);
    let run = codex.exec("say hi").await;
    assert!(!run.success);
    assert!(run.errors().pop().unwrap().contains("401"), "{run:?}");
    assert!(house.upstream.attempts().is_empty());
}

#[tokio::test]
async fn the_v1_base_url_works_too() {
    for wire in WIRES {
        let house = House::with(ACCOUNTS).await;
        let codex = Codex::new(&house.url("/v1"), house.key(), wire);
        assert_eq!(
            codex.exec("say hi").await.expect_answer(),
            "echo: say hi..",
            "{wire:?}"
        );
        in_order(&house).await;
    }
}

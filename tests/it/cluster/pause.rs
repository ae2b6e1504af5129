//! An owner that is stopped in mid-turn and comes back.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use loadtest::upstream::{Fault, Kind};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::times;
use crate::support::{
    cluster::{Answer, Cluster, Plan, script},
    wait::until,
};

#[tokio::test]
async fn the_conversation_goes_on_elsewhere_and_the_old_owner_moves_nothing() {
    let cluster = Cluster::start(Plan::default()).await;
    let ask = |number: usize, turn: &str| {
        let metadata = json!({ "turn_id": turn, "session_id": "s", "request_kind": "turn" });
        cluster
            .post_at(number, "/v1/responses")
            .header("session-id", "s")
            .header("x-codex-turn-metadata", metadata.to_string())
            .json(&script(turn, true))
    };
    let first = Answer::of(ask(0, "first").send().await.unwrap()).await;
    let before = cluster.leases().await;
    assert_eq!(before.len(), 1);

    // In the middle of its second turn.
    let slow = Fault::once(Kind::Paced(200, 20)).for_turn("second");
    cluster.home.upstream.fault(slow);
    let mut second = ask(0, "second").send().await.unwrap().bytes_stream();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("output_text.delta") {
        seen.extend(second.next().await.unwrap().unwrap());
    }
    cluster.signal(0, Signal::STOP);
    let began = Instant::now();
    let third = ask(1, "third").header("x-codex-turn-state", first.token());
    let third = Answer::of(third.send().await.unwrap()).await;
    println!("served elsewhere after {:?}", began.elapsed());
    third.id();
    assert!(began.elapsed() < Duration::from_secs(2));

    // Its lease is another's as soon as it is buried.
    sleep(Duration::from_secs(times(3, 60) as u64)).await;
    let fourth = ask(1, "fourth").header("x-codex-turn-state", first.token());
    let fourth = Answer::of(fourth.send().await.unwrap()).await;
    let head = fourth.id();
    let taken = cluster.leases().await;
    let main = |leases: &[Value]| {
        let mut found = leases
            .iter()
            .filter(|lease| lease["lease_id"] == before[0]["lease_id"]);
        found.next().unwrap().clone()
    };
    assert_eq!(main(&taken)["head_response_id"], head, "{}", cluster.logs());
    assert_ne!(main(&taken)["generation"], before[0]["generation"]);

    cluster.signal(0, Signal::CONT);
    let rest = async {
        while let Some(Ok(part)) = second.next().await {
            seen.extend(part);
        }
    };
    timeout(Duration::from_secs(20), rest)
        .await
        .expect("its client gets an end");
    let end = String::from_utf8_lossy(&seen);
    let end = end
        .lines()
        .rfind(|line| line.starts_with("data: "))
        .unwrap();
    println!("the old owner's client got: {end:.300}");
    assert!(
        ["response.completed", "response.failed"]
            .iter()
            .any(|kind| end.contains(kind)),
        "{end}"
    );
    until("it is a replica again", async || {
        cluster.service(0).get("/readyz").await.status() == 200
    })
    .await;
    cluster.booked().await;
    // Long enough for whatever it would still write.
    sleep(Duration::from_secs(1)).await;
    for (was, is) in taken.iter().zip(cluster.leases().await) {
        for column in [
            "lease_id",
            "generation",
            "owner_boot",
            "head_response_id",
            "turn_seq",
        ] {
            assert_eq!(
                was[column],
                is[column],
                "{column} moved\n{}",
                cluster.logs()
            );
        }
    }
    let turns = cluster.turns().await;
    let told: Vec<_> = turns
        .iter()
        .map(|turn| {
            (
                turn["client_turn_id"].as_str().unwrap(),
                turn["attempts"].as_array().unwrap().len(),
            )
        })
        .collect();
    assert_eq!(
        told,
        [("first", 1), ("second", 1), ("third", 1), ("fourth", 1)]
    );
    let second = &turns[1];
    println!(
        "the second turn: {} {} estimated {}",
        second["state"], second["outcome"], second["estimated"]
    );
    assert_eq!(second["state"], "settled");
    assert!(second["input_tokens"].as_i64().unwrap() > 0, "{second:#}");

    // What it has learnt: it sends the next turn to whom it belongs.
    let fifth = ask(0, "fifth").header("x-codex-turn-state", first.token());
    Answer::of(fifth.send().await.unwrap()).await.id();
    assert_eq!(
        main(&cluster.leases().await)["owner_boot"],
        main(&taken)["owner_boot"]
    );
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

//! A turn that does not end, a replica that dies, and one that sleeps through its own succession.

use std::time::Duration;

use futures_util::StreamExt as _;
use loadtest::upstream::{Fault, Kind};
use reqwest::Response;
use rustix::process::Signal;
use serde_json::Value;

use super::{ask, go_on, open, plan, turn_id};
use crate::support::{
    cluster::{Answer, Cluster, Plan},
    wait::until,
};

/// A turn that has begun to be heard at the first replica, and goes on for so many words.
async fn long(cluster: &Cluster, conversation: &str, turn: &str, words: usize) -> Response {
    Answer::of(ask(cluster, 0, conversation, "first").await)
        .await
        .id();
    let slow = Fault::once(Kind::Paced(words, 20)).for_turn(turn);
    cluster.home.upstream.fault(slow);
    let mut answer = ask(cluster, 0, conversation, turn).await;
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("output_text.delta") {
        seen.extend(answer.chunk().await.unwrap().unwrap());
    }
    answer
}

#[tokio::test]
async fn lease_recovery_is_as_written() {
    let plan = Plan {
        names: &["one", "two"],
        ..plan()
    };
    let mut cluster = Cluster::start(plan).await;
    let mut book = open("lease-recovery", &cluster, 1);

    Answer::of(ask(&cluster, 0, "idle", "idle").await)
        .await
        .id();
    let told = go_on(&cluster, 0, None).await;
    let stuck = long(&cluster, "stuck", "endless", 3000).await;
    book.walk("Which conversation").await;
    book.walk("Free it").await;
    let next = ask(&cluster, 1, "stuck", "next").await;
    Answer::of(next).await.id();
    drop(stuck);
    book.walk("A stuck lease is over").await;

    cluster.kill(0).await;
    // Before it is buried: by a takeover. After: by a claim.
    Answer::of(ask(&cluster, 1, "idle", "taken").await)
        .await
        .id();
    book.walk("A dead owner").await;
    go_on(&cluster, 1, Some(told.id())).await.id();
    book.walk("A mass takeover").await;
    book.set("TURN", turn_id(&cluster, Value::Null).await);
    book.walk("A dead owner is replaced").await;

    cluster.serve(0).await;
    let asleep = long(&cluster, "shared", "old", 100).await;
    cluster.signal(0, Signal::STOP);
    let dead = "select dead_at is not null from bridge_replicas where replica_name = 'one' order by started_at desc limit 1";
    until("it is taken for dead", async || {
        cluster.client.query_one(dead, &[]).await.unwrap().get(0)
    })
    .await;
    Answer::of(ask(&cluster, 1, "shared", "new").await)
        .await
        .id();
    cluster.signal(0, Signal::CONT);
    asleep.bytes_stream().for_each(async |_| {}).await;
    cluster.booked().await;
    book.set("OLD", turn_id(&cluster, "old").await);
    book.set("NEW", turn_id(&cluster, "new").await);
    book.set("ADMIN", &cluster.service(0).admin);
    book.walk("Two owners").await;
    book.done();
    let log = "a peer has declared this replica dead";
    let service = cluster.replicas[0].service.as_mut().unwrap();
    tokio::time::timeout(Duration::from_secs(20), service.logged(log))
        .await
        .unwrap();
}

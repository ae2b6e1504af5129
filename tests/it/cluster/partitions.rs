//! Replicas that cannot reach each other, or one that cannot reach Postgres; owners that die while they serve a peer's client.

use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use loadtest::upstream::{Fault, Kind, Stage, State};
use reqwest::RequestBuilder;
use serde_json::json;
use tokio::time::{sleep, timeout};

use loadtest::edge::Mode;

use crate::support::{
    cluster::{Answer, Cluster, Plan, script},
    wait::until,
};

fn turn(cluster: &Cluster, number: usize, conversation: &str, id: &str) -> RequestBuilder {
    let metadata = json!({ "turn_id": id, "session_id": conversation, "request_kind": "turn" });
    cluster
        .post_at(number, "/v1/responses")
        .header("session-id", conversation)
        .header("x-codex-turn-metadata", metadata.to_string())
}

async fn answer(request: RequestBuilder) -> Answer {
    Answer::of(request.send().await.unwrap()).await
}

#[tokio::test]
async fn what_cannot_be_sent_to_the_owner_is_served_here() {
    let modes = [
        Mode::Refuse,
        Mode::BlackHole,
        Mode::HalfOpen,
        Mode::Delay(Duration::from_millis(200)),
    ];
    for mode in modes {
        cut_off(mode).await;
    }
}

async fn cut_off(mode: Mode) {
    let cluster = Cluster::start(Plan::default()).await;
    for by in ["token", "response"] {
        let name = by;
        let post = |number: usize, body| {
            cluster
                .post_at(number, "/v1/responses")
                .header("session-id", name)
                .json(&body)
        };
        let first = answer(post(0, script("one", false))).await;
        let mut two = script("two", true);
        if by == "response" {
            two["previous_response_id"] = first.id().into();
        }
        cluster.replicas[0].peers.set(mode);
        if mode == Mode::Refuse {
            cluster.replicas[0].peers.cut();
        }
        let (began, mut unknown) = (Instant::now(), 0);
        let second = loop {
            let request = post(1, two.clone()).header("x-codex-turn-state", first.token());
            let answer = answer(request).await;
            if answer.complete {
                break answer;
            }
            // The owner had it, and may have served it: that is for the client to decide.
            let told = (answer.status, answer.code());
            assert_eq!(
                told,
                (503, "bridge_owner_unreachable"),
                "{mode:?} {by}: {answer:#?}"
            );
            assert!(answer.headers.contains_key("retry-after"));
            assert!(
                matches!(mode, Mode::HalfOpen | Mode::Delay(_)),
                "{mode:?} {by}"
            );
            assert!(
                began.elapsed() < Duration::from_secs(10),
                "{}",
                cluster.logs()
            );
            unknown += 1;
        };
        println!(
            "{mode:?} {by}: {unknown} times unknown, served after {:?}",
            began.elapsed()
        );
        assert!(
            unknown > 0 || began.elapsed() < Duration::from_secs(2),
            "{mode:?} {by}"
        );
        // Healed, the conversation is one again, wherever it is asked for.
        cluster.replicas[0].peers.open().await;
        let mut three = script("three", false);
        three["previous_response_id"] = second.id().into();
        for number in [0, 1] {
            let third = answer(post(number, three.clone())).await;
            assert!(
                third.complete,
                "{mode:?} {by}: {third:#?}\n{}",
                cluster.logs()
            );
        }
    }
    cluster.booked().await;
    let seen = cluster.home.upstream.attempts().len();
    let begun = cluster
        .turns()
        .await
        .into_iter()
        .filter(|turn| turn["state"] == "settled");
    assert_eq!(begun.count(), seen, "each was sent once");
    // A replica that refused a request, or never began it, does not stand in the way of the one that served it.
    let unlike = "
        select count(*) from turns t where t.state = 'settled' and t.input_tokens <>
            (select coalesce(sum(l.input_tokens), 0) from request_log l where l.turn_id = t.turn_id)";
    until("the log says what was booked", async || {
        let row = cluster.client.query_one(unlike, &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn an_owner_that_cannot_book_leaves_the_conversation_to_whoever_can() {
    let cluster = Cluster::start(Plan::default()).await;
    let first = answer(turn(&cluster, 0, "s", "first").json(&script("one", false))).await;
    let edge = &cluster.replicas[0].postgres;
    edge.set(Mode::Refuse);
    edge.cut();
    let second = turn(&cluster, 1, "s", "second").header("x-codex-turn-state", first.token());
    answer(second.json(&script("two", false))).await.id();
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn a_response_of_a_fork_is_found_at_the_owner_of_its_thread() {
    let cluster = Cluster::start(Plan {
        settings: &[("DRAWBRIDGE_SNAPSHOTS", "off")],
        ..Plan::default()
    })
    .await;
    let post = |number: usize, body| {
        cluster
            .post_at(number, "/v1/responses")
            .header("session-id", "s")
            .json(&body)
    };
    let silence = Fault::once(Kind::Silence(Stage::Visible));
    cluster.home.upstream.fault(silence);
    let busy = answer(post(0, script("busy", true)));
    let beside = async {
        let state = |state: &State| state.silent == 1;
        cluster.home.upstream.wait("a silence", state).await;
        let fork = answer(post(0, script("beside", false))).await;
        cluster.home.upstream.release();
        fork
    };
    let (busy, fork) = tokio::join!(busy, beside);
    busy.id();
    let mut after = script("after", false);
    after["previous_response_id"] = fork.id().into();
    for number in [1, 0] {
        let next = answer(post(number, after.clone())).await;
        after["previous_response_id"] = next.id().into();
    }
    assert_eq!(cluster.leases().await.len(), 2);
}

#[tokio::test]
async fn an_owner_without_postgres_is_buried_and_comes_back_as_another() {
    let cluster = Cluster::start(Plan::default()).await;
    let first = answer(turn(&cluster, 0, "s", "first").json(&script("one", false))).await;
    assert_eq!(cluster.owner().await, 0);
    let lease = cluster.leases().await[0].clone();
    let edge = &cluster.replicas[0].postgres;
    edge.set(Mode::BlackHole);
    // The other cannot know why the owner says nothing.
    let second = turn(&cluster, 1, "s", "second").header("x-codex-turn-state", first.token());
    let began = Instant::now();
    answer(second.json(&script("two", false))).await.id();
    println!("served elsewhere after {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(4));
    let buried = "select count(*) from bridge_replicas where dead_at is not null";
    until("the owner is buried", async || {
        cluster
            .client
            .query_one(buried, &[])
            .await
            .unwrap()
            .get::<_, i64>(0)
            == 1
    })
    .await;
    // Its own clients are served for a while, without their lease.
    answer(turn(&cluster, 0, "s", "third").json(&script("three", false)))
        .await
        .id();
    edge.set(Mode::Pass);
    until("it is another", async || {
        let living = "select count(*) from bridge_replicas where dead_at is null and expires_at > clock_timestamp()";
        cluster.client.query_one(living, &[]).await.unwrap().get::<_, i64>(0) == 2
    })
    .await;
    let fourth = turn(&cluster, 0, "s", "fourth").header("x-codex-turn-state", first.token());
    answer(fourth.json(&script("four", false))).await.id();
    until("every turn is booked once", async || {
        let turns = cluster.turns().await;
        let mut settled: Vec<_> = turns
            .iter()
            .filter(|turn| turn["outcome"] == "completed")
            .map(|turn| turn["client_turn_id"].as_str().unwrap())
            .collect();
        settled.sort();
        settled == ["first", "fourth", "second", "third"]
    })
    .await;
    let leases = cluster.leases().await;
    let now = leases
        .iter()
        .find(|now| now["lease_id"] == lease["lease_id"])
        .unwrap();
    assert_ne!(now["owner_boot"], lease["owner_boot"]);
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn an_owner_without_upstream_says_so_and_keeps_its_lease() {
    let cluster = Cluster::start(Plan::default()).await;
    let first = answer(turn(&cluster, 0, "s", "first").json(&script("one", false))).await;
    let before = cluster.leases().await;
    let edge = &cluster.replicas[0].upstream;
    edge.set(Mode::Refuse);
    edge.cut();
    // Through either replica: the owner is asked, and has nobody to ask.
    for number in [0, 1] {
        let id = format!("second-{number}");
        let second = turn(&cluster, number, "s", &id).header("x-codex-turn-state", first.token());
        let second = answer(second.json(&script("two", false))).await;
        assert!((500..600).contains(&second.status), "{second:#?}");
        println!("by r{number}: {} {}", second.status, second.code());
    }
    edge.open().await;
    let third = turn(&cluster, 1, "s", "third").header("x-codex-turn-state", first.token());
    answer(third.json(&script("three", false))).await.id();
    cluster.booked().await;
    for column in ["lease_id", "generation", "owner_boot"] {
        assert_eq!(
            cluster.leases().await[0][column],
            before[0][column],
            "{column}"
        );
    }
    assert_eq!(cluster.home.upstream.attempts().len(), 2);
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn an_owner_that_dies_while_it_serves_a_peers_client_ends_that_turn_honestly() {
    let mut cluster = Cluster::start(Plan::default()).await;
    // Before anything was said, and after.
    for (round, stage) in [Stage::AfterCreated, Stage::Visible]
        .into_iter()
        .enumerate()
    {
        let name = format!("s{round}");
        let first =
            answer(turn(&cluster, 0, &name, &format!("{name}-1")).json(&script("one", false)))
                .await;
        let id = format!("{name}-2");
        cluster
            .home
            .upstream
            .fault(Fault::once(Kind::Silence(stage)).for_turn(&id));
        let second = turn(&cluster, 1, &name, &id)
            .header("x-codex-turn-state", first.token())
            .json(&script("two", true));
        let second = tokio::spawn(second.send());
        cluster
            .home
            .upstream
            .wait("the turn", |state| !state.of_turn(&id).is_empty())
            .await;
        let mut seen = Vec::new();
        let mut second = if stage == Stage::Visible {
            let mut body = second.await.unwrap().unwrap().bytes_stream();
            while !String::from_utf8_lossy(&seen).contains("output_text.delta") {
                seen.extend(body.next().await.unwrap().unwrap());
            }
            cluster.kill(0).await;
            body.boxed()
        } else {
            cluster.kill(0).await;
            let response = timeout(Duration::from_secs(5), second).await.unwrap();
            let response = response.unwrap().unwrap();
            println!("{stage:?}: {}", response.status());
            response.bytes_stream().boxed()
        };
        let rest = async {
            while let Some(Ok(part)) = second.next().await {
                seen.extend(part);
            }
        };
        timeout(Duration::from_secs(5), rest).await.expect("an end");
        let seen = String::from_utf8_lossy(&seen).into_owned();
        println!(
            "{stage:?}: {:.600}",
            seen.lines().rfind(|line| line.len() > 2).unwrap()
        );
        assert!(!seen.contains("response.completed"), "{seen}");
        assert!(seen.contains("error"), "{seen}");
        assert_eq!(
            cluster.home.upstream.state().of_turn(&id).len(),
            1,
            "never sent twice"
        );

        // The client resends everything, at once and elsewhere.
        let again = turn(&cluster, 1, &name, &id).header("x-codex-turn-state", first.token());
        let began = Instant::now();
        let again = answer(again.json(&script("two", true))).await;
        assert!(again.complete, "{stage:?}: {again:#?}\n{}", cluster.logs());
        assert!(began.elapsed() < Duration::from_secs(2));
        cluster.serve(0).await;
    }
    // The dead one's turns are booked by those who bury it.
    cluster.booked().await;
    sleep(Duration::from_millis(100)).await;
    let turns = cluster.turns().await;
    let estimated: Vec<_> = turns
        .iter()
        .filter(|turn| turn["estimated"] == true)
        .collect();
    assert_eq!(estimated.len(), 2, "{turns:#?}");
    let attempts: usize = turns
        .iter()
        .map(|turn| turn["attempts"].as_array().unwrap().len())
        .sum();
    assert_eq!(
        attempts,
        cluster.home.upstream.attempts().len(),
        "{turns:#?}"
    );
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

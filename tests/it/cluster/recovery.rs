//! `kill -9` of an owner between two turns: what the next one gets, and how soon.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::times;
use crate::support::cluster::{Answer, Cluster, Plan, script};

/// How the conversation goes on elsewhere.
#[derive(Clone, Copy, Debug)]
enum By {
    /// Optional continuity: the request brings everything.
    Token,
    Session,
    /// Required continuity, kept in a snapshot.
    Response,
}

#[tokio::test]
async fn the_next_turn_is_served_within_two_seconds_of_the_owners_death() {
    let mut cluster = Cluster::start(Plan::default()).await;
    let mut took = Vec::new();
    for round in 0..times(12, 100) {
        let by = [By::Token, By::Session, By::Response][round % 3];
        let (owner, other) = (round % 2, (round + 1) % 2);
        let word = format!("conversation-{round}");
        let post = |number: usize, body: &Value| {
            cluster
                .post_at(number, "/v1/responses")
                .header("session-id", &word)
                .json(body)
        };
        let one = script("one", round % 4 < 2);
        let first = Answer::of(post(owner, &one).send().await.unwrap()).await;
        let mut two = script("two", round % 4 < 2);
        let id = first.id().to_owned();
        if matches!(by, By::Response) {
            two["previous_response_id"] = id.into();
        }
        let mut request = post(other, &two);
        if matches!(by, By::Token) {
            request = request.header("x-codex-turn-state", first.token());
        }
        assert_eq!(cluster.owner().await, owner, "{by:?} {round}");

        cluster.kill(owner).await;
        let began = Instant::now();
        let second = Answer::of(request.send().await.unwrap()).await;
        took.push(began.elapsed());
        assert!(
            second.status == 200 && second.complete,
            "{by:?} {round}: {second:#?}\n{}",
            cluster.logs()
        );
        assert_eq!(cluster.owner().await, other, "{by:?} {round}");
        cluster.serve(owner).await;
    }
    took.sort();
    let p99 = took[(took.len() * 99).div_ceil(100) - 1];
    println!(
        "{} recoveries: median {:?}, p99 {p99:?}, worst {:?}",
        took.len(),
        took[took.len() / 2],
        took[took.len() - 1]
    );
    assert!(p99 < Duration::from_secs(2), "{took:?}");
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn what_only_the_dead_remembered_is_unreachable_until_it_is_buried_and_then_gone() {
    let mut cluster = Cluster::start(Plan {
        settings: &[("DRAWBRIDGE_SNAPSHOTS", "off")],
        ..Plan::default()
    })
    .await;
    // By a token, which says that there was a conversation, and by a name that need not have had one.
    let truths = [
        (true, (409, "bridge_session_expired")),
        (false, (400, "previous_response_not_found")),
    ];
    for (round, (with_token, truth)) in truths.into_iter().enumerate() {
        let (owner, other) = (round, 1 - round);
        let word = format!("conversation-{round}");
        let first = cluster
            .post_at(owner, "/v1/responses")
            .header("session-id", &word)
            .json(&script("one", false));
        let first = Answer::of(first.send().await.unwrap()).await;
        let mut two = script("two", false);
        two["previous_response_id"] = first.id().into();
        cluster.kill(owner).await;
        let died = Instant::now();
        // A tenth of 15 s and 2 s, and a heartbeat to notice.
        let (soonest, latest) = (Duration::from_millis(1000), Duration::from_millis(4000));
        let mut unreachable = 0;
        let gone = loop {
            let mut request = cluster.post_at(other, "/v1/responses").json(&two);
            request = match with_token {
                true => request.header("x-codex-turn-state", first.token()),
                false => request.header("session-id", &word),
            };
            let answer = Answer::of(request.send().await.unwrap()).await;
            if answer.status != 503 {
                break answer;
            }
            assert_eq!(answer.code(), "bridge_owner_unreachable", "{answer:#?}");
            let wait = answer.headers.get("retry-after").unwrap().to_str().unwrap();
            assert!((1..=20).contains(&wait.parse().unwrap()), "{wait}");
            unreachable += 1;
            assert!(died.elapsed() < latest, "never buried\n{}", cluster.logs());
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        println!("{unreachable} times unreachable, for {:?}", died.elapsed());
        assert!(unreachable > 0 && died.elapsed() > soonest, "{gone:#?}");
        assert_eq!((gone.status, gone.code()), truth, "{gone:#?}");
        cluster.serve(owner).await;
    }
}

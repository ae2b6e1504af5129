//! A conversation known by its last response alone, while owners die and an account goes.

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde_json::Value;

use crate::support::cluster::{Answer, Cluster, Plan, script};

const TURNS: usize = 20;

#[tokio::test]
async fn twenty_turns_are_answered_with_their_full_history_and_booked_once() {
    let mut cluster = Cluster::start(Plan {
        replicas: 3,
        accounts: &["alice", "bob"],
        ..Plan::default()
    })
    .await;
    let mut random = StdRng::seed_from_u64(cluster.seed);
    let mut previous: Option<String> = None;
    let (mut killed, mut said) = (0, Vec::new());
    for turn in 0..TURNS {
        let mut body = script(&format!("question {turn}"), random.random());
        if let Some(id) = &previous {
            body["previous_response_id"] = id.as_str().into();
        }
        let answer = cluster
            .post("/v1/responses")
            .json(&body)
            .send()
            .await
            .unwrap();
        let answer = Answer::of(answer).await;
        assert!(
            answer.status == 200 && answer.complete,
            "turn {turn}: {answer:#?}\n{}",
            cluster.logs()
        );
        said.push(format!("user: question {turn}"));
        let attempt = cluster.home.upstream.attempts().pop().unwrap();
        assert_eq!(
            attempt.response_id.as_deref(),
            Some(answer.id()),
            "turn {turn}"
        );
        assert_eq!(
            texts(&attempt.history),
            said,
            "turn {turn}\n{}",
            cluster.logs()
        );
        said.push(format!("assistant: echo: question {turn}.."));
        previous = Some(answer.id().to_owned());

        if turn == TURNS / 2 {
            cluster
                .home
                .ok(&["accounts", "pause", &attempt.account])
                .await;
        }
        if turn > 0 && random.random_bool(0.35) {
            let owner = cluster.owner().await;
            println!("after turn {turn}: kill -9 of r{owner}");
            cluster.kill(owner).await;
            // It may still be down for some turns.
            if random.random()
                || cluster
                    .replicas
                    .iter()
                    .filter(|one| one.service.is_some())
                    .count()
                    < 2
            {
                for number in 0..cluster.replicas.len() {
                    if cluster.replicas[number].service.is_none() {
                        cluster.serve(number).await;
                    }
                }
            }
            killed += 1;
        }
    }
    println!("{killed} owners killed");
    cluster.booked().await;
    let turns = cluster.turns().await;
    assert_eq!(turns.len(), TURNS);
    let upstream = cluster.home.upstream.attempts();
    for turn in &turns {
        assert_eq!(turn["outcome"], "completed", "{turn:#}");
        let paid = upstream.iter().find(|attempt| {
            turn["response_id"] == attempt.response_id.as_deref().unwrap_or_default()
        });
        let usage = paid.unwrap().usage.unwrap();
        assert_eq!(turn["input_tokens"], usage.input, "{turn:#}");
        assert_eq!(turn["output_tokens"], usage.output, "{turn:#}");
    }
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

/// Who said what.
fn texts(history: &[Value]) -> Vec<String> {
    let said = |item: &Value| {
        let content = match &item["content"] {
            Value::String(text) => text.clone(),
            parts => {
                let parts = parts.as_array().unwrap().iter();
                parts.filter_map(|part| part["text"].as_str()).collect()
            }
        };
        format!("{}: {content}", item["role"].as_str().unwrap_or_default())
    };
    history.iter().map(said).collect()
}

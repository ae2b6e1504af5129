//! Scripts of two requests, the second at once and at another replica.

use std::time::Instant;

use serde_json::Value;

use super::times;
use crate::support::cluster::{Answer, Cluster, Plan, script};

/// By what the second request names the conversation of the first.
#[derive(Clone, Copy, Debug)]
enum By {
    Response,
    Token,
    Session,
}

#[tokio::test]
async fn goes_on_by_the_response_id_collected() {
    two_requests(By::Response, false).await;
}

#[tokio::test]
async fn goes_on_by_the_response_id_streamed() {
    two_requests(By::Response, true).await;
}

#[tokio::test]
async fn goes_on_by_the_token_collected() {
    two_requests(By::Token, false).await;
}

#[tokio::test]
async fn goes_on_by_the_token_streamed() {
    two_requests(By::Token, true).await;
}

#[tokio::test]
async fn goes_on_by_the_session_header_collected() {
    two_requests(By::Session, false).await;
}

#[tokio::test]
async fn goes_on_by_the_session_header_streamed() {
    two_requests(By::Session, true).await;
}

async fn two_requests(by: By, stream: bool) {
    let cluster = Cluster::start(Plan::default()).await;
    let rounds = times(20, 200);
    let began = Instant::now();
    for round in 0..rounds {
        let word = format!("conversation-{round}-");
        let (one, two) = (
            script(&format!("{word} one"), stream),
            script(&format!("{word} two"), stream),
        );
        let post = |body: &Value| {
            let request = cluster.post("/v1/responses").json(body);
            match by {
                By::Session => request.header("session-id", &word),
                By::Response | By::Token => request,
            }
        };
        let first = Answer::of(post(&one).send().await.unwrap()).await;
        let id = first.id();
        let second = match by {
            By::Response => {
                let mut two = two;
                two["previous_response_id"] = id.into();
                post(&two)
            }
            By::Token => post(&two).header("x-codex-turn-state", first.token()),
            By::Session => post(&two),
        };
        let second = Answer::of(second.send().await.unwrap()).await;
        assert!(
            second.status == 200 && second.complete,
            "{by:?} {round}: {second:#?}\n{}",
            cluster.logs()
        );
        let sockets = cluster.sockets_of(&word);
        assert!(
            sockets.len() <= 1,
            "{by:?} {round}: {sockets:?}\n{}",
            cluster.logs()
        );
    }
    println!("{rounds} scripts by {by:?} in {:?}", began.elapsed());
    cluster.booked().await;
    assert_eq!(cluster.turns().await.len(), 2 * rounds);
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
    if matches!(by, By::Response) {
        let attempts = cluster.home.upstream.attempts();
        let whole = attempts.iter().filter(|attempt| {
            let said = attempt
                .history
                .iter()
                .map(Value::to_string)
                .collect::<String>();
            said.contains(" one") && said.contains("echo: ") && said.contains(" two")
        });
        assert_eq!(whole.count(), rounds, "the second knows the first");
    }
}

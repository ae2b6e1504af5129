//! One use of a single-use refresh token, over all replicas: whoever asks at the same moment, and whoever dies in the middle.

use std::time::{Duration, Instant};

use drawbridge::{config::Transport, routing::Lifecycle, server::Server};
use futures_util::future::join_all;
use loadtest::upstream::State;
use serde_json::Value;

use crate::support::{
    cluster::{Answer, Cluster, Plan as ClusterPlan, script},
    house::{House, Plan, events, text_of},
};

/// Races of one run, and of a full one.
const RACES: usize = 30;
const ALL_RACES: usize = 300;
/// Turns of one race.
const TURNS: usize = 50;

async fn serves(house: &House, server: &Server, name: &str) {
    let answer = house.codex_turn_at(server, name, name, "hi").await;
    let status = answer.status();
    let answer = events(answer).await;
    assert_eq!(
        text_of(&answer),
        "echo: hi..",
        "{name}: {status} {answer:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_fifty_turns_over_three_replicas_with_an_expired_token_one_exchanges_and_nobody_is_condemned()
 {
    let full = std::env::vars().any(|(name, _)| name == "DRAWBRIDGE_TEST_FULL");
    let races = if full { ALL_RACES } else { RACES };
    let house = House::planned(Plan {
        transport: Transport::Http,
        ..Plan::default()
    })
    .await;
    let others = [house.neighbour().await, house.neighbour().await];
    let servers = [&house.server, &others[0], &others[1]];
    let alice = house.upstream.account("alice");
    let began = Instant::now();
    for race in 0..races {
        // Every other race the rows say that it has expired; else upstream alone knows, and says 401.
        if race % 2 == 0 {
            house
                .client
                .batch_execute(
                    "update account_credentials set access_expires_at = clock_timestamp() - interval '1 minute';
                     update bus_versions set version = version + 1 where topic = 'accounts';
                     notify drawbridge, 'accounts'",
                )
                .await
                .unwrap();
        }
        alice.expire();
        alice.delay_exchange(Duration::from_millis(race as u64 % 7 * 10));
        let names: Vec<String> = (0..TURNS).map(|turn| format!("{race}-{turn}")).collect();
        let turns = names.iter().enumerate();
        join_all(turns.map(|(turn, name)| serves(&house, servers[turn % 3], name))).await;
        assert_eq!((alice.exchanges(), alice.reuses()), (race + 1, 0), "{race}");
    }
    println!(
        "{races} races of {TURNS} turns, one exchange each, {:?}",
        began.elapsed()
    );
    let accounts = house.accounts().list().await.unwrap();
    assert_eq!(accounts[0].lifecycle, Lifecycle::Active);
    let claims = house.client.query("select from refresh_claims", &[]).await;
    assert!(claims.unwrap().is_empty(), "nobody keeps a claim");
    let turns = house.turns().await;
    assert_eq!(turns.len(), races * TURNS);
    assert!(turns.iter().all(|turn| turn["outcome"] == "completed"));
}

/// Three processes; the one that exchanges is killed when the exchange has come so far.
async fn killed_when(delay: bool, spent: impl Fn(&State) -> bool) -> (Cluster, Answer) {
    let mut cluster = Cluster::start(ClusterPlan {
        replicas: 3,
        settings: &[("DRAWBRIDGE_UPSTREAM_TRANSPORT", "http")],
        ..ClusterPlan::default()
    })
    .await;
    let alice = cluster.home.upstream.account("alice");
    if delay {
        alice.delay_exchange(Duration::from_secs(60));
    } else {
        alice.delay_answer(Duration::from_secs(60));
    }
    alice.expire();
    let turn = cluster
        .post_at(0, "/v1/responses")
        .json(&script("hi", true));
    let turn = tokio::spawn(async move { drop(turn.send().await) });
    cluster
        .home
        .upstream
        .wait("the exchange of the one that is killed", spent)
        .await;
    alice.delay_exchange(Duration::ZERO);
    alice.delay_answer(Duration::ZERO);
    cluster.kill(0).await;
    turn.await.unwrap();
    let answers = (0..6).map(|turn| {
        let turn = cluster
            .post_at(1 + turn % 2, "/v1/responses")
            .json(&script("hi", true));
        async { Answer::of(turn.send().await.unwrap()).await }
    });
    let mut answers = join_all(answers).await;
    let statuses: Vec<u16> = answers.iter().map(|answer| answer.status).collect();
    assert!(
        statuses.iter().all(|status| *status == statuses[0]),
        "all read the same: {statuses:?}"
    );
    (cluster, answers.remove(0))
}

async fn status(cluster: &Cluster) -> Value {
    let row = cluster
        .client
        .query_one("select to_jsonb(a) from accounts a", &[])
        .await;
    row.unwrap().get::<_, Value>(0)["status"].clone()
}

#[tokio::test]
async fn a_refresher_that_is_killed_before_the_token_is_spent_leaves_the_account_usable() {
    let (cluster, answer) = killed_when(true, |state| state.exchanging == 1).await;
    assert!(answer.complete, "{answer:?}");
    assert_eq!(status(&cluster).await, "active");
    let alice = cluster.home.upstream.account("alice");
    assert_eq!((alice.exchanges(), alice.reuses()), (1, 0));
}

#[tokio::test]
async fn a_refresher_that_is_killed_with_the_new_tokens_leaves_an_account_that_says_it_needs_a_login()
 {
    let (cluster, answer) = killed_when(false, |state| state.logins["alice"].exchanges == 1).await;
    assert_eq!((answer.status, answer.code()), (503, "no_accounts"));
    assert_eq!(status(&cluster).await, "reauth_required");
    let alice = cluster.home.upstream.account("alice");
    assert_eq!(
        (alice.exchanges(), alice.reuses()),
        (1, 1),
        "asked once more"
    );
}

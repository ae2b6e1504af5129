//! Turns while logins expire and end: one exchange serves everybody, a refused login costs its account alone, and no client ever reads
//! about tokens.

use std::time::{Duration, Instant};

use drawbridge::{account::Listed, config::Transport, routing::Lifecycle};
use futures_util::future::join_all;
use loadtest::upstream::Upstream;

use crate::support::house::{House, Plan, events, text_of};

/// A house whose turns each show their credential: an open socket is not asked for it again.
async fn over_http(accounts: &'static [&'static str]) -> House {
    House::planned(Plan {
        accounts,
        transport: Transport::Http,
        ..Plan::default()
    })
    .await
}

/// A thread that stays with this account.
async fn thread_at(house: &House, account: &str) -> String {
    for n in 0..100 {
        let thread = format!("thread-{n}");
        events(house.codex_turn(&thread, &thread, "hi").await).await;
        if house.upstream.attempts().last().unwrap().account == account {
            return thread;
        }
    }
    panic!("100 threads, and none at {account}");
}

async fn served(house: &House, thread: &str, turn: &str) {
    let answer = events(house.codex_turn(thread, turn, "hi").await).await;
    assert_eq!(text_of(&answer), "echo: hi..");
}

fn last_account(upstream: &Upstream) -> String {
    upstream.attempts().last().unwrap().account.clone()
}

async fn lifecycle(house: &House, account: &str) -> Lifecycle {
    let accounts = house.accounts().list().await.unwrap();
    let named = |listed: &&Listed| listed.label.as_deref() == Some(account);
    accounts.iter().find(named).unwrap().lifecycle
}

#[tokio::test]
async fn fifty_turns_at_once_with_an_expired_token_cost_one_exchange() {
    let house = House::start().await;
    let alice = house.upstream.account("alice");
    alice.expire();
    alice.delay_exchange(Duration::from_millis(100));
    let names: Vec<String> = (0..50).map(|n| format!("turn-{n}")).collect();
    join_all(names.iter().map(|name| served(&house, name, name))).await;
    assert_eq!((alice.exchanges(), alice.reuses()), (1, 0));
    let turns = house.turns().await;
    assert_eq!(turns.len(), 50);
    assert!(turns.iter().all(|turn| turn["outcome"] == "completed"));
}

#[tokio::test]
async fn a_login_that_has_ended_costs_its_account_and_no_turn() {
    let house = over_http(&["alice", "bob"]).await;
    let thread = thread_at(&house, "alice").await;
    let alice = house.upstream.account("alice");
    alice.revoke();
    served(&house, &thread, "turn-1").await;
    assert_eq!(last_account(&house.upstream), "bob");
    assert_eq!(lifecycle(&house, "alice").await, Lifecycle::ReauthRequired);
    assert_eq!(lifecycle(&house, "bob").await, Lifecycle::Active);

    // Known by now: nobody asks upstream about alice again.
    let refused = house.upstream.attempts().len();
    for turn in ["turn-2", "turn-3", "turn-4"] {
        served(&house, &thread, turn).await;
    }
    let attempts = house.upstream.attempts();
    assert!(
        attempts[refused..]
            .iter()
            .all(|attempt| attempt.account == "bob")
    );
    assert_eq!(alice.exchanges(), 0);
}

#[tokio::test]
async fn when_every_login_has_ended_the_client_reads_that_nobody_serves_and_nothing_of_tokens() {
    let house = House::start().await;
    house.upstream.account("alice").revoke();
    let answer = house.codex_turn("t", "turn-1", "hi").await;
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));
    let text = answer.text().await.unwrap();
    assert!(text.contains(r#""code":"no_accounts""#), "{text}");
    for leak in ["token", "alice", "refresh", "invalidated"] {
        assert!(!text.contains(leak), "{text}");
    }
}

#[tokio::test]
async fn a_token_endpoint_that_fails_condemns_nobody() {
    let house = over_http(&["alice", "bob"]).await;
    let thread = thread_at(&house, "alice").await;
    let alice = house.upstream.account("alice");
    alice.expire();
    alice.fail_exchange(503);
    served(&house, &thread, "turn-1").await;
    assert_eq!(last_account(&house.upstream), "bob");
    assert_eq!(lifecycle(&house, "alice").await, Lifecycle::Active);

    // It ranks last for a while; when nobody else can serve, it does.
    let bob = house.account_id("bob").await;
    house.accounts().pause(bob).await.unwrap();
    let began = Instant::now();
    let mut n = 2;
    while last_account(&house.upstream) != "alice" {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "alice never serves again"
        );
        let answer = house.codex_turn(&thread, &format!("turn-{n}"), "hi").await;
        drop(answer.bytes().await);
        n += 1;
    }
    assert_eq!(alice.exchanges(), 1);
}

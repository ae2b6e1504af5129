//! What Postgres refuses for a while is written later; what a standby never heard of is written again.

use std::time::Duration;

use drawbridge::{
    ids::ScopeId,
    ledger::{Answer, Outcome},
    task::Tasks,
};
use serde_json::json;

use super::{agreed, ended, open, opening, replica, reported, settlement, text};
use crate::support::{store::Store, wait::until};

/// Makes writes fail as they do when the disk is full.
async fn fill_disk(store: &Store, writes: &str) {
    let fill = format!(
        "create sequence tries;
        create function full_disk() returns trigger language plpgsql as
            $$ begin perform nextval('tries'); raise exception using errcode = 'disk_full'; end $$;
        create trigger full_disk before {writes} for each row execute function full_disk()"
    );
    store.client.batch_execute(&fill).await.unwrap();
}

/// When it was tried so often.
async fn make_room(store: &Store, after: i64) {
    let tries = "select last_value from tries";
    until("it was tried", async || {
        let row = store.client.query_one(tries, &[]).await.unwrap();
        row.get::<_, i64>(0) >= after
    })
    .await;
    let room = "drop function full_disk() cascade; drop sequence tries";
    store.client.batch_execute(room).await.unwrap();
}

#[tokio::test]
async fn a_turn_is_booked_in_the_background_when_there_is_room_for_it_again() {
    let store = Store::direct().await;
    let (ledger, _) = replica(&store).await;
    let mut turn = open(&ledger, ScopeId::new(), "t").await;
    turn.end(ended(reported(10, 1)));
    let tasks = Tasks::new();
    fill_disk(&store, "update on turns").await;
    ledger
        .clone()
        .settle_until_booked(turn, settlement(Outcome::Completed), &tasks);
    make_room(&store, 2).await;
    assert!(tasks.drained(Duration::from_secs(10)).await);
    ledger.flush().await;
    let side = agreed(&ledger).await;
    assert_eq!((side.input_tokens, side.estimated), (10, 0));
}

#[tokio::test]
async fn beside_an_entry_that_the_log_cannot_take_the_others_wait_until_there_is_room() {
    let store = Store::direct().await;
    let (ledger, _) = replica(&store).await;
    let good = settlement(Outcome::Refused).answer;
    let poison = Answer {
        explanation: Some(json!("\0")),
        ..good.clone()
    };
    fill_disk(&store, "insert on request_log").await;
    for answer in [&good, &poison, &good] {
        ledger.refuse(&opening(ScopeId::new(), None).request, answer);
    }
    tokio::join!(ledger.flush(), make_room(&store, 2));
    let rows = "select count(*)::text from request_log";
    assert_eq!(text(&store.client, rows).await, "2");
}

/// What a standby knows that heard nothing since.
async fn replicate(store: &Store) {
    let keep = "create table standby as select * from turns";
    store.client.batch_execute(keep).await.unwrap();
}

async fn promote(store: &Store) {
    let promote = "truncate turns; insert into turns select * from standby; drop table standby";
    store.client.batch_execute(promote).await.unwrap();
}

#[tokio::test]
async fn a_retry_of_which_only_the_beginning_was_forgotten_is_booked_once_as_a_turn_of_its_own() {
    for store in Store::both_ways().await {
        let (ledger, _) = replica(&store).await;
        let scope = ScopeId::new();
        let mut first = open(&ledger, scope, "t").await;
        first.end(ended(reported(7, 1)));
        let failed = settlement(Outcome::Failed);
        ledger.settle(&first, &failed).await.unwrap();

        replicate(&store).await;
        let mut retry = open(&ledger, scope, "t").await;
        assert!(retry.is_retry());
        promote(&store).await;
        retry.end(ended(reported(1000, 100)));
        // Half of it lands.
        fill_disk(&store, "update on turns").await;
        assert!(ledger.settle(&retry, &failed).await.is_err());
        make_room(&store, 1).await;
        for first in [true, false] {
            let settled = ledger.settle(&retry, &failed).await;
            assert_eq!(settled.unwrap().turn, first);
        }
        let rows = "select string_agg(concat_ws(' ', outcome, requests, jsonb_array_length(attempts), input_tokens), ', ' order by turn_id) from turns";
        assert_eq!(
            text(&store.client, rows).await,
            "failed 1 1 7, failed 1 1 1000"
        );

        // What is repeated next is that, and what another retry has is not booked again.
        let mut next = open(&ledger, scope, "t").await;
        assert_eq!(next.turn(), retry.request().id);
        next.end(ended(reported(20, 2)));
        for _ in 0..2 {
            assert!(!ledger.settle(&retry, &failed).await.unwrap().turn);
        }
        let done = settlement(Outcome::Completed);
        assert!(ledger.settle(&next, &done).await.unwrap().turn);
        assert!(!ledger.settle(&retry, &failed).await.unwrap().turn);
        let booked = "failed 1 1 7, completed 2 2 1020";
        assert_eq!(text(&store.client, rows).await, booked);
        ledger.flush().await;
        assert_eq!(agreed(&ledger).await.attempts, 3);
    }
}

#[tokio::test]
async fn a_retry_whose_turn_was_forgotten_altogether_is_booked_once_with_what_it_repeats() {
    let store = Store::direct().await;
    let (ledger, _) = replica(&store).await;
    let scope = ScopeId::new();
    replicate(&store).await;
    let mut first = open(&ledger, scope, "t").await;
    first.end(ended(reported(7, 1)));
    let failed = settlement(Outcome::Failed);
    ledger.settle(&first, &failed).await.unwrap();
    let mut retry = open(&ledger, scope, "t").await;
    promote(&store).await;
    retry.end(ended(reported(1000, 100)));
    for first in [true, false] {
        let settled = ledger.settle(&retry, &settlement(Outcome::Completed)).await;
        assert_eq!(settled.unwrap().turn, first);
    }
    ledger.flush().await;
    assert_eq!(agreed(&ledger).await.input_tokens, 1007);
}

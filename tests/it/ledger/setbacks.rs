//! What Postgres refuses for a while is written later.

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

//! A request begins once, whichever replica it comes to, and one that nobody ends is ended.

use drawbridge::{
    ids::ScopeId,
    lease::Key,
    ledger::{NotOpened, Opening, Outcome},
    task::Tasks,
};

use super::{Replica, answered, bury, head, number, opening};
use crate::support::{store::Store, wait::until};

#[tokio::test]
async fn an_opening_that_is_taken_back_leaves_the_lease_idle() {
    for store in Store::both_ways().await {
        let scope = ScopeId::new();
        let one = Replica::new(&store).await;
        let held = one.claim(scope, Key::fork()).await.unwrap();
        let opening = opening(scope, Some(&held));
        let (request, fence) = (opening.request.clone(), opening.fence);
        one.ledger.open(opening).await.unwrap();
        let tasks = Tasks::new();
        one.ledger.clone().withdraw(&request, fence, &tasks);
        until("it is idle", async || {
            let row = one.row(scope, held.lease).await.unwrap();
            row.busy_turn.is_none()
        })
        .await;
        let released = "select count(*) from turns where state = 'released' and requests = 0";
        assert_eq!(number(&store, released).await, 1);
        one.begin(scope, &held).await;
        tasks.stop();
    }
}

#[tokio::test]
async fn who_takes_back_an_opening_leaves_the_same_request_to_the_replica_that_took_the_lease() {
    for store in Store::both_ways().await {
        let scope = ScopeId::new();
        let (slow, other) = (Replica::new(&store).await, Replica::new(&store).await);
        let held = slow.claim(scope, Key::fork()).await.unwrap();
        let forwarded = opening(scope, Some(&held));
        // Its opening waits for a connection meanwhile.
        let seen = other.row(scope, held.lease).await.unwrap();
        let taken = other.take(scope, &seen).await.unwrap();
        let mut here = opening(scope, Some(&taken));
        here.request = forwarded.request.clone();
        let turn = other.ledger.open(here).await.unwrap();

        let tasks = Tasks::new();
        let withdraw = slow.ledger.clone();
        let withdrawn = withdraw.withdraw(&forwarded.request, forwarded.fence, &tasks);
        withdrawn.await.unwrap();
        let row = other.row(scope, held.lease).await.unwrap();
        assert_eq!(row.busy_turn, Some(turn.request().id));
        let settled = other.finish(&turn, &answered(Some("r"))).await;
        assert_eq!(settled, (true, true));
        let booked = "select count(*) from turns where outcome = 'completed' and requests = 1";
        assert_eq!(number(&store, booked).await, 1);
    }
}

#[tokio::test]
async fn a_turn_that_its_living_owner_never_books_is_swept_and_leaves_the_lease_idle() {
    for store in Store::both_ways().await {
        let scope = ScopeId::new();
        let (one, other) = (Replica::new(&store).await, Replica::new(&store).await);
        let held = one.claim(scope, Key::fork()).await.unwrap();
        let running = one.claim(scope, Key::fork()).await.unwrap();
        let dead = Replica::new(&store).await;
        let paused = dead.claim(scope, Key::fork()).await.unwrap();
        one.begin(scope, &held).await;
        let age = "update turns set opened_at = opened_at - interval '181 minutes'";
        store.client.batch_execute(age).await.unwrap();
        let runs = one.begin(scope, &running).await;
        let late = dead.begin(scope, &paused).await;
        bury(&store, dead.boot).await;

        let swept = tokio::join!(one.ledger.sweep(), other.ledger.sweep());
        assert_eq!(swept.0.unwrap() + swept.1.unwrap(), 2);
        let row = one.row(scope, held.lease).await.unwrap();
        assert_eq!((row.busy_turn, row.generation), (None, held.generation));
        one.begin(scope, &held).await;
        let row = one.row(scope, running.lease).await.unwrap();
        assert_eq!(row.busy_turn, Some(runs.request().id));
        // That of a dead owner waits for an heir, and until then its answer is the head.
        assert_eq!(dead.finish(&late, &answered(Some("r"))).await, (true, true));
        assert_eq!(head(&store, paused.lease).await.as_deref(), Some("r"));
    }
}

#[tokio::test]
async fn a_request_begins_once_on_whichever_replica_and_whatever_came_of_it() {
    for store in Store::both_ways().await {
        let (one, other) = (Replica::new(&store).await, Replica::new(&store).await);
        for (client_turn, rounds) in [(None, 30), (Some("turn"), 30)] {
            for _ in 0..rounds {
                let scope = ScopeId::new();
                let here = one.claim(scope, Key::fork()).await.unwrap();
                let there = other.claim(scope, Key::fork()).await.unwrap();
                let mine = Opening {
                    client_turn: client_turn.map(Into::into),
                    ..opening(scope, Some(&here))
                };
                let theirs = Opening {
                    fence: opening(scope, Some(&there)).fence,
                    ..mine.clone()
                };
                let results = tokio::join!(
                    one.ledger.open(mine.clone()),
                    other.ledger.open(theirs.clone())
                );
                let (winner, opened, idle) = match results {
                    (Ok(opened), Err(NotOpened::Begun)) => (&one, opened, there.lease),
                    (Err(NotOpened::Begun), Ok(opened)) => (&other, opened, here.lease),
                    other => panic!("{other:?}"),
                };
                let row = one.row(scope, idle).await.unwrap();
                assert_eq!((row.busy_turn, row.turn_seq), (None, 0));

                let mut failed = answered(None);
                failed.answer.outcome = Outcome::Failed;
                assert_eq!(winner.finish(&opened, &failed).await, (true, true));
                for (replica, again) in [(&one, mine), (&other, theirs)] {
                    let repeated = replica.ledger.open(again).await;
                    assert!(matches!(repeated, Err(NotOpened::Begun)), "{repeated:?}");
                }
            }
        }
    }
}

#[tokio::test]
async fn a_request_that_another_retry_followed_does_not_begin_again() {
    for store in Store::both_ways().await {
        let scope = ScopeId::new();
        let one = Replica::new(&store).await;
        let held = one.claim(scope, Key::fork()).await.unwrap();
        let mut failed = answered(None);
        failed.answer.outcome = Outcome::Failed;
        let mut openings = Vec::new();
        for _ in 0..3 {
            let retry = Opening {
                client_turn: Some("turn".into()),
                ..opening(scope, Some(&held))
            };
            openings.push(retry.clone());
            let opened = one.ledger.open(retry).await.unwrap();
            for again in &openings {
                let repeated = one.ledger.open(again.clone()).await;
                assert!(matches!(repeated, Err(NotOpened::Fenced)), "busy");
            }
            assert_eq!(one.finish(&opened, &failed).await, (true, true));
            for again in &openings {
                let repeated = one.ledger.open(again.clone()).await;
                assert!(matches!(repeated, Err(NotOpened::Begun)), "{repeated:?}");
            }
        }
        assert_eq!(number(&store, "select count(*) from turns").await, 1);
        let row = one.row(scope, held.lease).await.unwrap();
        assert_eq!((row.busy_turn, row.turn_seq), (None, 3));
    }
}

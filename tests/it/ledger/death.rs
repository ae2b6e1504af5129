//! What is used is booked once, whatever dies in between.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use drawbridge::{
    ids::{AccountId, BootId, ScopeId, TurnId},
    ledger::{Ledger, Metered, Outcome},
    protocol::usage::Usage,
    task::Tasks,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::sync::watch;

use super::{
    agreed, bury, ended, open, opening, reconcile, replica, reported, settlement, text, to,
};
use crate::support::store::Store;

const HOUR: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn turns_of_the_dead_are_settled_once_by_estimate_and_those_of_the_living_are_left_alone() {
    for store in Store::both_ways().await {
        let (dead, boot) = replica(&store).await;
        let (one, _) = replica(&store).await;
        let (other, _) = replica(&store).await;
        let unknown = Ledger::new(
            store.db.clone(),
            watch::channel(BootId::new()).1,
            &Tasks::new(),
        );
        let scope = ScopeId::new();
        let mut late = open(&dead, scope, "a").await;
        for _ in 0..300 {
            dead.open(opening(scope, None)).await.unwrap();
        }
        unknown.open(opening(scope, None)).await.unwrap();
        let living = open(&one, scope, "b").await;
        let stuck = open(&one, scope, "c").await;
        store
            .client
            .execute(
                "update turns set opened_at = now() - interval '181 minutes' where turn_id = $1",
                &[&stuck.turn()],
            )
            .await
            .unwrap();
        bury(&store.client, boot).await;

        let (first, second) = tokio::join!(one.sweep(), other.sweep());
        assert_eq!(first.unwrap() + second.unwrap(), 303);
        assert_eq!(one.sweep().await.unwrap(), 0);
        let row = "select distinct concat_ws(' ', state, input_tokens, output_tokens, estimated, cost_nanodollars, attempts -> 0 ->> 'class') from turns where outcome = 'lost'";
        assert_eq!(
            text(&store.client, row).await,
            "settled 100 0 t 175000 lost"
        );
        let side = agreed(&one).await;
        assert_eq!((side.turns, side.attempts, side.estimated), (303, 303, 303));

        // Whom others think dead may send nothing more.
        assert!(!dead.attempt(&mut late, to(AccountId::new())).await.unwrap());
        // Its client comes back elsewhere.
        let retry = open(&other, scope, "a").await;
        assert_eq!((retry.is_retry(), retry.turn()), (true, late.turn()));
        // Nor book what is another's by now.
        let settled = dead.settle(&late, &settlement(Outcome::Completed)).await;
        assert!(!settled.unwrap().turn);
        dead.flush().await;
        assert!(
            one.settle(&living, &settlement(Outcome::Completed))
                .await
                .unwrap()
                .turn
        );
    }
}

#[tokio::test]
async fn who_was_given_up_and_comes_back_replaces_the_estimate_by_what_upstream_said_once() {
    for store in Store::both_ways().await {
        let (paused, boot) = replica(&store).await;
        let (peer, _) = replica(&store).await;
        let mut turn = open(&paused, ScopeId::new(), "t").await;
        bury(&store.client, boot).await;
        assert_eq!(peer.sweep().await.unwrap(), 1);
        assert_eq!(agreed(&peer).await.estimated, 1);

        turn.end(ended(reported(1000, 100)));
        for first in [true, false] {
            let settled = paused.settle(&turn, &settlement(Outcome::Completed)).await;
            assert_eq!(settled.unwrap().turn, first);
        }
        paused.flush().await;
        let row = "select concat_ws(' ', state, outcome, response_id, input_tokens, output_tokens, estimated) from turns";
        let told = "settled completed resp_1 1000 100 f";
        assert_eq!(text(&store.client, row).await, told);
        let side = agreed(&peer).await;
        assert_eq!(
            (side.turns, side.input_tokens, side.estimated),
            (1, 1000, 0)
        );
    }
}

#[tokio::test]
async fn an_opening_whose_answer_was_lost_is_taken_back_without_a_trace_of_use() {
    let store = Store::direct().await;
    let (ledger, _) = replica(&store).await;
    let tasks = Tasks::new();
    let scope = ScopeId::new();
    let fresh = ledger.open(opening(scope, Some("t"))).await.unwrap();
    ledger.clone().withdraw(fresh.request(), None, &tasks);
    assert!(tasks.drained(Duration::from_secs(10)).await);
    let row = "select concat_ws(' ', state, outcome, jsonb_array_length(attempts), requests, input_tokens) from turns";
    assert_eq!(text(&store.client, row).await, "released failed 0 0 0");

    let mut failed = open(&ledger, scope, "t").await;
    failed.end(ended(reported(7, 1)));
    ledger
        .settle(&failed, &settlement(Outcome::Failed))
        .await
        .unwrap();
    let tasks = Tasks::new();
    let retry = open(&ledger, scope, "t").await;
    ledger.clone().withdraw(retry.request(), None, &tasks);
    assert!(tasks.drained(Duration::from_secs(10)).await);
    assert_eq!(text(&store.client, row).await, "settled failed 1 1 7");
    ledger.flush().await;
    assert_eq!(agreed(&ledger).await.input_tokens, 7);
}

#[tokio::test]
async fn a_turn_is_booked_in_the_background_when_the_database_is_back() {
    let store = Store::direct().await;
    let (ledger, _) = replica(&store).await;
    let mut turn = open(&ledger, ScopeId::new(), "t").await;
    turn.end(ended(reported(10, 1)));
    let tasks = Tasks::new();
    // A lock in the way is what a database that hangs looks like.
    store
        .client
        .batch_execute("begin; lock table turns")
        .await
        .unwrap();
    ledger
        .clone()
        .settle_until_booked(turn, settlement(Outcome::Completed), &tasks);
    assert!(!tasks.drained(Duration::from_millis(300)).await);
    // The connection that waits is lost.
    let kill = "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";
    store.client.query_one(kill, &[]).await.unwrap();
    store.client.batch_execute("commit").await.unwrap();
    assert!(tasks.drained(Duration::from_secs(10)).await);
    ledger.flush().await;
    assert_eq!(agreed(&ledger).await.input_tokens, 10);
}

#[tokio::test]
async fn a_log_that_died_with_its_process_is_written_from_the_ledger() {
    for store in Store::both_ways().await {
        let (died, _) = replica(&store).await;
        let (ledger, _) = replica(&store).await;
        let scope = ScopeId::new();
        let mut turns = Vec::new();
        for outcome in [Outcome::Failed, Outcome::Completed] {
            let mut turn = open(&died, scope, "t").await;
            turn.end(ended(reported(10, 1)));
            died.settle(&turn, &settlement(outcome)).await.unwrap();
            turns.push(turn);
        }
        died.flush().await;
        store
            .client
            .batch_execute("delete from request_log")
            .await
            .unwrap();
        assert_eq!(reconcile(&ledger).await.differing, [turns[0].turn()]);
        assert_eq!(
            ledger.mend(HOUR).await.unwrap(),
            0,
            "it may still be in a queue"
        );
        settled_long_ago(&store).await;
        assert_eq!(ledger.mend(HOUR).await.unwrap(), 1);
        assert_eq!(ledger.mend(HOUR).await.unwrap(), 0);
        // The process was only slow: its own entries come too late and change nothing.
        for turn in &turns {
            died.settle(turn, &settlement(Outcome::Completed))
                .await
                .unwrap();
        }
        died.flush().await;
        let rows = "select string_agg(concat_ws(' ', outcome, status, input_tokens), ', ' order by request_id) from request_log";
        assert_eq!(text(&store.client, rows).await, "failed 10, completed 10");
        assert_eq!(agreed(&ledger).await.input_tokens, 20);
    }
}

async fn settled_long_ago(store: &Store) {
    let age = "update turns set settled_at = settled_at - interval '2 minutes'";
    store.client.batch_execute(age).await.unwrap();
}

/// What upstream saw of one attempt: whose, and the usage that it reported before the process died, if it did.
type Seen = Mutex<Vec<(TurnId, Option<Usage>)>>;

/// A turn as a process runs it: up to three attempts, some reported, some cut.
async fn run_turn(ledger: &Ledger, scope: ScopeId, rng: &mut StdRng, upstream: &Seen) {
    let client_turn = format!("turn {}", rng.random_range(0..20));
    let mut turn = open(ledger, scope, &client_turn).await;
    let mut attempts = rng.random_range(1..=3);
    loop {
        upstream.lock().unwrap().push((turn.request().id, None));
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..3))).await;
        let metered = if rng.random_bool(0.6) {
            reported(rng.random_range(1..1000), rng.random_range(1..1000))
        } else {
            Metered::Unknown { visible_bytes: 8 }
        };
        if let Metered::Reported(usage) = metered {
            upstream
                .lock()
                .unwrap()
                .iter_mut()
                .rfind(|seen| seen.0 == turn.request().id)
                .unwrap()
                .1 = Some(usage);
        }
        turn.end(ended(metered));
        attempts -= 1;
        if attempts == 0
            || !ledger
                .attempt(&mut turn, to(AccountId::new()))
                .await
                .unwrap()
        {
            break;
        }
    }
    let outcome = if rng.random_bool(0.5) {
        Outcome::Completed
    } else {
        Outcome::Failed
    };
    ledger.settle(&turn, &settlement(outcome)).await.unwrap();
}

#[tokio::test]
async fn killed_at_any_moment_the_ledger_has_every_attempt_that_upstream_saw_and_the_log_agrees() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut seeds = StdRng::seed_from_u64(seed);
    for store in Store::both_ways().await {
        let (survivor, _) = replica(&store).await;
        let scope = ScopeId::new();
        let upstream = Arc::new(Seen::default());
        for _ in 0..4 {
            let (_, boot) = replica(&store).await;
            let fate = upstream.lock().unwrap().len() + seeds.random_range(1..100);
            // Everything of the process runs here, its connections included.
            let process = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            let (db, seed) = (store.another(), seeds.random::<u64>());
            let seen = Arc::clone(&upstream);
            process.spawn(async move {
                let victim = Ledger::new(db, watch::channel(boot).1, &Tasks::new());
                let turns = (0..12).map(|index| {
                    let mut rng = StdRng::seed_from_u64(seed ^ index);
                    let (victim, upstream) = (&victim, &seen);
                    async move {
                        loop {
                            run_turn(victim, scope, &mut rng, upstream).await;
                        }
                    }
                });
                futures_util::future::join_all(turns).await
            });
            while upstream.lock().unwrap().len() < fate {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            process.shutdown_background();
            bury(&store.client, boot).await;
        }
        // A statement that was on its way may land after the death, and is found by a later sweep.
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        let quiet = "select concat((select count(*) from turns where state = 'open'), ' ', (select count(*) from pg_stat_activity
            where datname = current_database() and state = 'active' and pid <> pg_backend_pid()))";
        while text(&store.client, quiet).await != "0 0" {
            survivor.sweep().await.unwrap();
            assert!(tokio::time::Instant::now() < deadline, "turns stay open");
        }
        settled_long_ago(&store).await;
        survivor.mend(HOUR).await.unwrap();
        let side = agreed(&survivor).await;

        let booked = "select (a ->> 'request')::uuid, (a ->> 'estimated')::bool, coalesce((a -> 'usage' ->> 'input')::bigint, 0),
            coalesce((a -> 'usage' ->> 'output')::bigint, 0)
            from turns, jsonb_array_elements(attempts) with ordinality as e(a, n) order by turn_id, n";
        let mut booked: Vec<(TurnId, bool, u64, u64)> = store
            .client
            .query(booked, &[])
            .await
            .unwrap()
            .iter()
            .map(|row| {
                (
                    row.get(0),
                    row.get(1),
                    row.get::<_, i64>(2).unsigned_abs(),
                    row.get::<_, i64>(3).unsigned_abs(),
                )
            })
            .collect();
        assert_eq!(side.attempts, i64::try_from(booked.len()).unwrap());
        assert!(side.estimated > 0, "the test says nothing: {side:?}");
        for (request, usage) in upstream.lock().unwrap().drain(..) {
            // In order of their attempts, so the first one left is the same.
            let index = booked
                .iter()
                .position(|booked| booked.0 == request)
                .unwrap_or_else(|| panic!("{request} is missing"));
            let (_, estimated, input, output) = booked.remove(index);
            match usage {
                _ if estimated => {}
                Some(usage) => {
                    assert_eq!((input, output), (usage.input, usage.output), "{request}")
                }
                None => panic!("{request} was never reported and is not marked"),
            }
        }
        // On record, and killed before it could be sent: marked, too.
        assert!(booked.iter().all(|(_, estimated, ..)| *estimated));
    }
}

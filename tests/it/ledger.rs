//! What is used is booked once.
#![expect(
    clippy::disallowed_methods,
    reason = "looks behind the back of the code under test, on a connection of its own"
)]

mod death;
mod setbacks;

use std::time::Duration;

use drawbridge::{
    ids::{AccountId, ApiKeyId, BootId, ScopeId, TurnId},
    ledger::{
        Answer, End, Ledger, Metered, Opened, Opening, Outcome, Reconciliation, Request,
        STATEMENTS, Settlement, Sticky, Try, price::Tier,
    },
    protocol::usage::Usage,
    task::Tasks,
};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio_postgres::Client;

use crate::support::{store::Store, wait::until};

/// A replica's ledger, under an incarnation that is registered.
async fn replica(store: &Store) -> (Ledger, BootId) {
    let boot = BootId::new();
    store
        .client
        .execute(
            "insert into bridge_replicas (boot_id, replica_name, expires_at) values ($1, 'test', now() + interval '1 hour')",
            &[&boot],
        )
        .await
        .unwrap();
    (
        Ledger::new(store.db.clone(), watch::channel(boot).1, &Tasks::new()),
        boot,
    )
}

async fn bury(client: &Client, boot: BootId) {
    let bury = "update bridge_replicas set dead_at = now() where boot_id = $1";
    assert_eq!(client.execute(bury, &[&boot]).await.unwrap(), 1);
}

async fn account(client: &Client) -> AccountId {
    let id = AccountId::new();
    client
        .execute("insert into accounts (account_id) values ($1)", &[&id])
        .await
        .unwrap();
    id
}

fn to(account: AccountId) -> Try {
    Try {
        account,
        transport: "http",
        request_bytes: 400,
    }
}

fn opening(scope: ScopeId, client_turn: Option<&str>) -> Opening {
    Opening {
        request: Request {
            id: TurnId::new(),
            scope,
            api_key: None,
            route: "/v1/responses",
            transport: "http",
            model: "gpt-5.2".into(),
            user_agent: Some("codex_cli_rs/1.0".into()),
        },
        client_turn: client_turn.map(Into::into),
        fence: None,
        first: to(AccountId::new()),
    }
}

fn ended(metered: Metered) -> End {
    let class = if matches!(metered, Metered::Reported(_)) {
        "completed"
    } else {
        "closed"
    };
    End {
        status: Some(200),
        class,
        metered,
        tier: Tier::Standard,
        took: Duration::from_millis(5),
    }
}

fn reported(input: u64, output: u64) -> Metered {
    Metered::Reported(Usage {
        input,
        output,
        total: input + output,
        ..Usage::default()
    })
}

fn settlement(outcome: Outcome) -> Settlement {
    Settlement {
        answer: Answer {
            outcome,
            status: 200,
            reason: None,
            error_code: None,
            first_event: Some(Duration::from_millis(3)),
            total: Duration::from_millis(9),
            bridge: None,
            explanation: None,
        },
        response_id: Some("resp_1".into()),
        sticky: None,
        complete: true,
        snapshot: None,
    }
}

async fn reconcile(ledger: &Ledger) -> Reconciliation {
    let (seconds, _) = TurnId::new().0.get_timestamp().unwrap().to_unix();
    let now = Timestamp::from_second(i64::try_from(seconds).unwrap()).unwrap();
    let hour = SignedDuration::from_hours(1);
    ledger.reconcile(now - hour, now + hour).await.unwrap()
}

/// Asserts that both sides agree and yields one of them.
async fn agreed(ledger: &Ledger) -> drawbridge::ledger::Side {
    let both = reconcile(ledger).await;
    assert_eq!(both.turns, both.log);
    assert_eq!(both.differing, []);
    both.turns
}

async fn text(client: &Client, query: &str) -> String {
    client
        .query_one(query, &[])
        .await
        .unwrap()
        .get::<_, Option<String>>(0)
        .unwrap_or_default()
}

async fn open(ledger: &Ledger, scope: ScopeId, client_turn: &str) -> Opened {
    ledger
        .open(opening(scope, Some(client_turn)))
        .await
        .unwrap()
}

#[tokio::test]
async fn the_schema_has_what_the_statements_ask_for() {
    let store = Store::direct().await;
    let connection = store.db.connection().await.unwrap();
    for stmt in STATEMENTS {
        connection.check(stmt).await.unwrap();
    }
}

#[tokio::test]
async fn an_attempt_is_on_record_before_it_is_sent_and_a_turn_is_booked_once() {
    for store in Store::both_ways().await {
        let (ledger, _) = replica(&store).await;
        let attempts = "select string_agg(coalesce(a ->> 'class', 'runs'), ',') from turns, jsonb_array_elements(attempts) a";
        let mut turn = ledger.open(opening(ScopeId::new(), None)).await.unwrap();
        assert_eq!(text(&store.client, attempts).await, "runs");
        turn.end(ended(Metered::Nothing));
        assert!(
            ledger
                .attempt(&mut turn, to(AccountId::new()))
                .await
                .unwrap()
        );
        assert_eq!(text(&store.client, attempts).await, "closed,runs");
        turn.end(ended(reported(1000, 100)));

        assert!(
            ledger
                .settle(&turn, &settlement(Outcome::Completed))
                .await
                .unwrap()
                .turn
        );
        assert!(
            !ledger
                .settle(&turn, &settlement(Outcome::Failed))
                .await
                .unwrap()
                .turn,
            "a repeated call changes nothing"
        );
        assert!(
            !ledger
                .attempt(&mut turn, to(AccountId::new()))
                .await
                .unwrap(),
            "a settled turn sends nothing"
        );
        let row = "select concat_ws(' ', state, outcome, response_id, input_tokens, output_tokens, cost_nanodollars, estimated, first_event_ms, total_ms) from turns";
        assert_eq!(
            text(&store.client, row).await,
            "settled completed resp_1 1000 100 3150000 f 3 9"
        );
        ledger.flush().await;
        let side = agreed(&ledger).await;
        assert_eq!(
            (
                side.turns,
                side.attempts,
                side.cost_nanodollars,
                side.estimated
            ),
            (1, 2, 3_150_000, 0)
        );
    }
}

#[tokio::test]
async fn a_retry_is_an_attempt_of_the_turn_that_did_not_complete() {
    for store in Store::both_ways().await {
        let (ledger, _) = replica(&store).await;
        let (other, _) = replica(&store).await;
        let scope = ScopeId::new();
        let mut first = open(&ledger, scope, "t").await;
        first.end(ended(Metered::Unknown { visible_bytes: 40 }));
        ledger
            .settle(&first, &settlement(Outcome::Failed))
            .await
            .unwrap();

        let mut retry = open(&other, scope, "t").await;
        assert!(retry.is_retry() && !first.is_retry());
        assert_eq!(retry.turn(), first.turn());
        assert_eq!(retry.attempts().count(), 1, "those of this request");
        retry.end(ended(reported(1000, 100)));
        assert!(
            !ledger
                .settle(&first, &settlement(Outcome::Failed))
                .await
                .unwrap()
                .turn,
            "it is no longer the first one's"
        );
        assert!(
            other
                .settle(&retry, &settlement(Outcome::Completed))
                .await
                .unwrap()
                .turn
        );

        // Estimated: 400 bytes sent, 40 seen.
        let row = "select concat_ws(' ', outcome, requests, jsonb_array_length(attempts), input_tokens, output_tokens, estimated) from turns";
        assert_eq!(text(&store.client, row).await, "completed 2 2 1100 110 t");

        let next = open(&ledger, scope, "t").await;
        assert!(!next.is_retry(), "what completed is not repeated");
        let strange = open(&ledger, ScopeId::new(), "t").await;
        assert!(!strange.is_retry(), "another scope's turn is another turn");
        for turn in [&next, &strange] {
            ledger
                .settle(turn, &settlement(Outcome::Cancelled))
                .await
                .unwrap();
        }
        ledger.flush().await;
        other.flush().await;
        let side = agreed(&ledger).await;
        assert_eq!((side.turns, side.attempts), (3, 4));
        assert_eq!(
            text(&store.client, "select count(*)::text from request_log").await,
            "4"
        );
    }
}

#[tokio::test]
async fn of_racing_retries_one_takes_the_turn_and_the_others_are_turns_of_their_own() {
    for store in Store::both_ways().await {
        let (ledger, _) = replica(&store).await;
        let scope = ScopeId::new();
        for round in 0..5 {
            let name = format!("turn {round}");
            let first = open(&ledger, scope, &name).await;
            let early = open(&ledger, scope, &name).await;
            assert!(!early.is_retry(), "while the first runs");
            for turn in [&first, &early] {
                ledger
                    .settle(turn, &settlement(Outcome::Failed))
                    .await
                    .unwrap();
            }
            let racing = (0..8).map(|_| open(&ledger, scope, &name));
            let turns = futures_util::future::join_all(racing).await;
            let retries: Vec<_> = turns.iter().filter(|turn| turn.is_retry()).collect();
            assert_eq!(retries.len(), 1, "round {round}");
            assert_eq!(retries[0].turn(), early.turn(), "the newest");
            for turn in &turns {
                assert!(
                    ledger
                        .settle(turn, &settlement(Outcome::Completed))
                        .await
                        .unwrap()
                        .turn
                );
            }
        }
        ledger.flush().await;
        assert_eq!(agreed(&ledger).await.attempts, 50);
    }
}

#[tokio::test]
async fn a_client_that_fails_for_ever_does_not_make_one_row_grow_for_ever() {
    let store = Store::direct().await;
    let (ledger, _) = replica(&store).await;
    let scope = ScopeId::new();
    for _ in 0..70 {
        let turn = open(&ledger, scope, "t").await;
        ledger
            .settle(&turn, &settlement(Outcome::Failed))
            .await
            .unwrap();
    }
    let most = "select max(jsonb_array_length(attempts))::text || ' of ' || count(*) from turns";
    assert_eq!(text(&store.client, most).await, "32 of 3");
}

#[tokio::test]
async fn texts_of_clients_cannot_keep_a_turn_from_being_booked() {
    let store = Store::direct().await;
    let (ledger, _) = replica(&store).await;
    let long = "ü\0".repeat(5_000);
    let mut nasty = opening(ScopeId::new(), Some(&long));
    nasty.request.model = long.clone();
    nasty.request.user_agent = Some(long.clone());
    let retry = Opening {
        request: Request {
            id: TurnId::new(),
            ..nasty.request.clone()
        },
        ..nasty.clone()
    };
    let turn = ledger.open(nasty).await.unwrap();
    let mut end = settlement(Outcome::Failed);
    end.response_id = Some(long.clone());
    end.answer.error_code = Some(long.into());
    ledger.settle(&turn, &end).await.unwrap();
    assert!(
        ledger.open(retry).await.unwrap().is_retry(),
        "a long id is recognised"
    );
    // What the log cannot take spoils nothing beside it.
    let poison = Answer {
        explanation: Some(serde_json::json!("\0")),
        ..end.answer.clone()
    };
    ledger.refuse(&opening(ScopeId::new(), None).request, &poison);
    ledger.flush().await;
    assert_eq!(
        text(&store.client, "select count(*)::text from request_log").await,
        "1"
    );
}

#[tokio::test]
async fn a_settlement_leaves_a_preference_and_an_account_that_went_does_not_stop_it() {
    for store in Store::both_ways().await {
        let (ledger, _) = replica(&store).await;
        let (one, other) = (account(&store.client).await, account(&store.client).await);
        let scope = ScopeId::new();
        let prefer = async |account: AccountId, hours: u64| {
            let turn = ledger.open(opening(scope, None)).await.unwrap();
            let sticky = Sticky {
                kind: "thread",
                hash: [1; 32],
                account,
                ttl: Duration::from_secs(hours * 3600),
            };
            let end = Settlement {
                sticky: Some(sticky),
                ..settlement(Outcome::Completed)
            };
            assert!(ledger.settle(&turn, &end).await.unwrap().turn);
        };
        let row = "select concat_ws(' ', count(*), min(account_id::text), round(extract(epoch from min(expires_at) - now()) / 3600)) from sticky_sessions";
        let moved = "select min(moved_at)::text from sticky_sessions";
        prefer(one, 10).await;
        assert_eq!(text(&store.client, row).await, format!("1 {one} 10"));
        let at = text(&store.client, moved).await;
        prefer(one, 20).await;
        assert_eq!(text(&store.client, row).await, format!("1 {one} 20"));
        assert_eq!(text(&store.client, moved).await, at, "prolonged, not moved");
        prefer(other, 20).await;
        assert_eq!(text(&store.client, row).await, format!("1 {other} 20"));
        assert_ne!(text(&store.client, moved).await, at);

        store
            .client
            .execute("delete from accounts where account_id = $1", &[&other])
            .await
            .unwrap();
        prefer(other, 20).await;
        assert_eq!(
            text(&store.client, "select count(*)::text from sticky_sessions").await,
            "0"
        );
    }
}

#[tokio::test]
async fn the_log_is_written_beside_the_requests_refused_ones_included() {
    for store in Store::both_ways().await {
        let (ledger, _) = replica(&store).await;
        for _ in 0..1_200 {
            ledger.refuse(
                &opening(ScopeId::new(), None).request,
                &settlement(Outcome::Refused).answer,
            );
        }
        let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
        while text(&store.client, "select count(*)::text from request_log").await != "1200" {
            assert!(tokio::time::Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        ledger.refuse(
            &opening(ScopeId::new(), None).request,
            &settlement(Outcome::Refused).answer,
        );
        ledger.flush().await;
        assert_eq!(
            text(&store.client, "select count(*)::text from request_log").await,
            "1201"
        );
        assert_eq!(agreed(&ledger).await.turns, 0);
    }
}

#[tokio::test]
async fn what_a_key_has_used_is_added_up_once_for_all_who_ask_and_seldom_where_that_is_slow() {
    let store = Store::direct().await;
    let (ledger, boot) = replica(&store).await;
    let key = ApiKeyId::new();
    let held = "begin; lock table turns in access exclusive mode";
    store.client.batch_execute(held).await.unwrap();
    let tasks = Tasks::new();
    let adding = "
        select coalesce(min(pid), 0) from pg_stat_activity
        where wait_event_type = 'Lock' and query like '%cached_input_tokens%' and datname = current_database()";
    let adding = async || -> i32 {
        // Within a transaction it would be what it was at first.
        let anew = "select pg_stat_clear_snapshot()";
        store.client.batch_execute(anew).await.unwrap();
        store.client.query_one(adding, &[]).await.unwrap().get(0)
    };
    // Who gives up leaves it to the others.
    let mut sum = 0;
    tokio::select! {
        biased;
        _ = ledger.used(key, &tasks) => unreachable!("the table is locked"),
        () = until("it is added up", async || { sum = adding().await; sum != 0 }) => {}
    }
    let asking = futures_util::future::join_all((0..5).map(|_| ledger.used(key, &tasks)));
    let release = async {
        let slow = "
            select count(*), coalesce(max(clock_timestamp() - query_start) > interval '100 ms', false) from pg_stat_activity
            where wait_event_type = 'Lock' and query like '%cached_input_tokens%' and datname = current_database()";
        let mut sums = 0;
        until("it is slow", async || {
            assert_eq!(adding().await, sum);
            let row = store.client.query_one(slow, &[]).await.unwrap();
            sums = row.get::<_, i64>(0);
            row.get(1)
        })
        .await;
        assert_eq!(sums, 1);
        store.client.batch_execute("commit").await.unwrap();
    };
    let (answers, ()) = tokio::join!(asking, release);
    let answers: Vec<i64> = answers
        .into_iter()
        .map(|used| used.unwrap().requests)
        .collect();
    assert_eq!(answers, [0; 5]);

    let settled = "
        insert into turns (turn_id, request_id, scope_id, api_key_id, boot_id, state, route, transport, model)
        select id, id, id, $1, $2, 'settled', 'r', 'http', 'm' from (select gen_random_uuid() id) one";
    store.client.execute(settled, &[&key, &boot]).await.unwrap();
    assert_eq!(
        ledger.used(key, &tasks).await.unwrap().requests,
        0,
        "a while ago"
    );
    until("it is added up again", async || {
        ledger.used(key, &tasks).await.unwrap().requests == 1
    })
    .await;
}

#[tokio::test]
async fn the_log_is_deleted_by_age_by_one_replica_at_a_time() {
    for store in Store::both_ways().await {
        let (ledger, _) = replica(&store).await;
        let fill = "insert into request_log (day, turn_id, request_id, scope_id, route, transport, outcome, attempts, total_ms)
            select (now() at time zone 'utc')::date - (n % 40), gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), 'r', 'http', 'completed', 1, 1
            from generate_series(0, 39999) n";
        store.client.batch_execute(fill).await.unwrap();
        store
            .client
            .batch_execute("begin; select pg_advisory_xact_lock(4714, 1)")
            .await
            .unwrap();
        assert_eq!(
            ledger.delete_older_than(30).await.unwrap(),
            0,
            "another one is at it"
        );
        store.client.batch_execute("commit").await.unwrap();
        assert_eq!(ledger.delete_older_than(30).await.unwrap(), 9_000);
        let left = "select concat(count(*), ' ', max((now() at time zone 'utc')::date - day)) from request_log";
        assert_eq!(text(&store.client, left).await, "31000 30");
    }
}

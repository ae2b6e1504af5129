//! What those who change an account at the same moment leave of each other's work: whoever waited for a lock decides by what it waited for.
//! The test's own connection holds a lock until all who are to meet wait for it.

use drawbridge::{
    account::{
        Error,
        flow::{Method, NewFlow},
    },
    db::{Class, Connection, Stmt},
    protocol::limits::Family,
    quota::Source,
};

use super::*;
use crate::quota::weekly;

impl Pool {
    /// Does something that does not end before [`Pool::release`].
    async fn hold(&self, sql: &str) {
        let held = format!("begin; {sql}");
        self.store.client.batch_execute(&held).await.unwrap();
    }

    async fn release(&self) {
        self.store.client.batch_execute("commit").await.unwrap();
    }

    /// Waits until so many connections wait for locks.
    async fn waiting(&self, connections: i64) {
        let sql = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        until("they wait for a lock", async || {
            // Within a transaction it is one view for all reads.
            let client = &self.store.client;
            client
                .batch_execute("select pg_stat_clear_snapshot()")
                .await
                .unwrap();
            client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == connections
        })
        .await;
    }

    async fn waiting_then_release(&self, connections: i64) {
        self.waiting(connections).await;
        self.release().await;
    }

    /// A login that only one account's seat may finish.
    async fn relogin(&self, wanted: AccountId, who: &str) -> Result<Imported, Error> {
        let new = NewFlow {
            method: Method::Browser,
            secrets: &[],
            state: None,
            interval: Duration::ZERO,
            lifetime: Duration::from_secs(60),
            wanted: Some(wanted),
            label: None,
        };
        let flow = self.accounts.begin_flow(&new).await.unwrap();
        let held = self.accounts.claim_flow(flow.id, Duration::from_secs(60));
        let held = held.await.unwrap().unwrap();
        self.accounts.finish_flow(&held, &login(who)).await
    }
}

#[tokio::test]
async fn a_login_that_waits_for_a_rotation_has_a_generation_of_its_own() {
    let pool = Pool::new().await;
    let id = pool.login("w/u/e").await.id;
    // As `rotate` does it; the row of `accounts` itself stays as it was.
    pool.hold(&format!(
        "select from accounts where account_id = '{id}' for no key update;
         update account_credentials set generation = generation + 1 where account_id = '{id}'"
    ))
    .await;
    tokio::join!(pool.login("w/u/e"), pool.waiting_then_release(1));
    let stored = pool.accounts.credential(id).await.unwrap().unwrap();
    assert_eq!(stored.generation, 3);
}

#[tokio::test]
async fn of_two_seats_logins_that_meet_at_one_row_one_gets_it() {
    let pool = Pool::new().await;
    let row = pool.login("-/-/e").await.id;
    let all = format!("select from accounts where account_id = '{row}' for update");
    pool.hold(&all).await;
    let (one, other, ()) = tokio::join!(
        pool.relogin(row, "w/u/e"),
        pool.relogin(row, "w2/u2/e"),
        pool.waiting_then_release(2)
    );
    let (winner, rejected) = match (&one, &other) {
        (Ok(_), Err(error)) => ("w u", error),
        (Err(error), Ok(_)) => ("w2 u2", error),
        (one, other) => panic!("{:?} {:?}", one.is_ok(), other.is_ok()),
    };
    assert!(matches!(rejected, Error::OtherSeat), "{rejected}");
    let seats = "select chatgpt_account_id || ' ' || chatgpt_user_id from accounts";
    assert_eq!(pool.texts(seats).await, [winner]);

    let nameless = pool.login("w3/-/e3").await.id;
    let all = format!("select from accounts where account_id = '{nameless}' for update");
    pool.hold(&all).await;
    let (one, other, ()) = tokio::join!(
        pool.login("w3/u/-"),
        pool.login_by(EMAIL, "-/v/e3"),
        pool.waiting_then_release(2)
    );
    assert_ne!(one.id, other.id, "two known users are never one row");
}

#[tokio::test]
async fn a_plan_that_waits_is_judged_by_what_it_waited_for() {
    let pool = Pool::new().await;
    let id = pool.login("w/u/e").await.id;
    pool.run("update accounts set plan_type = 'plus'", &[])
        .await;
    assert!(!pool.accounts.see_plan(id, "free").await.unwrap());
    pool.run(
        "update plan_sightings set seen_at = seen_at - interval '1 minute'",
        &[],
    )
    .await;
    // Somebody is told `plus` again.
    pool.hold("select from accounts for no key update; delete from plan_sightings")
        .await;
    let (believed, ()) = tokio::join!(
        pool.accounts.see_plan(id, "free"),
        pool.waiting_then_release(1)
    );
    assert!(!believed.unwrap(), "it was named once since");
}

#[tokio::test]
async fn a_block_that_is_learnt_while_its_account_is_merged_away_goes_with_it() {
    let pool = Pool::new().await;
    let kept = pool.login("w/u/a").await.id;
    let gone = pool.login_by(BESIDE, "w/u/b").await.id;
    let quota = Quota::read(&pool.store.another()).await.unwrap();
    let now = pool.store.db.clock().now().as_second();
    quota.block(gone, &Family::CODEX, Some(now + 60), "old");
    quota.flush().await;
    quota.block(gone, &Family::CODEX, Some(now + 600), "new");
    // The replica has written it and is about to announce it.
    pool.hold("select from bus_versions where topic = 'quota' for update")
        .await;
    tokio::join!(
        quota.flush(),
        async {
            pool.waiting(1).await;
            assert_eq!(pool.login("w/u/d").await.merged, [gone]);
        },
        pool.waiting_then_release(2)
    );
    let blocks = "select account_id || ' ' || reason from quota_blocks";
    assert_eq!(pool.texts(blocks).await, [format!("{kept} new")]);
}

#[tokio::test]
async fn a_key_that_names_an_account_which_was_merged_away_meanwhile_serves_what_that_is_now() {
    let pool = Pool::new().await;
    let kept = pool.login("w/u/a").await.id;
    let gone = pool.login_by(BESIDE, "w/u/b").await.id;
    pool.login("w/u/c").await;
    // Whoever granted it had read the accounts before the merge.
    let key = pool.key(&[gone, kept]).await;
    let other = pool.key(&[gone]).await;
    let memory = Memory::of(&pool).await;
    for key in [key, other] {
        let key = memory.keys.authenticate(&key).await.unwrap();
        assert_eq!(key.grants.accounts.as_deref(), Some(&[kept][..]));
    }
    memory.tasks.stop();
}

#[tokio::test]
async fn limits_that_wait_for_their_account_hold_nothing_that_a_merge_would_wait_for() {
    let pool = Pool::new().await;
    let id = pool.login("w/u/e").await.id;
    let quota = Quota::read(&pool.store.another()).await.unwrap();
    quota.observe(id, &weekly(40.0), Instant::now(), Source::Header);
    quota.flush().await;
    quota.observe(id, &weekly(50.0), Instant::now(), Source::Header);
    quota.block(id, &Family::CODEX, None, "a first block");
    // As a merge or a deletion.
    pool.hold("select from accounts for update").await;
    tokio::join!(quota.flush(), async {
        pool.waiting(1).await;
        pool.store
            .client
            .batch_execute("select from quota_windows for update nowait")
            .await
            .expect("nobody holds what a merge moves");
        pool.release().await;
    });
    let windows = "select used_percent::text from quota_windows";
    assert_eq!(pool.texts(windows).await, ["50"]);
    let blocks = "select reason from quota_blocks";
    assert_eq!(pool.texts(blocks).await, ["a first block"]);
}

#[tokio::test]
async fn who_changes_an_account_waits_for_a_lock_for_some_seconds_and_keeps_his_own_no_longer_than_he_is_heard_of()
 {
    static BOUNDS: Stmt = Stmt {
        name: "test.BOUNDS",
        sql: "select current_setting('lock_timeout') || ' ' || current_setting('idle_in_transaction_session_timeout')",
        types: &[],
    };
    for store in Store::both_ways().await {
        let bounds = async |connection: &Connection| -> String {
            let row = connection.one(&BOUNDS, &[]).await.unwrap();
            row.get(0)
        };
        let before = bounds(&store.db.connection().await.unwrap()).await;
        let tx = store.db.begin_bounded().await.unwrap();
        assert_eq!(bounds(&tx).await, "5s 10s");
        tx.commit().await.unwrap();
        let after = bounds(&store.db.connection().await.unwrap()).await;
        assert_eq!(before, after, "the next transaction is another's");
    }

    let pool = Pool::new().await;
    let id = pool.login("w/u/e").await.id;
    pool.hold("select from accounts for update").await;
    let error = pool.accounts.delete(id).await.unwrap_err();
    assert!(
        matches!(&error, Error::Db(error) if *error.class() == Class::Retryable),
        "{error}"
    );
    pool.release().await;
    pool.accounts.delete(id).await.unwrap();
}

#[tokio::test]
async fn a_deletion_that_waits_for_a_turn_to_be_settled_holds_nothing_that_it_needs() {
    let pool = Pool::new().await;
    let id = pool.login("w/u/e").await.id;
    let lease = "insert into http_bridge_leases (lease_id, scope_id, key_kind, key_hash, generation, account_id, retain_until)
        values (gen_random_uuid(), gen_random_uuid(), 'thread', '', 1, $1, 'infinity')";
    pool.run(lease, &[&id]).await;
    // As a settlement: the account stays, then the lease moves.
    pool.hold("select from accounts for key share").await;
    let (deleted, ()) = tokio::join!(pool.accounts.delete(id), async {
        pool.waiting(1).await;
        let lease = "select from http_bridge_leases for update nowait";
        let free = pool.store.client.batch_execute(lease).await;
        pool.release().await;
        free.unwrap();
    });
    deleted.unwrap();
}

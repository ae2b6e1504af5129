//! Limits over two replicas: what one learns the other knows, and nobody undoes what is newer.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use drawbridge::{
    bus::{self, Bus, Topic},
    db::{Db, Endpoint, Stmt, migrate},
    ids::AccountId,
    protocol::limits::{Credits, Family, Observation, UsageReport, Window, WindowSample},
    quota::{self, Block, Quota, Sample, Source, merge_block, merge_window},
    task::Tasks,
};
use jiff::Timestamp;
use tokio::time::timeout;
use tokio_postgres::types::{ToSql, Type};

use crate::support::{pg::TestDb, wait};

/// Long enough for a busy machine; nothing waits for it to pass.
const PATIENCE: Duration = Duration::from_secs(10);

static ADD_ACCOUNTS: Stmt = Stmt {
    name: "test.ADD_ACCOUNTS",
    sql: "insert into accounts (account_id) select unnest($1)",
    types: &[Type::UUID_ARRAY],
};
static DELETE_ACCOUNT: Stmt = Stmt {
    name: "test.DELETE_ACCOUNT",
    sql: "delete from accounts where account_id = $1",
    types: &[Type::UUID],
};
static BLOCKS: Stmt = Stmt {
    name: "test.BLOCKS",
    sql: "select blocked_at, extract(epoch from blocked_until)::bigint, reason, lifted_at from quota_blocks order by account_id",
    types: &[],
};
static LIFT: Stmt = Stmt {
    name: "test.LIFT",
    sql: "update quota_blocks set lifted_at = blocked_at + interval '1 ms', blocked_at = blocked_at + interval '2 ms',
        blocked_until = date_trunc('second', clock_timestamp())",
    types: &[],
};
static WINDOWS: Stmt = Stmt {
    name: "test.WINDOWS",
    sql: "select used_percent, extract(epoch from resets_at)::bigint, observed_at, source from quota_windows order by account_id",
    types: &[],
};

/// A migrated database with accounts.
async fn database(accounts: &[AccountId]) -> (TestDb, Db) {
    let test = TestDb::migrated(async |url| {
        migrate(&Endpoint::parse(&url).unwrap()).await.unwrap();
    })
    .await;
    let db = connect(&test).await;
    db.exec(&ADD_ACCOUNTS, &[&accounts]).await.unwrap();
    (test, db)
}

async fn connect(test: &TestDb) -> Db {
    let endpoint = Endpoint::parse(&test.url).unwrap();
    let db = Db::new(&endpoint, &endpoint).unwrap();
    db.learn_time().await.unwrap();
    db
}

/// A replica of its own: pool, bus and quota, until its tasks are stopped.
struct Replica {
    quota: Quota,
    bus: Bus,
    tasks: Tasks,
    db: Db,
}

impl Replica {
    async fn start(test: &TestDb) -> Self {
        let db = connect(test).await;
        let (bus, tasks) = (Bus::connect(&db).await.unwrap(), Tasks::new());
        let quota = Quota::load(&db, &bus, &tasks).await.unwrap();
        tasks.essential("bus", bus.clone().run(tasks.clone()));
        Self {
            quota,
            bus,
            tasks,
            db,
        }
    }

    /// Waits until what is known of the account satisfies the condition.
    async fn sees(
        &self,
        what: &str,
        account: AccountId,
        condition: impl Fn(Vec<f64>, Vec<i64>) -> bool,
    ) {
        let mut changed = self.quota.changed();
        let holds = || {
            let (windows, blocks) = self.quota.snapshot(account);
            condition(
                windows.iter().map(|window| window.used_percent).collect(),
                blocks.iter().map(|block| block.until).collect(),
            )
        };
        let waiting = async {
            while !holds() {
                changed.changed().await.unwrap();
            }
        };
        timeout(PATIENCE, waiting)
            .await
            .unwrap_or_else(|_| panic!("never: {what}"));
    }

    async fn stop(self) {
        self.tasks.stop();
        assert!(self.tasks.drained(PATIENCE).await);
        assert!(!self.tasks.failed());
        self.db.close();
    }
}

pub(crate) fn weekly(used_percent: f64) -> Observation {
    Observation {
        windows: vec![WindowSample {
            window: Window::Weekly,
            used_percent,
            window_minutes: 10_080,
            resets_at: None,
        }],
        ..Observation::default()
    }
}

#[tokio::test]
async fn a_block_reaches_the_other_replica_and_a_turn_served_there_lifts_it_here() {
    let account = AccountId::new();
    let (test, db) = database(&[account]).await;
    let (here, there) = (Replica::start(&test).await, Replica::start(&test).await);
    let before = Instant::now();
    let until = db.clock().now().as_second() + 60;
    here.quota
        .block(account, &Family::CODEX, Some(until), "rate_limit_exceeded");
    assert_eq!(
        here.quota.snapshot(account).1[0].until,
        until,
        "here at once"
    );
    there
        .sees("the block", account, |_, blocks| blocks == [until])
        .await;

    there
        .quota
        .observe(account, &weekly(40.0), before, Source::Header);
    assert_eq!(
        there.quota.snapshot(account).1.len(),
        1,
        "it began before the refusal"
    );
    let served = async {
        while !there.quota.snapshot(account).1.is_empty() {
            there
                .quota
                .observe(account, &weekly(41.0), Instant::now(), Source::Header);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, served).await.expect("a later one lifts");
    here.sees("the lift and what proved it", account, |used, blocks| {
        used == [41.0] && blocks.is_empty()
    })
    .await;

    let restarted = Quota::read(&db).await.unwrap();
    assert_eq!(restarted.snapshot(account), there.quota.snapshot(account));
    here.stop().await;
    there.stop().await;
}

#[tokio::test]
async fn a_lift_is_heard_of_though_a_later_block_has_come_and_gone_meanwhile() {
    let account = AccountId::new();
    let (test, db) = database(&[account]).await;
    let here = Replica::start(&test).await;
    let until = db.clock().now().as_second() + 5 * 3_600;
    here.quota
        .block(account, &Family::CODEX, Some(until), "rate_limit_exceeded");
    wait::until("it is stored", async || {
        let blocks = Quota::read(&db).await.unwrap().snapshot(account).1;
        !blocks.is_empty()
    })
    .await;
    // What a peer writes that lifts it, and is refused for a moment after.
    let tx = db.begin().await.unwrap();
    tx.exec(&LIFT, &[]).await.unwrap();
    bus::commit(tx, &[Topic::Quota]).await.unwrap();
    here.sees("the lift", account, |_, blocks| !blocks.contains(&until))
        .await;
    here.stop().await;
}

#[tokio::test]
async fn samples_are_announced_at_most_once_a_second() {
    let account = AccountId::new();
    let (test, db) = database(&[account]).await;
    let replica = Replica::start(&test).await;
    let client = test.connect().await;
    let version = async || {
        let version = "select version from bus_versions where topic = 'quota'";
        client
            .query_one(version, &[])
            .await
            .unwrap()
            .get::<_, i64>(0)
    };
    let before = version().await;
    let started = Instant::now();
    let mut bumps = replica.bus.subscribe(Topic::Quota);
    let mut used = 0.0;
    let announced = async {
        while version().await < before + 2 {
            used += 0.001;
            replica
                .quota
                .observe(account, &weekly(used), Instant::now(), Source::Header);
            drop(timeout(Duration::from_millis(5), bumps.changed()).await);
        }
    };
    timeout(PATIENCE, announced)
        .await
        .expect("what is learnt is announced");
    let most = started.elapsed().as_secs() + 2;
    let bumps = version().await - before;
    assert!(
        bumps as u64 <= most,
        "{bumps} announcements, {most} seconds"
    );
    replica.stop().await;
    db.close();
}

#[tokio::test]
async fn a_late_write_of_an_older_observation_changes_nothing() {
    let account = AccountId::new();
    let (test, db) = database(&[account]).await;
    let (slow, fast) = (
        Quota::read(&db).await.unwrap(),
        Quota::read(&connect(&test).await).await.unwrap(),
    );
    slow.observe(account, &weekly(10.0), Instant::now(), Source::Header);
    fast.observe(
        account,
        &weekly(90.0),
        // Further apart than what the two know of the database's clock.
        Instant::now() + Duration::from_secs(5),
        Source::Header,
    );
    fast.flush().await;
    slow.flush().await;
    let stored = Quota::read(&db).await.unwrap().snapshot(account);
    assert_eq!(stored.0[0].used_percent, 90.0);
}

#[tokio::test]
async fn a_deleted_account_does_not_keep_others_from_being_stored() {
    let (deleted, kept) = (AccountId::new(), AccountId::new());
    let (_test, db) = database(&[deleted, kept]).await;
    let quota = Quota::read(&db).await.unwrap();
    for account in [deleted, kept] {
        quota.observe(account, &weekly(10.0), Instant::now(), Source::Header);
        quota.block(account, &Family::CODEX, None, "rate_limit_exceeded");
    }
    db.exec(&DELETE_ACCOUNT, &[&deleted]).await.unwrap();
    quota.flush().await;
    let stored = Quota::read(&db).await.unwrap();
    assert_eq!(stored.snapshot(kept), quota.snapshot(kept));
    assert_eq!(stored.snapshot(deleted), (Vec::new(), Vec::new()));
}

#[tokio::test]
async fn a_block_that_was_learnt_under_the_id_of_a_merged_account_is_stored_under_the_one_that_stays()
 {
    let (gone, heir) = (AccountId::new(), AccountId::new());
    let (_test, db) = database(&[gone, heir]).await;
    let quota = Quota::read(&db).await.unwrap();
    quota.block(gone, &Family::CODEX, None, "rate_limit_exceeded");
    db.exec(&DELETE_ACCOUNT, &[&gone]).await.unwrap();
    assert!(quota.flush().await, "of nobody there is nothing to store");
    quota.inherit(&Arc::new(HashMap::from([(gone, heir)])));
    assert!(quota.flush().await);
    let stored = Quota::read(&db).await.unwrap();
    assert_eq!(stored.snapshot(heir).1.len(), 1);
    assert_eq!(stored.snapshot(heir), quota.snapshot(heir));
}

#[tokio::test]
async fn what_cannot_be_stored_is_told_and_stored_later() {
    let account = AccountId::new();
    let (test, db) = database(&[account]).await;
    let client = test.connect().await;
    let quota = Quota::read(&db).await.unwrap();
    quota.observe(account, &weekly(10.0), Instant::now(), Source::Poll);
    let away = "alter table quota_windows rename to away";
    client.batch_execute(away).await.unwrap();
    assert!(!quota.flush().await);
    let back = "alter table away rename to quota_windows";
    client.batch_execute(back).await.unwrap();
    assert!(quota.flush().await);
    let stored = Quota::read(&db).await.unwrap();
    assert_eq!(stored.snapshot(account), quota.snapshot(account));
}

#[tokio::test]
async fn an_observation_from_the_future_does_not_shut_out_the_present() {
    let account = AccountId::new();
    let (_test, db) = database(&[account]).await;
    let quota = Quota::read(&db).await.unwrap();
    quota.observe(
        account,
        &weekly(10.0),
        Instant::now() + Duration::from_secs(3_600),
        Source::Header,
    );
    quota.flush().await;
    let later = Quota::read(&db).await.unwrap();
    later.observe(account, &weekly(20.0), Instant::now(), Source::Header);
    assert_eq!(later.snapshot(account).0[0].used_percent, 20.0);
}

#[tokio::test]
async fn history_is_written_on_change_and_deleted_with_age() {
    let account = AccountId::new();
    let (test, db) = database(&[account]).await;
    let client = test.connect().await;
    let quota = Quota::read(&db).await.unwrap();
    // Half a percent is no change; neither is the same again, nor what is older.
    for (used, ago) in [
        (10.0, 50),
        (10.5, 40),
        (11.0, 30),
        (11.2, 20),
        (3.0, 45),
        (99.0, 10),
    ] {
        let began = Instant::now() - Duration::from_secs(ago);
        quota.observe(account, &weekly(used), began, Source::Header);
        quota.flush().await;
    }
    let history = async || -> Vec<f64> {
        let query = "select used_percent from usage_history order by observed_at";
        let rows = client.query(query, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    assert_eq!(history().await, [10.0, 11.0, 99.0]);
    let aged = "update usage_history set observed_at = observed_at - interval '40 days' where used_percent < 50";
    client.batch_execute(aged).await.unwrap();
    quota.purge(30).await.unwrap();
    assert_eq!(history().await, [99.0]);
}

#[tokio::test]
async fn credits_and_windows_that_are_gone_reach_the_other_replica() {
    let account = AccountId::new();
    let (_test, db) = database(&[account]).await;
    let quota = Quota::read(&db).await.unwrap();
    let ago = |seconds| Instant::now() - Duration::from_secs(seconds);
    quota.observe(account, &weekly(40.0), ago(60), Source::Header);
    let credits = Credits {
        has_credits: true,
        unlimited: false,
        balance: Some(7.5),
    };
    let monthly = WindowSample {
        window: Window::Monthly,
        window_minutes: 43_200,
        ..weekly(5.0).windows[0]
    };
    let report = UsageReport {
        observations: vec![Observation {
            windows: vec![monthly],
            credits: Some(credits),
            ..Observation::default()
        }],
        ..UsageReport::default()
    };
    quota.report(account, &report, ago(30));
    // What began before the answer does not bring the window back.
    quota.observe(account, &weekly(41.0), ago(40), Source::Header);
    quota.flush().await;
    for known in [quota.clone(), Quota::read(&db).await.unwrap()] {
        let minutes: Vec<u32> = known
            .snapshot(account)
            .0
            .iter()
            .map(|one| one.minutes)
            .collect();
        assert_eq!(minutes, [43_200]);
        assert_eq!(known.credits(account), Some(credits));
    }
    // What began after it does.
    quota.observe(account, &weekly(42.0), ago(10), Source::Header);
    assert_eq!(quota.snapshot(account).0.len(), 2);
}

/// Past times, so that the database does not move them.
fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_700_000_000 + second).unwrap()
}

fn statement(name: &str) -> &'static Stmt {
    quota::STATEMENTS
        .iter()
        .find(|stmt| stmt.name == name)
        .unwrap()
}

/// Every pair of states, and an account in order for each.
fn pairs<State: Clone>(states: &[State]) -> (Vec<AccountId>, Vec<State>, Vec<State>) {
    let all = states
        .iter()
        .flat_map(|one| states.iter().map(move |other| (one.clone(), other.clone())));
    let (ones, others): (Vec<_>, Vec<_>) = all.unzip();
    let mut accounts: Vec<AccountId> = ones.iter().map(|_| AccountId::new()).collect();
    accounts.sort();
    (accounts, ones, others)
}

#[tokio::test]
async fn blocks_merge_in_sql_as_in_memory() {
    let mut states = Vec::new();
    for (blocked_at, until) in [(1, 10), (1, 20), (2, 10), (2, 20)] {
        for reason in ["usage_limit_reached", "rate_limit_exceeded"] {
            for lifted_at in [None, Some(1), Some(2), Some(3)] {
                states.push(Block {
                    blocked_at: at(blocked_at),
                    until: at(until).as_second(),
                    reason: reason.into(),
                    lifted_at: lifted_at.map(at),
                });
            }
        }
    }
    let (accounts, ones, others) = pairs(&states);
    let (_test, db) = database(&accounts).await;
    for blocks in [&ones, &others] {
        let params: [&(dyn ToSql + Sync); 6] = [
            &accounts,
            &vec!["codex"; accounts.len()],
            &blocks
                .iter()
                .map(|block| block.blocked_at)
                .collect::<Vec<_>>(),
            &blocks.iter().map(|block| block.until).collect::<Vec<_>>(),
            &blocks
                .iter()
                .map(|block| block.reason.as_str())
                .collect::<Vec<_>>(),
            &blocks
                .iter()
                .map(|block| block.lifted_at)
                .collect::<Vec<_>>(),
        ];
        db.exec(statement("quota.SAVE_BLOCKS"), &params)
            .await
            .unwrap();
    }
    let rows = db.all(&BLOCKS, &[]).await.unwrap();
    assert_eq!(rows.len(), states.len() * states.len());
    for ((row, one), other) in rows.iter().zip(ones).zip(others) {
        let stored = Block {
            blocked_at: row.get(0),
            until: row.get(1),
            reason: row.get(2),
            lifted_at: row.get(3),
        };
        assert_eq!(
            stored,
            merge_block(one.clone(), other.clone()),
            "{one:?} and {other:?}"
        );
    }
}

#[tokio::test]
async fn samples_merge_in_sql_as_in_memory() {
    let mut states = Vec::new();
    for (observed_at, used_percent) in [(1, 10.0), (1, 20.0), (2, 10.0), (2, 20.0)] {
        for resets_at in [None, Some(5), Some(6)] {
            for source in [
                Source::Error,
                Source::Event,
                Source::Header,
                Source::Poll,
                Source::Unlisted,
            ] {
                states.push(Sample {
                    used_percent,
                    resets_at: resets_at.map(|second| at(second).as_second()),
                    observed_at: at(observed_at),
                    source,
                });
            }
        }
    }
    let (accounts, ones, others) = pairs(&states);
    let (_test, db) = database(&accounts).await;
    for samples in [&ones, &others] {
        let params: [&(dyn ToSql + Sync); 7] = [
            &accounts,
            &vec!["codex"; accounts.len()],
            &vec![300; accounts.len()],
            &samples
                .iter()
                .map(|sample| sample.used_percent)
                .collect::<Vec<_>>(),
            &samples
                .iter()
                .map(|sample| sample.resets_at)
                .collect::<Vec<_>>(),
            &samples
                .iter()
                .map(|sample| sample.observed_at)
                .collect::<Vec<_>>(),
            &samples
                .iter()
                .map(|sample| sample.source.as_str())
                .collect::<Vec<_>>(),
        ];
        db.exec(statement("quota.SAVE_WINDOWS"), &params)
            .await
            .unwrap();
    }
    let rows = db.all(&WINDOWS, &[]).await.unwrap();
    assert_eq!(rows.len(), states.len() * states.len());
    for ((row, one), other) in rows.iter().zip(ones).zip(others) {
        let stored = Sample {
            used_percent: row.get(0),
            resets_at: row.get(1),
            observed_at: row.get(2),
            source: row.get::<_, &str>(3).parse().unwrap(),
        };
        assert_eq!(stored, merge_window(one, other), "{one:?} and {other:?}");
    }
}

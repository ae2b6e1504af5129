//! One row per seat: what becomes of the others, of everything that names them, and of whoever logs in at the same moment.
#![expect(
    clippy::disallowed_methods,
    reason = "looks behind the back of the code under test, on a connection of its own"
)]

mod rivals;

use std::time::{Duration, Instant};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use drawbridge::{
    account::{
        Accounts, AuthFile, Imported,
        merge::{Policy, Who, locks},
    },
    api_key::{self, ApiKeys, Grants, NewKey},
    bus::Bus,
    config::Settings,
    db::{LockClass, dependents::DEPENDENTS},
    ids::AccountId,
    ledger::Ledger,
    quota::Quota,
    routing::Lifecycle,
    secret::{KeyRing, Pepper},
    task::Tasks,
    upstream::Upstream,
};
use futures_util::future::join_all;
use secrecy::ExposeSecret as _;
use serde_json::json;
use tokio_postgres::types::ToSql;

use crate::support::{store::Store, wait::until};

const BESIDE: Policy = Policy {
    by_seat: false,
    by_email: false,
};
const EMAIL: Policy = Policy {
    by_seat: true,
    by_email: true,
};
const EMAIL_ALONE: Policy = Policy {
    by_seat: false,
    by_email: true,
};

struct Pool {
    store: Store,
    accounts: Accounts,
}

impl Pool {
    async fn new() -> Self {
        let store = Store::direct().await;
        let ring = KeyRing::parse(&KeyRing::generate("k1")).unwrap();
        let accounts = Accounts::new(store.db.clone(), ring, pepper());
        store.db.learn_time().await.unwrap();
        Self { store, accounts }
    }

    /// A login of `workspace/user/email`, each `-` if its tokens do not say it.
    async fn login(&self, who: &str) -> Imported {
        self.login_by(Policy::LOGIN, who).await
    }

    async fn login_by(&self, policy: Policy, who: &str) -> Imported {
        let file = login(who);
        self.accounts.import_by(policy, &file, None).await.unwrap()
    }

    async fn ids(&self) -> Vec<AccountId> {
        let accounts = self.accounts.load_all().await.unwrap();
        accounts.iter().map(|account| account.id).collect()
    }

    async fn run(&self, sql: &str, params: &[&(dyn ToSql + Sync)]) {
        self.store.client.execute(sql, params).await.unwrap();
    }

    /// The first column of every row, as text.
    async fn texts(&self, sql: &str) -> Vec<String> {
        let rows = self.store.client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    async fn key(&self, accounts: &[AccountId]) -> String {
        let new = NewKey {
            name: "test".into(),
            expires_at: None,
            scope_of: None,
            grants: Grants {
                accounts: Some(accounts.to_vec()),
                ..Grants::default()
            },
        };
        let created = api_key::create(&self.store.db, &pepper(), &new).await;
        created.unwrap().secret.expose_secret().to_owned()
    }
}

fn pepper() -> Pepper {
    Pepper::new([7; 32])
}

fn part(who: &str, index: usize) -> Option<&str> {
    who.split('/').nth(index).filter(|part| *part != "-")
}

fn login(who: &str) -> AuthFile {
    let auth = json!({"chatgpt_account_id": part(who, 0), "chatgpt_user_id": part(who, 1), "chatgpt_plan_type": "team"});
    let email = part(who, 2).map(|email| format!("{email}@example.test"));
    let claims = json!({"email": email, "https://api.openai.com/auth": auth});
    let id = format!(
        "e30.{}.c2ln",
        BASE64_URL_SAFE_NO_PAD.encode(claims.to_string())
    );
    let file = json!({"tokens": {"id_token": id, "access_token": format!("access-{who}"), "refresh_token": format!("refresh-{who}")}});
    AuthFile::parse(file.to_string().as_bytes()).unwrap()
}

/// Columns that could name an account and are not in the registry, and those in it that do not exist.
async fn unlisted(pool: &Pool) -> Vec<String> {
    let columns = pool
        .texts("select table_name || '.' || column_name from information_schema.columns where table_schema = 'public' order by 1")
        .await;
    let suspect = pool
        .texts(
            "select table_name || '.' || column_name from information_schema.columns
            where table_schema = 'public' and (column_name like '%account_id%' or data_type = 'jsonb')
            union select conrelid::regclass || '.' || attname from pg_constraint
            join pg_attribute on attrelid = conrelid and attnum = any(conkey)
            where contype = 'f' and confrelid = 'accounts'::regclass order by 1",
        )
        .await;
    let listed: Vec<String> = DEPENDENTS
        .iter()
        .map(|dependent| format!("{}.{}", dependent.table, dependent.column))
        .collect();
    let named = suspect.iter().filter(|column| !listed.contains(column));
    let gone = listed.iter().filter(|column| !columns.contains(column));
    named.chain(gone).cloned().collect()
}

#[tokio::test]
async fn schema_walk_every_column_that_could_name_an_account_is_listed_in_the_dependents_registry()
{
    let pool = Pool::new().await;
    assert_eq!(
        unlisted(&pool).await,
        [""; 0],
        "say in db::dependents how these follow a merge"
    );
    let later = "create table later (main_account_id uuid, owner_id uuid references accounts, notes jsonb, models text)";
    pool.run(later, &[]).await;
    assert_eq!(
        unlisted(&pool).await,
        ["later.main_account_id", "later.notes", "later.owner_id"]
    );
}

#[tokio::test]
async fn two_seats_with_the_same_workspace_and_different_emails_are_two_rows_and_relogin_of_one_touches_only_it()
 {
    let pool = Pool::new().await;
    let (a, b) = (
        pool.login("w/a/one").await.id,
        pool.login("w/b/two").await.id,
    );
    assert_ne!(a, b);
    let row = "select (to_jsonb(a) || to_jsonb(c))::text from accounts a join account_credentials c using (account_id)
        where chatgpt_user_id = 'b'";
    let before = pool.texts(row).await;
    let again = pool.login("w/a/three").await;
    assert_eq!((again.id, again.created, again.merged.len()), (a, false, 0));
    assert_eq!(pool.texts(row).await, before);
    assert_eq!(pool.ids().await.len(), 2);
}

#[tokio::test]
async fn the_oldest_row_of_a_seat_takes_in_the_others_and_lives_again() {
    let pool = Pool::new().await;
    let oldest = pool.login("w/-/old").await.id;
    let copy = pool.login_by(BESIDE, "w/u/new").await.id;
    let other = pool.login_by(BESIDE, "w/u/other").await.id;
    assert_eq!(pool.ids().await.len(), 3);
    for _ in 0..4 {
        // The generation of a copy may be ahead.
        let tokens = pool.accounts.credential(copy).await.unwrap().unwrap();
        let rotated = drawbridge::account::Tokens {
            access: tokens.access,
            refresh: tokens.refresh,
            id_token: None,
        };
        let generation = tokens.generation;
        pool.accounts
            .rotate(copy, generation, &rotated)
            .await
            .unwrap();
    }
    pool.accounts
        .set_lifecycle(oldest, Lifecycle::Deactivated, "account_deactivated", 1)
        .await
        .unwrap();

    let merged = pool.login("w/u/newest").await;
    assert_eq!((merged.id, merged.created), (oldest, false));
    assert_eq!(merged.merged, [copy, other]);
    let [account] = &pool.accounts.list().await.unwrap()[..] else {
        panic!("one seat, one row")
    };
    assert_eq!((account.id, account.lifecycle), (oldest, Lifecycle::Active));
    assert_eq!(account.email.as_deref(), Some("newest@example.test"));
    assert_eq!(
        (account.reason.as_deref(), account.plan.as_str()),
        (None, "team")
    );
    // Whoever chose a row that is gone gets the login of the one that it is now, and it counts as newer.
    for id in [oldest, copy, other] {
        let stored = pool.accounts.credential(id).await.unwrap().unwrap();
        assert_eq!((stored.id, stored.generation), (oldest, 6));
        assert_eq!(stored.refresh.expose_secret(), "refresh-w/u/newest");
    }
    let again = pool.login("w/u/-").await;
    assert_eq!((again.id, again.merged.len()), (oldest, 0));
}

#[tokio::test]
async fn a_login_without_a_workspace_falls_through_and_merges_nothing() {
    let pool = Pool::new().await;
    let seat = pool.login("w/u/e").await.id;
    let nameless = pool.login("-/-/e").await;
    assert!(nameless.created && nameless.id != seat);
    let again = pool.login("-/-/e").await;
    assert_eq!((again.id, again.created), (nameless.id, false));
    // Only an import that is told to goes by the address, and then never over two seats.
    let merged = pool.login_by(EMAIL, "w/u/e").await;
    assert_eq!((merged.id, &merged.merged[..]), (seat, &[nameless.id][..]));
    let other = pool.login("w2/u/e").await.id;
    let neither = pool.login_by(EMAIL, "-/-/e").await;
    assert!(neither.created && ![seat, other].contains(&neither.id));
}

#[tokio::test]
async fn a_duplicate_with_everything_that_names_it_is_all_on_the_canonical_row() {
    let pool = Pool::new().await;
    let kept = pool.login("w/u/a").await.id;
    let gone = pool.login_by(BESIDE, "w/u/b").await.id;
    let stranger = pool.login("w/v/c").await.id;
    for (account, hash) in [(kept, 1_u8), (gone, 2), (stranger, 3)] {
        let hash = [hash; 32];
        let params: [&(dyn ToSql + Sync); 2] = [&account, &hash.as_slice()];
        for sql in [
            "insert into sticky_sessions (scope_id, key_kind, key_hash, account_id, expires_at)
                values (gen_random_uuid(), 'thread', $2, $1, 'infinity')",
            "insert into http_bridge_leases (lease_id, scope_id, key_kind, key_hash, generation, account_id, retain_until)
                values (gen_random_uuid(), gen_random_uuid(), 'thread', $2, 1, $1, 'infinity')",
            "insert into response_snapshots (scope_id, response_id, chain_id, account_id, model, is_root, complete, bytes)
                values (gen_random_uuid(), encode($2, 'hex'), gen_random_uuid(), $1, 'm', true, false, 0)",
            "insert into account_models (account_id, models) select $1, '[]' where $2::bytea is not null",
        ] {
            pool.run(sql, &params).await;
        }
    }
    let minute = "insert into quota_windows (account_id, family, window_minutes, used_percent, observed_at, source)
        values ($1, $2, 300, $3, clock_timestamp() - make_interval(mins => $4), 'header')";
    for (account, family, used, ago) in [
        (kept, "codex", 10.0_f64, 2),
        (gone, "codex", 90.0, 1),
        (kept, "spark", 20.0, 1),
        (gone, "spark", 80.0, 2),
        (gone, "other", 30.0, 3),
    ] {
        pool.run(minute, &[&account, &family, &used, &ago]).await;
    }
    let block = "insert into quota_blocks (account_id, family, blocked_at, blocked_until, reason)
        values ($1, $2, clock_timestamp(), clock_timestamp() + make_interval(mins => $3), $4)";
    for (account, family, minutes, reason) in [
        (kept, "codex", 5, "short"),
        (gone, "codex", 50, "long"),
        (gone, "spark", 5, "moved"),
    ] {
        pool.run(block, &[&account, &family, &minutes, &reason])
            .await;
    }
    let credits = "insert into quota_credits (account_id, has_credits, unlimited, balance, observed_at, source)
        values ($1, true, false, $2, clock_timestamp() - make_interval(mins => $3), 'poll')";
    for (account, balance, ago) in [(kept, 1.0_f64, 2), (gone, 9.0, 1), (stranger, 5.0, 1)] {
        pool.run(credits, &[&account, &balance, &ago]).await;
    }
    let history = "insert into usage_history (account_id, family, window_minutes, observed_at, used_percent, source)
        values ($1, 'codex', 300, to_timestamp($2), $2, 'poll')";
    for (account, at) in [(kept, 1.0_f64), (gone, 1.0), (gone, 2.0), (stranger, 3.0)] {
        pool.run(history, &[&account, &at]).await;
    }
    pool.key(&[gone, kept, stranger]).await;
    pool.key(&[gone]).await;
    pool.key(&[stranger]).await;

    let merged = pool.login("w/u/d").await;
    assert_eq!((merged.id, &merged.merged[..]), (kept, &[gone][..]));
    for table in [
        "sticky_sessions",
        "http_bridge_leases",
        "response_snapshots",
    ] {
        let owners = pool
            .texts(&format!("select account_id::text from {table} order by 1"))
            .await;
        let mut expected = [kept, kept, stranger].map(|id| id.to_string());
        expected.sort();
        assert_eq!(owners, expected, "{table}");
    }
    let windows = pool
        .texts("select family || ' ' || used_percent from quota_windows order by 1")
        .await;
    assert_eq!(windows, ["codex 90", "other 30", "spark 20"]);
    let blocks = pool
        .texts("select family || ' ' || reason from quota_blocks order by 1")
        .await;
    assert_eq!(blocks, ["codex long", "spark moved"]);
    let of_kept = format!("where account_id = '{kept}' order by 1");
    let credits = format!("select balance::text from quota_credits {of_kept}");
    assert_eq!(pool.texts(&credits).await, ["9"]);
    let history = format!("select used_percent::text from usage_history {of_kept}");
    assert_eq!(pool.texts(&history).await, ["1", "2"]);
    let left = format!("select from_id::text from account_merges where from_id = '{gone}'");
    assert_eq!(pool.texts(&left).await.len(), 1);
    let grants = pool
        .texts("select grants->>'accounts' from api_keys order by created_at")
        .await;
    let list = |ids: &[AccountId]| {
        let mut ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
        ids.sort();
        let list = serde_json::to_string(&ids).unwrap();
        list.replace(',', ", ")
    };
    assert_eq!(
        grants,
        [&[kept, stranger][..], &[kept], &[stranger]].map(list)
    );
    assert_eq!(
        pool.texts("select count(*)::text from account_models")
            .await,
        ["2"]
    );
}

#[tokio::test]
async fn what_a_login_does_not_say_is_as_the_rows_said_that_became_one() {
    let pool = Pool::new().await;
    let oldest = pool.login("-/-/e").await.id;
    pool.run("update accounts set plan_type = 'unknown'", &[])
        .await;
    let newer = pool.login("w/u/e").await.id;
    let file = json!({"tokens": {"access_token": "a", "refresh_token": "r", "account_id": "w"}});
    let silent = AuthFile::parse(file.to_string().as_bytes()).unwrap();
    assert_eq!(pool.login_by(EMAIL, "-/-/e").await.merged, [newer]);
    let known =
        "select concat_ws(' ', chatgpt_account_id, chatgpt_user_id, plan_type) from accounts";
    assert_eq!(pool.texts(known).await, ["w u team"]);

    let nameless = pool.login_by(BESIDE, "w/-/-").await.id;
    let older = "update accounts set plan_type = 'unknown', created_at = created_at - interval '1 day' where account_id = $1";
    pool.run(older, &[&nameless]).await;
    let merged = pool.accounts.import(&silent, None).await.unwrap();
    assert_eq!((merged.id, &merged.merged[..]), (nameless, &[oldest][..]));
    assert_eq!(pool.texts(known).await, ["w u team"]);
    let [listed] = &pool.accounts.list().await.unwrap()[..] else {
        panic!("one seat, one row")
    };
    assert_eq!(listed.email.as_deref(), Some("e@example.test"));
    let found = pool.login_by(EMAIL_ALONE, "-/-/e").await;
    assert_eq!(found.id, nameless, "its address finds it");
}

#[tokio::test]
async fn history_follows_in_batches_and_goes_on_where_it_was_left() {
    let pool = Pool::new().await;
    let kept = pool.login("w/u/a").await.id;
    let gone = pool.login_by(BESIDE, "w/u/b").await.id;
    let older = pool.login_by(BESIDE, "w/u/c").await.id;
    let turns = "insert into turns (turn_id, request_id, scope_id, boot_id, state, route, transport, model, account_id, attempts)
        select id, id, gen_random_uuid(), gen_random_uuid(), case when n % 10 = 0 then 'open' else 'settled' end, 'r', 't', 'm',
            case when n % 3 = 0 then $2::uuid else $1::uuid end, jsonb_build_array(jsonb_build_object('account_id', $1::uuid))
        from (select gen_random_uuid() id, n from generate_series(1, 200) n) ids";
    let log = "insert into request_log (day, turn_id, request_id, scope_id, account_id, route, transport, outcome, attempts, total_ms)
        select date '2026-01-01' + n / 50, gen_random_uuid(), r, gen_random_uuid(), case when n % 3 = 0 then $2::uuid else $1::uuid end, 'r', 't', 'o', 1, 1
        from generate_series(1, 200) n, lateral (select gen_random_uuid() r from generate_series(1, 2) where n > 0) requests";
    for sql in [turns, log] {
        pool.run(sql, &[&gone, &kept]).await;
    }
    pool.login("w/u/d").await;
    let boots = tokio::sync::watch::channel(drawbridge::ids::BootId::new()).1;
    let ledger = Ledger::new(pool.store.db.clone(), boots, &Tasks::new());
    let left = async |table: &str| {
        let sql = format!("select count(*)::text from {table} t where t::text like '%{gone}%'");
        pool.texts(&sql).await[0].parse::<usize>().unwrap()
    };
    assert_eq!((left("turns").await, left("request_log").await), (200, 268));

    // Whoever moves it may vanish at any moment.
    let long = Duration::from_secs(3600);
    let mut patience = Duration::from_millis(1);
    while left("request_log").await == 268 {
        let batches = ledger.move_history_by(7, long);
        drop(tokio::time::timeout(patience, batches).await);
        patience *= 2;
    }
    let moves = (0..3).map(|_| ledger.move_history_by(7, long));
    for moved in join_all(moves).await {
        moved.unwrap();
    }
    assert_eq!(
        (left("turns").await, left("request_log").await),
        (20, 0),
        "open turns are their owners'"
    );
    // They have ended since, and one more wrote its answer: the last pass is for them.
    pool.run("update turns set state = 'settled'", &[]).await;
    pool.run("update account_merges set pass_began = merged_at", &[])
        .await;
    pool.run(
        "insert into http_bridge_leases (lease_id, scope_id, key_kind, key_hash, generation, account_id, retain_until)
            values (gen_random_uuid(), gen_random_uuid(), 'thread', '', 1, $1, 'infinity')",
        &[&older],
    )
    .await;
    assert_eq!(ledger.move_history_by(7, long).await.unwrap(), 0);
    ledger.move_history_by(100, Duration::ZERO).await.unwrap();
    assert_eq!((left("turns").await, left("request_log").await), (0, 0));
    assert_eq!(
        pool.texts("select account_id::text from http_bridge_leases")
            .await,
        [kept.to_string()]
    );
    let undone = "select count(*)::text from account_merges where done_at is null";
    assert_eq!(pool.texts(undone).await, ["0"]);
}

#[tokio::test]
async fn a_merge_of_a_merge_is_found_at_once() {
    let pool = Pool::new().await;
    let oldest = pool.login("-/-/e").await.id;
    let middle = pool.login("w/u/e").await.id;
    let newest = pool.login_by(BESIDE, "w/u/f").await.id;
    pool.login("w/u/e").await;
    pool.login_by(EMAIL, "w/u/e").await;
    assert_eq!(pool.ids().await, [oldest]);
    let merges = pool.accounts.merges().await.unwrap();
    assert_eq!((merges[&middle], merges[&newest]), (oldest, oldest));
}

/// The advisory locks that are held (or waited for) in this database, by class.
async fn advisory(pool: &Pool, granted: bool) -> Vec<(i32, i32)> {
    let sql = "select classid::int, objid::bigint from pg_locks l join pg_database d on d.oid = l.database
        where locktype = 'advisory' and datname = current_database() and granted = $1 and pid <> pg_backend_pid() order by 1";
    let rows = pool.store.client.query(sql, &[&granted]).await.unwrap();
    rows.iter()
        .map(|row| (row.get(0), row.get::<_, i64>(1) as u32 as i32))
        .collect()
}

#[tokio::test]
async fn each_switch_of_a_login_takes_its_locks_and_the_seat_comes_before_the_address() {
    let pool = Pool::new().await;
    let who = Who {
        workspace: Some("w".into()),
        user: Some("u".into()),
        email: Some(pepper().hash("email", b"e@example.test").to_vec()),
    };
    for (policy, expected) in [
        (EMAIL, &[LockClass::Seat, LockClass::Email][..]),
        (Policy::LOGIN, &[LockClass::Seat]),
        (EMAIL_ALONE, &[LockClass::Email]),
        (BESIDE, &[]),
    ] {
        // A row beside the seat's waits for nobody: its lock is its own, whatever the seat's logins hold.
        let others = if expected.is_empty() { EMAIL } else { policy };
        let locks: Vec<(i32, i32)> = locks(&who, others, AccountId::new())
            .into_iter()
            .map(|(class, key)| (class as i32, key))
            .collect();
        for (index, lock) in locks.iter().enumerate() {
            let mut other = pool.store.db.dedicated().await.unwrap();
            let held = format!(
                "begin; select pg_advisory_xact_lock({}, {})",
                lock.0, lock.1
            );
            let driver = tokio::spawn(async move { while other.1.next().await.is_some() {} });
            other.0.batch_execute(&held).await.unwrap();
            let login = pool.login_by(policy, "w/u/e");
            tokio::pin!(login);
            if expected.is_empty() {
                login.await;
            } else {
                let waits = until("the login waits for the lock that is held", async || {
                    advisory(&pool, false).await == [*lock]
                });
                tokio::select! {
                    _ = &mut login => panic!("{policy:?} does not wait for {lock:?}"),
                    () = waits => {}
                }
                let mut before = advisory(&pool, true).await;
                before.retain(|held| held != lock);
                assert_eq!(before, locks[..index], "{policy:?} before {lock:?}");
                other.0.batch_execute("commit").await.unwrap();
                login.await;
            }
            drop(other.0);
            driver.abort();
        }
    }
}

/// Another replica's memory of the pool.
struct Memory {
    keys: ApiKeys,
    upstream: Upstream,
    tasks: Tasks,
}

impl Memory {
    async fn of(pool: &Pool) -> Self {
        drop(rustls::crypto::ring::default_provider().install_default());
        let (db, tasks) = (pool.store.another(), Tasks::new());
        db.learn_time().await.unwrap();
        let bus = Bus::connect(&db).await.unwrap();
        let config = Settings::default().check().unwrap().upstream;
        let quota = Quota::load(&db, &bus, &tasks).await.unwrap();
        let keys = ApiKeys::load(&db, &bus, pepper(), &tasks).await.unwrap();
        let upstream = Upstream::start(&config, &db, &pool.accounts, &quota, &bus, &tasks)
            .await
            .unwrap();
        tasks.essential("bus", bus.run(tasks.clone()));
        Self {
            keys,
            upstream,
            tasks,
        }
    }

    async fn names(&self, key: &str, id: AccountId) -> bool {
        let key = self.keys.authenticate(key).await.unwrap();
        let granted = key.grants.accounts.as_deref().unwrap_or_default();
        granted.contains(&id) || self.upstream.view().account(id).is_some()
    }
}

#[tokio::test]
async fn key_scope_caches_and_views_of_other_replicas_hold_no_account_that_was_merged_or_deleted_within_a_second()
 {
    let pool = Pool::new().await;
    let kept = pool.login("w/u/a").await.id;
    let gone = pool.login_by(BESIDE, "w/u/b").await.id;
    let deleted = pool.login("w2/v/c").await.id;
    let key = pool.key(&[kept, gone, deleted]).await;
    let memories = [Memory::of(&pool).await, Memory::of(&pool).await];
    // They listen before anything happens.
    let noise = pool.login("w3/n/n").await.id;
    until("the replicas listen", async || {
        let mut views = memories.iter().map(|memory| memory.upstream.view());
        views.all(|view| view.account(noise).is_some())
    })
    .await;
    for id in [gone, deleted] {
        assert!(memories[0].names(&key, id).await);
        if id == gone {
            assert_eq!(pool.login("w/u/d").await.merged, [gone]);
        } else {
            pool.accounts.delete(deleted).await.unwrap();
        }
        let since = Instant::now();
        for memory in &memories {
            until("no cache names it", async || !memory.names(&key, id).await).await;
        }
        let took = since.elapsed();
        assert!(took < Duration::from_secs(1), "{took:?}");
        for memory in &memories {
            let canonical = if id == gone { kept } else { deleted };
            assert_eq!(memory.upstream.canonical(id), canonical);
            assert!(memory.names(&key, kept).await);
        }
    }
    for memory in memories {
        memory.tasks.stop();
    }
}

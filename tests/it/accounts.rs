//! What the accounts' rows promise: one per seat, nothing readable in them, and no change on an outdated credential.
#![expect(
    clippy::disallowed_methods,
    reason = "looks behind the back of the code under test, on a connection of its own"
)]

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use drawbridge::{
    account::{
        Accounts, AuthFile, Error, STATEMENTS, Sticky, Tokens,
        sticky::{Key, Kind},
    },
    bus::{Bus, Topic},
    db::Db,
    ids::{AccountId, ScopeId},
    routing::Lifecycle,
    secret::{self, KeyRing, Pepper},
};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::support::store::Store;

/// The rows, and what looks at them from both sides.
struct Pool {
    store: Store,
    accounts: Accounts,
}

impl Pool {
    async fn new() -> Self {
        let store = Store::direct().await;
        let accounts = accounts(store.db.clone());
        Self { store, accounts }
    }

    async fn import(&self, user: &str, token: &str) -> AccountId {
        self.accounts
            .import(&login("acct", Some(user), token), None)
            .await
            .unwrap()
            .id
    }

    async fn status(&self, id: AccountId) -> (Lifecycle, Option<String>) {
        let listed = self.accounts.list().await.unwrap();
        let account = listed.iter().find(|account| account.id == id).unwrap();
        (account.lifecycle, account.reason.clone())
    }

    async fn generation(&self, id: AccountId) -> i64 {
        self.accounts
            .credential(id)
            .await
            .unwrap()
            .unwrap()
            .generation
    }
}

fn accounts(db: Db) -> Accounts {
    let ring = KeyRing::parse(&KeyRing::generate("k1")).unwrap();
    Accounts::new(db, ring, Pepper::new([7; 32]))
}

fn jwt(claims: &Value) -> String {
    format!(
        "e30.{}.c2ln",
        BASE64_URL_SAFE_NO_PAD.encode(claims.to_string())
    )
}

/// A login of Canary@Example.test in a workspace; `token` is part of all of its tokens.
fn login(workspace: &str, user: Option<&str>, token: &str) -> AuthFile {
    let auth = json!({"chatgpt_account_id": workspace, "chatgpt_user_id": user, "chatgpt_plan_type": "plus"});
    let id = jwt(&json!({"email": "Canary@Example.test", "https://api.openai.com/auth": auth}));
    let file = json!({"last_refresh": "2026-01-02T03:04:05Z", "tokens": {
        "id_token": format!("{id}{token}"), "access_token": format!("access-{token}"), "refresh_token": format!("refresh-{token}"),
    }});
    AuthFile::parse(file.to_string().as_bytes()).unwrap()
}

fn tokens(name: &str) -> Tokens {
    let claims = json!({"exp": 1_900_000_000, "chatgpt_plan_type": "pro", "name": name});
    Tokens {
        access: SecretString::from(jwt(&claims)),
        refresh: SecretString::from(format!("refresh-{name}")),
        id_token: None,
    }
}

/// Every row of every table as text.
async fn dump(client: &Client) -> String {
    let tables = client
        .query(
            "select table_name::text from information_schema.tables where table_schema = 'public'",
            &[],
        )
        .await
        .unwrap();
    let mut text = String::new();
    for table in tables {
        let table: &str = table.get(0);
        for row in client
            .query(&format!("select t::text from {table} t"), &[])
            .await
            .unwrap()
        {
            text.push_str(row.get(0));
            text.push('\n');
        }
    }
    text
}

#[tokio::test]
async fn the_schema_takes_every_statement() {
    for store in Store::both_ways().await {
        let connection = store.db.connection().await.unwrap();
        for stmt in STATEMENTS {
            connection.check(stmt).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_seat_has_one_row_and_a_new_login_mends_it() {
    let pool = Pool::new().await;
    let first = pool
        .accounts
        .import(&login("acct", Some("user"), "one"), Some("mine"))
        .await
        .unwrap();
    assert!(first.created);
    assert!(
        pool.accounts
            .set_lifecycle(first.id, Lifecycle::ReauthRequired, "token_expired", 1)
            .await
            .unwrap()
    );
    assert_eq!(
        pool.status(first.id).await,
        (Lifecycle::ReauthRequired, Some("token_expired".into()))
    );

    let second = pool
        .accounts
        .import(&login("acct", Some("user"), "two"), None)
        .await
        .unwrap();
    assert_eq!(
        (second.id, second.created, second.label.as_deref()),
        (first.id, false, Some("mine"))
    );
    assert_eq!(pool.status(first.id).await, (Lifecycle::Active, None));
    let stored = pool.accounts.credential(first.id).await.unwrap().unwrap();
    assert_eq!(
        (stored.generation, stored.refresh.expose_secret()),
        (2, "refresh-two")
    );
    assert_eq!(stored.chatgpt_account_id.as_deref(), Some("acct"));
    assert_eq!(stored.refreshed_at, "2026-01-02T03:04:05Z".parse().unwrap());

    let [entry] = &pool.accounts.load_all().await.unwrap()[..] else {
        panic!("one seat, one row")
    };
    assert_eq!(
        (entry.id, entry.plan.as_str(), entry.lifecycle),
        (first.id, "plus", Lifecycle::Active)
    );
    assert!(entry.models.is_none());
}

#[tokio::test]
async fn seats_of_one_workspace_have_rows_of_their_own() {
    let pool = Pool::new().await;
    let one = pool.import("user-1", "one").await;
    let two = pool.import("user-2", "two").await;
    let nobody = pool
        .accounts
        .import(&login("acct", None, "three"), None)
        .await
        .unwrap();
    assert!(nobody.created && one != two);
    let again = pool
        .accounts
        .import(&login("acct", None, "four"), None)
        .await
        .unwrap();
    assert_eq!(
        (again.id, again.created),
        (nobody.id, false),
        "without a user id the e-mail tells"
    );
    let elsewhere = pool
        .accounts
        .import(&login("other", Some("user-1"), "five"), None)
        .await
        .unwrap();
    assert!(elsewhere.created);
}

#[tokio::test]
async fn racing_imports_of_a_seat_leave_one_row() {
    let store = Store::direct().await;
    let ring = KeyRing::parse(&KeyRing::generate("k1")).unwrap();
    let replicas: Vec<_> = (0..8)
        .map(|_| Accounts::new(store.another(), ring.clone(), Pepper::new([7; 32])))
        .collect();
    let file = login("acct", Some("user"), "one");
    let imports = replicas.iter().map(|accounts| accounts.import(&file, None));
    let imported = futures_util::future::join_all(imports).await;
    assert_eq!(
        imported
            .iter()
            .filter(|imported| imported.as_ref().unwrap().created)
            .count(),
        1
    );
    let [entry] = &replicas[0].load_all().await.unwrap()[..] else {
        panic!("one seat, one row")
    };
    assert_eq!(
        replicas[0]
            .credential(entry.id)
            .await
            .unwrap()
            .unwrap()
            .generation,
        8
    );
}

#[tokio::test]
async fn nothing_secret_stands_in_a_plain_column() {
    let pool = Pool::new().await;
    let id = pool.import("user", "canary").await;
    pool.accounts
        .rotate(id, 1, &tokens("canary"))
        .await
        .unwrap()
        .unwrap();
    let dump = dump(&pool.store.client).await.to_lowercase();
    assert!(dump.contains(&id.to_string()), "the dump shows rows");
    let hex = |text: &str| {
        text.bytes()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let access = tokens("canary").access.expose_secret().to_owned();
    for secret in [
        "canary",
        "Canary",
        "example.test",
        "Example.test",
        "refresh-",
        &access,
    ] {
        assert!(!dump.contains(&secret.to_lowercase()), "{secret}");
        assert!(!dump.contains(&hex(secret)), "{secret} as bytes");
    }
    assert_eq!(
        pool.accounts.list().await.unwrap()[0].email.as_deref(),
        Some("Canary@Example.test")
    );
}

#[tokio::test]
async fn a_sealed_value_opens_in_its_own_row_alone() {
    let pool = Pool::new().await;
    let (one, two) = (
        pool.import("user-1", "one").await,
        pool.import("user-2", "two").await,
    );
    for (what, sql) in [
        ("another row", "update account_credentials c set access_sealed = o.access_sealed from account_credentials o
            where c.account_id = $1 and o.account_id = $2"),
        ("another column", "update account_credentials set access_sealed = refresh_sealed where account_id = $1 and $2::uuid is not null"),
    ] {
        pool.store.client.execute(sql, &[&one, &two]).await.unwrap();
        let error = pool.accounts.credential(one).await.err().unwrap();
        assert!(matches!(error, Error::Secret(secret::Error::Broken)), "{what}: {error}");
    }
    assert!(pool.accounts.credential(two).await.unwrap().is_some());
}

#[tokio::test]
async fn tokens_and_verdicts_of_an_old_generation_change_nothing() {
    let pool = Pool::new().await;
    let bus = Bus::connect(&pool.store.db).await.unwrap();
    let id = pool.import("user", "one").await;
    let (left, right) = (tokens("left"), tokens("right"));
    let (left, right) = tokio::join!(
        pool.accounts.rotate(id, 1, &left),
        pool.accounts.rotate(id, 1, &right)
    );
    let mut outcomes = [left.unwrap(), right.unwrap()];
    outcomes.sort();
    assert_eq!(outcomes, [None, Some(2)]);
    let stored = pool.accounts.credential(id).await.unwrap().unwrap();
    assert_eq!(stored.access_expires_at.unwrap().as_second(), 1_900_000_000);
    assert!(
        stored.id_token.is_some(),
        "the old one stays where none came"
    );
    let plan = async || pool.accounts.load_all().await.unwrap()[0].plan.clone();
    assert_eq!(plan().await, "plus", "their claim is old news");
    let unknown = "update accounts set plan_type = 'unknown'";
    pool.store.client.execute(unknown, &[]).await.unwrap();
    let renewed = pool.accounts.rotate(id, 2, &tokens("renewed")).await;
    assert_eq!((renewed.unwrap(), &*plan().await), (Some(3), "pro"));

    bus.refresh().await.unwrap();
    let before = bus.changes(Topic::Accounts);
    assert!(
        !pool
            .accounts
            .set_lifecycle(id, Lifecycle::Deactivated, "account_deactivated", 1)
            .await
            .unwrap()
    );
    assert_eq!(
        pool.accounts.rotate(id, 1, &tokens("late")).await.unwrap(),
        None
    );
    bus.refresh().await.unwrap();
    assert_eq!(
        bus.changes(Topic::Accounts),
        before,
        "nobody is told of nothing"
    );
    assert_eq!(pool.status(id).await.0, Lifecycle::Active);

    assert!(
        pool.accounts
            .set_lifecycle(id, Lifecycle::Deactivated, "account_deactivated", 3)
            .await
            .unwrap()
    );
    bus.refresh().await.unwrap();
    assert!(bus.changes(Topic::Accounts) > before);
    assert_eq!(
        pool.accounts
            .rotate(AccountId::new(), 1, &tokens("nobody's"))
            .await
            .unwrap(),
        None
    );
}

#[tokio::test]
async fn an_older_login_replaces_no_newer_tokens_unless_those_are_refused() {
    let pool = Pool::new().await;
    let file = login("acct", Some("user"), "one");
    let id = pool.import("user", "one").await;
    pool.import("user", "one").await;
    pool.accounts
        .rotate(id, 2, &tokens("rotated"))
        .await
        .unwrap()
        .unwrap();
    let older = pool.accounts.import(&file, None).await.err().unwrap();
    assert!(matches!(older, Error::Older), "{older}");
    pool.accounts.pause(id).await.unwrap();
    let older = pool.accounts.import(&file, None).await.err().unwrap();
    assert!(matches!(older, Error::Older), "{older}");
    let stored = pool.accounts.credential(id).await.unwrap().unwrap();
    assert_eq!(
        (stored.generation, stored.refresh.expose_secret()),
        (3, "refresh-rotated")
    );
    assert_eq!(pool.status(id).await.0, Lifecycle::Paused);

    pool.accounts
        .set_lifecycle(id, Lifecycle::ReauthRequired, "token_expired", 3)
        .await
        .unwrap();
    let again = pool.accounts.import(&file, None).await.unwrap();
    assert_eq!((again.id, pool.generation(id).await), (id, 4));
}

#[tokio::test]
async fn what_changes_nothing_keeps_its_connection() {
    let pool = Pool::new().await;
    let id = pool.import("user", "one").await;
    let connections = async || {
        let sql = "select array_agg(pid order by pid) from pg_stat_activity where datname = current_database()";
        let row = pool.store.client.query_one(sql, &[]).await.unwrap();
        row.get::<_, Vec<i32>>(0)
    };
    pool.store
        .client
        .execute("update accounts set plan_type = 'team'", &[])
        .await
        .unwrap();
    let before = connections().await;
    let accounts = &pool.accounts;
    assert!(!accounts.see_plan(id, "free").await.unwrap());
    assert!(!accounts.see_plan(AccountId::new(), "free").await.unwrap());
    assert_eq!(accounts.rotate(id, 7, &tokens("late")).await.unwrap(), None);
    accounts.resume(id).await.unwrap();
    assert!(accounts.pause(AccountId::new()).await.is_err());
    assert!(accounts.delete(AccountId::new()).await.is_err());
    assert_eq!(connections().await, before);
}

#[tokio::test]
async fn a_verdict_that_races_a_new_login_never_hits_it() {
    let pool = Pool::new().await;
    let id = pool.import("user", "one").await;
    let file = login("acct", Some("user"), "two");
    for _ in 0..20 {
        let generation = pool.generation(id).await;
        let (verdict, import) = tokio::join!(
            pool.accounts
                .set_lifecycle(id, Lifecycle::ReauthRequired, "token_expired", generation),
            pool.accounts.import(&file, None),
        );
        verdict.unwrap();
        import.unwrap();
        assert_eq!(
            pool.status(id).await,
            (Lifecycle::Active, None),
            "whoever comes first"
        );
    }
}

#[tokio::test]
async fn an_operator_pauses_resumes_and_deletes_but_cannot_undo_upstreams_verdict() {
    let pool = Pool::new().await;
    let id = pool.import("user", "one").await;
    pool.accounts.pause(id).await.unwrap();
    assert_eq!(pool.status(id).await, (Lifecycle::Paused, None));
    pool.accounts.resume(id).await.unwrap();
    pool.accounts.resume(id).await.unwrap();
    assert_eq!(pool.status(id).await, (Lifecycle::Active, None));
    for ended in [Lifecycle::ReauthRequired, Lifecycle::Deactivated] {
        pool.import("user", "again").await;
        let generation = pool.generation(id).await;
        assert!(
            pool.accounts
                .set_lifecycle(id, ended, "code", generation)
                .await
                .unwrap()
        );
        assert!(
            matches!(pool.accounts.pause(id).await, Err(Error::Ended(status)) if status == ended)
        );
        assert!(
            matches!(pool.accounts.resume(id).await, Err(Error::Ended(status)) if status == ended)
        );
    }
    pool.accounts
        .store_models(id, &json!([{"slug": "m"}]))
        .await
        .unwrap();
    pool.accounts.delete(id).await.unwrap();
    assert!(matches!(
        pool.accounts.delete(id).await,
        Err(Error::Unknown)
    ));
    assert!(matches!(pool.accounts.pause(id).await, Err(Error::Unknown)));
    assert!(pool.accounts.credential(id).await.unwrap().is_none());
    assert!(
        !dump(&pool.store.client).await.contains(&id.to_string()),
        "nothing is left"
    );
}

#[tokio::test]
async fn a_catalogue_is_announced_only_when_it_changes() {
    let pool = Pool::new().await;
    let bus = Bus::connect(&pool.store.db).await.unwrap();
    let id = pool.import("user", "one").await;
    let mut versions = Vec::new();
    let entry = json!({"slug": "gpt", "nested": {"kept": [1, null]}});
    for models in [
        json!([entry, {"title": "no slug"}]),
        json!([entry, {"title": "no slug"}]),
        json!([entry, {"slug": 7}, {"slug": "mini"}]),
    ] {
        pool.accounts.store_models(id, &models).await.unwrap();
        bus.refresh().await.unwrap();
        versions.push(bus.changes(Topic::Models));
        assert_eq!(
            pool.accounts.models().await.unwrap(),
            [(id, models.as_array().unwrap().clone())]
        );
    }
    assert_eq!(versions[0], versions[1]);
    assert!(versions[1] < versions[2]);
    let slugs = pool.accounts.load_all().await.unwrap()[0]
        .models
        .clone()
        .unwrap();
    assert_eq!(slugs.iter().collect::<Vec<_>>(), ["gpt", "mini"]);

    pool.accounts.store_models(id, &json!([])).await.unwrap();
    assert!(
        pool.accounts.load_all().await.unwrap()[0].models.is_none(),
        "an empty catalogue says nothing"
    );
    pool.accounts
        .store_models(AccountId::new(), &json!([entry]))
        .await
        .unwrap();
    assert_eq!(
        pool.accounts.models().await.unwrap().len(),
        1,
        "an account that is gone has none"
    );
}

#[tokio::test]
async fn a_preference_is_read_once_kept_by_scope_and_purged_when_it_has_expired() {
    let pool = Pool::new().await;
    let id = pool.import("user", "one").await;
    let (scope, other) = (ScopeId::new(), ScopeId::new());
    let key = |value| Key::new(Kind::Thread, value);
    let insert =
        "insert into sticky_sessions (scope_id, key_kind, key_hash, account_id, expires_at)
        select $1, 'thread', $2, $3, clock_timestamp() + make_interval(secs => $4)";
    for (value, seconds) in [("live", 60.0), ("dead", -1.0)] {
        pool.store
            .client
            .execute(
                insert,
                &[&scope, &key(value).hash.as_slice(), &id, &seconds],
            )
            .await
            .unwrap();
    }
    let dead = "insert into sticky_sessions (scope_id, key_kind, key_hash, account_id, expires_at)
        select $1, 'session', int8send(n), $2, clock_timestamp() from generate_series(1, 2500) n";
    pool.store
        .client
        .execute(dead, &[&scope, &id])
        .await
        .unwrap();

    let sticky = Sticky::new(pool.store.db.clone());
    assert_eq!(sticky.get(scope, &key("live")).await, Some(id));
    assert_eq!(
        sticky.get(other, &key("live")).await,
        None,
        "a scope sees its own"
    );
    assert_eq!(
        sticky.get(scope, &Key::new(Kind::Session, "live")).await,
        None
    );
    assert_eq!(sticky.get(scope, &key("dead")).await, None);
    sticky.put(other, &key("live"), id);
    assert_eq!(sticky.get(other, &key("live")).await, Some(id));

    assert_eq!(sticky.purge_expired().await.unwrap(), 2501);
    assert_eq!(
        Sticky::new(pool.store.db.clone())
            .get(scope, &key("live"))
            .await,
        Some(id)
    );

    pool.store
        .client
        .execute("delete from sticky_sessions", &[])
        .await
        .unwrap();
    pool.store.db.close();
    assert_eq!(
        sticky.get(scope, &key("live")).await,
        Some(id),
        "from memory"
    );
    assert_eq!(
        sticky.get(scope, &key("unread")).await,
        None,
        "a database that is away prefers nothing"
    );
}

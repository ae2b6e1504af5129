//! Client keys come in when they should, and never when they should not.

use std::time::Duration;

use drawbridge::{
    api_key::{self, ApiKeys, AuthError, Created, Grants, NewKey, STATEMENTS},
    bus::Bus,
    db::Db,
    secret::Pepper,
    task::Tasks,
};
use jiff::{SignedDuration, Timestamp};
use secrecy::ExposeSecret as _;
use tokio::time::{Instant, sleep};

use crate::support::store::Store;

fn pepper() -> Pepper {
    Pepper::new([7; 32])
}

fn named(name: &str) -> NewKey {
    NewKey {
        name: name.into(),
        expires_at: None,
        scope_of: None,
        grants: Grants::default(),
    }
}

async fn create(db: &Db, new: &NewKey) -> Created {
    api_key::create(db, &pepper(), new).await.unwrap()
}

/// A key that is well formed and that nobody made here.
async fn stranger() -> String {
    let elsewhere = Store::direct().await;
    text(&create(&elsewhere.db, &named("stranger")).await)
}

fn text(created: &Created) -> String {
    created.secret.expose_secret().to_owned()
}

async fn load(db: &Db) -> ApiKeys {
    let bus = Bus::connect(db).await.unwrap();
    ApiKeys::load(db, &bus, pepper(), &Tasks::new())
        .await
        .unwrap()
}

/// A replica that follows the bus, until it is dropped.
struct Replica {
    keys: ApiKeys,
    tasks: Tasks,
}

impl Replica {
    async fn start(db: &Db) -> Self {
        let bus = Bus::connect(db).await.unwrap();
        let tasks = Tasks::new();
        let keys = ApiKeys::load(db, &bus, pepper(), &tasks).await.unwrap();
        tasks.essential("bus", bus.run(tasks.clone()));
        Self { keys, tasks }
    }

    /// Waits until a key is answered like this, as long as the bus may take.
    async fn answers(&self, text: &str, expected: AuthError) {
        let deadline = Instant::now() + Duration::from_millis(2_500);
        loop {
            let found = self.keys.authenticate(text).await;
            if found == Err(expected) {
                return;
            }
            assert!(Instant::now() < deadline, "still {found:?}");
            sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        self.tasks.stop();
    }
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
async fn a_key_works_the_moment_it_was_created_on_a_replica_that_has_not_heard_of_it() {
    for store in Store::both_ways().await {
        let keys = load(&store.db).await;
        assert!(!keys.any_created());
        for name in ["first", "second"] {
            let created = create(&store.db, &named(name)).await;
            let key = keys.authenticate(&text(&created)).await.unwrap();
            assert_eq!((key.id, key.name.as_str()), (created.key.id, name));
        }
        assert!(keys.any_created());
    }
}

#[tokio::test]
async fn a_malformed_key_is_refused_and_a_known_one_let_in_without_the_database() {
    let store = Store::direct().await;
    let known = text(&create(&store.db, &named("known")).await);
    let keys = load(&store.db).await;
    let stranger = stranger().await;
    store.db.close();
    assert!(keys.authenticate(&known).await.is_ok());
    for malformed in ["", "dbk_", "sk-1234", &known[..52], &format!("{known}x")] {
        assert_eq!(
            keys.authenticate(malformed).await,
            Err(AuthError::Malformed),
            "{malformed}"
        );
    }
    assert_eq!(
        keys.authenticate(&stranger).await,
        Err(AuthError::Unavailable)
    );
}

#[tokio::test]
async fn unknown_keys_share_one_read_of_versions_in_200_ms() {
    let store = Store::direct().await;
    let keys = load(&store.db).await;
    let stranger = stranger().await;

    let began = Instant::now();
    for _ in 0..3 {
        assert_eq!(keys.authenticate(&stranger).await, Err(AuthError::Unknown));
    }
    assert!(
        began.elapsed() >= Duration::from_millis(400),
        "one after the other they wait"
    );

    let began = Instant::now();
    let flood = (0..100).map(|_| keys.authenticate(&stranger));
    for answer in futures_util::future::join_all(flood).await {
        assert_eq!(answer, Err(AuthError::Unknown));
    }
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "together they do not: {:?}",
        began.elapsed()
    );
}

#[tokio::test]
async fn a_rotated_key_keeps_its_row_and_scope_and_its_old_secret_is_dead() {
    for store in Store::both_ways().await {
        let replica = Replica::start(&store.db).await;
        let old = create(&store.db, &named("laptop")).await;
        let before = replica.keys.authenticate(&text(&old)).await.unwrap();
        let new = api_key::rotate(&store.db, &pepper(), old.key.id)
            .await
            .unwrap();
        let after = replica.keys.authenticate(&text(&new)).await.unwrap();
        assert_eq!((before.id, before.scope), (after.id, after.scope));
        // The new one has made this replica look, so the old one is dead here already.
        assert_eq!(
            replica.keys.authenticate(&text(&old)).await,
            Err(AuthError::Unknown)
        );
    }
}

#[tokio::test]
async fn a_revoked_key_stays_out_on_every_replica_and_counts_as_created() {
    for store in Store::both_ways().await {
        let (one, other) = (
            Replica::start(&store.db).await,
            Replica::start(&store.db).await,
        );
        let created = create(&store.db, &named("lost laptop")).await;
        for replica in [&one, &other] {
            assert!(replica.keys.authenticate(&text(&created)).await.is_ok());
        }
        let first = api_key::revoke(&store.db, created.key.id).await.unwrap();
        for replica in [&one, &other] {
            replica.answers(&text(&created), AuthError::Revoked).await;
            assert!(replica.keys.any_created());
        }
        let again = api_key::revoke(&store.db, created.key.id).await.unwrap();
        assert_eq!(first.revoked_at, again.revoked_at);
        let rotated = api_key::rotate(&store.db, &pepper(), created.key.id).await;
        assert!(matches!(rotated, Err(api_key::Error::Revoked)));
        assert_eq!(
            load(&store.db).await.authenticate(&text(&created)).await,
            Err(AuthError::Revoked)
        );
    }
}

#[tokio::test]
async fn a_key_ends_at_its_instant_whatever_the_offset() {
    let store = Store::direct().await;
    store.db.learn_time().await.unwrap();
    // Columns hold microseconds.
    let now = Timestamp::from_second(store.db.clock().now().as_second()).unwrap();
    let keys = load(&store.db).await;
    for (minutes, expected) in [(-1, Err(AuthError::Expired)), (1, Ok(()))] {
        let end = now + SignedDuration::from_mins(minutes);
        for hours in [14, -9, 0] {
            let written = end.display_with_offset(jiff::tz::offset(hours)).to_string();
            let expires_at: Timestamp = written.parse().unwrap();
            let new = NewKey {
                expires_at: Some(expires_at),
                ..named(&written)
            };
            let created = create(&store.db, &new).await;
            assert_eq!(created.key.expires_at, Some(end));
            let found = keys.authenticate(&text(&created)).await.map(drop);
            assert_eq!(found, expected, "{written}");
        }
    }
}

#[tokio::test]
async fn a_scope_is_the_keys_own_unless_it_is_shared() {
    let store = Store::direct().await;
    let own = create(&store.db, &named("own")).await.key;
    assert_eq!(own.scope.0, own.id.0);
    let shared = NewKey {
        scope_of: Some(own.id),
        ..named("shared")
    };
    assert_eq!(create(&store.db, &shared).await.key.scope, own.scope);
    let nobodys = NewKey {
        scope_of: Some(drawbridge::ids::ApiKeyId::new()),
        ..named("nobody's")
    };
    let refused = api_key::create(&store.db, &pepper(), &nobodys).await;
    assert!(matches!(refused, Err(api_key::Error::NotFound)));
    assert_eq!(api_key::list(&store.db).await.unwrap().len(), 2);
}

#[tokio::test]
async fn nothing_that_is_stored_or_printed_gives_a_key_away() {
    let store = Store::direct().await;
    let created = create(&store.db, &named("secret")).await;
    let secret = text(&created);
    let row: String = store
        .client
        .query_one("select k::text from api_keys k", &[])
        .await
        .unwrap()
        .get(0);
    let keys = load(&store.db).await;
    let key = keys.authenticate(&secret).await.unwrap();
    for text in [row, format!("{created:?}"), format!("{keys:?} {key:?}")] {
        assert!(!text.contains(&secret[12..40]), "{text}");
    }
}

#[tokio::test]
async fn when_a_key_was_last_used_is_known_after_the_process_ended() {
    let store = Store::direct().await;
    let used = create(&store.db, &named("used")).await;
    create(&store.db, &named("unused")).await;
    let replica = Replica::start(&store.db).await;
    replica.keys.authenticate(&text(&used)).await.unwrap();
    replica.keys.flush().await;
    for key in api_key::list(&store.db).await.unwrap() {
        assert_eq!(
            key.last_used_at.is_some(),
            key.id == used.key.id,
            "{}",
            key.name
        );
    }
}

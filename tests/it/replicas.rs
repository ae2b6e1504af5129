//! Who lives, who is dead, and that nobody is both. At a tenth of the service's times.
#![expect(
    clippy::disallowed_methods,
    reason = "looks behind the back of the code under test, on a connection of its own"
)]

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use drawbridge::{
    db::{Db, Stmt},
    ids::{BootId, LeaseId, ScopeId},
    replica::{self, Replica, Timing},
    task::Tasks,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::time::sleep;

use crate::support::{process::Home, store::Store, wait::until};

fn timing() -> Timing {
    Timing::FULL.scaled(0.1)
}

/// A replica that beats until this is dropped.
struct Beating {
    replica: Replica,
    tasks: Tasks,
}

impl Beating {
    async fn start(db: &Db, name: &str) -> Self {
        let endpoint = Some(format!("http://{name}:2456"));
        let replica = Replica::register(db, name, endpoint, Vec::new(), timing())
            .await
            .unwrap();
        let tasks = Tasks::new();
        drop(tasks.spawn("heartbeat", replica.clone().beat(tasks.clone())));
        Self { replica, tasks }
    }
}

impl Drop for Beating {
    fn drop(&mut self) {
        self.tasks.stop();
    }
}

/// Whether somebody has declared an incarnation dead.
async fn dead(store: &Store, boot: BootId) -> bool {
    let row = store
        .client
        .query_one(
            "select dead_at is not null from bridge_replicas where boot_id = $1",
            &[&boot],
        )
        .await
        .unwrap();
    row.get(0)
}

fn statement(name: &str) -> &'static Stmt {
    let found = replica::STATEMENTS.iter().find(|stmt| stmt.name == name);
    found.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_heartbeat_and_a_burial_one_wins_and_nobody_dies_twice_or_comes_back() {
    const ROUNDS: usize = 60;
    const TTL: f64 = 0.002;
    let seed = rand::rng().random();
    println!("seed {seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let store = Store::direct().await;
    let (beat, bury) = (statement("replica.BEAT"), statement("replica.BURY"));
    let me = BootId::new();
    let mut beats = 0;
    for round in 0..ROUNDS {
        let boot = BootId::new();
        store
            .client
            .execute(
                "insert into bridge_replicas (boot_id, replica_name, expires_at) values ($1, 'x', clock_timestamp() + interval '5 ms')",
                &[&boot],
            )
            .await
            .unwrap();
        let burials = AtomicU64::new(0);
        let beating = async |mut random: StdRng| {
            let mut heard = 0;
            loop {
                let over = burials.load(Ordering::SeqCst) > 0;
                let row = store.db.opt(beat, &[&boot, &TTL]).await.unwrap();
                match row {
                    Some(_) => assert!(!over, "round {round}: a heartbeat after the burial"),
                    None => return heard,
                }
                heard += 1;
                sleep(Duration::from_micros(random.random_range(0..4000))).await;
            }
        };
        let burying = async |mut random: StdRng| {
            // On after the first success: a second must find nothing.
            let mut after = 0;
            while after < 3 {
                let buried = store.db.exec(bury, &[&me, &0.0]).await.unwrap();
                after += u64::from(burials.fetch_add(buried, Ordering::SeqCst) + buried > 0);
                sleep(Duration::from_micros(random.random_range(0..1000))).await;
            }
        };
        let mut fork = || StdRng::seed_from_u64(random.random());
        let (one, other, (), ()) = tokio::join!(
            beating(fork()),
            beating(fork()),
            burying(fork()),
            burying(fork())
        );
        beats += one + other;
        assert_eq!(burials.into_inner(), 1, "round {round}");
        let row = store
            .client
            .query_one(
                "select expires_at - make_interval(secs => $2) <= dead_at from bridge_replicas where boot_id = $1",
                &[&boot, &TTL],
            )
            .await
            .unwrap();
        assert!(row.get::<_, bool>(0), "round {round}: prolonged when dead");
    }
    assert!(beats > ROUNDS, "{beats} heartbeats are no race");
}

#[tokio::test]
async fn a_late_heartbeat_of_a_replica_that_nobody_buried_goes_on_as_before() {
    let store = Store::direct().await;
    let (db, chaos) = store.behind_chaos().await;
    let here = Beating::start(&db, "here").await;
    let boot = here.replica.boot();
    assert!(here.replica.admits());
    chaos.hang();
    until("the deadline passes", async || !here.replica.admits()).await;
    sleep(timing().ttl).await;
    chaos.heal();
    until("it admits again", async || here.replica.admits()).await;
    assert_eq!(here.replica.boot(), boot);
    assert!(!dead(&store, boot).await);
}

#[tokio::test]
async fn an_outage_of_the_database_buries_nobody() {
    let store = Store::direct().await;
    let (db, chaos) = store.behind_chaos().await;
    let (other_db, other_chaos) = store.behind_chaos().await;
    let one = Beating::start(&db, "one").await;
    let other = Beating::start(&other_db, "other").await;
    let boots = [one.replica.boot(), other.replica.boot()];
    // Long enough that each could bury the other.
    sleep(2 * (timing().ttl + timing().grace)).await;
    chaos.hang();
    other_chaos.hang();
    sleep(2 * (timing().ttl + timing().grace)).await;
    assert!(!one.replica.admits() && !other.replica.admits());
    // The first that is back finds the other silent for long.
    chaos.heal();
    until("one is back", async || one.replica.admits()).await;
    until("it has looked around", async || {
        one.replica.peer(boots[1]).is_some_and(|peer| !peer.alive)
    })
    .await;
    other_chaos.heal();
    until("the other is back", async || {
        one.replica.peer(boots[1]).is_some_and(|peer| peer.alive)
    })
    .await;
    assert_eq!([one.replica.boot(), other.replica.boot()], boots);
    for boot in boots {
        assert!(!dead(&store, boot).await);
    }
}

#[tokio::test]
async fn a_replica_that_is_cut_off_stops_before_it_is_buried_and_comes_back_as_another() {
    let store = Store::direct().await;
    let (db, chaos) = store.behind_chaos().await;
    let away = Beating::start(&db, "away").await;
    let peer = Beating::start(&store.another(), "peer").await;
    let (old, mut boots) = (away.replica.boot(), away.replica.boots());
    until("they know each other", async || {
        peer.replica.peer(old).is_some() && away.replica.peer(peer.replica.boot()).is_some()
    })
    .await;
    sleep(timing().ttl + timing().grace).await;
    chaos.hang();
    until("the peer buries it", async || {
        // In this order: admitting is sampled before the burial is.
        let admitted = away.replica.admits();
        let buried = dead(&store, old).await;
        assert!(!(buried && away.replica.admits()), "admits although buried");
        assert!(admitted || !away.replica.admits(), "nothing revives it");
        buried
    })
    .await;
    chaos.heal();
    boots.changed().await.unwrap();
    let new = *boots.borrow_and_update();
    assert_ne!(new, old);
    until("it admits again", async || away.replica.admits()).await;
    assert!(dead(&store, old).await && !dead(&store, new).await);
    until("the peer sees the new one alone", async || {
        peer.replica.peer(new).is_some() && peer.replica.peer(old).is_none()
    })
    .await;
}

#[tokio::test]
async fn a_connection_that_hangs_does_not_hold_up_the_next_heartbeat() {
    let store = Store::direct().await;
    let (db, chaos) = store.behind_chaos().await;
    let here = Beating::start(&db, "here").await;
    let boot = here.replica.boot();
    for _ in 0..3 {
        chaos.hang_present();
        let before = here.replica.deadline();
        until("a heartbeat on another connection", async || {
            here.replica.deadline() > before
        })
        .await;
        assert!(here.replica.admits(), "well before the deadline");
    }
    assert_eq!(here.replica.boot(), boot);
}

#[tokio::test]
async fn a_registration_declares_its_predecessor_dead_in_the_same_statement() {
    let store = Store::direct().await;
    let (first, second) = (BootId::new(), BootId::new());
    let register = statement("replica.REGISTER");
    for (boot, before) in [(first, None), (second, Some(first))] {
        let (endpoint, draining, keys) = (None::<&str>, false, Vec::<String>::new());
        store
            .db
            .exec(
                register,
                &[
                    &boot, &"x", &endpoint, &60.0, &draining, &before, &"1", &keys,
                ],
            )
            .await
            .unwrap();
    }
    assert!(dead(&store, first).await && !dead(&store, second).await);
}

#[tokio::test]
async fn replicas_of_one_name_are_told_apart_and_one_that_leaves_is_gone_at_once() {
    let store = Store::direct().await;
    let one = Beating::start(&store.db, "same").await;
    let other = Beating::start(&store.another(), "same").await;
    let (here, there) = (one.replica.boot(), other.replica.boot());
    assert_ne!(here, there);
    until("they see each other", async || {
        one.replica.peer(there).is_some() && other.replica.peer(here).is_some()
    })
    .await;
    let seen = one.replica.peer(there).unwrap();
    assert!(seen.alive && !seen.draining);
    assert_eq!(seen.endpoint.as_deref(), Some("http://same:2456"));

    other.replica.drain().await.unwrap();
    until("the draining is seen", async || {
        one.replica.peer(there).is_some_and(|peer| peer.draining)
    })
    .await;
    other.tasks.stop();
    other.replica.leave().await.unwrap();
    assert!(dead(&store, there).await && !dead(&store, here).await);
    until("it is gone", async || one.replica.peers().is_empty()).await;
}

#[tokio::test]
async fn a_heartbeat_writes_its_own_row_and_touches_none_of_ten_thousand_leases() {
    let store = Store::direct().await;
    let here = Beating::start(&store.db, "here").await;
    store
        .client
        .execute(
            "insert into http_bridge_leases (lease_id, scope_id, key_kind, key_hash, generation, owner_boot, retain_until)
             select gen_random_uuid(), gen_random_uuid(), 'thread', '\\x00', n, $1, clock_timestamp() + interval '1 day'
             from generate_series(1, 10000) n",
            &[&here.replica.boot()],
        )
        .await
        .unwrap();
    // What the database counts becomes visible when a connection reports it.
    let report = "select pg_stat_force_next_flush()";
    store.client.execute(report, &[]).await.unwrap();
    let touched = async || {
        let rows = store
            .client
            .query(
                "select n_tup_upd, n_tup_upd + n_tup_del + seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_user_tables
                 where relname in ('bridge_replicas', 'http_bridge_leases') order by relname",
                &[],
            )
            .await
            .unwrap();
        (rows[0].get::<_, i64>(0), rows[1].get::<_, i64>(1))
    };
    until("the insertion is counted", async || {
        let sql = "select n_tup_ins = 10000 from pg_stat_user_tables where relname = 'http_bridge_leases'";
        store.client.query_one(sql, &[]).await.unwrap().get(0)
    })
    .await;
    let (beats, leases) = touched().await;
    until("five more heartbeats", async || {
        touched().await.0 >= beats + 5
    })
    .await;
    assert_eq!(touched().await.1, leases);
}

#[tokio::test]
async fn the_dead_are_forgotten_after_a_day_and_what_they_owned_is_free() {
    let store = Store::direct().await;
    let (long_ago, lately, alive) = (BootId::new(), BootId::new(), BootId::new());
    let lease = LeaseId::new();
    for (boot, dead_for) in [
        (long_ago, Some(25.0)),
        (lately, Some(23.0)),
        (alive, None::<f64>),
    ] {
        store
            .client
            .execute(
                "insert into bridge_replicas (boot_id, replica_name, expires_at, dead_at)
                 values ($1, 'x', clock_timestamp(), clock_timestamp() - make_interval(hours => 1) * $2::float8)",
                &[&boot, &dead_for],
            )
            .await
            .unwrap();
    }
    store
        .client
        .execute(
            "insert into http_bridge_leases (lease_id, scope_id, key_kind, key_hash, generation, owner_boot, retain_until)
             values ($1, $2, 'thread', '\\x00', 1, $3, clock_timestamp())",
            &[&lease, &ScopeId::ANONYMOUS, &long_ago],
        )
        .await
        .unwrap();
    let day = Duration::from_secs(24 * 3600);
    assert_eq!(replica::prune(&store.db, day).await.unwrap(), 1);
    assert_eq!(replica::prune(&store.db, day).await.unwrap(), 0);
    let left = replica::list(&store.db, Timing::FULL).await.unwrap();
    let mut left: Vec<_> = left
        .iter()
        .map(|listed| (listed.boot_id, listed.state.as_str()))
        .collect();
    left.sort_by_key(|(_, state)| *state);
    assert_eq!(left, [(lately, "dead"), (alive, "silent")]);
    let row = store
        .client
        .query_one(
            "select owner_boot is null from http_bridge_leases where lease_id = $1",
            &[&lease],
        )
        .await
        .unwrap();
    assert!(row.get::<_, bool>(0));
}

#[tokio::test]
async fn the_command_shows_who_lives_who_is_silent_and_who_is_dead() {
    let home = Home::new()
        .await
        .set("DRAWBRIDGE_TEST_TIME_SCALE", "0.1")
        .set("DRAWBRIDGE_REPLICA_NAME", "bridge");
    let states = async || {
        let listed = home.json(&["replicas", "list"]).await;
        let mut states: Vec<String> = listed
            .as_array()
            .unwrap()
            .iter()
            .map(|replica| {
                assert_eq!(replica["name"], "bridge");
                assert!(replica["heartbeat_age_seconds"].is_number());
                replica["state"].as_str().unwrap().to_owned()
            })
            .collect();
        states.sort();
        states
    };
    let service = home.serve().await;
    assert_eq!(states().await, ["alive"]);
    service.kill().await;
    until("its heartbeat runs out", async || {
        states().await == ["silent"]
    })
    .await;
    let service = home.serve().await;
    until("its successor buries it", async || {
        states().await == ["alive", "dead"]
    })
    .await;
    let table = home.ok(&["replicas", "list"]).await;
    assert!(table.starts_with("BOOT"), "{table}");
    service.stop().await;
    assert_eq!(states().await, ["dead", "dead"]);
}

//! A change is heard of, whatever carries the hint. Behind a transaction pooler, where LISTEN does not work, so that Redis is all there is.

use std::time::Duration;

use drawbridge::{
    bus::{self, Bus, Redis, Topic},
    db::Db,
    task::Tasks,
};
use secrecy::SecretString;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;

use crate::support::{pg::free_port, process::Home, redis::RedisServer, store::Store, wait::until};

/// What the bus promises with Redis, and by poll alone.
const HURRIED: Duration = Duration::from_secs(1);
const POLLED: Duration = Duration::from_millis(2500);

/// A process's bus, until this is dropped.
struct Listening {
    bus: Bus,
    db: Db,
    tasks: Tasks,
}

impl Listening {
    async fn start(db: &Db, redis: &str) -> Self {
        let (bus, tasks) = (Bus::connect(db).await.unwrap(), Tasks::new());
        let redis = Redis::new(&SecretString::from(redis)).unwrap();
        tasks.essential("redis", bus.clone().over_redis(redis, tasks.clone()));
        tasks.essential("bus", bus.clone().run(tasks.clone()));
        Self {
            bus,
            db: db.clone(),
            tasks,
        }
    }

    async fn bump(&self, topic: Topic) {
        let tx = self.db.begin().await.unwrap();
        bus::commit(tx, &[topic]).await.unwrap();
    }

    /// Changes something here, and sees `there` hear of it.
    async fn is_heard(&self, there: &Self, within: Duration) {
        let mut heard = there.bus.subscribe(Topic::Quota);
        self.bump(Topic::Quota).await;
        let change = timeout(within, heard.changed()).await;
        change.expect("heard in time").expect("the bus runs");
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        assert!(!self.tasks.failed() || std::thread::panicking());
        self.tasks.stop();
    }
}

/// Another client of the same Redis.
fn stranger(url: &str) -> redis::Connection {
    let client = redis::Client::open(url).unwrap();
    client.get_connection().unwrap()
}

/// Waits until so many processes are subscribed.
async fn subscribed(url: &str, wanted: usize) {
    let mut stranger = stranger(url);
    until("all are subscribed", async || {
        let (_, count): (String, usize) = redis::cmd("PUBSUB")
            .arg("NUMSUB")
            .arg("drawbridge")
            .query(&mut stranger)
            .unwrap();
        count == wanted
    })
    .await;
}

/// How often `bus_versions` was read, as far as Postgres has counted.
async fn reads(client: &Client) -> i64 {
    let scans = "select coalesce(sum(seq_scan + coalesce(idx_scan, 0)), 0)::bigint from pg_stat_user_tables where relname = 'bus_versions'";
    client.query_one(scans, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn with_redis_a_change_is_heard_of_within_a_second_where_listen_does_not_work() {
    let (_store, db) = Store::pooled_alone().await;
    let port = free_port();
    let url = format!("redis://127.0.0.1:{port}");
    let _redis = RedisServer::start(port).await;
    let (here, there) = (
        Listening::start(&db, &url).await,
        Listening::start(&db, &url).await,
    );
    subscribed(&url, 2).await;
    // LISTEN is given up by then, and a poll every two seconds would not do.
    sleep(Duration::from_secs(1)).await;
    for _ in 0..10 {
        here.is_heard(&there, HURRIED).await;
        there.is_heard(&here, HURRIED).await;
    }
}

#[tokio::test]
async fn redis_may_be_absent_at_the_start_die_and_come_back() {
    let (_store, db) = Store::pooled_alone().await;
    let port = free_port();
    let url = format!("redis://127.0.0.1:{port}");
    let (here, there) = (
        Listening::start(&db, &url).await,
        Listening::start(&db, &url).await,
    );
    here.is_heard(&there, POLLED).await;
    for _ in 0..2 {
        let redis = RedisServer::start(port).await;
        subscribed(&url, 2).await;
        for _ in 0..3 {
            here.is_heard(&there, HURRIED).await;
        }
        drop(redis);
        here.is_heard(&there, POLLED).await;
    }
}

#[tokio::test]
async fn a_failover_that_lost_changes_hides_none_that_follow() {
    let (store, db) = Store::pooled_alone().await;
    let bus = Bus::connect(&db).await.unwrap();
    let mut heard = bus.subscribe(Topic::ApiKeys);
    let mut changed = async |write: &str, hears: bool| {
        store.client.batch_execute(write).await.unwrap();
        bus.refresh().await.unwrap();
        let change = timeout(Duration::ZERO, heard.changed()).await;
        assert_eq!(change.is_ok(), hears, "{write}");
    };
    let bump = "update bus_versions set version = version + 1 where topic = 'api_keys'";
    for _ in 0..3 {
        changed(bump, true).await;
    }
    changed("select 1", false).await;
    // The standby never heard of two of them.
    let lost = "update bus_versions set version = version - 2 where topic = 'api_keys'";
    changed(lost, true).await;
    changed(bump, true).await;
    // And where nobody looked in between.
    changed(&format!("{lost}; {bump}; {bump}"), false).await;
    bus.doubt();
    changed("select 1", true).await;
}

#[tokio::test]
async fn ten_thousand_forged_messages_cost_a_few_reads_and_change_nothing() {
    let (store, db) = Store::pooled_alone().await;
    let port = free_port();
    let url = format!("redis://127.0.0.1:{port}");
    let _redis = RedisServer::start(port).await;
    let (here, there) = (
        Listening::start(&db, &url).await,
        Listening::start(&db, &url).await,
    );
    subscribed(&url, 2).await;
    let (began, before) = (Instant::now(), reads(&store.client).await);
    let changes = there.bus.changes(Topic::Accounts);
    let forging = std::thread::spawn({
        let url = url.clone();
        move || {
            let mut stranger = stranger(&url);
            for round in 0..100 {
                let mut messages = redis::pipe();
                for _ in 0..25 {
                    for forged in [
                        "accounts 9223372036854775807",
                        "accounts 1",
                        "leases 5",
                        "\u{0}",
                    ] {
                        messages
                            .cmd("PUBLISH")
                            .arg("drawbridge")
                            .arg(forged)
                            .ignore();
                    }
                }
                let sent: redis::RedisResult<()> = messages.query(&mut stranger);
                sent.unwrap_or_else(|error| panic!("round {round}: {error}"));
                // For as long as it takes to tell a few reads from one for each round.
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
    until("all are sent", async || forging.is_finished()).await;
    forging.join().unwrap();
    assert_eq!(there.bus.changes(Topic::Accounts), changes);
    here.is_heard(&there, HURRIED).await;
    // Postgres counts a second later.
    sleep(Duration::from_millis(1500)).await;
    here.is_heard(&there, HURRIED).await;
    let read = reads(&store.client).await - before;
    // Two processes, five hints and two polls a second, and what was not counted before.
    let most = 2 * 7 * (began.elapsed().as_secs() as i64 + 2) + 20;
    assert!(read <= most, "{read} reads, {most} are fair");
    assert!(read > 0, "Postgres counts");
}

#[tokio::test]
async fn a_command_tells_running_services_over_tls_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (certificate, key) = (path("certificate"), path("key"));
    let made = std::process::Command::new("openssl")
        .args(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=x"
                .split(' '),
        )
        .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-out")
        .arg(&certificate)
        .arg("-keyout")
        .arg(&key)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let (port, tls_port) = (free_port(), free_port());
    let tls = [
        "--tls-port",
        &tls_port.to_string(),
        "--tls-cert-file",
        certificate.to_str().unwrap(),
        "--tls-key-file",
        key.to_str().unwrap(),
        "--tls-ca-cert-file",
        certificate.to_str().unwrap(),
        "--tls-auth-clients",
        "no",
    ];
    let _redis = RedisServer::with(port, &tls).await;
    let mut stranger = stranger(&format!("redis://127.0.0.1:{port}"));
    let mut told = stranger.as_pubsub();
    told.subscribe("drawbridge").unwrap();
    told.set_read_timeout(Some(Duration::from_secs(5))).unwrap();

    let home = Home::new()
        .await
        .set(
            "DRAWBRIDGE_REDIS_URL",
            &format!("rediss://localhost:{tls_port}"),
        )
        .set("SSL_CERT_FILE", certificate.to_str().unwrap());
    home.key("laptop").await;
    let message: String = told.get_message().unwrap().get_payload().unwrap();
    assert_eq!(message, "api_keys 1");
}

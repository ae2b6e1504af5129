//! `drawbridge doctor`: what is well is said to be, and what is broken is found, by its name, with what to do.

use axum::{Router, http::StatusCode, routing::get};
use drawbridge::{
    db::{Endpoint, migrate},
    secret::KeyRing,
};
use loadtest::{
    edge::Mode,
    upstream::{Fault, Kind, Stage},
};
use secrecy::ExposeSecret as _;
use serde_json::Value;
use tokio_postgres::Client;

use crate::support::{
    cluster::{Cluster, Plan},
    pg::{self, TestDb},
    pgbouncer::PgBouncer,
    process::Home,
    redis::RedisServer,
};

/// What a run said.
struct Report {
    code: Option<i32>,
    findings: Vec<Value>,
    /// Whatever was printed.
    text: String,
}

impl Report {
    async fn of(home: &Home, arguments: &[&str], settings: &[(&str, &str)]) -> Self {
        let mut command = home.command(&[&["doctor", "--json"], arguments].concat());
        let output = command
            .envs(settings.iter().copied())
            .output()
            .await
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let told: Value = serde_json::from_str(&text).unwrap_or_default();
        Self {
            code: output.status.code(),
            findings: told["findings"].as_array().cloned().unwrap_or_default(),
            text: text + &String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The verdict on something, and what was seen.
    fn of_name(&self, name: &str) -> (&str, &str) {
        let mut found = self
            .findings
            .iter()
            .filter(|finding| finding["name"] == name);
        let found = found
            .next()
            .unwrap_or_else(|| panic!("nothing of {name}: {}", self.text));
        (
            found["verdict"].as_str().unwrap(),
            found["seen"].as_str().unwrap(),
        )
    }

    /// Every finding with this verdict.
    fn with(&self, verdict: &str) -> Vec<&str> {
        let found = self
            .findings
            .iter()
            .filter(|finding| finding["verdict"] == verdict);
        found
            .map(|finding| finding["name"].as_str().unwrap())
            .collect()
    }

    fn expects(&self, name: &str, verdict: &str, says: &str) {
        let (found, seen) = self.of_name(name);
        assert!(
            found == verdict && seen.contains(says),
            "{name} {verdict} {says}: {}",
            self.text
        );
        let code = i32::from(!self.with("fail").is_empty());
        assert_eq!(self.code, Some(code), "{}", self.text);
    }
}

/// A migrated database of its own, with one account, and how the program is run on it.
async fn home() -> (Home, TestDb, Client) {
    let test = TestDb::migrated(async |url| {
        migrate(&Endpoint::parse(&url).unwrap()).await.unwrap();
    })
    .await;
    let client = test.connect().await;
    let keys = KeyRing::generate("k1");
    let home = Home::new()
        .await
        .set("DRAWBRIDGE_DATABASE_URL", &test.url)
        .set("DRAWBRIDGE_MASTER_KEYS", keys.expose_secret());
    home.import("alice").await;
    (home, test, client)
}

#[tokio::test]
async fn a_fleet_that_is_well_is_said_to_be_and_a_peer_that_is_cut_off_is_found() {
    let plan = Plan {
        replicas: 2,
        redis: true,
        ..Plan::default()
    };
    let mut cluster = Cluster::start(plan).await;
    let redis = format!(
        "redis://{}",
        cluster.replicas[0].redis.as_ref().unwrap().address
    );
    let settings = [
        ("DRAWBRIDGE_REDIS_URL", redis.as_str()),
        ("DRAWBRIDGE_MAX_SESSIONS", "8"),
    ];
    let well = Report::of(&cluster.home, &[], &settings).await;
    assert_eq!(well.code, Some(0), "{}", well.text);
    assert_eq!(
        (well.with("fail"), well.with("warn")),
        (vec![], vec![]),
        "{}",
        well.text
    );
    for (name, says) in [
        ("settings", "every name is known"),
        ("database", "Postgres "),
        ("direct-url", "no pooler"),
        ("clock", " s from this host"),
        ("schema", "as this release has it"),
        ("connections", "a rollout of 2 needs 62"),
        ("master-keys", "k1: they open this installation"),
        ("sealed", "values under `k1`"),
        ("heartbeats", "r0 alive"),
        ("versions", "2 of "),
        ("rings", "every replica opens"),
        ("peer r0", "answers"),
        ("peer r1", "answers"),
        ("leases", "none"),
        ("volume", "request log"),
        ("accounts", "1 active"),
        ("redis", "a message to ourselves"),
        ("upstream", "answers 401"),
        ("auth", "answers 404"),
        ("files", "8 sessions"),
    ] {
        well.expects(name, "ok", says);
    }
    let text = cluster.home.command(&["doctor"]).output().await.unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.starts_with("ok    settings      every name is known\nok    database      Postgres "),
        "{text}"
    );

    cluster.replicas[1].peers.set(Mode::Refuse);
    let cut = Report::of(&cluster.home, &[], &settings).await;
    cut.expects("peer r1", "fail", "does not answer");
    cut.expects("peer r0", "ok", "answers");
    // One that was given other keys than the rest.
    let other = format!(
        "{},{}",
        KeyRing::generate("k7").expose_secret(),
        cluster_keys(&cluster).await
    );
    cluster.stop(1).await;
    cluster.set(1, "DRAWBRIDGE_MASTER_KEYS", other);
    cluster.serve(1).await;
    let apart = Report::of(&cluster.home, &[], &settings).await;
    apart.expects("rings", "fail", "this ring lacks k7:");
}

/// The keys that the processes of a cluster have, as a command of it is given them.
async fn cluster_keys(cluster: &Cluster) -> String {
    let command = cluster.home.command(&[]);
    let mut settings = command.as_std().get_envs();
    let keys = settings.find(|(name, _)| *name == "DRAWBRIDGE_MASTER_KEYS");
    keys.unwrap().1.unwrap().to_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_pooler_on_the_direct_url_is_found_and_one_on_the_other_is_not_complained_of() {
    let (home, test, _) = home().await;
    let pooler = PgBouncer::start().await;
    let pooled = pooler.url(&test);
    let found = Report::of(&home, &[], &[("DRAWBRIDGE_DATABASE_URL", &pooled)]).await;
    found.expects(
        "direct-url",
        "warn",
        "a pooler: notifications do not arrive",
    );
    let both = [
        ("DRAWBRIDGE_DATABASE_URL", pooled.as_str()),
        ("DRAWBRIDGE_DATABASE_DIRECT_URL", &test.url),
    ];
    let found = Report::of(&home, &[], &both).await;
    found.expects("direct-url", "ok", "no pooler");
    found.expects("direct", "ok", "Postgres");
}

#[tokio::test]
async fn what_is_broken_is_found_by_its_name_and_decides_the_exit_code() {
    let (home, test, client) = home().await;
    let nowhere = format!("127.0.0.1:{}", pg::free_port());
    let database = format!("postgres://u:hunter2@{nowhere}/db");
    let redis = format!("redis://:hunter2@{nowhere}");
    let keys = KeyRing::generate("k1").expose_secret().to_owned();
    let upstream = format!("http://u:hunter2@{nowhere}");
    for (settings, name, verdict, says) in [
        (&[][..], "replicas", "warn", "none runs"),
        (&[], "accounts", "ok", "1 active"),
        (
            &[("DRAWBRIDGE_LISTN", "x")],
            "settings",
            "fail",
            "did you mean DRAWBRIDGE_LISTEN?",
        ),
        (
            &[("DRAWBRIDGE_DATABASE_URL", database.as_str())],
            "database",
            "fail",
            "connect",
        ),
        (
            &[("DRAWBRIDGE_DATABASE_DIRECT_URL", database.as_str())],
            "direct",
            "fail",
            "connect",
        ),
        (
            &[("DRAWBRIDGE_REDIS_URL", redis.as_str())],
            "redis",
            "fail",
            "",
        ),
        (
            &[("DRAWBRIDGE_MASTER_KEYS", keys.as_str())],
            "master-keys",
            "fail",
            "does not open",
        ),
        (
            &[("DRAWBRIDGE_UPSTREAM_URL", upstream.as_str())],
            "upstream",
            "fail",
            "onnect",
        ),
        (
            &[("DRAWBRIDGE_AUTH_URL", upstream.as_str())],
            "auth",
            "fail",
            "onnect",
        ),
        (
            &[("DRAWBRIDGE_MAX_SESSIONS", "100000000")],
            "files",
            "warn",
            "need 200001024",
        ),
    ] {
        let found = Report::of(&home, &[], settings).await;
        found.expects(name, verdict, says);
        assert!(!found.text.contains("hunter2"), "{}", found.text);
        assert!(!found.text.contains(&keys[3..]), "{}", found.text);
    }
    let lease = "
        insert into http_bridge_leases
            (lease_id, scope_id, key_kind, key_hash, generation, busy_turn, retain_until)
        values (gen_random_uuid(), gen_random_uuid(), 'x', '', 1, gen_random_uuid(), now())";
    let log = "
        insert into request_log
            (day, turn_id, request_id, scope_id, route, transport, outcome, attempts, total_ms)
        values (current_date - 40, gen_random_uuid(), gen_random_uuid(), gen_random_uuid(),
            'r', 't', 'o', 1, 1)";
    let login = "update accounts set status = 'reauth_required'";
    let newer = "insert into refinery_schema_history values (999, 'later', '', '1')";
    let older = "delete from refinery_schema_history where version >= 4";
    let other = "update refinery_schema_history set checksum = '7' where version = 1";
    for (change, name, verdict, says) in [
        (
            lease,
            "leases",
            "warn",
            "1 with a turn of an owner that is dead",
        ),
        (log, "volume", "warn", "40 days old of 30"),
        (login, "accounts", "warn", "1 reauth_required"),
        (newer, "schema", "warn", "V999 is of a newer release"),
        (older, "schema", "fail", "V3, this release needs V"),
        (other, "schema", "fail", "V1 was applied with another text"),
    ] {
        client.batch_execute(change).await.unwrap();
        let found = Report::of(&home, &[], &[]).await;
        found.expects(name, verdict, says);
    }
    let empty = TestDb::empty().await;
    let found = Report::of(&home, &[], &[("DRAWBRIDGE_DATABASE_URL", &empty.url)]).await;
    found.expects("schema", "fail", "V0, this release needs V");
    let bad = Report::of(&home, &[], &[("DRAWBRIDGE_LISTEN", "nowhere")]).await;
    assert_eq!(bad.code, Some(64), "{}", bad.text);
    let bad = Report::of(&home, &[], &[("DRAWBRIDGE_MASTER_KEYS", "k1:AAAA")]).await;
    assert_eq!(bad.code, Some(64), "{}", bad.text);
    drop(test);
}

#[tokio::test]
async fn an_embedded_installation_is_looked_at_and_not_made() {
    let home = Home::new().await;
    Report::of(&home, &[], &[])
        .await
        .expects("database", "warn", "nothing in ");
    assert!(!home.path().join("master.key").exists());
    assert!(!home.path().join("postgres").exists());
    home.import("alice").await;
    let found = Report::of(&home, &[], &[]).await;
    found.expects("key-file", "ok", "mode 600");
    found.expects("master-keys", "ok", "k1");
    assert!(
        ["ok", "warn"].contains(&found.of_name("disk").0),
        "{}",
        found.text
    );
    let key = home.path().join("master.key");
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    Report::of(&home, &[], &[])
        .await
        .expects("key-file", "fail", "mode 644");
    std::fs::remove_file(&key).unwrap();
    Report::of(&home, &[], &[])
        .await
        .expects("master-keys", "fail", "is gone");
    assert!(!key.exists(), "none was drawn in its place");
}

#[tokio::test]
async fn redis_that_lives_and_refuses_is_told_from_one_that_works() {
    let (home, _test, _) = home().await;
    let port = pg::free_port();
    let _server = RedisServer::with(port, &["--requirepass", "hunter2"]).await;
    let without = format!("redis://127.0.0.1:{port}");
    let with = format!("redis://:hunter2@127.0.0.1:{port}");
    let found = Report::of(&home, &[], &[("DRAWBRIDGE_REDIS_URL", &without)]).await;
    found.expects("redis", "fail", "");
    let found = Report::of(&home, &[], &[("DRAWBRIDGE_REDIS_URL", &with)]).await;
    found.expects("redis", "ok", "a message");
    assert!(!found.text.contains("hunter2"), "{}", found.text);
}

#[tokio::test]
async fn a_live_turn_per_transport_finds_what_the_fake_does_otherwise_and_nothing_else() {
    let (home, _test, _) = home().await;
    let live = async || Report::of(&home, &["--live", "alice"], &[]).await;
    let same = live().await;
    for name in ["live-http", "live-ws"] {
        same.expects(name, "ok", "assumptions hold");
        let count = same
            .findings
            .iter()
            .filter(|finding| finding["name"] == name)
            .count();
        assert_eq!(count, 1, "{}", same.text);
        let (_, seen) = same.of_name(name);
        assert!(
            seen.contains(" tokens; ") && !seen.contains(" 0 + 0 "),
            "{seen}"
        );
    }
    let turns = home.upstream.attempts();
    let served = turns.iter().filter(|attempt| attempt.completed).count();
    assert_eq!((turns.len(), served), (4, 2), "a turn and a refusal each");
    assert_eq!(home.upstream.violations(), [""; 0]);

    // It ends before its end, and a refusal is another.
    home.upstream
        .fault(Fault::once(Kind::End(Stage::BeforeTerminal)));
    let cut = live().await;
    let says = |text: &str| {
        cut.findings.iter().any(|finding| {
            finding["verdict"] == "warn" && finding["seen"].as_str().unwrap().contains(text)
        })
    };
    assert!(
        says("response.completed comes last: response.output_item.done"),
        "{}",
        cut.text
    );
    assert_eq!(cut.code, Some(0));

    home.upstream
        .fault(Fault::always(Kind::RateLimit { resets_in: 60 }));
    let limited = live().await;
    limited.expects("live-http", "fail", "429 usage_limit_reached");
    home.upstream.no_faults();
    let nobody = Report::of(&home, &["--live", "nobody"], &[]).await;
    nobody.expects("live", "fail", "nobody");
    assert!(
        !limited.text.contains("alice@example.test"),
        "{}",
        limited.text
    );
}

#[tokio::test]
async fn what_stands_in_front_must_let_upgrades_frames_and_bodies_pass() {
    let (home, _test, _) = home().await;
    let key = home.key("test").await;
    let service = home.serve().await;
    let through = async |url: &str, key: Option<&str>| {
        let key: Vec<_> = key.map(|key| ("DRAWBRIDGE_KEY", key)).into_iter().collect();
        Report::of(&home, &["--through", url], &key).await
    };
    let url = format!("http://{}", service.address);
    let found = through(&url, Some(&key)).await;
    found.expects("through-ws", "ok", "frames both ways");
    found.expects("through-body", "ok", "8 MiB pass");
    assert!(!found.text.contains(&key), "{}", found.text);
    let found = through(&url, None).await;
    found.expects("through-ws", "warn", "wants a key");
    let wrong = format!("dbk_{}", "x".repeat(50));
    let found = through(&url, Some(&wrong)).await;
    found.expects("through-ws", "fail", "the key is refused");
    assert_eq!(home.upstream.attempts().len(), 0, "no turn is run");
    // Each event after 20 ms, and all of them at once where somebody collects them.
    home.upstream.fault(Fault::always(Kind::Slow(20)));
    let live = ["--live", "alice", "--through"];
    let settings = [("DRAWBRIDGE_KEY", key.as_str())];
    let found = Report::of(&home, &[&live[..], &[&url]].concat(), &settings).await;
    found.expects("through-sse", "ok", " pieces over ");
    let collector = collector(url.clone()).await;
    let found = Report::of(&home, &[&live[..], &[&collector]].concat(), &settings).await;
    found.expects("through-sse", "warn", "one piece");
    home.upstream.no_faults();

    // A proxy that is not set up for it.
    let proxy = Router::new()
        .route("/livez", get(async || "{}"))
        .route(
            "/backend-api/codex/responses",
            get(async || StatusCode::UPGRADE_REQUIRED),
        )
        .route(
            "/v1/responses",
            axum::routing::post(async || StatusCode::PAYLOAD_TOO_LARGE),
        );
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxied = format!("http://{}/", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, proxy).await });
    let found = through(&proxied, Some(&key)).await;
    found.expects("through-ws", "fail", "426");
    found.expects("through-body", "fail", "refused on the way");
    let found = through(&home.upstream.auth_url(), Some(&key)).await;
    found.expects("through", "fail", "/livez answers 404");
}

/// A proxy that collects answers before it passes them on; yields its URL.
async fn collector(target: String) -> String {
    let http = reqwest::Client::builder().no_proxy().build().unwrap();
    let collect = move |request: axum::extract::Request| {
        let (http, target) = (http.clone(), target.clone());
        async move {
            let (parts, body) = request.into_parts();
            let body = axum::body::to_bytes(body, 64 << 20).await.unwrap();
            let request = http.request(parts.method, format!("{target}{}", parts.uri));
            let answer = request.headers(parts.headers).body(body).send().await;
            let answer = answer.unwrap();
            (answer.status(), answer.bytes().await.unwrap())
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let router = Router::new().fallback(collect);
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

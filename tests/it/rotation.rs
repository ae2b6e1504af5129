//! Master keys change while the service runs: everything sealed follows, and nobody notices.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use drawbridge::{
    account::{
        Tokens,
        flow::{Method, NewFlow},
    },
    config::Snapshots,
    db::sealed::{Done, SEALED, Sealed},
    ids::AccountId,
    secret::{KeyRing, Place},
};
use loadtest::edge::Mode;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::Value;
use tokio::sync::watch;

use crate::support::{
    cluster::{Answer, Cluster, Plan, script},
    house::{self, House, events},
    process::Home,
    store::Store,
    wait::until,
};

/// Two keys that get along, as text: `k1`, and `k2,k1`.
fn keys() -> (String, String) {
    let old = KeyRing::generate("k1").expose_secret().to_owned();
    let both = before(&old);
    (old, both)
}

/// A new key `k2` and behind it an old one, as text.
fn before(old: &str) -> String {
    loop {
        let both = format!("{},{old}", KeyRing::generate("k2").expose_secret());
        // Two random keys share their short id once in 256 draws.
        if KeyRing::parse(&SecretString::from(both.clone())).is_ok() {
            return both;
        }
    }
}

fn ring(text: &str) -> KeyRing {
    KeyRing::parse(&SecretString::from(text.to_owned())).unwrap()
}

fn column(table: &str, column: &str) -> &'static Sealed {
    let mut listed = SEALED.iter();
    listed
        .find(|sealed| (sealed.table, sealed.column) == (table, column))
        .unwrap()
}

/// Runs the command on a cluster's database with these keys; yields its exit code and what it said.
async fn rotate(home: &Home, keys: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    let arguments = [&["keys", "rotate-master"], arguments].concat();
    let mut command = home.command(&arguments);
    let said = command.env("DRAWBRIDGE_MASTER_KEYS", keys).output().await;
    let said = said.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (said.status.code(), text(said.stdout), text(said.stderr))
}

#[tokio::test]
async fn every_binary_column_is_a_hash_or_in_the_registry_of_sealed_columns() {
    let store = Store::direct().await;
    let unlisted = async || {
        let query = "
            select table_name || '.' || column_name from information_schema.columns
            where table_schema = 'public' and data_type = 'bytea' and column_name not like '%hash' order by 1";
        let rows = store.client.query(query, &[]).await.unwrap();
        let names = rows.iter().map(|row| row.get::<_, String>(0));
        let listed = |name: &String| {
            SEALED
                .iter()
                .any(|sealed| *name == format!("{}.{}", sealed.table, sealed.column))
        };
        names.filter(|name| !listed(name)).collect::<Vec<_>>()
    };
    assert_eq!(
        unlisted().await,
        [""; 0],
        "say in db::sealed how these are sealed anew"
    );
    let later = "create table later (note_sealed bytea)";
    store.client.batch_execute(later).await.unwrap();
    assert_eq!(unlisted().await, ["later.note_sealed"]);
}

#[tokio::test]
async fn a_pass_over_every_column_leaves_nothing_under_the_old_key_and_everything_readable() {
    let house = House::planned(house::Plan {
        settings: |config| config.snapshots = Snapshots::Full,
        ..house::Plan::default()
    })
    .await;
    let answered = events(house.codex_turn("t", "t", "hello").await).await;
    let response = answered.last().unwrap()["response"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let accounts = house.accounts();
    let secret = SecretString::from("verifier");
    let flow = NewFlow {
        method: Method::Device,
        secrets: &[("code", &secret)],
        state: None,
        interval: Duration::ZERO,
        lifetime: Duration::from_secs(600),
        wanted: None,
        label: None,
    };
    let flow = accounts.begin_flow(&flow).await.unwrap().id;

    let both = before(house.keys.expose_secret());
    let fresh = both.split(',').next().unwrap().to_owned();
    let both = ring(&both);
    for sealed in SEALED {
        let name = format!("{}.{}", sealed.table, sealed.column);
        let before = sealed.count(&house.db).await.unwrap();
        assert_eq!(before.keys().collect::<Vec<_>>(), ["k1"], "{name}");
        let mut pass = sealed.pass(&house.db, &both);
        while pass.step().await.unwrap() {}
        let resealed = u64::try_from(before["k1"]).unwrap();
        assert_eq!(pass.done.resealed, resealed, "{name}");
        assert_eq!((pass.done.overtaken, pass.done.unopened), (0, 0), "{name}");
        let after = sealed.count(&house.db).await.unwrap();
        assert_eq!(
            after,
            BTreeMap::from([("k2".to_owned(), before["k1"])]),
            "{name}"
        );
        let mut again = sealed.pass(&house.db, &both);
        while again.step().await.unwrap() {}
        assert_eq!(
            again.done,
            Done {
                resealed: 0,
                ..pass.done
            },
            "{name}"
        );
    }

    // The old key is gone.
    let alone = ring(&fresh);
    let installation = drawbridge::db::Installation::open(&house.db, &alone)
        .await
        .unwrap();
    let (old, new) = (&house.installation.pepper, &installation.pepper);
    assert_eq!(
        old.hash("x", b"y"),
        new.hash("x", b"y"),
        "the pepper never changes"
    );
    let after = drawbridge::account::Accounts::new(house.db.clone(), alone.clone(), new.clone());
    let listed = &after.list().await.unwrap()[0];
    assert_eq!(listed.email.as_deref(), Some("alice@example.test"));
    let stored = after.credential(listed.id).await.unwrap().unwrap();
    assert!(stored.id_token.is_some());
    let held = after
        .claim_flow(flow, Duration::from_secs(5))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(held.secret("code").unwrap().expose_secret(), "verifier");
    let row = house
        .client
        .query_one("select scope_id::text, key_id from response_snapshots", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, String>(1), "k2");
    let snapshots = drawbridge::snapshot::Snapshots::new(house.db.clone(), alone, Snapshots::Full);
    let scope = row.get::<_, String>(0).parse().unwrap();
    assert_eq!(snapshots.chain(scope, &response).await.unwrap().depth, 1);
}

/// A hundred addresses under the old key.
async fn addresses(store: &Store, ring: &KeyRing) -> Vec<AccountId> {
    let mut ids = Vec::new();
    for number in 0..100 {
        let id = AccountId::new();
        let row = id.to_string();
        let place = Place {
            table: "accounts",
            row: &row,
            column: "email_sealed",
        };
        let sealed = ring.seal(place, format!("{number}@example.org").as_bytes());
        let insert = "insert into accounts (account_id, email_sealed) values ($1, $2)";
        store.client.execute(insert, &[&id, &sealed]).await.unwrap();
        ids.push(id);
    }
    ids
}

#[tokio::test]
async fn a_pass_that_was_stopped_is_begun_again_and_does_the_rest() {
    for store in Store::both_ways().await {
        let (old, both) = keys();
        let (old, both) = (ring(&old), ring(&both));
        addresses(&store, &old).await;
        let emails = column("accounts", "email_sealed");
        let mut stopped = emails.pass(&store.db, &both);
        assert!(stopped.step().await.unwrap());
        let done = stopped.done.resealed;
        assert!(done > 0 && done < 100, "{done}");
        drop(stopped);
        let half = emails.count(&store.db).await.unwrap();
        assert_eq!((half["k1"], half["k2"]), (100 - done as i64, done as i64));
        let mut again = emails.pass(&store.db, &both);
        while again.step().await.unwrap() {}
        assert_eq!((again.done.seen, again.done.resealed), (100, 100 - done));
        assert_eq!(
            emails.count(&store.db).await.unwrap(),
            BTreeMap::from([("k2".to_owned(), 100)])
        );
    }
}

#[tokio::test]
async fn a_value_that_is_written_between_reading_and_writing_it_stays_as_it_was_written() {
    let house = House::start().await;
    let id = house.account_id("alice").await;
    let both = ring(&before(house.keys.expose_secret()));
    // A refresh that has written and not committed: the pass has read what was there before, and waits for the row.
    let accounts = drawbridge::account::Accounts::new(
        house.db.clone(),
        both.clone(),
        house.installation.pepper.clone(),
    );
    let stored = accounts.credential(id).await.unwrap().unwrap();
    let lock = "begin; select from account_credentials for update";
    house.client.batch_execute(lock).await.unwrap();
    let refresh = column("account_credentials", "refresh_sealed");
    let mut pass = refresh.pass(&house.db, &both);
    let written = both.seal_text(
        Place {
            table: "account_credentials",
            row: &id.to_string(),
            column: "refresh_sealed",
        },
        &SecretString::from("newer"),
    );
    let writes = async {
        let waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        until("the pass waits for the row", async || {
            house
                .client
                .query_one(waits, &[])
                .await
                .unwrap()
                .get::<_, i64>(0)
                > 0
        })
        .await;
        let update = "update account_credentials set refresh_sealed = $1";
        house.client.execute(update, &[&written]).await.unwrap();
        house.client.batch_execute("commit").await.unwrap();
    };
    let (step, ()) = tokio::join!(pass.step(), writes);
    assert!(!step.unwrap());
    assert_eq!((pass.done.resealed, pass.done.overtaken), (0, 1));
    let after = accounts.credential(id).await.unwrap().unwrap();
    assert_eq!(after.refresh.expose_secret(), "newer");
    assert_ne!(stored.refresh.expose_secret(), "newer");
    // And a whole refresh in the middle of passes that never end.
    let tokens = |n: usize| Tokens {
        access: format!("access-{n}").into(),
        refresh: format!("refresh-{n}").into(),
        id_token: None,
    };
    for n in 0..20 {
        let mut pass = refresh.pass(&house.db, if n % 2 == 0 { &house.ring } else { &both });
        let generation = accounts.credential(id).await.unwrap().unwrap().generation;
        let tokens = tokens(n);
        let (_, rotated) = tokio::join!(pass.step(), accounts.rotate(id, generation, &tokens));
        assert!(rotated.unwrap().is_some());
        let stored = accounts.credential(id).await.unwrap().unwrap();
        assert_eq!(stored.refresh.expose_secret(), format!("refresh-{n}"));
    }
}

#[tokio::test]
async fn a_value_that_does_not_open_is_left_and_told_and_stops_nothing() {
    let store = Store::direct().await;
    let (old, both) = keys();
    let ids = addresses(&store, &ring(&old)).await;
    let foreign = ring(KeyRing::generate("k0").expose_secret());
    let row = ids[3].to_string();
    let place = Place {
        table: "accounts",
        row: &row,
        column: "email_sealed",
    };
    let sealed = foreign.seal(place, b"lost");
    let update = "update accounts set email_sealed = $2 where account_id = $1";
    store
        .client
        .execute(update, &[&ids[3], &sealed])
        .await
        .unwrap();
    let garbage = [1u8, 255, 0xff, 0, 7].to_vec();
    store
        .client
        .execute(update, &[&ids[4], &garbage])
        .await
        .unwrap();
    let emails = column("accounts", "email_sealed");
    let both = ring(&both);
    let mut pass = emails.pass(&store.db, &both);
    while pass.step().await.unwrap() {}
    assert_eq!((pass.done.resealed, pass.done.unopened), (98, 2));
    let counts = emails.count(&store.db).await.unwrap();
    assert_eq!(
        (counts["k0"], counts["k2"], counts.get("k1")),
        (1, 98, None)
    );
    let kept: Vec<u8> = store
        .client
        .query_one(
            "select email_sealed from accounts where account_id = $1",
            &[&ids[4]],
        )
        .await
        .unwrap()
        .get(0);
    assert_eq!(kept, garbage);
}

/// A client that keeps a conversation going, and how many turns it got.
async fn talk(address: String, key: String, name: String, stop: watch::Receiver<bool>) -> usize {
    let http = reqwest::Client::builder()
        .no_proxy()
        .pool_max_idle_per_host(0)
        .build()
        .unwrap();
    let (mut previous, mut token, mut turns) = (None::<String>, None::<String>, 0);
    while !*stop.borrow() {
        let mut body = script(&format!("{name} {turns}"), turns % 2 == 0);
        if let Some(id) = previous.take() {
            body["previous_response_id"] = id.into();
        }
        let mut request = http
            .post(format!("http://{address}/v1/responses"))
            .bearer_auth(&key)
            .header("connection", "close")
            .json(&body);
        if let Some(token) = &token {
            request = request.header("x-codex-turn-state", token);
        }
        let answer = Answer::of(request.send().await.unwrap()).await;
        // Every fifth turn begins another conversation.
        turns += 1;
        previous = (turns % 5 != 0).then(|| answer.id().to_owned());
        token = previous.is_some().then(|| answer.token().to_owned());
    }
    turns
}

/// Gives every replica these keys, one after the other, as a balancer and a rolling restart do it.
async fn roll(cluster: &mut Cluster, keys: &str) {
    for number in 0..cluster.replicas.len() {
        cluster.replicas[number].clients.set(Mode::Refuse);
        cluster.stop(number).await;
        cluster.set(number, "DRAWBRIDGE_MASTER_KEYS", keys.to_owned());
        cluster.serve(number).await;
    }
}

#[tokio::test]
async fn keys_rotate_over_three_replicas_under_load_without_an_error() {
    let (old, both) = keys();
    let fresh = both.split(',').next().unwrap().to_owned();
    let plan = Plan {
        replicas: 3,
        accounts: &["alice", "bob"],
        // Not at a tenth of the times: the load is not to be taken for an outage.
        settings: &[
            ("DRAWBRIDGE_TEST_TIME_SCALE", "1"),
            ("DRAWBRIDGE_DRAIN_DELAY", "1s"),
        ],
        ..Plan::default()
    };
    let mut cluster = Cluster::start_with(plan, &old).await;
    let first = cluster
        .post_at(0, "/v1/responses")
        .json(&script("before", false));
    let first = Answer::of(first.send().await.unwrap()).await;
    let (id, token) = (first.id().to_owned(), first.token().to_owned());
    let (stop, stopped) = watch::channel(false);
    let address = cluster.balancer.address.to_string();
    let clients: Vec<_> = (0..4)
        .map(|n| {
            tokio::spawn(talk(
                address.clone(),
                cluster.key.clone(),
                format!("client-{n}"),
                stopped.clone(),
            ))
        })
        .collect();

    // Too early: nobody has the new key.
    let (code, out, err) = rotate(&cluster.home, &both, &[]).await;
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.contains("r2 (alive) has only k1"), "{err}");

    roll(&mut cluster, &format!("{old},{fresh}")).await;
    let (code, _, err) = rotate(&cluster.home, &both, &[]).await;
    assert_eq!(code, Some(1));
    assert!(err.contains("r0 (alive) still seals under `k1`"), "{err}");
    roll(&mut cluster, &both).await;

    let (code, out, _) = rotate(&cluster.home, &both, &["--dry-run"]).await;
    assert_eq!(code, Some(0));
    assert!(
        out.contains("k1: ") && out.contains("keep it in the ring"),
        "{out}"
    );
    let (code, out, err) = rotate(&cluster.home, &both, &["--json"]).await;
    assert_eq!(code, Some(0), "{out}\n{err}");
    let told: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(told["current"], "k2");
    let [other] = &told["others"].as_array().unwrap()[..] else {
        panic!("{told}")
    };
    assert_eq!(
        (&other["key"], &other["values"], &other["listed"]),
        (&"k1".into(), &0.into(), &true.into())
    );
    assert!(other["tokens_until"].is_string(), "{told}");
    for table in [
        "installation",
        "accounts",
        "account_credentials",
        "response_snapshots",
    ] {
        let columns = told["columns"].as_array().unwrap().iter();
        let resealed = columns
            .filter(|column| column["table"] == table)
            .map(|column| column["resealed"].as_u64().unwrap());
        assert!(resealed.sum::<u64>() > 0, "{table}: {told}");
    }
    let (_, out, _) = rotate(&cluster.home, &both, &[]).await;
    assert!(
        out.contains("k1: nothing is sealed under it; it may be taken out of the ring."),
        "{out}"
    );

    // In the overlap a token of the old key is as good as ever, at each replica.
    let present = async |cluster: &Cluster, number: usize, previous: Option<&str>| {
        let mut body = script("after", false);
        if let Some(id) = previous {
            body["previous_response_id"] = id.into();
        }
        let request = cluster
            .post_at(number, "/v1/responses")
            .header("x-codex-turn-state", &token)
            .json(&body);
        Answer::of(request.send().await.unwrap()).await
    };
    for number in 0..3 {
        let answer = present(&cluster, number, None).await;
        answer.id();
        assert_eq!(answer.token(), token);
    }

    roll(&mut cluster, &fresh).await;
    stop.send_replace(true);
    let mut turns = 0;
    for client in clients {
        turns += client.await.unwrap();
    }
    assert!(turns > 100, "{turns}");

    // The old key is gone: the API key is as it was, and the old token is as if there were none.
    let fresh_start = present(&cluster, 1, None).await;
    fresh_start.id();
    assert_ne!(fresh_start.token(), token);
    present(&cluster, 2, Some(&id)).await.id();
    let code = rotate(&cluster.home, &old, &["--dry-run"]).await.0;
    assert_eq!(code, Some(64), "the old key opens nothing any more");
    cluster.booked().await;
    for turn in cluster.turns().await {
        assert_eq!(turn["outcome"], "completed", "{turn:#}");
    }
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn a_replica_without_the_key_of_the_others_names_it_and_condemns_no_account() {
    let (old, both) = keys();
    let plan = Plan {
        replicas: 1,
        ..Plan::default()
    };
    let mut cluster = Cluster::start_with(plan, &old).await;
    // Somebody seals under a key that this replica does not have: a login renewed with the new key first.
    let row = cluster
        .client
        .query_one("select account_id::text from accounts", &[])
        .await
        .unwrap();
    let id: String = row.get(0);
    for (name, value) in [
        ("access_sealed", "a"),
        ("refresh_sealed", "r"),
        ("id_sealed", "i"),
    ] {
        let sealed = ring(&both).seal(
            Place {
                table: "account_credentials",
                row: &id,
                column: column("account_credentials", name).column,
            },
            value.as_bytes(),
        );
        let update = format!("update account_credentials set {name} = $1");
        cluster.client.execute(&update, &[&sealed]).await.unwrap();
    }
    cluster.stop(0).await;
    cluster.serve(0).await;
    let began = Instant::now();
    let request = cluster
        .post_at(0, "/v1/responses")
        .json(&script("x", false));
    let answer = Answer::of(request.send().await.unwrap()).await;
    assert!(answer.status >= 502 || answer.status == 429, "{answer:#?}");
    assert!(began.elapsed() < Duration::from_secs(30));
    let log = cluster.service(0).log();
    assert!(
        log.contains("sealed with master key `k2`, which is not in DRAWBRIDGE_MASTER_KEYS"),
        "{log}"
    );
    let row = cluster
        .client
        .query_one("select status from accounts", &[])
        .await
        .unwrap();
    assert_eq!(row.get::<_, String>(0), "active");
    assert_eq!(cluster.home.upstream.attempts().len(), 0);
}

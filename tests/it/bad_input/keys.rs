//! Keys that are none, and callers without one.

use std::time::{Duration, Instant};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use drawbridge::{
    api_key::{self, Grants, NewKey},
    config::KeyRule,
    secret,
};
use futures_util::{StreamExt as _, stream};
use jiff::{SignedDuration, Timestamp};
use loadtest::upstream::{Fault, Kind};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite;

use super::{CODEX, COMPACT, OPENAI, PATIENCE, refused};
use crate::support::{
    codex_socket::{CodexSocket, create},
    house::{House, Plan, codex_body, text_of},
    pg,
};

/// A key as [`api_key::create`] draws it, and one that it never drew.
fn well_formed(n: usize) -> String {
    let body = format!("dbk_{n:043}");
    let sum = secret::digest(&[b"api-key checksum", body.as_bytes()]);
    format!("{body}{}", BASE64_URL_SAFE_NO_PAD.encode(&sum[..4]))
}

#[tokio::test]
async fn a_flood_of_unknown_keys_costs_a_handful_of_reads() {
    let house = House::start().await;
    let transactions = async || {
        let query = "select xact_commit from pg_stat_database where datname = current_database()";
        let row = house.client.query_one(query, &[]).await.unwrap();
        row.get::<_, i64>(0)
    };
    let ask = async |n: usize| {
        let request = house.http.get(house.url("/v1/models"));
        let answer = request.bearer_auth(well_formed(n)).send().await.unwrap();
        assert_eq!(answer.status(), 401);
    };
    let (before, began) = (transactions().await, Instant::now());
    let flood = stream::iter(0..10_000).map(&ask).buffer_unordered(500);
    flood.for_each(|()| std::future::ready(())).await;
    // The server counts with a delay: more requests until it has counted anything.
    let mut n = 10_000;
    while transactions().await == before {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "nothing is counted"
        );
        ask(n).await;
        n += 1;
    }
    let reads = transactions().await - before;
    // One per 200 ms for all keys together; the rest is the house's own and this test's counting.
    let most = 20 * i64::try_from(began.elapsed().as_secs() + 1).unwrap();
    assert!(
        reads <= most,
        "{reads} reads for {n} keys, {most} expected at most"
    );
    house.unharmed().await;
}

#[tokio::test]
async fn without_a_database_known_and_malformed_keys_are_answered_and_unknown_ones_may_come_back() {
    let house = House::start().await;
    let name = "select current_database()::text";
    let name: String = house.client.query_one(name, &[]).await.unwrap().get(0);
    let admin = pg::connect(&pg::url("postgres").await).await;
    let shut = format!("alter database {name} with allow_connections false");
    admin.batch_execute(&shut).await.unwrap();
    // Again and again: some may just have come in.
    let cut = "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1";
    let began = Instant::now();
    while !admin.query(cut, &[&name]).await.unwrap().is_empty() {
        assert!(began.elapsed() < PATIENCE, "a connection stays");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let ask = async |key: &str| {
        let request = house.http.get(house.url("/v1/models")).bearer_auth(key);
        request.send().await.unwrap()
    };
    let mistyped = &house.key()[..40];
    for malformed in ["dbk_", "dbk_wrong", mistyped, &format!("{}x", house.key())] {
        refused(ask(malformed).await, 401, "invalid_api_key", None).await;
    }
    assert_eq!(ask(house.key()).await.status(), 200);
    let unknown = ask(&well_formed(1)).await;
    assert!(unknown.headers().contains_key("retry-after"));
    refused(unknown, 503, "continuity_unavailable", None).await;
}

#[tokio::test]
async fn a_key_that_has_ended_is_told_why() {
    let house = House::start().await;
    let new = |name: &str, expires_at| NewKey {
        name: name.into(),
        expires_at,
        scope_of: None,
        grants: Grants::default(),
    };
    let pepper = &house.installation.pepper;
    let past = Timestamp::now() - SignedDuration::from_mins(1);
    let expired = api_key::create(&house.db, pepper, &new("expired", Some(past)))
        .await
        .unwrap();
    let revoked = api_key::create(&house.db, pepper, &new("revoked", None))
        .await
        .unwrap();
    let turn = async |key: &str| {
        let request = house.http.post(house.url(OPENAI)).bearer_auth(key);
        let body = json!({ "model": "gpt-5.5", "input": "hi" });
        request.json(&body).send().await.unwrap()
    };
    let answer = turn(expired.secret.expose_secret()).await;
    refused(answer, 401, "expired_api_key", None).await;

    let key = revoked.secret.expose_secret();
    let mut socket = CodexSocket::try_open(&house, CODEX, key).await.unwrap();
    assert_eq!(
        text_of(&socket.turn(create("turn-1", "one", None)).await),
        "echo: one.."
    );
    api_key::revoke(&house.db, revoked.key.id).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    let answer = loop {
        let answer = turn(key).await;
        if answer.status() != 200 {
            break answer;
        }
        assert!(Instant::now() < deadline, "a revoked key still works");
    };
    refused(answer, 401, "invalid_api_key", None).await;
    // An open socket is no way around it.
    let frames = socket.turn(create("turn-2", "two", None)).await;
    assert_eq!(frames.last().unwrap()["status"], 401);
    house.unharmed().await;
}

#[tokio::test]
async fn a_model_that_the_key_or_upstream_does_not_allow_is_refused() {
    let house = House::with(&["alice", "bob"]).await;
    let grants = Grants {
        models: Some(vec!["gpt-5.4-mini".into()]),
        ..Grants::default()
    };
    let key = house.another_key("narrow", grants).await;
    for path in [CODEX, OPENAI, COMPACT] {
        let request = house.http.post(house.url(path)).bearer_auth(&key);
        let answer = request.json(&codex_body("hi")).send().await.unwrap();
        refused(answer, 403, "model_not_allowed", Some("model")).await;
    }
    let mut socket = CodexSocket::try_open(&house, CODEX, &key).await.unwrap();
    let frames = socket.turn(create("turn-1", "one", None)).await;
    assert_eq!(frames[0]["status"], 403);
    assert_eq!(frames[0]["error"]["code"], "model_not_allowed");
    assert!(house.turns().await.is_empty());

    house
        .upstream
        .fault(Fault::once(Kind::ModelUnsupported).times(2));
    let body = json!({ "model": "gpt-unheard-of", "input": "hi" });
    let answer = house.post(OPENAI).json(&body).send().await.unwrap();
    assert_eq!(answer.status(), 400);
    let error: Value = answer.json().await.unwrap();
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("not supported"),
        "{error}"
    );
    house.unharmed().await;
}

#[tokio::test]
async fn going_without_a_key_is_for_this_machine_alone_and_ends_with_the_first_key() {
    let house = House::planned(Plan {
        key: false,
        ..Plan::default()
    })
    .await;
    let ask = async |headers: &[(&str, &str)]| {
        let mut request = house.get("/v1/models");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap()
    };
    for headers in [
        &[][..],
        &[("host", "localhost:2455")],
        &[("authorization", "Bearer eyJ.of.chatgpt")],
    ] {
        assert_eq!(ask(headers).await.status(), 200, "{headers:?}");
    }
    for header in [
        ("origin", "http://127.0.0.1:2455"),
        ("origin", "https://example.test"),
        ("sec-fetch-site", "cross-site"),
        ("host", "example.test"),
        ("host", "192.0.2.1:2455"),
        ("x-forwarded-for", "127.0.0.1"),
        ("forwarded", "for=127.0.0.1"),
        ("via", "1.1 proxy"),
        ("x-real-ip", "127.0.0.1"),
        ("authorization", "Bearer dbk_wrong"),
        ("x-drawbridge-key", ""),
    ] {
        refused(ask(&[header]).await, 401, "invalid_api_key", None).await;
    }
    // A page in a browser may open a WebSocket to anywhere; it cannot hide where it comes from.
    let mut request = tungstenite::client::IntoClientRequest::into_client_request(format!(
        "ws://{}{CODEX}",
        house.server.address
    ))
    .unwrap();
    let origin = "https://example.test".parse().unwrap();
    request.headers_mut().insert("origin", origin);
    let opened = tokio_tungstenite::connect_async(request).await;
    let Err(tungstenite::Error::Http(response)) = opened else {
        panic!("opened without a key")
    };
    assert_eq!(response.status(), 401);

    let key = house.another_key("first", Grants::default()).await;
    let deadline = Instant::now() + PATIENCE;
    while ask(&[]).await.status() == 200 {
        assert!(
            Instant::now() < deadline,
            "a key exists and none is asked for"
        );
    }
    let message = refused(ask(&[]).await, 401, "invalid_api_key", None).await;
    assert!(message.contains("first key"), "{message}");
    let bearer = format!("Bearer {key}");
    assert_eq!(ask(&[("authorization", &bearer)]).await.status(), 200);
}

#[tokio::test]
async fn a_key_is_always_asked_for_where_the_operator_says_so() {
    let house = House::planned(Plan {
        key: false,
        key_rule: KeyRule::Always,
        ..Plan::default()
    })
    .await;
    for path in [CODEX, OPENAI, COMPACT] {
        let answer = house.post(path).json(&codex_body("hi")).send().await;
        refused(answer.unwrap(), 401, "invalid_api_key", None).await;
    }
    assert!(house.upstream.attempts().is_empty());
}

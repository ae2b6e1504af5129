//! The fleet API and a key's own usage: who may read them, of which accounts, and what a refresh leaves behind whoever waits for it.

use std::time::Duration;

use drawbridge::{
    api_key::{self, ApiKeys, Grants},
    bus::Bus,
    ids::AccountId,
    protocol::limits::Section,
    task::Tasks,
};
use reqwest::Response;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::support::{
    house::{House, Plan, events},
    wait::until,
};

const SUMMARY: &str = "/api/fleet/summary";
const REFRESH: &str = "/api/fleet/refresh";
const USAGE: &str = "/v1/usage";

async fn get(house: &House, path: &str, key: &str) -> Response {
    let request = house.http.get(house.url(path));
    request.bearer_auth(key).send().await.unwrap()
}

async fn refresh(house: &House, key: &str) -> Response {
    let request = house.http.post(house.url(REFRESH));
    request.bearer_auth(key).send().await.unwrap()
}

async fn json_of(response: Response) -> Value {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["cache-control"], "no-store");
    response.json().await.unwrap()
}

fn of(accounts: &[AccountId]) -> Grants {
    Grants {
        accounts: Some(accounts.to_vec()),
        ..Grants::default()
    }
}

/// Accounts with a window that a poll has brought, by the name they have upstream.
async fn polled(house: &House) -> Vec<String> {
    let query = "
        select distinct replace(chatgpt_account_id, 'acct-', '') from quota_windows join accounts using (account_id)
        where source = 'poll' order by 1";
    let rows = house.client.query(query, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// How often caches of quota were dropped so far.
async fn drops(house: &House) -> i64 {
    let query = "select version from bus_versions where topic = 'quota'";
    house.client.query_one(query, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn an_api_key_is_always_needed_also_where_turns_go_without_one() {
    let house = House::planned(Plan {
        key: false,
        ..Plan::default()
    })
    .await;
    let turn = house.codex_turn("thread", "turn", "hi").await;
    assert_eq!(turn.status(), 200);
    for path in [SUMMARY, USAGE, REFRESH] {
        let answer = match path {
            REFRESH => house.post(path),
            _ => house.get(path),
        };
        let answer = answer.send().await.unwrap();
        assert_eq!(answer.status(), 401, "{path}");
        let error: Value = answer.json().await.unwrap();
        assert_eq!(error["error"]["code"], "invalid_api_key", "{path}");
        assert_eq!(error["error"]["type"], "authentication_error", "{path}");
    }
    assert!(house.upstream.state().usage_reads.is_empty());
}

#[tokio::test]
async fn a_key_reads_of_its_own_accounts_what_is_listed_and_no_more() {
    let house = House::with(&["alice", "bob"]).await;
    let alice = house.account_id("alice").await;
    json_of(refresh(&house, house.key()).await).await;

    let mut all = Value::Null;
    until("what was answered is told", async || {
        all = json_of(get(&house, SUMMARY, house.key()).await).await;
        let accounts = all["accounts"].as_array().unwrap().iter();
        let mut known = accounts.map(|account| &account["usageRefreshedAt"]);
        known.all(Value::is_string)
    })
    .await;
    let accounts = all["accounts"].as_array().unwrap();
    assert_eq!(accounts.len(), 2, "{all}");
    let one = accounts
        .iter()
        .find(|account| account["displayName"] == "alice")
        .unwrap();
    assert_eq!(one["accountId"], alice.to_string());
    assert_eq!(one["status"], "active");
    assert_eq!(one["primary"]["remainingPercent"], 88.0, "{one}");
    assert_eq!(one["primary"]["windowMinutes"], 300);
    assert_eq!(one["secondary"]["windowMinutes"], 10_080);
    assert!(one["usageRefreshedAt"].as_str().unwrap().ends_with('Z'));
    let text = all.to_string();
    let token = house.upstream.account("alice").access_token();
    for secret in ["acct-", "rt_", &token[..16], "credit", "reason", "token"] {
        assert!(!text.contains(secret), "{secret}: {text}");
    }

    let (own, nobody) = (
        house.another_key("own", of(&[alice])).await,
        house.another_key("nobody", of(&[])).await,
    );
    let own = json_of(get(&house, SUMMARY, &own).await).await;
    let own = own["accounts"].as_array().unwrap();
    assert_eq!(own.len(), 1);
    assert_eq!(own[0], *one);
    let none = json_of(get(&house, SUMMARY, &nobody).await).await;
    assert_eq!(none, json!({ "accounts": [] }));
    let none = json_of(refresh(&house, &nobody).await).await;
    assert_eq!(
        (&none["accountCount"], &none["usageWritten"]),
        (&json!(0), &json!(false))
    );

    let blind = Grants {
        quota: Some(Vec::<Section>::new()),
        ..of(&[alice])
    };
    let blind = house.another_key("blind", blind).await;
    let blind = json_of(get(&house, SUMMARY, &blind).await).await;
    let hidden = json!({ "remainingPercent": null, "resetAt": null, "windowMinutes": null });
    assert_eq!(blind["accounts"][0]["primary"], hidden);

    house.accounts().delete(alice).await.unwrap();
    let left = json_of(get(&house, SUMMARY, house.key()).await).await;
    assert_eq!(left["accounts"].as_array().unwrap().len(), 1, "at once");
}

#[tokio::test]
async fn a_refresh_asks_about_the_accounts_of_the_key_that_serve_and_announces_once() {
    let house = House::with(&["alice", "bob", "carol"]).await;
    let [alice, bob] = [
        house.account_id("alice").await,
        house.account_id("bob").await,
    ];
    house.accounts().pause(bob).await.unwrap();
    let key = house.another_key("two", of(&[alice, bob])).await;
    let before = drops(&house).await;
    let done = json_of(refresh(&house, &key).await).await;
    let at = done["generatedAt"].as_str().unwrap();
    assert!(at.ends_with('Z'), "{at}");
    assert_eq!(
        done,
        json!({ "ok": true, "usageWritten": true, "accountCount": 2, "attemptedCount": 1, "generatedAt": at })
    );
    assert_eq!(polled(&house).await, ["alice"]);
    assert_eq!(drops(&house).await, before + 1);
    assert_eq!(house.upstream.state().usage_reads.len(), 1);

    // Nothing to tell, nothing announced.
    house.accounts().pause(alice).await.unwrap();
    let idle = house.another_key("idle", of(&[alice])).await;
    let done = json_of(refresh(&house, &idle).await).await;
    assert_eq!(
        (&done["usageWritten"], &done["attemptedCount"]),
        (&json!(false), &json!(0))
    );
    assert_eq!(drops(&house).await, before + 1);
}

#[tokio::test]
async fn an_account_is_asked_about_once_for_all_who_want_to_know() {
    let house = House::with(&["alice", "bob"]).await;
    let alice = house.account_id("alice").await;
    let keys = [
        house.another_key("one", Grants::default()).await,
        house.another_key("two", of(&[alice])).await,
        house.another_key("three", Grants::default()).await,
    ];
    let before = drops(&house).await;
    house.upstream.hold_usage("alice");
    let asking = futures_util::future::join_all(keys.iter().map(|key| refresh(&house, key)));
    let release = async {
        house
            .upstream
            .wait("the question", |state| state.silent == 1)
            .await;
        house.upstream.release();
    };
    let (answers, ()) = tokio::join!(asking, release);
    for answer in answers {
        assert_eq!(json_of(answer).await["usageWritten"], true);
    }
    let late = house.another_key("late", Grants::default()).await;
    json_of(refresh(&house, &late).await).await;
    let reads = house.upstream.state().usage_reads;
    assert!(reads.values().all(|reads| *reads == 1), "{reads:?}");
    assert!(drops(&house).await > before);
}

#[tokio::test]
async fn a_key_has_one_refresh_in_a_while_and_is_told_when_the_next() {
    let house = House::start().await;
    assert_eq!(refresh(&house, house.key()).await.status(), 200);
    let refused = refresh(&house, house.key()).await;
    assert_eq!(refused.status(), 429);
    let wait: u64 = refused.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=30).contains(&wait), "{wait}");
    let error: Value = refused.json().await.unwrap();
    assert_eq!(error["error"]["code"], "rate_limit_exceeded");
    assert_eq!(error["error"]["type"], "rate_limit_error");
    let other = house.another_key("other", Grants::default()).await;
    assert_eq!(refresh(&house, &other).await.status(), 200);
}

#[tokio::test]
async fn of_many_claims_on_two_replicas_one_refresh_is_granted() {
    let house = House::start().await;
    let key = api_key::find(&house.db, "test").await.unwrap();
    let (bus, tasks) = (Bus::connect(&house.db).await.unwrap(), Tasks::new());
    let pepper = &house.installation.pepper;
    let load = async || {
        ApiKeys::load(&house.db, &bus, pepper.clone(), &tasks)
            .await
            .unwrap()
    };
    let replicas = [load().await, load().await];
    let every = Duration::from_secs(1);
    for _ in 0..2 {
        let claims = (0..20).map(|n| replicas[n % 2].claim_refresh(key, every));
        let waits = futures_util::future::join_all(claims).await;
        let waits: Vec<_> = waits.into_iter().map(Result::unwrap).collect();
        assert_eq!(
            waits.iter().filter(|wait| wait.is_none()).count(),
            1,
            "{waits:?}"
        );
        assert!(
            waits
                .iter()
                .flatten()
                .all(|wait| !wait.is_zero() && *wait <= every)
        );
        // And again, when its time has come.
        let age = "update api_keys set refreshed_at = refreshed_at - interval '1 second'";
        house.client.batch_execute(age).await.unwrap();
    }
    let nobody = drawbridge::ids::ApiKeyId::new();
    assert_eq!(
        replicas[0].claim_refresh(nobody, every).await.unwrap(),
        Some(every)
    );
    tasks.stop();
}

#[tokio::test]
async fn a_refresh_that_cannot_be_stored_says_so() {
    let house = House::start().await;
    let away = "alter table quota_windows rename to away";
    house.client.batch_execute(away).await.unwrap();
    let done = json_of(refresh(&house, house.key()).await).await;
    assert_eq!(done["usageWritten"], false);
    assert_eq!(done["attemptedCount"], 1);
    let back = "alter table away rename to quota_windows";
    house.client.batch_execute(back).await.unwrap();
    let other = house.another_key("other", Grants::default()).await;
    let done = json_of(refresh(&house, &other).await).await;
    assert_eq!(done["usageWritten"], true);
    assert_eq!(polled(&house).await, ["alice"]);
}

#[tokio::test]
async fn a_client_that_leaves_during_a_refresh_leaves_the_rows_and_one_announcement_behind() {
    let house = House::with(&["alice", "bob"]).await;
    let before = drops(&house).await;
    house.upstream.hold_usage("bob");
    let mut client = TcpStream::connect(house.server.address).await.unwrap();
    let request = format!(
        "POST {REFRESH} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-length: 0\r\n\r\n",
        house.key()
    );
    client.write_all(request.as_bytes()).await.unwrap();
    house
        .upstream
        .wait("the question", |state| state.silent == 1)
        .await;
    client.shutdown().await.unwrap();
    let answer = client.read(&mut [0; 1]).await.unwrap();
    assert_eq!(answer, 0, "the service has let it go");
    assert_eq!(drops(&house).await, before, "not by halves");
    house.upstream.release();
    until("what came is stored", async || {
        polled(&house).await == ["alice", "bob"]
    })
    .await;
    assert_eq!(drops(&house).await, before + 1);
    house.server_idle().await;
    assert!(house.stop().await, "nothing is left running");
}

#[tokio::test]
async fn a_shutdown_during_a_refresh_answers_503_and_leaves_nothing_running() {
    let house = House::with(&["alice", "bob"]).await;
    house.upstream.hold_usage("bob");
    let request = house.http.post(house.url(REFRESH)).bearer_auth(house.key());
    let asking = tokio::spawn(request.send());
    house
        .upstream
        .wait("the question", |state| state.silent == 1)
        .await;
    assert!(house.stop().await, "upstream's silence is not waited for");
    let answer = asking.await.unwrap().unwrap();
    assert_eq!(answer.status(), 503);
    assert!(answer.headers().contains_key("retry-after"));
}

#[tokio::test]
async fn a_key_reads_what_it_has_used_and_of_the_pool_what_it_may() {
    let house = House::start().await;
    house.learn_limits().await;
    let key = house.another_key("own", Grants::default()).await;
    for _ in 0..2 {
        let request = house.http.post(house.url("/backend-api/codex/responses"));
        let body = crate::support::house::codex_body("hi");
        events(request.bearer_auth(&key).json(&body).send().await.unwrap()).await;
    }
    house.server_idle().await;
    let own = api_key::find(&house.db, "own").await.unwrap();
    let turns = house.turns().await;
    let own: Vec<&Value> = turns
        .iter()
        .filter(|turn| turn["api_key_id"] == own.to_string())
        .collect();
    let sum = |name: &str| {
        own.iter()
            .map(|turn| turn[name].as_i64().unwrap())
            .sum::<i64>()
    };
    let usage = json_of(get(&house, USAGE, &key).await).await;
    assert_eq!(own.len(), 2);
    assert_eq!(usage["request_count"], 2);
    assert_eq!(
        usage["total_tokens"],
        sum("input_tokens") + sum("output_tokens")
    );
    assert!(usage["total_tokens"].as_i64().unwrap() > 0);
    assert_eq!(usage["cached_input_tokens"], sum("cached_input_tokens"));
    assert_eq!(
        usage["total_cost_usd"].as_f64().unwrap(),
        sum("cost_nanodollars") as f64 / 1e9
    );
    assert_eq!(usage["limits"], usage["upstream_limits"]);
    assert_eq!(usage["limits"][0]["limit_window"], "5h");
    assert_eq!(usage["account_pool_usage"]["primary"], 88.0, "{usage}");

    let hidden = Grants {
        quota: Some(Vec::<Section>::new()),
        ..Grants::default()
    };
    let hidden = house.another_key("hidden", hidden).await;
    let usage = json_of(get(&house, USAGE, &hidden).await).await;
    assert_eq!(
        usage,
        json!({ "request_count": 0, "total_tokens": 0, "cached_input_tokens": 0, "total_cost_usd": 0.0, "limits": [],
            "upstream_limits": [], "account_pool_usage": null })
    );
}

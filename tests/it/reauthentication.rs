//! Many logins of one seat at once, under different addresses and over several replicas, while turns run: one row, with everything on it, and
//! no turn notices.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
};

use drawbridge::{
    account::{AuthFile, merge::Policy},
    api_key::Grants,
    config::Transport,
    ids::AccountId,
    server::Server,
};
use futures_util::{StreamExt as _, future::join_all, stream};
use serde_json::{Value, json};

use crate::support::{
    house::{House, OPERATOR, Plan, events, text_of},
    wait::until,
};

const LOGINS: usize = 200;
/// Threads whose turns run all the while, at each replica.
const THREADS: usize = 4;

/// A login through the operators' API: begun at one replica, finished at another.
async fn log_in(house: &House, servers: &[&Server], n: usize) -> Value {
    let url = |server: &Server, path: &str| {
        format!("http://{}/api/accounts/login{path}", server.admin_address)
    };
    let ask = async |url: String, body: Value| {
        let request = house.http.post(url).bearer_auth(OPERATOR).json(&body);
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let body: Value = answer.json().await.unwrap();
        assert!(status.is_success(), "{n}: {status} {body}");
        body
    };
    let begun = ask(url(servers[n % 3], ""), json!({"method": "browser"})).await;
    let email = format!("person-{n}@example.test");
    let callback = house
        .upstream
        .log_in(begun["url"].as_str().unwrap(), "alice", &email);
    let path = format!("/{}/complete", begun["id"].as_str().unwrap());
    let body = json!({ "callback_url": callback });
    ask(url(servers[(n + 1) % 3], &path), body).await
}

/// Turns of one thread until the logins are over; yields their number.
async fn turns(house: &House, server: &Server, key: &str, name: &str, over: &AtomicBool) -> usize {
    let mut turn = 0;
    while !over.load(Ordering::Relaxed) {
        let id = format!("{name}-{turn}");
        let url = format!("http://{}/backend-api/codex/responses", server.address);
        let request = house
            .http
            .post(url)
            .bearer_auth(key)
            .header("thread-id", name)
            .header("session-id", name)
            .header(
                "x-codex-turn-metadata",
                json!({ "turn_id": id, "thread_id": name, "session_id": name, "request_kind": "turn" })
                    .to_string(),
            )
            .json(&crate::support::house::codex_body("hi"));
        let answer = request.send().await.unwrap();
        let status = answer.status();
        let answer = events(answer).await;
        assert_eq!(text_of(&answer), "echo: hi..", "{id}: {status} {answer:?}");
        turn += 1;
    }
    turn
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_logins_of_one_seat_under_different_addresses_leave_one_row_with_everything_on_it_and_no_turn_fails()
 {
    let house = House::planned(Plan {
        transport: Transport::Http,
        ..Plan::default()
    })
    .await;
    let oldest = house.account_id("alice").await;
    // More rows of the seat, each with threads and keys of its own.
    let accounts = house.accounts();
    let mut rows: Vec<AccountId> = vec![oldest];
    for n in 0..3 {
        let begun = house.upstream.account("alice").auth_json();
        let file = AuthFile::parse(begun.as_bytes()).unwrap();
        let beside = Policy {
            by_seat: false,
            by_email: false,
        };
        let label = format!("copy-{n}");
        let row = accounts.import_by(beside, &file, Some(&label)).await;
        rows.push(row.unwrap().id);
    }
    let mut keys = Vec::new();
    for row in &rows {
        let grants = Grants {
            accounts: Some(vec![*row]),
            ..Grants::default()
        };
        keys.push(house.another_key("one row", grants).await);
    }
    let others = [house.neighbour().await, house.neighbour().await];
    let servers = [&house.server, &others[0], &others[1]];

    let over = AtomicBool::new(false);
    let running = (0..3 * THREADS).map(|n| {
        let (server, key) = (servers[n % 3], &keys[n % keys.len()]);
        let (house, over) = (&house, &over);
        async move { turns(house, server, key, &format!("thread-{n}"), over).await }
    });
    let logins = async {
        // Every copy has served.
        until("turns run at every row", async || {
            let turns = house.turns().await;
            let used: BTreeSet<_> = turns
                .iter()
                .map(|turn| turn["account_id"].as_str().unwrap_or_default().to_owned())
                .collect();
            used.len() == rows.len()
        })
        .await;
        let all = stream::iter(0..LOGINS).map(|n| log_in(&house, &servers, n));
        let done: Vec<Value> = all.buffer_unordered(LOGINS).collect().await;
        // As long again.
        let before = house.turns().await.len();
        until("turns go on", async || {
            house.turns().await.len() > before + 3 * THREADS
        })
        .await;
        over.store(true, Ordering::Relaxed);
        done
    };
    let (done, counts) = tokio::join!(logins, join_all(running));
    for login in &done {
        assert_eq!(login["status"], "succeeded");
        assert_eq!(login["account_id"], oldest.to_string());
    }
    assert!(counts.iter().all(|turns| *turns > 1), "{counts:?}");

    house.server_idle().await;
    let listed = accounts.list().await.unwrap();
    let ids: Vec<AccountId> = listed.iter().map(|account| account.id).collect();
    assert_eq!(ids, [oldest], "one row");
    // What turns wrote while they ran follows.
    for (what, sql) in [
        (
            "key grants",
            "select count(*) from api_keys where grants->'accounts' <> jsonb_build_array($1::text)
            and grants ? 'accounts'",
        ),
        (
            "preferences",
            "select count(*) from sticky_sessions where account_id::text <> $1",
        ),
        (
            "logins",
            "select count(*) from login_flows where account_id::text <> $1",
        ),
    ] {
        let row = house.client.query_one(sql, &[&oldest.to_string()]).await;
        assert_eq!(row.unwrap().get::<_, i64>(0), 0, "{what}");
    }
    let merges = accounts.merges().await.unwrap();
    assert_eq!(merges.len(), 3);
    assert!(merges.values().all(|to| *to == oldest));
    let readable = |turn: &Value| {
        let id: AccountId = turn["account_id"].as_str().unwrap().parse().unwrap();
        merges.get(&id).copied().unwrap_or(id) == oldest
    };
    let turns = house.turns().await;
    assert!(turns.iter().all(readable), "history reads as the one row's");
    assert!(turns.iter().all(|turn| turn["outcome"] == "completed"));
    assert_eq!(house.upstream.violations(), [""; 0]);
}

//! Logins that begin at one replica, are asked after at another and end at a third: by a browser, by a device, over HTTP and on the command
//! line.

use std::time::Duration;

use drawbridge::server::Server;
use futures_util::future::join_all;
use http::Method;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};

use crate::support::{
    house::{House, OPERATOR, Plan},
    process::Home,
    wait::until,
};

/// Three replicas without an account.
struct Rooms {
    house: House,
    others: [Server; 2],
}

impl Rooms {
    async fn open(accounts: &'static [&'static str]) -> Self {
        let house = House::planned(Plan {
            accounts,
            ..Plan::default()
        })
        .await;
        let others = [house.neighbour().await, house.neighbour().await];
        Self { house, others }
    }

    fn replica(&self, number: usize) -> &Server {
        match number % 3 {
            0 => &self.house.server,
            number => &self.others[number - 1],
        }
    }

    /// A request of an operator to a replica.
    async fn ask(&self, number: usize, method: Method, path: &str, body: Value) -> (u16, Value) {
        let url = format!(
            "http://{}/api/accounts/login{path}",
            self.replica(number).admin_address
        );
        let request = self.house.http.request(method, url).bearer_auth(OPERATOR);
        let answer = request.json(&body).send().await.unwrap();
        (answer.status().as_u16(), answer.json().await.unwrap())
    }

    async fn begin(&self, body: Value) -> Value {
        let (status, begun) = self.ask(0, Method::POST, "", body).await;
        assert_eq!(status, 201, "{begun}");
        begun
    }

    async fn complete(&self, number: usize, begun: &Value, callback: &str) -> (u16, Value) {
        let path = format!("/{}/complete", text(begun, "id"));
        let body = json!({ "callback_url": callback });
        self.ask(number, Method::POST, &path, body).await
    }

    async fn status(&self, number: usize, begun: &Value) -> Value {
        let path = format!("/{}", text(begun, "id"));
        let (status, flow) = self.ask(number, Method::GET, &path, Value::Null).await;
        assert_eq!(status, 200, "{flow}");
        flow
    }

    /// The accounts and their credentials as they are stored.
    async fn rows(&self) -> Vec<String> {
        let sql = "select (to_jsonb(a) || to_jsonb(c))::text from accounts a join account_credentials c using (account_id) order by 1";
        let rows = self.house.client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    fn finish(&self, begun: &Value, name: &str, email: &str) -> String {
        self.house.upstream.log_in(text(begun, "url"), name, email)
    }
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name]
        .as_str()
        .unwrap_or_else(|| panic!("no {name}: {value}"))
}

fn code(answer: &(u16, Value)) -> (u16, &str) {
    assert!(answer.1["error"]["message"].is_string(), "{answer:?}");
    (answer.0, text(&answer.1["error"], "code"))
}

#[tokio::test]
async fn a_browsers_login_begins_is_asked_after_and_ends_at_different_replicas_and_ends_once() {
    let rooms = Rooms::open(&[]).await;
    let begun = rooms
        .begin(json!({"method": "browser", "label": " mine "}))
        .await;
    assert_eq!(rooms.status(1, &begun).await["status"], "pending");
    let callback = rooms.finish(&begun, "alice", "alice@example.test");
    // Impatient people.
    let all = join_all((0..12).map(|n| rooms.complete(n, &begun, &callback))).await;
    for (status, flow) in &all {
        assert_eq!(
            (*status, text(flow, "status")),
            (200, "succeeded"),
            "{flow}"
        );
        assert_eq!(
            (&flow["account_id"], &flow["created"]),
            (&all[0].1["account_id"], &json!(true))
        );
    }
    let again = rooms.complete(0, &begun, &callback).await;
    assert_eq!((again.0, text(&again.1, "status")), (200, "succeeded"));
    assert_eq!(rooms.status(2, &begun).await, again.1);
    assert_eq!(rooms.house.upstream.violations(), [""; 0]);
    let listed = rooms.house.accounts().list().await.unwrap();
    let [account] = &listed[..] else {
        panic!("one login, one account")
    };
    assert_eq!(account.id.to_string(), text(&again.1, "account_id"));
    assert_eq!(account.label.as_deref(), Some("mine"));
    assert_eq!(account.email.as_deref(), Some("alice@example.test"));
    // It is good at once, everywhere.
    for number in 0..3 {
        let name = format!("t{number}");
        let answer = rooms
            .house
            .codex_turn_at(rooms.replica(number), &name, &name, "hi")
            .await;
        assert_eq!(answer.status(), 200);
    }
}

#[tokio::test]
async fn a_devices_login_is_polled_as_upstream_wants_however_many_ask_and_ends_at_any_replica() {
    let rooms = Rooms::open(&[]).await;
    let begun = rooms.begin(json!({"method": "device"})).await;
    assert!(text(&begun, "url").ends_with("/codex/device"));
    let flows = join_all((0..12).map(|n| rooms.status(n, &begun))).await;
    assert!(flows.iter().all(|flow| flow["status"] == "pending"));
    rooms
        .house
        .upstream
        .approve(text(&begun, "user_code"), Some(("bob", "bob@example.test")));
    let mut number = 0;
    let flow = loop {
        let flow = rooms.status(number, &begun).await;
        if flow["status"] != "pending" {
            break flow;
        }
        assert!(number < 500, "never: {flow}");
        number += 1;
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(flow["status"], "succeeded", "{flow}");
    assert_eq!(rooms.house.accounts().list().await.unwrap().len(), 1);
    assert_eq!(rooms.house.upstream.violations(), [""; 0]);

    let refused = rooms.begin(json!({"method": "device"})).await;
    rooms
        .house
        .upstream
        .approve(text(&refused, "user_code"), None);
    let flow = rooms.status(1, &refused).await;
    assert_eq!(
        (text(&flow, "status"), text(&flow, "error")),
        ("failed", "access_denied")
    );
    rooms.house.upstream.no_devices();
    let none = rooms
        .ask(0, Method::POST, "", json!({"method": "device"}))
        .await;
    assert_eq!(code(&none), (400, "device_login_unavailable"));
}

#[tokio::test]
async fn a_targeted_relogin_with_the_other_seats_account_is_rejected_and_no_row_changed() {
    let rooms = Rooms::open(&["alice", "bob"]).await;
    let alice = rooms.house.account_id("alice").await;
    let before = rooms.rows().await;
    let target = json!({"method": "browser", "account_id": alice});
    let begun = rooms.begin(target.clone()).await;
    let callback = rooms.finish(&begun, "bob", "alice@example.test");
    let rejected = rooms.complete(1, &begun, &callback).await;
    assert_eq!(code(&rejected), (409, "other_seat"));
    assert_eq!(rooms.rows().await, before);
    let flow = rooms.status(2, &begun).await;
    assert_eq!(
        (text(&flow, "status"), text(&flow, "error")),
        ("failed", "other_seat")
    );

    let begun = rooms.begin(target).await;
    let callback = rooms.finish(&begun, "alice", "new@example.test");
    let (status, flow) = rooms.complete(1, &begun, &callback).await;
    assert_eq!(
        (status, text(&flow, "account_id")),
        (200, &*alice.to_string())
    );
    assert_eq!(flow["created"], false);
    let rows = rooms.rows().await;
    let changed = rows.iter().filter(|row| !before.contains(row)).count();
    assert_eq!((rows.len(), changed), (2, 1));

    let nobody = json!({"method": "browser", "account_id": uuid::Uuid::new_v4()});
    let nobody = rooms.ask(0, Method::POST, "", nobody).await;
    assert_eq!(code(&nobody), (404, "account_not_found"));
}

#[tokio::test]
async fn what_is_no_callback_of_a_login_ends_nothing_and_what_is_over_stays_over() {
    let rooms = Rooms::open(&[]).await;
    let begun = rooms.begin(json!({"method": "browser"})).await;
    let other = rooms.begin(json!({"method": "browser"})).await;
    let callback = rooms.finish(&begun, "alice", "a@example.test");
    let spoilt = callback.replace("code=", "code=x");
    for (callback, expected) in [
        ("https://example.test/", (400, "invalid_callback_url")),
        (
            &*rooms.finish(&other, "alice", "a@example.test"),
            (400, "callback_of_another_login"),
        ),
        (&spoilt, (400, "login_refused")),
    ] {
        let answer = rooms.complete(1, &begun, callback).await;
        assert_eq!(code(&answer), expected, "{callback}");
        assert_eq!(rooms.status(2, &begun).await["status"], "pending");
    }
    assert_eq!(rooms.complete(0, &begun, &callback).await.0, 200);

    let path = format!("/{}", text(&other, "id"));
    let (status, flow) = rooms.ask(1, Method::DELETE, &path, Value::Null).await;
    assert_eq!((status, text(&flow, "status")), (200, "cancelled"));
    let late = rooms.finish(&other, "bob", "b@example.test");
    let answer = rooms.complete(2, &other, &late).await;
    assert_eq!(code(&answer), (409, "login_over"));

    let denied = rooms.begin(json!({"method": "browser"})).await;
    let callback = rooms.finish(&denied, "alice", "a@example.test");
    let (address, query) = callback.split_once('?').unwrap();
    let state = query
        .split('&')
        .find(|pair| pair.starts_with("state="))
        .unwrap();
    let no = format!("{address}?error=access_denied&{state}");
    let answer = rooms.complete(0, &denied, &no).await;
    assert_eq!(code(&answer), (400, "login_refused"));
    assert_eq!(rooms.status(1, &denied).await["error"], "access_denied");

    let slow = rooms.begin(json!({"method": "browser"})).await;
    let late = rooms.finish(&slow, "bob", "b@example.test");
    let past = "update login_flows set expires_at = clock_timestamp() - interval '25 hours' where status = 'pending'";
    rooms.house.client.execute(past, &[]).await.unwrap();
    assert_eq!(rooms.status(1, &slow).await["status"], "expired");
    let answer = rooms.complete(2, &slow, &late).await;
    assert_eq!(code(&answer), (409, "login_over"));
    assert_eq!(rooms.house.accounts().purge_flows().await.unwrap(), 1);
    let gone = rooms.complete(2, &slow, &late).await;
    assert_eq!(code(&gone), (404, "login_not_found"));
    assert_eq!(rooms.house.accounts().list().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_login_whose_code_is_spent_is_stored_although_postgres_goes_away_meanwhile() {
    let rooms = Rooms::open(&[]).await;
    let begun = rooms.begin(json!({"method": "browser"})).await;
    let callback = rooms.finish(&begun, "alice", "a@example.test");
    let client = &rooms.house.client;
    let last = "begin; select from bus_versions where topic = 'accounts' for update";
    client.batch_execute(last).await.unwrap();
    let storing = async || {
        let fresh = "select pg_stat_clear_snapshot()";
        client.batch_execute(fresh).await.unwrap();
        let sql = "select pid from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        let rows = client.query(sql, &[]).await.unwrap();
        rows.first().map(|row| row.get::<_, i32>(0))
    };
    let (completed, ()) = tokio::join!(rooms.complete(1, &begun, &callback), async {
        until("it is stored", async || storing().await.is_some()).await;
        let first = storing().await;
        let end = "select pg_terminate_backend($1)";
        client.execute(end, &[&first]).await.unwrap();
        until("it is stored again", async || {
            let now = storing().await;
            now.is_some() && now != first
        })
        .await;
        client.batch_execute("commit").await.unwrap();
    });
    assert_eq!(
        (completed.0, text(&completed.1, "status")),
        (200, "succeeded"),
        "{completed:?}"
    );
    assert_eq!(rooms.house.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn a_step_of_a_login_is_one_replicas_for_as_long_as_that_renews_its_claim() {
    let rooms = Rooms::open(&[]).await;
    let begun = rooms.begin(json!({"method": "browser"})).await;
    let (accounts, id) = (rooms.house.accounts(), text(&begun, "id").parse().unwrap());
    let (none, long) = (Duration::ZERO, Duration::from_secs(60));
    let first = accounts.claim_flow(id, none).await.unwrap().unwrap();
    accounts.renew_flow(&first, long).await.unwrap();
    assert!(accounts.claim_flow(id, long).await.unwrap().is_none());
    accounts.renew_flow(&first, none).await.unwrap();
    let second = accounts.claim_flow(id, long).await.unwrap().unwrap();
    accounts.renew_flow(&first, none).await.unwrap();
    let third = accounts.claim_flow(id, long).await.unwrap();
    assert!(third.is_none(), "whoever took it over keeps it");
    accounts.release_flow(&second, None, none).await.unwrap();
    assert!(accounts.claim_flow(id, long).await.unwrap().is_some());
}

#[tokio::test]
async fn only_operators_log_accounts_in_and_mistakes_are_told_without_quoting_them() {
    let rooms = Rooms::open(&[]).await;
    let url = format!(
        "http://{}/api/accounts/login",
        rooms.house.server.admin_address
    );
    for token in [None, Some("wrong"), Some(rooms.house.key())] {
        let mut request = rooms.house.http.post(&url);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        let answer = request
            .json(&json!({"method": "browser"}))
            .send()
            .await
            .unwrap();
        let answer = (answer.status().as_u16(), answer.json().await.unwrap());
        assert_eq!(code(&answer), (401, "invalid_operator_token"));
    }
    for body in [
        json!({}),
        json!({"method": "canary"}),
        json!({"method": "browser", "canary": 1}),
    ] {
        let answer = rooms.ask(1, Method::POST, "", body).await;
        assert_eq!(code(&answer), (400, "invalid_request_error"));
        assert!(!answer.1.to_string().contains("canary"));
    }
    let large = json!({"method": "browser", "label": "x".repeat(3 << 20)});
    let answer = rooms.ask(1, Method::POST, "", large).await;
    assert_eq!(code(&answer), (413, "payload_too_large"));
    let unknown = rooms.ask(2, Method::GET, "/nothing", Value::Null).await;
    assert_eq!(code(&unknown), (404, "login_not_found"));
    let method = rooms.ask(2, Method::PUT, "/nothing", Value::Null).await;
    assert_eq!(code(&method), (405, "method_not_allowed"));
    // Clients never reach it.
    let client = rooms.house.url("/api/accounts/login");
    let answer = rooms
        .house
        .http
        .post(client)
        .bearer_auth(OPERATOR)
        .send()
        .await;
    assert_eq!(answer.unwrap().status(), 404);
}

#[tokio::test]
async fn what_a_login_needs_stands_sealed_and_goes_when_it_ends() {
    let rooms = Rooms::open(&[]).await;
    let device = rooms.begin(json!({"method": "device"})).await;
    let browser = rooms.begin(json!({"method": "browser"})).await;
    let callback = rooms.finish(&browser, "alice", "a@example.test");
    let state = callback.split("state=").nth(1).unwrap();
    let dump = async || {
        let rows = rooms
            .house
            .client
            .query("select f::text from login_flows f", &[])
            .await;
        rows.unwrap()
            .iter()
            .map(|row| row.get::<_, String>(0))
            .collect::<String>()
    };
    let stored = dump().await;
    let hex = |text: &str| {
        text.bytes()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    for secret in [state, text(&device, "user_code")] {
        assert!(!stored.contains(secret) && !stored.contains(&hex(secret)));
    }
    rooms.complete(1, &browser, &callback).await;
    let path = format!("/{}", text(&device, "id"));
    rooms.ask(1, Method::DELETE, &path, Value::Null).await;
    let left = "select count(*) from login_flows where secrets_sealed <> ''";
    let row = rooms.house.client.query_one(left, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 0);
}

#[tokio::test]
async fn the_command_logs_accounts_in_and_again() {
    let home = Home::new().await;
    let mut command = home.command(&["accounts", "login", "--json", "--label", "mine"]);
    let mut child = command
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let begun: Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
    home.upstream.approve(
        text(&begun, "user_code"),
        Some(("alice", "one@example.test")),
    );
    let done: Value = serde_json::from_str(&lines.next_line().await.unwrap().unwrap()).unwrap();
    assert_eq!(
        (&done["status"], &done["created"]),
        (&json!("succeeded"), &json!(true))
    );
    assert!(child.wait().await.unwrap().success());

    for (name, expected) in [("bob", "another seat"), ("alice", "logged in again")] {
        let arguments = ["accounts", "login", "--browser", "--account", "mine"];
        let mut command = home.command(&arguments);
        command
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let url = loop {
            let line = lines.next_line().await.unwrap().unwrap();
            if line.contains("/oauth/authorize?") {
                break line;
            }
        };
        let callback = home.upstream.log_in(&url, name, "two@example.test");
        let mut input = child.stdin.take().unwrap();
        let typed = format!("what?\n{callback}\n");
        input.write_all(typed.as_bytes()).await.unwrap();
        let mut said = String::new();
        while let Some(line) = lines.next_line().await.unwrap() {
            said.push_str(&line);
        }
        let output = child.wait_with_output().await.unwrap();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        assert!(said.contains(expected), "{said}");
        assert!(said.contains("paste all of"), "{said}");
        assert_eq!(output.status.success(), name == "alice");
        assert!(!said.contains("rt-"), "{said}");
    }
    let listed = home.json(&["accounts", "list"]).await;
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_eq!(listed[0]["email"], "two@example.test");
}

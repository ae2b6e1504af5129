//! What is told in confidence reaches upstream and nobody else: no log, no table, no output of a command.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use drawbridge::db::embedded::Cluster;
use loadtest::upstream::{Fault, Kind, Stage};
use serde_json::Value;
use tokio_tungstenite::tungstenite::Message;

use crate::support::{
    codex_socket::{create, id_of},
    house::codex_body,
    process::Home,
};

const PROMPT: &str = "xyzzy-prompt-canary";
const EMAIL: &str = "canary@example.test";

#[tokio::test]
async fn no_log_and_no_table_has_a_token_a_key_an_address_or_a_prompt() {
    let home = Home::new().await.set("DRAWBRIDGE_LOG", "debug");
    let service = home.serve().await;
    let account = home.upstream.account("canary");
    let mut canaries: Vec<String> = vec![PROMPT.into(), EMAIL.into(), "example.test".into()];
    let tokens = |canaries: &mut Vec<String>| {
        let file: Value = serde_json::from_str(&account.auth_json()).unwrap();
        for token in ["access_token", "refresh_token", "id_token"] {
            canaries.push(file["tokens"][token].as_str().unwrap().to_owned());
        }
    };
    tokens(&mut canaries);
    home.import("canary").await;
    let rotated = home.key("laptop").await;
    let key = home.ok(&["keys", "rotate", "laptop", "--quiet"]).await;
    let key = key.trim_end();
    canaries.extend([rotated.clone(), key.to_owned(), "canary-of-no-key".into()]);

    // Everything that goes well or badly, with a prompt in it.
    for kind in [
        Kind::Unauthorized,
        Kind::Status(400, "invalid_prompt".into()),
        Kind::Failed("server_error".into()),
        Kind::Cut(Stage::BeforeCreated),
        Kind::Cut(Stage::Visible),
        Kind::Overloaded,
        Kind::RateLimit { resets_in: 1 },
    ] {
        home.upstream.fault(Fault::once(kind.clone()));
        // How it ends is told elsewhere.
        if let Ok(answer) = service
            .try_turn(key, &format!("http {kind:?}"), PROMPT)
            .await
        {
            drop(answer.bytes().await);
        }
        home.upstream.fault(Fault::once(kind.clone()));
        let mut socket = service.socket(key).await;
        let frames = socket
            .turn(create(&format!("socket {kind:?}"), PROMPT, None))
            .await;
        if frames
            .last()
            .is_some_and(|last| last["type"] == "response.completed")
        {
            socket
                .turn(create("next", PROMPT, Some(&id_of(&frames))))
                .await;
        }
        socket.send_raw(Message::text(format!("{{{PROMPT}"))).await;
        assert!(socket.next().await.is_some());
    }
    assert!(account.exchanges() > 0, "a refresh is part of it");
    tokens(&mut canaries);
    let url = format!("http://{}/v1/responses", service.address);
    let bad = [
        service
            .http
            .post(&url)
            .bearer_auth(key)
            .body(format!("{{\"model\": \"{PROMPT}")),
        service
            .http
            .post(&url)
            .bearer_auth("dbk_canary-of-no-key")
            .json(&codex_body(PROMPT)),
        service
            .http
            .post(format!("{url}?q={PROMPT}"))
            .bearer_auth(&rotated)
            .json(&codex_body(PROMPT)),
    ];
    for (request, status) in bad.into_iter().zip([400, 401, 401]) {
        assert_eq!(request.send().await.unwrap().status(), status);
    }

    let listed = home.ok(&["keys", "list"]).await
        + &home.ok(&["keys", "list", "--json"]).await
        + &home.ok(&["config"]).await;
    let metrics = service
        .http
        .get(format!("http://{}/metrics", service.admin));
    let metrics = metrics.send().await.unwrap().text().await.unwrap();
    let (_, log) = service.stop().await;
    let cluster = Cluster::open(home.path()).await.unwrap();
    let tables = dump(&home).await;
    cluster.close().await.unwrap();
    let server = std::fs::read_to_string(home.path().join("postgres.log")).unwrap();
    assert!(log.contains("DEBUG"), "the test says nothing");
    for (place, text) in [
        ("log", log),
        ("Postgres' log", server),
        ("tables", tables),
        ("lists", listed),
        ("metrics", metrics),
    ] {
        for canary in &canaries {
            for form in [canary.clone(), hex(canary), BASE64_STANDARD.encode(canary)] {
                let at = text.find(&form);
                let line = at.map(|at| text[..at].lines().count());
                assert!(
                    at.is_none(),
                    "{canary} is in the {place}, line {line:?}: {}",
                    around(&text, at)
                );
            }
        }
    }
}

/// Every row of every table as text; `bytea` is hex.
async fn dump(home: &Home) -> String {
    let client = home.connect().await;
    let tables = client
        .query(
            "select quote_ident(tablename) from pg_tables where schemaname = 'public'",
            &[],
        )
        .await
        .unwrap();
    let mut text = String::new();
    for table in tables {
        let table: String = table.get(0);
        let rows = client
            .query(&format!("select t::text from {table} t"), &[])
            .await
            .unwrap();
        for row in rows {
            text.push_str(&format!("{table} {}\n", row.get::<_, String>(0)));
        }
    }
    for wanted in [
        "turns (",
        "request_log (",
        "account_credentials (",
        "api_keys (",
        "sticky_sessions (",
    ] {
        assert!(text.contains(wanted), "no row in {wanted}");
    }
    text
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn around(text: &str, at: Option<usize>) -> &str {
    let Some(at) = at else { return "" };
    let from = text[..at].rfind('\n').map_or(0, |end| end + 1);
    let to = text[at..].find('\n').map_or(text.len(), |end| at + end);
    &text[from..to]
}

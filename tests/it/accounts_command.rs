//! `drawbridge accounts` as an operator runs it.

use std::process::Stdio;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use drawbridge::{
    db::{Endpoint, migrate},
    secret::KeyRing,
};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, process::Command};

use crate::support::pg::TestDb;

#[tokio::test]
async fn the_command_takes_a_login_over_and_gives_nothing_away() {
    let test = TestDb::migrated(async |url| {
        migrate(&Endpoint::parse(&url).unwrap()).await.unwrap();
    })
    .await;
    let key = KeyRing::generate("k1");
    let run = async |arguments: &[&str], input: &str| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_drawbridge"))
            .arg("accounts")
            .args(arguments)
            .env_clear()
            .env("DRAWBRIDGE_DATABASE_URL", &test.url)
            .env("DRAWBRIDGE_MASTER_KEYS", key.expose_secret())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that reads no input may have ended already.
        drop(
            child
                .stdin
                .take()
                .unwrap()
                .write_all(input.as_bytes())
                .await,
        );
        let output = child.wait_with_output().await.unwrap();
        let [out, err] =
            [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
        for secret in ["rt_", "eyJ", "sk-"] {
            assert!(!out.contains(secret) && !err.contains(secret), "{out}{err}");
        }
        output.status.success().then_some(out).ok_or(err)
    };
    let claims = json!({ "email": "alice@example.test", "exp": 2_000_000_000, "chatgpt_account_id": "ws", "user_id": "alice" });
    let access = format!(
        "eyJ9.{}.c2ln",
        BASE64_URL_SAFE_NO_PAD.encode(claims.to_string())
    );
    let file =
        json!({ "tokens": { "access_token": access, "refresh_token": "rt_alice" } }).to_string();

    let told = run(&["import", "-", "--label", "work"], &file)
        .await
        .unwrap();
    assert!(
        told.contains("now belongs to Drawbridge") && told.contains("CODEX_HOME=$(mktemp -d)"),
        "{told}"
    );
    run(&["import", "-"], &file).await.unwrap();
    let listed = run(&["list", "--json"], "").await.unwrap();
    let [account] = &serde_json::from_str::<Vec<Value>>(&listed).unwrap()[..] else {
        panic!("one seat, one row: {listed}")
    };
    assert_eq!(account["email"], "alice@example.test");
    assert_eq!(account["label"], "work");
    assert_eq!(account["lifecycle"], "active");
    assert_eq!(account["access_expires_at"], "2033-05-18T03:33:20Z");

    let id = account["id"].as_str().unwrap();
    for (command, name, shown) in [
        ("pause", "work", "paused"),
        ("resume", &id[..8], "active"),
        ("pause", "Alice@example.test", "paused"),
        ("resume", id, "active"),
    ] {
        run(&[command, name], "").await.unwrap();
        let table = run(&["list"], "").await.unwrap();
        assert!(table.contains(shown), "{command}: {table}");
    }

    // An address that does not open hides no account and stands in the way of no command.
    let client = test.connect().await;
    let damage = "update accounts set email_sealed = '\\x00'";
    client.batch_execute(damage).await.unwrap();
    let listed = run(&["list", "--json"], "").await.unwrap();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed[0]["email"], "?");
    run(&["pause", "work"], "").await.unwrap();
    run(&["delete", id], "").await.unwrap();
    assert_eq!(run(&["list", "--json"], "").await.unwrap().trim(), "[]");

    let refused = run(&["pause", "work"], "").await.unwrap_err();
    assert!(refused.contains("work"), "{refused}");

    // An export of several: what can be read is taken, the rest says why not.
    let encrypted = json!({ "id": "ws_2", "access_token_encrypted": "gAAA" });
    let whole: Value = serde_json::from_str(&file).unwrap();
    let account = json!({ "alias": "exported", "status": "paused" });
    let export = json!([{ "account": account, "codexAuthJson": whole }, encrypted]).to_string();
    let why = run(&["import", "-"], &export).await.unwrap_err();
    assert!(why.contains("1 of 2 entries"), "{why}");
    run(&["import", "-", "--label", "two"], &export)
        .await
        .unwrap_err();
    let listed = run(&["list", "--json"], "").await.unwrap();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    assert_eq!(listed[0]["label"], "exported");
    run(&["delete", "exported"], "").await.unwrap();
    for input in [
        r#"{"OPENAI_API_KEY":"sk-secret"}"#,
        "rt_secret",
        r#"{"tokens":"rt_secret"}"#,
    ] {
        run(&["import", "-"], input).await.unwrap_err();
    }
}

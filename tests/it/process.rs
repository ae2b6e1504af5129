//! The program as a user runs it: one process, its commands beside it, and what is left when it ends.

mod config;
mod drain;
mod kill;
mod secrets;

use std::time::{Duration, Instant};

use rustix::process::geteuid;

use crate::support::{
    house::{events, text_of},
    process::{Home, Service},
};

#[tokio::test]
async fn without_any_configuration_it_serves_and_its_commands_work_beside_it() {
    works_from_first_start_to_last_command(Home::new().await).await;
}

#[tokio::test]
async fn the_same_holds_for_an_ordinary_user() {
    if geteuid().is_root() {
        works_from_first_start_to_last_command(Home::of_nobody().await).await;
    }
}

async fn works_from_first_start_to_last_command(home: Home) {
    let mut service = home.serve().await;
    let steps = service.logged("point Codex here").await;
    let log = service.log();
    assert!(log.contains("drawbridge accounts login"), "{log}");
    assert!(log.contains("drawbridge keys create --name"), "{log}");
    let base = format!(
        "base_url = \"http://{}/backend-api/codex\"",
        service.address
    );
    service.logged(&base).await;
    assert!(!log.contains('\u{1b}'), "no terminal, no colours: {steps}");

    // Accounts, by file and by standard input.
    let file = home.path().join("auth.json");
    std::fs::write(&file, home.upstream.account("alice").auth_json()).unwrap();
    let told = home
        .ok(&[
            "accounts",
            "import",
            file.to_str().unwrap(),
            "--label",
            "alice",
        ])
        .await;
    assert!(told.contains("belongs to Drawbridge"), "{told}");
    home.import("bob").await;
    let accounts = home.json(&["accounts", "list"]).await;
    let labels: Vec<_> = accounts
        .as_array()
        .unwrap()
        .iter()
        .map(|account| {
            (
                account["label"].as_str().unwrap(),
                account["lifecycle"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(labels, [("alice", "active"), ("bob", "active")]);

    // Nobody needs a key here before there is one; then everybody does.
    let keyless = service.turn("", "turn-0", "hi").await;
    assert_eq!(keyless.status(), 200);
    events(keyless).await;
    let key = home.key("laptop").await;
    assert!(
        key.starts_with("dbk_") && !key.contains('\n'),
        "{}",
        key.len()
    );
    let answer = service.turn(&key, "turn-1", "hi").await;
    assert_eq!(
        answer.status(),
        200,
        "a key works the moment it was created"
    );
    assert_eq!(text_of(&events(answer).await), "echo: hi..");
    refused_within(&service, "", Duration::from_millis(2500)).await;

    // A paused account serves nothing.
    home.ok(&["accounts", "pause", "alice"]).await;
    refused_accounts(&home, &service, &key, "alice").await;
    home.ok(&["accounts", "resume", "alice"]).await;
    home.ok(&["accounts", "delete", "bob"]).await;
    refused_accounts(&home, &service, &key, "bob").await;
    let accounts = home.json(&["accounts", "list"]).await;
    assert_eq!(accounts.as_array().unwrap().len(), 1);
    assert_eq!(accounts[0]["lifecycle"], "active");

    let rotated = home.ok(&["keys", "rotate", "laptop", "--quiet"]).await;
    let rotated = rotated.trim_end();
    let answer = service.turn(rotated, "turn-2", "hi").await;
    assert_eq!(answer.status(), 200);
    events(answer).await;
    refused_within(&service, &key, Duration::from_millis(2500)).await;
    let listed = home.json(&["keys", "list"]).await;
    assert_eq!(listed[0]["name"], "laptop");
    assert!(!listed.to_string().contains(rotated));
    home.ok(&["keys", "revoke", "laptop"]).await;
    refused_within(&service, rotated, Duration::from_millis(2500)).await;

    assert_eq!(home.upstream.violations(), [""; 0]);
    let (code, log) = service.stop().await;
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(home.postmaster(), None, "its last user stops the database");

    // The commands work without it, too, and leave no database running.
    let accounts = home.json(&["accounts", "list"]).await;
    assert_eq!(accounts[0]["label"], "alice");
    assert_eq!(home.postmaster(), None);
}

/// Asks with this key until it is refused.
async fn refused_within(service: &Service, key: &str, time: Duration) {
    let began = Instant::now();
    loop {
        let url = format!("http://{}/backend-api/codex/models", service.address);
        let request = service.http.get(url).bearer_auth(key);
        let status = request.send().await.unwrap().status();
        if status == 401 {
            return;
        }
        assert!(began.elapsed() < time, "still {status}");
    }
}

/// Turns until five in a row were served by others than this account.
async fn refused_accounts(home: &Home, service: &Service, key: &str, name: &str) {
    let began = Instant::now();
    let mut others = 0;
    for turn in 0.. {
        let turn = format!("{name}-{turn}");
        events(service.turn(key, &turn, "hi").await).await;
        let served = home.upstream.attempts().pop().unwrap().account;
        others = if served == name { 0 } else { others + 1 };
        if others == 10 {
            return;
        }
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{name} still serves"
        );
    }
}

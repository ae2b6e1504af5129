//! Access tokens and the exchange of refresh tokens.

use std::time::Duration;

use loadtest::upstream::{Config, Upstream};
use serde_json::{Value, json};

use crate::support::client;

#[tokio::test]
async fn credentials_must_be_of_one_account_and_alive() {
    let upstream = Upstream::start(Config::default()).await;
    let (alice, bob) = (upstream.account("alice"), upstream.account("bob"));
    let ask = async |token: String, id: String| {
        let request = client()
            .get(format!("{}/codex/models", upstream.url()))
            .bearer_auth(token)
            .header("chatgpt-account-id", id);
        request.send().await.unwrap().status().as_u16()
    };
    let old = alice.access_token();
    assert_eq!(ask(old.clone(), alice.id()).await, 200);
    assert_eq!(
        ask(old.clone(), bob.id()).await,
        401,
        "another account's id"
    );
    assert_eq!(ask("nonsense".into(), alice.id()).await, 401);
    alice.expire();
    assert_eq!(ask(old.clone(), alice.id()).await, 401);
    drop(alice.exchange_elsewhere());
    assert_eq!(ask(alice.access_token(), alice.id()).await, 200);
    assert_eq!(
        ask(old, alice.id()).await,
        401,
        "the token before the exchange"
    );
}

#[tokio::test]
async fn a_refresh_token_works_once() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    let exchange = async |token: &str| {
        let request =
            json!({ "client_id": "app", "grant_type": "refresh_token", "refresh_token": token });
        let answer = client()
            .post(format!("{}/oauth/token", upstream.auth_url()))
            .json(&request)
            .send()
            .await
            .unwrap();
        (
            answer.status().as_u16(),
            answer.json::<Value>().await.unwrap(),
        )
    };
    let auth: Value = serde_json::from_str(&account.auth_json()).unwrap();
    let first = auth["tokens"]["refresh_token"].as_str().unwrap();
    let (status, renewed) = exchange(first).await;
    assert_eq!(
        (status, renewed["access_token"].as_str()),
        (200, Some(account.access_token().as_str()))
    );
    let (status, refused) = exchange(first).await;
    assert_eq!(
        (status, refused["error"]["code"].as_str()),
        (401, Some("refresh_token_reused"))
    );
    let second = renewed["refresh_token"].as_str().unwrap();
    account.fail_exchange(500);
    assert_eq!(exchange(second).await.0, 500);
    assert_eq!(
        exchange(second).await.0,
        200,
        "a failed exchange does not use the token up"
    );
    assert_eq!((account.exchanges(), account.reuses()), (2, 1));
    account.revoke();
    let auth: Value = serde_json::from_str(&account.auth_json()).unwrap();
    let (status, refused) = exchange(auth["tokens"]["refresh_token"].as_str().unwrap()).await;
    assert_eq!(
        (status, refused["error"]["code"].as_str()),
        (400, Some("refresh_token_invalidated"))
    );
}

#[tokio::test]
async fn two_exchanges_at_once_give_new_tokens_to_one() {
    let upstream = Upstream::start(Config::default()).await;
    let account = upstream.account("alice");
    account.delay_exchange(Duration::from_millis(50));
    let exchange = async || {
        let body = json!({ "grant_type": "refresh_token", "refresh_token": "rt-alice-0" });
        client()
            .post(format!("{}/oauth/token", upstream.auth_url()))
            .json(&body)
            .send()
            .await
            .unwrap()
            .status()
            .as_u16()
    };
    let (a, b) = tokio::join!(exchange(), exchange());
    let mut statuses = [a, b];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 401]);
}

//! The small documents: which model there is, how much is left, and what a client with a ChatGPT login asks before its first turn.

use std::time::{Duration, Instant};

use drawbridge::{api_key::Grants, config::KeyRule};
use reqwest::Response;
use serde_json::{Value, json};

use crate::support::house::{House, Plan, codex_body, events, text_of};

const BASES: [&str; 2] = ["/backend-api/wham", "/api/codex"];

/// Waits until the catalogue has come from upstream.
async fn with_catalogue(house: &House) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let models = json_of(house.get("/v1/models").send().await.unwrap()).await;
        if !slugs(&models["data"], "id").is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "the catalogue never came");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn json_of(response: Response) -> Value {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/json");
    assert!(response.headers().contains_key("x-request-id"));
    response.json().await.unwrap()
}

fn slugs<'a>(list: &'a Value, name: &str) -> Vec<&'a str> {
    let entries = list.as_array().unwrap().iter();
    entries.map(|entry| entry[name].as_str().unwrap()).collect()
}

#[tokio::test]
async fn codex_reads_every_model_and_an_sdk_those_that_are_listed() {
    let house = House::with(&["alice", "bob"]).await;
    with_catalogue(&house).await;
    let (listed, all) = (
        ["gpt-5.5", "gpt-5.4-mini"],
        ["gpt-5.5", "gpt-5.4-mini", "gpt-5.6-sol"],
    );
    for path in [
        "/backend-api/codex/models?client_version=0.169.0",
        "/backend-api/codex/models",
        "/backend-api/codex/v1/models",
        "/v1/models?client_version=0.169.0",
    ] {
        let models = json_of(house.get(path).send().await.unwrap()).await;
        assert_eq!(slugs(&models["models"], "slug"), all, "{path}");
        assert_eq!(slugs(&models["data"], "id"), listed, "{path}");
        assert_eq!(
            models["models"][0]["context_window"], 272_000,
            "an entry is passed on whole"
        );
    }
    for path in ["/v1/models", "/v1/models?client_version="] {
        let models = json_of(house.get(path).send().await.unwrap()).await;
        assert_eq!(models["object"], "list");
        assert!(models.get("models").is_none(), "{path}");
        assert_eq!(slugs(&models["data"], "id"), listed, "{path}");
        for model in models["data"].as_array().unwrap() {
            assert_eq!(model["object"], "model");
            assert!(model["created"].is_i64() && model["owned_by"].is_string());
        }
    }
}

#[tokio::test]
async fn an_unchanged_catalogue_is_not_sent_again() {
    let house = House::start().await;
    with_catalogue(&house).await;
    let mut etags = Vec::new();
    for path in ["/backend-api/codex/models", "/v1/models"] {
        let first = house.get(path).send().await.unwrap();
        let etag = first.headers()["etag"].clone();
        let again = house.get(path).send().await.unwrap();
        assert_eq!(again.headers()["etag"], etag, "{path}");
        let unchanged = house.get(path).header("if-none-match", &etag);
        let unchanged = unchanged.send().await.unwrap();
        assert_eq!(unchanged.status(), 304, "{path}");
        assert_eq!(unchanged.headers()["etag"], etag);
        assert!(unchanged.bytes().await.unwrap().is_empty());
        let other = house.get(path).header("if-none-match", "\"other\"");
        assert_eq!(other.send().await.unwrap().status(), 200);
        etags.push(etag);
    }
    assert_ne!(etags[0], etags[1], "two shapes, two documents");
}

#[tokio::test]
async fn a_key_sees_the_models_that_it_may_use() {
    let house = House::with(&["alice", "bob"]).await;
    with_catalogue(&house).await;
    let mini = Grants {
        models: Some(vec!["gpt-5.4-mini".into()]),
        ..Grants::default()
    };
    let nothing = Grants {
        accounts: Some(Vec::new()),
        ..Grants::default()
    };
    for (grants, expected) in [(mini, vec!["gpt-5.4-mini"]), (nothing, vec![])] {
        let key = house.another_key("narrow", grants).await;
        let request = house.http.get(house.url("/backend-api/codex/models"));
        let models = json_of(request.bearer_auth(key).send().await.unwrap()).await;
        assert_eq!(slugs(&models["models"], "slug"), expected);
        assert_eq!(slugs(&models["data"], "id"), expected);
    }
}

#[tokio::test]
async fn usage_is_the_pools_and_needs_a_key() {
    let house = House::with(&["alice", "bob"]).await;
    house.learn_limits().await;
    for base in BASES {
        let path = format!("{base}/usage");
        let usage = json_of(house.get(&path).send().await.unwrap()).await;
        let window = &usage["rate_limit"]["primary_window"];
        assert!(window["used_percent"].is_number(), "{usage}");
        assert!(window["reset_at"].is_i64());
        assert!(!usage.to_string().contains("acct-"), "{usage}");
        let stranger = house.http.get(house.url(&path)).send().await.unwrap();
        assert_eq!(stranger.status(), 401, "{path}");
    }
}

#[tokio::test]
async fn the_questions_of_a_chatgpt_login_are_answered_with_what_it_sent_and_nothing_else() {
    let house = House::planned(Plan {
        key_rule: KeyRule::Always,
        ..Plan::default()
    })
    .await;
    for base in BASES {
        let ask = async |id: Option<&str>| {
            let mut request = house.http.get(house.url(&format!("{base}/accounts/check")));
            if let Some(id) = id {
                request = request.header("chatgpt-account-id", id);
            }
            json_of(request.bearer_auth("eyJ.of.chatgpt").send().await.unwrap()).await
        };
        for sent in ["the-callers-own", "\"},{\"quoted\""] {
            let check = ask(Some(sent)).await;
            let account = json!({
                "id": sent,
                "workspace_backend_origin": "NO_CONSTRAINT",
                "account_routing_override": "NO_CONSTRAINT",
                "structure": "personal",
                "plan_type": "pro",
            });
            let expected = json!({
                "accounts": [account],
                "account_ordering": [sent],
                "default_account_id": sent,
            });
            assert_eq!(check, expected);
        }
        let anonymous = ask(None).await;
        assert_eq!(anonymous["accounts"].as_array().unwrap().len(), 1);
        assert!(!anonymous.to_string().contains("alice"), "{anonymous}");
        let settings = house.http.get(house.url(&format!("{base}/settings/user")));
        assert_eq!(json_of(settings.send().await.unwrap()).await, json!({}));
    }
}

#[tokio::test]
async fn a_turn_is_served_under_every_spelling_of_its_path() {
    let house = House::start().await;
    for path in [
        "/backend-api/codex/responses",
        "/backend-api/codex/responses/",
        "/backend-api/codex/v1/responses",
        "/backend-api/codex/v1/responses/",
    ] {
        let answer = house.post(path).json(&codex_body("hi")).send().await;
        assert_eq!(
            text_of(&events(answer.unwrap()).await),
            "echo: hi..",
            "{path}"
        );
    }
    for path in ["/v1/responses", "/v1/responses/"] {
        let body = json!({ "model": "gpt-5.5", "input": "hi" });
        let answer = json_of(house.post(path).json(&body).send().await.unwrap()).await;
        assert_eq!(answer["status"], "completed", "{path}");
    }
}

#[tokio::test]
async fn a_compaction_comes_back_as_one_item() {
    let house = House::start().await;
    for path in [
        "/backend-api/codex/responses/compact",
        "/backend-api/codex/v1/responses/compact",
        "/v1/responses/compact",
    ] {
        let body = json!({ "model": "gpt-5.5", "input": codex_body("a long story")["input"], "instructions": "be brief" });
        let answer = json_of(house.post(path).json(&body).send().await.unwrap()).await;
        let output = answer["output"].as_array().unwrap();
        assert_eq!(output.len(), 1, "{path}: {answer}");
        assert_eq!(output[0]["type"], "compaction");
        let sealed = output[0]["encrypted_content"].as_str().unwrap();
        assert!(sealed.starts_with("gAAA"), "{sealed}");
    }
    let sent = house.upstream.attempts();
    assert!(sent.iter().all(|attempt| {
        let input = attempt.body["input"].as_array().unwrap();
        input.last().unwrap()["type"] == "compaction_trigger"
    }));
    assert_eq!(house.upstream.violations(), [""; 0]);
    assert!(
        house
            .turns()
            .await
            .iter()
            .all(|turn| turn["outcome"] == "completed")
    );
}

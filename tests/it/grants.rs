//! What a key may use and see: in selection, models, headers, events and documents alike, on every replica.

use std::time::Duration;

use drawbridge::{
    api_key::{self, ApiKeys, Change, Grant, Grants},
    bus::Bus,
    config::Config,
    protocol::limits::Section,
    task::Tasks,
};
use loadtest::upstream::{Fault, Kind};
use serde_json::{Value, json};

use crate::support::{
    codex_socket::{CodexSocket, create},
    house::{House, Plan, codex_body, events},
    process::Home,
    wait::until,
};

const CODEX: &str = "/backend-api/codex/responses";

fn limits_of(response: &reqwest::Response) -> Vec<String> {
    let names = response.headers().keys().map(|name| name.as_str());
    let mut names: Vec<String> = names
        .filter(|name| name.starts_with("x-codex-primary-"))
        .map(str::to_owned)
        .collect();
    names.sort();
    names
}

/// A house whose clients are told, unless it hides them, the limits that a turn has brought.
async fn warmed_up(hide_quota: bool) -> House {
    let settings: fn(&mut Config) = match hide_quota {
        true => |config| config.hide_quota = true,
        false => |_| {},
    };
    let plan = Plan {
        settings,
        ..Plan::default()
    };
    let house = House::planned(plan).await;
    events(house.codex_turn("warm-up", "warm-up", "hi").await).await;
    until("the pool's limits are known", async || {
        let usage = house.http.get(house.url("/api/codex/usage"));
        let usage = usage.bearer_auth(house.key()).send().await.unwrap();
        let usage: Value = usage.json().await.unwrap();
        hide_quota || usage["rate_limit"]["primary_window"].is_object()
    })
    .await;
    house
}

fn quota(sections: &[Section]) -> Grants {
    Grants {
        quota: Some(sections.to_vec()),
        ..Grants::default()
    }
}

async fn turn(house: &House, key: &str, model: &str) -> reqwest::Response {
    let mut body = codex_body("hi");
    body["model"] = model.into();
    let request = house.http.post(house.url(CODEX));
    request.bearer_auth(key).json(&body).send().await.unwrap()
}

#[tokio::test]
async fn a_key_is_served_by_its_accounts_alone_even_when_they_are_exhausted() {
    let house = House::with(&["alice", "bob", "carol"]).await;
    let (alice, bob) = (
        house.account_id("alice").await,
        house.account_id("bob").await,
    );
    let of = |accounts: &[_]| Grants {
        accounts: Some(accounts.to_vec()),
        ..Grants::default()
    };
    let two = house.another_key("two", of(&[alice, bob])).await;
    let none = house.another_key("none", of(&[])).await;
    for _ in 0..8 {
        events(turn(&house, &two, "gpt-5.5").await).await;
    }
    let refused = turn(&house, &none, "gpt-5.5").await;
    assert_eq!(refused.status(), 503);
    assert_eq!(
        refused.json::<Value>().await.unwrap()["error"]["code"],
        "no_accounts"
    );
    for _ in 0..2 {
        house
            .upstream
            .fault(Fault::once(Kind::RateLimit { resets_in: 600 }));
    }
    assert_eq!(turn(&house, &two, "gpt-5.5").await.status(), 429);
    assert_eq!(turn(&house, &two, "gpt-5.5").await.status(), 429);
    assert_eq!(turn(&house, house.key(), "gpt-5.5").await.status(), 200);
    let served = house.upstream.attempts();
    let (last, others) = served.split_last().unwrap();
    assert_eq!(last.account, "carol", "who may use everything still can");
    assert_eq!(others.len(), 10, "what is not granted is not asked");
    assert!(others.iter().all(|attempt| attempt.account != "carol"));
}

#[tokio::test]
async fn a_key_uses_its_models_alone() {
    let house = House::start().await;
    let grants = Grants {
        models: Some(vec!["gpt-5.4-mini".into()]),
        ..Grants::default()
    };
    let key = house.another_key("mini", grants).await;
    let refused = turn(&house, &key, "gpt-5.5").await;
    assert_eq!(refused.status(), 403);
    let refused: Value = refused.json().await.unwrap();
    assert_eq!(refused["error"]["code"], "model_not_allowed");
    assert_eq!(turn(&house, &key, "gpt-5.4-mini").await.status(), 200);
    assert_eq!(house.upstream.attempts().len(), 1);
}

#[tokio::test]
async fn headers_and_documents_show_the_sections_of_the_key() {
    use Section::{Limits, Pool};
    for hide_quota in [false, true] {
        let house = warmed_up(hide_quota).await;
        let mut shown = 0;
        for (grants, header_names, whole) in [
            (
                Grants::default(),
                &["reset-at", "used-percent", "window-minutes"][..],
                true,
            ),
            (quota(&[Pool]), &["used-percent"], false),
            (quota(&[Limits]), &["reset-at", "window-minutes"], false),
            (quota(&[]), &[], false),
        ] {
            let case = format!("{grants:?} {hide_quota}");
            let key = house.another_key("seer", grants).await;
            let answer = turn(&house, &key, "gpt-5.5").await;
            let mut expected: Vec<String> = header_names
                .iter()
                .map(|name| format!("x-codex-primary-{name}"))
                .collect();
            expected.retain(|_| !hide_quota);
            assert_eq!(limits_of(&answer), expected, "{case}");
            let get = async |path: &str| {
                let request = house.http.get(house.url(path)).bearer_auth(&key);
                request.send().await.unwrap()
            };
            assert_eq!(limits_of(&get("/v1/models").await), expected, "{case}");
            let usage: Value = get("/api/codex/usage").await.json().await.unwrap();
            let window = &usage["rate_limit"]["primary_window"];
            assert_eq!(window.is_object(), whole && !hide_quota, "{case}: {usage}");
            shown += usize::from(window.is_object());
        }
        assert_eq!(shown, usize::from(!hide_quota));
    }
}

#[tokio::test]
async fn events_and_refusals_show_the_sections_of_the_key() {
    use Section::{Limits, Pool};
    for hide_quota in [false, true] {
        let house = warmed_up(hide_quota).await;
        let mut cases = Vec::new();
        for sections in [&[Pool, Limits][..], &[Pool], &[Limits], &[]] {
            let key = house.another_key("seer", quota(sections)).await;
            cases.push((sections, key));
        }
        let turn_of = async |key: &str, turn: &str| -> Vec<Value> {
            let mut socket = CodexSocket::try_open(&house, CODEX, key).await.unwrap();
            socket.turn(create(turn, "hi", None)).await
        };
        for (sections, key) in &cases {
            let case = format!("{sections:?} {hide_quota}");
            let frames = turn_of(key, "event").await;
            let told = frames
                .iter()
                .find(|frame| frame["type"] == "codex.rate_limits");
            let sees = |section| !hide_quota && sections.contains(&section);
            assert_eq!(told.is_some(), sees(Pool) || sees(Limits), "{case}");
            let nothing = Value::Null;
            let window = told.map_or(&nothing, |told| &told["rate_limits"]["primary"]);
            assert_eq!(window["used_percent"].is_number(), sees(Pool), "{case}");
            let both = sees(Pool) && sees(Limits);
            assert_eq!(window["reset_at"].is_number(), both, "{case}");
        }
        house
            .upstream
            .fault(Fault::once(Kind::RateLimit { resets_in: 600 }));
        for (sections, key) in &cases {
            let case = format!("{sections:?} {hide_quota}");
            let shown = !hide_quota && sections.contains(&Limits);
            let refused = turn(&house, key, "gpt-5.5").await;
            assert_eq!(refused.status(), 429, "{case}");
            let refused: Value = refused.json().await.unwrap();
            let frames = turn_of(key, "refused").await;
            let frame = frames.last().unwrap();
            assert_eq!(frame["status"], 429, "{case}");
            for told in [&refused, frame] {
                let error = &told["error"];
                assert_eq!(error["type"], "usage_limit_reached", "{case}");
                assert_eq!(error["resets_at"].is_number(), shown, "{case}: {told}");
            }
        }
        let asked = house.upstream.attempts();
        assert_eq!(asked.iter().filter(|one| one.status == 429).count(), 1);
    }
}

#[tokio::test]
async fn a_key_may_use_an_alias_without_the_model_that_it_stands_for() {
    let house = House::planned(Plan {
        settings: |config| {
            config.model_aliases = [("fast".to_owned(), "gpt-5.4-mini".to_owned())].into();
        },
        ..Plan::default()
    })
    .await;
    let grants = Grants {
        models: Some(vec!["fast".into()]),
        ..Grants::default()
    };
    let key = house.another_key("fast", grants).await;
    for (model, status) in [("fast", 200), ("gpt-5.4-mini", 403), ("gpt-5.5", 403)] {
        assert_eq!(turn(&house, &key, model).await.status(), status, "{model}");
    }
    until("it is listed, alone", async || {
        let request = house.http.get(house.url("/v1/models")).bearer_auth(&key);
        let listed: Value = request.send().await.unwrap().json().await.unwrap();
        let names = listed["data"].as_array().unwrap().iter();
        names.map(|model| &model["id"]).eq(["fast"])
    })
    .await;
}

#[tokio::test]
async fn a_change_of_grants_reaches_every_replica_and_what_is_not_named_stays() {
    let house = House::start().await;
    let key = house.another_key("laptop", Grants::default()).await;
    let id = api_key::find(&house.db, "laptop").await.unwrap();
    // A newer release knows more.
    let newer = "update api_keys set grants = '{\"budget\": {\"usd\": 5}}' where name = 'laptop'";
    house.client.batch_execute(newer).await.unwrap();
    for (change, status) in [
        (
            Change {
                models: Grant::Only(vec!["gpt-5.4-mini".into()]),
                quota: Grant::Only(vec![]),
                ..Change::default()
            },
            403,
        ),
        (
            Change {
                models: Grant::Any,
                ..Change::default()
            },
            200,
        ),
    ] {
        let granted = api_key::grant(&house.db, id, &change).await.unwrap();
        assert_eq!(granted.grants.quota, Some(vec![]), "it stays");
        until("the replica knows", async || {
            turn(&house, &key, "gpt-5.5").await.status() == status
        })
        .await;
    }
    let row = "select grants from api_keys where name = 'laptop'";
    let grants: Value = house.client.query_one(row, &[]).await.unwrap().get(0);
    assert_eq!(grants, json!({ "budget": { "usd": 5 }, "quota": [] }));

    api_key::revoke(&house.db, id).await.unwrap();
    let late = api_key::grant(&house.db, id, &Change::default()).await;
    assert!(matches!(late, Err(api_key::Error::Revoked)));
}

#[tokio::test]
async fn no_key_names_a_deleted_account_on_another_replica_after_a_second() {
    let house = House::with(&["alice", "bob"]).await;
    let (alice, bob) = (
        house.account_id("alice").await,
        house.account_id("bob").await,
    );
    let grants = |accounts: &[_]| Grants {
        accounts: Some(accounts.to_vec()),
        ..Grants::default()
    };
    let both = house.another_key("both", grants(&[alice, bob])).await;
    let one = house.another_key("one", grants(&[alice])).await;

    let (bus, tasks) = (Bus::connect(&house.db).await.unwrap(), Tasks::new());
    let pepper = house.installation.pepper.clone();
    let other = ApiKeys::load(&house.db, &bus, pepper, &tasks)
        .await
        .unwrap();
    tasks.essential("bus", bus.run(tasks.clone()));
    let named = async |key: &str| {
        other
            .authenticate(key)
            .await
            .unwrap()
            .grants
            .accounts
            .clone()
    };
    assert_eq!(named(&both).await, Some(vec![alice, bob]));

    house.accounts().delete(alice).await.unwrap();
    let deleted = std::time::Instant::now();
    until("the account is gone from the keys", async || {
        named(&both).await == Some(vec![bob]) && named(&one).await == Some(vec![])
    })
    .await;
    let took = deleted.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    let listed = api_key::list(&house.db).await.unwrap();
    let listed = listed.iter().filter_map(|key| key.grants.accounts.as_ref());
    assert!(listed.flatten().all(|account| *account != alice));
    assert_eq!(
        turn(&house, &one, "gpt-5.5").await.status(),
        503,
        "none is not all"
    );
    tasks.stop();
}

#[tokio::test]
async fn the_command_sets_shows_and_changes_grants() {
    let home = Home::new().await;
    home.import("alice").await;
    let create = ["keys", "create", "--name", "ci", "--json"];
    let may = [
        "--account",
        "alice",
        "--model",
        "gpt-5.5",
        "--model",
        "gpt-5.4-mini",
        "--quota",
        "pool",
    ];
    let created: Value =
        serde_json::from_str(&home.ok(&[&create[..], &may].concat()).await).unwrap();
    let alice = home.json(&["accounts", "list"]).await[0]["id"].clone();
    let models = json!(["gpt-5.5", "gpt-5.4-mini"]);
    assert_eq!(
        created["grants"],
        json!({ "accounts": [alice], "models": models, "quota": ["pool"] })
    );
    let table = home.ok(&["keys", "list"]).await;
    let told = "accounts alice; models gpt-5.5, gpt-5.4-mini; quota pool";
    assert!(table.contains(told), "{table}");

    let granted = home
        .json(&["keys", "grant", "ci", "--account", "any", "--quota", "none"])
        .await;
    assert_eq!(granted["grants"], json!({ "models": models, "quota": [] }));
    let said = home
        .ok(&["keys", "grant", "ci", "--model", "any", "--quota", "any"])
        .await;
    assert!(said.contains("everything"), "{said}");

    for wrong in [
        &["keys", "grant", "ci"][..],
        &["keys", "grant", "ci", "--quota", "any", "--quota", "pool"],
        &["keys", "grant", "ci", "--quota", "everything"],
        &["keys", "grant", "ci", "--account", "nobody"],
        &["keys", "grant", "nobody", "--model", "any"],
    ] {
        assert_ne!(home.run(wrong).await.code, Some(0), "{wrong:?}");
    }
    assert_eq!(home.json(&["keys", "list"]).await[0]["grants"], json!({}));
}

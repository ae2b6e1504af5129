//! What is asked of upstream beside turns: usage, plans and models, by one replica at a time, and what follows from the answers.

use std::{process::Stdio, time::Duration};

use drawbridge::{
    ids::AccountId,
    poll::{Polls, Question},
    routing::Strategy,
    secret::KeyRing,
};
use futures_util::future::join_all;
use loadtest::upstream::{Fault, Kind, Stage};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tokio::process::Command;

use crate::support::{
    house::{House, Plan, codex_body, events, text_of},
    store::Store,
    wait::until,
};

const WEEK: u64 = 604_800;
const MONTH: u64 = 2_592_000;

/// A house that asks every second.
async fn curious(plan: Plan) -> House {
    House::planned(Plan {
        settings: |config| config.upstream.usage_poll = Some(Duration::from_secs(1)),
        ..plan
    })
    .await
}

fn window(used: f64, seconds: u64) -> Value {
    json!({ "used_percent": used, "limit_window_seconds": seconds, "reset_after_seconds": 3_600 })
}

fn answer(plan: &str, primary: &Value, secondary: &Value) -> Value {
    json!({ "plan_type": plan, "rate_limit": { "allowed": true, "limit_reached": false,
        "primary_window": primary, "secondary_window": secondary } })
}

impl House {
    /// How asking about an account stands: when it was answered last (if ever), failures, why.
    async fn polled(&self, name: &str, kind: &str) -> (bool, i32, Option<String>) {
        let query = "
            select answered_at is not null, failures, error from account_polls join accounts using (account_id)
            where chatgpt_account_id = $1 and kind = $2";
        let row = self
            .client
            .query_opt(query, &[&format!("acct-{name}"), &kind])
            .await
            .unwrap();
        row.map_or((false, 0, None), |row| (row.get(0), row.get(1), row.get(2)))
    }

    /// One text of an account's row.
    async fn told(&self, name: &str, column: &str) -> String {
        let query = format!("select {column} from accounts where chatgpt_account_id = $1");
        let row = self
            .client
            .query_one(&query, &[&format!("acct-{name}")])
            .await;
        row.unwrap().get(0)
    }

    /// Window lengths and percents of an account's default family.
    async fn windows(&self, name: &str) -> Vec<(i32, f64)> {
        let query = "
            select window_minutes, used_percent from quota_windows join accounts using (account_id)
            where chatgpt_account_id = $1 and family = 'codex' and source <> 'unlisted' order by 1";
        let rows = self
            .client
            .query(query, &[&format!("acct-{name}")])
            .await
            .unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }

    async fn usage(&self) -> Value {
        let response = self.get("/api/codex/usage").send().await.unwrap();
        response.json().await.unwrap()
    }
}

#[tokio::test]
async fn a_poll_404_403_5xx_never_changes_lifecycle_status() {
    let house = curious(Plan {
        accounts: &["alice", "bob", "carol"],
        before: |upstream| {
            for (name, status) in [("alice", 404), ("bob", 403), ("carol", 500)] {
                let refusal = json!({ "detail": "your account has been deactivated" });
                upstream.account(name).answer_usage(status, refusal);
            }
        },
        ..Plan::default()
    })
    .await;
    for (name, error) in [
        ("alice", "http_404"),
        ("bob", "http_403"),
        ("carol", "http_500"),
    ] {
        until("a failure is noted", async || {
            house.polled(name, "usage").await == (false, 1, Some(error.into()))
        })
        .await;
        assert_eq!(house.told(name, "status").await, "active");
        assert_eq!(house.upstream.account(name).usage_reads(), 1);
        let query = "
            select due_at > clock_timestamp() + interval '30 seconds' from account_polls join accounts using (account_id)
            where chatgpt_account_id = $1 and kind = 'usage'";
        let account = format!("acct-{name}");
        let row = house.client.query_one(query, &[&account]).await.unwrap();
        assert!(row.get::<_, bool>(0), "put off");
    }
    let turn = events(house.codex_turn("thread", "turn", "hi").await).await;
    assert_eq!(text_of(&turn), "echo: hi..");
}

#[tokio::test]
async fn a_poll_401_renews_the_token_and_only_a_failed_refresh_changes_lifecycle_status() {
    let house = curious(Plan {
        accounts: &["alice", "bob"],
        before: |upstream| {
            upstream.account("alice").expire();
            upstream.account("bob").revoke();
        },
        ..Plan::default()
    })
    .await;
    until("alice is asked with a new token", async || {
        house.polled("alice", "usage").await.0 && !house.windows("alice").await.is_empty()
    })
    .await;
    assert_eq!(house.upstream.account("alice").exchanges(), 1);
    assert_eq!(house.told("alice", "status").await, "active");
    until("bob's login has ended", async || {
        house.told("bob", "status").await == "reauth_required"
    })
    .await;
    assert_eq!(house.upstream.account("bob").usage_reads(), 0);
}

#[tokio::test]
async fn free_monthly_free_weekly_in_primary_team_5h_and_7d_and_missing_5h_are_told_by_duration() {
    let house = curious(Plan {
        accounts: &["alice", "bob", "carol", "dave"],
        before: |upstream| {
            let none = Value::Null;
            for (name, plan, primary, secondary) in [
                ("alice", "free", window(30.0, MONTH), none.clone()),
                ("bob", "free", window(50.0, WEEK), none.clone()),
                ("carol", "team", window(10.0, 18_000), window(50.0, WEEK)),
                ("dave", "plus", none, window(50.0, WEEK)),
            ] {
                upstream
                    .account(name)
                    .answer_usage(200, answer(plan, &primary, &secondary));
            }
        },
        ..Plan::default()
    })
    .await;
    for (name, windows) in [
        ("alice", vec![(43_200, 30.0)]),
        ("bob", vec![(10_080, 50.0)]),
        ("carol", vec![(300, 10.0), (10_080, 50.0)]),
        ("dave", vec![(10_080, 50.0)]),
    ] {
        until(name, async || house.windows(name).await == windows).await;
    }
    until("clients see them", async || {
        let limit = &house.usage().await["rate_limit"];
        let used = |slot: &str| limit[slot]["used_percent"].as_u64();
        [
            used("primary_window"),
            used("secondary_window"),
            used("monthly_window"),
        ] == [Some(10), Some(50), Some(30)]
    })
    .await;
    // Another name of the same size is believed at once.
    until("carol's plan is known", async || {
        house.told("carol", "plan_type").await == "team"
    })
    .await;
}

#[tokio::test]
async fn a_smaller_plan_is_believed_when_it_is_named_twice() {
    let house = House::start().await;
    let (accounts, id) = (house.accounts(), house.account_id("alice").await);
    let later = async || {
        let moved = "update plan_sightings set seen_at = seen_at - interval '1 minute'";
        house.client.batch_execute(moved).await.unwrap();
    };
    assert!(!accounts.see_plan(id, "free").await.unwrap(), "a stray one");
    assert!(
        !accounts.see_plan(id, "free").await.unwrap(),
        "no time between"
    );
    later().await;
    assert!(!accounts.see_plan(id, "plus").await.unwrap(), "all is well");
    assert!(
        !accounts.see_plan(id, "free").await.unwrap(),
        "from the start"
    );
    later().await;
    assert!(accounts.see_plan(id, "free").await.unwrap());
    assert_eq!(house.told("alice", "plan_type").await, "free");
    assert!(accounts.see_plan(id, "pro").await.unwrap(), "an upgrade");
    assert!(!accounts.see_plan(AccountId::new(), "pro").await.unwrap());
}

#[tokio::test]
async fn further_families_and_credits_are_polled_and_what_is_left_out_is_gone() {
    let spark = json!({ "limit_name": "GPT-5.3-Codex-Spark", "metered_feature": "codex_bengalfox",
        "rate_limit": { "allowed": true, "primary_window": window(70.0, WEEK) } });
    let mut body = answer("plus", &window(10.0, 18_000), &window(20.0, WEEK));
    body["additional_rate_limits"] = json!([spark]);
    body["credits"] = json!({ "has_credits": true, "unlimited": false, "balance": "12.50" });
    let house = curious(Plan::default()).await;
    let alice = house.upstream.account("alice");
    alice.answer_usage(200, body.clone());
    until("the family and the credits are shown", async || {
        let usage = house.usage().await;
        let family = &usage["additional_rate_limits"][0];
        family["metered_feature"] == "codex_bengalfox"
            && family["rate_limit"]["secondary_window"]["used_percent"] == 70
            && usage["credits"]["balance"] == "12.5"
    })
    .await;
    body["additional_rate_limits"] = json!([]);
    body["rate_limit"]["primary_window"] = Value::Null;
    alice.answer_usage(200, body);
    until("they are gone", async || {
        let usage = house.usage().await;
        usage["additional_rate_limits"] == json!([])
            && usage["rate_limit"]["primary_window"].is_null()
            && usage["rate_limit"]["secondary_window"]["used_percent"] == 20
    })
    .await;
}

#[tokio::test]
async fn one_replica_at_a_time_asks_about_an_account() {
    for store in Store::both_ways().await {
        let accounts = "
            insert into accounts (account_id, status) select gen_random_uuid(), 'active' from generate_series(1, 20);
            insert into accounts (account_id, status) values (gen_random_uuid(), 'paused'), (gen_random_uuid(), 'reauth_required')";
        store.client.batch_execute(accounts).await.unwrap();
        let replicas = [(); 3].map(|()| Polls::new(store.another()));
        let day = Duration::from_secs(86_400);
        let ask = async |polls: &Polls| {
            polls.cover(Question::Usage, Duration::ZERO).await.unwrap();
            let mut claimed = Vec::new();
            while let Some(due) = polls.claim(Question::Usage, day).await.unwrap() {
                claimed.push(due.account);
            }
            claimed
        };
        let mut claimed: Vec<AccountId> = join_all(replicas.iter().map(ask)).await.concat();
        // A row that another replica locks is passed over: what was missed is due still.
        claimed.extend(ask(&replicas[0]).await);
        claimed.sort();
        let asked = claimed.len();
        claimed.dedup();
        assert_eq!((asked, claimed.len()), (20, 20), "each once");
        let spread = "delete from account_polls";
        store.client.batch_execute(spread).await.unwrap();
        let hour = Duration::from_secs(3_600);
        replicas[1].cover(Question::Usage, hour).await.unwrap();
        let query = "select count(distinct floor(extract(epoch from due_at - clock_timestamp()) / 180)) from account_polls";
        let row = store.client.query_one(query, &[]).await.unwrap();
        assert!(row.get::<_, i64>(0) >= 15, "spread over the interval");
    }
}

#[tokio::test]
async fn a_catalogue_that_cannot_be_read_keeps_its_last_good_copy_and_its_etag() {
    let house = House::planned(Plan {
        accounts: &["alice", "bob"],
        before: |upstream| {
            upstream.account("alice").list_models(&["gpt-5.5", "own"]);
            upstream.account("bob").list_models(&["gpt-5.5"]);
        },
        ..Plan::default()
    })
    .await;
    let alice = house.account_id("alice").await;
    let listed = async || {
        let answer = house.get("/v1/models").send().await.unwrap();
        let etag = answer.headers()["etag"].clone();
        let models: Value = answer.json().await.unwrap();
        let ids = models["data"].as_array().unwrap().iter();
        let ids: Vec<String> = ids
            .map(|model| model["id"].as_str().unwrap().to_owned())
            .collect();
        (ids, etag)
    };
    until("the union of both", async || {
        let ids = listed().await.0;
        ids.contains(&"own".to_owned()) && house.polled("bob", "models").await.0
    })
    .await;
    let before = listed().await;
    house.upstream.account("alice").list_models(&[]);
    let due = "update account_polls set due_at = clock_timestamp() where kind = 'models'";
    house.client.batch_execute(due).await.unwrap();
    until("it fails", async || {
        house.polled("alice", "models").await.2 == Some("http_500".into())
    })
    .await;
    assert_eq!(listed().await, before);
    house.accounts().pause(alice).await.unwrap();
    until("what nobody in service lists is gone", async || {
        listed().await.0 == ["gpt-5.5"]
    })
    .await;
}

#[tokio::test]
async fn an_alias_is_listed_and_asks_upstream_for_its_model() {
    let house = House::planned(Plan {
        settings: |config| {
            let aliases = [("fast", "gpt-5.4-mini"), ("none", "gpt-nowhere")];
            config.model_aliases = aliases
                .map(|(alias, model)| (alias.to_owned(), model.to_owned()))
                .into();
        },
        ..Plan::default()
    })
    .await;
    until("the alias is listed", async || {
        let answer = house.get("/v1/models").send().await.unwrap();
        let models = answer.text().await.unwrap();
        models.contains(r#""fast""#) && !models.contains("none")
    })
    .await;
    let mut body = codex_body("hi");
    body["model"] = "fast".into();
    let answer = house.post("/backend-api/codex/responses").json(&body);
    let answer = answer.send().await.unwrap();
    assert!(
        !answer.headers().contains_key("openai-model"),
        "another name than the one asked for would read as a warning"
    );
    assert_eq!(text_of(&events(answer).await), "echo: hi..");
    assert_eq!(house.upstream.attempts()[0].model, "gpt-5.4-mini");
    assert_eq!(house.turns().await[0]["model"], "gpt-5.4-mini");
}

#[tokio::test]
async fn a_turn_waits_for_a_place_at_an_account_that_is_full() {
    let house = House::planned(Plan {
        settings: |config| {
            config.routing.strategy = Strategy::RoundRobin;
            config.routing.turns_per_account = Some(1);
        },
        ..Plan::default()
    })
    .await;
    let held = Fault::once(Kind::Silence(Stage::AfterCreated)).for_turn("turn-1");
    house.upstream.fault(held);
    let turn = async |n: u32| {
        let (thread, turn) = (format!("thread-{n}"), format!("turn-{n}"));
        text_of(&events(house.codex_turn(&thread, &turn, "hi").await).await)
    };
    let second = async {
        house
            .upstream
            .wait("the first turn", |state| state.silent == 1)
            .await;
        let second = async {
            house.get("/v1/models").send().await.unwrap();
            assert_eq!(house.upstream.attempts().len(), 1);
            house.upstream.release();
        };
        tokio::join!(turn(2), second).0
    };
    let (first, second) = tokio::join!(turn(1), second);
    assert_eq!([first, second], ["echo: hi..", "echo: hi.."]);
    let attempts = house.upstream.attempts();
    let order: Vec<_> = attempts
        .iter()
        .map(|attempt| attempt.client_turn_id.as_deref())
        .collect();
    assert_eq!(order, [Some("turn-1"), Some("turn-2")]);
    assert_eq!(house.explanation("turn-2").await["strategy"], "round-robin");
}

#[tokio::test]
async fn the_quota_command_shows_each_value_with_its_source_and_age() {
    let store = Store::direct().await;
    let rows = "
        insert into accounts (account_id, label, plan_type) values ('019a0000-0000-7000-8000-000000000001', 'work', 'plus');
        insert into account_credentials (account_id, access_sealed, refresh_sealed) select account_id, '', '' from accounts;
        insert into quota_windows select account_id, 'codex', 300, 40, clock_timestamp() + interval '1 hour', clock_timestamp() - interval '10 minutes', 'header'
            from accounts;
        insert into quota_blocks select account_id, 'codex_bengalfox', clock_timestamp() - interval '5 minutes', clock_timestamp() + interval '1 hour',
            'usage_limit_reached' from accounts";
    store.client.batch_execute(rows).await.unwrap();
    let key = KeyRing::generate("k1");
    let run = async |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_drawbridge"))
            .arg("quota")
            .args(arguments)
            .env_clear()
            .env("DRAWBRIDGE_DATABASE_URL", store.url())
            .env("DRAWBRIDGE_MASTER_KEYS", key.expose_secret())
            .stderr(Stdio::inherit())
            .output()
            .await
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let text = run(&["work"]).await;
    for shown in [
        "work, plan plus, active",
        "5 hours     40.0 % used",
        "(header, 10 min ago)",
        "GPT-5.3-Codex-Spark: rate_limited",
        "usage_limit_reached, until",
        "(error, 5 min ago)",
    ] {
        assert!(text.contains(shown), "{shown}: {text}");
    }
    let json: Value = serde_json::from_str(&run(&["--json"]).await).unwrap();
    assert_eq!(
        json[0]["families"]["codex"]["windows"][0]["source"],
        "header"
    );
    assert_eq!(json[0]["families"]["codex"]["status"], "active");
}

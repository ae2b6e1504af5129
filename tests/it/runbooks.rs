//! The runbooks say what is so: each is followed by a test, on replicas as an operator runs them, while the incident happens to them.

mod account_login;
mod lease_recovery;
mod master_key_rotation;
mod pool_exhausted;
mod postgres;
mod redis_loss;
mod rollout;
mod slow_replica;

use std::{collections::BTreeSet, fs, path::Path};

use reqwest::Response;
use serde_json::{Value, json};

use crate::{
    architecture,
    support::{
        cluster::{Answer, Cluster, Plan, script},
        exposition::Page,
        house::House,
        runbook::{Runbook, pages},
        wait::until,
    },
};

/// Every page.
pub(crate) const NAMES: [&str; 8] = [
    "account-login",
    "lease-recovery",
    "master-key-rotation",
    "pool-exhausted",
    "postgres",
    "redis-loss",
    "rollout",
    "slow-replica",
];

/// At a quarter of the service's times, so that a busy machine is not taken for a dead one; with `DRAWBRIDGE_TEST_FULL` at the whole, as
/// one wants what is printed where the pages are written.
fn plan() -> Plan {
    Plan {
        settings: match std::env::var_os("DRAWBRIDGE_TEST_FULL") {
            Some(_) => &[("DRAWBRIDGE_TEST_TIME_SCALE", "1")],
            None => &[("DRAWBRIDGE_TEST_TIME_SCALE", "0.25")],
        },
        ..Plan::default()
    }
}

/// A page, to be followed where a replica runs.
fn open(name: &str, cluster: &Cluster, number: usize) -> Runbook {
    let mut book = Runbook::open(name, &cluster.command(number, &[]));
    book.set("URL", format!("http://{}", cluster.balancer.address));
    book.set("KEY", &cluster.key);
    book.set("DATABASE_URL", cluster.url());
    stand(&mut book, cluster, number);
    book
}

/// From now on it is followed where this replica runs.
fn stand(book: &mut Runbook, cluster: &Cluster, number: usize) {
    book.at(&cluster.command(number, &[]));
    book.set("ADMIN", &cluster.service(number).admin);
}

/// A turn of a conversation, asked for at a replica as Codex does.
async fn ask(cluster: &Cluster, number: usize, conversation: &str, turn: &str) -> Response {
    let metadata = json!({ "turn_id": turn, "session_id": conversation, "request_kind": "turn" });
    let request = cluster
        .post_at(number, "/v1/responses")
        .header("session-id", conversation)
        .header("x-codex-turn-metadata", metadata.to_string());
    request.json(&script(turn, true)).send().await.unwrap()
}

/// A turn of a script, which brings nothing but what it says now and the response before.
async fn go_on(cluster: &Cluster, number: usize, previous: Option<&str>) -> Answer {
    let mut body = script("and then", false);
    body["previous_response_id"] = previous.into();
    let request = cluster
        .post_at(number, "/v1/responses")
        .header("session-id", "script")
        .json(&body);
    Answer::of(request.send().await.unwrap()).await
}

/// What the ledger calls the newest turn that the client calls so, as soon as it has it; `null`: that it gives no name.
async fn turn_id(cluster: &Cluster, name: impl Into<Value>) -> String {
    let (name, mut id) = (name.into(), None);
    until("the turn is in the ledger", async || {
        let turns = cluster.turns().await;
        let turn = turns.iter().rfind(|turn| turn["client_turn_id"] == name);
        id = turn.and_then(|turn| turn["turn_id"].as_str().map(str::to_owned));
        id.is_some()
    })
    .await;
    id.unwrap()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn page(name: &str) -> String {
    read(pages().join(name).with_extension("md"))
}

/// What stands between single backticks, outside of blocks.
fn quoted(text: &str) -> BTreeSet<&str> {
    let prose = text.split("```").step_by(2);
    prose
        .flat_map(|prose| prose.split('`').skip(1).step_by(2))
        .collect()
}

/// Every source of the program in one text, each line break and what surrounds it one space.
fn sources() -> String {
    let migrations = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations"));
    let migrations = migrations
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap());
    let sources = architecture::sources().into_iter().map(|(_, text)| text);
    let text: String = sources.chain(migrations).collect();
    text.replace("\\\n", " ")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn every_runbook_has_its_four_parts_and_is_in_the_list() {
    let list = read(pages().join("README.md"));
    for name in NAMES {
        let page = page(name);
        let parts: Vec<_> = page
            .lines()
            .filter_map(|line| line.strip_prefix("## "))
            .collect();
        assert_eq!(
            parts,
            ["Symptoms", "Diagnosis", "Action", "Afterwards"],
            "{name}"
        );
        assert!(page.contains("\nLog: `"), "{name} says nothing of the log");
        assert!(
            list.contains(&format!("({name}.md)")),
            "README.md lacks {name}"
        );
    }
    let found = fs::read_dir(pages()).unwrap();
    assert_eq!(
        found.count(),
        NAMES.len() + 1,
        "a page that no test follows"
    );
    assert!(read("README.md").contains("(deploy/runbooks/"));
}

#[test]
fn alerts_and_runbooks_name_each_other() {
    let rules = read("deploy/prometheus/rules.yaml");
    for alert in rules.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap();
        let (_, runbook) = alert.split_once("runbook: ").unwrap();
        let runbook = runbook.lines().next().unwrap();
        assert!(
            quoted(&page(runbook)).contains(name),
            "{runbook} does not know {name}"
        );
    }
    for name in NAMES {
        for alert in quoted(&page(name))
            .into_iter()
            .filter(|word| word.starts_with("Drawbridge"))
        {
            assert!(
                rules.contains(&format!("alert: {alert}\n")),
                "{name}: {alert}"
            );
        }
    }
}

#[tokio::test]
async fn what_runbooks_quote_exists() {
    let house = House::start().await;
    let exported = Page::of(&house.http, &house.server.admin_address.to_string())
        .await
        .names();
    let sources = sources();
    for name in NAMES.into_iter().chain(["README"]) {
        let page = page(name);
        for line in page.lines().filter(|line| line.contains("Log: ")) {
            for phrase in quoted(line.split_once("Log: ").unwrap().1) {
                assert!(sources.contains(phrase), "{name}: nobody logs `{phrase}`");
            }
        }
        // Metrics are exported; codes, settings and columns stand in the code.
        let word = |text: &&str| {
            text.contains('_')
                && text
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        };
        for word in quoted(&page).into_iter().filter(word) {
            if word.starts_with("drawbridge_") || word.starts_with("process_") {
                assert!(
                    exported.contains(word) || exported.contains(&format!("{word}_count")),
                    "{name}: no metric {word}"
                );
            } else {
                let setting = word.strip_prefix("DRAWBRIDGE_").unwrap_or(word);
                assert!(
                    sources.contains(setting),
                    "{name}: nothing is called {word}"
                );
            }
        }
    }
    assert!(house.stop().await);
}

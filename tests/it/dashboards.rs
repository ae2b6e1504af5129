//! Dashboards and alerts ask for what is there: every metric and label is one that the program exports, every expression parses, every
//! alert fires in a test and names a page that helps.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
    process::Command,
};

use serde_json::Value;

use crate::{
    architecture,
    runbooks::NAMES,
    support::{
        exposition::Page,
        house::{House, events},
    },
};

/// Labels that the scrape puts on everything, and that of histograms.
const SCRAPED: [&str; 4] = ["namespace", "job", "instance", "le"];

#[tokio::test]
async fn every_metric_that_is_asked_for_is_exported_with_its_labels() {
    let house = House::start().await;
    events(house.codex_turn("thread", "turn", "hi").await).await;
    let page = Page::of(&house.http, &house.server.admin_address.to_string()).await;
    let exported = page.names();
    let rules = read("deploy/prometheus/rules.yaml");
    let mut asked: Vec<(String, String)> = Vec::new();
    for text in [&rules, &read("deploy/prometheus/rules.test.yaml")] {
        asked.extend(
            text.lines()
                .map(|line| ("rules".to_owned(), line.to_owned())),
        );
    }
    asked.extend(panels().into_iter().map(|panel| (panel.place, panel.expr)));
    let mut found = 0;
    for (place, text) in &asked {
        for (name, labels) in selectors(text) {
            if name.contains(':') {
                assert!(
                    rules.contains(&format!("record: {name}\n")),
                    "{place}: {name}"
                );
                continue;
            }
            found += 1;
            assert!(exported.contains(&name), "{place}: {name} is not exported");
            let known = labels_of(&page, &name);
            for label in labels {
                let there = SCRAPED.contains(&label.as_str()) || known.contains(&label);
                assert!(there || known.is_empty(), "{place}: {name} has no {label}");
            }
        }
    }
    assert!(found > 100, "{found}: the expressions were not understood");

    // And what the program counts anywhere is in the table, so that it is described and there from the start.
    for (path, text) in architecture::sources() {
        for (at, _) in text.match_indices("\"drawbridge_") {
            let name = text[at + 1..].split('"').next().unwrap();
            let metric = |c: char| c.is_ascii_lowercase() || c == '_';
            if name.chars().all(metric) {
                assert!(page.0.contains_key(name), "{}: {name}", path.display());
            }
        }
    }
    assert!(house.stop().await);
}

#[test]
fn every_alert_fires_in_a_test_and_names_a_runbook() {
    let rules = read("deploy/prometheus/rules.yaml");
    let tests = read("deploy/prometheus/rules.test.yaml");
    let fired: BTreeSet<&str> = tests
        .split("alertname: ")
        .skip(1)
        .filter(|test| test.contains("exp_alerts:\n          - exp_labels: "))
        .map(|test| test.lines().next().unwrap())
        .collect();
    let (mut quiet, mut alerts) = (0, 0);
    for alert in rules.split("- alert: ").skip(1) {
        let name = alert.lines().next().unwrap();
        alerts += 1;
        assert!(fired.contains(name), "{name} fires in no test");
        quiet += usize::from(tests.contains(&format!("alertname: {name}, exp_alerts: [] }}")));
        let field = |field: &str| {
            let mut lines = alert.lines().map(str::trim);
            let found = lines.find_map(|line| line.strip_prefix(&format!("{field}: ")));
            found
                .unwrap_or_else(|| panic!("{name} has no {field}"))
                .to_owned()
        };
        assert!(NAMES.contains(&field("runbook").as_str()), "{name}");
        assert!(
            ["critical", "warning"].contains(&field("severity").as_str()),
            "{name}"
        );
        assert!(
            field("summary").len() > 10 && field("description").len() > 20,
            "{name}"
        );
    }
    assert!(alerts > 20);
    assert_eq!(quiet, alerts, "an alert is not looked at while all is well");
}

#[test]
fn dashboards_are_whole_and_their_expressions_parse() {
    let mut uids = BTreeSet::new();
    for (name, dashboard) in dashboards() {
        let uid = dashboard["uid"].as_str().unwrap();
        assert!(uids.insert(uid.to_owned()), "{name}: {uid} is there twice");
        let variables = dashboard["templating"]["list"].as_array().unwrap();
        let variables: Vec<_> = variables
            .iter()
            .filter_map(|variable| variable["name"].as_str())
            .collect();
        assert_eq!(
            variables,
            ["datasource", "namespace", "job", "instance"],
            "{name}"
        );
        let mut ids = BTreeSet::new();
        for panel in dashboard["panels"].as_array().unwrap() {
            assert!(ids.insert(panel["id"].as_u64().unwrap()), "{name}: {panel}");
            let targets = panel["targets"].as_array();
            assert!(
                panel["type"] == "row" || targets.is_some_and(|targets| !targets.is_empty()),
                "{name}: {panel}"
            );
            for target in targets.into_iter().flatten() {
                assert_eq!(
                    target["datasource"]["uid"], "${datasource}",
                    "{name}: {panel}"
                );
            }
        }
    }
    assert_eq!(uids.len(), 3);

    let mut rules = String::from("groups:\n  - name: panels\n    rules:\n");
    for (number, panel) in panels().iter().enumerate() {
        let expr = panel.expr.replace("$__rate_interval", "5m");
        write!(
            rules,
            "      - record: panel:{number}\n        expr: {}\n",
            Value::from(expr)
        )
        .unwrap();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(&file, rules).unwrap();
    let said = Command::new("promtool")
        .args(["check", "rules"])
        .arg(file.path())
        .output();
    let said = said.expect("promtool: scripts/install-tools promtool");
    let text = String::from_utf8_lossy(&said.stderr);
    assert!(said.status.success(), "{text}");
}

/// An expression, and where it stands.
struct Panel {
    place: String,
    expr: String,
}

fn dashboards() -> BTreeMap<String, Value> {
    let files = fs::read_dir(root().join("deploy/grafana")).unwrap();
    let paths = files.map(|file| file.unwrap().path());
    paths
        .filter(|path| path.is_file())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (
                name,
                serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap(),
            )
        })
        .collect()
}

fn panels() -> Vec<Panel> {
    let mut panels = Vec::new();
    for (name, dashboard) in dashboards() {
        for variable in dashboard["templating"]["list"].as_array().unwrap() {
            if let Some(query) = variable["definition"].as_str() {
                let (series, _) = query["label_values(".len()..].rsplit_once(',').unwrap();
                panels.push(Panel {
                    place: format!("{name}: {}", variable["name"]),
                    expr: series.to_owned(),
                });
            }
        }
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let expr = target["expr"].as_str().unwrap().to_owned();
                panels.push(Panel {
                    place: format!("{name}: {}", panel["title"]),
                    expr,
                });
            }
        }
    }
    panels
}

/// The metrics of an expression, each with the labels that it is asked to have in its own selector.
fn selectors(expr: &str) -> Vec<(String, Vec<String>)> {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut found = Vec::new();
    let mut rest = expr;
    while let Some(at) = rest.find(|c: char| c.is_ascii_alphabetic()) {
        let end = rest[at..]
            .find(|c| !part(c))
            .map_or(rest.len(), |length| at + length);
        let word = &rest[at..end];
        rest = &rest[end..];
        let ours = ["drawbridge_", "drawbridge:", "process_"]
            .iter()
            .any(|prefix| word.starts_with(prefix));
        if !ours {
            continue;
        }
        let inner = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
        let labels = inner.map_or("", |(inner, _)| inner).split("\",");
        let labels = labels.filter_map(|label| label.split(['=', '!']).next());
        let labels = labels.map(|label| label.trim().to_owned());
        found.push((
            word.to_owned(),
            labels.filter(|label| !label.is_empty()).collect(),
        ));
    }
    found
}

/// The labels of a family's samples; none if it has none yet.
fn labels_of(page: &Page, name: &str) -> BTreeSet<String> {
    let family = ["_bucket", "_sum", "_count"]
        .iter()
        .find_map(|suffix| page.0.get(name.strip_suffix(suffix)?));
    let family = page.0.get(name).or(family).unwrap();
    let samples = family.samples.iter();
    samples
        .flat_map(|(_, labels, _)| labels.keys().cloned())
        .collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap()
}

//! The metrics: whole, named as Prometheus wants, bounded whatever clients send, and in agreement with the ledger. Traces beside them.

use std::collections::{BTreeMap, BTreeSet};

use loadtest::upstream::{Fault, Kind, Stage};
use serde_json::Value;

use crate::support::{
    cluster::{Answer, Cluster, Plan, script},
    codex_socket::create,
    exposition::{Labels, Page},
    house::{House, Plan as HousePlan, codex_body, events},
    wait::until,
};

const CANARY: &str = "xyzzy-of-a-client";
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

#[tokio::test]
async fn the_numbers_are_those_of_the_ledger_and_no_label_is_a_clients_invention() {
    let cluster = Cluster::start(Plan {
        accounts: &["alice", "bob"],
        redis: true,
        settings: &[("DRAWBRIDGE_METRICS_ACCOUNTS", "true")],
        ..Plan::default()
    })
    .await;
    let upstream = &cluster.home.upstream;
    let r0 = cluster.service(0);

    // Successes: a stream, a socket, a conversation that goes on at its owner by way of the other replica.
    events(r0.turn(&cluster.key, "turn-1", "hi").await).await;
    let mut socket = r0.socket(&cluster.key).await;
    socket.turn(create("turn-2", "hi", None)).await;
    let first = ask(&cluster, 0, &script("one", false)).await;
    let mut body = script("two", false);
    body["previous_response_id"] = first.id().into();
    assert_eq!(ask(&cluster, 1, &body).await.status, 200);
    // A failover, a refusal of upstream's, a stream that breaks.
    upstream.fault(Fault::once(Kind::RateLimit { resets_in: 3600 }));
    events(r0.turn(&cluster.key, "turn-3", "hi").await).await;
    upstream.fault(Fault::once(Kind::Status(400, CANARY.into())));
    events(r0.turn(&cluster.key, "turn-4", "hi").await).await;
    upstream.fault(Fault::once(Kind::Cut(Stage::Visible)));
    drop(r0.turn(&cluster.key, "turn-5", "hi").await.bytes().await);
    // What clients invent: a model, a path, a method, a key, ids.
    let mut body = codex_body("hi");
    body["model"] = CANARY.into();
    let turn = |key: &str| cluster.post_at_as(0, "/backend-api/codex/responses", key);
    drop(
        turn(&cluster.key)
            .header("x-request-id", CANARY)
            .json(&body)
            .send()
            .await,
    );
    assert_eq!(
        turn("dbk_canary")
            .json(&body)
            .send()
            .await
            .unwrap()
            .status(),
        401
    );
    for path in [format!("/{CANARY}"), format!("/v1/{CANARY}?{CANARY}=1")] {
        assert_eq!(r0.get(&path).await.status(), 404);
    }
    let method = reqwest::Method::from_bytes(b"XYZZY").unwrap();
    let odd = r0
        .http
        .request(method, format!("http://{}/v1/responses", r0.address));
    assert_eq!(odd.send().await.unwrap().status(), 405);

    let mut log = Vec::new();
    until("every request is logged", async || {
        log = rows(&cluster, "request_log").await;
        log.len() >= 8
    })
    .await;
    let turns = rows(&cluster, "turns").await;
    let pages = [page(&cluster, 0).await, page(&cluster, 1).await];
    let sum = |name: &str, labels: &[(&str, &str)]| -> f64 {
        pages.iter().map(|page| page.sum(name, labels)).sum()
    };

    // Tokens, dollars and outcomes, one by one.
    for (column, kind) in [
        ("input_tokens", "input"),
        ("cached_input_tokens", "cached"),
        ("output_tokens", "output"),
        ("reasoning_tokens", "reasoning"),
    ] {
        let booked: f64 = turns.iter().filter_map(|turn| turn[column].as_f64()).sum();
        assert_eq!(
            sum("drawbridge_tokens_total", &[("type", kind)]),
            booked,
            "{kind}"
        );
        assert!(booked > 0.0 || kind == "reasoning", "{kind}");
    }
    let nano = turns
        .iter()
        .filter_map(|turn| turn["cost_nanodollars"].as_f64());
    let dollars = sum("drawbridge_cost_usd_total", &[("model", "gpt-5.5")]);
    assert!(
        (dollars - nano.sum::<f64>() / 1e9).abs() < 1e-9,
        "{dollars}"
    );
    let mut by_outcome: BTreeMap<(&str, &str), f64> = BTreeMap::new();
    for request in &log {
        let word = |field: &str| request[field].as_str().unwrap_or_default();
        *by_outcome
            .entry((word("outcome"), word("reason")))
            .or_default() += 1.0;
    }
    for ((outcome, reason), count) in &by_outcome {
        let labels = [("outcome", *outcome), ("reason", *reason)];
        assert_eq!(sum("drawbridge_turns_total", &labels), *count, "{labels:?}");
    }
    assert_eq!(sum("drawbridge_turns_total", &[]), log.len() as f64);
    assert!(
        by_outcome.contains_key(&("failed", "request")),
        "{by_outcome:?}"
    );

    // What else has happened, each where it happened.
    for (name, labels, expected) in [
        (
            "drawbridge_attempt_failures_total",
            &[("class", "rate_limit"), ("next", "next_account")][..],
            1.0,
        ),
        (
            "drawbridge_key_rejections_total",
            &[("reason", "malformed")],
            1.0,
        ),
        (
            "drawbridge_http_requests_total",
            &[("route", "unmatched"), ("status", "4xx")],
            2.0,
        ),
        (
            "drawbridge_http_requests_total",
            &[("method", "other"), ("route", "/v1/responses")],
            1.0,
        ),
        ("drawbridge_in_flight", &[("kind", "ws")], 1.0),
        ("drawbridge_in_flight", &[("kind", "sse")], 0.0),
        ("drawbridge_in_flight", &[("kind", "http")], 0.0),
        ("drawbridge_accounts", &[("status", "active")], 1.0),
        ("drawbridge_accounts", &[("status", "rate_limited")], 1.0),
        ("drawbridge_redis_connected", &[], 1.0),
        ("drawbridge_bus_source", &[("source", "listen")], 1.0),
        ("drawbridge_bus_source", &[("source", "poll")], 0.0),
        ("drawbridge_database_up", &[], 1.0),
        ("drawbridge_ready", &[], 1.0),
        ("drawbridge_draining", &[], 0.0),
        ("drawbridge_admits_turns", &[], 1.0),
        ("drawbridge_peers_alive", &[], 1.0),
        ("drawbridge_turns_running", &[], 0.0),
        ("drawbridge_body_bytes", &[], 0.0),
        ("drawbridge_db_pool_limit", &[("pool", "main")], 16.0),
        (
            "drawbridge_build_info",
            &[("version", env!("CARGO_PKG_VERSION"))],
            1.0,
        ),
    ] {
        assert_eq!(pages[0].sum(name, labels), expected, "{name} {labels:?}");
    }
    let leases = cluster.leases().await;
    let owned = leases.iter().filter(|lease| !lease["owner_boot"].is_null());
    assert_eq!(
        sum("drawbridge_sessions", &[]),
        owned.count() as f64,
        "{leases:#?}"
    );
    for name in [
        "drawbridge_turn_first_event_seconds",
        "drawbridge_turn_event_gap_seconds",
        "drawbridge_bus_lag_seconds",
        "drawbridge_db_pool_wait_seconds",
        "drawbridge_heartbeat_lag_seconds",
    ] {
        assert!(pages[0].observed(name) > 0.0, "{name}");
    }
    assert_eq!(pages[1].observed("drawbridge_forward_seconds"), 1.0);
    let shown = &pages[0].0["drawbridge_account_quota_used_ratio"].samples;
    assert!(!shown.is_empty());
    assert!(
        shown
            .iter()
            .all(|(_, labels, used)| labels["account"].len() == 12 && *used <= 1.0)
    );
    assert!(pages[0].sum("process_resident_memory_bytes", &[]) > 1e6);
    assert!(pages[0].sum("process_open_fds", &[]) > 5.0);
    let started = pages[0].sum("process_start_time_seconds", &[]);
    let swept = pages[0].sum(
        "drawbridge_job_last_success_timestamp_seconds",
        &[("name", "sweep")],
    );
    assert!(
        swept - started < 3600.0 && started > 1.7e9,
        "{started} {swept}"
    );

    for page in &pages {
        conventional(page);
    }
}

/// Names, types, units and labels are as Prometheus has them, and no label is what somebody made up.
fn conventional(page: &Page) {
    assert!(page.0.len() > 60);
    for (name, family) in &page.0 {
        let word = |text: &str| {
            let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
            text.chars().all(fine) && !text.contains("__")
        };
        assert!(
            word(name) && (name.starts_with("drawbridge_") || name.starts_with("process_")),
            "{name}"
        );
        assert!(family.help.ends_with('.'), "{name}: {}", family.help);
        assert_eq!(family.kind == "counter", name.ends_with("_total"), "{name}");
        assert_eq!(
            family.kind == "histogram",
            name.ends_with("_seconds")
                && !name.contains("_age_")
                && !name.contains("timestamp")
                && !name.contains("start_time"),
            "{name}"
        );
        for unit in ["_ms", "_millis", "_percent", "_minutes", "_kb", "_mb"] {
            assert!(!name.contains(unit), "{name} is not in base units");
        }
        let mut labels: BTreeSet<Vec<&String>> = BTreeSet::new();
        for (_, given, value) in &family.samples {
            assert!(value.is_finite() || name == "process_max_fds", "{name}");
            labels.insert(given.keys().filter(|label| *label != "le").collect());
            for (label, value) in given {
                assert!(word(label), "{name} {label}");
                assert!(
                    value.len() <= 64 && !value.contains(CANARY),
                    "{name} {label}={value}"
                );
            }
        }
        assert!(
            labels.len() <= 1,
            "{name} has series with other labels: {labels:?}"
        );
        assert!(
            family.samples.len() < 500,
            "{name} has {} series",
            family.samples.len()
        );
        if family.kind == "histogram" {
            cumulative(name, &family.samples);
        }
    }
}

/// The buckets of each series of a histogram grow to its count.
fn cumulative(name: &str, samples: &[(String, Labels, f64)]) {
    let mut series: BTreeMap<Labels, (f64, f64)> = BTreeMap::new();
    for (sample, labels, value) in samples {
        let mut labels = labels.clone();
        let bound = labels.remove("le");
        let (last, most) = series.entry(labels).or_insert((f64::NEG_INFINITY, 0.0));
        if let Some(bound) = bound {
            let bound: f64 = bound.replace("+Inf", "inf").parse().unwrap();
            assert!(
                bound > *last && *value >= *most,
                "{name}: buckets out of order"
            );
            (*last, *most) = (bound, *value);
        } else if sample.ends_with("_count") {
            assert_eq!(
                (*last, *most),
                (f64::INFINITY, *value),
                "{name}: the last bucket is not all"
            );
        }
    }
}

#[tokio::test]
async fn a_trace_goes_with_its_turn_to_the_log_to_the_owner_and_upstream() {
    let cluster = Cluster::start(Plan::default()).await;
    let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let first = ask(&cluster, 0, &script("one", false)).await;
    let mut body = script("two", false);
    body["previous_response_id"] = first.id().into();
    let forwarded = cluster
        .post_at(1, "/v1/responses")
        .header("session-id", "conversation")
        .header("traceparent", &parent)
        .header("tracestate", "vendor=1")
        .header("baggage", "user=alice")
        .json(&body);
    assert_eq!(
        Answer::of(forwarded.send().await.unwrap()).await.status,
        200
    );
    // A conversation has one socket to upstream, whose headers are those of its first turn; this one has none yet.
    let direct = cluster
        .post_at(0, "/backend-api/codex/responses")
        .header("traceparent", &parent)
        .header("tracestate", "vendor=1")
        .header("baggage", "user=alice");
    events(direct.json(&codex_body("hi")).send().await.unwrap()).await;
    // A message of a socket says itself which trace it is part of.
    let mut socket = cluster.service(0).socket(&cluster.key).await;
    let mut frame = create("turn", "hi", None);
    frame["client_metadata"]["ws_request_header_traceparent"] = parent.clone().into();
    socket.turn(frame).await;
    let broken = cluster
        .post_at(0, "/backend-api/codex/responses")
        .header("traceparent", "00-xyzzy")
        .header("tracestate", "vendor=1");
    events(broken.json(&codex_body("hi")).send().await.unwrap()).await;

    let attempts = cluster.home.upstream.attempts();
    let [.., direct, _, broken] = &attempts[..] else {
        panic!("{} attempts", attempts.len())
    };
    assert_eq!(direct.headers["traceparent"], parent);
    assert_eq!(direct.headers["tracestate"], "vendor=1");
    for name in ["traceparent", "tracestate"] {
        assert!(!broken.headers.contains_key(name), "{name} is made up");
    }
    assert!(
        attempts
            .iter()
            .all(|attempt| !attempt.headers.contains_key("baggage"))
    );

    // The owner says whose trace it was, and that a peer sent it.
    let log = cluster.service(0).log();
    let of_trace: Vec<&str> = log.lines().filter(|line| line.contains(TRACE)).collect();
    assert_eq!(of_trace.len(), 3, "{log}");
    assert!(of_trace[0].contains("forwarded=true"), "{}", of_trace[0]);
    assert!(of_trace[1].contains("forwarded=false"), "{}", of_trace[1]);
    assert!(
        of_trace[2].contains("transport=\"websocket\""),
        "{}",
        of_trace[2]
    );
    let traced = log.lines().filter(|line| line.contains("trace_id="));
    assert_eq!(traced.count(), 3, "{log}");
}

#[tokio::test]
async fn each_turn_leaves_one_line_with_what_is_documented_and_nothing_else() {
    let home = crate::support::process::Home::new().await;
    home.import("alice").await;
    let key = home.key("laptop").await;
    let service = home.serve().await;
    events(service.turn(&key, "turn-1", "hi").await).await;
    home.upstream
        .fault(Fault::once(Kind::Status(400, "invalid_prompt".into())));
    events(service.turn(&key, "turn-2", "hi").await).await;
    let turns = home.turns().await;
    let (_, log) = service.stop().await;
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| line.contains(" turn_id="))
        .collect();
    assert_eq!(lines.len(), 2, "{log}");
    let documented = include_str!("../../deploy/logs.md");
    for (line, turn) in lines.iter().zip(&turns) {
        let (_, fields) = line
            .split_once(" INFO turn ")
            .unwrap_or_else(|| panic!("{line}"));
        let fields: BTreeMap<&str, &str> = fields
            .split_whitespace()
            .filter_map(|field| field.split_once('='))
            .collect();
        for name in fields.keys() {
            assert!(
                documented.contains(&format!("| `{name}` |")),
                "{name} is not documented"
            );
        }
        let text = |name: &str| fields[name].trim_matches('"').to_owned();
        assert_eq!(text("turn_id"), turn["turn_id"].as_str().unwrap());
        assert_eq!(text("outcome"), turn["outcome"].as_str().unwrap());
        for name in [
            "input_tokens",
            "output_tokens",
            "cost_nanodollars",
            "estimated",
        ] {
            assert_eq!(text(name), turn[name].to_string(), "{name}");
        }
    }
    assert!(lines[1].contains("code=\"invalid_prompt\""), "{}", lines[1]);
}

#[tokio::test]
async fn accounts_are_shown_only_where_that_is_wanted() {
    let house = House::planned(HousePlan::default()).await;
    house.learn_limits().await;
    let admin = house.server.admin_address.to_string();
    let page = Page::of(&house.http, &admin).await;
    for name in [
        "drawbridge_account_quota_used_ratio",
        "drawbridge_account_quota_reset_timestamp_seconds",
    ] {
        assert!(page.0[name].samples.is_empty(), "{name}");
    }
    assert!(house.stop().await);
}

async fn page(cluster: &Cluster, number: usize) -> Page {
    let service = cluster.service(number);
    Page::of(&service.http, &service.admin).await
}

async fn ask(cluster: &Cluster, number: usize, body: &Value) -> Answer {
    let request = cluster.post_at(number, "/v1/responses").json(body);
    let request = request.header("session-id", "conversation");
    Answer::of(request.send().await.unwrap()).await
}

async fn rows(cluster: &Cluster, table: &str) -> Vec<Value> {
    let query = format!("select to_jsonb(t) from {table} t");
    let rows = cluster.client.query(&query, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

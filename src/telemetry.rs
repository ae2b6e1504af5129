//! What is told to operators: metrics and the set-up of logs. One function per fact; [`families`] is the table of what there is.
//!
//! What happens is counted here as it happens. What is so at the moment is asked when somebody scrapes, and written with a [`Scrape`].
//! Labels are bounded: no ids, no models but those that upstream lists, no text of clients. Logs never carry bodies, tokens, e-mails or
//! raw affinity keys; call sites log ids and codes.

mod families;
mod gaps;
mod process;
mod scrape;

use std::{
    collections::{BTreeMap, BTreeSet},
    io::IsTerminal as _,
    sync::{Mutex, OnceLock, PoisonError},
    time::Duration,
};

use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde::Serialize;
use tracing_subscriber::{EnvFilter, prelude::*};

use self::families::{FAMILIES, Kind};
pub use self::{gaps::event_gap, scrape::Scrape};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging to standard error. `filter` is a tracing filter such as `info,drawbridge=debug`.
///
/// # Errors
/// If the filter cannot be parsed.
pub fn start_logs(
    filter: &str,
    format: LogFormat,
) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::try_new(filter)?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer()
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    // A second call (tests start several servers in one process) keeps the first subscriber.
    drop(match format {
        LogFormat::Text => registry.with(layer.with_target(false)).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true)).try_init(),
    });
    Ok(())
}

/// What was counted so far, in the Prometheus text format; what is so now is added by the caller. The first call installs the recorder.
#[must_use]
pub fn scrape() -> Scrape {
    let counted = recorder().map(PrometheusHandle::render).unwrap_or_default();
    let mut scrape = Scrape::new(counted);
    gaps::write(&mut scrape);
    let mut costs = scrape.family("drawbridge_cost_usd_total");
    for (model, nano) in &told().cost {
        #[expect(
            clippy::cast_precision_loss,
            reason = "exact below nine million dollars"
        )]
        costs.put(&[("model", model)], *nano as f64 / 1e9);
    }
    process::write(&mut scrape);
    scrape
}

/// Installs the metrics recorder; later calls change nothing. `None` if another recorder was installed before ours.
pub fn recorder() -> Option<&'static PrometheusHandle> {
    static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            let mut builder = PrometheusBuilder::new();
            for family in FAMILIES {
                if let Kind::Histogram(buckets) = family.kind {
                    let matcher = Matcher::Full(family.name.into());
                    builder = builder.set_buckets_for_metric(matcher, buckets).ok()?;
                }
            }
            let handle = builder.install_recorder().ok()?;
            families::describe();
            Some(handle)
        })
        .as_ref()
}

/// Folds what histograms have collected; without it a process that nobody scrapes grows.
pub fn upkeep() {
    if let Some(handle) = recorder() {
        handle.run_upkeep();
    }
}

/// A text of somebody else's, cut to what a log line takes.
#[must_use]
pub fn short(text: &str) -> &str {
    const MOST: usize = 128;
    &text[..text.floor_char_boundary(MOST)]
}

/// What is kept beside the recorder: it counts in whole numbers, and asks nobody which labels there may be.
#[derive(Default)]
struct Told {
    /// Models that may be labels.
    models: BTreeSet<String>,
    /// Nano-dollars by model.
    cost: BTreeMap<String, u64>,
}

fn told() -> std::sync::MutexGuard<'static, Told> {
    static TOLD: Mutex<Told> = Mutex::new(Told {
        models: BTreeSet::new(),
        cost: BTreeMap::new(),
    });
    TOLD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// These models exist: from now on they are labels. Any other is `other`.
pub fn models<'a>(names: impl IntoIterator<Item = &'a str>) {
    let mut told = told();
    for name in names {
        if !told.models.contains(name) {
            told.models.insert(name.to_owned());
            told.cost.entry(name.to_owned()).or_default();
        }
    }
    told.cost.entry(OTHER.to_owned()).or_default();
}

/// What clients call a model that upstream does not list.
const OTHER: &str = "other";

/// Tokens by kind, as upstream counts them: cached is part of input, reasoning part of output.
#[derive(Clone, Copy, Debug)]
pub struct Tokens {
    /// All of the input.
    pub input: u64,
    /// Of the input.
    pub cached: u64,
    /// All of the output.
    pub output: u64,
    /// Of the output.
    pub reasoning: u64,
}

/// A request was booked: what its attempts used and cost (nano-dollars), if there is a price.
pub fn booked(model: &str, tokens: Tokens, cost: Option<i64>) {
    let model = {
        let mut told = told();
        let known = told.models.contains(model);
        let model = if known { model } else { OTHER }.to_owned();
        let cost = cost.and_then(|cost| u64::try_from(cost).ok()).unwrap_or(0);
        *told.cost.entry(model.clone()).or_default() += cost;
        model
    };
    for (kind, count) in [
        ("input", tokens.input),
        ("cached", tokens.cached),
        ("output", tokens.output),
        ("reasoning", tokens.reasoning),
    ] {
        counter!("drawbridge_tokens_total", "type" => kind, "model" => model.clone())
            .increment(count);
    }
    let unpriced = counter!("drawbridge_unpriced_requests_total", "model" => model);
    unpriced.increment(u64::from(cost.is_none()));
}

/// A task began.
pub fn task_started(name: &'static str) {
    gauge!("drawbridge_tasks", "task" => name).increment(1.0);
    counter!("drawbridge_task_panics_total", "task" => name).increment(0);
}

/// A task ended, by a panic or not.
pub fn task_ended(name: &'static str, panicked: bool) {
    gauge!("drawbridge_tasks", "task" => name).decrement(1.0);
    if panicked {
        counter!("drawbridge_task_panics_total", "task" => name).increment(1);
    }
}

/// A job is there. What it last did well counts as done now, so that one that never succeeds is noticed. `now` in epoch seconds.
pub fn job_started(name: &'static str, now: i64) {
    for result in ["ok", "failed"] {
        counter!("drawbridge_job_runs_total", "name" => name, "result" => result).increment(0);
    }
    drop(histogram!("drawbridge_job_seconds", "name" => name));
    job_succeeded(name, now);
}

/// A run of a job ended.
pub fn job_ran(name: &'static str, succeeded: bool, took: Duration, now: i64) {
    let result = if succeeded { "ok" } else { "failed" };
    counter!("drawbridge_job_runs_total", "name" => name, "result" => result).increment(1);
    histogram!("drawbridge_job_seconds", "name" => name).record(took);
    if succeeded {
        job_succeeded(name, now);
    }
}

#[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
fn job_succeeded(name: &'static str, now: i64) {
    gauge!("drawbridge_job_last_success_timestamp_seconds", "name" => name).set(now as f64);
}

/// A statement is sent to the database.
pub fn statement(statement: &'static str) {
    counter!("drawbridge_db_statements_total", "statement" => statement).increment(1);
}

/// A statement failed, or the `pool` gave no connection. `class` is that of `db::Error`.
pub fn statement_failed(statement: &'static str, class: &'static str) {
    counter!("drawbridge_db_errors_total", "statement" => statement, "class" => class).increment(1);
}

/// A connection was asked of the pool: until it came, or did not.
pub fn pool_waited(time: Duration) {
    histogram!("drawbridge_db_pool_wait_seconds").record(time);
}

/// How a turn ended, in the words of the ledger.
#[derive(Clone, Copy, Debug)]
pub struct TurnEnd {
    /// `http` or `websocket`.
    pub transport: &'static str,
    /// The outcome.
    pub outcome: &'static str,
    /// Why, where that is not obvious.
    pub reason: Option<&'static str>,
    /// From arrival to the end.
    pub total: Duration,
    /// From arrival to the first event that went out.
    pub first_event: Option<Duration>,
}

/// A turn ended.
pub fn turn_ended(end: TurnEnd) {
    let transport = end.transport;
    counter!(
        "drawbridge_turns_total",
        "transport" => transport, "outcome" => end.outcome, "reason" => end.reason.unwrap_or_default()
    )
    .increment(1);
    histogram!("drawbridge_turn_seconds", "transport" => transport).record(end.total);
    if let Some(first) = end.first_event {
        histogram!("drawbridge_turn_first_event_seconds", "transport" => transport).record(first);
    }
}

/// An attempt of a turn failed with a failure class and was followed by `next`.
pub fn attempt_failed(class: &'static str, next: &'static str) {
    counter!("drawbridge_attempt_failures_total", "class" => class, "next" => next).increment(1);
}

/// A request was answered with the head of a status: at a route's template (never a path), by a method of ours or `other`.
pub fn answered(route: &str, method: &'static str, status: u16) {
    let class = match status {
        100..200 => "1xx",
        200..300 => "2xx",
        300..400 => "3xx",
        400..500 => "4xx",
        _ => "5xx",
    };
    counter!(
        "drawbridge_http_requests_total",
        "route" => route.to_owned(), "method" => method, "status" => class
    )
    .increment(1);
}

/// Something of a client's is in progress, until this is dropped: `http`, from a request to the head of its answer; `sse`, an event stream
/// after that; `ws`, a socket.
#[derive(Debug)]
pub struct InFlight(&'static str);

impl InFlight {
    /// It begins.
    #[must_use]
    pub fn start(kind: &'static str) -> Self {
        gauge!("drawbridge_in_flight", "kind" => kind).increment(1.0);
        Self(kind)
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        gauge!("drawbridge_in_flight", "kind" => self.0).decrement(1.0);
    }
}

/// A caller was not let in, for want of a good key.
pub fn key_rejected(reason: &'static str) {
    counter!("drawbridge_key_rejections_total", "reason" => reason).increment(1);
}

/// A request was refused before it was a turn, by a limit of ours.
pub fn limit_rejected(limit: &'static str) {
    counter!("drawbridge_limit_rejections_total", "limit" => limit).increment(1);
}

/// A refresh token was spent, or was to be.
pub fn refreshed(result: &'static str) {
    counter!("drawbridge_refreshes_total", "result" => result).increment(1);
}

/// Upstream was asked about an account, beside its turns; what is asked is a word of `poll::Question`.
pub fn polled(question: &'static str, answered: bool) {
    let outcome = if answered { "answered" } else { "failed" };
    counter!("drawbridge_polls_total", "question" => question, "outcome" => outcome).increment(1);
}

/// A change was heard of, so long after it was made.
pub fn bus_lag(time: Duration) {
    histogram!("drawbridge_bus_lag_seconds").record(time);
}

/// A conversation was continued, or not: an outcome and its reason, both words of `turn::resolve`.
pub fn bridge(outcome: &'static str, reason: &'static str) {
    counter!("drawbridge_bridge_outcomes_total", "outcome" => outcome, "reason" => reason)
        .increment(1);
}

/// A lease was not ours any more when a turn began or finished (`op`).
pub fn fenced(op: &'static str) {
    counter!("drawbridge_fence_rejections_total", "op" => op).increment(1);
}

/// A lease was to be taken from an owner that is silent, or not needed.
pub fn take(taken: bool) {
    let result = if taken { "taken" } else { "refused" };
    counter!("drawbridge_takes_total", "result" => result).increment(1);
}

/// A peer was called: from the call to the head of its answer. `outcome` is `answered`, `silent` or the word of a refusal.
pub fn forwarded(outcome: &'static str, head: Duration) {
    histogram!("drawbridge_forward_seconds", "outcome" => outcome).record(head);
}

/// A peer's call was refused by this replica, with the word of the refusal.
pub fn forward_refused(code: &'static str) {
    counter!("drawbridge_forward_refusals_total", "code" => code).increment(1);
}

/// Something that must be counted although nobody waits for it, by a fixed name.
pub fn count(name: &'static str) {
    counter!(name).increment(1);
}

/// A duration of something with a fixed name, which ends in `_seconds`.
pub fn observe(name: &'static str, time: Duration) {
    histogram!(name).record(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_a_label_only_once_upstream_has_listed_it() {
        recorder();
        let tokens = Tokens {
            input: 3,
            cached: 2,
            output: 1,
            reasoning: 0,
        };
        booked("invented-by-a-client", tokens, None);
        models(["listed-by-upstream"]);
        booked("listed-by-upstream", tokens, Some(1_500_000_000));
        let text = scrape().end();
        assert!(!text.contains("invented"), "{text}");
        for line in [
            "drawbridge_cost_usd_total{model=\"listed-by-upstream\"} 1.5",
            "drawbridge_unpriced_requests_total{model=\"other\"} 1",
        ] {
            assert!(text.lines().any(|given| given == line), "{line}: {text}");
        }
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(short("gpt"), "gpt");
        assert_eq!(short(&"é".repeat(100)).len(), 128);
        assert_eq!(short(&format!("a{}", "é".repeat(100))).len(), 127);
    }
}

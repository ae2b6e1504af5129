//! Names of metrics and the set-up of logs. Labels are bounded: no ids, no models beyond those configured, no text of users.
//!
//! Logs never carry bodies, tokens, e-mails or raw affinity keys; call sites log ids and codes.

use std::{io::IsTerminal as _, sync::OnceLock, time::Duration};

use metrics::{counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use serde::Serialize;
use tracing_subscriber::{EnvFilter, prelude::*};

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

/// Seconds; from a local error to a long tool call.
const BUCKETS: [f64; 14] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
];

/// The process's metrics in the Prometheus text format. The first call installs the recorder.
#[must_use]
pub fn render_metrics() -> String {
    recorder().map(PrometheusHandle::render).unwrap_or_default()
}

/// Installs the metrics recorder; later calls change nothing. `None` if another recorder was installed before ours.
pub fn recorder() -> Option<&'static PrometheusHandle> {
    static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    HANDLE
        .get_or_init(|| {
            PrometheusBuilder::new()
                .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &BUCKETS)
                .and_then(PrometheusBuilder::install_recorder)
                .ok()
        })
        .as_ref()
}

/// Folds what histograms have collected; without it a process that nobody scrapes grows.
pub fn upkeep() {
    if let Some(handle) = recorder() {
        handle.run_upkeep();
    }
}

/// A task began.
pub fn task_started(name: &'static str) {
    gauge!("drawbridge_tasks", "task" => name).increment(1.0);
}

/// A task ended, by a panic or not.
pub fn task_ended(name: &'static str, panicked: bool) {
    gauge!("drawbridge_tasks", "task" => name).decrement(1.0);
    if panicked {
        counter!("drawbridge_task_panics_total", "task" => name).increment(1);
    }
}

/// A statement is sent to the database.
pub fn statement(statement: &'static str) {
    counter!("drawbridge_db_statements_total", "statement" => statement).increment(1);
}

/// A statement failed. `class` is that of `db::Error`.
pub fn statement_failed(statement: &'static str, class: &'static str) {
    counter!("drawbridge_db_errors_total", "statement" => statement, "class" => class).increment(1);
}

/// A turn ended. `transport` is `http` or `websocket`, `outcome` a word of the ledger.
pub fn turn_ended(
    transport: &'static str,
    outcome: &'static str,
    total: Duration,
    first_event: Option<Duration>,
) {
    counter!("drawbridge_turns_total", "transport" => transport, "outcome" => outcome).increment(1);
    histogram!("drawbridge_turn_seconds", "transport" => transport).record(total);
    if let Some(first) = first_event {
        histogram!("drawbridge_turn_first_event_seconds", "transport" => transport).record(first);
    }
}

/// An attempt of a turn failed with a failure class and was followed by `next`.
pub fn attempt_failed(class: &'static str, next: &'static str) {
    counter!("drawbridge_attempt_failures_total", "class" => class, "next" => next).increment(1);
}

/// Upstream was asked about an account, beside its turns; what is asked is a word of `poll::Question`.
pub fn polled(question: &'static str, answered: bool) {
    let outcome = if answered { "answered" } else { "failed" };
    counter!("drawbridge_polls_total", "question" => question, "outcome" => outcome).increment(1);
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

/// The present value of a gauge with a fixed name.
#[expect(clippy::cast_precision_loss, reason = "gauges are floats")]
pub fn set(name: &'static str, value: u64) {
    gauge!(name).set(value as f64);
}

/// A duration of something with a fixed name, which ends in `_seconds`.
pub fn observe(name: &'static str, time: Duration) {
    histogram!(name).record(time);
}

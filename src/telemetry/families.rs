//! The table of all metrics: names, kinds, what they mean, and their labels.
//!
//! What happens is shown as zero from the start, with the label values listed here, so that the first time it happens is an increase that
//! alerts see, and dashboards find what they ask for. Label values that are not listed appear when they occur; all come from sets of words
//! in the code, from upstream's catalogue of models or from the names of tasks and statements.

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

/// A metric.
pub(super) struct Family {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) help: &'static str,
    labels: &'static [Label],
}

/// Its name, and the values that are shown from the start.
type Label = (&'static str, &'static [&'static str]);

/// What a metric is, and who keeps it.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// Counted as it happens.
    Counter,
    /// Moved as it happens.
    Gauge,
    /// Observed as it happens; seconds.
    Histogram(&'static [f64]),
    /// Written when somebody scrapes; the word is its type.
    Written(&'static str),
}

impl Kind {
    /// The type in the text format.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram(_) => "histogram",
            Self::Written(word) => word,
        }
    }
}

/// The family of a name.
pub(super) fn family(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name)
}

/// Tells the recorder of every family that it keeps, and begins each at zero.
pub(super) fn describe() {
    for family in FAMILIES {
        let (name, help) = (family.name, family.help);
        match family.kind {
            Kind::Counter => {
                describe_counter!(name, help);
                for labels in family.series() {
                    counter!(name, labels).increment(0);
                }
            }
            Kind::Gauge => {
                describe_gauge!(name, help);
                for labels in family.series() {
                    gauge!(name, labels).increment(0.0);
                }
            }
            Kind::Histogram(_) => {
                describe_histogram!(name, help);
                for labels in family.series() {
                    drop(histogram!(name, labels));
                }
            }
            Kind::Written(_) => {}
        }
    }
}

impl Family {
    /// Every combination of the listed label values.
    fn series(&self) -> Vec<Vec<metrics::Label>> {
        self.labels
            .iter()
            .fold(vec![Vec::new()], |series, (name, values)| {
                let with = |labels: &Vec<metrics::Label>, value| {
                    let label = metrics::Label::from_static_parts(name, value);
                    labels.iter().cloned().chain([label]).collect()
                };
                let each = |labels| values.iter().map(move |value| with(labels, value));
                series.iter().flat_map(each).collect()
            })
    }
}

/// A whole turn: from a refusal to the two hours that one may last.
const TURN: &[f64] = &[
    0.01, 0.05, 0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 7200.0,
];
/// Until something shows.
const FIRST_EVENT: &[f64] = &[
    0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0,
];
/// Something between machines that stand together.
const NEAR: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];
/// Background work.
const JOB: &[f64] = &[0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0];

const TRANSPORT: &[&str] = &["http", "websocket"];
const OUTCOME: &[&str] = &[
    "completed",
    "incomplete",
    "failed",
    "cancelled",
    "refused",
    "lost",
    "slow_consumer",
];
const CLASS: &[&str] = &[
    "rate_limit",
    "quota",
    "auth",
    "reauth_required",
    "deactivated",
    "transient",
    "overloaded",
    "model_unsupported",
    "previous_response_not_found",
    "connection_limit",
    "request",
    "network",
    "truncated",
    "too_large",
    "cancelled",
];
const NEXT: &[&str] = &["same_account", "next_account", "surface"];
const BRIDGE: &[&str] = &[
    "live_alias_reuse",
    "owner_forward",
    "stale_recovery",
    "snapshot_recovery",
    "fresh_start",
    "fork",
    "token_invalid",
    "wrong_instance",
    "expired_continuity",
    "previous_response_not_found",
    "continuity_conflict",
    "owner_unreachable",
    "metadata_unavailable",
    "draining",
    "overloaded",
];

macro_rules! families {
    ($($kind:expr, $name:literal, [$($label:ident = $values:expr),*], $help:literal;)+) => {
        /// Every metric.
        pub(super) const FAMILIES: &[Family] = &[$(Family {
            name: $name,
            kind: $kind,
            help: $help,
            labels: &[$((stringify!($label), $values)),*],
        }),+];
    };
}

use Kind::{Counter, Gauge, Histogram, Written};

families! {
    // Turns.
    Counter, "drawbridge_turns_total", [transport = TRANSPORT, outcome = OUTCOME, reason = &[""]],
        "Turns that ended, in the words of the ledger: refused is our doing, cancelled with client_gone the client's.";
    Histogram(TURN), "drawbridge_turn_seconds", [transport = TRANSPORT], "From a turn's arrival to its end.";
    Histogram(FIRST_EVENT), "drawbridge_turn_first_event_seconds", [transport = TRANSPORT],
        "From a turn's arrival to the first visible event of its response.";
    Written("histogram"), "drawbridge_turn_event_gap_seconds", [], "Between two events of a turn, as they came from upstream.";
    Written("gauge"), "drawbridge_turns_running", [], "Turns that run now, each with an open row of the ledger or about to have one.";
    Counter, "drawbridge_attempt_failures_total", [class = CLASS, next = NEXT],
        "Attempts that failed, and what followed: next_account is a failover.";

    // The ledger.
    Counter, "drawbridge_tokens_total", [type = &["input", "cached", "output", "reasoning"], model = &["other"]],
        "Tokens of requests that this process booked. Cached is part of input, reasoning of output.";
    Written("counter"), "drawbridge_cost_usd_total", [], "List price in dollars of requests that this process booked, where there is one.";
    Counter, "drawbridge_unpriced_requests_total", [model = &["other"]], "Booked requests for which there is no price.";
    Written("gauge"), "drawbridge_unbooked_turns", [], "Turns that run without a row, because Postgres is away; they are booked after.";
    Counter, "drawbridge_ledger_late_settlements_total", [], "Turns that were not booked before their end was told, but later.";
    Counter, "drawbridge_ledger_sweeps_total", [], "Sweeps that booked turns which somebody else had left open.";
    Counter, "drawbridge_request_log_dropped_total", [], "Entries of the request log that were left to the sweep.";
    Written("gauge"), "drawbridge_request_log_waiting", [], "Entries of the request log that are not written yet.";

    // The edge.
    Counter, "drawbridge_http_requests_total", [route = &["unmatched"], method = &["GET", "POST", "other"], status = &["4xx"]],
        "Requests by route, as they were answered first: a stream that fails later is a 2xx here, and a failed turn above.";
    Gauge, "drawbridge_in_flight", [kind = &["http", "sse", "ws"]],
        "Requests until the head of their answer, event streams after it, and WebSockets.";
    Counter, "drawbridge_key_rejections_total", [reason = &["missing", "malformed", "unknown", "revoked", "expired", "unavailable"]],
        "Callers that were not let in.";
    Counter, "drawbridge_limit_rejections_total", [limit = &["model", "memory", "refresh"]],
        "Requests that were refused before they were turns: a model the key may not use, no memory for the body, refreshes too often.";
    Written("gauge"), "drawbridge_body_bytes", [], "Memory that request bodies hold.";
    Written("gauge"), "drawbridge_body_limit_bytes", [], "Memory that request bodies may hold.";

    // The pool.
    Written("gauge"), "drawbridge_accounts", [], "Accounts by status; those that are active may serve.";
    Written("gauge"), "drawbridge_account_quota_used_ratio", [],
        "How much of a window an account has used, 0 to 1 (DRAWBRIDGE_METRICS_ACCOUNTS).";
    Written("gauge"), "drawbridge_account_quota_reset_timestamp_seconds", [],
        "When a window of an account ends (DRAWBRIDGE_METRICS_ACCOUNTS).";
    Counter, "drawbridge_refreshes_total", [result = &["renewed", "refused", "failed"]],
        "Refresh tokens that were spent: refused needs a new login, failed is tried again.";
    Counter, "drawbridge_polls_total", [question = &["usage", "models"], outcome = &["answered", "failed"]],
        "Questions to upstream about accounts.";

    // Continuity.
    Counter, "drawbridge_bridge_outcomes_total", [outcome = BRIDGE, reason = &[""]],
        "How conversations went on, and why, in the words of explain.";
    Written("gauge"), "drawbridge_sessions", [], "Conversations that this replica keeps, each under a lease.";
    Written("gauge"), "drawbridge_sessions_busy", [], "Those of them that are in a turn.";
    Written("gauge"), "drawbridge_sessions_limit", [], "How many it may keep.";
    Counter, "drawbridge_fence_rejections_total", [op = &["begin", "finish"]], "Writes of this replica on a lease that it had lost.";
    Counter, "drawbridge_takes_total", [result = &["taken", "refused"]], "Leases to be taken from an owner that is silent or dead.";
    Histogram(NEAR), "drawbridge_forward_seconds", [outcome = &["answered", "silent"]],
        "Calls to peers until the head of their answer; silent is a peer that cannot be reached.";
    Counter, "drawbridge_forward_refusals_total", [code = &[""]], "Calls of peers that this replica refused.";

    // The fleet.
    Written("gauge"), "drawbridge_ready", [], "Whether balancers should send clients here: neither starting nor draining.";
    Written("gauge"), "drawbridge_draining", [], "Whether it was told to stop.";
    Written("gauge"), "drawbridge_admits_turns", [], "Whether its heartbeats are recent enough for new leased turns.";
    Histogram(NEAR), "drawbridge_heartbeat_lag_seconds", [], "From when a heartbeat was due until Postgres had answered.";
    Counter, "drawbridge_heartbeats_missed_total", [], "Heartbeats that Postgres did not answer in time.";
    Counter, "drawbridge_replica_buried_total", [], "How often peers declared this replica dead.";
    Counter, "drawbridge_database_moves_total", [], "How often another database was found in the place of the one that had registered this replica.";
    Written("gauge"), "drawbridge_peers_alive", [], "Other replicas that are alive, as the last heartbeat saw them.";
    Histogram(NEAR), "drawbridge_bus_lag_seconds", [], "From a change by any process until this one heard of it.";
    Written("gauge"), "drawbridge_bus_read_age_seconds", [], "Since the versions of the bus were last read.";
    Written("gauge"), "drawbridge_bus_source", [], "What hurries the bus now: LISTEN, Redis, or nothing but the poll.";
    Written("gauge"), "drawbridge_redis_connected", [], "Whether Redis is there; absent where none is configured.";

    // The database.
    Written("gauge"), "drawbridge_database_up", [], "Whether Postgres answers within a second.";
    Counter, "drawbridge_db_statements_total", [statement = &[]], "Statements by name.";
    Counter, "drawbridge_db_errors_total", [statement = &["pool"], class = &["unavailable"]],
        "Statements that failed, by what can be done about it; pool where no connection was to be had.";
    Written("gauge"), "drawbridge_db_pool_connections", [], "Connections by pool and state.";
    Written("gauge"), "drawbridge_db_pool_limit", [], "Connections that a pool may have.";
    Written("gauge"), "drawbridge_db_pool_waiting", [], "Those who wait for a connection.";
    Histogram(NEAR), "drawbridge_db_pool_wait_seconds", [], "Until a connection was had, or not.";

    // The process.
    Written("gauge"), "drawbridge_build_info", [], "Always 1; the version is a label.";
    Gauge, "drawbridge_tasks", [task = &[]], "Tasks that run.";
    Counter, "drawbridge_task_panics_total", [task = &[]], "Tasks that panicked.";
    Counter, "drawbridge_job_runs_total", [name = &[], result = &[]], "Runs of periodic jobs.";
    Histogram(JOB), "drawbridge_job_seconds", [name = &[]], "How long they took.";
    Gauge, "drawbridge_job_last_success_timestamp_seconds", [name = &[]], "When a job last succeeded, or began to be tried.";
    Written("counter"), "process_cpu_seconds_total", [], "Processor time of user and system.";
    Written("gauge"), "process_resident_memory_bytes", [], "Resident memory.";
    Written("gauge"), "process_threads", [], "Threads.";
    Written("gauge"), "process_start_time_seconds", [], "When the process began.";
    Written("gauge"), "process_open_fds", [], "Open file descriptors.";
    Written("gauge"), "process_max_fds", [], "File descriptors that it may have open.";
}

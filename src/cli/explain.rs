//! `drawbridge explain`: what became of a turn, and why, from what the tables hold of it.

use std::collections::HashMap;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::{Context, leases};
use crate::{
    account::Accounts,
    ids::{AccountId, TurnId},
    lease::{self, Leases},
    ledger::{self, Attempt, Entry, Record, Turn},
    snapshot::{Mode, Snapshots},
    turn::resolve::words,
};

/// Prints one turn.
///
/// # Errors
/// Of the database, or if the tables do not hold it.
pub(super) async fn run(id: TurnId, context: &Context) -> anyhow::Result<()> {
    let db = &context.db;
    let record = ledger::record(db, id).await?.with_context(|| {
        format!("there is no turn and no request {id}; a refused request is here a second after its answer, and until the log's retention ends")
    })?;
    let turn = record.turn.as_ref();
    let lease = match turn.and_then(|turn| turn.lease_id) {
        Some(lease) => Leases::new(db.clone()).show(lease).await?,
        None => None,
    };
    let found = match turn.and_then(|turn| Some((turn.scope_id, turn.response_id.as_ref()?))) {
        Some((scope, response)) => {
            Snapshots::new(db.clone(), context.ring.clone(), Mode::Off)
                .find(scope, response)
                .await?
        }
        None => None,
    };
    let snapshot = match found {
        Some(found) if found.complete => "kept",
        Some(_) => "not_whole",
        None => "none",
    };
    if context.json {
        let Record { turn, requests } = record;
        say!(
            "{}",
            json!({"turn": turn, "requests": requests, "lease": lease, "snapshot": snapshot})
        );
        return Ok(());
    }
    let pepper = context.installation.pepper.clone();
    let accounts = Accounts::new(db.clone(), context.ring.clone(), pepper);
    let listed = accounts.list().await?.into_iter();
    let mut names: HashMap<AccountId, String> = listed
        .filter_map(|account| Some((account.id, account.label.or(account.email)?)))
        .collect();
    for (from, to) in accounts.merges().await? {
        names.extend(names.get(&to).cloned().map(|name| (from, name)));
    }
    let names = Names(names);
    say!("{}", text(&record, lease.as_ref(), snapshot, &names));
    Ok(())
}

/// What operators call the accounts; a deleted one has its id alone.
struct Names(HashMap<AccountId, String>);

impl Names {
    fn of(&self, id: AccountId) -> String {
        self.0.get(&id).cloned().unwrap_or_else(|| id.to_string())
    }
}

fn text(record: &Record, lease: Option<&lease::Listed>, snapshot: &str, names: &Names) -> String {
    let mut lines = Vec::new();
    let mut line = |name: &str, value: String| lines.push(format!("{name:<10}  {value}"));
    match &record.turn {
        Some(turn) => line("turn", began(turn)),
        None => line(
            "turn",
            "none: it was answered before anything was booked".into(),
        ),
    }
    for request in &record.requests {
        line("request", asked(request));
        line("answer", answered(request));
        line("bridge", bridged(request));
        line("account", chosen(request, names));
    }
    if record.requests.is_empty() {
        line("request", "not in the request log (yet)".into());
    }
    if let Some(turn) = &record.turn {
        for (number, attempt) in turn.attempts.iter().enumerate() {
            line(&format!("attempt {}", number + 1), tried(attempt, names));
        }
        line("used", used(turn));
        line("lease", owned(turn, lease));
        line(
            "snapshot",
            match snapshot {
                "kept" => "kept: the conversation can be told again from here on any replica",
                "not_whole" => "not kept: only its lease and its account are known",
                _ => "none",
            }
            .into(),
        );
    }
    lines.join("\n")
}

fn began(turn: &Turn) -> String {
    let end = match (&turn.outcome, turn.settled_at) {
        (Some(outcome), Some(at)) => {
            let reason = in_brackets(turn.reason.as_deref());
            format!("{outcome}{reason}, {} at {at:.3}", turn.state)
        }
        _ => format!("open: request {} holds it", turn.request_id),
    };
    let times = match turn.requests {
        1 => String::new(),
        times => format!(", asked {times} times"),
    };
    format!(
        "{}  opened at {:.3}, {end}{times}",
        turn.turn_id, turn.opened_at
    )
}

fn asked(request: &Entry) -> String {
    format!(
        "{}  {} over {}, model {}",
        request.request_id,
        request.route,
        request.transport,
        request.model.as_deref().unwrap_or("unknown")
    )
}

fn answered(request: &Entry) -> String {
    let status = match request.status {
        Some(status) => format!(" with {status}"),
        None => " with the process that served it".to_owned(),
    };
    let code = request
        .error_code
        .as_ref()
        .map(|code| format!(", error {code}"))
        .unwrap_or_default();
    let first = request
        .first_event_ms
        .map(|ms| format!(", first event after {ms} ms"))
        .unwrap_or_default();
    format!(
        "{}{}{status}{code}{first}, {} ms in all",
        request.outcome,
        in_brackets(request.reason.as_deref()),
        request.total_ms
    )
}

fn bridged(request: &Entry) -> String {
    let Some(outcome) = request.bridge_outcome.as_deref() else {
        return "nothing was decided about its conversation".into();
    };
    let reason = request.bridge_reason.as_deref().unwrap_or_default();
    format!(
        "{}: {} [{outcome}, {reason}]",
        words::outcome(outcome).unwrap_or(outcome),
        words::reason(reason).unwrap_or(reason),
    )
}

/// The explanation as `routing` writes it, with names for ids.
fn chosen(request: &Entry, names: &Names) -> String {
    let Some(explanation) = &request.explanation else {
        return "none was chosen".into();
    };
    let count = |value: &Value| value.as_u64().unwrap_or_default();
    let name = |value: &Value| {
        let id = value.as_str().and_then(|id| id.parse().ok());
        id.map_or_else(|| "?".to_owned(), |id| names.of(id))
    };
    let pool = format!(
        "{} of {} accounts could serve it",
        count(&explanation["eligible"]),
        count(&explanation["considered"])
    );
    let others: Vec<String> = (explanation["named"].as_array().into_iter().flatten())
        .map(|other| format!("{} {}", name(&other[0]), other[1].as_str().unwrap_or("?")))
        .collect();
    let others = in_brackets(
        Some(others.join(", "))
            .as_deref()
            .filter(|all| !all.is_empty()),
    );
    let chosen = &explanation["chosen"];
    if chosen.is_null() {
        return format!("none: {pool}{others}");
    }
    let used = match chosen["used_percent"].as_f64() {
        Some(used) => format!("{used:.0} % used"),
        None => "use unknown".to_owned(),
    };
    format!(
        "{} by {}: {pool}{others}; it had capacity {:.2}, {used}, {} in flight, sticky {}",
        name(&chosen["account"]),
        explanation["strategy"].as_str().unwrap_or("capacity"),
        chosen["capacity"].as_f64().unwrap_or_default(),
        count(&chosen["in_flight"]),
        chosen["sticky"].as_str().unwrap_or("unknown"),
    )
}

fn tried(attempt: &Attempt, names: &Names) -> String {
    let Attempt {
        usage, ms, class, ..
    } = attempt;
    let status = attempt
        .status
        .map_or_else(|| "-".to_owned(), |status| status.to_string());
    let guess = if attempt.estimated { ", estimated" } else { "" };
    format!(
        "{} over {}: {}, status {status}, {ms} ms, {} + {} tokens{guess}",
        names.of(attempt.account_id),
        attempt.transport,
        class.as_deref().unwrap_or("runs"),
        usage.input,
        usage.output,
    )
}

fn used(turn: &Turn) -> String {
    #[expect(clippy::cast_precision_loss, reason = "shown with six digits")]
    let cost = match turn.cost_nanodollars {
        Some(cost) => format!("${:.6}", cost as f64 / 1e9),
        None => "no price known".to_owned(),
    };
    let guess = if turn.estimated { ", estimated" } else { "" };
    format!(
        "{} input tokens ({} cached), {} output tokens ({} reasoning), {cost}{guess}",
        turn.input_tokens, turn.cached_input_tokens, turn.output_tokens, turn.reasoning_tokens
    )
}

fn owned(turn: &Turn, lease: Option<&lease::Listed>) -> String {
    let Some(id) = turn.lease_id else {
        return "none: it ran without one".into();
    };
    let generation = turn.generation.unwrap_or_default();
    let since = match lease {
        None => "deleted since".to_owned(),
        Some(lease) if lease.generation == generation => {
            format!("unchanged since; {}", leases::owner(lease))
        }
        Some(lease) => format!(
            "now under generation {}; {}",
            lease.generation,
            leases::owner(lease)
        ),
    };
    format!("{id} under generation {generation}, {since}")
}

fn in_brackets(text: Option<&str>) -> String {
    text.map(|text| format!(" ({text})")).unwrap_or_default()
}

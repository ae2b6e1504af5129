//! What a run came to, as numbers and as a table.

use std::{collections::BTreeMap, fmt};

use serde::Serialize;
use serde_json::Value;

use super::{
    check::Violation,
    history::{End, History},
    plan::{Break, Course, What},
};

/// The numbers of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What was done.
    pub course: Course,
    /// From which all of it was drawn.
    pub seed: u64,
    /// How long the clients talked.
    pub seconds: u64,
    /// `DRAWBRIDGE_SNAPSHOTS`.
    pub snapshots: &'static str,
    /// On what it ran.
    pub machine: Value,
    /// Of the programs.
    pub versions: Value,
    /// Turns that were sent on to the owner of their lease, by whoever sent them.
    pub forwards: u64,
    /// Leases that were taken from an owner that did not answer.
    pub takes: u64,
    /// Turns whose conversation was told again from its snapshots.
    pub rebuilds: u64,
    /// How many.
    pub replicas: usize,
    /// How many.
    pub clients: usize,
    /// Faults by kind.
    pub faults: BTreeMap<String, u64>,
    /// Calls of clients by their style and end.
    pub calls: BTreeMap<String, u64>,
    /// Errors that clients got, by code.
    pub errors: BTreeMap<String, u64>,
    /// Turns in the ledger by outcome.
    pub turns: BTreeMap<String, u64>,
    /// Attempts at upstream.
    pub attempts: u64,
    /// Attempts that the ledger has only guessed the usage of.
    pub estimated: u64,
    /// Requests by what became of their conversation, and why.
    pub bridge: BTreeMap<String, u64>,
    /// What the replicas themselves counted of decisions, takes and fences; forwards are counted by who sends them.
    pub counters: BTreeMap<String, u64>,
    /// Generations that leases got after their first.
    pub moves: u64,
    /// Promises that were broken.
    pub violations: Vec<Violation>,
}

impl Report {
    /// With what the replicas have counted themselves.
    #[must_use]
    pub fn with(self, counters: BTreeMap<String, u64>) -> Self {
        let sum = |part: &str| {
            let like = counters.iter().filter(|(name, _)| name.contains(part));
            like.map(|(_, count)| count).sum()
        };
        Self {
            forwards: sum("outcome=\"owner_forward\""),
            takes: sum("takes_total{result=\"taken\""),
            rebuilds: sum("outcome=\"snapshot_recovery\""),
            counters,
            ..self
        }
    }

    /// Counts. What only the run knows is left empty.
    #[must_use]
    pub fn of(history: &History, violations: Vec<Violation>) -> Self {
        let mut calls = BTreeMap::new();
        let mut errors = BTreeMap::new();
        for call in &history.calls {
            let (end, error) = match &call.end {
                End::Completed { .. } => ("completed", None),
                End::Failed { code, .. } => ("failed", Some(code.as_str())),
                End::Broken(_) => ("broken", Some("(connection broken)")),
                End::Left => ("left", None),
            };
            let style = match call.intrudes {
                true => "Intruder".to_owned(),
                false => format!("{:?}", call.style),
            };
            count(&mut calls, format!("{style} {end}"));
            if let Some(error) = error {
                count(&mut errors, error.to_owned());
            }
        }
        let mut faults = BTreeMap::new();
        for fault in &history.faults {
            count(&mut faults, kind(fault.what));
        }
        let mut turns = BTreeMap::new();
        for turn in &history.turns {
            let outcome = turn.outcome.as_deref().unwrap_or("-");
            count(&mut turns, format!("{} {outcome}", turn.state));
        }
        let booked = history.turns.iter().flat_map(|turn| &turn.attempts);
        let mut seen: BTreeMap<&str, Vec<i64>> = BTreeMap::new();
        let seen_then = history.sightings.iter().map(|seen| &seen.lease);
        for lease in seen_then.chain(&history.leases) {
            let generations = seen.entry(&lease.id).or_default();
            if !generations.contains(&lease.generation) {
                generations.push(lease.generation);
            }
        }
        Self {
            course: Course::Random,
            seed: 0,
            seconds: 0,
            snapshots: "",
            machine: Value::Null,
            versions: Value::Null,
            forwards: 0,
            takes: 0,
            rebuilds: 0,
            replicas: 0,
            clients: 0,
            faults,
            calls,
            errors,
            turns,
            attempts: history.attempts.len() as u64,
            estimated: booked.filter(|attempt| attempt.estimated).count() as u64,
            bridge: BTreeMap::new(),
            counters: BTreeMap::new(),
            moves: seen.values().map(|all| all.len() as u64 - 1).sum(),
            violations,
        }
    }
}

fn count(counts: &mut BTreeMap<String, u64>, name: String) {
    *counts.entry(name).or_default() += 1;
}

fn kind(what: What) -> String {
    match what {
        What::Kill(_) => "SIGKILL and restart".into(),
        What::Pause(_) => "SIGSTOP, SIGCONT".into(),
        What::Drain(_) => "SIGTERM, drain, restart".into(),
        What::Edge(_, side, how) => format!("edge to {side:?}: {how:?}").to_lowercase(),
        What::Postgres(how @ (Break::Cut | Break::Delay)) => {
            format!("postgres for all: {how:?}").to_lowercase()
        }
        What::Postgres(how) => format!("postgres away for all: {how:?}").to_lowercase(),
        What::Stop => "postgres crashed, restarted".into(),
        What::Promote => "postgres crashed, standby promoted".into(),
        What::Redis => "redis killed, restarted".into(),
        What::Slow(_) => "(not planned: a replica was slow, the machine busy)".into(),
        What::Account(_, misfortune) => format!("account: {misfortune:?}").to_lowercase(),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            course,
            seed,
            seconds,
            replicas,
            clients,
            attempts,
            estimated,
            moves,
            forwards,
            takes,
            rebuilds,
            snapshots,
            ..
        } = self;
        writeln!(
            out,
            "{course:?}, seed {seed}: {seconds} s, {replicas} replicas, {clients} clients, snapshots {snapshots}, {attempts} attempts upstream, {estimated} of \
             them guessed, {forwards} forwards, {takes} takes, {rebuilds} rebuilds, {moves} moves of leases"
        )?;
        for (title, counts) in [
            ("faults", &self.faults),
            ("calls of clients", &self.calls),
            ("errors that clients saw", &self.errors),
            ("turns in the ledger", &self.turns),
            ("requests by bridge outcome", &self.bridge),
            ("counters of the replicas", &self.counters),
        ] {
            writeln!(out, "\n{title}")?;
            for (name, count) in counts {
                writeln!(out, "  {count:>7}  {name}")?;
            }
        }
        writeln!(out, "\nviolations: {}", self.violations.len())?;
        for violation in &self.violations {
            writeln!(out, "  {}: {}", violation.rule, violation.what)?;
        }
        Ok(())
    }
}

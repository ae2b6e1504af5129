//! Whether a history is one that the promises allow: pure functions, each of which the tests make fail.

mod books;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{
    history::{Call, End, History, Lease, Struck, Style, Turn, said, tag},
    plan::{Side, What},
};

/// A promise that was broken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Which, in a word.
    pub rule: &'static str,
    /// By what.
    pub what: String,
}

pub(super) fn violation(rule: &'static str, what: impl Into<String>) -> Violation {
    let what = what.into();
    Violation { rule, what }
}

/// What faults may look like to a client.
const ERRORS: [&str; 13] = [
    "bridge_drain_active",
    "bridge_owner_unreachable",
    "cancelled",
    "continuity_unavailable",
    "no_accounts",
    "rate_limit_exceeded",
    "server_error",
    "server_is_overloaded",
    "upstream_error",
    "upstream_premature_close",
    "upstream_timeout",
    "upstream_unavailable",
    "usage_limit_reached",
];

/// That a conversation is not known any more.
const FORGOTTEN: [&str; 4] = [
    "bridge_session_expired",
    "bridge_wrong_instance",
    "continuity_conflict",
    "previous_response_not_found",
];

/// How long after its end a fault may still be felt, in milliseconds: connections are made again, peers are met again.
const ECHO: u64 = 5_000;

/// Everything that is wrong.
#[must_use]
pub(super) fn check(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    found.extend(closed(&history.turns));
    found.extend(booked_once(history));
    found.extend(delivered(history));
    found.extend(books::check(history));
    found.extend(conversations(history));
    found.extend(remembered(history));
    found.extend(idle(&history.leases, &history.turns));
    found.extend(fenced(history));
    found.extend(errors(history));
    found.extend(strangers(&history.calls));
    let upstream = history.upstream_violations.iter();
    found.extend(upstream.map(|what| violation("upstream", what)));
    let unready = history.unready.iter();
    found.extend(unready.map(|what| violation("ready", what)));
    found
}

/// Every turn is closed.
fn closed(turns: &[Turn]) -> impl Iterator<Item = Violation> {
    let open = turns.iter().filter(|turn| turn.state == "open");
    open.map(|turn| violation("open_turn", &turn.id))
}

/// A retry is an attempt of its turn: it has a row of its own only if the row before it was complete, or not closed yet, or out of sight.
fn booked_once(history: &History) -> Vec<Violation> {
    let mut turns: BTreeMap<&str, Vec<&Turn>> = BTreeMap::new();
    for turn in &history.turns {
        if let Some(client) = &turn.client_turn {
            turns.entry(client).or_default().push(turn);
        }
    }
    let mut found = Vec::new();
    for (client, mut rows) in turns {
        rows.sort_by_key(|turn| turn.born);
        for pair in rows.windows(2) {
            let (before, after) = (pair[0], pair[1]);
            let complete = before.outcome.as_deref() == Some("completed");
            let running = before
                .settled
                .is_none_or(|settled| settled + 50 >= after.born);
            let blind = postgres_away(history, after.born, after.settled.unwrap_or(after.born));
            if !(complete || running || blind) {
                let what = format!("{client}: {} and {}", before.id, after.id);
                found.push(violation("booked_twice", what));
            }
        }
    }
    found
}

/// What a client got complete is what upstream said to this very message, and booked so.
fn delivered(history: &History) -> Vec<Violation> {
    let answers: BTreeMap<&str, _> = history
        .attempts
        .iter()
        .filter_map(|attempt| Some((attempt.response_id.as_deref()?, attempt)))
        .collect();
    let mut rows: BTreeMap<&str, Vec<&Turn>> = BTreeMap::new();
    for turn in &history.turns {
        if let Some(response) = &turn.response {
            rows.entry(response).or_default().push(turn);
        }
    }
    let mut found = Vec::new();
    for call in &history.calls {
        let End::Completed { id, text } = &call.end else {
            continue;
        };
        let dots = text.strip_prefix(&format!("echo: {}", call.tag));
        if !dots.is_some_and(|dots| dots.chars().all(|char| char == '.')) {
            let what = format!("{} was answered {text:?} in {id}", call.tag);
            found.push(violation("foreign_answer", what));
        }
        let of = answers.get(id.as_str()).and_then(|attempt| tag(attempt));
        if of.as_ref() != Some(&call.tag) {
            let what = format!(
                "{} got {id}, which is upstream's answer to {of:?}",
                call.tag
            );
            found.push(violation("foreign_answer", what));
        }
        let rows = rows.get(id.as_str()).map_or(0, Vec::len);
        let lost = rows == 0 && died_unseen(history, call.began, call.ended);
        if rows != 1 && !lost {
            let what = format!("{} got {id}, which has {rows} rows", call.tag);
            found.push(violation("delivered_unbooked", what));
        }
    }
    found
}

/// Upstream sees exactly the conversation that the client meant.
fn conversations(history: &History) -> Vec<Violation> {
    let mut meant: BTreeMap<&str, &Call> = BTreeMap::new();
    for call in history.calls.iter().filter(|call| !call.intrudes) {
        meant.insert(&call.tag, call);
    }
    let seen = history.attempts.iter().filter_map(|attempt| {
        let tag = tag(attempt)?;
        let seen = said(&attempt.history);
        (!seen.is_empty()).then_some((attempt.n, tag, seen))
    });
    let mut found = Vec::new();
    for (n, tag, seen) in seen {
        match meant.get(tag.as_str()) {
            None => found.push(violation("foreign_message", format!("attempt {n}: {tag}"))),
            Some(call) if call.meant != seen => {
                let what = format!(
                    "attempt {n} ({:?}): {}",
                    call.style,
                    difference(&call.meant, &seen)
                );
                found.push(violation("history", what));
            }
            Some(_) => {}
        }
    }
    found
}

fn difference(meant: &[String], seen: &[String]) -> String {
    let same = meant.iter().zip(seen).take_while(|(a, b)| a == b).count();
    format!(
        "meant {} messages, seen {}; from number {same} on meant {:?}, seen {:?}",
        meant.len(),
        seen.len(),
        meant.get(same),
        seen.get(same)
    )
}

/// What was delivered complete can be continued.
fn remembered(history: &History) -> Vec<Violation> {
    let mut whole: BTreeMap<(usize, &str), &Call> = BTreeMap::new();
    for call in &history.calls {
        if let End::Completed { id, .. } = &call.end {
            whole.insert((call.key, id), call);
        }
    }
    let mut found = Vec::new();
    for call in history.calls.iter().filter(|call| !call.intrudes) {
        let End::Failed { code, .. } = &call.end else {
            continue;
        };
        if !FORGOTTEN.contains(&code.as_str()) {
            continue;
        }
        // It repairs that without a word, so it is told nothing else.
        if call.style == Style::CodexSocket && code == "previous_response_not_found" {
            continue;
        }
        let parent = call.continues.as_deref();
        let parent = parent.and_then(|id| whole.get(&(call.key, id)));
        let blind = postgres_away(history, call.began, call.ended)
            || parent.is_some_and(|parent| postgres_away(history, parent.began, parent.ended));
        if !blind {
            let what = format!(
                "{code} for {} after {:?}, which was complete at {:?}, at {}..{}",
                call.tag,
                call.continues,
                parent.map(|parent| parent.ended),
                call.began,
                call.ended
            );
            found.push(violation("forgotten", what));
        }
    }
    found
}

/// No lease is busy with a turn that is closed.
fn idle(leases: &[Lease], turns: &[Turn]) -> Vec<Violation> {
    let open = turns.iter().filter(|turn| turn.state == "open");
    let open: BTreeSet<&str> = open.map(|turn| turn.request.as_str()).collect();
    let busy = leases.iter().filter(|lease| {
        let busy = lease.busy.as_deref();
        busy.is_some_and(|request| !open.contains(request))
    });
    busy.map(|lease| violation("busy_lease", format!("{lease:?}")))
        .collect()
}

/// A generation belongs to one owner, and none comes back.
fn fenced(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    let mut newest: BTreeMap<&str, i64> = BTreeMap::new();
    let mut owners: BTreeMap<(&str, i64), &str> = BTreeMap::new();
    let mut owned = |lease, generation, owner| {
        let first = *owners.entry((lease, generation)).or_insert(owner);
        (first != owner).then(|| {
            let what = format!("lease {lease} generation {generation}: {first} and {owner}");
            violation("two_owners", what)
        })
    };
    for seen in &history.sightings {
        let before = newest.entry(&seen.id).or_insert(seen.generation);
        if seen.generation < *before {
            let what = format!("lease {}: {} after {before}", seen.id, seen.generation);
            found.push(violation("generation", what));
        }
        *before = seen.generation.max(*before);
        if let Some(owner) = &seen.owner {
            found.extend(owned(&seen.id, seen.generation, owner));
        }
    }
    let mut turns: Vec<&Turn> = history.turns.iter().collect();
    turns.sort_by_key(|turn| turn.opened);
    let mut newest: BTreeMap<&str, i64> = BTreeMap::new();
    for turn in turns {
        let (Some(lease), Some(generation)) = (&turn.lease, turn.generation) else {
            continue;
        };
        found.extend(owned(lease, generation, &turn.boot));
        let before = newest.entry(lease).or_insert(generation);
        if generation < *before {
            let what = format!("turn {} opened at {generation} after {before}", turn.id);
            found.push(violation("generation", what));
        }
        *before = generation.max(*before);
    }
    found
}

/// Errors are of a known kind and well-formed; a connection breaks only where the network or a process did.
fn errors(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    for call in &history.calls {
        let at = || {
            format!(
                "{} ({:?}) at {}..{}",
                call.tag, call.style, call.began, call.ended
            )
        };
        match &call.end {
            End::Completed { .. } | End::Left => {}
            End::Failed { status, code, flaw } => {
                let known = ERRORS.contains(&code.as_str())
                    || FORGOTTEN.contains(&code.as_str())
                    || (call.intrudes && code == "bridge_token_invalid");
                if !known {
                    found.push(violation("error", format!("{status} {code} for {}", at())));
                }
                if let Some(flaw) = flaw {
                    found.push(violation(
                        "envelope",
                        format!("{flaw} in {code} for {}", at()),
                    ));
                }
            }
            End::Broken(how) => {
                let breaks = |what| match what {
                    What::Kill(_) | What::Pause(_) | What::Edge(_, Side::Clients, _) => true,
                    // A socket is closed when its turn is over; a stream is finished.
                    What::Drain(_) => {
                        matches!(call.style, Style::CodexSocket | Style::ChainSocket)
                    }
                    _ => false,
                };
                if !struck(history, call.began, call.ended, breaks) {
                    found.push(violation("broken", format!("{how} for {}", at())));
                }
            }
        }
    }
    found
}

/// Nobody goes on with what is another's.
fn strangers(calls: &[Call]) -> impl Iterator<Item = Violation> {
    let served = calls
        .iter()
        .filter(|call| call.intrudes && matches!(call.end, End::Completed { .. }));
    served.map(|call| {
        violation(
            "scope",
            format!("{} went on with {:?}", call.tag, call.continues),
        )
    })
}

/// Whether a fault of a kind was felt in a time.
fn struck(history: &History, from: u64, to: u64, kind: impl Fn(What) -> bool) -> bool {
    let felt = |fault: &Struck| fault.from <= to && from <= fault.to + ECHO;
    history
        .faults
        .iter()
        .any(|fault| felt(fault) && kind(fault.what))
}

/// Whether somebody could not reach Postgres.
fn postgres_away(history: &History, from: u64, to: u64) -> bool {
    let away = |what| matches!(what, What::Postgres(_) | What::Edge(_, Side::Postgres, _));
    struck(history, from, to, away)
}

/// Whether a turn may be known to nobody: it ran while Postgres was away, and the process that was to record it died.
fn died_unseen(history: &History, from: u64, to: u64) -> bool {
    let dies = |what| matches!(what, What::Kill(_) | What::Drain(_));
    postgres_away(history, from, to) && struck(history, from, to + 60_000, dies)
}

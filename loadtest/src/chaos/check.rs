//! Whether a history is one that the promises allow: pure functions, each of which the tests make fail.

mod books;
mod path;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::Serialize;

use self::path::{Path, Paths};
use super::{
    history::{self, Call, End, History, Lease, Sighting, Style, Turn, said, tag},
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

/// That a conversation is not known any more.
const FORGOTTEN: [&str; 4] = [
    "bridge_session_expired",
    "bridge_wrong_instance",
    "continuity_conflict",
    "previous_response_not_found",
];

/// Everything that is wrong.
#[must_use]
pub(super) fn check(history: &History) -> Vec<Violation> {
    let paths = Paths::new(history);
    let mut found = Vec::new();
    found.extend(closed(&history.turns));
    found.extend(booked_once(&paths));
    found.extend(delivered(&paths));
    found.extend(books::check(&paths));
    found.extend(conversations(history));
    found.extend(remembered(&paths));
    found.extend(idle(&history.leases));
    found.extend(fenced(history));
    found.extend(errors(&paths));
    found.extend(healed(&history.calls));
    found.extend(strangers(&history.calls));
    let upstream = history.upstream_violations.iter();
    found.extend(upstream.map(|what| violation("upstream", what)));
    let unready = history.unready.iter();
    found.extend(unready.map(|what| violation("ready", what)));
    found
}

/// Whoever talks sees nothing of what is done to the fleet: every call is answered, and reaches upstream once. A socket that is closed between
/// two turns is no error: its client opens another. Nor is what Codex is told so that it sends everything again, which it does without a word.
#[must_use]
pub(super) fn unseen(history: &History) -> Vec<Violation> {
    let calls = history.calls.iter().filter(|call| !call.intrudes);
    let failed = calls.filter_map(|call| match &call.end {
        End::Completed { .. } | End::Left => None,
        End::Failed { code, .. }
            if call.style == Style::CodexSocket && code == "previous_response_not_found" =>
        {
            None
        }
        // The close crossed the message: had that been begun, upstream would see it twice.
        End::Broken(how)
            if matches!(call.style, Style::CodexSocket | Style::ChainSocket)
                && how == "closed 1012" =>
        {
            None
        }
        end => Some(violation(
            "visible",
            format!("{} ({:?}): {end:?}", call.tag, call.style),
        )),
    });
    let left = |tag: &str| {
        let mut calls = history.calls.iter().filter(|call| call.tag == tag);
        calls.any(|call| matches!(call.end, End::Left))
    };
    let mut sent: BTreeMap<String, u64> = BTreeMap::new();
    for tag in history.attempts.iter().filter_map(tag) {
        *sent.entry(tag).or_default() += 1;
    }
    let twice = sent.iter().filter(|(tag, times)| **times > 1 && !left(tag));
    let twice = twice.map(|(tag, times)| violation("created_twice", format!("{tag}: {times}")));
    failed.chain(twice).collect()
}

/// Every turn is closed.
fn closed(turns: &[Turn]) -> impl Iterator<Item = Violation> {
    let open = turns.iter().filter(|turn| turn.state == "open");
    open.map(|turn| violation("open_turn", &turn.id))
}

/// A retry is an attempt of its turn: it has a row of its own only if the row before it was complete, or not closed yet, or out of its
/// replica's sight.
fn booked_once(paths: &Paths<'_>) -> Vec<Violation> {
    let mut turns: BTreeMap<&str, Vec<&Turn>> = BTreeMap::new();
    for turn in &paths.history.turns {
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
            let blind = paths.blind(&paths.of_turn(after));
            if !(complete || running || blind) {
                let what = format!("{client}: {} and {}", before.id, after.id);
                found.push(violation("booked_twice", what));
            }
        }
    }
    found
}

/// What a client got complete is what upstream said to this very message, and booked so.
fn delivered(paths: &Paths<'_>) -> Vec<Violation> {
    let history = paths.history;
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
        if !answers_to(text, &call.tag) {
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
        let lost = rows == 0 && paths.died_unseen(&paths.of(call));
        if rows != 1 && !lost {
            let what = format!("{} got {id}, which has {rows} rows", call.tag);
            found.push(violation("delivered_unbooked", what));
        }
    }
    found
}

/// Whether a text is what upstream says to a message, or to a tool's output.
fn answers_to(text: &str, tag: &str) -> bool {
    if history::asked(tag) != tag {
        return text == format!("tool said: {tag}");
    }
    if tag.contains("[tool") {
        return text.starts_with("call: ");
    }
    let dots = text.strip_prefix(&format!("echo: {tag}"));
    dots.is_some_and(|dots| dots.chars().all(|char| char == '.'))
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

/// What was delivered complete can be continued, on any replica, once it is booked: the terminal event waits two seconds for that, no longer.
fn remembered(paths: &Paths<'_>) -> Vec<Violation> {
    let history = paths.history;
    let mut whole: BTreeMap<(usize, &str), &Call> = BTreeMap::new();
    for call in &history.calls {
        if let End::Completed { id, .. } = &call.end {
            whole.insert((call.key, id), call);
        }
    }
    let rows = history.turns.iter();
    let rows: BTreeMap<&str, &Turn> = rows
        .filter_map(|turn| Some((turn.response.as_deref()?, turn)))
        .collect();
    let mut found = Vec::new();
    for call in history.calls.iter().filter(|call| !call.intrudes) {
        let End::Failed { code, .. } = &call.end else {
            continue;
        };
        if !FORGOTTEN.contains(&code.as_str()) {
            continue;
        }
        let chain = before(&whole, call);
        let unbooked = chain.iter().any(|(id, parent)| match rows.get(id) {
            Some(row) => row.settled.is_none_or(|settled| settled >= call.began),
            None => parent.is_some_and(|parent| paths.died_unseen(&paths.of(parent))),
        });
        // Codex repairs that without a word, so it is told nothing else when its socket's memory is gone: for a reason.
        let told = call.style == Style::CodexSocket && code == "previous_response_not_found";
        let since = chain.first().and_then(|(_, parent)| *parent);
        let moved = || {
            let mut path = paths.of(call);
            if let Some(parent) = since {
                // The session may have ended where it ran, before this call came and found no owner any more.
                path.from = parent.began;
                path.replicas.extend(paths.of(parent).replicas);
            }
            paths.met(&path, |what| unseats(what, &path))
        };
        // Who left before the end came back while that turn still ran, and was served beside its session.
        let crowded = || {
            let mut calls = history.calls.iter();
            since.is_some_and(|parent| {
                calls.any(|call| call.tag == parent.tag && matches!(call.end, End::Left))
            })
        };
        let excused = unbooked || (told && (moved() || crowded()));
        if !excused {
            let what = format!(
                "{code} for {} after {:?}, which was complete at {:?}, at {}..{}",
                call.tag,
                call.continues,
                since.map(|parent| parent.ended),
                call.began,
                call.ended
            );
            found.push(violation("forgotten", what));
        }
    }
    found
}

/// What came before a call, newest first, up to what brought everything.
fn before<'a>(
    whole: &BTreeMap<(usize, &str), &'a Call>,
    call: &'a Call,
) -> Vec<(&'a str, Option<&'a Call>)> {
    let mut next = call.continues.as_deref();
    let mut chain = Vec::new();
    while let Some(id) = next {
        let parent = whole.get(&(call.key, id)).copied();
        next = parent.and_then(|parent| parent.continues.as_deref());
        chain.push((id, parent));
    }
    chain
}

/// Whether a fault may cost a session its socket, or its client its session.
fn unseats(what: What, path: &Path) -> bool {
    match what {
        What::Redis | What::Edge(_, Side::Redis, _) | What::Slow(_) => false,
        What::Postgres(_) | What::Stop | What::Promote | What::Account(..) => true,
        What::Kill(r) | What::Pause(r) | What::Drain(r) | What::Edge(r, ..) => {
            path.replicas.contains(&r)
        }
    }
}

/// No lease is busy for ever: its owner's turns have ended, and whoever claims it wipes what a dead owner left. So it is busy at the end only
/// under a tombstone, or freed with it.
fn idle(leases: &[Lease]) -> impl Iterator<Item = Violation> {
    let busy = leases
        .iter()
        .filter(|lease| lease.busy.is_some() && lease.owner.is_some() && !lease.dead);
    busy.map(|lease| violation("busy_lease", format!("{lease:?}")))
}

/// When everything has healed, every conversation goes on.
fn healed(calls: &[Call]) -> impl Iterator<Item = Violation> {
    let stuck = calls
        .iter()
        .filter(|call| call.healed && !matches!(call.end, End::Completed { .. }));
    stuck.map(|call| {
        let what = format!(
            "{} ({:?}) at {:?}, {}: {:?}",
            call.tag, call.style, call.entry, call.began, call.end
        );
        violation("stuck", what)
    })
}

/// A generation belongs to one owner, and none comes back.
fn fenced(history: &History) -> Vec<Violation> {
    let mut found = Vec::new();
    // What a standby has not got is given out again: generations are compared from there on.
    let moved = history
        .faults
        .iter()
        .filter(|fault| fault.what == What::Promote);
    let since = moved.map(|fault| fault.to + path::ECHO).max().unwrap_or(0);
    let mut newest: BTreeMap<&str, i64> = BTreeMap::new();
    let mut owners: BTreeMap<(&str, i64), &str> = BTreeMap::new();
    let mut owned = |lease, generation, owner| {
        let first = *owners.entry((lease, generation)).or_insert(owner);
        (first != owner).then(|| {
            let what = format!("lease {lease} generation {generation}: {first} and {owner}");
            violation("two_owners", what)
        })
    };
    let sightings = history.sightings.iter().filter(|seen| seen.at >= since);
    for Sighting { lease: seen, .. } in sightings {
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
    let turns = history.turns.iter();
    let mut turns: Vec<&Turn> = turns.filter(|turn| turn.opened >= since).collect();
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

/// An error is well-formed, and of a kind that a fault on the call's way explains; a connection breaks only where the network or a process
/// did.
fn errors(paths: &Paths<'_>) -> Vec<Violation> {
    let mut found = Vec::new();
    for call in &paths.history.calls {
        let path = paths.of(call);
        let at = || {
            format!(
                "{} ({:?}) by {:?} at {}..{}, {:?} {:?}",
                call.tag,
                call.style,
                call.entry,
                call.began,
                call.ended,
                path.replicas,
                path.accounts
            )
        };
        match &call.end {
            End::Completed { .. } | End::Left => {}
            End::Failed { status, code, flaw } => {
                let of_continuity = FORGOTTEN.contains(&code.as_str())
                    || (call.intrudes && code == "bridge_token_invalid");
                if !of_continuity && !paths.excused(code, &path) {
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
                    What::Kill(r) | What::Edge(r, Side::Clients, _) => {
                        call.entry.is_none_or(|entry| entry == r)
                    }
                    // A socket is closed when its turn is over; a stream is finished.
                    What::Drain(r) => match call.style {
                        Style::CodexSocket | Style::ChainSocket => {
                            call.entry.is_none_or(|entry| entry == r)
                        }
                        _ => call.entry.is_none(),
                    },
                    _ => false,
                };
                if !paths.met(&path, breaks) {
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

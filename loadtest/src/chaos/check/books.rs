//! The ledger against upstream's own record, attempt by attempt.

use std::collections::BTreeMap;

use super::{Violation, died_unseen, struck, violation};
use crate::{
    chaos::{
        history::{Booked, History, Turn, tag},
        plan::{Misfortune, Side, What},
    },
    upstream::{Attempt, Usage},
};

/// A booked attempt and the turn that it is of.
struct Entry<'a> {
    turn: &'a Turn,
    booked: &'a Booked,
}

pub(super) fn check(history: &History) -> Vec<Violation> {
    let mut found: Vec<Violation> = history.turns.iter().filter_map(sums).collect();
    let mut booked: BTreeMap<Option<&str>, Vec<Entry<'_>>> = BTreeMap::new();
    for turn in &history.turns {
        let entries = turn.attempts.iter().map(|booked| Entry { turn, booked });
        booked
            .entry(turn.tag.as_deref())
            .or_default()
            .extend(entries);
    }
    let mut nameless = booked.remove(&None).unwrap_or_default();
    let mut sent: BTreeMap<String, Vec<&Attempt>> = BTreeMap::new();
    for attempt in &history.attempts {
        // One that upstream did not let in belongs to no account.
        if let Some(tag) = tag(attempt).filter(|_| attempt.account != "?") {
            sent.entry(tag).or_default().push(attempt);
        }
    }
    for (tag, attempts) in &sent {
        let mut entries = booked.remove(&Some(tag.as_str())).unwrap_or_default();
        let unbooked = pair(history, attempts.clone(), &mut entries);
        let unbooked = pair(history, unbooked, &mut nameless);
        nameless.extend(entries);
        let lost = |attempt: &&&Attempt| !died_unseen(history, attempt.at, attempt.at + 5_000);
        found.extend(unbooked.iter().filter(lost).map(|attempt| {
            let what = format!(
                "attempt {} of {tag} at {}: {:?}, cut {}",
                attempt.n, attempt.account, attempt.usage, attempt.cut
            );
            violation("sent_unbooked", what)
        }));
    }
    nameless.extend(booked.into_values().flatten());
    let unsent = nameless.iter().filter(|entry| {
        let (from, to) = span(entry.turn);
        let guess = entry.booked.estimated && disturbed(history, from, to);
        entry.booked.usage != [0; 4] && !guess
    });
    found.extend(unsent.map(|entry| {
        let what = format!(
            "turn {} ({:?}): {:?}",
            entry.turn.id, entry.turn.tag, entry.booked
        );
        violation("booked_unsent", what)
    }));
    found
}

/// A turn is the sum of its attempts.
fn sums(turn: &Turn) -> Option<Violation> {
    let mut sums = [0; 4];
    for attempt in &turn.attempts {
        for (sum, part) in sums.iter_mut().zip(attempt.usage) {
            *sum += part;
        }
    }
    let open = turn.state == "open";
    (!open && sums != turn.sums).then(|| {
        let what = format!("turn {}: {:?}, its attempts {sums:?}", turn.id, turn.sums);
        violation("sums", what)
    })
}

/// Takes from `entries` those that stand for the attempts; yields the attempts for which none does. The surest first.
fn pair<'a>(
    history: &History,
    mut attempts: Vec<&'a Attempt>,
    entries: &mut Vec<Entry<'_>>,
) -> Vec<&'a Attempt> {
    for stands in [told, refused, guessed] {
        attempts.retain(|attempt| {
            let found = entries.iter().position(|entry| {
                entry.booked.account == attempt.account && stands(history, attempt, entry)
            });
            if let Some(index) = found {
                entries.swap_remove(index);
            }
            found.is_none()
        });
    }
    attempts
}

fn told(_: &History, attempt: &Attempt, entry: &Entry<'_>) -> bool {
    attempt.usage.map(flat) == Some(entry.booked.usage) && !entry.booked.estimated
}

fn refused(_: &History, attempt: &Attempt, entry: &Entry<'_>) -> bool {
    attempt.usage.is_none() && entry.booked.usage == [0; 4] && !entry.booked.estimated
}

/// A guess stands for what was cut, on whichever side.
fn guessed(history: &History, attempt: &Attempt, entry: &Entry<'_>) -> bool {
    let (from, to) = span(entry.turn);
    let cut = attempt.usage.is_none() || disturbed(history, from.min(attempt.at), to);
    entry.booked.estimated && cut
}

fn flat(usage: Usage) -> [u64; 4] {
    [usage.input, usage.cached, usage.output, usage.reasoning]
}

fn span(turn: &Turn) -> (u64, u64) {
    (turn.born, turn.settled.unwrap_or(u64::MAX))
}

/// Whether what upstream said may not have arrived.
fn disturbed(history: &History, from: u64, to: u64) -> bool {
    struck(history, from, to, |what| {
        matches!(
            what,
            What::Kill(_)
                | What::Pause(_)
                | What::Drain(_)
                | What::Edge(_, Side::Upstream, _)
                | What::Account(_, Misfortune::Cut | Misfortune::Closed | Misfortune::Silent)
        )
    })
}

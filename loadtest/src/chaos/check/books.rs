//! The ledger against upstream's own record, attempt by attempt.

use std::collections::BTreeMap;

use super::{
    Violation,
    path::{Path, Paths},
    violation,
};
use crate::{
    chaos::{
        history::{Booked, Turn, asked, tag},
        plan::{Misfortune, Side, What},
    },
    upstream::{Attempt, Usage},
};

/// A booked attempt and the turn that it is of.
struct Entry<'a> {
    turn: &'a Turn,
    booked: &'a Booked,
}

pub(super) fn check(paths: &Paths<'_>) -> Vec<Violation> {
    let history = paths.history;
    let mut found: Vec<Violation> = history.turns.iter().filter_map(sums).collect();
    let mut booked: BTreeMap<Option<&str>, Vec<Entry<'_>>> = BTreeMap::new();
    for turn in &history.turns {
        let entries = turn.attempts.iter().map(|booked| Entry { turn, booked });
        booked
            .entry(turn.tag.as_deref().map(asked))
            .or_default()
            .extend(entries);
    }
    let mut nameless = booked.remove(&None).unwrap_or_default();
    let mut sent: BTreeMap<String, Vec<&Attempt>> = BTreeMap::new();
    for attempt in &history.attempts {
        // One that upstream did not let in belongs to no account.
        if let Some(tag) = tag(attempt).filter(|_| attempt.account != "?") {
            sent.entry(asked(&tag).to_owned())
                .or_default()
                .push(attempt);
        }
    }
    for (tag, attempts) in &sent {
        let mut entries = booked.remove(&Some(tag.as_str())).unwrap_or_default();
        let unbooked = pair(paths, attempts.clone(), &mut entries);
        let unbooked = pair(paths, unbooked, &mut nameless);
        nameless.extend(entries);
        // Nobody has recorded who sent it.
        let lost = |attempt: &&&Attempt| {
            let path = Path {
                from: attempt.at,
                to: attempt.at + 5_000,
                replicas: history.boots.values().copied().collect(),
                ..Path::default()
            };
            !paths.died_unseen(&path)
        };
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
        let guess = entry.booked.estimated && disturbed(paths, entry, u64::MAX);
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
    paths: &Paths<'_>,
    mut attempts: Vec<&'a Attempt>,
    entries: &mut Vec<Entry<'_>>,
) -> Vec<&'a Attempt> {
    for stands in [told, refused, guessed] {
        attempts.retain(|attempt| {
            let found = entries.iter().position(|entry| {
                entry.booked.account == attempt.account && stands(paths, attempt, entry)
            });
            if let Some(index) = found {
                entries.swap_remove(index);
            }
            found.is_none()
        });
    }
    attempts
}

fn told(_: &Paths<'_>, attempt: &Attempt, entry: &Entry<'_>) -> bool {
    attempt.usage.map(flat) == Some(entry.booked.usage) && !entry.booked.estimated
}

fn refused(_: &Paths<'_>, attempt: &Attempt, entry: &Entry<'_>) -> bool {
    attempt.usage.is_none() && entry.booked.usage == [0; 4] && !entry.booked.estimated
}

/// A guess stands for what was cut, on whichever side.
fn guessed(paths: &Paths<'_>, attempt: &Attempt, entry: &Entry<'_>) -> bool {
    let left = entry.booked.class.as_deref() == Some("cancelled") && paths.left(entry.turn);
    let cut = attempt.usage.is_none() || left || disturbed(paths, entry, attempt.at);
    entry.booked.estimated && cut
}

fn flat(usage: Usage) -> [u64; 4] {
    [usage.input, usage.cached, usage.output, usage.reasoning]
}

/// Whether what upstream said may not have arrived, at this replica from this account; since `sent`, if that was before the turn.
fn disturbed(paths: &Paths<'_>, entry: &Entry<'_>, sent: u64) -> bool {
    let (replica, account) = (
        paths.replica(&entry.booked.boot),
        paths.account(&entry.booked.account),
    );
    let from = entry.turn.born.min(sent);
    let to = entry.turn.settled.unwrap_or(u64::MAX);
    paths.struck(from, to, |what| match what {
        What::Kill(r) | What::Pause(r) | What::Drain(r) | What::Edge(r, Side::Upstream, _) => {
            replica == Some(r)
        }
        What::Account(a, Misfortune::Cut | Misfortune::Closed | Misfortune::Silent) => {
            account == Some(a)
        }
        // Nobody is left who could tell what the lost commits said.
        What::Promote => true,
        _ => false,
    })
}

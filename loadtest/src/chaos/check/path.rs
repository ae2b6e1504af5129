//! What a call met on its way: the replicas and accounts that had a part in it, and which faults of theirs its client may be told of.
//!
//! A fault excuses nothing that happened elsewhere, or more than [`ECHO`] after it was over; but a dead owner is one until it is buried.

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    chaos::{
        history::{Call, End, History, Sighting, Struck, Turn, asked, conversation, tag},
        plan::{Misfortune, Side, What},
    },
    upstream::Attempt,
};

/// How long after its end a fault may still be felt, in milliseconds: connections are made again, peers are met again.
pub(super) const ECHO: u64 = 5_000;
/// How long after its end a fault may keep a dead owner from being buried, in milliseconds: whoever does that must have sent its own
/// heartbeats in time for the 17 s after which they are missed, and two more may pass until it looks.
const BURIAL: u64 = 23_000;

/// The ways of all calls of a history.
pub(super) struct Paths<'a> {
    pub(super) history: &'a History,
    /// By the message that led to them.
    turns: BTreeMap<&'a str, Vec<&'a Turn>>,
    /// By the message that led to them.
    attempts: BTreeMap<String, Vec<&'a Attempt>>,
    /// Leases by conversation.
    leases: BTreeMap<&'a str, BTreeSet<&'a str>>,
    /// By lease, in order.
    sightings: BTreeMap<&'a str, Vec<&'a Sighting>>,
}

/// The way of one call, in its time.
#[derive(Clone, Debug, Default)]
pub(super) struct Path {
    pub(super) from: u64,
    pub(super) to: u64,
    /// All that could have a part in it: where its client came in, who owned its conversation, who ran it.
    pub(super) replicas: BTreeSet<usize>,
    /// The same without the first.
    pub(super) owners: BTreeSet<usize>,
    /// Those that it was sent to.
    pub(super) accounts: BTreeSet<usize>,
}

impl<'a> Paths<'a> {
    pub(super) fn new(history: &'a History) -> Self {
        let mut paths = Self {
            history,
            turns: BTreeMap::new(),
            attempts: BTreeMap::new(),
            leases: BTreeMap::new(),
            sightings: BTreeMap::new(),
        };
        for turn in &history.turns {
            let Some(tag) = &turn.tag else { continue };
            paths.turns.entry(asked(tag)).or_default().push(turn);
            if let Some(lease) = &turn.lease {
                let leases = paths.leases.entry(conversation(tag)).or_default();
                leases.insert(lease);
            }
        }
        for attempt in &history.attempts {
            if let Some(tag) = tag(attempt) {
                let attempts = paths.attempts.entry(asked(&tag).to_owned()).or_default();
                attempts.push(attempt);
            }
        }
        for seen in &history.sightings {
            paths
                .sightings
                .entry(&seen.lease.id)
                .or_default()
                .push(seen);
        }
        paths
    }

    /// The way of a call: where it came in, who owned its conversation meanwhile, who ran it.
    pub(super) fn of(&self, call: &Call) -> Path {
        let (from, to) = (call.began, call.ended);
        let mut path = Path {
            from,
            to,
            ..Path::default()
        };
        let asked = asked(&call.tag);
        for turn in self.turns.get(asked).into_iter().flatten() {
            if turn.born <= to && turn.settled.is_none_or(|settled| from <= settled) {
                let tried = turn.attempts.iter();
                let boots = tried.map(|attempt| &attempt.boot).chain([&turn.boot]);
                path.owners
                    .extend(boots.filter_map(|boot| self.replica(boot)));
            }
        }
        for lease in self.leases.get(conversation(asked)).into_iter().flatten() {
            path.owners.extend(self.owners(lease, from, to));
        }
        path.replicas = &path.owners | &call.entry.into_iter().collect();
        for attempt in self.attempts.get(asked).into_iter().flatten() {
            if from <= attempt.at && attempt.at <= to {
                path.accounts.extend(self.account(&attempt.account));
            }
        }
        path
    }

    /// The way of a turn, by what the ledger says.
    pub(super) fn of_turn(&self, turn: &Turn) -> Path {
        let replica = self.replica(&turn.boot);
        let accounts = turn.attempts.iter();
        Path {
            from: turn.born,
            to: turn.settled.unwrap_or(u64::MAX),
            replicas: replica.into_iter().collect(),
            owners: replica.into_iter().collect(),
            accounts: accounts
                .filter_map(|attempt| self.account(&attempt.account))
                .collect(),
        }
    }

    pub(super) fn replica(&self, boot: &str) -> Option<usize> {
        self.history.boots.get(boot).copied()
    }

    pub(super) fn account(&self, name: &str) -> Option<usize> {
        self.history.accounts.iter().position(|known| known == name)
    }

    /// Who owned a lease in a time: whoever was seen last before, and then.
    fn owners(&self, lease: &str, from: u64, to: u64) -> impl Iterator<Item = usize> {
        let seen = self.sightings.get(lease).map_or(&[][..], Vec::as_slice);
        let first = seen
            .partition_point(|seen| seen.at < from)
            .saturating_sub(1);
        let during = seen[first..].iter().take_while(move |seen| seen.at <= to);
        during.filter_map(|seen| self.replica(seen.lease.owner.as_deref()?))
    }

    /// Whether a fault was felt in a time.
    pub(super) fn struck(&self, from: u64, to: u64, which: impl Fn(What) -> bool) -> bool {
        let felt = |fault: &Struck| fault.from <= to && from <= fault.to + ECHO;
        let mut faults = self.history.faults.iter();
        faults.any(|fault| felt(fault) && which(fault.what))
    }

    /// Whether a call may have ended with this error for a fault on its way.
    pub(super) fn excused(&self, code: &str, path: &Path) -> bool {
        let excuses = |what| excuses(code, what, path);
        let buries_late =
            |what| matches!(what, What::Kill(_) | What::Pause(_)) || blinds(what, path);
        let from = path.from.saturating_sub(BURIAL - ECHO);
        self.met(path, excuses)
            || code == "bridge_owner_unreachable"
                && self.struck(from, path.to, |what| buries_late(what) && excuses(what))
    }

    /// Whether a fault was felt on a way.
    pub(super) fn met(&self, path: &Path, which: impl Fn(What) -> bool) -> bool {
        self.struck(path.from, path.to, which)
    }

    /// Whether the client of a turn went away while it ran, or the replica that had sent it on did.
    pub(super) fn left(&self, turn: &Turn) -> bool {
        let Some(tag) = &turn.tag else { return false };
        let to = turn.settled.unwrap_or(u64::MAX);
        let mut calls = self.history.calls.iter();
        calls.any(|call| {
            let gone = match &call.end {
                End::Left | End::Broken(_) => true,
                End::Failed { code, .. } => code == "bridge_owner_unreachable",
                End::Completed { .. } => false,
            };
            gone && asked(&call.tag) == asked(tag) && turn.born <= call.ended && call.began <= to
        })
    }

    /// Whether Postgres was out of reach for somebody on the way.
    pub(super) fn blind(&self, path: &Path) -> bool {
        self.met(path, |what| blinds(what, path))
    }

    /// Whether what was written in a time is lost: Postgres was replaced by a standby that had not got it.
    pub(super) fn forgotten(&self, from: u64, to: u64) -> bool {
        let mut faults = self.history.faults.iter();
        faults.any(|fault| fault.what == What::Promote && fault.from <= to && from <= fault.to)
    }

    /// Whether a turn may be known to nobody: it ran while Postgres was out of reach, and who was to record it ended.
    pub(super) fn died_unseen(&self, path: &Path) -> bool {
        if self.forgotten(path.from, path.to) {
            return true;
        }
        let ends = |what| matches!(what, What::Kill(r) | What::Drain(r) if path.on(r));
        self.blind(path) && self.struck(path.from, path.to.saturating_add(60_000), ends)
    }
}

impl Path {
    fn on(&self, replica: usize) -> bool {
        self.replicas.contains(&replica)
    }

    fn at(&self, account: usize) -> bool {
        self.accounts.contains(&account)
    }
}

fn blinds(what: What, path: &Path) -> bool {
    match what {
        What::Postgres(_) | What::Stop | What::Promote => true,
        // A statement that a busy machine answers too late is one without an answer.
        What::Edge(replica, Side::Postgres, _) | What::Slow(replica) => path.on(replica),
        _ => false,
    }
}

/// Whether a fault may look like this error to a client whose call went this way.
fn excuses(code: &str, what: What, path: &Path) -> bool {
    use Misfortune::{Broken, Closed, Cut, Expired, Limited, Silent};
    match (code, what) {
        // The owner, or who stands between it and the client, leaves.
        ("bridge_drain_active" | "cancelled", What::Drain(r)) => path.on(r),
        // The owner does not answer.
        ("bridge_owner_unreachable", What::Kill(r) | What::Pause(r) | What::Drain(r)) => path.on(r),
        (
            "bridge_owner_unreachable" | "upstream_premature_close",
            What::Edge(r, Side::Peers, _),
        ) => path.owners.contains(&r),
        // Nothing can be booked; who slept must have sent a heartbeat before it admits a turn.
        ("bridge_owner_unreachable" | "continuity_unavailable", what) if blinds(what, path) => true,
        ("continuity_unavailable", What::Pause(r)) => path.on(r),
        // What is left of the pool is all limits.
        ("usage_limit_reached" | "rate_limit_exceeded", What::Account(_, Limited)) => true,
        ("no_accounts", What::Account(..)) => true,
        // Upstream's own words, after all accounts were tried.
        ("server_error", What::Account(a, Broken)) => path.at(a),
        // An answer that breaks off, between upstream and the owner or between the owner and the client's replica.
        ("upstream_premature_close", What::Account(a, Cut | Closed | Silent)) => path.at(a),
        ("upstream_premature_close", What::Kill(r) | What::Pause(r) | What::Drain(r)) => path.on(r),
        (
            "upstream_premature_close" | "upstream_unavailable" | "upstream_timeout",
            What::Edge(r, Side::Upstream, _),
        ) => path.on(r),
        ("upstream_unavailable", What::Account(a, Cut | Closed | Broken | Expired)) => path.at(a),
        ("upstream_timeout", What::Account(a, Silent)) => path.at(a),
        _ => false,
    }
}

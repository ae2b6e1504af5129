//! Selection: exclude, keep what sticks, draw by capacity.

use std::sync::atomic::Ordering;

use rand::{Rng, RngExt as _};
use serde::Serialize;

use super::{
    Account, Chosen, Exclusion, Explanation, Status, View,
    limits::{plan_weight, scarcest_used},
    status,
};
use crate::ids::AccountId;

/// A preferred account is left for a better one only above this percentage.
const NEARLY_USED: f64 = 95.0;
/// ... and only for one with at least this many times its capacity.
const CLEARLY_BETTER: f64 = 2.0;
/// A block that lasts longer than this (seconds) ends a preference instead of detouring it.
const LONG_BLOCK: i64 = 3_600;
/// What an account without any known window of the family counts as used, in percent: neither preferred nor shunned.
const NEUTRAL_USED: f64 = 50.0;

/// What a turn asks for.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Epoch seconds, by the database's clock.
    pub now: i64,
    /// The model's slug.
    pub model: &'a str,
    /// The model's quota family, see [`family_of`](super::family_of).
    pub family: &'a str,
    /// The account that this conversation prefers.
    pub sticky: Option<AccountId>,
    /// Accounts at which this turn has failed.
    pub tried: &'a [AccountId],
    /// The key's grants; `None` = every account.
    pub allowed: Option<&'a [AccountId]>,
    /// Whether the turn builds on what only the preferred account's connection remembers: then a penalty does not part them.
    pub anchored: bool,
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Send it there.
    Use(Choice),
    /// Every account that could serve is blocked by upstream's limits.
    Exhausted {
        /// Epoch seconds of the earliest end of a block.
        resets_at: i64,
        /// Why.
        explanation: Explanation,
    },
    /// No account can serve, or is left to try.
    Nobody {
        /// Why.
        explanation: Explanation,
    },
}

/// An account for the turn.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Which.
    pub account: AccountId,
    /// What becomes of the preference.
    pub sticky: Sticky,
    /// Why.
    pub explanation: Explanation,
}

/// What becomes of a conversation's preference for an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sticky {
    /// There was none: the choice becomes the preference.
    New,
    /// The preferred account serves.
    Kept,
    /// Another serves this turn, while the preferred account is blocked or penalised; the preference stays.
    Detour,
    /// The choice is the new preference: the old account is clearly worse, blocked for long, or can no longer serve.
    Moved,
}

impl Sticky {
    /// The word in JSON and in texts.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Kept => "kept",
            Self::Detour => "detour",
            Self::Moved => "moved",
        }
    }

    /// Whether the choice is to be written as the conversation's preference.
    #[must_use]
    pub fn rewrites(self) -> bool {
        matches!(self, Self::New | Self::Moved)
    }
}

/// Chooses an account for a turn. The preferred account serves while it can; otherwise accounts are drawn at random, weighted by remaining
/// capacity over pressure: the plan's size times the unused share of the scarcest window, divided by one plus the turns in flight. Accounts under a
/// penalty serve only where no other can.
#[must_use]
pub fn select(view: &View, ask: &Ask<'_>, rng: &mut impl Rng) -> Decision {
    // A model that no catalogue lists excludes nobody: catalogues omit hidden models, and upstream knows better.
    let listed = view
        .accounts
        .iter()
        .any(|account| lists(account, ask.model) == Some(true));
    let (incumbent, otherwise) = preference(view, ask, listed);
    let mut explanation = Explanation {
        considered: u32::try_from(view.accounts.len()).unwrap_or(u32::MAX),
        ..Explanation::default()
    };
    let mut draw = Draw::default();
    let mut resets_at = None;
    for account in &view.accounts {
        match consider(account, ask, listed) {
            Ok(candidate) => {
                explanation.eligible += 1;
                explanation.penalised += u32::from(candidate.penalised);
                if incumbent.is_none_or(|incumbent| candidate.clearly_better_than(&incumbent)) {
                    draw.offer(candidate, rng);
                }
            }
            Err(Refusal { exclusion, until }) => {
                explanation.exclude(account.id, exclusion);
                resets_at = resets_at.into_iter().chain(until).min();
            }
        }
    }
    let (chosen, sticky) = match (incumbent, draw.drawn) {
        (Some(incumbent), None) => (incumbent, Sticky::Kept),
        (Some(incumbent), Some(better)) if incumbent.penalised => (better, Sticky::Detour),
        (Some(_), Some(better)) => (better, Sticky::Moved),
        (None, Some(drawn)) => (drawn, otherwise),
        (None, None) => {
            let failed_elsewhere = explanation.excluded.count(Exclusion::Tried) > 0;
            return match resets_at.filter(|_| !failed_elsewhere) {
                Some(resets_at) => Decision::Exhausted {
                    resets_at,
                    explanation,
                },
                None => Decision::Nobody { explanation },
            };
        }
    };
    explanation.chosen = Some(Chosen {
        account: chosen.account,
        used_percent: chosen.used,
        capacity: chosen.capacity,
        in_flight: chosen.in_flight,
        penalised: chosen.penalised,
        sticky,
    });
    Decision::Use(Choice {
        account: chosen.account,
        sticky,
        explanation,
    })
}

/// An account that can serve the turn.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    account: AccountId,
    used: Option<f64>,
    /// The plan's size relative to `plus`.
    size: f64,
    /// What is left of it.
    capacity: f64,
    in_flight: u32,
    penalised: bool,
}

impl Candidate {
    fn used(&self) -> f64 {
        self.used.unwrap_or(NEUTRAL_USED)
    }

    fn rank(&self) -> Rank {
        Rank {
            sound: !self.penalised,
            left: self.capacity > 0.0,
        }
    }

    /// Worth a cold cache. Both conditions on use keep conversations from wandering between accounts that are equally full.
    fn clearly_better_than(&self, incumbent: &Self) -> bool {
        if self.penalised != incumbent.penalised {
            return incumbent.penalised;
        }
        incumbent.used() > NEARLY_USED
            && self.used() <= NEARLY_USED
            && self.capacity >= CLEARLY_BETTER * incumbent.capacity
    }
}

/// Better is greater; only the best rank is drawn from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    /// Not under a penalty.
    sound: bool,
    /// Has capacity left.
    left: bool,
}

/// Why an account cannot serve, and for a block until when.
struct Refusal {
    exclusion: Exclusion,
    until: Option<i64>,
}

/// Whether the account's catalogue has the model; `None` without a catalogue.
fn lists(account: &Account, model: &str) -> Option<bool> {
    account.models.as_ref().map(|models| models.contains(model))
}

fn consider(account: &Account, ask: &Ask<'_>, listed: bool) -> Result<Candidate, Refusal> {
    let refuse = |exclusion, until| Err(Refusal { exclusion, until });
    if ask
        .allowed
        .is_some_and(|allowed| !allowed.contains(&account.id))
    {
        return refuse(Exclusion::NotGranted, None);
    }
    match status(account, ask.family, ask.now) {
        Status::Paused => refuse(Exclusion::Paused, None),
        Status::ReauthRequired => refuse(Exclusion::ReauthRequired, None),
        Status::Deactivated => refuse(Exclusion::Deactivated, None),
        _ if listed && lists(account, ask.model) == Some(false) => refuse(Exclusion::NoModel, None),
        Status::RateLimited { until, .. } => refuse(Exclusion::Blocked, Some(until)),
        Status::Active if ask.tried.contains(&account.id) => refuse(Exclusion::Tried, None),
        Status::Active => {
            let used = scarcest_used(account, ask.family, ask.now);
            let size = plan_weight(&account.plan);
            let unused = 1.0 - used.unwrap_or(NEUTRAL_USED) / 100.0;
            Ok(Candidate {
                account: account.id,
                used,
                size,
                capacity: size * unused.max(0.0),
                in_flight: account.in_flight.load(Ordering::Relaxed),
                penalised: account.penalty.lasts(ask.now)
                    && !(ask.anchored && ask.sticky == Some(account.id)),
            })
        }
    }
}

/// The preferred account if it can serve, and what becomes of the preference if another does.
fn preference(view: &View, ask: &Ask<'_>, listed: bool) -> (Option<Candidate>, Sticky) {
    let Some(id) = ask.sticky else {
        return (None, Sticky::New);
    };
    let Some(account) = view.accounts.iter().find(|account| account.id == id) else {
        return (None, Sticky::Moved);
    };
    match consider(account, ask, listed) {
        Ok(incumbent) => (Some(incumbent), Sticky::Moved),
        Err(Refusal {
            exclusion: Exclusion::Tried,
            ..
        }) => (None, Sticky::Detour),
        Err(Refusal {
            until: Some(until), ..
        }) if until - ask.now <= LONG_BLOCK => (None, Sticky::Detour),
        Err(_) => (None, Sticky::Moved),
    }
}

/// One weighted random draw over accounts that are offered one after the other, among those of the best rank. Where nothing is left, the
/// plan's size is the weight.
#[derive(Default)]
struct Draw {
    drawn: Option<Candidate>,
    rank: Rank,
    total: f64,
}

impl Draw {
    fn offer(&mut self, candidate: Candidate, rng: &mut impl Rng) {
        let rank = candidate.rank();
        if rank < self.rank {
            return;
        }
        if rank > self.rank {
            *self = Self {
                rank,
                ..Self::default()
            };
        }
        let attraction = if rank.left {
            candidate.capacity
        } else {
            candidate.size
        };
        let weight = attraction / (1.0 + f64::from(candidate.in_flight));
        self.total += weight;
        if rng.random::<f64>() * self.total < weight {
            self.drawn = Some(candidate);
        }
    }
}

#[cfg(test)]
mod tests;

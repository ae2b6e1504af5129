//! Selection: exclude, keep what sticks, draw by the strategy.

use serde::Serialize;

use super::{
    Account, Chosen, Exclusion, Explanation, Lifecycle, Policy, Standing, Status, Strategy, View,
    limits::{next_loss, scarcest_used},
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

/// Resets within so many seconds of the soonest are as soon: upstream's trembles.
const SAME_RESET: i64 = 3_600;

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
    /// What the operator decided.
    pub policy: Policy,
    /// Where the draw falls, 0..1, see [`Points`](super::Points).
    pub point: f64,
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
    /// Those that could serve run as many turns as they may.
    Busy {
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

/// Chooses an account for a turn. The preferred account serves while it can; otherwise the strategy decides among the accounts of the best
/// rank. By capacity, accounts are drawn weighted by remaining capacity over pressure: the plan's size times the unused share of the
/// scarcest window, divided by one plus the turns in flight. Accounts under a penalty serve only where no other can.
#[must_use]
pub fn select(view: &View, ask: &Ask<'_>) -> Decision {
    // A model that no catalogue lists excludes nobody: catalogues omit hidden models, and upstream knows better. Those count that could
    // serve the caller: what others list helps nobody.
    let listed = view.accounts.iter().any(|account| {
        account.lifecycle == Lifecycle::Active
            && is_granted(account, ask)
            && lists(account, ask.model) == Some(true)
    });
    let (incumbent, otherwise) = preference(view, ask, listed);
    let mut explanation = Explanation {
        strategy: ask.policy.strategy,
        considered: u32::try_from(view.accounts.len()).unwrap_or(u32::MAX),
        ..Explanation::default()
    };
    let mut standing = Standing::default();
    let mut draw = Draw::by(ask.policy.strategy);
    for account in &view.accounts {
        match consider(account, ask, listed, &mut standing) {
            Ok(candidate) => {
                explanation.eligible += 1;
                explanation.penalised += u32::from(candidate.penalised);
                if incumbent.is_none_or(|incumbent| candidate.clearly_better_than(&incumbent)) {
                    draw.offer(candidate);
                }
            }
            Err(Refusal { exclusion, .. }) => explanation.exclude(account.id, exclusion),
        }
    }
    let (chosen, sticky) = match (incumbent, draw.at(ask.point)) {
        (Some(incumbent), None) => (incumbent, Sticky::Kept),
        (Some(incumbent), Some(better)) if incumbent.penalised => (better, Sticky::Detour),
        (Some(_), Some(better)) => (better, Sticky::Moved),
        (None, Some(drawn)) => (drawn, otherwise),
        (None, None) => {
            return match standing.exhausted() {
                Some(resets_at) => Decision::Exhausted {
                    resets_at,
                    explanation,
                },
                None if explanation.excluded.count(Exclusion::Busy) > 0 => {
                    Decision::Busy { explanation }
                }
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
    /// What is left of it, where 1 is an unused `plus` account.
    capacity: f64,
    in_flight: u32,
    penalised: bool,
    rank: Rank,
    /// Of the best rank only the lowest are drawn from; `None` goes with any.
    order: Option<i64>,
    /// The share of the draw.
    weight: f64,
}

impl Candidate {
    fn used(&self) -> f64 {
        self.used.unwrap_or(NEUTRAL_USED)
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
    /// What a turn would draw on.
    left: Left,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    #[default]
    Nothing,
    Credits,
    Capacity,
}

/// Why an account cannot serve, and for a block until when.
struct Refusal {
    exclusion: Exclusion,
    until: Option<i64>,
}

fn is_granted(account: &Account, ask: &Ask<'_>) -> bool {
    ask.allowed
        .is_none_or(|allowed| allowed.contains(&account.id))
}

/// Whether the account's catalogue has the model; `None` without a catalogue.
fn lists(account: &Account, model: &str) -> Option<bool> {
    account.models.as_ref().map(|models| models.contains(model))
}

fn consider(
    account: &Account,
    ask: &Ask<'_>,
    listed: bool,
    standing: &mut Standing,
) -> Result<Candidate, Refusal> {
    let refuse = |exclusion, until| Err(Refusal { exclusion, until });
    if !is_granted(account, ask) {
        return refuse(Exclusion::NotGranted, None);
    }
    let status = status(account, ask.family, ask.now);
    if matches!(status, Status::Active | Status::RateLimited { .. })
        && listed
        && lists(account, ask.model) == Some(false)
    {
        return refuse(Exclusion::NoModel, None);
    }
    standing.add(&status);
    let cap = ask.policy.turns_per_account;
    match status {
        Status::Paused => refuse(Exclusion::Paused, None),
        Status::ReauthRequired => refuse(Exclusion::ReauthRequired, None),
        Status::Deactivated => refuse(Exclusion::Deactivated, None),
        Status::RateLimited { until, .. } => refuse(Exclusion::Blocked, Some(until)),
        Status::Active if ask.tried.contains(&account.id) => refuse(Exclusion::Tried, None),
        Status::Active if cap.is_some_and(|cap| account.load.in_flight() >= cap) => {
            refuse(Exclusion::Busy, None)
        }
        Status::Active => Ok(candidate(account, ask)),
    }
}

fn candidate(account: &Account, ask: &Ask<'_>) -> Candidate {
    let used = scarcest_used(account, ask.family, ask.now);
    let capacity = account.weight * (1.0 - used.unwrap_or(NEUTRAL_USED) / 100.0).max(0.0);
    let in_flight = account.load.in_flight();
    let penalised =
        account.load.penalty.lasts(ask.now) && !(ask.anchored && ask.sticky == Some(account.id));
    let left = match account.credits {
        _ if capacity > 0.0 => Left::Capacity,
        Some(credits) if credits.usable() => Left::Credits,
        _ => Left::Nothing,
    };
    // Where nothing is left, the plan's size counts.
    let attraction = if left == Left::Capacity {
        capacity
    } else {
        account.weight
    };
    let by_pressure = attraction / (1.0 + f64::from(in_flight));
    let (order, weight) = match ask.policy.strategy {
        // Of those that fail, the one that is to be tried again first.
        _ if penalised => (Some(account.load.penalty.ends_at()), 1.0),
        Strategy::Capacity => (None, by_pressure),
        // One that nobody knows is told by its first turn; until then it goes with the soonest.
        Strategy::SoonestReset => {
            let lost = || next_loss(account, ask.family, ask.now).unwrap_or(i64::MAX);
            (used.map(|_| lost()), by_pressure)
        }
        Strategy::RoundRobin => (Some(account.load.last().cast_signed()), 1.0),
    };
    Candidate {
        account: account.id,
        used,
        capacity,
        in_flight,
        penalised,
        rank: Rank {
            sound: !penalised,
            left,
        },
        order,
        weight,
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
    match consider(account, ask, listed, &mut Standing::default()) {
        Ok(incumbent) => (Some(incumbent), Sticky::Moved),
        Err(Refusal {
            exclusion: Exclusion::Tried | Exclusion::Busy,
            ..
        }) => (None, Sticky::Detour),
        Err(Refusal {
            until: Some(until), ..
        }) if until - ask.now <= LONG_BLOCK => (None, Sticky::Detour),
        Err(_) => (None, Sticky::Moved),
    }
}

/// The accounts to draw from: those of the best rank and, of these, of the lowest order.
struct Draw {
    strategy: Strategy,
    best: Rank,
    candidates: Vec<Candidate>,
}

impl Draw {
    fn by(strategy: Strategy) -> Self {
        Self {
            strategy,
            best: Rank::default(),
            candidates: Vec::new(),
        }
    }

    fn offer(&mut self, candidate: Candidate) {
        if candidate.rank > self.best {
            self.best = candidate.rank;
            self.candidates.clear();
        }
        if candidate.rank == self.best {
            self.candidates.push(candidate);
        }
    }

    /// Where `point` falls if each has its weight of 0..1.
    fn at(mut self, point: f64) -> Option<Candidate> {
        let near = match self.strategy {
            Strategy::SoonestReset if self.best.sound => SAME_RESET,
            _ => 1,
        };
        let lowest = self.candidates.iter().filter_map(|one| one.order).min();
        let is_low = |order: i64| lowest.is_none_or(|lowest| order - lowest < near);
        self.candidates.retain(|one| one.order.is_none_or(is_low));
        let total: f64 = self.candidates.iter().map(|one| one.weight).sum();
        let mut rest = point * total;
        let mut drawn = self.candidates.iter().filter(|one| {
            rest -= one.weight;
            rest < 0.0
        });
        drawn.next().or_else(|| self.candidates.last()).copied()
    }
}

#[cfg(test)]
mod tests;

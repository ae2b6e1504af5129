//! Why an account was chosen: JSON for the request log, a sentence for people.

use std::fmt;

use serde::{Serialize, Serializer, ser::SerializeMap as _};

use super::{Sticky, Strategy};
use crate::ids::AccountId;

/// How many excluded accounts an explanation names.
const NAMED: usize = 8;

/// Why an account could not be chosen; of several reasons, the first in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Exclusion {
    /// Outside the key's grants.
    NotGranted,
    /// Set aside by the operator.
    Paused,
    /// Needs a new login.
    ReauthRequired,
    /// Closed by upstream.
    Deactivated,
    /// Its catalogue lacks the model, and another one has it.
    NoModel,
    /// Refused by upstream for the family.
    Blocked,
    /// Runs as many turns as it may.
    Busy,
    /// This turn has failed there.
    Tried,
}

impl Exclusion {
    /// Every reason, in order.
    pub const ALL: [Self; 8] = [
        Self::NotGranted,
        Self::Paused,
        Self::ReauthRequired,
        Self::Deactivated,
        Self::NoModel,
        Self::Blocked,
        Self::Busy,
        Self::Tried,
    ];

    /// The word in JSON and in texts.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotGranted => "not_granted",
            Self::Paused => "paused",
            Self::ReauthRequired => "reauth_required",
            Self::Deactivated => "deactivated",
            Self::NoModel => "no_model",
            Self::Blocked => "blocked",
            Self::Busy => "busy",
            Self::Tried => "tried",
        }
    }
}

/// How many accounts each [`Exclusion`] took away; in JSON an object without zeros.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Excluded([u32; Exclusion::ALL.len()]);

impl Excluded {
    /// How many went for this reason.
    #[must_use]
    pub fn count(&self, exclusion: Exclusion) -> u32 {
        self.0[exclusion as usize]
    }

    /// The reasons that took any away, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (Exclusion, u32)> + '_ {
        Exclusion::ALL
            .into_iter()
            .map(|exclusion| (exclusion, self.count(exclusion)))
            .filter(|(_, count)| *count > 0)
    }
}

impl Serialize for Excluded {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (exclusion, count) in self.iter() {
            map.serialize_entry(exclusion.as_str(), &count)?;
        }
        map.end()
    }
}

/// The chosen account as it looked then.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Chosen {
    /// Which.
    pub account: AccountId,
    /// Percent used of the scarcest window of the family; `None` while unknown.
    pub used_percent: Option<f64>,
    /// Remaining capacity, where 1 is an unused `plus` account.
    pub capacity: f64,
    /// Turns of this process at the account before this one.
    pub in_flight: u32,
    /// Whether it failed of late, as all the others did.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub penalised: bool,
    /// What became of the preference.
    pub sticky: Sticky,
}

/// What a selection looked at and why it ended as it did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Explanation {
    /// By which strategy.
    pub strategy: Strategy,
    /// Accounts in the pool.
    pub considered: u32,
    /// Those that could have been chosen.
    pub eligible: u32,
    /// How many of those rank last because they failed of late.
    #[serde(skip_serializing_if = "is_zero")]
    pub penalised: u32,
    /// The others, by reason.
    pub excluded: Excluded,
    /// The first few of the others by name. An account outside the key's grants is counted, never named.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub named: Vec<(AccountId, Exclusion)>,
    /// The choice, if there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen: Option<Chosen>,
}

impl Explanation {
    pub(super) fn exclude(&mut self, account: AccountId, exclusion: Exclusion) {
        self.excluded.0[exclusion as usize] += 1;
        if exclusion != Exclusion::NotGranted && self.named.len() < NAMED {
            self.named.push((account, exclusion));
        }
    }
}

/// `2 of 5 accounts eligible (1 paused, 2 blocked); chose .. by capacity with capacity 0.63, 37 % used, 1 in flight, sticky kept`.
impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} accounts eligible",
            self.eligible, self.considered
        )?;
        for (position, (exclusion, count)) in self.excluded.iter().enumerate() {
            let before = if position == 0 { " (" } else { ", " };
            write!(f, "{before}{count} {}", exclusion.as_str())?;
        }
        if self.excluded.iter().next().is_some() {
            f.write_str(")")?;
        }
        if self.penalised > 0 {
            write!(f, ", {} of them penalised", self.penalised)?;
        }
        let Some(chosen) = &self.chosen else {
            return Ok(());
        };
        write!(
            f,
            "; chose {} by {} with capacity {:.2}, ",
            chosen.account, self.strategy, chosen.capacity
        )?;
        match chosen.used_percent {
            Some(used) => write!(f, "{used:.0} % used")?,
            None => f.write_str("use unknown")?,
        }
        write!(
            f,
            ", {} in flight, sticky {}",
            chosen.in_flight,
            chosen.sticky.as_str()
        )
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

//! What a client may see of quota, as one value.
//!
//! Whoever writes quota data for clients takes a [`QuotaVisibility`]: who forgets it does not compile. It is made of the key's grants and
//! of the switch that hides quota from every client. Of a window, *how much* is left and *when* it resets are two sections; that an account
//! is exhausted follows from either, so it is told only to who sees both.

use serde::{Deserialize, Serialize};

use crate::ids::AccountId;

/// A part of the quota data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Section {
    /// How much of the pool is used.
    Pool,
    /// Which windows there are, and when they reset.
    Limits,
}

impl Section {
    /// Every section.
    pub const ALL: [Self; 2] = [Self::Pool, Self::Limits];

    /// The word in grants and on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pool => "pool",
            Self::Limits => "limits",
        }
    }
}

/// What a client may see of quota, and of which accounts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuotaVisibility<'a> {
    pool: bool,
    limits: bool,
    accounts: Option<&'a [AccountId]>,
}

impl<'a> QuotaVisibility<'a> {
    /// Of a key's grants, where `None` is everything, and of the switch that hides quota whatever the grants say.
    #[must_use]
    pub fn new(
        sections: Option<&[Section]>,
        accounts: Option<&'a [AccountId]>,
        hidden: bool,
    ) -> Self {
        let sees = |section| !hidden && sections.is_none_or(|granted| granted.contains(&section));
        Self {
            pool: sees(Section::Pool),
            limits: sees(Section::Limits),
            accounts,
        }
    }

    /// How much is used or left, if that may be seen.
    pub fn pool<T>(self, value: T) -> Option<T> {
        self.pool.then_some(value)
    }

    /// Length or reset of a window, if that may be seen.
    pub fn limits<T>(self, value: T) -> Option<T> {
        self.limits.then_some(value)
    }

    /// That something is exhausted or blocked, if that may be seen.
    pub fn both<T>(self, value: T) -> Option<T> {
        (self.pool && self.limits).then_some(value)
    }

    /// What belongs to either section, if one may be seen.
    pub fn either<T>(self, value: T) -> Option<T> {
        (self.pool || self.limits).then_some(value)
    }

    /// Whether an account is among those that the client may use.
    #[must_use]
    pub fn covers(self, account: AccountId) -> bool {
        self.accounts
            .is_none_or(|accounts| accounts.contains(&account))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_are_seen_as_granted_unless_quota_is_hidden() {
        use Section::{Limits, Pool};
        let granted: [(Option<&[Section]>, [bool; 2]); 5] = [
            (None, [true, true]),
            (Some(&[Pool, Limits]), [true, true]),
            (Some(&[Pool]), [true, false]),
            (Some(&[Limits]), [false, true]),
            (Some(&[]), [false, false]),
        ];
        for (sections, [pool, limits]) in granted {
            for hidden in [false, true] {
                let seen = QuotaVisibility::new(sections, None, hidden);
                let found = [
                    seen.pool(()),
                    seen.limits(()),
                    seen.both(()),
                    seen.either(()),
                ];
                let expected = [pool, limits, pool && limits, pool || limits];
                assert_eq!(
                    found.map(|part| part.is_some()),
                    expected.map(|part| part && !hidden),
                    "{sections:?} {hidden}"
                );
            }
        }
    }

    #[test]
    fn the_accounts_of_a_key_are_its_own_and_none_named_are_none() {
        let (own, other) = (AccountId::new(), AccountId::new());
        for (accounts, expected) in [
            (None, [true, true]),
            (Some(&[own][..]), [true, false]),
            (Some(&[]), [false, false]),
        ] {
            let seen = QuotaVisibility::new(None, accounts, true);
            assert_eq!([seen.covers(own), seen.covers(other)], expected);
        }
    }
}

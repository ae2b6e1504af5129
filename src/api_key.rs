//! Client keys: who may come in, in which scope, and with which grants.
//!
//! A key's text is shown once and kept as a keyed hash; [`ApiKeys`] holds every row in memory and follows the bus, so that a request costs
//! no round trip. It knows nothing of headers and routes, nor of callers that may go without a key: it only tells whether a key was ever
//! created. Revoked rows stay: a key that was revoked never becomes unknown, and its past turns keep their name.

mod admin;
mod expiry;
mod store;
mod text;
mod view;

use jiff::Timestamp;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

pub use self::{
    admin::{Created, Error, Listed, NewKey, create, find, grant, list, revoke, rotate},
    expiry::{BadExpiry, Expiry},
    store::STATEMENTS,
    view::ApiKeys,
};
use crate::{
    ids::{AccountId, ApiKeyId, ScopeId},
    protocol::limits::Section,
};

/// A key that may come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// Its row.
    pub id: ApiKeyId,
    /// Whose conversations these are.
    pub scope: ScopeId,
    /// As the operator named it.
    pub name: String,
    /// What it may do.
    pub grants: Grants,
    /// From this instant on it may not.
    pub expires_at: Option<Timestamp>,
    /// Whether the operator took it back.
    revoked: bool,
}

/// What a key may do; nothing named means everything. A newer release may have written more than this one reads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grants {
    /// The accounts that may serve it; an empty list lets none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accounts: Option<Vec<AccountId>>,
    /// The models that it may ask for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    /// What it may see of quota; an empty list is nothing.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "known_sections"
    )]
    pub quota: Option<Vec<Section>>,
}

/// What becomes of one kind of grant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Grant<T> {
    /// It stays as it is; a new key may everything.
    #[default]
    Same,
    /// Everything.
    Any,
    /// These alone; none, if there are none.
    Only(Vec<T>),
}

impl<T: Clone> Grant<T> {
    fn only(&self) -> Option<Vec<T>> {
        match self {
            Self::Same | Self::Any => None,
            Self::Only(these) => Some(these.clone()),
        }
    }
}

/// What becomes of the grants of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// The accounts that may serve it.
    pub accounts: Grant<AccountId>,
    /// The models that it may ask for.
    pub models: Grant<String>,
    /// What it may see of quota.
    pub quota: Grant<Section>,
}

impl Change {
    /// What is restricted from now on: the grants of a new key.
    #[must_use]
    pub fn set(&self) -> Grants {
        Grants {
            accounts: self.accounts.only(),
            models: self.models.only(),
            quota: self.quota.only(),
        }
    }

    /// The kinds whose restriction ends.
    fn cleared(&self) -> Vec<&'static str> {
        let kinds = [
            (self.accounts == Grant::Any).then_some("accounts"),
            (self.models == Grant::Any).then_some("models"),
            (self.quota == Grant::Any).then_some("quota"),
        ];
        kinds.into_iter().flatten().collect()
    }
}

/// Why a key does not come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// Not a text that we ever made.
    #[error("not a key of this service")]
    Malformed,
    /// No key has this text, or no longer.
    #[error("unknown key")]
    Unknown,
    /// Its time is over.
    #[error("expired key")]
    Expired,
    /// The operator took it back.
    #[error("revoked key")]
    Revoked,
    /// Not in memory, and the database cannot be asked.
    #[error("the key cannot be checked now")]
    Unavailable,
}

impl Grants {
    /// What cannot be read allows nothing.
    fn read(json: Value) -> Self {
        serde_json::from_value(json).unwrap_or(Self {
            accounts: Some(Vec::new()),
            models: Some(Vec::new()),
            quota: Some(Vec::new()),
        })
    }
}

/// Of sections that this release knows.
fn known_sections<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Vec<Section>>, D::Error> {
    let words: Option<Vec<String>> = Option::deserialize(from)?;
    let section = |word: String| {
        Section::ALL
            .into_iter()
            .find(|section| section.as_str() == word)
    };
    Ok(words.map(|words| words.into_iter().filter_map(section).collect()))
}

impl Key {
    fn check(&self, now: Timestamp) -> Result<(), AuthError> {
        if self.revoked {
            Err(AuthError::Revoked)
        } else if self.expires_at.is_some_and(|end| end <= now) {
            Err(AuthError::Expired)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_comes_in_until_the_instant_of_its_end_and_not_once_revoked() {
        let at = |second| Timestamp::from_second(second).unwrap();
        for (revoked, expires_at, expected) in [
            (false, None, Ok(())),
            (false, Some(at(101)), Ok(())),
            (false, Some(at(100)), Err(AuthError::Expired)),
            (false, Some(at(99)), Err(AuthError::Expired)),
            (true, None, Err(AuthError::Revoked)),
            (true, Some(at(99)), Err(AuthError::Revoked)),
        ] {
            let key = Key {
                id: ApiKeyId::new(),
                scope: ScopeId::new(),
                name: "test".into(),
                grants: Grants::default(),
                expires_at,
                revoked,
            };
            assert_eq!(key.check(at(100)), expected, "{revoked} {expires_at:?}");
        }
    }

    #[test]
    fn grants_that_name_nothing_allow_everything_and_those_of_a_newer_release_are_read() {
        let nothing = Grants {
            accounts: Some(vec![]),
            models: Some(vec![]),
            quota: Some(vec![]),
        };
        let everything = Grants::default();
        for (json, expected) in [
            ("{}", everything.clone()),
            (
                r#"{"models":["m"],"budget":{"usd":5}}"#,
                Grants {
                    models: Some(vec!["m".to_owned()]),
                    ..everything.clone()
                },
            ),
            (
                r#"{"accounts":[]}"#,
                Grants {
                    accounts: Some(vec![]),
                    ..everything.clone()
                },
            ),
            (
                r#"{"quota":["limits","forecast"]}"#,
                Grants {
                    quota: Some(vec![Section::Limits]),
                    ..everything.clone()
                },
            ),
            (r#"{"quota":null}"#, everything),
            (r#"{"quota":"all"}"#, nothing.clone()),
            (r#"{"models":"all"}"#, nothing),
        ] {
            let grants = Grants::read(serde_json::from_str(json).unwrap());
            assert_eq!(grants, expected, "{json}");
        }
    }
}

//! What operators do with keys. Every change announces itself on the bus as the last statement of its transaction.

use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;

use super::{Change, Grants, store, text};
use crate::{
    bus::{self, Topic},
    db::{self, Db},
    ids::{ApiKeyId, ScopeId},
    secret::Pepper,
};

/// Why nothing was done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error(transparent)]
    Db(#[from] db::Error),
    /// Nothing has this id or name.
    #[error("no key has this id or name")]
    NotFound,
    /// Several have.
    #[error("several keys match; name one by its id: {}", ids(.0))]
    Ambiguous(Vec<ApiKeyId>),
    /// It was revoked: it takes no new secret.
    #[error("the key is revoked")]
    Revoked,
}

fn ids(ids: &[ApiKeyId]) -> String {
    ids.iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ")
}

/// A key to be made.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// For people; need not be unique.
    pub name: String,
    /// When it ends.
    pub expires_at: Option<Timestamp>,
    /// Another key whose conversations it shares.
    pub scope_of: Option<ApiKeyId>,
    /// What it may do.
    pub grants: Grants,
}

/// A key and its text, which nobody can see again.
#[derive(Debug)]
pub struct Created {
    /// The key.
    pub key: Listed,
    /// Its text.
    pub secret: SecretString,
}

/// A key as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its row.
    pub id: ApiKeyId,
    /// Whose conversations these are.
    pub scope: ScopeId,
    /// For people.
    pub name: String,
    /// How its text begins.
    pub prefix: String,
    /// What it may do.
    pub grants: Grants,
    /// When it was created.
    pub created_at: Timestamp,
    /// When it ends.
    pub expires_at: Option<Timestamp>,
    /// When it was taken back.
    pub revoked_at: Option<Timestamp>,
    /// When it last came in, to the minute.
    pub last_used_at: Option<Timestamp>,
}

impl Listed {
    /// `active`, `expired` or `revoked`.
    #[must_use]
    pub fn status(&self, now: Timestamp) -> &'static str {
        if self.revoked_at.is_some() {
            "revoked"
        } else if self.expires_at.is_some_and(|end| end <= now) {
            "expired"
        } else {
            "active"
        }
    }
}

/// Makes a key.
///
/// # Errors
/// [`Error::NotFound`] if `scope_of` is no key.
pub async fn create(db: &Db, pepper: &Pepper, new: &NewKey) -> Result<Created, Error> {
    let (secret, hash) = draw(pepper);
    let tx = db.begin().await?;
    let key = store::create(&tx, ApiKeyId::new(), new, &hash, prefix(&secret))
        .await?
        .ok_or(Error::NotFound)?;
    bus::commit(tx, &[Topic::ApiKeys]).await?;
    Ok(Created { key, secret })
}

/// Gives a key a new text; the old one is dead at once. Scope, grants and end stay.
///
/// # Errors
/// [`Error::NotFound`] or [`Error::Revoked`].
pub async fn rotate(db: &Db, pepper: &Pepper, id: ApiKeyId) -> Result<Created, Error> {
    let (secret, hash) = draw(pepper);
    let tx = db.begin().await?;
    let key = store::rotate(&tx, id, &hash, prefix(&secret))
        .await?
        .ok_or(Error::NotFound)?;
    if key.revoked_at.is_some() {
        return Err(Error::Revoked);
    }
    bus::commit(tx, &[Topic::ApiKeys]).await?;
    Ok(Created { key, secret })
}

/// Changes what a key may do; kinds that stay as they are keep what a newer release may have written.
///
/// # Errors
/// [`Error::NotFound`] or [`Error::Revoked`].
pub async fn grant(db: &Db, id: ApiKeyId, change: &Change) -> Result<Listed, Error> {
    let tx = db.begin().await?;
    let key = store::grant(&tx, id, &change.set(), &change.cleared())
        .await?
        .ok_or(Error::NotFound)?;
    if key.revoked_at.is_some() {
        return Err(Error::Revoked);
    }
    bus::commit(tx, &[Topic::ApiKeys]).await?;
    Ok(key)
}

/// Takes a key back, for good. A key that was taken back before stays as it is.
///
/// # Errors
/// [`Error::NotFound`].
pub async fn revoke(db: &Db, id: ApiKeyId) -> Result<Listed, Error> {
    let tx = db.begin().await?;
    let key = store::revoke(&tx, id).await?.ok_or(Error::NotFound)?;
    bus::commit(tx, &[Topic::ApiKeys]).await?;
    Ok(key)
}

/// Every key, oldest first.
///
/// # Errors
/// Of the database.
pub async fn list(db: &Db) -> Result<Vec<Listed>, Error> {
    Ok(store::list(db).await?)
}

/// Finds a key by the beginning of its id (8 hex digits or more) or by its name. A key in use comes before revoked ones.
///
/// # Errors
/// [`Error::NotFound`] or [`Error::Ambiguous`].
pub async fn find(db: &Db, text: &str) -> Result<ApiKeyId, Error> {
    one_of(&list(db).await?, text)
}

fn one_of(keys: &[Listed], text: &str) -> Result<ApiKeyId, Error> {
    let matching: Vec<&Listed> = keys.iter().filter(|key| matches(key, text)).collect();
    let in_use: Vec<&Listed> = matching
        .iter()
        .copied()
        .filter(|key| key.revoked_at.is_none())
        .collect();
    match if in_use.is_empty() {
        &matching
    } else {
        &in_use
    }
    .as_slice()
    {
        [] => Err(Error::NotFound),
        [key] => Ok(key.id),
        several => Err(Error::Ambiguous(several.iter().map(|key| key.id).collect())),
    }
}

fn matches(key: &Listed, text: &str) -> bool {
    let digits: String = text
        .chars()
        .filter(|digit| *digit != '-')
        .flat_map(char::to_lowercase)
        .collect();
    key.name == text || (digits.len() >= 8 && key.id.0.simple().to_string().starts_with(&digits))
}

fn draw(pepper: &Pepper) -> (SecretString, [u8; 32]) {
    let secret = text::draw();
    let hash = text::hash(pepper, secret.expose_secret())
        .expect("a key that was just drawn is well formed");
    (secret, hash)
}

fn prefix(secret: &SecretString) -> &str {
    text::prefix(secret.expose_secret())
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn key(id: u128, name: &str, revoked: bool) -> Listed {
        Listed {
            id: ApiKeyId(Uuid::from_u128(id)),
            scope: ScopeId::new(),
            name: name.into(),
            prefix: "dbk_abcdef".into(),
            grants: Grants::default(),
            created_at: Timestamp::UNIX_EPOCH,
            expires_at: None,
            revoked_at: revoked.then_some(Timestamp::UNIX_EPOCH),
            last_used_at: None,
        }
    }

    #[test]
    fn a_key_is_named_by_a_unique_beginning_of_its_id_or_by_its_name() {
        let keys = [
            key(0x0123_4567_89ab_cdef_0000_0000_0000_0001, "laptop", false),
            key(0x0123_4567_89ab_cdff_0000_0000_0000_0002, "laptop", true),
            key(0xffff_ffff_0000_0000_0000_0000_0000_0003, "old", true),
            key(0xffff_fff0_0000_0000_0000_0000_0000_0004, "twin", false),
            key(0xffff_fff1_0000_0000_0000_0000_0000_0005, "twin", false),
        ];
        for (text, expected) in [
            ("laptop", Ok(0)),
            ("old", Ok(2)),
            ("01234567-89ab-cdff", Ok(1)),
            ("01234567", Ok(0)),
            ("FFFFFFF1", Ok(4)),
            ("fffffff", Err("NotFound")),
            ("twin", Err("Ambiguous")),
            ("", Err("NotFound")),
            ("nobody", Err("NotFound")),
        ] {
            match (one_of(&keys, text), expected) {
                (Ok(id), Ok(index)) => assert_eq!(id, keys[index].id, "{text}"),
                (Err(error), Err(kind)) => {
                    assert!(format!("{error:?}").starts_with(kind), "{text}")
                }
                (found, expected) => panic!("{text}: {found:?} instead of {expected:?}"),
            }
        }
    }
}

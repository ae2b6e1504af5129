//! The pool's accounts: who they are, their sealed credentials, their life cycle, the models they list, and which conversation prefers
//! which of them.
//!
//! A seat is (`chatgpt_account_id`, `chatgpt_user_id`); one seat is one row. Tokens and e-mails are sealed before they reach a statement. A
//! credential has a generation: whoever writes tokens or condemns an account names the generation it acted on, and loses if it is old.
//! Limits are none of this room's business.

mod auth_file;
mod claims;
pub mod sticky;
mod store;

use std::{collections::BTreeSet, sync::Arc};

use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Serialize;
use serde_json::Value;

pub use self::{
    auth_file::{AuthFile, AuthFileError},
    claims::Claims,
    store::STATEMENTS,
};
use crate::{
    bus::{self, Topic},
    db::{self, Db, LockClass},
    ids::AccountId,
    routing::Lifecycle,
    secret::{self, KeyRing, Pepper, Place},
};

/// The accounts in the database. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Accounts {
    db: Db,
    ring: KeyRing,
    pepper: Pepper,
}

/// What selection needs of an account.
#[derive(Clone, Debug)]
pub struct AccountEntry {
    /// Its id.
    pub id: AccountId,
    /// Whether it may serve.
    pub lifecycle: Lifecycle,
    /// Upstream's name of the plan.
    pub plan: String,
    /// Slugs that upstream lists for it; `None` while unknown.
    pub models: Option<Arc<BTreeSet<String>>>,
}

/// An account as operators see it.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its id.
    pub id: AccountId,
    /// The operator's name for it.
    pub label: Option<String>,
    /// Opened for display; never logged.
    pub email: Option<String>,
    /// Upstream's name of the plan.
    pub plan: String,
    /// `active`, `paused`, `reauth_required` or `deactivated`.
    pub status: &'static str,
    /// Why, where it is not active.
    pub reason: Option<String>,
    /// When it was first imported.
    pub created_at: Timestamp,
    /// When its tokens were last renewed.
    pub refreshed_at: Timestamp,
    /// When its access token ends.
    pub access_expires_at: Option<Timestamp>,
}

/// The tokens of one login.
#[derive(Clone)]
pub struct Tokens {
    /// For requests.
    pub access: SecretString,
    /// For one exchange.
    pub refresh: SecretString,
    /// Says whose they are.
    pub id_token: Option<SecretString>,
}

/// A stored credential, opened.
pub struct Stored {
    /// Counts the writes of tokens.
    pub generation: i64,
    /// For requests.
    pub access: SecretString,
    /// For one exchange.
    pub refresh: SecretString,
    /// When the access token ends.
    pub access_expires_at: Option<Timestamp>,
    /// When the tokens were written.
    pub refreshed_at: Timestamp,
    /// Upstream's id of the workspace.
    pub chatgpt_account_id: Option<String>,
    /// Whether the account may serve.
    pub lifecycle: Lifecycle,
}

/// What an import did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Imported {
    /// The account.
    pub id: AccountId,
    /// False if the seat was there already and was given new tokens.
    pub created: bool,
}

/// Why something could not be done with an account.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error(transparent)]
    Db(#[from] db::Error),
    /// A sealed value does not open.
    #[error(transparent)]
    Secret(#[from] secret::Error),
    /// No such account.
    #[error("there is no such account")]
    Unknown,
    /// Its present status does not allow that.
    #[error("the account is {0}; only a new login brings it back")]
    Status(Lifecycle),
}

impl Accounts {
    /// The accounts of a database.
    #[must_use]
    pub fn new(db: Db, ring: KeyRing, pepper: Pepper) -> Self {
        Self { db, ring, pepper }
    }

    /// Stores a login: on the row of its seat, or on a new one. Imports of one workspace queue on its advisory lock.
    ///
    /// # Errors
    /// Of the database.
    pub async fn import(&self, file: &AuthFile, label: Option<&str>) -> Result<Imported, Error> {
        let claims = file.claims();
        let tx = self.db.begin().await?;
        let workspace = file.account_id.as_deref().unwrap_or_default();
        store::lock(&tx, LockClass::Seat, workspace).await?;
        let seat = match (&file.account_id, &claims.user_id) {
            (Some(account), Some(user)) => store::of_seat(&tx, account, user).await?,
            _ => None,
        };
        let id = seat.unwrap_or_else(AccountId::new);
        let row = id.to_string();
        let email = claims.email.as_deref().map(|email| store::Email {
            sealed: self.ring.seal(
                Place {
                    table: "accounts",
                    row: &row,
                    column: "email_sealed",
                },
                email.as_bytes(),
            ),
            hash: self
                .pepper
                .hash("email", email.to_ascii_lowercase().as_bytes()),
        });
        let profile = store::Profile {
            chatgpt_account_id: file.account_id.as_deref(),
            chatgpt_user_id: claims.user_id.as_deref(),
            email,
            label,
            plan: claims.plan.as_deref().unwrap_or("unknown"),
        };
        store::put_account(&tx, id, &profile).await?;
        store::put_credential(&tx, id, &self.seal(id, &file.tokens)).await?;
        bus::bump(&tx, &[Topic::Accounts]).await?;
        tx.commit().await?;
        Ok(Imported {
            id,
            created: seat.is_none(),
        })
    }

    /// Every account, for selection.
    ///
    /// # Errors
    /// Of the database.
    pub async fn load_all(&self) -> Result<Vec<AccountEntry>, db::Error> {
        store::entries(&self.db).await
    }

    /// Every account, for people, oldest first.
    ///
    /// # Errors
    /// Of the database, or if an e-mail does not open.
    pub async fn list(&self) -> Result<Vec<Listed>, Error> {
        let open = |row: store::ListedRow| {
            let id = row.id.to_string();
            let place = Place {
                table: "accounts",
                row: &id,
                column: "email_sealed",
            };
            let email = row
                .email_sealed
                .map(|sealed| self.ring.open_text(place, &sealed))
                .transpose()?;
            Ok(Listed {
                id: row.id,
                label: row.label,
                email: email.map(|email| email.expose_secret().to_owned()),
                plan: row.plan,
                status: row.lifecycle.as_str(),
                reason: row.reason,
                created_at: row.created_at,
                refreshed_at: row.refreshed_at,
                access_expires_at: row.access_expires_at,
            })
        };
        store::list(&self.db).await?.into_iter().map(open).collect()
    }

    /// Sets an account aside; running turns end, new ones go elsewhere.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Status`], or of the database.
    pub async fn pause(&self, id: AccountId) -> Result<(), Error> {
        self.switch(id, Lifecycle::Active, Lifecycle::Paused).await
    }

    /// Lets a paused account serve again.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Status`], or of the database.
    pub async fn resume(&self, id: AccountId) -> Result<(), Error> {
        self.switch(id, Lifecycle::Paused, Lifecycle::Active).await
    }

    /// Removes an account with its tokens. Its turns stay in the ledger.
    ///
    /// # Errors
    /// [`Error::Unknown`], or of the database.
    pub async fn delete(&self, id: AccountId) -> Result<(), Error> {
        let tx = self.db.begin().await?;
        if !store::delete(&tx, id).await? {
            return Err(Error::Unknown);
        }
        bus::bump(&tx, &[Topic::Accounts]).await?;
        Ok(tx.commit().await?)
    }

    /// Notes upstream's verdict on a login, if the credential is still the one it was passed on. True if it was.
    ///
    /// # Errors
    /// Of the database.
    pub async fn set_lifecycle(
        &self,
        id: AccountId,
        lifecycle: Lifecycle,
        reason: &str,
        generation: i64,
    ) -> Result<bool, db::Error> {
        let tx = self.db.begin().await?;
        let done = store::condemn(&tx, id, lifecycle, reason, generation).await?;
        if done {
            tracing::warn!(account_id = %id, status = %lifecycle, reason, "an account is out of service");
            bus::bump(&tx, &[Topic::Accounts]).await?;
        }
        tx.commit().await?;
        Ok(done)
    }

    /// The credential of an account; `None` if there is no such account.
    ///
    /// # Errors
    /// Of the database, or if a token does not open.
    pub async fn credential(&self, id: AccountId) -> Result<Option<Stored>, Error> {
        let Some(row) = store::credential(&self.db, id).await? else {
            return Ok(None);
        };
        let key = id.to_string();
        let open = |column, sealed: &[u8]| {
            self.ring.open_text(
                Place {
                    table: "account_credentials",
                    row: &key,
                    column,
                },
                sealed,
            )
        };
        Ok(Some(Stored {
            generation: row.generation,
            access: open("access_sealed", &row.access_sealed)?,
            refresh: open("refresh_sealed", &row.refresh_sealed)?,
            access_expires_at: row.access_expires_at,
            refreshed_at: row.refreshed_at,
            chatgpt_account_id: row.chatgpt_account_id,
            lifecycle: row.lifecycle,
        }))
    }

    /// Stores new tokens in place of generation `expected`; yields the new generation, or `None` if somebody else was faster.
    ///
    /// # Errors
    /// Of the database.
    pub async fn rotate(
        &self,
        id: AccountId,
        expected: i64,
        tokens: &Tokens,
        plan: Option<&str>,
    ) -> Result<Option<i64>, Error> {
        let tx = self.db.begin().await?;
        let generation = store::rotate(&tx, id, expected, &self.seal(id, tokens), plan).await?;
        if generation.is_some() {
            bus::bump(&tx, &[Topic::Accounts]).await?;
        }
        tx.commit().await?;
        Ok(generation)
    }

    /// Stores what upstream lists for an account; peers are told only if it is another list.
    ///
    /// # Errors
    /// Of the database.
    pub async fn store_models(&self, id: AccountId, models: &Value) -> Result<(), db::Error> {
        let tx = self.db.begin().await?;
        if store::put_models(&tx, id, models).await? {
            // The view knows which models an account lists.
            bus::bump(&tx, &[Topic::Accounts, Topic::Models]).await?;
        }
        tx.commit().await
    }

    /// What upstream lists for each account, oldest account first.
    ///
    /// # Errors
    /// Of the database.
    pub async fn models(&self) -> Result<Vec<(AccountId, Vec<Value>)>, db::Error> {
        store::models(&self.db).await
    }

    async fn switch(&self, id: AccountId, from: Lifecycle, to: Lifecycle) -> Result<(), Error> {
        let tx = self.db.begin().await?;
        match store::lifecycle(&tx, id).await? {
            None => return Err(Error::Unknown),
            Some(present) if present == to => {}
            Some(present) if present == from => {
                store::set_status(&tx, id, to).await?;
                bus::bump(&tx, &[Topic::Accounts]).await?;
            }
            Some(present) => return Err(Error::Status(present)),
        }
        Ok(tx.commit().await?)
    }

    fn seal(&self, id: AccountId, tokens: &Tokens) -> store::Sealed {
        let row = id.to_string();
        let seal = |column, token: &SecretString| {
            self.ring.seal_text(
                Place {
                    table: "account_credentials",
                    row: &row,
                    column,
                },
                token,
            )
        };
        store::Sealed {
            access: seal("access_sealed", &tokens.access),
            refresh: seal("refresh_sealed", &tokens.refresh),
            id_token: tokens
                .id_token
                .as_ref()
                .map(|token| seal("id_sealed", token)),
            access_expires_at: Claims::of(&tokens.access).expires_at,
        }
    }
}

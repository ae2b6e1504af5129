//! The upstream logins: rows of `accounts`, their sealed credentials, their model catalogues, and which of them a conversation prefers.
//!
//! A seat, (`chatgpt_account_id`, `chatgpt_user_id`), has one row, however often it is imported. Tokens and e-mail addresses exist in the
//! database only sealed for their row; the generation of a credential guards every change that was decided on an older one. This room
//! knows no limits, no requests and no upstream: it stores what it is told.

mod auth_file;
mod claim;
pub mod claims;
pub mod export;
pub mod flow;
pub mod merge;
mod plan;
mod reconcile;
pub mod sticky;
mod store;

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Serialize, Serializer};
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio_postgres::Row;

pub use self::{
    auth_file::{AuthFile, AuthFileError},
    claim::Claim,
    sticky::Sticky,
    store::STATEMENTS,
};
use self::{claims::Claims, plan::Verdict, store::SealedTokens};
use crate::{
    bus::{self, Topic},
    db::{self, Db},
    ids::AccountId,
    routing::Lifecycle,
    secret::{self, KeyRing, Pepper, Place},
};

/// Why something about an account could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database.
    #[error(transparent)]
    Db(#[from] db::Error),
    /// What is stored does not open.
    #[error(transparent)]
    Secret(#[from] secret::Error),
    /// It does not exist (any more).
    #[error("no such account")]
    Unknown,
    /// A login that was meant for one account is another seat's.
    #[error("this login belongs to another seat than the account; nothing was changed")]
    OtherSeat,
    /// A login was called off, or its time is over.
    #[error("the login is over; nothing was changed")]
    Over,
    /// An import of tokens that were issued before those that are stored and good.
    #[error(
        "what is stored of this account is newer than this login; nothing was changed (to go back to it, delete the account first)"
    )]
    Older,
    /// Upstream has ended it; carries the status.
    #[error("the account is {0}; only a new login (import) brings it back")]
    Ended(Lifecycle),
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Db(error.into())
    }
}

/// An account as routing needs it.
#[derive(Clone, Debug)]
pub struct AccountEntry {
    /// Its id.
    pub id: AccountId,
    /// Its life cycle.
    pub lifecycle: Lifecycle,
    /// Upstream's name of its plan, or `unknown`.
    pub plan: String,
    /// Slugs of its catalogue; `None` while that is unknown or empty.
    pub models: Option<Arc<BTreeSet<String>>>,
}

impl Error {
    /// Whether the same may succeed later.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Db(error) if error.is_passing())
    }
}

/// An account as its operator sees it. It carries an e-mail address, so it does not print.
#[derive(Clone, Serialize)]
pub struct Listed {
    /// Its id.
    pub id: AccountId,
    /// The person's address, or `?` if it does not open.
    pub email: Option<String>,
    /// The operator's name for it.
    pub label: Option<String>,
    /// Upstream's name of its plan, or `unknown`.
    pub plan: String,
    /// Its life cycle.
    #[serde(serialize_with = "as_text")]
    pub lifecycle: Lifecycle,
    /// Why it is not active: upstream's code.
    pub reason: Option<String>,
    /// When it was first imported.
    pub created_at: Timestamp,
    /// When its tokens were issued.
    pub refreshed_at: Timestamp,
    /// When its access token ends, if it says.
    pub access_expires_at: Option<Timestamp>,
}

/// What an import stored. It carries an e-mail address, so it does not print.
#[derive(Clone, Serialize)]
pub struct Imported {
    /// The account.
    pub id: AccountId,
    /// Whether it is new; otherwise its tokens were replaced.
    pub created: bool,
    /// Rows of the same seat that are part of it now.
    pub merged: Vec<AccountId>,
    /// The person's address, if the tokens name it.
    pub email: Option<String>,
    /// The operator's name for it.
    pub label: Option<String>,
    /// Upstream's name of its plan, or `unknown`.
    pub plan: String,
}

/// The tokens of one login.
#[derive(Clone, Debug)]
pub struct Tokens {
    /// The bearer token.
    pub access: SecretString,
    /// Can be spent once.
    pub refresh: SecretString,
    /// Who it is.
    pub id_token: Option<SecretString>,
}

/// An opened credential.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The account: another than was asked for, if that was merged into it.
    pub id: AccountId,
    /// Grows with every change of the tokens.
    pub generation: i64,
    /// The bearer token.
    pub access: SecretString,
    /// Can be spent once.
    pub refresh: SecretString,
    /// Who it is.
    pub id_token: Option<SecretString>,
    /// When the access token ends, if it says.
    pub access_expires_at: Option<Timestamp>,
    /// When the tokens were issued.
    pub refreshed_at: Timestamp,
    /// The workspace.
    pub chatgpt_account_id: Option<String>,
    /// The account's life cycle.
    pub lifecycle: Lifecycle,
}

/// Logins that are stored at once: those of a seat wait for each other with a connection in their hands, and turns need connections, too.
const LOGINS: usize = 2;

/// The accounts of the installation. Cheap to clone; nothing is kept in memory.
#[derive(Clone, Debug)]
pub struct Accounts {
    db: Db,
    ring: KeyRing,
    pepper: Pepper,
    logins: Arc<Semaphore>,
}

impl Accounts {
    /// Accounts of a database whose secrets the ring opens.
    #[must_use]
    pub fn new(db: Db, ring: KeyRing, pepper: Pepper) -> Self {
        let logins = Arc::new(Semaphore::new(LOGINS));
        Self {
            db,
            ring,
            pepper,
            logins,
        }
    }

    /// Every account, in order of its id.
    ///
    /// # Errors
    /// Of the database.
    pub async fn load_all(&self) -> Result<Vec<AccountEntry>, db::Error> {
        store::load(&self.db).await
    }

    /// Every account in order of its id, with its address opened.
    ///
    /// # Errors
    /// Of the database.
    pub async fn list(&self) -> Result<Vec<Listed>, Error> {
        let listed = |row: &Row| {
            let id: AccountId = row.try_get(0)?;
            let email: Option<Vec<u8>> = row.try_get(3)?;
            let open =
                |sealed: Vec<u8>| match self.ring.open_text(email_of(&id.to_string()), &sealed) {
                    Ok(email) => email.expose_secret().to_owned(),
                    // Its operator must still be able to see the account, and delete it.
                    Err(error) => {
                        tracing::warn!(account_id = %id, %error, "an e-mail address does not open");
                        "?".to_owned()
                    }
                };
            Ok(Listed {
                id,
                email: email.map(open),
                label: row.try_get(4)?,
                plan: row.try_get(2)?,
                lifecycle: store::lifecycle(row.try_get(1)?),
                reason: row.try_get(5)?,
                created_at: row.try_get(6)?,
                refreshed_at: row.try_get(7)?,
                access_expires_at: row.try_get(8)?,
            })
        };
        store::list(&self.db).await?.iter().map(listed).collect()
    }

    /// Which accounts were merged into which.
    ///
    /// # Errors
    /// Of the database.
    pub async fn merges(&self) -> Result<HashMap<AccountId, AccountId>, db::Error> {
        store::merges(&self.db).await
    }

    /// Takes an account out of service; its credential is kept fresh.
    ///
    /// # Errors
    /// [`Error::Unknown`], [`Error::Ended`], or of the database.
    pub async fn pause(&self, id: AccountId) -> Result<(), Error> {
        self.operate(id, Lifecycle::Paused).await
    }

    /// Puts a paused account back into service.
    ///
    /// # Errors
    /// As [`Accounts::pause`].
    pub async fn resume(&self, id: AccountId) -> Result<(), Error> {
        self.operate(id, Lifecycle::Active).await
    }

    /// Deletes an account with everything that is known of it but its turns. Keys that name it do so no longer.
    ///
    /// # Errors
    /// [`Error::Unknown`], or of the database.
    pub async fn delete(&self, id: AccountId) -> Result<(), Error> {
        let tx = self.db.begin_bounded().await?;
        if !store::delete(&tx, id).await? {
            tx.commit().await?;
            return Err(Error::Unknown);
        }
        Ok(bus::commit(tx, &[Topic::Accounts, Topic::ApiKeys, Topic::Models]).await?)
    }

    /// Notes upstream's verdict on a credential; yields whether that changed anything. It does not if the credential is not `generation`
    /// any more, or the account has ended already. `reason` is a code, never upstream's text.
    ///
    /// # Errors
    /// Of the database.
    pub async fn set_lifecycle(
        &self,
        id: AccountId,
        to: Lifecycle,
        reason: &str,
        generation: i64,
    ) -> Result<bool, db::Error> {
        let tx = self.db.begin().await?;
        let serving = matches!(
            store::lock(&tx, id).await?,
            Some(Lifecycle::Active | Lifecycle::Paused)
        );
        let judged = serving && store::generation(&tx, id).await? == Some(generation);
        if judged {
            store::set_status(&tx, id, to, Some(reason)).await?;
            bus::commit(tx, &[Topic::Accounts]).await?;
            tracing::warn!(account_id = %id, status = %to, reason, "an account is out of service");
        } else {
            tx.commit().await?;
        }
        Ok(judged)
    }

    /// The opened credential of an account, or of the one that it was merged into; `None` if there is no such account.
    ///
    /// # Errors
    /// Of the database, or if a token does not open.
    pub async fn credential(&self, id: AccountId) -> Result<Option<Stored>, Error> {
        let Some(row) = store::credential(&self.db, id).await? else {
            return Ok(None);
        };
        let id: AccountId = row.try_get(8)?;
        let text = id.to_string();
        let open = |column, sealed: &[u8]| self.ring.open_text(token_of(&text, column), sealed);
        let id_token: Option<&[u8]> = row.try_get(5)?;
        Ok(Some(Stored {
            id,
            generation: row.try_get(2)?,
            access: open(ACCESS, row.try_get(3)?)?,
            refresh: open(REFRESH, row.try_get(4)?)?,
            id_token: id_token.map(|sealed| open(ID, sealed)).transpose()?,
            access_expires_at: row.try_get(6)?,
            refreshed_at: row.try_get(7)?,
            chatgpt_account_id: row.try_get(1)?,
            lifecycle: store::lifecycle(row.try_get(0)?),
        }))
    }

    /// Stores fresh tokens in place of those of `expected_generation`; yields the new generation. `None` if others came first, or the
    /// account is gone. The plan that they claim is old news wherever one is known. Fresh tokens prove that the login lives: a peer that was
    /// told otherwise, because this one had spent the refresh token and not stored its successor yet, is overruled.
    ///
    /// # Errors
    /// Of the database.
    pub async fn rotate(
        &self,
        id: AccountId,
        expected_generation: i64,
        tokens: &Tokens,
    ) -> Result<Option<i64>, Error> {
        let sealed = self.seal(id, tokens);
        let tx = self.db.begin().await?;
        let before = store::lock(&tx, id).await?;
        if store::generation(&tx, id).await? != Some(expected_generation) {
            tx.commit().await?;
            return Ok(None);
        }
        if before == Some(Lifecycle::ReauthRequired) {
            store::set_status(&tx, id, Lifecycle::Active, None).await?;
        }
        if let Some(plan) = tokens.claims().plan {
            store::learn_plan(&tx, id, &plan).await?;
        }
        let generation = store::rotate(&tx, id, &sealed).await?;
        bus::commit(tx, &[Topic::Accounts]).await?;
        Ok(Some(generation))
    }

    /// Notes the plan that the usage endpoint names; yields whether it became the account's. A smaller one is believed when it is named twice.
    ///
    /// # Errors
    /// Of the database.
    pub async fn see_plan(&self, id: AccountId, named: &str) -> Result<bool, db::Error> {
        let named = named.to_ascii_lowercase();
        let tx = self.db.begin().await?;
        store::lock(&tx, id).await?;
        if let Some((known, before)) = store::sighting(&tx, id).await? {
            let before = before.as_ref().map(|(plan, at)| (plan.as_str(), *at));
            match plan::judge(&known, before, &named, self.db.clock().now()) {
                Verdict::Ignore => {}
                Verdict::Wait => store::see_plan(&tx, id, &named).await?,
                Verdict::Same => store::forget_sighting(&tx, id).await?,
                Verdict::Change => {
                    store::forget_sighting(&tx, id).await?;
                    store::set_plan(&tx, id, &named).await?;
                    bus::commit(tx, &[Topic::Accounts]).await?;
                    tracing::info!(account_id = %id, from = known, to = named, "an account has another plan");
                    return Ok(true);
                }
            }
        }
        tx.commit().await.map(|()| false)
    }

    /// Stores an account's catalogue: upstream's array, each entry as it came.
    ///
    /// # Errors
    /// Of the database.
    pub async fn store_models(&self, id: AccountId, models: &Value) -> Result<(), db::Error> {
        store::save_models(&self.db, id, models).await
    }

    /// The catalogues, in order of their accounts' ids; an account whose catalogue never came is not among them.
    ///
    /// # Errors
    /// Of the database.
    pub async fn models(&self) -> Result<Vec<(AccountId, Vec<Value>)>, db::Error> {
        store::models(&self.db).await
    }

    async fn operate(&self, id: AccountId, to: Lifecycle) -> Result<(), Error> {
        let tx = self.db.begin_bounded().await?;
        let now = store::lock(&tx, id).await?;
        if let Some(Lifecycle::Active | Lifecycle::Paused) = now
            && now != Some(to)
        {
            store::set_status(&tx, id, to, None).await?;
            return Ok(bus::commit(tx, &[Topic::Accounts]).await?);
        }
        tx.commit().await?;
        match now.ok_or(Error::Unknown)? {
            Lifecycle::Active | Lifecycle::Paused => Ok(()),
            ended => Err(Error::Ended(ended)),
        }
    }

    fn seal(&self, id: AccountId, tokens: &Tokens) -> SealedTokens {
        let id = id.to_string();
        let seal = |column, token| self.ring.seal_text(token_of(&id, column), token);
        SealedTokens {
            access: seal(ACCESS, &tokens.access),
            refresh: seal(REFRESH, &tokens.refresh),
            id_token: tokens.id_token.as_ref().map(|token| seal(ID, token)),
            access_expires_at: claims::expires_at(tokens.access.expose_secret()),
        }
    }
}

impl Tokens {
    /// What the tokens say; the id token counts first.
    fn claims(&self) -> Claims {
        let id_token = self
            .id_token
            .as_ref()
            .map_or("", |token| token.expose_secret());
        Claims::read(&[id_token, self.access.expose_secret()])
    }
}

const ACCESS: &str = "access_sealed";
const REFRESH: &str = "refresh_sealed";
const ID: &str = "id_sealed";

fn token_of<'a>(row: &'a str, column: &'static str) -> Place<'a> {
    Place {
        table: "account_credentials",
        row,
        column,
    }
}

fn email_of(row: &str) -> Place<'_> {
    Place {
        table: "accounts",
        row,
        column: "email_sealed",
    }
}

fn as_text<S: Serializer>(lifecycle: &Lifecycle, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(lifecycle)
}

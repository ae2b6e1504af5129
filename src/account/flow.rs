//! Logins under way. A login is begun at one replica, asked after at another and completed at a third, so all of it is a row: what the
//! exchange needs is sealed for that row, and at any moment one replica polls or exchanges for it, under a claim that ends by itself.
//! A login that has succeeded stays so.

mod store;

use std::time::Duration;

pub use self::store::STATEMENTS;

use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use uuid::Uuid;

use super::{Accounts, AuthFile, Error, Imported, merge::Policy, reconcile::How};
use crate::{
    db::{self, Tx},
    ids::{AccountId, FlowId},
    secret::Place,
};

/// How long what became of a login can be asked after.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);

/// How a person proves who they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// By a code that they type in at upstream.
    Device,
    /// In a browser, whose last address is brought back.
    Browser,
}

impl Method {
    /// The word in the database and in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Browser => "browser",
        }
    }
}

/// Where a login stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// The person has not finished.
    Pending,
    /// Its tokens are stored.
    Succeeded,
    /// It never will be.
    Failed,
    /// The operator called it off.
    Cancelled,
    /// The person took too long.
    Expired,
}

/// A login to be begun.
pub struct NewFlow<'a> {
    /// How.
    pub method: Method,
    /// What the exchange will need, by name.
    pub secrets: &'a [(&'static str, &'a SecretString)],
    /// Tells whose a callback is.
    pub state: Option<&'a SecretString>,
    /// Between two polls.
    pub interval: Duration,
    /// How long the person has.
    pub lifetime: Duration,
    /// Only the seat of this account will do.
    pub wanted: Option<AccountId>,
    /// The operator's name for what comes of it.
    pub label: Option<&'a str>,
}

/// A login as it stands.
#[derive(Clone, Debug, Serialize)]
pub struct Flow {
    /// Its id.
    pub id: FlowId,
    /// How.
    pub method: Method,
    /// Where it stands.
    pub status: Standing,
    /// Why it failed, or why the last try did: a code, never upstream's text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What came of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub account_id: Option<AccountId>,
    /// Whether that is new.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created: Option<bool>,
    /// Between two polls, in seconds.
    pub interval_seconds: i32,
    /// How long the person has.
    pub expires_at: Timestamp,
}

/// The right to poll or exchange for a login, with what that needs. Whoever has it gives it back, or it ends by itself.
pub struct Held {
    /// The login.
    pub id: FlowId,
    claim: Uuid,
    wanted: Option<AccountId>,
    label: Option<String>,
    secrets: Map<String, Value>,
}

impl Held {
    /// A secret by its name.
    #[must_use]
    pub fn secret(&self, name: &str) -> Option<SecretString> {
        self.secrets.get(name)?.as_str().map(SecretString::from)
    }

    pub(super) fn wanted(&self) -> Option<AccountId> {
        self.wanted
    }

    /// Ends the login with success; false if it is not ours to end any more.
    pub(super) async fn finish(&self, tx: &Tx, imported: &Imported) -> Result<bool, db::Error> {
        store::finish(tx, self.id, self.claim, imported).await
    }
}

impl Accounts {
    /// Begins a login.
    ///
    /// # Errors
    /// [`Error::Unknown`] if the wanted account does not exist, or of the database.
    pub async fn begin_flow(&self, new: &NewFlow<'_>) -> Result<Flow, Error> {
        let wanted = match new.wanted {
            Some(wanted) => Some(self.credential(wanted).await?.ok_or(Error::Unknown)?.id),
            None => None,
        };
        let id = FlowId::new();
        let secrets: Map<String, Value> = new
            .secrets
            .iter()
            .map(|(name, secret)| ((*name).to_owned(), secret.expose_secret().into()))
            .collect();
        let text = SecretString::from(Value::Object(secrets).to_string());
        let sealed = self.ring.seal_text(secrets_of(&id.to_string()), &text);
        let state = new.state.map(|state| self.state_hash(state));
        let row = store::begin(&self.db, id, new, wanted, state.as_ref(), &sealed).await?;
        Ok(row)
    }

    /// A login as it stands; `None` if there is no such login (any more).
    ///
    /// # Errors
    /// Of the database.
    pub async fn flow(&self, id: FlowId) -> Result<Option<Flow>, db::Error> {
        store::flow(&self.db, id).await
    }

    /// Whether a callback is a login's: its state is.
    ///
    /// # Errors
    /// Of the database.
    pub async fn is_state_of(&self, id: FlowId, state: &SecretString) -> Result<bool, db::Error> {
        store::has_state(&self.db, id, &self.state_hash(state)).await
    }

    /// Takes the right to act for a pending login for `time`. `None` if another has it, if it was polled less than its interval ago, or if it
    /// is over.
    ///
    /// # Errors
    /// Of the database, or if its secrets do not open.
    pub async fn claim_flow(&self, id: FlowId, time: Duration) -> Result<Option<Held>, Error> {
        let claim = Uuid::new_v4();
        let Some((wanted, label, sealed)) = store::claim(&self.db, id, claim, time).await? else {
            return Ok(None);
        };
        let text = self.ring.open_text(secrets_of(&id.to_string()), &sealed)?;
        Ok(Some(Held {
            id,
            claim,
            wanted,
            label,
            secrets: serde_json::from_str(text.expose_secret()).unwrap_or_default(),
        }))
    }

    /// Keeps the right for another `time`, unless somebody else has it by now.
    ///
    /// # Errors
    /// Of the database.
    pub async fn renew_flow(&self, held: &Held, time: Duration) -> Result<(), db::Error> {
        store::renew(&self.db, held.id, held.claim, time).await
    }

    /// Gives the right back: the login is still pending. `error` says why the last try failed; `slower` adds to the interval.
    ///
    /// # Errors
    /// Of the database.
    pub async fn release_flow(
        &self,
        held: &Held,
        error: Option<&str>,
        slower: Duration,
    ) -> Result<(), db::Error> {
        store::release(&self.db, held.id, held.claim, error, slower).await
    }

    /// Ends a login without success.
    ///
    /// # Errors
    /// Of the database.
    pub async fn fail_flow(&self, held: &Held, error: &str) -> Result<(), db::Error> {
        store::fail(&self.db, held.id, held.claim, error).await
    }

    /// Stores what came of a login and ends it, in one transaction. Nothing is stored if it was called off or taken over meanwhile.
    ///
    /// # Errors
    /// [`Error::OtherSeat`] or [`Error::Unknown`] if it was meant for an account and is not that one's, [`Error::Over`], or of the database.
    pub async fn finish_flow(&self, held: &Held, login: &AuthFile) -> Result<Imported, Error> {
        let how = How {
            policy: Policy::LOGIN,
            label: held.label.as_deref(),
            flow: Some(held),
        };
        self.reconcile(login, how).await
    }

    /// Calls a pending login off; yields whether there is such a login.
    ///
    /// # Errors
    /// Of the database.
    pub async fn cancel_flow(&self, id: FlowId) -> Result<bool, db::Error> {
        store::cancel(&self.db, id).await
    }

    /// Forgets logins that ended a day ago.
    ///
    /// # Errors
    /// Of the database.
    pub async fn purge_flows(&self) -> Result<u64, db::Error> {
        store::purge(&self.db, REMEMBERED).await
    }

    fn state_hash(&self, state: &SecretString) -> [u8; 32] {
        self.pepper
            .hash("login-state", state.expose_secret().as_bytes())
    }
}

fn secrets_of(row: &str) -> Place<'_> {
    Place {
        table: "login_flows",
        row,
        column: "secrets_sealed",
    }
}

//! Logs accounts in. A login stands in the database, so each of its steps may happen at another replica; a step that spends a code runs in a
//! task of its own, which outlives whoever asked for it, since a code can be spent once.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use secrecy::SecretString;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::{
    claim::kept,
    oauth::login::{self as oauth, Approval, Callback, LoginError, Pkce},
};
use crate::{
    account::{
        self, Accounts, AuthFile, Imported, Tokens,
        flow::{Flow, Held, Method, NewFlow, Standing},
    },
    config, db,
    ids::{AccountId, FlowId},
    task::Tasks,
};

/// How long a person has in a browser.
const BROWSER_TIME: Duration = Duration::from_secs(900);
/// How long a step stays one replica's after that has died; a living one renews its claim.
const CLAIM: Duration = Duration::from_secs(10);
/// Tokens whose code is spent are stored within this time, or the login is lost.
const STORING: Duration = Duration::from_secs(30);
/// How often, and how long, a completion waits for another that is under way.
const LOOK: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(30);
/// What upstream's wish for fewer questions adds to the interval.
const SLOWER: Duration = Duration::from_secs(5);

const VERIFIER: &str = "verifier";
const DEVICE: &str = "device_auth_id";
const USER_CODE: &str = "user_code";

/// Why a step of a login was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such login (any more).
    #[error("no such login")]
    Unknown,
    /// The account that it is for does not exist.
    #[error("no such account")]
    NoAccount,
    /// What was pasted is no callback.
    #[error("this is not the address of a finished login: paste all of the browser's address bar")]
    NoCallback,
    /// It is the callback of another login.
    #[error("this address belongs to another login")]
    OtherLogin,
    /// The login belongs to another seat than the account that it is for.
    #[error("this login belongs to another seat than the account; nothing was changed")]
    OtherSeat,
    /// It is over; carries how it ended.
    #[error("the login is over ({})", word(*.0))]
    Over(Standing),
    /// Another step of it is under way and takes long.
    #[error("another step of this login is under way; ask again")]
    Busy,
    /// Upstream.
    #[error(transparent)]
    Upstream(#[from] LoginError),
    /// The database, or what is stored does not open.
    #[error(transparent)]
    Account(account::Error),
}

impl From<account::Error> for Error {
    fn from(error: account::Error) -> Self {
        match error {
            account::Error::OtherSeat => Self::OtherSeat,
            account::Error::Unknown => Self::NoAccount,
            error => Self::Account(error),
        }
    }
}

impl From<db::Error> for Error {
    fn from(error: db::Error) -> Self {
        Self::Account(error.into())
    }
}

/// What the person has to do. It is shown once.
#[derive(Serialize)]
pub struct Begun {
    /// Names the login from now on.
    pub id: FlowId,
    /// How.
    pub method: Method,
    /// Where the person goes.
    pub url: String,
    /// What they type in there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user_code: Option<String>,
    /// How often it is worth asking, in seconds.
    pub interval_seconds: i32,
    /// How long they have.
    pub expires_at: Timestamp,
}

/// Logs accounts in. Cheap to clone.
#[derive(Clone)]
pub struct Logins(Arc<Inner>);

struct Inner {
    accounts: Accounts,
    client: reqwest::Client,
    auth_url: String,
    tasks: Tasks,
}

impl Logins {
    /// With a client of its own.
    ///
    /// # Errors
    /// If the CA file cannot be read.
    pub fn new(
        config: &config::Upstream,
        accounts: &Accounts,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        Ok(Self(Arc::new(Inner {
            accounts: accounts.clone(),
            client: super::client(config)?,
            auth_url: config.auth_url.clone(),
            tasks: tasks.clone(),
        })))
    }

    /// Begins a login; with `wanted`, one that only that account's seat can finish.
    ///
    /// # Errors
    /// [`Error::NoAccount`], [`Error::Upstream`], or of the database.
    pub async fn begin(
        &self,
        method: Method,
        wanted: Option<AccountId>,
        label: Option<&str>,
    ) -> Result<Begun, Error> {
        let Inner {
            accounts,
            client,
            auth_url,
            ..
        } = &*self.0;
        let (flow, url, user_code) = match method {
            Method::Browser => {
                let pkce = Pkce::draw();
                let new = NewFlow {
                    method,
                    secrets: &[(VERIFIER, &pkce.verifier)],
                    state: Some(&pkce.state),
                    interval: Duration::ZERO,
                    lifetime: BROWSER_TIME,
                    wanted,
                    label,
                };
                let flow = accounts.begin_flow(&new).await?;
                (flow, pkce.authorize_url(auth_url), None)
            }
            Method::Device => {
                let device = oauth::device_begin(client, auth_url).await?;
                let new = NewFlow {
                    method,
                    secrets: &[
                        (DEVICE, &device.device_auth_id),
                        (USER_CODE, &device.user_code),
                    ],
                    state: None,
                    interval: device.interval,
                    lifetime: device.lifetime,
                    wanted,
                    label,
                };
                let flow = accounts.begin_flow(&new).await?;
                let code = secrecy::ExposeSecret::expose_secret(&device.user_code).to_owned();
                (flow, oauth::device_url(auth_url), Some(code))
            }
        };
        Ok(Begun {
            id: flow.id,
            method,
            url,
            user_code,
            interval_seconds: flow.interval_seconds.max(1),
            expires_at: flow.expires_at,
        })
    }

    /// Where a login stands. A device's is asked after upstream, no more often than upstream wants, however many ask here.
    ///
    /// # Errors
    /// [`Error::Unknown`], or of the database.
    pub async fn status(&self, id: FlowId) -> Result<Flow, Error> {
        let flow = self.flow(id).await?;
        if flow.status != Standing::Pending || flow.method != Method::Device {
            return Ok(flow);
        }
        let Some(held) = self.0.accounts.claim_flow(id, CLAIM).await? else {
            return Ok(flow);
        };
        let step = {
            let inner = Arc::clone(&self.0);
            async move { inner.kept(&held, inner.poll(&held)).await }
        };
        // Why it failed is in the row.
        if let Ok(Err(error)) = self.0.tasks.spawn("login", step).await {
            tracing::warn!(login = %id, %error, "a login is not finished");
        }
        self.flow(id).await
    }

    /// Finishes a browser's login with the address that its person brings back. Once it has succeeded it does so again.
    ///
    /// # Errors
    /// [`Error`]. After [`Error::Upstream`] the person may try again at the same address.
    pub async fn complete(&self, id: FlowId, callback: &str) -> Result<Flow, Error> {
        let callback = Callback::parse(callback).ok_or(Error::NoCallback)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let flow = self.flow(id).await?;
            if !self.0.accounts.is_state_of(id, &callback.state).await? {
                return Err(Error::OtherLogin);
            }
            match flow.status {
                Standing::Succeeded => return Ok(flow),
                Standing::Pending => {}
                over => return Err(Error::Over(over)),
            }
            if let Some(held) = self.0.accounts.claim_flow(id, CLAIM).await? {
                let (inner, code) = (Arc::clone(&self.0), callback.code);
                let step = async move { inner.kept(&held, inner.spend(&held, code)).await };
                let spent = self.0.tasks.spawn("login", step).await;
                spent.map_err(|_| Error::Busy)??;
                return self.flow(id).await;
            }
            if Instant::now() > deadline {
                return Err(Error::Busy);
            }
            sleep(LOOK).await;
        }
    }

    /// Calls a login off, unless it is over.
    ///
    /// # Errors
    /// [`Error::Unknown`], or of the database.
    pub async fn cancel(&self, id: FlowId) -> Result<Flow, Error> {
        self.0.accounts.cancel_flow(id).await?;
        self.flow(id).await
    }

    async fn flow(&self, id: FlowId) -> Result<Flow, Error> {
        self.0.accounts.flow(id).await?.ok_or(Error::Unknown)
    }
}

impl Inner {
    /// Takes a step, which is ours until it ends.
    async fn kept<T>(&self, held: &Held, step: impl Future<Output = T>) -> T {
        let renew = || async {
            if let Err(error) = self.accounts.renew_flow(held, CLAIM).await {
                tracing::debug!(login = %held.id, %error, "a claim of a login may end early");
            }
        };
        kept(CLAIM / 3, renew, step).await
    }

    /// Asks after a device's login, and finishes it if it is approved.
    async fn poll(&self, held: &Held) -> Result<(), Error> {
        let (Some(device), Some(user_code)) = (held.secret(DEVICE), held.secret(USER_CODE)) else {
            return Ok(self.accounts.fail_flow(held, "secrets_lost").await?);
        };
        let asked = oauth::device_ask(&self.client, &self.auth_url, &device, &user_code).await;
        let tokens = match asked {
            Ok(Approval::Pending) => {
                return Ok(self
                    .accounts
                    .release_flow(held, None, Duration::ZERO)
                    .await?);
            }
            Ok(Approval::SlowDown) => {
                return Ok(self.accounts.release_flow(held, None, SLOWER).await?);
            }
            Ok(Approval::Tokens(tokens)) => Ok(tokens),
            Ok(Approval::Code(code, verifier)) => {
                oauth::spend_device(&self.client, &self.auth_url, &code, &verifier).await
            }
            Err(error) => Err(error),
        };
        self.finish(held, tokens).await
    }

    /// Spends a browser's code and finishes the login.
    async fn spend(&self, held: &Held, code: Result<SecretString, String>) -> Result<(), Error> {
        let tokens = match (code, held.secret(VERIFIER)) {
            (Ok(code), Some(verifier)) => {
                oauth::spend_browser(&self.client, &self.auth_url, &code, &verifier).await
            }
            (Err(code), _) => Err(LoginError::Refused(code)),
            (Ok(_), None) => Err(LoginError::Refused("secrets_lost".to_owned())),
        };
        self.finish(held, tokens).await
    }

    /// A refusal ends a device's login, whose code it judges. A browser's person may have pasted an old address and can try again.
    async fn finish(&self, held: &Held, tokens: Result<Tokens, LoginError>) -> Result<(), Error> {
        let stored = match tokens {
            Ok(tokens) => match AuthFile::issued(tokens) {
                Ok(login) => self.store(held, &login).await,
                Err(_) => {
                    self.accounts.fail_flow(held, "anonymous").await?;
                    let refused = LoginError::Refused("anonymous".to_owned());
                    return Err(refused.into());
                }
            },
            Err(error) => {
                let word = match &error {
                    LoginError::Refused(code) if !code.is_empty() => code.as_str(),
                    LoginError::Refused(_) | LoginError::NoDevices => "refused",
                    LoginError::Unreachable(_) => "upstream_unreachable",
                };
                let again = held.secret(VERIFIER).is_some() && word != "access_denied";
                match error {
                    LoginError::Refused(_) if !again => self.accounts.fail_flow(held, word).await?,
                    _ => {
                        let none = Duration::ZERO;
                        self.accounts.release_flow(held, Some(word), none).await?;
                    }
                }
                return Err(error.into());
            }
        };
        match stored {
            Ok(imported) => {
                tracing::info!(account_id = %imported.id, created = imported.created, "an account was logged in");
                Ok(())
            }
            Err(error) => {
                let word = match &error {
                    account::Error::OtherSeat => "other_seat",
                    account::Error::Unknown => "no_such_account",
                    // The row says how; perhaps by this very step, and Postgres could not tell us.
                    account::Error::Over => {
                        let flow = self.accounts.flow(held.id).await?;
                        return match flow.ok_or(Error::Unknown)?.status {
                            Standing::Succeeded => Ok(()),
                            Standing::Pending => Err(Error::Busy),
                            over => Err(Error::Over(over)),
                        };
                    }
                    _ => "not_stored",
                };
                self.accounts.fail_flow(held, word).await?;
                Err(error.into())
            }
        }
    }

    /// Stores a login, whose code is spent: to give up is to lose it.
    async fn store(&self, held: &Held, login: &AuthFile) -> Result<Imported, account::Error> {
        let deadline = Instant::now() + STORING;
        loop {
            match self.accounts.finish_flow(held, login).await {
                Err(account::Error::Db(error))
                    if error.is_passing() && Instant::now() < deadline =>
                {
                    tracing::warn!(login = %held.id, %error, "a login cannot be stored yet");
                }
                done => return done,
            }
            sleep(LOOK).await;
        }
    }
}

fn word(standing: Standing) -> &'static str {
    match standing {
        Standing::Pending => "pending",
        Standing::Succeeded => "succeeded",
        Standing::Failed => "failed",
        Standing::Cancelled => "cancelled",
        Standing::Expired => "expired",
    }
}

//! Everything that leaves this process for the upstream: connections, fresh credentials, HTTP and WebSocket. It knows accounts, not
//! clients, and keeps the [`View`] that selection reads.

mod catalogue;
mod claim;
pub mod credential;
pub mod http;
pub mod login;
pub mod oauth;
mod refresh;
mod usage;
mod view;
pub mod websocket;

use std::{sync::Arc, time::Duration};

use ::http::{HeaderMap, HeaderValue, header};
use anyhow::Context as _;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use secrecy::ExposeSecret as _;
use tokio::sync::watch;

pub use self::refresh::Refreshed;
use self::{
    catalogue::Catalogue,
    credential::{Credential, Credentials},
    refresh::Flights,
};
use crate::{
    account::Accounts,
    bus::Bus,
    config,
    db::{Clock, Db},
    ids::AccountId,
    poll::Polls,
    protocol::{failure::Failure, limits::Family},
    quota::Quota,
    routing::View,
    task::Tasks,
};

/// Deadlines towards the upstream, each with its own name in errors. Our own keep-alives never reset them.
pub mod deadline {
    use std::time::Duration;

    /// TCP and TLS.
    pub const CONNECT: Duration = Duration::from_secs(8);
    /// From the sent request to the head of the answer.
    pub const HEADERS: Duration = Duration::from_secs(60);
    /// From the head of the answer to the first event.
    pub const FIRST_EVENT: Duration = Duration::from_secs(60);
    /// Between two events.
    pub const IDLE: Duration = Duration::from_secs(300);
    /// A whole turn; less than what the sweep takes for abandoned.
    pub const TOTAL: Duration = Duration::from_secs(2 * 3600);
}

/// No document of upstream's is larger.
const LARGEST: usize = 4 << 20;
/// The longest that is waited for the view to show what this replica has learnt; some 20 ms are usual.
const VIEW_LAG: Duration = Duration::from_secs(1);

/// Why nothing came back: with the certainty that nothing was sent, or without.
#[derive(Debug)]
pub enum Unsent {
    /// The connection failed.
    Nothing(Failure),
    /// The request may have arrived.
    Perhaps(Failure),
}

impl Unsent {
    /// The failure, whether or not something was sent.
    #[must_use]
    pub fn failure(self) -> Failure {
        let (Self::Nothing(failure) | Self::Perhaps(failure)) = self;
        failure
    }
}

/// The way out. Cheap to clone.
#[derive(Clone)]
pub struct Upstream {
    client: reqwest::Client,
    base: Arc<str>,
    credentials: Credentials,
    quota: Quota,
    accounts: Accounts,
    catalogue: Catalogue,
    flights: Flights,
    polls: Polls,
    view: watch::Receiver<Arc<View>>,
    merges: watch::Receiver<view::Merges>,
    clock: Clock,
    transport: config::Transport,
}

impl Upstream {
    /// Connects the parts and builds the first view.
    ///
    /// # Errors
    /// If the CA file cannot be read or the database not be asked.
    pub async fn start(
        config: &config::Upstream,
        db: &Db,
        accounts: &Accounts,
        quota: &Quota,
        bus: &Bus,
        tasks: &Tasks,
    ) -> anyhow::Result<Self> {
        let client = client(config)?;
        let credentials = Credentials::new(
            accounts.clone(),
            client.clone(),
            &config.auth_url,
            db.clock().clone(),
            bus,
            tasks,
        );
        let weights = config.plan_weights.clone();
        let (view, merges) =
            view::keep(accounts.clone(), quota.clone(), weights, bus, tasks).await?;
        let catalogue = Catalogue::keep(accounts.clone(), bus, tasks).await?;
        Ok(Self {
            client,
            base: config.url.as_str().into(),
            credentials,
            quota: quota.clone(),
            accounts: accounts.clone(),
            catalogue,
            flights: Flights::default(),
            polls: Polls::new(db.clone()),
            view,
            merges,
            clock: db.clock().clone(),
            transport: config.transport,
        })
    }

    /// The pool as it is known now.
    #[must_use]
    pub fn view(&self) -> Arc<View> {
        Arc::clone(&self.view.borrow())
    }

    /// The account that this one is part of now; itself, unless it was merged away.
    #[must_use]
    pub fn canonical(&self, account: AccountId) -> AccountId {
        self.merges
            .borrow()
            .get(&account)
            .copied()
            .unwrap_or(account)
    }

    /// Waits until the view shows an account blocked, so that the next choice knows what the last attempt learnt.
    pub async fn shows_block(&self, account: AccountId, family: &Family) {
        let now = self.now();
        let mut view = self.view.clone();
        let blocked = view.wait_for(|view| {
            view.account(account).is_none_or(|account| {
                let mut blocks = account.blocks.iter();
                blocks.any(|block| block.family == family.as_str() && block.until > now)
            })
        });
        // A block that has passed already is never shown.
        drop(tokio::time::timeout(VIEW_LAG, blocked).await);
    }

    /// Notes a failure that is the account's fault: for a while it ranks behind the others.
    pub fn penalise(&self, account: AccountId) {
        let now = self.now();
        let view = self.view.borrow();
        let known = view.account(account);
        if let Some(until) = known.and_then(|account| account.load.penalty.strike(now)) {
            let seconds = until - now;
            tracing::warn!(account_id = %account, seconds, "an account fails; it is the last choice for a while");
        }
    }

    /// Notes that the account has served.
    pub fn lift_penalty(&self, account: AccountId) {
        if let Some(account) = self.view.borrow().account(account) {
            account.load.penalty.lift();
        }
    }

    /// Tokens that upstream takes.
    #[must_use]
    pub fn credentials(&self) -> &Credentials {
        &self.credentials
    }

    /// The database's clock.
    #[must_use]
    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    fn now(&self) -> i64 {
        self.clock.now().as_second()
    }

    /// How turns travel.
    #[must_use]
    pub fn transport(&self) -> config::Transport {
        self.transport
    }
}

/// The one client of all egress: system proxies, HTTP/1.1 (a stream has its connection to itself), no redirects, no hidden retries.
///
/// # Errors
/// If the CA file cannot be read.
pub fn client(config: &config::Upstream) -> anyhow::Result<reqwest::Client> {
    let mut roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    if let Some(path) = &config.ca_file {
        let read = || format!("DRAWBRIDGE_CA_FILE: cannot read {}", path.display());
        for certificate in CertificateDer::pem_file_iter(path).with_context(read)? {
            roots
                .add(certificate.with_context(read)?)
                .with_context(read)?;
        }
    }
    let tls =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .context("TLS versions")?
            .with_root_certificates(roots)
            .with_no_client_auth();
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .http1_only()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .connect_timeout(deadline::CONNECT)
        .tcp_keepalive(Duration::from_secs(30))
        .pool_idle_timeout(Duration::from_secs(60))
        .build()
        .context("the upstream client")
}

/// The body of an answer that is read whole; a larger one is cut, so that it is no document any more.
async fn bounded(mut response: reqwest::Response) -> reqwest::Result<Vec<u8>> {
    let mut body = Vec::new();
    while body.len() < LARGEST
        && let Some(chunk) = response.chunk().await?
    {
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// Puts an account's credential on a request.
fn authorize(headers: &mut HeaderMap, credential: &Credential) {
    let mut bearer = HeaderValue::try_from(format!("Bearer {}", credential.access.expose_secret()))
        .unwrap_or_else(|_| HeaderValue::from_static("Bearer"));
    bearer.set_sensitive(true);
    headers.insert(header::AUTHORIZATION, bearer);
    if let Some(id) = credential
        .chatgpt_account_id
        .as_deref()
        .and_then(|id| HeaderValue::from_str(id).ok())
    {
        headers.insert("chatgpt-account-id", id);
    }
}

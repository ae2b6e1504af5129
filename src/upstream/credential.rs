//! Tokens that upstream takes, for every account of the pool.
//!
//! Opened credentials are kept in memory, and read again once something about accounts has changed; while the database does not tell, what
//! was read before will do. A refresh token can be spent once: however many callers need fresh tokens, on however many replicas, one task
//! exchanges it under a claim, outlives the callers, and stores the result before anybody uses it. Rows carry a generation; whoever waited
//! or lost a race adopts the newer one. It knows accounts, not requests, and what happens to an account whose login was refused is decided
//! by the generation that was refused.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, Shared},
    stream,
};
use jiff::{SignedDuration, Timestamp};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    claim::kept,
    oauth::{self, RefreshError},
};
use crate::{
    account::{self, Accounts, Claim, Stored, Tokens},
    bus::{Bus, Topic},
    db::{self, Clock},
    ids::AccountId,
    routing::Lifecycle,
    task::Tasks,
    telemetry,
};

/// Tokens are refreshed this long before they expire.
const LEAD: SignedDuration = SignedDuration::from_mins(5);
/// ... or when they are this old: a refresh token that is never used ends.
const AGE: SignedDuration = SignedDuration::from_hours(8 * 24);
/// A token that could not be refreshed is used until this long before it expires.
const MARGIN: SignedDuration = SignedDuration::from_secs(30);
/// After an exchange that did not help there is no other for this long.
const PAUSE: SignedDuration = SignedDuration::from_secs(5);
/// ... and for this long after a refusal by a word that nobody knows: whatever is wrong with everybody's exchanges is over by then.
const DOUBT: SignedDuration = SignedDuration::from_mins(5);
/// How long an exchange stays one replica's after that has died; a living one renews its claim.
const CLAIM: Duration = Duration::from_secs(5);
/// How often a replica looks whether the exchange of another has ended, and how long it does.
const LOOK: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the database may take to say what it holds, and to say it again.
const READ: Duration = Duration::from_secs(5);
const READ_AGAIN: Duration = Duration::from_secs(1);
/// Logins that are kept fresh at once: an endpoint that hangs keeps each for many seconds.
const AT_ONCE: usize = 4;
/// How long a refused replica waits for a peer that may have won the exchange to store its result.
const RIVAL: Duration = Duration::from_secs(1);
/// Between two tries to store fresh tokens, doubled each time.
const STORE_PAUSE: Duration = Duration::from_millis(50);
const STORE_PAUSE_MAX: Duration = Duration::from_secs(30);

/// What a request needs to speak for an account.
#[derive(Clone, Debug)]
pub struct Credential {
    /// Of the stored row; grows with every rotation.
    pub generation: i64,
    /// The bearer token.
    pub access: SecretString,
    /// The workspace, as upstream names it.
    pub chatgpt_account_id: Option<String>,
}

/// Which credential will do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// One that has not expired, as far as we know.
    Any,
    /// A newer one than this generation: upstream refused it.
    NotGeneration(i64),
}

/// Why there is no credential.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CredentialError {
    /// The account does not exist (any more).
    #[error("no such account")]
    Unknown,
    /// Upstream refused the account's login.
    #[error("the account needs a new login")]
    LoginRequired,
    /// The token endpoint could not be reached or did not help.
    #[error("the token endpoint does not help at present")]
    Transient,
    /// What is stored could not be read or opened, or fresh tokens not be stored.
    #[error("the stored credential cannot be used: {0}")]
    Db(Arc<account::Error>),
}

impl CredentialError {
    /// Whether only a new login helps.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Unknown | Self::LoginRequired)
    }

    /// Whether the database was away, or busy.
    fn is_passing(&self) -> bool {
        matches!(self, Self::Db(error) if error.is_passing())
    }
}

impl From<account::Error> for CredentialError {
    fn from(error: account::Error) -> Self {
        Self::Db(Arc::new(error))
    }
}

impl From<db::Error> for CredentialError {
    fn from(error: db::Error) -> Self {
        account::Error::from(error).into()
    }
}

/// The credentials of the pool. Clones share what is known.
#[derive(Clone)]
pub struct Credentials(Arc<Inner>);

impl Credentials {
    /// Starts with nothing in memory and follows what changes about accounts. `auth_url` has no trailing slash.
    #[must_use]
    pub fn new(
        accounts: Accounts,
        client: reqwest::Client,
        auth_url: &str,
        clock: Clock,
        bus: &Bus,
        tasks: &Tasks,
    ) -> Self {
        let known = Mutex::default();
        let inner = Arc::new(Inner {
            accounts,
            client,
            auth_url: auth_url.into(),
            clock,
            tasks: tasks.clone(),
            known,
        });
        let mut moved = bus.subscribe(Topic::Accounts);
        let (follower, stop) = (Arc::clone(&inner), tasks.stopping());
        tasks.essential("credentials", async move {
            let follow = async {
                while moved.changed().await.is_some() {
                    follower.forget();
                }
            };
            stop.run_until_cancelled(follow).await;
        });
        Self(inner)
    }

    /// A credential for an account, refreshed if need be. Waits for an exchange only if there is no good one; may be cancelled at any time.
    ///
    /// # Errors
    /// If there is none: see [`CredentialError`].
    pub async fn fresh(
        &self,
        account: AccountId,
        freshness: Freshness,
    ) -> Result<Arc<Credential>, CredentialError> {
        loop {
            let credential = match self.0.look(account, freshness) {
                Found::Good(credential) => return Ok(credential),
                Found::Old(old, flight) => match timeout(READ_AGAIN, flight).await {
                    Ok(Err(error)) if !error.is_passing() => return Err(error),
                    Ok(Ok(newer)) => newer,
                    Ok(Err(_)) | Err(_) => return Ok(old),
                },
                Found::Nothing(flight) => flight.await?,
            };
            // A flight that was under way may have wanted less.
            if freshness.accepts(credential.generation) {
                return Ok(credential);
            }
        }
    }
}

impl Credentials {
    /// Refreshes what is due, also of accounts that nobody uses and of paused ones: a login that is left alone ends.
    ///
    /// # Errors
    /// If the database cannot be asked which are due; what became of each is logged where it happened.
    pub async fn keep_fresh(&self) -> Result<(), db::Error> {
        let due = self.0.accounts.due(LEAD.unsigned_abs(), AGE.unsigned_abs());
        let renewed = stream::iter(due.await?).for_each_concurrent(AT_ONCE, |account| async move {
            let any = Freshness::Any;
            let flight = self.0.flight(&mut self.0.known(), account, any, true);
            if let Err(error) = flight.await {
                tracing::debug!(account_id = %account, %error, "an account's login is not kept fresh");
            }
        });
        renewed.await;
        Ok(())
    }
}

impl Freshness {
    fn accepts(self, generation: i64) -> bool {
        match self {
            Self::Any => true,
            Self::NotGeneration(refused) => generation > refused,
        }
    }
}

/// A credential and its times.
#[derive(Clone)]
struct Opened {
    credential: Arc<Credential>,
    refresh_at: Timestamp,
    usable_until: Timestamp,
}

impl Opened {
    fn new(stored: &Stored) -> Self {
        let expires = stored.access_expires_at.unwrap_or(Timestamp::MAX);
        Self {
            credential: Arc::new(Credential {
                generation: stored.generation,
                access: stored.access.clone(),
                chatgpt_account_id: stored.chatgpt_account_id.clone(),
            }),
            refresh_at: refresh_at(stored.refreshed_at, expires),
            usable_until: expires.saturating_sub(MARGIN).unwrap_or(Timestamp::MIN),
        }
    }

    fn is_good(&self, now: Timestamp) -> bool {
        now < self.refresh_at.max(self.usable_until)
    }
}

/// A token that lives shortly is not refreshed before half its life.
fn refresh_at(refreshed: Timestamp, expires: Timestamp) -> Timestamp {
    let lead = LEAD
        .min(expires.duration_since(refreshed) / 2)
        .max(SignedDuration::ZERO);
    let aged = refreshed.saturating_add(AGE).unwrap_or(Timestamp::MAX);
    expires
        .saturating_sub(lead)
        .unwrap_or(Timestamp::MIN)
        .min(aged)
}

/// One look-up, and the exchange if there must be one, in a task of its own; all who wait for it share it.
type Flight = Shared<BoxFuture<'static, Result<Arc<Credential>, CredentialError>>>;

/// What is known of an account's credential.
enum Found {
    Good(Arc<Credential>),
    /// It was good before something about accounts changed.
    Old(Arc<Credential>, Flight),
    Nothing(Flight),
}

#[derive(Default)]
struct Slot {
    /// What was last read, and in which epoch.
    opened: Option<(u64, Opened)>,
    flight: Option<Flight>,
    /// The generation whose exchange did not help, and until when it is left alone.
    failed: Option<(i64, Timestamp)>,
}

#[derive(Default)]
struct Known {
    /// How often accounts have changed: what was read before a change is read again after it.
    epoch: u64,
    slots: HashMap<AccountId, Slot>,
}

struct Inner {
    accounts: Accounts,
    client: reqwest::Client,
    auth_url: Box<str>,
    clock: Clock,
    tasks: Tasks,
    known: Mutex<Known>,
}

impl Inner {
    /// What is in memory, and the flight that fetches what is not. One that is good but due is renewed meanwhile.
    fn look(self: &Arc<Self>, account: AccountId, freshness: Freshness) -> Found {
        let now = self.clock.now();
        let mut known = self.known();
        let current = known.epoch;
        let slot = known.slots.entry(account).or_default();
        // What upstream refused to one caller is not given to the next.
        slot.opened
            .take_if(|(_, opened)| !freshness.accepts(opened.credential.generation));
        let Some((epoch, opened)) = slot
            .opened
            .as_ref()
            .filter(|(_, opened)| opened.is_good(now))
        else {
            return Found::Nothing(self.flight(&mut known, account, freshness, false));
        };
        let credential = Arc::clone(&opened.credential);
        if *epoch != current {
            return Found::Old(
                credential,
                self.flight(&mut known, account, freshness, false),
            );
        }
        if now >= opened.refresh_at && !failed_lately(slot.failed, credential.generation, now) {
            drop(self.flight(&mut known, account, freshness, true));
        }
        Found::Good(credential)
    }

    /// The flight that is under way for an account, or a new one.
    fn flight(
        self: &Arc<Self>,
        known: &mut Known,
        account: AccountId,
        freshness: Freshness,
        renew: bool,
    ) -> Flight {
        let epoch = known.epoch;
        let slot = known.slots.entry(account).or_default();
        let begin = || {
            let inner = Arc::clone(self);
            let task = self.tasks.spawn("credential", async move {
                let landing = Landing(inner, account);
                landing.0.fetch(account, freshness, renew, epoch).await
            });
            task.map(|ended| ended.unwrap_or(Err(CredentialError::Transient)))
                .boxed()
                .shared()
        };
        slot.flight.get_or_insert_with(begin).clone()
    }

    /// Reads what is stored, and refreshes it if it is not good; with `renew`, also if it is due.
    async fn fetch(
        &self,
        account: AccountId,
        freshness: Freshness,
        renew: bool,
        epoch: u64,
    ) -> Result<Arc<Credential>, CredentialError> {
        let read = self.read(account).await;
        if read.as_ref().is_err_and(CredentialError::is_final) {
            self.known().slots.entry(account).or_default().opened = None;
        }
        let stored = read?;
        let now = self.clock.now();
        let mut opened = Opened::new(&stored);
        let good = freshness.accepts(stored.generation) && opened.is_good(now);
        if !good || (renew && now >= opened.refresh_at) {
            match self.exchange(account, &stored).await {
                Ok(newer) => opened = newer,
                // As long as it is good, an old token is better than none.
                Err(error)
                    if !error.is_final()
                        && freshness.accepts(stored.generation)
                        && self.clock.now() < opened.usable_until => {}
                Err(error) => return Err(error),
            }
        }
        let credential = Arc::clone(&opened.credential);
        self.known().slots.entry(account).or_default().opened = Some((epoch, opened));
        Ok(credential)
    }

    /// Has the stored refresh token spent, by this replica or by another, and yields what is stored afterwards: always a newer generation.
    async fn exchange(
        &self,
        account: AccountId,
        stored: &Stored,
    ) -> Result<Opened, CredentialError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.clock.now();
            let slot = self.known().slots.get(&account).map(|slot| slot.failed);
            if failed_lately(slot.flatten(), stored.generation, now) {
                return Err(CredentialError::Transient);
            }
            let asked = Instant::now();
            let claim = self.accounts.claim(stored.id, CLAIM).await?;
            // Only what is read under the claim may be spent: a peer may have done it since.
            let after = self.read(account).await;
            match (claim, after) {
                (Claim::Mine(claim), Ok(after))
                    if after.generation == stored.generation && asked.elapsed() < CLAIM / 2 =>
                {
                    let spent = self.spend(account, &after, claim);
                    let renew = || async {
                        if let Err(error) = self.accounts.renew_claim(stored.id, claim, CLAIM).await
                        {
                            tracing::debug!(account_id = %stored.id, %error, "a claim of a refresh token may end early");
                        }
                    };
                    return kept(CLAIM / 3, renew, spent).await;
                }
                (claim, after) => {
                    let after = after?;
                    if after.generation > stored.generation {
                        if let Claim::Mine(claim) = claim {
                            self.give_back(stored.id, claim, Ok(())).await;
                        }
                        return Ok(Opened::new(&after));
                    }
                    // A claim of ours that came too late ends by itself: what it says of earlier exchanges stays.
                    if claim == Claim::Failed {
                        self.note_failed(account, stored.generation, PAUSE);
                        return Err(CredentialError::Transient);
                    }
                    if Instant::now() > deadline {
                        return Err(CredentialError::Transient);
                    }
                }
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Spends a refresh token whose exchange is ours.
    async fn spend(
        &self,
        account: AccountId,
        stored: &Stored,
        claim: Uuid,
    ) -> Result<Opened, CredentialError> {
        let (id, generation) = (stored.id, stored.generation);
        let ask = || oauth::refresh(&self.client, &self.auth_url, &stored.refresh);
        let mut answer = ask().await;
        if matches!(
            answer,
            Err(RefreshError::Transient {
                dispatched: false,
                ..
            })
        ) {
            answer = ask().await;
        }
        if let Err(RefreshError::Unknown { code }) = &answer
            && self.is_believed(id, claim, generation).await
        {
            answer = Err(RefreshError::Refused {
                code: code.clone(),
                lifecycle: Lifecycle::ReauthRequired,
            });
        }
        let pause = match answer {
            Err(RefreshError::Unknown { .. }) => DOUBT,
            _ => PAUSE,
        };
        telemetry::refreshed(match answer {
            Ok(_) => "renewed",
            Err(RefreshError::Refused { .. }) => "refused",
            Err(RefreshError::Transient { .. } | RefreshError::Unknown { .. }) => "failed",
        });
        let ended = match answer {
            Ok(tokens) => self.store(stored, &tokens).await,
            Err(RefreshError::Refused { code, lifecycle }) => {
                tokio::time::sleep(RIVAL).await;
                let noted = self
                    .accounts
                    .set_lifecycle(id, lifecycle, &code, generation);
                if let Err(error) = noted.await {
                    tracing::warn!(account_id = %id, %error, "cannot note that a login was refused");
                }
                Ok(())
            }
            Err(error) => {
                tracing::warn!(account_id = %id, %error, "cannot refresh an account's tokens");
                self.note_failed(account, generation, pause);
                Err(CredentialError::Transient)
            }
        };
        let helped = ended.as_ref().copied().map_err(|_| pause);
        self.give_back(id, claim, helped).await;
        ended?;
        let after = self.read(account).await?;
        if after.generation > generation {
            Ok(Opened::new(&after))
        } else {
            Err(CredentialError::LoginRequired)
        }
    }

    /// Whether a refusal by a word that nobody knows counts: it is the second one in a row, and some time lies between.
    async fn is_believed(&self, id: AccountId, claim: Uuid, generation: i64) -> bool {
        let doubted = self.accounts.doubt(id, claim, generation).await;
        doubted.unwrap_or_else(|error| {
            tracing::warn!(account_id = %id, %error, "cannot note that a login was refused");
            false
        })
    }

    /// A claim that cannot be given back ends by itself.
    async fn give_back(&self, id: AccountId, claim: Uuid, helped: Result<(), SignedDuration>) {
        let given = match helped {
            Ok(()) => self.accounts.unclaim(id, claim).await,
            Err(pause) => {
                let pause = pause.unsigned_abs();
                self.accounts.unclaim_failed(id, claim, pause).await
            }
        };
        if let Err(error) = given {
            tracing::debug!(account_id = %id, %error, "a claim of a refresh token is left to end");
        }
    }

    /// Stores fresh tokens, unless somebody stored others; the token that was spent for them, imported once more, is none, whichever row it
    /// is in now. The old ones are spent, so to give up is to lose the login: it is tried for about a minute.
    async fn store(&self, spent: &Stored, tokens: &Tokens) -> Result<(), CredentialError> {
        let (mut id, mut generation, mut pause) = (spent.id, spent.generation, STORE_PAUSE);
        loop {
            let error = match self.accounts.rotate(id, generation, tokens).await {
                Ok(Some(_)) => return Ok(()),
                Ok(None) => match self.accounts.credential(id).await {
                    Ok(Some(stored))
                        if stored.refresh.expose_secret() == spent.refresh.expose_secret() =>
                    {
                        (id, generation) = (stored.id, stored.generation);
                        continue;
                    }
                    Ok(_) => return Ok(()),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if pause > STORE_PAUSE_MAX {
                tracing::error!(account_id = %id, %error, "fresh tokens are lost: they cannot be stored");
                return Err(error.into());
            }
            tracing::warn!(account_id = %id, %error, "fresh tokens cannot be stored yet");
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }

    /// Notes that the exchange of a generation did not help.
    fn note_failed(&self, account: AccountId, generation: i64, pause: SignedDuration) {
        let until = self.clock.now() + pause;
        self.known().slots.entry(account).or_default().failed = Some((generation, until));
    }

    /// What is stored of an account that may be logged in.
    async fn read(&self, account: AccountId) -> Result<Stored, CredentialError> {
        let stored = timeout(READ, self.accounts.credential(account)).await;
        let stored = stored.unwrap_or_else(|_| Err(db::Error::mute("reading a login").into()));
        let stored = stored?.ok_or(CredentialError::Unknown)?;
        match stored.lifecycle {
            Lifecycle::Active | Lifecycle::Paused => Ok(stored),
            Lifecycle::ReauthRequired | Lifecycle::Deactivated => {
                Err(CredentialError::LoginRequired)
            }
        }
    }

    fn forget(&self) {
        let now = self.clock.now();
        let mut known = self.known();
        known.epoch += 1;
        known.slots.retain(|_, slot| {
            slot.opened.take_if(|(_, opened)| !opened.is_good(now));
            let failed = slot.failed.is_some_and(|(_, until)| now < until);
            slot.opened.is_some() || slot.flight.is_some() || failed
        });
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the exchange of a generation did not help a moment ago.
fn failed_lately(failed: Option<(i64, Timestamp)>, generation: i64, now: Timestamp) -> bool {
    failed.is_some_and(|(failed, until)| failed == generation && now < until)
}

/// Ends a flight, also by a panic.
struct Landing(Arc<Inner>, AccountId);

impl Drop for Landing {
    fn drop(&mut self) {
        if let Some(slot) = self.0.known().slots.get_mut(&self.1) {
            slot.flight = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_refreshed_before_it_expires_or_gets_old() {
        const MINUTE: i64 = 60;
        const DAY: i64 = 24 * 60 * MINUTE;
        let at = |seconds: i64| Timestamp::from_second(1_800_000_000 + seconds).unwrap();
        for (expires, expected) in [
            (at(60 * MINUTE), at(55 * MINUTE)),
            (at(4 * MINUTE), at(2 * MINUTE)),
            (at(10 * DAY), at(8 * DAY)),
            (Timestamp::MAX, at(8 * DAY)),
            // It had expired when it was stored.
            (at(-MINUTE), at(-MINUTE)),
            (Timestamp::MIN, Timestamp::MIN),
        ] {
            assert_eq!(refresh_at(at(0), expires), expected, "expires {expires}");
        }
    }

    #[test]
    fn a_refused_generation_and_older_ones_are_not_taken_again() {
        for (freshness, generation, accepted) in [
            (Freshness::Any, 1, true),
            (Freshness::NotGeneration(2), 1, false),
            (Freshness::NotGeneration(2), 2, false),
            (Freshness::NotGeneration(2), 3, true),
        ] {
            assert_eq!(
                freshness.accepts(generation),
                accepted,
                "{freshness:?} {generation}"
            );
        }
    }
}

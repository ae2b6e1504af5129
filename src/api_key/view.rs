//! Every key in memory, as of a version of the bus. Grants name accounts, so the versions of these count, too.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};

use super::{AuthError, Key, store, text};
use crate::{
    bus::{Bus, Topic},
    db::{Db, Error},
    ids::ApiKeyId,
    secret::Pepper,
    task::Tasks,
};

/// Unknown keys ask for versions at most this often, together.
const PROBE: Duration = Duration::from_millis(200);
/// Between two writes of when keys were last used.
const TOUCH: Duration = Duration::from_secs(60);
/// Between two tries to read the keys.
const RETRY: Duration = Duration::from_millis(500);

/// The keys of the installation. Clones share the view.
#[derive(Clone)]
pub struct ApiKeys(Arc<Inner>);

struct Inner {
    db: Db,
    bus: Bus,
    pepper: Pepper,
    view: watch::Sender<Arc<View>>,
    probe: tokio::sync::Mutex<Option<Probe>>,
    /// Used since last written.
    used: Mutex<HashSet<ApiKeyId>>,
}

struct View {
    /// The keys are at least as new as this.
    version: Version,
    keys: HashMap<[u8; 32], Arc<Key>>,
}

/// Of the keys, and of the accounts that grants name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Version {
    keys: u64,
    accounts: u64,
}

impl Version {
    fn now(bus: &Bus) -> Self {
        Self {
            keys: bus.changes(Topic::ApiKeys),
            accounts: bus.changes(Topic::Accounts),
        }
    }

    /// Whether what was read at this version can replace what was read at the other.
    fn is_newer(self, other: Self) -> bool {
        self != other && self.keys >= other.keys && self.accounts >= other.accounts
    }
}

/// The last time an unknown key made us look.
struct Probe {
    began: Instant,
    succeeded: bool,
}

impl ApiKeys {
    /// Reads every key, and follows the bus from then on until the process stops.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn load(db: &Db, bus: &Bus, pepper: Pepper, tasks: &Tasks) -> Result<Self, Error> {
        let view = View::read(db, bus).await?;
        let keys = Self(Arc::new(Inner {
            db: db.clone(),
            bus: bus.clone(),
            pepper,
            view: watch::Sender::new(Arc::new(view)),
            probe: tokio::sync::Mutex::default(),
            used: Mutex::default(),
        }));
        let (follower, stop) = (keys.clone(), tasks.stopping());
        tasks.essential("api_keys", async move {
            stop.run_until_cancelled(follower.follow()).await;
        });
        let writer = keys.clone();
        tasks.periodic("api_keys_used", TOUCH, move || {
            let keys = writer.clone();
            async move { keys.flush().await }
        });
        Ok(keys)
    }

    /// Lets a key in. Only a well-formed key that is not in memory makes it look: at most one read of versions per 200 ms serves all of
    /// them, each one that begins after it was asked, so that a key works from the moment it exists.
    ///
    /// # Errors
    /// Why the key does not come in.
    pub async fn authenticate(&self, text: &str) -> Result<Arc<Key>, AuthError> {
        let hash = text::hash(&self.0.pepper, text).ok_or(AuthError::Malformed)?;
        let key = match self.get(&hash) {
            Some(key) => key,
            None => {
                self.look().await?;
                self.get(&hash).ok_or(AuthError::Unknown)?
            }
        };
        key.check(self.0.db.clock().now())?;
        self.used().insert(key.id);
        Ok(key)
    }

    /// A key that a peer has let in, for its own clients: by its id, and only while it is good here, too.
    ///
    /// # Errors
    /// Why the key does not come in.
    pub fn by_id(&self, id: ApiKeyId) -> Result<Arc<Key>, AuthError> {
        let view = self.0.view.borrow();
        let mut keys = view.keys.values();
        let key = keys.find(|key| key.id == id).ok_or(AuthError::Unknown)?;
        key.check(self.0.db.clock().now())?;
        Ok(Arc::clone(key))
    }

    /// Claims a refresh of a key's accounts, of which it may have one in `every`, on whichever replica. Yields how long to wait if it may not.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn claim_refresh(
        &self,
        id: ApiKeyId,
        every: Duration,
    ) -> Result<Option<Duration>, Error> {
        store::claim_refresh(&self.0.db, id, every).await
    }

    /// Whether a key was ever created; revoked ones count.
    #[must_use]
    pub fn any_created(&self) -> bool {
        !self.0.view.borrow().keys.is_empty()
    }

    /// Writes when keys were last used: once a minute, and when the process ends.
    pub async fn flush(&self) {
        let used: Vec<ApiKeyId> = self.used().drain().collect();
        if used.is_empty() {
            return;
        }
        if let Err(error) = store::touch(&self.0.db, &used).await {
            tracing::debug!(%error, "when keys were last used is not written");
            self.used().extend(used);
        }
    }

    fn get(&self, hash: &[u8; 32]) -> Option<Arc<Key>> {
        self.0.view.borrow().keys.get(hash).cloned()
    }

    /// Makes sure that the view is not older than this call, as far as the bus knows.
    async fn look(&self) -> Result<(), AuthError> {
        let asked = Instant::now();
        let mut probe = self.0.probe.lock().await;
        if let Some(last) = &*probe {
            if last.began >= asked {
                return if last.succeeded {
                    Ok(())
                } else {
                    Err(AuthError::Unavailable)
                };
            }
            sleep_until(last.began + PROBE).await;
        }
        let began = Instant::now();
        let result = async {
            self.0.bus.refresh().await?;
            if self.is_old() {
                self.reload().await?;
            }
            Ok::<_, Error>(())
        }
        .await;
        *probe = Some(Probe {
            began,
            succeeded: result.is_ok(),
        });
        result.map_err(|error| {
            tracing::warn!(%error, "an unknown key cannot be checked");
            AuthError::Unavailable
        })
    }

    async fn reload(&self) -> Result<(), Error> {
        let read = View::read(&self.0.db, &self.0.bus).await?;
        self.0.view.send_if_modified(|view| {
            let newer = read.version.is_newer(view.version);
            if newer {
                *view = Arc::new(read);
            }
            newer
        });
        Ok(())
    }

    async fn follow(&self) {
        let mut keys = self.0.bus.subscribe(Topic::ApiKeys);
        let mut accounts = self.0.bus.subscribe(Topic::Accounts);
        loop {
            // First what changed between reading and subscribing.
            while self.is_old() {
                if let Err(error) = self.reload().await {
                    tracing::warn!(%error, "the keys cannot be read");
                    sleep(RETRY).await;
                }
            }
            let changed = tokio::select! {
                version = keys.changed() => version,
                version = accounts.changed() => version,
            };
            if changed.is_none() {
                return;
            }
        }
    }

    /// Whether the bus knows of something newer than what is in memory.
    fn is_old(&self) -> bool {
        Version::now(&self.0.bus).is_newer(self.0.view.borrow().version)
    }

    fn used(&self) -> std::sync::MutexGuard<'_, HashSet<ApiKeyId>> {
        self.0.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ApiKeys")
            .field("version", &self.0.view.borrow().version)
            .finish_non_exhaustive()
    }
}

impl View {
    /// First the version, then the rows.
    async fn read(db: &Db, bus: &Bus) -> Result<Self, Error> {
        let version = Version::now(bus);
        let mut keys = HashMap::new();
        for (hash, key) in store::load(db).await? {
            if let Ok(hash) = hash.try_into() {
                keys.insert(hash, Arc::new(key));
            }
        }
        Ok(Self { version, keys })
    }
}

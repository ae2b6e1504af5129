//! This process as a member of the fleet: its incarnations, their heartbeat, and the burial of those that stopped.
//!
//! An incarnation is a row of `bridge_replicas` under a random `boot_id`. Its tombstone `dead_at` is set once: by a peer after TTL and grace
//! without heartbeats, by itself when it leaves, or by the registration of its successor. A process that finds itself buried goes on as
//! another incarnation; what the old one owned is lost to it. Before a peer may bury us we have stopped to admit turns, by our own clock.
//! The same where the database is another than the one that registered us: what it says of leases may be out of date, so all begin anew.
//!
//! It knows nothing of leases and turns.

mod step;
mod store;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use serde::Serialize;
use tokio::{
    sync::watch,
    time::{sleep_until, timeout_at},
};

use self::step::{Answer, Standing};
pub use self::store::STATEMENTS;
use crate::{
    db::{Connection, Db, Error},
    ids::BootId,
    task::Tasks,
    telemetry,
};

/// Times of the membership protocol.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// How long one is waited for; then its connection is cut, so that the next does not queue behind it.
    pub patience: Duration,
    /// How long one vouches for us with our peers.
    pub ttl: Duration,
    /// How much earlier we stop to rely on it ourselves.
    pub margin: Duration,
    /// How much longer peers wait before they bury.
    pub grace: Duration,
}

impl Timing {
    /// What `serve` uses.
    pub const FULL: Self = Self {
        heartbeat: Duration::from_secs(3),
        patience: Duration::from_secs(2),
        ttl: Duration::from_secs(15),
        margin: Duration::from_secs(3),
        grace: Duration::from_secs(2),
    };

    /// All times multiplied, for tests.
    #[must_use]
    pub fn scaled(self, by: f64) -> Self {
        Self {
            heartbeat: self.heartbeat.mul_f64(by),
            patience: self.patience.mul_f64(by),
            ttl: self.ttl.mul_f64(by),
            margin: self.margin.mul_f64(by),
            grace: self.grace.mul_f64(by),
        }
    }

    /// How long after sending it a heartbeat lets us admit turns.
    fn vouched(&self) -> Duration {
        self.ttl.saturating_sub(self.margin)
    }
}

/// Another incarnation that nobody has declared dead, as the last heartbeat saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its id.
    pub boot: BootId,
    /// Its name; need not be unique.
    pub name: String,
    /// Where it takes turns from peers; none if it takes none.
    pub endpoint: Option<String>,
    /// It takes no new work.
    pub draining: bool,
    /// Its own heartbeat had not run out.
    pub alive: bool,
}

/// What operators see of an incarnation.
#[derive(Clone, Debug, Serialize)]
pub struct Listed {
    /// Its id.
    pub boot_id: BootId,
    /// Its name.
    pub name: String,
    /// Where it takes turns from peers.
    pub endpoint: Option<String>,
    /// When it was registered.
    pub started_at: Timestamp,
    /// How long ago its last heartbeat was.
    pub heartbeat_age_seconds: f64,
    /// `alive`, `draining`, `silent` (its heartbeat has run out, nobody has buried it) or `dead`.
    pub state: String,
    /// When it was declared dead.
    pub dead_at: Option<Timestamp>,
    /// Its release; none = one that did not say.
    pub version: Option<String>,
    /// [`KeyRing::fingerprints`](crate::secret::KeyRing::fingerprints) of its ring; none as above.
    pub master_keys: Option<Vec<String>>,
}

impl Listed {
    /// Whether its process may still run: nobody has declared it dead.
    #[must_use]
    pub fn may_run(&self) -> bool {
        self.dead_at.is_none()
    }
}

/// The release of this program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// This process in the fleet. Clones share its present incarnation.
#[derive(Clone, Debug)]
pub struct Replica {
    name: String,
    endpoint: Option<String>,
    master_keys: Vec<String>,
    timing: Timing,
    db: Db,
    boot: watch::Sender<BootId>,
    standing: watch::Sender<Standing>,
    peers: watch::Sender<Arc<[Peer]>>,
    draining: Arc<AtomicBool>,
    /// Of the database that the incarnation is registered in.
    timeline: Arc<Mutex<Option<String>>>,
}

impl Replica {
    /// Registers the first incarnation. `endpoint` is the URL at which peers reach this process; none if they must not forward to it.
    /// `master_keys` are the fingerprints of its ring.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn register(
        db: &Db,
        name: &str,
        endpoint: Option<String>,
        master_keys: Vec<String>,
        timing: Timing,
    ) -> Result<Self, Error> {
        let replica = Self {
            name: name.to_owned(),
            endpoint,
            master_keys,
            timing,
            db: db.vital(),
            boot: watch::Sender::new(BootId::new()),
            standing: watch::Sender::new(Standing::Dead),
            peers: watch::Sender::new(Arc::new([])),
            draining: Arc::default(),
            timeline: Arc::default(),
        };
        let connection = replica.db.connection().await?;
        replica.reincarnate(&connection, None).await?;
        replica.look(&connection).await?;
        Ok(replica)
    }

    /// The present incarnation's id.
    #[must_use]
    pub fn boot(&self) -> BootId {
        *self.boot.borrow()
    }

    /// The same, followed: it changes when a peer had buried the incarnation before, or a standby has taken the place of the database.
    /// What that one owned is then no longer ours.
    #[must_use]
    pub fn boots(&self) -> watch::Receiver<BootId> {
        self.boot.subscribe()
    }

    /// Whether a new leased turn may begin now. If not, sockets are kept, and heartbeats tried on.
    #[must_use]
    pub fn admits(&self) -> bool {
        self.deadline()
            .is_some_and(|deadline| Instant::now() < deadline)
    }

    /// Until when new leased turns may begin, if no further heartbeat succeeds; `None` between two incarnations.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.standing.borrow().deadline()
    }

    /// The other incarnations that nobody has declared dead, as the last heartbeat saw them.
    #[must_use]
    pub fn peers(&self) -> Arc<[Peer]> {
        self.peers.borrow().clone()
    }

    /// One of them.
    #[must_use]
    pub fn peer(&self, boot: BootId) -> Option<Peer> {
        self.peers
            .borrow()
            .iter()
            .find(|peer| peer.boot == boot)
            .cloned()
    }

    /// Sends heartbeats, keeps the view of the peers and buries silent ones until the process stops.
    pub async fn beat(self, tasks: Tasks) {
        let stop = tasks.stopping();
        let mut due = Instant::now() + self.timing.heartbeat;
        while stop
            .run_until_cancelled(sleep_until(due.into()))
            .await
            .is_some()
        {
            self.round(due).await;
            // One that came too late is not made up for.
            due = (due + self.timing.heartbeat).max(Instant::now());
        }
    }

    /// Tells peers that this process takes no new work.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn drain(&self) -> Result<(), Error> {
        self.draining.store(true, Ordering::Release);
        store::drain(&self.db, self.boot()).await
    }

    /// Leaves: what is still owned by this incarnation is free at once.
    ///
    /// # Errors
    /// If the database cannot be asked; then peers bury it later.
    pub async fn leave(&self) -> Result<(), Error> {
        store::leave(&self.db, self.boot()).await
    }

    /// One heartbeat and a look around; where the incarnation is dead, the registration of the next one.
    async fn round(&self, due: Instant) {
        let (boot, ttl) = (self.boot(), self.timing.ttl);
        let mut heard = false;
        let before = *self.standing.borrow();
        if before != Standing::Dead {
            let sent = Instant::now();
            let answer = self
                .patiently("heartbeat", async |connection| {
                    let answer = store::beat(connection, boot, ttl).await?;
                    Ok(match self.has_moved(connection).await? {
                        true => Answer::Moved,
                        false => answer,
                    })
                })
                .await;
            heard = answer.is_some();
            let answer = answer.unwrap_or(Answer::Missing);
            self.standing
                .send_replace(before.after(answer, sent, &self.timing));
            match answer {
                Answer::Buried => {
                    tracing::error!(boot_id = %boot, replica = self.name, "a peer has declared this replica dead");
                    telemetry::count("drawbridge_replica_buried_total");
                }
                Answer::Moved => {
                    tracing::error!(boot_id = %boot, replica = self.name, "another database has taken over; what was committed last may be lost");
                    telemetry::count("drawbridge_database_moves_total");
                }
                Answer::InTime | Answer::Late | Answer::Missing => {}
            }
        }
        if *self.standing.borrow() == Standing::Dead {
            heard = self
                .patiently("registration", async |connection| {
                    self.reincarnate(connection, Some(boot)).await
                })
                .await
                .is_some();
        }
        if heard {
            telemetry::observe("drawbridge_heartbeat_lag_seconds", due.elapsed());
            self.patiently("look", async |connection| self.look(connection).await)
                .await;
        } else {
            telemetry::count("drawbridge_heartbeats_missed_total");
        }
    }

    /// Whether the database is another than the one that has registered us.
    async fn has_moved(&self, connection: &Connection) -> Result<bool, Error> {
        let Some(before) = self.timeline().clone() else {
            return Ok(false);
        };
        let now = store::timeline(connection).await?;
        Ok(now.is_some_and(|now| now != before))
    }

    fn timeline(&self) -> MutexGuard<'_, Option<String>> {
        self.timeline.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs statements, unless they take too long. `None` if they did, or failed.
    async fn patiently<T>(
        &self,
        what: &'static str,
        work: impl AsyncFnOnce(&Connection) -> Result<T, Error>,
    ) -> Option<T> {
        let limit = (Instant::now() + self.timing.patience).into();
        let result = timeout_at(limit, async {
            let connection = self.db.connection().await?;
            work(&connection).await
        });
        match result.await {
            Ok(Ok(value)) => return Some(value),
            Ok(Err(error)) => tracing::warn!(%error, "no {what}"),
            Err(_) => tracing::warn!("no {what}: the database does not answer in time"),
        }
        None
    }

    /// Becomes another incarnation; `before` is declared dead in the same statement, if nobody has yet.
    async fn reincarnate(
        &self,
        connection: &Connection,
        before: Option<BootId>,
    ) -> Result<(), Error> {
        let (boot, sent) = (BootId::new(), Instant::now());
        let new = store::New {
            boot,
            name: &self.name,
            endpoint: self.endpoint.as_deref(),
            ttl: self.timing.ttl,
            draining: self.draining.load(Ordering::Acquire),
            version: VERSION,
            master_keys: &self.master_keys,
            before,
        };
        let timeline = store::timeline(connection).await?;
        store::register(connection, new).await?;
        *self.timeline() = timeline;
        tracing::info!(boot_id = %boot, replica = self.name, "registered");
        // In this order: nothing is admitted in the name of the one before.
        self.boot.send_replace(boot);
        self.standing
            .send_replace(Standing::registered(sent, &self.timing));
        Ok(())
    }

    /// Learns of the peers and of the database's time, and buries who has been silent for too long.
    async fn look(&self, connection: &Connection) -> Result<(), Error> {
        self.db.clock().learn(connection).await?;
        let may_bury = self
            .standing
            .borrow()
            .may_bury(Instant::now(), &self.timing);
        if may_bury {
            let buried = store::bury(connection, self.boot(), self.timing.grace).await?;
            if buried > 0 {
                tracing::warn!(buried, "replicas without heartbeat were declared dead");
            }
        }
        let peers = store::peers(connection, self.boot()).await?;
        self.peers.send_replace(peers.into());
        Ok(())
    }
}

/// Every incarnation that is not forgotten yet, the newest first.
///
/// # Errors
/// If the database cannot be asked.
pub async fn list(db: &Db, timing: Timing) -> Result<Vec<Listed>, Error> {
    store::list(db, timing.ttl).await
}

/// Forgets incarnations that have been dead for longer than `age`; yields how many. Their leases turn free.
///
/// # Errors
/// If the database cannot be asked.
pub async fn prune(db: &Db, age: Duration) -> Result<u64, Error> {
    store::prune(db, age).await
}

//! This process as a member of the fleet: one incarnation, its heartbeat, and the burial of incarnations that stopped.
//!
//! An incarnation is a row of `bridge_replicas` under a random `boot_id`. Its tombstone `dead_at` is set once: by a peer after TTL and grace
//! without heartbeats, or by itself when it leaves. Turns that a dead incarnation left open are settled by whoever finds them.

mod store;

use std::time::{Duration, Instant};

pub use self::store::STATEMENTS;
use crate::{
    db::{Db, Error},
    ids::BootId,
    task::Tasks,
};

/// Times of the membership protocol; tests run them at a tenth.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between two heartbeats.
    pub heartbeat: Duration,
    /// How long one heartbeat vouches for us.
    pub ttl: Duration,
    /// How much longer peers wait before they bury.
    pub grace: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_secs(3),
            ttl: Duration::from_secs(15),
            grace: Duration::from_secs(2),
        }
    }
}

/// This incarnation.
#[derive(Clone, Debug)]
pub struct Replica {
    boot: BootId,
    name: String,
    timing: Timing,
    db: Db,
}

impl Replica {
    /// Registers a new incarnation.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn register(db: &Db, name: &str, timing: Timing) -> Result<Self, Error> {
        let replica = Self {
            boot: BootId::new(),
            name: name.to_owned(),
            timing,
            db: db.vital(),
        };
        store::register(&replica.db, replica.boot, name, timing.ttl).await?;
        Ok(replica)
    }

    /// This incarnation's id.
    #[must_use]
    pub fn boot(&self) -> BootId {
        self.boot
    }

    /// Sends heartbeats and buries silent peers until the process stops. Ends early only if a peer has buried us.
    pub async fn beat(self, tasks: Tasks) {
        let stop = tasks.stopping();
        // Only a replica whose own heartbeats have had no gap for TTL + grace may bury: a database outage buries nobody.
        let mut unbroken_since = Instant::now();
        while stop
            .run_until_cancelled(tokio::time::sleep(self.timing.heartbeat))
            .await
            .is_some()
        {
            match tokio::time::timeout(
                Duration::from_secs(2),
                store::beat(&self.db, self.boot, self.timing.ttl),
            )
            .await
            {
                Ok(Ok(true)) => {}
                Ok(Ok(false)) => {
                    tracing::error!(boot_id = %self.boot, replica = self.name, "a peer has declared this replica dead");
                    return;
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, "no heartbeat");
                    unbroken_since = Instant::now();
                    continue;
                }
                Err(_) => {
                    tracing::warn!("no heartbeat within 2 s");
                    unbroken_since = Instant::now();
                    continue;
                }
            }
            drop(self.db.learn_time().await);
            if unbroken_since.elapsed() >= self.timing.ttl + self.timing.grace {
                match store::bury(&self.db, self.boot, self.timing.grace).await {
                    Ok(0) => {}
                    Ok(buried) => {
                        tracing::warn!(buried, "replicas without heartbeat were declared dead")
                    }
                    Err(error) => tracing::warn!(%error, "cannot look for silent replicas"),
                }
            }
        }
    }

    /// Tells peers that this incarnation takes no new work.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn drain(&self) -> Result<(), Error> {
        store::drain(&self.db, self.boot).await
    }

    /// Leaves: what is still owned by this incarnation is free at once.
    ///
    /// # Errors
    /// If the database cannot be asked; then peers bury it later.
    pub async fn leave(&self) -> Result<(), Error> {
        store::leave(&self.db, self.boot).await
    }
}

//! The single truth about limits: quota windows and blocks per (account, family), in memory and shared through Postgres.
//!
//! Samples rank, upstream errors block. An observation counts from when it *began*: an older one never overwrites a newer one, and lifts
//! only a block that is older than itself. Memory knows at once; blocks are stored at once, samples at most once a second.
//!
//! Invariant: states only merge, by the same rules in memory (`merge`) and in SQL (`store`), so that a reload, a late write or a repeated
//! one never undoes what is newer. This room knows neither the life cycle of accounts nor who is chosen.

mod anchor;
mod merge;
mod poll;
mod pool;
mod state;
mod store;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::{
    sync::{Notify, watch},
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use self::{
    anchor::Anchor,
    state::{Change, State},
};
pub use self::{
    merge::{
        Block, CreditSample, Evidence, Sample, Source, block_until, lifts, merge_block,
        merge_window,
    },
    poll::Skip,
    pool::pool_view,
    store::STATEMENTS,
};
use crate::{
    bus::{Bus, Subscription, Topic},
    db::{Db, Error},
    ids::AccountId,
    protocol::limits::{Credits, Family, Observation, UsageReport},
    routing,
    task::Tasks,
};

/// Between two writes of samples.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// Rows of history deleted at once.
const PURGE_BATCH: i64 = 10_000;

/// What is known of one account, see [`Quota::known`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// Family, nominal minutes, and what was seen of the window; those that are gone included.
    pub windows: Vec<(Family, u32, Sample)>,
    /// By family; those that have ended may be listed.
    pub blocks: Vec<(Family, Block)>,
    /// Credits, where any feed told of them.
    pub credits: Option<CreditSample>,
}

/// What this replica knows of every account's limits. Clones share it.
#[derive(Clone, Debug)]
pub struct Quota {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    db: Db,
    known: Mutex<(State, Anchor)>,
    /// Moves when selection would see something else.
    changed: watch::Sender<u64>,
    /// A block waits to be stored.
    urgent: Notify,
    /// Held while something is being stored: who flushes then waits for that, too.
    saving: tokio::sync::Mutex<()>,
}

impl Quota {
    /// What the database knows now; nothing follows it. For commands that look once.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub async fn read(db: &Db) -> Result<Self, Error> {
        let anchor = Anchor::new(Instant::now(), db.clock().now());
        let quota = Self {
            shared: Arc::new(Shared {
                db: db.clone(),
                known: Mutex::new((State::default(), anchor)),
                changed: watch::Sender::new(0),
                urgent: Notify::new(),
                saving: tokio::sync::Mutex::default(),
            }),
        };
        quota.reload().await?;
        Ok(quota)
    }

    /// What the database knows, with a task that follows the other replicas and stores what this one learns until the process stops.
    /// Whoever stops it calls [`Quota::flush`] when the last turn has ended.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn load(db: &Db, bus: &Bus, tasks: &Tasks) -> Result<Self, Error> {
        let peers = bus.subscribe(Topic::Quota);
        let quota = Self::read(db).await?;
        tasks.essential("quota", quota.clone().follow(peers, tasks.stopping()));
        Ok(quota)
    }

    async fn follow(self, mut peers: Subscription, stop: CancellationToken) {
        let mut ticks = interval(SAVE_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut stale = false;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                version = peers.changed() => match version {
                    Some(_) => stale = true,
                    None => return,
                },
                // Samples that wait ride along: the bump is paid for.
                () = self.shared.urgent.notified() => drop(self.flush().await),
                _ = ticks.tick() => drop(self.flush().await),
            }
            if stale {
                stale = match self.reload().await {
                    Ok(()) => false,
                    Err(error) => {
                        tracing::warn!(%error, "cannot read quota");
                        true
                    }
                };
            }
        }
    }

    /// Takes in what one feed said of one family. `began` is when the attempt began that brought it: the same instant for all its feeds.
    /// The headers of an answer that refused the turn come with [`Source::Error`].
    pub fn observe(
        &self,
        account: AccountId,
        observation: &Observation,
        began: Instant,
        source: Source,
    ) {
        let now = self.shared.db.clock().now();
        let mut known = self.lock();
        let (state, anchor) = &mut *known;
        let observed_at = anchor.time_of(began, Instant::now(), now);
        let change = state.observe(account, observation, observed_at, source, now);
        drop(known);
        if change.urgent {
            tracing::info!(%account, family = %observation.family, "a block is lifted early");
        }
        self.announce(change);
    }

    /// Takes in an answer of the usage endpoint to a question that began at `began`: what it leaves out is gone.
    pub fn report(&self, account: AccountId, report: &UsageReport, began: Instant) {
        let now = self.shared.db.clock().now();
        let mut known = self.lock();
        let (state, anchor) = &mut *known;
        let observed_at = anchor.time_of(began, Instant::now(), now);
        let change = state.report(account, report, observed_at, now);
        drop(known);
        self.announce(change);
    }

    /// Why the usage endpoint need not be asked now, if it need not; `answered_at` is when it last answered, and it would be asked `every` so
    /// often.
    #[must_use]
    pub fn skips(
        &self,
        account: AccountId,
        answered_at: Option<Timestamp>,
        every: Duration,
    ) -> Option<Skip> {
        let now = self.shared.db.clock().now();
        poll::skip(&self.lock().0.limits(account), answered_at, every, now)
    }

    /// Takes in that upstream refused the account for a family. `until` is upstream's own deadline in epoch seconds, taken exactly; without
    /// a believable one it is a guess of a minute. `reason` is upstream's code. A block never shrinks by this.
    pub fn block(&self, account: AccountId, family: &Family, until: Option<i64>, reason: &str) {
        let now = self.shared.db.clock().now();
        let mut known = self.lock();
        let (state, anchor) = &mut *known;
        let blocked_at = anchor.time_of(Instant::now(), Instant::now(), now);
        let block = Block {
            blocked_at,
            until: block_until(until, blocked_at, rand::random()),
            reason: reason.to_owned(),
            lifted_at: None,
        };
        tracing::info!(%account, %family, reason, until = block.until, "an account is blocked");
        let change = state.block(account, family, block);
        drop(known);
        self.announce(change);
    }

    /// What selection sees of an account; blocks that have ended may still be listed.
    #[must_use]
    pub fn snapshot(&self, account: AccountId) -> (Vec<routing::Window>, Vec<routing::Block>) {
        self.lock().0.snapshot(account)
    }

    /// The credits of an account, where any feed told of them.
    #[must_use]
    pub fn credits(&self, account: AccountId) -> Option<Credits> {
        self.lock().0.credits(account)
    }

    /// Everything that is known of an account, with sources and times.
    #[must_use]
    pub fn known(&self, account: AccountId) -> Known {
        let limits = self.lock().0.limits(account);
        let windows = limits.windows.into_iter();
        Known {
            windows: windows
                .map(|((family, minutes), sample)| (family, minutes, sample))
                .collect(),
            blocks: limits.blocks.into_iter().collect(),
            credits: limits.credits,
        }
    }

    /// Deletes history that is older than so many days.
    ///
    /// # Errors
    /// Of the database.
    pub async fn purge(&self, retention_days: u16) -> Result<(), Error> {
        while store::purge(&self.shared.db, retention_days, PURGE_BATCH).await?
            == PURGE_BATCH.unsigned_abs()
        {}
        Ok(())
    }

    /// Moves when a snapshot would look different to selection.
    #[must_use]
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// Takes over what is known of accounts that were merged into others, by the id of the one that is gone: now, and whatever is still
    /// observed under the old id.
    pub fn inherit(&self, heirs: &Arc<HashMap<AccountId, AccountId>>) {
        let change = self.lock().0.inherit(Arc::clone(heirs));
        self.announce(change);
    }

    /// Stores what is not stored yet and tells the other replicas. What fails is logged and kept for the next call. True if everything that
    /// was known before is stored.
    pub async fn flush(&self) -> bool {
        let _saving = self.shared.saving.lock().await;
        let unsaved = self.lock().0.take_unsaved();
        if unsaved.is_empty() {
            return true;
        }
        let saved = store::save(&self.shared.db, &unsaved).await;
        if let Err(error) = &saved {
            tracing::warn!(%error, "cannot store quota; it is kept in memory");
            self.lock().0.keep_unsaved(&unsaved);
        }
        saved.is_ok()
    }

    async fn reload(&self) -> Result<(), Error> {
        let rows = store::load(&self.shared.db).await?;
        let change = self.lock().0.merge(rows);
        self.announce(change);
        Ok(())
    }

    fn announce(&self, change: Change) {
        if change.urgent {
            self.shared.urgent.notify_one();
        }
        if change.seen {
            self.shared.changed.send_modify(|version| *version += 1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, (State, Anchor)> {
        // Each change under the lock is one merge: a panic elsewhere leaves nothing half done.
        self.shared
            .known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

//! Periodic work. Each job may run on several replicas at once: what must not is guarded in its own statement.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    account::{Accounts, sticky::Sticky},
    db::{Db, Error},
    lease::Leases,
    ledger::Ledger,
    quota::Quota,
    replica,
    snapshot::Snapshots,
    task::Tasks,
    telemetry,
    upstream::Upstream,
};

/// How often turns of dead replicas are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// How often history is looked at that a merge of accounts left behind.
const HISTORY: Duration = Duration::from_secs(15);
/// How often what is old is deleted.
const PURGE: Duration = Duration::from_secs(600);
/// How far back rows of the request log that a crash lost are looked for, once, and written again.
const MENDED: Duration = Duration::from_secs(24 * 3600);
/// How far back from then on: a turn is logged within so long of its beginning.
const MENDED_AGAIN: Duration = Duration::from_secs(3 * 3600);
/// How long dead replicas are remembered.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// How often what histograms collect is folded.
const UPKEEP: Duration = Duration::from_secs(5);
/// How often logins that are due are refreshed, whether or not anybody uses them.
const LOGINS: Duration = Duration::from_secs(60);

/// What the jobs work on.
#[derive(Clone)]
pub struct Parts {
    /// For replicas, whose room keeps no state for this.
    pub db: Db,
    /// Turns and the request log.
    pub ledger: Ledger,
    /// Logins under way.
    pub accounts: Accounts,
    /// Preferences.
    pub sticky: Sticky,
    /// Ownership.
    pub leases: Leases,
    /// Histories.
    pub snapshots: Snapshots,
    /// What is known of limits.
    pub quota: Quota,
    /// Usage and model catalogues.
    pub upstream: Upstream,
}

/// What the operator decides about them.
pub struct Periods {
    /// Age at which history is deleted.
    pub retention_days: u16,
    /// How often the usage endpoint is asked about an account; none = never.
    pub usage_poll: Option<Duration>,
}

/// Starts every job.
pub fn start(tasks: &Tasks, parts: &Parts, periods: &Periods) {
    let retention_days = periods.retention_days;
    parts.job(tasks, "sweep", SWEEP, |parts| async move {
        let swept = parts.ledger.sweep().await;
        if let Ok(turns @ 1..) = swept {
            tracing::warn!(turns, "turns that nobody finished were booked as lost");
        }
        done("look for lost turns", swept)
    });
    parts.job(tasks, "history", HISTORY, |parts| async move {
        let moved = parts.ledger.move_history().await;
        done("move the history of accounts that were merged", moved)
    });
    parts.job(tasks, "logins", LOGINS, |parts| async move {
        let kept = parts.upstream.credentials().keep_fresh().await;
        done("look for logins that are due", kept)
    });
    let mended = Arc::new(AtomicBool::new(false));
    parts.job(tasks, "purge", PURGE, move |parts| {
        let mended = Arc::clone(&mended);
        async move { parts.purge(retention_days).await & parts.mend(&mended).await }
    });
    tasks.periodic("upkeep", UPKEEP, || {
        telemetry::upkeep();
        std::future::ready(())
    });
    let (upstream, stop) = (parts.upstream.clone(), tasks.stopping());
    drop(tasks.spawn("models", async move {
        stop.run_until_cancelled(upstream.poll_models()).await;
    }));
    if let Some(every) = periods.usage_poll {
        let (upstream, stop) = (parts.upstream.clone(), tasks.stopping());
        drop(tasks.spawn("usage", async move {
            stop.run_until_cancelled(upstream.poll_usage(every)).await;
        }));
    }
}

impl Parts {
    /// Runs a job every `period` and tells the metrics whether it was done.
    fn job<F>(
        &self,
        tasks: &Tasks,
        name: &'static str,
        period: Duration,
        work: impl Fn(Self) -> F + Send + 'static,
    ) where
        F: Future<Output = bool> + Send + 'static,
    {
        let parts = self.clone();
        telemetry::job_started(name, parts.now());
        tasks.periodic(name, period, move || {
            let (run, parts) = (work(parts.clone()), parts.clone());
            async move {
                let began = Instant::now();
                telemetry::job_ran(name, run.await, began.elapsed(), parts.now());
            }
        });
    }

    fn now(&self) -> i64 {
        self.db.clock().now().as_second()
    }

    /// Deletes what is old, each kind by its own rule.
    async fn purge(&self, retention_days: u16) -> bool {
        let log = self.ledger.delete_older_than(retention_days);
        let dead = replica::prune(&self.db, REMEMBERED);
        [
            done("delete old rows of the request log", log.await),
            done("delete old usage", self.quota.purge(retention_days).await),
            done(
                "forget logins that are over",
                self.accounts.purge_flows().await,
            ),
            done(
                "delete old sticky sessions",
                self.sticky.purge_expired().await,
            ),
            done("delete old snapshots", self.snapshots.purge().await),
            done("delete old leases", self.leases.purge().await),
            done("forget replicas that died long ago", dead.await),
        ]
        .into_iter()
        .all(|done| done)
    }

    /// Writes what the request log lost; all of it once, then what was lost since.
    async fn mend(&self, before: &AtomicBool) -> bool {
        let window = match before.load(Ordering::Relaxed) {
            true => MENDED_AGAIN,
            false => MENDED,
        };
        let mended = done("complete the request log", self.ledger.mend(window).await);
        before.fetch_or(mended, Ordering::Relaxed);
        mended
    }
}

/// Whether that was done; if not, the log tells why.
fn done<T>(what: &str, result: Result<T, Error>) -> bool {
    if let Err(error) = &result {
        tracing::warn!(%error, "cannot {what}");
    }
    result.is_ok()
}

//! Periodic work. Each job may run on several replicas at once: what must not is guarded in its own statement.

use std::time::Duration;

use crate::{
    account::{Accounts, sticky::Sticky},
    db::Db,
    lease::Leases,
    ledger::Ledger,
    quota::Quota,
    replica,
    snapshot::Snapshots,
    task::Tasks,
    telemetry,
    turn::Engine,
    upstream::Upstream,
};

/// How often turns of dead replicas are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// How often history is looked at that a merge of accounts left behind.
const HISTORY: Duration = Duration::from_secs(15);
/// How often what is old is deleted.
const PURGE: Duration = Duration::from_secs(600);
/// How far back rows of the request log that a crash lost are written again; the first look covers a day.
const MENDED: Duration = Duration::from_secs(24 * 3600);
/// How long dead replicas are remembered.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// How often what is counted now is told to the metrics.
const GAUGES: Duration = Duration::from_secs(5);
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
    /// Sessions.
    pub engine: Engine,
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
    let ledger = parts.ledger.clone();
    tasks.periodic("sweep", SWEEP, move || {
        let ledger = ledger.clone();
        async move {
            match ledger.sweep().await {
                Ok(0) => {}
                Ok(turns) => {
                    tracing::warn!(turns, "turns that nobody finished were booked as lost")
                }
                Err(error) => tracing::warn!(%error, "cannot look for lost turns"),
            }
        }
    });
    let ledger = parts.ledger.clone();
    tasks.periodic("history", HISTORY, move || {
        let ledger = ledger.clone();
        async move {
            if let Err(error) = ledger.move_history().await {
                tracing::warn!(%error, "cannot move the history of accounts that were merged");
            }
        }
    });
    let purged = parts.clone();
    tasks.periodic("purge", PURGE, move || {
        let parts = purged.clone();
        async move { parts.purge(retention_days).await }
    });
    let engine = parts.engine.clone();
    tasks.periodic("sessions", GAUGES, move || {
        let (sessions, busy) = engine.sessions();
        telemetry::set("drawbridge_sessions", sessions as u64);
        telemetry::set("drawbridge_sessions_busy", busy as u64);
        telemetry::upkeep();
        std::future::ready(())
    });
    let credentials = parts.upstream.credentials().clone();
    tasks.periodic("logins", LOGINS, move || {
        let credentials = credentials.clone();
        async move {
            if let Err(error) = credentials.keep_fresh().await {
                tracing::warn!(%error, "cannot look for logins that are due");
            }
        }
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
    /// Deletes what is old, each kind by its own rule.
    async fn purge(&self, retention_days: u16) {
        if let Err(error) = self.ledger.mend(MENDED).await {
            tracing::warn!(%error, "cannot complete the request log");
        }
        if let Err(error) = self.ledger.delete_older_than(retention_days).await {
            tracing::warn!(%error, "cannot delete old rows of the request log");
        }
        if let Err(error) = self.quota.purge(retention_days).await {
            tracing::warn!(%error, "cannot delete old usage");
        }
        if let Err(error) = self.accounts.purge_flows().await {
            tracing::warn!(%error, "cannot forget logins that are over");
        }
        if let Err(error) = self.sticky.purge_expired().await {
            tracing::warn!(%error, "cannot delete old sticky sessions");
        }
        if let Err(error) = self.snapshots.purge().await {
            tracing::warn!(%error, "cannot delete old snapshots");
        }
        if let Err(error) = self.leases.purge().await {
            tracing::warn!(%error, "cannot delete old leases");
        }
        if let Err(error) = replica::prune(&self.db, REMEMBERED).await {
            tracing::warn!(%error, "cannot forget replicas that died long ago");
        }
    }
}

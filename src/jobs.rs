//! Periodic work. Each job may run on several replicas at once: what must not is guarded in its own statement.

use std::time::Duration;

use crate::{
    account::sticky::Sticky, db::Db, ledger::Ledger, replica, task::Tasks, upstream::Upstream,
};

/// How often turns of dead replicas are looked for.
const SWEEP: Duration = Duration::from_secs(5);
/// How often what is old is deleted.
const PURGE: Duration = Duration::from_secs(600);
/// How far back rows of the request log that a crash lost are written again; the first look covers a day.
const MENDED: Duration = Duration::from_secs(24 * 3600);
/// How long dead replicas are remembered.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// How often the model catalogues are read.
const MODELS: Duration = Duration::from_secs(3600);
/// ... and how soon again where that failed.
const MODELS_AGAIN: Duration = Duration::from_secs(60);

/// Starts every job.
pub fn start(
    tasks: &Tasks,
    db: &Db,
    ledger: &Ledger,
    sticky: &Sticky,
    upstream: &Upstream,
    retention_days: u16,
) {
    let swept = ledger.clone();
    tasks.periodic("sweep", SWEEP, move || {
        let ledger = swept.clone();
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
    let (db, ledger, sticky) = (db.clone(), ledger.clone(), sticky.clone());
    tasks.periodic("purge", PURGE, move || {
        let (db, ledger, sticky) = (db.clone(), ledger.clone(), sticky.clone());
        async move {
            if let Err(error) = ledger.mend(MENDED).await {
                tracing::warn!(%error, "cannot complete the request log");
            }
            if let Err(error) = ledger.delete_older_than(retention_days).await {
                tracing::warn!(%error, "cannot delete old rows of the request log");
            }
            if let Err(error) = sticky.purge_expired().await {
                tracing::warn!(%error, "cannot delete old sticky sessions");
            }
            if let Err(error) = replica::prune(&db, REMEMBERED).await {
                tracing::warn!(%error, "cannot forget replicas that died long ago");
            }
        }
    });
    let (upstream, stop) = (upstream.clone(), tasks.stopping());
    drop(tasks.spawn("models", async move {
        let refresh = async {
            loop {
                let all = upstream.refresh_models().await;
                let patience = if all { MODELS } else { MODELS_AGAIN };
                upstream.accounts_changed(patience).await;
            }
        };
        stop.run_until_cancelled(refresh).await;
    }));
}

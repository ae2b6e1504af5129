//! Moves history from accounts that were merged away to those that they are part of now. It is bulk: it comes after the merge, in batches,
//! and goes on where it was left. Until it is done, readers find the account through `account_merges`.

mod store;

use std::time::Duration;

pub use self::store::STATEMENTS;
use super::Ledger;
use crate::db::Error;

/// Rows of one batch.
const BATCH: i64 = 1000;
/// A turn that began before a merge has ended so long after it.
const SETTLED: Duration = Duration::from_secs(3 * 3600);

impl Ledger {
    /// Moves what is to be moved now; yields the number of batches.
    ///
    /// # Errors
    /// If the database cannot be asked; the batches before are moved.
    pub async fn move_history(&self) -> Result<u64, Error> {
        self.move_history_by(BATCH, SETTLED).await
    }

    /// [`Ledger::move_history`] with the size of a batch, and how long after a merge the last pass may begin.
    ///
    /// # Errors
    /// As there.
    pub async fn move_history_by(&self, batch: i64, settled: Duration) -> Result<u64, Error> {
        let mut batches = 0;
        while let Some(merge) = store::next(&self.db, settled.as_secs_f64()).await? {
            store::batch(&self.db, merge, batch, settled.as_secs_f64()).await?;
            batches += 1;
        }
        Ok(batches)
    }
}

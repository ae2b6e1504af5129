//! The database's clock, as one process knows it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Instant,
};

use jiff::{SignedDuration, Timestamp};

use super::{Connection, Error, Stmt};

/// Reads the database's time without asking it: the local clock plus the offset that was learnt last. Durable times are written by the
/// database itself; this one is for comparing with them in memory. Clones share the offset.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    /// Database minus local time, in microseconds.
    offset: Arc<AtomicI64>,
}

static NOW: Stmt = Stmt {
    name: "db.NOW",
    sql: "select clock_timestamp()",
    types: &[],
};

impl Clock {
    /// The database's time.
    #[must_use]
    pub fn now(&self) -> Timestamp {
        local()
            .saturating_add(self.offset())
            .unwrap_or(Timestamp::MAX)
    }

    /// Database minus local time.
    #[must_use]
    pub fn offset(&self) -> SignedDuration {
        SignedDuration::from_micros(self.offset.load(Ordering::Relaxed))
    }

    /// Reads the database's time on a given connection and keeps the offset.
    ///
    /// # Errors
    /// Of the statement.
    pub async fn learn(&self, connection: &Connection) -> Result<(), Error> {
        let sent = Instant::now();
        let there: Timestamp = connection.one(&NOW, &[]).await?.try_get(0)?;
        let here = local();
        // The server read its clock somewhere between sending and receiving: assume the middle.
        let one_way = SignedDuration::try_from(sent.elapsed() / 2).unwrap_or_default();
        let offset = there.duration_since(here) + one_way;
        self.offset.store(
            i64::try_from(offset.as_micros()).unwrap_or(0),
            Ordering::Relaxed,
        );
        Ok(())
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the one place that reads the local clock, to correct it"
)]
fn local() -> Timestamp {
    Timestamp::now()
}

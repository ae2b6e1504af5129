//! Statements of the bus.

use std::time::Duration;

use tokio_postgres::Client;

use super::Topic;
use crate::{
    db::{Db, Error, Tx},
    statements,
};

statements! { "bus";
    /// A plain read; an old snapshot costs one more reading of what has not changed.
    READ: [] = "select topic, version, extract(epoch from clock_timestamp() - changed_at)::float8 from bus_versions";

    /// One row lock per topic, the last of its transaction; topics in alphabetical order, so that two writers cannot deadlock. The
    /// notification is sent at commit.
    BUMP: [TEXT_ARRAY] = "
        with locked as (select topic from bus_versions where topic = any($1) order by topic for update),
             bumped as (update bus_versions b set version = version + 1, changed_at = clock_timestamp()
                        from locked where b.topic = locked.topic returning b.topic)
        select pg_notify('drawbridge', topic) from bumped";

    /// Sent to ourselves: heard, or LISTEN does not work here.
    PROBE: [] = "select pg_notify('drawbridge', '')";
}

/// Each topic's version, and how long ago it was made.
pub(super) async fn read(db: &Db) -> Result<Vec<(Topic, i64, Duration)>, Error> {
    let mut versions = Vec::new();
    for row in db.all(&READ, &[]).await? {
        let name: &str = row.try_get(0)?;
        // A newer release may have topics that this one does not know.
        if let Some(topic) = Topic::ALL.into_iter().find(|topic| topic.name() == name) {
            let age = Duration::try_from_secs_f64(row.try_get(2)?).unwrap_or_default();
            versions.push((topic, row.try_get(1)?, age));
        }
    }
    Ok(versions)
}

/// Ends a transaction that changed what others cache: the bump is its last statement.
///
/// # Errors
/// Of the statement, or as [`Tx::commit`].
pub async fn commit(tx: Tx, topics: &[Topic]) -> Result<(), Error> {
    let names: Vec<&str> = topics.iter().map(|topic| topic.name()).collect();
    tx.all(&BUMP, &[&names]).await?;
    tx.commit_and_announce().await
}

/// Subscribes a dedicated connection and sends the probe.
pub(super) async fn listen(client: &Client) -> Result<(), Error> {
    client.batch_execute("listen drawbridge").await?;
    client.query_typed(PROBE.sql, &[]).await.map(drop)?;
    Ok(())
}

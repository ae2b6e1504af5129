//! Statements of `bridge_replicas`.

use std::time::Duration;

use crate::{
    db::{Db, Error},
    ids::BootId,
    statements,
};

statements! { "replica";
    /// A fresh random key: no race.
    REGISTER: [UUID, TEXT, FLOAT8] = "
        insert into bridge_replicas (boot_id, replica_name, expires_at)
        values ($1, $2, clock_timestamp() + make_interval(secs => $3))";

    /// Serialises with BURY on the row. Late is fine while unburied; no row means dead.
    BEAT: [UUID, FLOAT8] = "
        update bridge_replicas set expires_at = clock_timestamp() + make_interval(secs => $2)
        where boot_id = $1 and dead_at is null";

    /// `dead_at` is monotone: once set, BEAT finds nothing.
    BURY: [UUID, FLOAT8] = "
        update bridge_replicas set dead_at = clock_timestamp()
        where boot_id <> $1 and dead_at is null and expires_at + make_interval(secs => $2) <= clock_timestamp()";

    /// Information for peers; decides nothing.
    DRAIN: [UUID] = "update bridge_replicas set draining_at = clock_timestamp() where boot_id = $1 and draining_at is null";

    /// Our own tombstone.
    LEAVE: [UUID] = "update bridge_replicas set dead_at = clock_timestamp() where boot_id = $1 and dead_at is null";
}

pub(super) async fn register(
    db: &Db,
    boot: BootId,
    name: &str,
    ttl: Duration,
) -> Result<(), Error> {
    db.exec(&REGISTER, &[&boot, &name, &ttl.as_secs_f64()])
        .await
        .map(drop)
}

pub(super) async fn beat(db: &Db, boot: BootId, ttl: Duration) -> Result<bool, Error> {
    db.exec(&BEAT, &[&boot, &ttl.as_secs_f64()])
        .await
        .map(|rows| rows == 1)
}

pub(super) async fn bury(db: &Db, me: BootId, grace: Duration) -> Result<u64, Error> {
    db.exec(&BURY, &[&me, &grace.as_secs_f64()]).await
}

pub(super) async fn drain(db: &Db, boot: BootId) -> Result<(), Error> {
    db.exec(&DRAIN, &[&boot]).await.map(drop)
}

pub(super) async fn leave(db: &Db, boot: BootId) -> Result<(), Error> {
    db.exec(&LEAVE, &[&boot]).await.map(drop)
}

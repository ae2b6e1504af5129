//! Statements of `bridge_replicas`.

use std::time::Duration;

use super::{Listed, Peer, step::Answer};
use crate::{
    db::{Class, Connection, Db, Error},
    ids::BootId,
    statements,
};

statements! { "replica";
    /// A fresh random key: no race. The tombstone of the incarnation before is set with it, so that no two of one process ever live.
    REGISTER: [UUID, TEXT, TEXT, FLOAT8, BOOL, UUID, TEXT, TEXT_ARRAY] = "
        with before as (update bridge_replicas set dead_at = clock_timestamp() where boot_id = $6 and dead_at is null)
        insert into bridge_replicas (boot_id, replica_name, endpoint_url, expires_at, draining_at, version, master_keys)
        values ($1, $2, $3, clock_timestamp() + make_interval(secs => $4), case when $5 then clock_timestamp() end, $7, $8)";

    /// Serialises with BURY on the row. Late is fine while unburied, and told; no row means dead.
    BEAT: [UUID, FLOAT8] = "
        update bridge_replicas r set expires_at = clock_timestamp() + make_interval(secs => $2)
        from bridge_replicas before
        where r.boot_id = $1 and before.boot_id = r.boot_id and r.dead_at is null
        returning before.expires_at < clock_timestamp()";

    /// Changes when a standby is promoted or a backup restored; as the first part of the name of the log file that is written.
    TIMELINE: [] = "select left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)";

    /// `dead_at` is monotone: once set, BEAT finds nothing.
    BURY: [UUID, FLOAT8] = "
        update bridge_replicas set dead_at = clock_timestamp()
        where boot_id <> $1 and dead_at is null and expires_at + make_interval(secs => $2) <= clock_timestamp()";

    /// A plain read: a view of the moment, to act on without a query; decides nothing.
    PEERS: [UUID] = "
        select boot_id, replica_name, endpoint_url, draining_at is not null, expires_at > clock_timestamp()
        from bridge_replicas where dead_at is null and boot_id <> $1";

    /// Information for peers; decides nothing.
    DRAIN: [UUID] = "update bridge_replicas set draining_at = clock_timestamp() where boot_id = $1 and draining_at is null";

    /// Our own tombstone.
    LEAVE: [UUID] = "update bridge_replicas set dead_at = clock_timestamp() where boot_id = $1 and dead_at is null";

    /// A plain read, for people. The age of the heartbeat is what is missing of the TTL.
    LIST: [FLOAT8] = "
        select boot_id, replica_name, endpoint_url, started_at,
            extract(epoch from clock_timestamp() - expires_at)::float8 + $1,
            case when dead_at is not null then 'dead' when expires_at <= clock_timestamp() then 'silent'
                 when draining_at is not null then 'draining' else 'alive' end,
            dead_at, version, master_keys
        from bridge_replicas order by started_at desc, boot_id";

    /// Tombstones are monotone, so what is chosen stays prunable; replicas that prune at once share the rows between them. Nobody who
    /// holds a lease row waits for the row of a dead replica, so the foreign key's `set null` cannot deadlock.
    PRUNE: [FLOAT8] = "
        delete from bridge_replicas where boot_id in (
            select boot_id from bridge_replicas where dead_at < clock_timestamp() - make_interval(secs => $1)
            limit 1000 for update skip locked)";
}

/// What a new incarnation says of itself.
pub(super) struct New<'a> {
    pub(super) boot: BootId,
    pub(super) name: &'a str,
    pub(super) endpoint: Option<&'a str>,
    pub(super) ttl: Duration,
    pub(super) draining: bool,
    pub(super) version: &'a str,
    pub(super) master_keys: &'a [String],
    /// The incarnation of this process that it follows.
    pub(super) before: Option<BootId>,
}

pub(super) async fn register(connection: &Connection, new: New<'_>) -> Result<(), Error> {
    let ttl = new.ttl.as_secs_f64();
    connection
        .exec(
            &REGISTER,
            &[
                &new.boot,
                &new.name,
                &new.endpoint,
                &ttl,
                &new.draining,
                &new.before,
                &new.version,
                &new.master_keys,
            ],
        )
        .await
        .map(drop)
}

pub(super) async fn beat(
    connection: &Connection,
    boot: BootId,
    ttl: Duration,
) -> Result<Answer, Error> {
    let row = connection.opt(&BEAT, &[&boot, &ttl.as_secs_f64()]).await?;
    Ok(match row.map(|row| row.try_get(0)).transpose()? {
        Some(false) => Answer::InTime,
        Some(true) => Answer::Late,
        None => Answer::Buried,
    })
}

/// `None` where the database will not say: services that share their storage between servers, which lose nothing.
pub(super) async fn timeline(connection: &Connection) -> Result<Option<String>, Error> {
    match connection.one(&TIMELINE, &[]).await {
        Ok(row) => Ok(Some(row.try_get(0)?)),
        Err(error) if *error.class() == Class::Bug => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) async fn bury(
    connection: &Connection,
    me: BootId,
    grace: Duration,
) -> Result<u64, Error> {
    connection.exec(&BURY, &[&me, &grace.as_secs_f64()]).await
}

pub(super) async fn peers(connection: &Connection, me: BootId) -> Result<Vec<Peer>, Error> {
    let rows = connection.all(&PEERS, &[&me]).await?;
    rows.iter()
        .map(|row| {
            Ok(Peer {
                boot: row.try_get(0)?,
                name: row.try_get(1)?,
                endpoint: row.try_get(2)?,
                draining: row.try_get(3)?,
                alive: row.try_get(4)?,
            })
        })
        .collect()
}

pub(super) async fn drain(db: &Db, boot: BootId) -> Result<(), Error> {
    db.exec(&DRAIN, &[&boot]).await.map(drop)
}

pub(super) async fn leave(db: &Db, boot: BootId) -> Result<(), Error> {
    db.exec(&LEAVE, &[&boot]).await.map(drop)
}

pub(super) async fn list(db: &Db, ttl: Duration) -> Result<Vec<Listed>, Error> {
    let rows = db.all(&LIST, &[&ttl.as_secs_f64()]).await?;
    rows.iter()
        .map(|row| {
            Ok(Listed {
                boot_id: row.try_get(0)?,
                name: row.try_get(1)?,
                endpoint: row.try_get(2)?,
                started_at: row.try_get(3)?,
                heartbeat_age_seconds: row.try_get(4)?,
                state: row.try_get(5)?,
                dead_at: row.try_get(6)?,
                version: row.try_get(7)?,
                master_keys: row.try_get(8)?,
            })
        })
        .collect()
}

pub(super) async fn prune(db: &Db, age: Duration) -> Result<u64, Error> {
    db.exec(&PRUNE, &[&age.as_secs_f64()]).await
}

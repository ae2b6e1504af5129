//! Statements of `http_bridge_leases`. Each writes one row (PURGE: rows of nobody), so none can deadlock with another.
//!
//! The only fact of another row that a claim reads is the tombstone `bridge_replicas.dead_at`: it is set once and never cleared, so an old
//! snapshot of it can only refuse. `expires_at` moves both ways; comparing it here would be wrong under READ COMMITTED.

use std::time::Duration;

use tokio_postgres::Row as PgRow;

use super::{Held, Key, Kind, Listed, Owner, Row, Which};
use crate::{
    db::{Db, Error, LockClass},
    ids::{BootId, LeaseId, ScopeId},
    statements,
};

/// A takeover is not followed by another for so long, in seconds: two replicas that cannot reach each other do not tear at one lease.
macro_rules! cooldown {
    () => {
        "5"
    };
}

/// Who may claim row `l`: it is free, or mine and idle, or its owner has a tombstone.
macro_rules! claimable {
    ($me:literal) => {
        concat!(
            "(l.owner_boot is null or (l.owner_boot = ",
            $me,
            " and l.busy_turn is null)
                or exists (select from bridge_replicas r where r.boot_id = l.owner_boot and r.dead_at is not null))"
        )
    };
}

/// What a claim writes.
macro_rules! claimed {
    ($me:literal, $retain:literal) => {
        concat!(
            "generation = nextval('lease_generations'), owner_boot = ",
            $me,
            ", busy_turn = null, busy_since = null, last_turn_at = clock_timestamp(), retain_until = clock_timestamp() + make_interval(secs => ",
            $retain,
            ")"
        )
    };
}

/// What a row says, with its owner's.
macro_rules! read {
    () => {
        "select l.lease_id, l.key_kind, l.key_hash, l.generation, l.turn_seq, l.owner_boot, l.busy_turn, l.account_id, r.endpoint_url,
            r.draining_at is not null, r.dead_at is not null,
            greatest(extract(epoch from r.expires_at - clock_timestamp()), 0)::float8
        from http_bridge_leases l left join bridge_replicas r on r.boot_id = l.owner_boot "
    };
}

statements! { "lease";
    /// The conflict clause is evaluated on the locked, newest version of the row, so of all racers one wins; the others find an owner.
    CLAIM: [UUID, UUID, TEXT, BYTEA, UUID, FLOAT8] = concat!("
        insert into http_bridge_leases as l (lease_id, scope_id, key_kind, key_hash, generation, owner_boot, retain_until)
        values ($1, $2, $3, $4, nextval('lease_generations'), $5, clock_timestamp() + make_interval(secs => $6))
        on conflict (scope_id, key_kind, key_hash) do update set ", claimed!("$5", "$6"), "
        where ", claimable!("$5"), "
        returning lease_id, key_kind, key_hash, generation, account_id");

    /// As CLAIM, by id. A purged lease is made again under a key of its own; a racer that makes it first wins, and this finds an owner. The
    /// lease of another scope exists, and is not touched.
    CLAIM_ID: [UUID, UUID, UUID, TEXT, BYTEA, FLOAT8] = concat!("
        with claimed as (
            update http_bridge_leases l set ", claimed!("$3", "$6"), "
            where l.lease_id = $1 and l.scope_id = $2 and ", claimable!("$3"), "
            returning lease_id, key_kind, key_hash, generation, account_id
        ), made as (
            insert into http_bridge_leases (lease_id, scope_id, key_kind, key_hash, generation, owner_boot, retain_until)
            select $1, $2, $4, $5, nextval('lease_generations'), $3, clock_timestamp() + make_interval(secs => $6)
            where not exists (select from http_bridge_leases where lease_id = $1)
            on conflict do nothing
            returning lease_id, key_kind, key_hash, generation, account_id
        )
        select * from claimed union all select * from made");

    /// Serialises with BEGIN on the row: whichever comes first makes the other find nothing. `turn_seq` tells a turn that was begun and
    /// finished since the row was read.
    TAKE: [UUID, UUID, UUID, INT8, INT8] = concat!("
        update http_bridge_leases set generation = nextval('lease_generations'), owner_boot = $3, taken_at = clock_timestamp(),
            last_turn_at = clock_timestamp()
        where lease_id = $1 and scope_id = $2 and generation = $4 and turn_seq = $5 and busy_turn is null
            and (taken_at is null or taken_at < clock_timestamp() - interval '", cooldown!(), " seconds')
        returning lease_id, key_kind, key_hash, generation, account_id");

    /// A compare-and-set on the ownership: a predecessor's late release finds nothing.
    RELEASE: [UUID, INT8, UUID] = "
        update http_bridge_leases set owner_boot = null
        where lease_id = $1 and generation = $2 and owner_boot = $3 and busy_turn is null";

    /// A plain read: what follows from it is decided by the compare-and-set of the statement that acts on it.
    BY_ID: [UUID, UUID] = concat!(read!(), "where l.scope_id = $1 and l.lease_id = $2");

    /// As `BY_ID`.
    BY_KEY: [UUID, TEXT, BYTEA] = concat!(read!(), "where l.scope_id = $1 and l.key_kind = $2 and l.key_hash = $3");

    /// Rows that nobody alive owns, or whose owner has forgotten them: one that has not is fenced by the BEGIN that finds no row. A claim that comes first makes the row too young; one that comes later makes it again. The lock lasts as
    /// long as the statement: one replica at a time deletes.
    PURGE: [INT4, INT4, INT8] = "
        with turn as materialized (select pg_try_advisory_xact_lock($1, $2) mine),
        old as (
            select lease_id from http_bridge_leases l
            where (select mine from turn) and retain_until < clock_timestamp()
                and (owner_boot is null or exists (select from bridge_replicas r where r.boot_id = l.owner_boot and r.dead_at is not null)
                    or (busy_turn is null and retain_until < clock_timestamp() - interval '1 day'))
            limit $3 for update skip locked
        )
        delete from http_bridge_leases l using old where l.lease_id = old.lease_id";

    /// For people: one, those in a turn with the longest first, those of an owner, or all with the last used first.
    LIST: [UUID, INT8, BOOL, TEXT] = "
        select l.lease_id, l.scope_id, l.key_kind, l.generation, r.replica_name, l.owner_boot,
            case when l.owner_boot is null then 'free' when r.dead_at is not null then 'dead' when r.expires_at < clock_timestamp() then 'silent'
                when r.draining_at is not null then 'draining' else 'alive' end,
            l.busy_turn, l.busy_since, l.turn_seq, l.account_id, l.head_response_id, l.taken_at, l.last_turn_at, l.retain_until
        from http_bridge_leases l left join bridge_replicas r on r.boot_id = l.owner_boot
        where ($1 is null or l.lease_id = $1) and (not $3 or l.busy_turn is not null) and ($4 is null or r.replica_name = $4)
        order by case when $3 then l.busy_since end, l.last_turn_at desc limit $2";

    /// An operator's word stands above the owner's: the new generation fences it.
    FREE: [UUID] = "
        update http_bridge_leases set generation = nextval('lease_generations'), owner_boot = null, busy_turn = null, busy_since = null
        where lease_id = $1";
}

pub(super) async fn claim(
    db: &Db,
    me: BootId,
    scope: ScopeId,
    key: Key,
) -> Result<Option<Held>, Error> {
    let row = db
        .opt(
            &CLAIM,
            &[
                &LeaseId::new(),
                &scope,
                &key.kind.as_str(),
                &key.hash.as_slice(),
                &me,
                &key.kind.retain().as_secs_f64(),
            ],
        )
        .await?;
    row.map(|row| held(&row, me)).transpose()
}

pub(super) async fn claim_id(
    db: &Db,
    me: BootId,
    scope: ScopeId,
    lease: LeaseId,
) -> Result<Option<Held>, Error> {
    let key = Key::of_lease(lease);
    let row = db
        .opt(
            &CLAIM_ID,
            &[
                &lease,
                &scope,
                &me,
                &key.kind.as_str(),
                &key.hash.as_slice(),
                &key.kind.retain().as_secs_f64(),
            ],
        )
        .await?;
    row.map(|row| held(&row, me)).transpose()
}

pub(super) async fn take(
    db: &Db,
    me: BootId,
    scope: ScopeId,
    seen: &Row,
) -> Result<Option<Held>, Error> {
    let row = db
        .opt(
            &TAKE,
            &[&seen.lease, &scope, &me, &seen.generation, &seen.turn_seq],
        )
        .await?;
    row.map(|row| held(&row, me)).transpose()
}

pub(super) async fn release(db: &Db, held: &Held) -> Result<bool, Error> {
    db.exec(&RELEASE, &[&held.lease, &held.generation, &held.boot])
        .await
        .map(|rows| rows == 1)
}

pub(super) async fn by_id(
    db: &Db,
    me: BootId,
    scope: ScopeId,
    lease: LeaseId,
) -> Result<Option<Row>, Error> {
    let row = db.opt(&BY_ID, &[&scope, &lease]).await?;
    row.map(|found| row_of(&found, me)).transpose()
}

pub(super) async fn by_key(
    db: &Db,
    me: BootId,
    scope: ScopeId,
    key: Key,
) -> Result<Option<Row>, Error> {
    let row = db
        .opt(&BY_KEY, &[&scope, &key.kind.as_str(), &key.hash.as_slice()])
        .await?;
    row.map(|found| row_of(&found, me)).transpose()
}

pub(super) async fn purge(db: &Db, limit: i64) -> Result<u64, Error> {
    /// The job within its class of locks.
    const LEASES: i32 = 3;
    db.exec(&PURGE, &[&(LockClass::Job as i32), &LEASES, &limit])
        .await
}

pub(super) async fn list(db: &Db, which: &Which, limit: u32) -> Result<Vec<Listed>, Error> {
    let Which { lease, busy, owner } = which;
    let rows = db
        .all(&LIST, &[lease, &i64::from(limit), busy, owner])
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Listed {
                lease_id: row.try_get(0)?,
                scope_id: row.try_get(1)?,
                key_kind: row.try_get(2)?,
                generation: row.try_get(3)?,
                owner: row.try_get(4)?,
                owner_boot: row.try_get(5)?,
                owner_state: row.try_get(6)?,
                busy_turn: row.try_get(7)?,
                busy_since: row.try_get(8)?,
                turn_seq: row.try_get(9)?,
                account_id: row.try_get(10)?,
                head_response_id: row.try_get(11)?,
                taken_at: row.try_get(12)?,
                last_turn_at: row.try_get(13)?,
                retain_until: row.try_get(14)?,
            })
        })
        .collect()
}

pub(super) async fn free(db: &Db, lease: LeaseId) -> Result<bool, Error> {
    db.exec(&FREE, &[&lease]).await.map(|rows| rows == 1)
}

fn held(row: &PgRow, me: BootId) -> Result<Held, Error> {
    Ok(Held {
        lease: row.try_get(0)?,
        key: key(row, 1, 2)?,
        generation: row.try_get(3)?,
        boot: me,
        account: row.try_get(4)?,
    })
}

fn row_of(row: &PgRow, me: BootId) -> Result<Row, Error> {
    let owner: Option<BootId> = row.try_get(5)?;
    let owner = match owner {
        None => Owner::Nobody,
        Some(_) if row.try_get::<_, bool>(10)? => Owner::Dead,
        Some(boot) if boot == me => Owner::Me,
        Some(boot) => Owner::Other {
            boot,
            endpoint: row.try_get(8)?,
            draining: row.try_get(9)?,
            alive_for: Duration::try_from_secs_f64(row.try_get(11)?).unwrap_or_default(),
        },
    };
    Ok(Row {
        lease: row.try_get(0)?,
        key: key(row, 1, 2)?,
        generation: row.try_get(3)?,
        turn_seq: row.try_get(4)?,
        owner,
        busy_turn: row.try_get(6)?,
        account: row.try_get(7)?,
    })
}

fn key(row: &PgRow, kind: usize, hash: usize) -> Result<Key, Error> {
    let hash: &[u8] = row.try_get(hash)?;
    Ok(Key {
        kind: Kind::of(row.try_get(kind)?),
        hash: hash.try_into().unwrap_or_default(),
    })
}

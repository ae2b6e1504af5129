//! Statements of `api_keys`.

use std::time::Duration;

use tokio_postgres::{Row, types::Json};

use super::{Grants, Key, Listed, NewKey};
use crate::{
    db::{Connection, Db, Error},
    ids::ApiKeyId,
    statements,
};

/// The grants with accounts as they are now: what was merged away is what it is part of, also if it was granted after the merge. Those that
/// are gone are left out: what names none but such still lets none.
macro_rules! grants {
    () => {
        "case jsonb_typeof(grants->'accounts') when 'array' then jsonb_set(grants, '{accounts}', (
            select coalesce(jsonb_agg(distinct account_id), '[]') from jsonb_array_elements(grants->'accounts') as id
            left join account_merges on to_jsonb(from_id) = id
            join accounts on to_jsonb(account_id) = coalesce(to_jsonb(to_id), id))) else grants end"
    };
}

/// Columns of a [`Listed`].
macro_rules! listed {
    () => {
        concat!(
            "api_key_id, scope_id, name, prefix, ",
            grants!(),
            ", created_at, expires_at, revoked_at, last_used_at"
        )
    };
}

statements! { "api_key";
    /// A fresh random id; the hash is unique by 256 random bits. No row if `scope_of` names no key.
    CREATE: [UUID, TEXT, BYTEA, TEXT, TIMESTAMPTZ, UUID, JSONB] = concat!("
        insert into api_keys (api_key_id, scope_id, name, hash, prefix, expires_at, grants)
        select $1, coalesce(other.scope_id, $1), $2, $3, $4, $5, $7
        from (select) one left join api_keys other on other.api_key_id = $6
        where $6 is null or other.api_key_id is not null
        returning ", listed!());

    /// Serialises with REVOKE on the row; a revoked key keeps its hash.
    ROTATE: [UUID, BYTEA, TEXT] = concat!("
        update api_keys set hash = case when revoked_at is null then $2 else hash end,
            prefix = case when revoked_at is null then $3 else prefix end
        where api_key_id = $1 returning ", listed!());

    /// Set once.
    REVOKE: [UUID] = concat!("
        update api_keys set revoked_at = coalesce(revoked_at, clock_timestamp()) where api_key_id = $1 returning ", listed!());

    /// Serialises with other changes on the row; what a newer release has granted stays.
    GRANT: [UUID, JSONB, TEXT_ARRAY] = concat!("
        update api_keys set grants = (grants || $2) - $3 where api_key_id = $1 returning ", listed!());

    /// A plain read.
    LIST: [] = concat!("select ", listed!(), " from api_keys order by created_at, api_key_id");

    /// A plain read; the versions of keys and of accounts were read before it.
    LOAD: [] = concat!("
        select hash, api_key_id, scope_id, name, ", grants!(), ", expires_at, revoked_at is not null from api_keys");

    /// Of concurrent claims one moves the row; the others wait for it and find it moved. The outer read sees the row as it was before.
    CLAIM_REFRESH: [UUID, FLOAT8] = "
        with claimed as (
            update api_keys set refreshed_at = clock_timestamp()
            where api_key_id = $1 and coalesce(refreshed_at <= clock_timestamp() - make_interval(secs => $2), true)
            returning 1
        )
        select exists (select from claimed),
            extract(epoch from refreshed_at + make_interval(secs => $2) - clock_timestamp())::float8
        from api_keys where api_key_id = $1";

    /// Information for people: concurrent writers differ by seconds. Rows in order of their ids, so that two replicas cannot deadlock.
    TOUCH: [UUID_ARRAY] = "
        with used as (select api_key_id from api_keys where api_key_id = any($1) order by api_key_id for no key update)
        update api_keys k set last_used_at = clock_timestamp() from used where k.api_key_id = used.api_key_id";
}

pub(super) async fn create(
    connection: &Connection,
    id: ApiKeyId,
    new: &NewKey,
    hash: &[u8; 32],
    prefix: &str,
) -> Result<Option<Listed>, Error> {
    let row = connection
        .opt(
            &CREATE,
            &[
                &id,
                &new.name,
                &hash.as_slice(),
                &prefix,
                &new.expires_at,
                &new.scope_of,
                &Json(&new.grants),
            ],
        )
        .await?;
    row.as_ref().map(listed).transpose()
}

pub(super) async fn rotate(
    connection: &Connection,
    id: ApiKeyId,
    hash: &[u8; 32],
    prefix: &str,
) -> Result<Option<Listed>, Error> {
    let row = connection
        .opt(&ROTATE, &[&id, &hash.as_slice(), &prefix])
        .await?;
    row.as_ref().map(listed).transpose()
}

pub(super) async fn revoke(connection: &Connection, id: ApiKeyId) -> Result<Option<Listed>, Error> {
    let row = connection.opt(&REVOKE, &[&id]).await?;
    row.as_ref().map(listed).transpose()
}

/// Sets the kinds of grants in `set`, and takes the restriction of those in `clear` away.
pub(super) async fn grant(
    connection: &Connection,
    id: ApiKeyId,
    set: &Grants,
    clear: &[&str],
) -> Result<Option<Listed>, Error> {
    let row = connection.opt(&GRANT, &[&id, &Json(set), &clear]).await?;
    row.as_ref().map(listed).transpose()
}

pub(super) async fn list(db: &Db) -> Result<Vec<Listed>, Error> {
    db.all(&LIST, &[]).await?.iter().map(listed).collect()
}

pub(super) async fn load(db: &Db) -> Result<Vec<(Vec<u8>, Key)>, Error> {
    db.all(&LOAD, &[]).await?.iter().map(key).collect()
}

/// Yields how long to wait; `None` if the refresh is the caller's.
pub(super) async fn claim_refresh(
    db: &Db,
    id: ApiKeyId,
    every: Duration,
) -> Result<Option<Duration>, Error> {
    let row = db.opt(&CLAIM_REFRESH, &[&id, &every.as_secs_f64()]).await?;
    let Some(row) = row else {
        return Ok(Some(every));
    };
    if row.try_get(0)? {
        return Ok(None);
    }
    // A claim that was lost to one of the same moment has read the row of before.
    let left = row.try_get::<_, Option<f64>>(1)?.unwrap_or_default();
    let left = Duration::try_from_secs_f64(left).unwrap_or_default();
    Ok(Some(if left.is_zero() { every } else { left }))
}

pub(super) async fn touch(db: &Db, used: &[ApiKeyId]) -> Result<(), Error> {
    db.exec(&TOUCH, &[&used]).await.map(drop)
}

fn key(row: &Row) -> Result<(Vec<u8>, Key), Error> {
    let grants = Grants::read(row.try_get(4)?);
    Ok((
        row.try_get(0)?,
        Key {
            id: row.try_get(1)?,
            scope: row.try_get(2)?,
            name: row.try_get(3)?,
            grants,
            expires_at: row.try_get(5)?,
            revoked: row.try_get(6)?,
        },
    ))
}

fn listed(row: &Row) -> Result<Listed, Error> {
    let grants = Grants::read(row.try_get(4)?);
    Ok(Listed {
        id: row.try_get(0)?,
        scope: row.try_get(1)?,
        name: row.try_get(2)?,
        prefix: row.try_get(3)?,
        grants,
        created_at: row.try_get(5)?,
        expires_at: row.try_get(6)?,
        revoked_at: row.try_get(7)?,
        last_used_at: row.try_get(8)?,
    })
}

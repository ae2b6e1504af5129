//! Statements of `response_snapshots`. Rows are written once, by FINISH, and deleted by chain.

use std::time::Duration;

use super::Found;
use crate::{
    db::{Db, Error, LockClass},
    ids::{AccountId, ScopeId},
    statements,
};

statements! { "snapshot";
    /// A plain read of a row that never changes.
    FIND: [UUID, TEXT] = "select lease_id, complete from response_snapshots where scope_id = $1 and response_id = $2";

    /// The newest link first, down to the root, in one scope. One link or one byte more than may be told, and the walk stops short of it: a
    /// cycle runs into that. Rows never change, so a link that is deleted meanwhile is a gap.
    CHAIN: [UUID, TEXT, INT4, INT8] = "
        with recursive chain as (
            select 1 as depth, s.bytes::bigint as total, s.* from response_snapshots s where s.scope_id = $1 and s.response_id = $2
            union all
            select c.depth + 1, c.total + p.bytes, p.*
            from chain c join response_snapshots p on p.scope_id = $1 and p.response_id = c.parent_response_id
            where not c.is_root and c.depth < $3 and c.total + p.bytes <= $4
        )
        select response_id, account_id, is_root, complete, bytes, body from chain order by depth";

    /// Whole chains. One that gets a link while it is looked at is deleted with it. The lock lasts as long as the statement: one replica at
    /// a time deletes.
    PURGE: [INT4, INT4, FLOAT8, FLOAT8, INT8] = "
        with turn as materialized (select pg_try_advisory_xact_lock($1, $2) mine),
        over as (
            select chain_id from response_snapshots where (select mine from turn)
            group by chain_id
            having max(created_at) < clock_timestamp() - make_interval(secs => $3)
                or min(created_at) < clock_timestamp() - make_interval(secs => $4)
            limit $5
        ), deleted as (
            delete from response_snapshots s using over where s.chain_id = over.chain_id returning 1
        )
        select (select count(*) from over), (select count(*) from deleted)";
}

/// One record of a chain.
pub(super) struct Link {
    pub(super) response_id: String,
    pub(super) account: Option<AccountId>,
    pub(super) is_root: bool,
    pub(super) complete: bool,
    pub(super) bytes: usize,
    pub(super) body: Option<Vec<u8>>,
}

pub(super) async fn find(
    db: &Db,
    scope: ScopeId,
    response_id: &str,
) -> Result<Option<Found>, Error> {
    let row = db.opt(&FIND, &[&scope, &plain(response_id)]).await?;
    row.map(|row| {
        Ok(Found {
            lease: row.try_get(0)?,
            complete: row.try_get(1)?,
        })
    })
    .transpose()
}

pub(super) async fn chain(
    db: &Db,
    scope: ScopeId,
    response_id: &str,
    links: usize,
    bytes: usize,
) -> Result<Vec<Link>, Error> {
    let links = i32::try_from(links).unwrap_or(i32::MAX);
    let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
    let rows = db
        .all(&CHAIN, &[&scope, &plain(response_id), &links, &bytes])
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Link {
                response_id: row.try_get(0)?,
                account: row.try_get(1)?,
                is_root: row.try_get(2)?,
                complete: row.try_get(3)?,
                bytes: usize::try_from(row.try_get::<_, i32>(4)?).unwrap_or_default(),
                body: row.try_get(5)?,
            })
        })
        .collect()
}

/// Yields the numbers of chains and of records.
pub(super) async fn purge(
    db: &Db,
    after_newest: Duration,
    after_root: Duration,
    limit: i64,
) -> Result<(u64, u64), Error> {
    /// The job within its class of locks.
    const SNAPSHOTS: i32 = 3;
    let row = db
        .one(
            &PURGE,
            &[
                &(LockClass::Job as i32),
                &SNAPSHOTS,
                &after_newest.as_secs_f64(),
                &after_root.as_secs_f64(),
                &limit,
            ],
        )
        .await?;
    let count = |index| -> Result<u64, Error> {
        Ok(u64::try_from(row.try_get::<_, i64>(index)?).unwrap_or_default())
    };
    Ok((count(0)?, count(1)?))
}

/// An id that no column can hold is the id of nothing.
fn plain(response_id: &str) -> &str {
    if response_id.contains('\0') {
        ""
    } else {
        response_id
    }
}

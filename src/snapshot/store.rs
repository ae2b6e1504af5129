//! Statements of `response_snapshots` but for the insert, which stands with the statement that finishes a turn.

use super::{Found, policy};
use crate::{
    db::{Db, Error, LockClass},
    ids::{AccountId, ChainId, LeaseId, ScopeId},
    statements,
};

/// Whether a chain has expired: a day after its newest link, a week after its root. Both ends are read off the index.
macro_rules! expired {
    () => {
        "max(created_at) <= clock_timestamp() - interval '24 hours' or min(created_at) <= clock_timestamp() - interval '7 days'"
    };
}

statements! { "snapshot";
    FIND: [UUID, TEXT] = concat!("
        select lease_id, account_id, model, complete from response_snapshots s where scope_id = $1 and response_id = $2
            and not (select ", expired!(), " from response_snapshots where chain_id = s.chain_id)");

    /// From the newest link to the root; the rows only if it arrives there. A cycle has no root, and a gap ends before it. What a turn
    /// wrote during a merge of accounts is the merged account's.
    CHAIN: [UUID, TEXT, INT4, INT8] = concat!("
        with recursive walk as (
            select 1 depth, bytes::bigint total, s.* from response_snapshots s
            where scope_id = $1 and response_id = $2 and complete and bytes <= $4
                and not (select ", expired!(), " from response_snapshots where chain_id = s.chain_id)
            union all
            select w.depth + 1, w.total + s.bytes, s.* from walk w
            join response_snapshots s on (s.scope_id, s.response_id, s.chain_id) = ($1, w.parent_response_id, w.chain_id)
            where not w.is_root and w.depth < $3 and s.complete and w.total + s.bytes <= $4
        )
        select response_id, chain_id, lease_id,
            coalesce((select to_id from account_merges where from_id = account_id), account_id), bytes, body
        from walk
        where exists (select from walk where is_root) order by depth desc");

    /// Whole chains. A link that a turn adds at this moment is left alone; without its root it cannot be told, and expires.
    PURGE: [INT4, INT4, INT8] = concat!("
        with turn as materialized (select pg_try_advisory_xact_lock($1, $2) mine),
        old as (
            select chain_id from response_snapshots where (select mine from turn) group by chain_id having ", expired!(), " limit $3
        )
        delete from response_snapshots s using old where s.chain_id = old.chain_id");
}

/// One link as it is stored.
pub(super) struct Stored {
    pub(super) response_id: String,
    pub(super) chain: ChainId,
    pub(super) lease: Option<LeaseId>,
    pub(super) account: Option<AccountId>,
    pub(super) bytes: usize,
    pub(super) body: Option<Vec<u8>>,
}

pub(super) async fn find(
    db: &Db,
    scope: ScopeId,
    response_id: &str,
) -> Result<Option<Found>, Error> {
    let row = db.opt(&FIND, &[&scope, &response_id]).await?;
    row.map(|row| {
        Ok(Found {
            lease: row.try_get(0)?,
            account: row.try_get(1)?,
            model: row.try_get(2)?,
            complete: row.try_get(3)?,
        })
    })
    .transpose()
}

/// From the root to the response; empty if the chain is not whole.
pub(super) async fn chain(
    db: &Db,
    scope: ScopeId,
    response_id: &str,
) -> Result<Vec<Stored>, Error> {
    let links = i32::try_from(policy::LINKS).expect("a small number");
    let bytes = i64::try_from(policy::CONVERSATION).expect("a small number");
    let rows = db
        .all(&CHAIN, &[&scope, &response_id, &links, &bytes])
        .await?;
    rows.iter()
        .map(|row| {
            Ok(Stored {
                response_id: row.try_get(0)?,
                chain: row.try_get(1)?,
                lease: row.try_get(2)?,
                account: row.try_get(3)?,
                bytes: usize::try_from(row.try_get::<_, i32>(4)?).unwrap_or(0),
                body: row.try_get(5)?,
            })
        })
        .collect()
}

/// Yields the number of rows that went with at most `chains` chains; none while another replica is at it.
pub(super) async fn purge(db: &Db, chains: i64) -> Result<u64, Error> {
    /// The job within its class of locks.
    const SNAPSHOTS: i32 = 2;
    db.exec(&PURGE, &[&(LockClass::Job as i32), &SNAPSHOTS, &chains])
        .await
}

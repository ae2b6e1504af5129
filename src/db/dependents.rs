//! Every column that names an account, and how it follows when one account is merged into another.
//!
//! The statements are those of many rooms' tables: what a merge moves must be moved by one transaction, so they stand here together. A test
//! walks the schema and fails on a column that is named `*account_id*`, refers to `accounts` or is `jsonb`, and is not listed. Each takes
//! the account that goes ($1) and the one that stays ($2); both rows are locked, and they run in the order of the list.

use super::{Connection, Error, Stmt};
use crate::{ids::AccountId, statements};

/// How a column follows a merge.
#[derive(Clone, Copy, Debug)]
pub enum Follow {
    /// By this statement, within the merge.
    Now(&'static Stmt),
    /// In batches, after the merge; until then readers resolve it through `account_merges`.
    Later,
    /// Never; readers resolve it through `account_merges`.
    Resolved,
    /// It goes with its account: what it holds is of that login alone.
    Vanishes,
    /// It is no reference to a row of `accounts`.
    Foreign,
}

/// A column that names an account.
#[derive(Clone, Copy, Debug)]
pub struct Dependent {
    /// The table.
    pub table: &'static str,
    /// The column; of `jsonb`, somewhere within it.
    pub column: &'static str,
    /// What becomes of it.
    pub follow: Follow,
}

/// The registry.
pub static DEPENDENTS: &[Dependent] = &[
    dependent("accounts", "account_id", Follow::Vanishes),
    dependent("accounts", "chatgpt_account_id", Follow::Foreign),
    dependent("account_credentials", "account_id", Follow::Vanishes),
    dependent("refresh_claims", "account_id", Follow::Vanishes),
    dependent("account_merges", "to_id", Follow::Now(&MERGES)),
    dependent("account_models", "account_id", Follow::Now(&MODELS)),
    dependent("account_models", "models", Follow::Foreign),
    dependent("quota_windows", "account_id", Follow::Now(&WINDOWS)),
    dependent("quota_blocks", "account_id", Follow::Now(&BLOCKS)),
    dependent("quota_credits", "account_id", Follow::Now(&CREDITS)),
    dependent("usage_history", "account_id", Follow::Now(&HISTORY)),
    dependent("account_polls", "account_id", Follow::Vanishes),
    dependent("plan_sightings", "account_id", Follow::Vanishes),
    dependent("http_bridge_leases", "account_id", Follow::Now(&LEASES)),
    dependent("response_snapshots", "account_id", Follow::Now(&SNAPSHOTS)),
    dependent("sticky_sessions", "account_id", Follow::Now(&STICKY)),
    dependent("api_keys", "grants", Follow::Now(&GRANTS)),
    dependent("login_flows", "account_id", Follow::Now(&FLOWS)),
    dependent("login_flows", "wanted_account_id", Follow::Now(&WANTED)),
    dependent("turns", "account_id", Follow::Later),
    dependent("turns", "attempts", Follow::Later),
    dependent("request_log", "account_id", Follow::Later),
    dependent("request_log", "explanation", Follow::Resolved),
];

const fn dependent(table: &'static str, column: &'static str, follow: Follow) -> Dependent {
    Dependent {
        table,
        column,
        follow,
    }
}

/// Of two blocks of one family the one that stands counts, of two that stand the later one. One rule for what replicas learn at the same time
/// and for accounts that become one.
macro_rules! later_block {
    () => {
        "set blocked_at = greatest(known.blocked_at, excluded.blocked_at),
            lifted_at = greatest(known.lifted_at, excluded.lifted_at),
            (blocked_until, reason) = (
                select blocked_until, reason
                from (values (known.blocked_at, known.blocked_until, known.reason),
                             (excluded.blocked_at, excluded.blocked_until, excluded.reason)) as one (blocked_at, blocked_until, reason)
                order by coalesce(blocked_at < greatest(known.lifted_at, excluded.lifted_at), false), blocked_until desc, reason collate \"C\" desc
                limit 1)"
    };
}
pub(crate) use later_block;

/// The newer observation counts.
macro_rules! later_credits {
    () => {
        "set has_credits = excluded.has_credits, unlimited = excluded.unlimited, balance = excluded.balance,
            observed_at = excluded.observed_at, source = excluded.source
        where excluded.observed_at > known.observed_at"
    };
}
pub(crate) use later_credits;

statements! { "db";
    /// Merges of merges are flat: a reader looks once.
    MERGES: [UUID, UUID] = "update account_merges set to_id = $2 where to_id = $1";

    /// The catalogue that is there stays.
    MODELS: [UUID, UUID] = "
        update account_models set account_id = $2
        where account_id = $1 and not exists (select from account_models where account_id = $2)";

    /// The later observation counts, as in the quota room, which saves nothing of accounts that are locked.
    WINDOWS: [UUID, UUID] = "
        insert into quota_windows as known (account_id, family, window_minutes, used_percent, resets_at, observed_at, source)
        select $2, family, window_minutes, used_percent, resets_at, observed_at, source
        from quota_windows where account_id = $1
        on conflict (account_id, family, window_minutes) do update
        set used_percent = excluded.used_percent, resets_at = excluded.resets_at,
            observed_at = excluded.observed_at, source = excluded.source
        where excluded.observed_at > known.observed_at";

    /// Two accounts of one seat share its limits: the block that stands counts, of two the later one, as in the quota room.
    BLOCKS: [UUID, UUID] = concat!("
        insert into quota_blocks as known (account_id, family, blocked_at, blocked_until, reason, lifted_at)
        select $2, family, blocked_at, blocked_until, reason, lifted_at
        from quota_blocks where account_id = $1
        on conflict (account_id, family) do update
        ", later_block!());

    /// As `WINDOWS`.
    CREDITS: [UUID, UUID] = concat!("
        insert into quota_credits as known (account_id, has_credits, unlimited, balance, observed_at, source)
        select $2, has_credits, unlimited, balance, observed_at, source
        from quota_credits where account_id = $1
        on conflict (account_id) do update
        ", later_credits!());

    /// Written only where something changed, so there are few rows, unlike in the ledger and the log.
    HISTORY: [UUID, UUID] = "
        with moved as (delete from usage_history where account_id = $1 returning *)
        insert into usage_history (account_id, family, window_minutes, observed_at, used_percent, resets_at, source)
        select $2, family, window_minutes, observed_at, used_percent, resets_at, source from moved
        on conflict do nothing";

    /// Also what a turn wrote that ran during the merge: see `ledger::history`.
    LEASES: [UUID, UUID] = "update http_bridge_leases set account_id = $2 where account_id = $1";

    /// As `LEASES`.
    SNAPSHOTS: [UUID, UUID] = "update response_snapshots set account_id = $2 where account_id = $1";

    /// A conversation has one preference, so nothing can clash.
    STICKY: [UUID, UUID] = "update sticky_sessions set account_id = $2 where account_id = $1";

    /// Each account once, as before.
    GRANTS: [UUID, UUID] = "
        update api_keys set grants = jsonb_set(grants, '{accounts}', (
            select jsonb_agg(distinct case id when $1::text then $2::text else id end)
            from jsonb_array_elements_text(grants->'accounts') as id))
        where jsonb_typeof(grants->'accounts') = 'array' and grants->'accounts' ? $1::text";

    /// A key that named only this account serves nobody from now on.
    UNGRANT: [UUID] = "
        update api_keys set grants = jsonb_set(grants, '{accounts}', (grants->'accounts') - $1::text)
        where jsonb_typeof(grants->'accounts') = 'array' and grants->'accounts' ? $1::text";

    /// A conversation's next turn goes to another account.
    UNLEASE: [UUID] = "update http_bridge_leases set account_id = null where account_id = $1";

    /// What came of a login.
    FLOWS: [UUID, UUID] = "update login_flows set account_id = $2 where account_id = $1";

    /// What a login is for.
    WANTED: [UUID, UUID] = "update login_flows set wanted_account_id = $2 where wanted_account_id = $1";
}

/// Moves what depends on `from` to `to`, but for history. What stays behind goes with the row.
///
/// # Errors
/// Of a statement.
pub async fn repoint(tx: &Connection, from: AccountId, to: AccountId) -> Result<(), Error> {
    for dependent in DEPENDENTS {
        if let Follow::Now(stmt) = dependent.follow {
            tx.exec(stmt, &[&from, &to]).await?;
        }
    }
    Ok(())
}

/// Moves what was written for `from` after it had been merged into `to`, by work that had begun before: columns that no foreign key guards.
///
/// # Errors
/// Of a statement.
pub async fn repoint_stragglers(
    connection: &Connection,
    from: AccountId,
    to: AccountId,
) -> Result<(), Error> {
    for stmt in [&LEASES, &SNAPSHOTS] {
        connection.exec(stmt, &[&from, &to]).await?;
    }
    Ok(())
}

/// Takes out what names an account that is about to be deleted and would not go with it. History keeps its name.
///
/// # Errors
/// Of a statement.
pub async fn forget(tx: &Connection, id: AccountId) -> Result<(), Error> {
    for stmt in [&UNLEASE, &UNGRANT] {
        tx.exec(stmt, &[&id]).await?;
    }
    Ok(())
}

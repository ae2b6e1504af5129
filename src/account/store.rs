//! Statements of `accounts`, `account_credentials`, `account_models`, `plan_sightings` and `sticky_sessions`. Secrets come and go sealed.
//!
//! Whoever changes a credential or a life cycle locks the row of `accounts` first and reads in the next statement: one that waits for a lock
//! sees the locked row as it is now, but everything else as it was before the wait.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use jiff::Timestamp;
use serde_json::Value;
use tokio_postgres::Row;
use uuid::Uuid;

use super::{
    merge::{self, Who},
    sticky::Key,
};
use crate::{
    bus::{self, Topic},
    db::{Connection, Db, Error, LockClass, dependents},
    ids::{AccountId, ScopeId},
    routing::Lifecycle,
    statements,
};

statements! { "account";
    /// A plain read; a change is followed by a bump, hence by another read. A catalogue is large and only its slugs are wanted.
    LOAD: [] = r#"
        select account_id, status, plan_type,
            array(select slug #>> '{}' from jsonb_path_query(models, '$[*].slug ? (@.type() == "string")') as slug)
        from accounts left join account_models using (account_id) order by account_id"#;

    /// A plain read.
    LIST: [] = "
        select account_id, status, plan_type, email_sealed, label, status_reason, created_at, refreshed_at, access_expires_at
        from accounts join account_credentials using (account_id) order by account_id";

    /// A plain read of one statement, hence of one moment: tokens and generation belong together. Of a row that was merged away, what it was
    /// merged into.
    CREDENTIAL: [UUID] = "
        select status, chatgpt_account_id, generation, access_sealed, refresh_sealed, id_sealed, access_expires_at, refreshed_at, account_id
        from accounts join account_credentials using (account_id)
        where account_id = coalesce((select to_id from account_merges where from_id = $1), $1)";

    /// A plain read: which rows are others now. There are as many as there were logins that merged.
    MERGES: [] = "select from_id, to_id from account_merges";

    /// Serialises logins that could be of one seat or address, also while the row that they would lock is not there.
    LOCK: [INT4, INT4] = "select pg_advisory_xact_lock($1, $2)";

    /// Under the locks of the login, before and after `HOLD`: whoever logs in as this seat waits for the former, but logins of two seats may
    /// want one row. The row that a login is meant for ($4) is among them.
    ROWS: [TEXT, BYTEA, TEXT, UUID] = "
        select account_id, chatgpt_account_id, chatgpt_user_id, email_hash, created_at, email_sealed, label, nullif(plan_type, 'unknown'),
            status, generation, refreshed_at
        from accounts left join account_credentials using (account_id)
        where chatgpt_account_id = $1 or email_hash = $2 or (chatgpt_account_id is null and chatgpt_user_id = $3) or account_id = $4";

    /// What an account is now.
    CANONICAL: [UUID] = "select coalesce((select to_id from account_merges where from_id = $1), $1)";

    /// What is about to be replaced, merged away or deleted, in the order of ids. A row that was deleted meanwhile is not among them.
    HOLD: [UUID_ARRAY] = "select from accounts where account_id = any($1) order by account_id for update";

    /// After everything that depends on the row was moved; both rows are locked.
    MERGED: [UUID, UUID] = "insert into account_merges (from_id, to_id) values ($1, $2)";

    /// Under the locks of the login and of `HOLD`. A new login ends whatever was wrong with the old one.
    SAVE_ACCOUNT: [UUID, TEXT, TEXT, BYTEA, BYTEA, TEXT, TEXT, UUID] = "
        insert into accounts as known
            (account_id, chatgpt_account_id, chatgpt_user_id, email_sealed, email_hash, label, plan_type, beside)
        values ($1, $2, $3, $4, $5, $6, coalesce($7, 'unknown'), $8)
        on conflict (account_id) do update
        set chatgpt_account_id = coalesce($2, known.chatgpt_account_id), chatgpt_user_id = coalesce($3, known.chatgpt_user_id),
            email_sealed = coalesce($4, known.email_sealed), email_hash = coalesce($5, known.email_hash),
            label = coalesce($6, known.label), plan_type = coalesce($7, known.plan_type), beside = $8, status = 'active',
            status_reason = null,
            status_changed_at = case when known.status = 'active' then known.status_changed_at else clock_timestamp() end
        returning label, plan_type";

    /// After `SAVE_ACCOUNT` in its transaction. Tokens are never from the future. The generation is above that of every row that was merged.
    SAVE_CREDENTIAL: [UUID, BYTEA, BYTEA, BYTEA, TIMESTAMPTZ, TIMESTAMPTZ, INT8] = "
        insert into account_credentials as known
            (account_id, access_sealed, refresh_sealed, id_sealed, access_expires_at, refreshed_at, generation)
        values ($1, $2, $3, $4, $5, least($6, clock_timestamp()), $7)
        on conflict (account_id) do update
        set generation = excluded.generation, access_sealed = excluded.access_sealed, refresh_sealed = excluded.refresh_sealed,
            id_sealed = excluded.id_sealed, access_expires_at = excluded.access_expires_at, refreshed_at = excluded.refreshed_at";

    /// What a change of the life cycle or the credential is decided on; the next statements see what this one waited for.
    LOCK_ACCOUNT: [UUID] = "select status from accounts where account_id = $1 for no key update";

    /// Under `LOCK_ACCOUNT`.
    GENERATION: [UUID] = "select generation from account_credentials where account_id = $1";

    /// Under `LOCK_ACCOUNT`, by whoever holds the newest generation. An endpoint that sends no id token leaves the old one. A token that
    /// claims to have ended before it came says nothing of its end: a clock is wrong, and another exchange would not help.
    ROTATE: [UUID, BYTEA, BYTEA, BYTEA, TIMESTAMPTZ] = "
        update account_credentials
        set generation = generation + 1, access_sealed = $2, refresh_sealed = $3, id_sealed = coalesce($4, id_sealed),
            access_expires_at = case when $5 > clock_timestamp() then $5 end, refreshed_at = clock_timestamp()
        where account_id = $1 returning generation";

    /// Under `LOCK_ACCOUNT`.
    SET_PLAN: [UUID, TEXT] = "update accounts set plan_type = $2 where account_id = $1";

    /// Under `LOCK_ACCOUNT`.
    LEARN_PLAN: [UUID, TEXT] = "update accounts set plan_type = $2 where account_id = $1 and plan_type = 'unknown'";

    /// Under `LOCK_ACCOUNT`.
    SIGHTING: [UUID] = "
        select a.plan_type, p.plan_type, p.seen_at from accounts a left join plan_sightings p using (account_id) where account_id = $1";

    /// Under `LOCK_ACCOUNT`. The first sighting of a plan counts.
    SEE_PLAN: [UUID, TEXT] = "
        insert into plan_sightings as known (account_id, plan_type, seen_at) values ($1, $2, clock_timestamp())
        on conflict (account_id) do update set plan_type = excluded.plan_type, seen_at = excluded.seen_at
        where known.plan_type <> excluded.plan_type or known.seen_at < clock_timestamp() - interval '1 day'";

    /// Under `LOCK_ACCOUNT`.
    FORGET_SIGHTING: [UUID] = "delete from plan_sightings where account_id = $1";

    /// Under `LOCK_ACCOUNT`.
    SET_STATUS: [UUID, TEXT, TEXT] = "
        update accounts set status = $2, status_reason = $3, status_changed_at = clock_timestamp() where account_id = $1";

    /// Of racing claimants one inserts or finds the claim over; the claim of an account that was merged away is nobody's.
    CLAIM: [UUID, UUID, FLOAT8] = "
        insert into refresh_claims as known (account_id, claimed_by, claimed_until)
        select account_id, $2, clock_timestamp() + make_interval(secs => $3) from accounts where account_id = $1
        on conflict (account_id) do update set claimed_by = excluded.claimed_by, claimed_until = excluded.claimed_until
        where known.claimed_until < clock_timestamp()";

    /// A plain read, after `CLAIM` has failed. Nil: nobody, but the last exchange has failed a moment ago.
    CLAIM_HOLDER: [UUID] = "select claimed_by from refresh_claims where account_id = $1 and claimed_until >= clock_timestamp()";

    /// Only the holder's, and only while nobody else has taken it.
    RENEW_CLAIM: [UUID, UUID, FLOAT8] = "
        update refresh_claims set claimed_until = clock_timestamp() + make_interval(secs => $3)
        where account_id = $1 and claimed_by = $2";

    /// Whoever has taken it over keeps it.
    UNCLAIM: [UUID, UUID] = "delete from refresh_claims where account_id = $1 and claimed_by = $2";

    /// As `UNCLAIM`. The guardian waits 5, 10, 20 minutes, and so on up to an hour.
    UNCLAIM_FAILED: [UUID, UUID, FLOAT8] = "
        update refresh_claims set claimed_by = '00000000-0000-0000-0000-000000000000', failures = failures + 1,
            claimed_until = clock_timestamp() + make_interval(secs => $3),
            retry_at = clock_timestamp() + make_interval(mins => least(60, 5 * 2 ^ least(failures, 10))::int)
        where account_id = $1 and claimed_by = $2";

    /// By the holder of the claim. Yields whether the same generation was doubted before.
    DOUBT: [UUID, UUID, INT8] = "
        update refresh_claims c set doubted_generation = $3 from refresh_claims before
        where c.account_id = $1 and c.claimed_by = $2 and before.account_id = c.account_id
        returning coalesce(before.doubted_generation = $3, false)";

    /// A plain read: whoever refreshes looks again.
    DUE: [FLOAT8, FLOAT8] = "
        select account_id from accounts join account_credentials using (account_id) left join refresh_claims c using (account_id)
        where status in ('active', 'paused') and coalesce(c.retry_at < clock_timestamp(), true)
            and (access_expires_at < clock_timestamp() + make_interval(secs => $1)
                or refreshed_at < clock_timestamp() - make_interval(secs => $2))
        order by refreshed_at limit 100";

    /// Under `HOLD`; locks what depends on the account.
    DELETE: [UUID] = "delete from accounts where account_id = $1";

    /// The account's row is locked against deletion; of two writers the later one counts.
    SAVE_MODELS: [UUID, JSONB] = "
        insert into account_models as known (account_id, models)
        select account_id, $2 from accounts where account_id = $1 for key share
        on conflict (account_id) do update set models = excluded.models, changed_at = excluded.changed_at
        where known.models <> excluded.models";

    /// A plain read.
    MODELS: [] = "select account_id, models from account_models order by account_id";

    /// A plain read; written by the ledger, with the settlement of a turn.
    STICKY: [UUID, TEXT, BYTEA] = "
        select account_id from sticky_sessions
        where scope_id = $1 and key_kind = $2 and key_hash = $3 and expires_at > clock_timestamp()";

    /// Rows that a settlement prolongs at this moment are skipped, so that two writers cannot deadlock.
    PURGE_STICKY: [INT8] = "
        delete from sticky_sessions where (scope_id, key_kind, key_hash) in (
            select scope_id, key_kind, key_hash from sticky_sessions
            where expires_at <= clock_timestamp() order by expires_at limit $1 for update skip locked)";
}

/// What the database keeps of a login's tokens.
pub(super) struct SealedTokens {
    pub(super) access: Vec<u8>,
    pub(super) refresh: Vec<u8>,
    pub(super) id_token: Option<Vec<u8>>,
    pub(super) access_expires_at: Option<Timestamp>,
}

/// A row of `accounts` to be written; what is `None` stays as it is.
pub(super) struct NewAccount<'a> {
    pub(super) id: AccountId,
    pub(super) who: &'a Who,
    pub(super) email_sealed: Option<&'a [u8]>,
    pub(super) label: Option<&'a str>,
    pub(super) plan: Option<&'a str>,
    pub(super) beside: bool,
}

/// A row that a login may replace or merge away.
pub(super) struct KnownRow {
    pub(super) row: merge::Row,
    pub(super) email_sealed: Option<Vec<u8>>,
    pub(super) label: Option<String>,
    /// `None` if it is unknown.
    pub(super) plan: Option<String>,
    pub(super) lifecycle: Lifecycle,
    /// 0 without a credential.
    pub(super) generation: i64,
    pub(super) refreshed_at: Option<Timestamp>,
}

/// A status of a newer release is not ours to use.
pub(super) fn lifecycle(word: &str) -> Lifecycle {
    word.parse().unwrap_or(Lifecycle::Paused)
}

pub(super) async fn load(db: &Db) -> Result<Vec<super::AccountEntry>, Error> {
    let rows = db.all(&LOAD, &[]).await?;
    let entry = |row: &Row| {
        let models: BTreeSet<String> = row.try_get::<_, Vec<String>>(3)?.into_iter().collect();
        Ok(super::AccountEntry {
            id: row.try_get(0)?,
            lifecycle: lifecycle(row.try_get(1)?),
            plan: row.try_get(2)?,
            models: (!models.is_empty()).then(|| models.into()),
        })
    };
    rows.iter().map(entry).collect()
}

pub(super) async fn list(db: &Db) -> Result<Vec<Row>, Error> {
    db.all(&LIST, &[]).await
}

pub(super) async fn credential(db: &Db, id: AccountId) -> Result<Option<Row>, Error> {
    db.opt(&CREDENTIAL, &[&id]).await
}

pub(super) async fn merges(db: &Db) -> Result<HashMap<AccountId, AccountId>, Error> {
    let rows = db.all(&MERGES, &[]).await?;
    let pair = |row: &Row| Ok((row.try_get(0)?, row.try_get(1)?));
    rows.iter().map(pair).collect()
}

pub(super) async fn advisory(tx: &Connection, class: LockClass, key: i32) -> Result<(), Error> {
    tx.all(&LOCK, &[&(class as i32), &key]).await.map(drop)
}

pub(super) async fn canonical(tx: &Connection, id: AccountId) -> Result<AccountId, Error> {
    Ok(tx.one(&CANONICAL, &[&id]).await?.try_get(0)?)
}

/// Every row that could be a login's, and the row that it is meant for.
pub(super) async fn rows(
    tx: &Connection,
    who: &Who,
    target: Option<AccountId>,
) -> Result<Vec<KnownRow>, Error> {
    let rows = tx
        .all(&ROWS, &[&who.workspace, &who.email, &who.user, &target])
        .await?;
    let read = |row: &Row| {
        Ok(KnownRow {
            row: merge::Row {
                id: row.try_get(0)?,
                who: Who {
                    workspace: row.try_get(1)?,
                    user: row.try_get(2)?,
                    email: row.try_get(3)?,
                },
                created_at: row.try_get(4)?,
            },
            email_sealed: row.try_get(5)?,
            label: row.try_get(6)?,
            plan: row.try_get(7)?,
            lifecycle: lifecycle(row.try_get(8)?),
            generation: row.try_get::<_, Option<i64>>(9)?.unwrap_or(0),
            refreshed_at: row.try_get(10)?,
        })
    };
    rows.iter().map(read).collect()
}

/// Locks rows against every change; yields how many are still there.
pub(super) async fn hold(tx: &Connection, ids: &[AccountId]) -> Result<u64, Error> {
    tx.exec(&HOLD, &[&ids]).await
}

/// Merges one held row into another.
pub(super) async fn merge(tx: &Connection, from: AccountId, to: AccountId) -> Result<(), Error> {
    dependents::repoint(tx, from, to).await?;
    tx.exec(&MERGED, &[&from, &to]).await?;
    tx.exec(&DELETE, &[&from]).await.map(drop)
}

/// Yields the label and the plan that are stored now.
pub(super) async fn save_account(
    tx: &Connection,
    account: &NewAccount<'_>,
) -> Result<(Option<String>, String), Error> {
    let NewAccount {
        id,
        who,
        email_sealed,
        label,
        plan,
        beside,
    } = account;
    let beside = if *beside { id.0 } else { Uuid::nil() };
    let row = tx
        .one(
            &SAVE_ACCOUNT,
            &[
                id,
                &who.workspace,
                &who.user,
                email_sealed,
                &who.email,
                label,
                plan,
                &beside,
            ],
        )
        .await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

pub(super) async fn save_credential(
    tx: &Connection,
    id: AccountId,
    tokens: &SealedTokens,
    refreshed_at: Timestamp,
    generation: i64,
) -> Result<(), Error> {
    let SealedTokens {
        access,
        refresh,
        id_token,
        access_expires_at,
    } = tokens;
    tx.exec(
        &SAVE_CREDENTIAL,
        &[
            &id,
            access,
            refresh,
            id_token,
            access_expires_at,
            &refreshed_at,
            &generation,
        ],
    )
    .await
    .map(drop)
}

/// Locks an account; yields its status, or `None` if there is no such account.
pub(super) async fn lock(tx: &Connection, id: AccountId) -> Result<Option<Lifecycle>, Error> {
    let row = tx.opt(&LOCK_ACCOUNT, &[&id]).await?;
    Ok(row.map(|row| row.try_get(0).map(lifecycle)).transpose()?)
}

/// Of a locked account.
pub(super) async fn generation(tx: &Connection, id: AccountId) -> Result<Option<i64>, Error> {
    let row = tx.opt(&GENERATION, &[&id]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

/// Replaces the tokens of a locked account; yields the new generation.
pub(super) async fn rotate(
    tx: &Connection,
    id: AccountId,
    tokens: &SealedTokens,
) -> Result<i64, Error> {
    let SealedTokens {
        access,
        refresh,
        id_token,
        access_expires_at,
    } = tokens;
    let row = tx
        .one(
            &ROTATE,
            &[&id, access, refresh, id_token, access_expires_at],
        )
        .await?;
    Ok(row.try_get(0)?)
}

/// A plan and what was named against it, when.
pub(super) type Sighting = (String, Option<(String, Timestamp)>);

/// Of a locked account, its plan and what was named against it. `None` if there is no such account.
pub(super) async fn sighting(tx: &Connection, id: AccountId) -> Result<Option<Sighting>, Error> {
    let Some(row) = tx.opt(&SIGHTING, &[&id]).await? else {
        return Ok(None);
    };
    let (named, seen_at): (Option<String>, Option<Timestamp>) = (row.try_get(1)?, row.try_get(2)?);
    Ok(Some((row.try_get(0)?, named.zip(seen_at))))
}

/// Of a locked account.
pub(super) async fn see_plan(tx: &Connection, id: AccountId, named: &str) -> Result<(), Error> {
    tx.exec(&SEE_PLAN, &[&id, &named]).await.map(drop)
}

/// Of a locked account.
pub(super) async fn forget_sighting(tx: &Connection, id: AccountId) -> Result<(), Error> {
    tx.exec(&FORGET_SIGHTING, &[&id]).await.map(drop)
}

/// Of a locked account.
pub(super) async fn set_plan(tx: &Connection, id: AccountId, plan: &str) -> Result<(), Error> {
    tx.exec(&SET_PLAN, &[&id, &plan]).await.map(drop)
}

/// Of a locked account whose plan nobody knew.
pub(super) async fn learn_plan(tx: &Connection, id: AccountId, plan: &str) -> Result<(), Error> {
    tx.exec(&LEARN_PLAN, &[&id, &plan]).await.map(drop)
}

/// Of a locked account.
pub(super) async fn set_status(
    tx: &Connection,
    id: AccountId,
    to: Lifecycle,
    reason: Option<&str>,
) -> Result<(), Error> {
    tx.exec(&SET_STATUS, &[&id, &to.as_str(), &reason])
        .await
        .map(drop)
}

pub(super) async fn claim(db: &Db, id: AccountId, me: Uuid, time: Duration) -> Result<bool, Error> {
    db.exec(&CLAIM, &[&id, &me, &time.as_secs_f64()])
        .await
        .map(|rows| rows == 1)
}

pub(super) async fn claim_holder(db: &Db, id: AccountId) -> Result<Option<Uuid>, Error> {
    let row = db.opt(&CLAIM_HOLDER, &[&id]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

pub(super) async fn renew_claim(
    db: &Db,
    id: AccountId,
    claim: Uuid,
    time: Duration,
) -> Result<(), Error> {
    db.exec(&RENEW_CLAIM, &[&id, &claim, &time.as_secs_f64()])
        .await
        .map(drop)
}

pub(super) async fn unclaim(db: &Db, id: AccountId, claim: Uuid) -> Result<(), Error> {
    db.exec(&UNCLAIM, &[&id, &claim]).await.map(drop)
}

pub(super) async fn unclaim_failed(
    db: &Db,
    id: AccountId,
    claim: Uuid,
    pause: Duration,
) -> Result<(), Error> {
    db.exec(&UNCLAIM_FAILED, &[&id, &claim, &pause.as_secs_f64()])
        .await
        .map(drop)
}

pub(super) async fn doubt(
    db: &Db,
    id: AccountId,
    claim: Uuid,
    generation: i64,
) -> Result<bool, Error> {
    let row = db.opt(&DOUBT, &[&id, &claim, &generation]).await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?.unwrap_or(false))
}

pub(super) async fn due(db: &Db, lead: Duration, age: Duration) -> Result<Vec<AccountId>, Error> {
    let rows = db
        .all(&DUE, &[&lead.as_secs_f64(), &age.as_secs_f64()])
        .await?;
    rows.iter().map(|row| Ok(row.try_get(0)?)).collect()
}

/// Whether there was such an account.
pub(super) async fn delete(tx: &Connection, id: AccountId) -> Result<bool, Error> {
    let there = hold(tx, &[id]).await? == 1;
    if there {
        dependents::forget(tx, id).await?;
        tx.exec(&DELETE, &[&id]).await?;
    }
    Ok(there)
}

pub(super) async fn save_models(db: &Db, id: AccountId, models: &Value) -> Result<(), Error> {
    let tx = db.begin().await?;
    if tx.exec(&SAVE_MODELS, &[&id, models]).await? == 1 {
        return bus::commit(tx, &[Topic::Models]).await;
    }
    tx.commit().await
}

pub(super) async fn models(db: &Db) -> Result<Vec<(AccountId, Vec<Value>)>, Error> {
    let rows = db.all(&MODELS, &[]).await?;
    let catalogue = |row: &Row| {
        let models = match row.try_get(1)? {
            Value::Array(models) => models,
            _ => Vec::new(),
        };
        Ok((row.try_get(0)?, models))
    };
    rows.iter().map(catalogue).collect()
}

pub(super) async fn sticky(db: &Db, scope: ScopeId, key: &Key) -> Result<Option<AccountId>, Error> {
    let row = db
        .opt(&STICKY, &[&scope, &key.kind.as_str(), &key.hash.as_slice()])
        .await?;
    Ok(row.map(|row| row.try_get(0)).transpose()?)
}

/// Deletes at most `limit` that have expired.
pub(super) async fn purge_sticky(db: &Db, limit: i64) -> Result<u64, Error> {
    db.exec(&PURGE_STICKY, &[&limit]).await
}

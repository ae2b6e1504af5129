//! Statements of accounts, their credentials and models, and of sticky sessions.

use std::{collections::BTreeSet, sync::Arc};

use jiff::Timestamp;
use serde_json::Value;
use tokio_postgres::Row;

use crate::{
    db::{Connection, Db, Error, LockClass},
    ids::{AccountId, ScopeId},
    routing::Lifecycle,
    secret, statements,
};

statements! { "account";
    /// Serialises what touches one identity; held to the end of the transaction.
    LOCK: [INT4, INT4] = "select pg_advisory_xact_lock($1, $2)";

    /// Under the seat's lock: nobody else can add the row meanwhile.
    OF_SEAT: [TEXT, TEXT] = "
        select account_id from accounts where chatgpt_account_id = $1 and chatgpt_user_id = $2 for update";

    /// Under the seat's lock. A login makes an account active again; an unknown plan or label leaves the known one.
    PUT_ACCOUNT: [UUID, TEXT, TEXT, BYTEA, BYTEA, TEXT, TEXT] = "
        insert into accounts (account_id, chatgpt_account_id, chatgpt_user_id, email_sealed, email_hash, label, plan_type)
        values ($1, $2, $3, $4, $5, $6, $7)
        on conflict (account_id) do update set
            chatgpt_account_id = excluded.chatgpt_account_id, chatgpt_user_id = excluded.chatgpt_user_id,
            email_sealed = coalesce(excluded.email_sealed, accounts.email_sealed),
            email_hash = coalesce(excluded.email_hash, accounts.email_hash),
            label = coalesce(excluded.label, accounts.label),
            plan_type = case excluded.plan_type when 'unknown' then accounts.plan_type else excluded.plan_type end,
            status = 'active', status_reason = null, status_changed_at = clock_timestamp()";

    /// Under the seat's lock; a refresh that is under way finds its generation gone.
    PUT_CREDENTIAL: [UUID, BYTEA, BYTEA, BYTEA, TIMESTAMPTZ] = "
        insert into account_credentials (account_id, access_sealed, refresh_sealed, id_sealed, access_expires_at)
        values ($1, $2, $3, $4, $5)
        on conflict (account_id) do update set
            generation = account_credentials.generation + 1, access_sealed = excluded.access_sealed,
            refresh_sealed = excluded.refresh_sealed, id_sealed = coalesce(excluded.id_sealed, account_credentials.id_sealed),
            access_expires_at = excluded.access_expires_at, refreshed_at = clock_timestamp()";

    /// A compare-and-set on the generation: of two writers one finds its row.
    ROTATE: [UUID, INT8, BYTEA, BYTEA, BYTEA, TIMESTAMPTZ] = "
        update account_credentials set
            generation = generation + 1, access_sealed = $3, refresh_sealed = $4, id_sealed = coalesce($5, id_sealed),
            access_expires_at = $6, refreshed_at = clock_timestamp()
        where account_id = $1 and generation = $2
        returning generation";

    /// After ROTATE, in its transaction.
    SET_PLAN: [UUID, TEXT] = "update accounts set plan_type = $2 where account_id = $1 and plan_type <> $2";

    /// Locks the credential first, so that a rotation either came before (and the verdict is void) or waits.
    CONDEMN: [UUID, TEXT, TEXT, INT8] = "
        with judged as (select account_id from account_credentials where account_id = $1 and generation = $4 for update)
        update accounts a set status = $2, status_reason = $3, status_changed_at = clock_timestamp()
        from judged where a.account_id = judged.account_id and a.status in ('active', 'paused')
        returning a.account_id";

    /// Reads committed rows.
    CREDENTIAL: [UUID] = "
        select c.generation, c.access_sealed, c.refresh_sealed, c.access_expires_at, c.refreshed_at, a.chatgpt_account_id, a.status
        from account_credentials c join accounts a using (account_id) where c.account_id = $1";

    /// Reads committed rows.
    ENTRIES: [] = "
        select a.account_id, a.status, a.plan_type,
               (select array_agg(m ->> 'slug') from jsonb_array_elements(models) m where m ->> 'slug' is not null)
        from accounts a left join account_models using (account_id) order by a.account_id";

    /// Reads committed rows.
    LIST: [] = "
        select a.account_id, a.label, a.email_sealed, a.plan_type, a.status, a.status_reason, a.created_at, c.refreshed_at,
               c.access_expires_at
        from accounts a join account_credentials c using (account_id) order by a.created_at, a.account_id";

    /// Locks the row until the transaction has decided.
    STATUS: [UUID] = "select status from accounts where account_id = $1 for update";

    /// The row is locked by STATUS.
    SET_STATUS: [UUID, TEXT] = "
        update accounts set status = $2, status_reason = null, status_changed_at = clock_timestamp() where account_id = $1";

    /// Dependents go with it.
    DELETE: [UUID] = "delete from accounts where account_id = $1";

    /// Last writer wins: every copy is a good one. No row: the list is the same, or the account is gone.
    PUT_MODELS: [UUID, JSONB] = "
        insert into account_models (account_id, models) select $1, $2 where exists (select 1 from accounts where account_id = $1)
        on conflict (account_id) do update set models = excluded.models, fetched_at = clock_timestamp()
        where account_models.models <> excluded.models
        returning account_id";

    /// Reads committed rows.
    MODELS: [] = "select account_id, models from account_models order by account_id";

    /// Reads committed rows.
    STICKY: [UUID, TEXT, BYTEA] = "
        select account_id from sticky_sessions
        where scope_id = $1 and key_kind = $2 and key_hash = $3 and expires_at > clock_timestamp()";

    /// In batches; a row that is being renewed is skipped.
    PURGE_STICKY: [INT8] = "
        with old as (select scope_id, key_kind, key_hash from sticky_sessions where expires_at <= clock_timestamp()
                     limit $1 for update skip locked)
        delete from sticky_sessions s using old
        where (s.scope_id, s.key_kind, s.key_hash) = (old.scope_id, old.key_kind, old.key_hash)";
}

pub(super) struct Email {
    pub(super) sealed: Vec<u8>,
    pub(super) hash: [u8; 32],
}

pub(super) struct Profile<'a> {
    pub(super) chatgpt_account_id: Option<&'a str>,
    pub(super) chatgpt_user_id: Option<&'a str>,
    pub(super) email: Option<Email>,
    pub(super) label: Option<&'a str>,
    pub(super) plan: &'a str,
}

pub(super) struct Sealed {
    pub(super) access: Vec<u8>,
    pub(super) refresh: Vec<u8>,
    pub(super) id_token: Option<Vec<u8>>,
    pub(super) access_expires_at: Option<Timestamp>,
}

pub(super) struct ListedRow {
    pub(super) id: AccountId,
    pub(super) label: Option<String>,
    pub(super) email_sealed: Option<Vec<u8>>,
    pub(super) plan: String,
    pub(super) lifecycle: Lifecycle,
    pub(super) reason: Option<String>,
    pub(super) created_at: Timestamp,
    pub(super) refreshed_at: Timestamp,
    pub(super) access_expires_at: Option<Timestamp>,
}

pub(super) struct CredentialRow {
    pub(super) generation: i64,
    pub(super) access_sealed: Vec<u8>,
    pub(super) refresh_sealed: Vec<u8>,
    pub(super) access_expires_at: Option<Timestamp>,
    pub(super) refreshed_at: Timestamp,
    pub(super) chatgpt_account_id: Option<String>,
    pub(super) lifecycle: Lifecycle,
}

pub(super) async fn lock(
    connection: &Connection,
    class: LockClass,
    value: &str,
) -> Result<(), Error> {
    let [a, b, c, d, ..] = secret::digest(&[value.as_bytes()]);
    connection
        .all(&LOCK, &[&(class as i32), &i32::from_be_bytes([a, b, c, d])])
        .await
        .map(drop)
}

pub(super) async fn of_seat(
    connection: &Connection,
    account: &str,
    user: &str,
) -> Result<Option<AccountId>, Error> {
    connection
        .opt(&OF_SEAT, &[&account, &user])
        .await?
        .map(|row| Ok(row.try_get(0)?))
        .transpose()
}

pub(super) async fn put_account(
    connection: &Connection,
    id: AccountId,
    profile: &Profile<'_>,
) -> Result<(), Error> {
    let sealed = profile.email.as_ref().map(|email| email.sealed.as_slice());
    let hash = profile.email.as_ref().map(|email| email.hash.as_slice());
    let Profile {
        chatgpt_account_id,
        chatgpt_user_id,
        label,
        plan,
        ..
    } = profile;
    let row: [&(dyn tokio_postgres::types::ToSql + Sync); 7] = [
        &id,
        chatgpt_account_id,
        chatgpt_user_id,
        &sealed,
        &hash,
        label,
        plan,
    ];
    connection.exec(&PUT_ACCOUNT, &row).await.map(drop)
}

pub(super) async fn put_credential(
    connection: &Connection,
    id: AccountId,
    new: &Sealed,
) -> Result<(), Error> {
    let Sealed {
        access,
        refresh,
        id_token,
        access_expires_at,
    } = new;
    connection
        .exec(
            &PUT_CREDENTIAL,
            &[&id, access, refresh, id_token, access_expires_at],
        )
        .await
        .map(drop)
}

pub(super) async fn rotate(
    connection: &Connection,
    id: AccountId,
    expected: i64,
    new: &Sealed,
    plan: Option<&str>,
) -> Result<Option<i64>, Error> {
    let Sealed {
        access,
        refresh,
        id_token,
        access_expires_at,
    } = new;
    let row = connection
        .opt(
            &ROTATE,
            &[&id, &expected, access, refresh, id_token, access_expires_at],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    if let Some(plan) = plan {
        connection.exec(&SET_PLAN, &[&id, &plan]).await?;
    }
    Ok(Some(row.try_get(0)?))
}

pub(super) async fn condemn(
    connection: &Connection,
    id: AccountId,
    lifecycle: Lifecycle,
    reason: &str,
    generation: i64,
) -> Result<bool, Error> {
    let row = connection
        .opt(&CONDEMN, &[&id, &lifecycle.as_str(), &reason, &generation])
        .await?;
    Ok(row.is_some())
}

pub(super) async fn credential(db: &Db, id: AccountId) -> Result<Option<CredentialRow>, Error> {
    let Some(row) = db.opt(&CREDENTIAL, &[&id]).await? else {
        return Ok(None);
    };
    Ok(Some(CredentialRow {
        generation: row.try_get(0)?,
        access_sealed: row.try_get(1)?,
        refresh_sealed: row.try_get(2)?,
        access_expires_at: row.try_get(3)?,
        refreshed_at: row.try_get(4)?,
        chatgpt_account_id: row.try_get(5)?,
        lifecycle: word(&row, 6)?,
    }))
}

pub(super) async fn entries(db: &Db) -> Result<Vec<super::AccountEntry>, Error> {
    let read = |row: &Row| {
        let models: Option<Vec<String>> = row.try_get(3)?;
        Ok(super::AccountEntry {
            id: row.try_get(0)?,
            lifecycle: word(row, 1)?,
            plan: row.try_get(2)?,
            models: models.map(|models| Arc::new(models.into_iter().collect::<BTreeSet<_>>())),
        })
    };
    db.all(&ENTRIES, &[]).await?.iter().map(read).collect()
}

pub(super) async fn list(db: &Db) -> Result<Vec<ListedRow>, Error> {
    let read = |row: &Row| {
        Ok(ListedRow {
            id: row.try_get(0)?,
            label: row.try_get(1)?,
            email_sealed: row.try_get(2)?,
            plan: row.try_get(3)?,
            lifecycle: word(row, 4)?,
            reason: row.try_get(5)?,
            created_at: row.try_get(6)?,
            refreshed_at: row.try_get(7)?,
            access_expires_at: row.try_get(8)?,
        })
    };
    db.all(&LIST, &[]).await?.iter().map(read).collect()
}

pub(super) async fn lifecycle(
    connection: &Connection,
    id: AccountId,
) -> Result<Option<Lifecycle>, Error> {
    connection
        .opt(&STATUS, &[&id])
        .await?
        .map(|row| word(&row, 0))
        .transpose()
}

pub(super) async fn set_status(
    connection: &Connection,
    id: AccountId,
    to: Lifecycle,
) -> Result<(), Error> {
    connection
        .exec(&SET_STATUS, &[&id, &to.as_str()])
        .await
        .map(drop)
}

pub(super) async fn delete(connection: &Connection, id: AccountId) -> Result<bool, Error> {
    connection.exec(&DELETE, &[&id]).await.map(|rows| rows == 1)
}

pub(super) async fn put_models(
    connection: &Connection,
    id: AccountId,
    models: &Value,
) -> Result<bool, Error> {
    connection
        .opt(&PUT_MODELS, &[&id, models])
        .await
        .map(|row| row.is_some())
}

pub(super) async fn models(db: &Db) -> Result<Vec<(AccountId, Vec<Value>)>, Error> {
    let read = |row: &Row| {
        let models: Value = row.try_get(1)?;
        Ok((
            row.try_get(0)?,
            models.as_array().cloned().unwrap_or_default(),
        ))
    };
    db.all(&MODELS, &[]).await?.iter().map(read).collect()
}

pub(super) async fn sticky(
    db: &Db,
    scope: ScopeId,
    kind: &str,
    hash: &[u8],
) -> Result<Option<AccountId>, Error> {
    db.opt(&STICKY, &[&scope, &kind, &hash])
        .await?
        .map(|row| Ok(row.try_get(0)?))
        .transpose()
}

pub(super) async fn purge_sticky(db: &Db, batch: i64) -> Result<u64, Error> {
    db.exec(&PURGE_STICKY, &[&batch]).await
}

/// A word that the table's check constraint knows. A newer release may know more: such an account does not serve here.
fn word(row: &Row, column: usize) -> Result<Lifecycle, Error> {
    let word: &str = row.try_get(column)?;
    Ok(word.parse().unwrap_or(Lifecycle::Paused))
}

//! Statements of `login_flows`. Every change names the claim under which it was decided; a row that has ended never changes again.

use std::time::Duration;

use tokio_postgres::Row;
use uuid::Uuid;

use super::{Flow, Method, NewFlow, Standing};
use crate::{
    account::Imported,
    db::{Connection, Db, Error},
    ids::{AccountId, FlowId},
    statements,
};

/// Columns of a [`Flow`].
macro_rules! flow_columns {
    () => {
        "flow_id, method, case when status = 'pending' and expires_at <= clock_timestamp() then 'expired' else status end, error, account_id, \
         created, interval_seconds, expires_at"
    };
}

statements! { "account/flow";
    /// A fresh random id and state.
    BEGIN: [UUID, TEXT, UUID, TEXT, BYTEA, BYTEA, FLOAT8, FLOAT8] = concat!("
        insert into login_flows
            (flow_id, method, wanted_account_id, label, state_hash, secrets_sealed, interval_seconds, expires_at)
        values ($1, $2, $3, $4, $5, $6, $7::int, clock_timestamp() + make_interval(secs => $8))
        returning ", flow_columns!());

    /// A plain read.
    FLOW: [UUID] = concat!("select ", flow_columns!(), " from login_flows where flow_id = $1");

    /// A plain read; a state never changes.
    HAS_STATE: [UUID, BYTEA] = "select from login_flows where flow_id = $1 and state_hash = $2";

    /// Of racing replicas one finds it free. A poll comes no sooner after the last than upstream wants.
    CLAIM: [UUID, UUID, FLOAT8] = "
        update login_flows set claimed_by = $2, claimed_until = clock_timestamp() + make_interval(secs => $3), polled_at = clock_timestamp()
        where flow_id = $1 and status = 'pending' and expires_at > clock_timestamp()
            and coalesce(claimed_until < clock_timestamp(), true)
            and coalesce(polled_at + make_interval(secs => interval_seconds) <= clock_timestamp(), true)
        returning wanted_account_id, label, secrets_sealed";

    /// By whoever has the claim.
    RENEW: [UUID, UUID, FLOAT8] = "
        update login_flows set claimed_until = clock_timestamp() + make_interval(secs => $3)
        where flow_id = $1 and claimed_by = $2 and status = 'pending'";

    /// As `RENEW`.
    RELEASE: [UUID, UUID, TEXT, FLOAT8] = "
        update login_flows set claimed_by = null, claimed_until = null, error = $3, interval_seconds = interval_seconds + $4::int
        where flow_id = $1 and claimed_by = $2 and status = 'pending'";

    /// As `RENEW`. The secrets are of no use any more.
    FAIL: [UUID, UUID, TEXT] = "
        update login_flows set status = 'failed', error = $3, finished_at = clock_timestamp(), claimed_until = null, secrets_sealed = ''
        where flow_id = $1 and claimed_by = $2 and status = 'pending'";

    /// In the transaction that stores the login, after its accounts are locked. Called off before: no row, and nothing is stored.
    FINISH: [UUID, UUID, UUID, BOOL] = "
        update login_flows set status = 'succeeded', error = null, account_id = $3, created = $4, finished_at = clock_timestamp(),
            claimed_until = null, secrets_sealed = ''
        where flow_id = $1 and claimed_by = $2 and status = 'pending'";

    /// Whoever exchanges at this moment finds it when it finishes.
    CANCEL: [UUID] = "
        update login_flows set
            status = case status when 'pending' then 'cancelled' else status end,
            secrets_sealed = case status when 'pending' then '' else secrets_sealed end,
            finished_at = coalesce(finished_at, clock_timestamp())
        where flow_id = $1";

    /// Nobody acts for what has expired.
    PURGE: [FLOAT8] = "delete from login_flows where expires_at < clock_timestamp() - make_interval(secs => $1)";
}

pub(super) async fn begin(
    db: &Db,
    id: FlowId,
    new: &NewFlow<'_>,
    wanted: Option<AccountId>,
    state: Option<&[u8; 32]>,
    sealed: &[u8],
) -> Result<Flow, Error> {
    let row = db
        .one(
            &BEGIN,
            &[
                &id,
                &new.method.as_str(),
                &wanted,
                &new.label,
                &state.map(<[u8; 32]>::as_slice),
                &sealed,
                &new.interval.as_secs_f64(),
                &new.lifetime.as_secs_f64(),
            ],
        )
        .await?;
    read(&row)
}

pub(super) async fn flow(db: &Db, id: FlowId) -> Result<Option<Flow>, Error> {
    db.opt(&FLOW, &[&id]).await?.as_ref().map(read).transpose()
}

pub(super) async fn has_state(db: &Db, id: FlowId, state: &[u8; 32]) -> Result<bool, Error> {
    let row = db.opt(&HAS_STATE, &[&id, &state.as_slice()]).await?;
    Ok(row.is_some())
}

/// What the account is meant to be, its label, and the sealed secrets.
pub(super) type Claimed = (Option<AccountId>, Option<String>, Vec<u8>);

pub(super) async fn claim(
    db: &Db,
    id: FlowId,
    claim: Uuid,
    time: Duration,
) -> Result<Option<Claimed>, Error> {
    let row = db.opt(&CLAIM, &[&id, &claim, &time.as_secs_f64()]).await?;
    row.map(|row| Ok((row.try_get(0)?, row.try_get(1)?, row.try_get(2)?)))
        .transpose()
}

pub(super) async fn renew(db: &Db, id: FlowId, claim: Uuid, time: Duration) -> Result<(), Error> {
    db.exec(&RENEW, &[&id, &claim, &time.as_secs_f64()])
        .await
        .map(drop)
}

pub(super) async fn release(
    db: &Db,
    id: FlowId,
    claim: Uuid,
    error: Option<&str>,
    slower: Duration,
) -> Result<(), Error> {
    db.exec(&RELEASE, &[&id, &claim, &error, &slower.as_secs_f64()])
        .await
        .map(drop)
}

pub(super) async fn fail(db: &Db, id: FlowId, claim: Uuid, error: &str) -> Result<(), Error> {
    db.exec(&FAIL, &[&id, &claim, &error]).await.map(drop)
}

/// Whether it was still ours to finish.
pub(super) async fn finish(
    tx: &Connection,
    id: FlowId,
    claim: Uuid,
    imported: &Imported,
) -> Result<bool, Error> {
    tx.exec(&FINISH, &[&id, &claim, &imported.id, &imported.created])
        .await
        .map(|rows| rows == 1)
}

/// Whether there is such a login.
pub(super) async fn cancel(db: &Db, id: FlowId) -> Result<bool, Error> {
    db.exec(&CANCEL, &[&id]).await.map(|rows| rows == 1)
}

pub(super) async fn purge(db: &Db, after: Duration) -> Result<u64, Error> {
    db.exec(&PURGE, &[&after.as_secs_f64()]).await
}

fn read(row: &Row) -> Result<Flow, Error> {
    let account_id: Option<AccountId> = row.try_get(4)?;
    let created: bool = row.try_get(5)?;
    Ok(Flow {
        id: row.try_get(0)?,
        method: match row.try_get(1)? {
            "device" => Method::Device,
            _ => Method::Browser,
        },
        status: match row.try_get(2)? {
            "pending" => Standing::Pending,
            "succeeded" => Standing::Succeeded,
            "cancelled" => Standing::Cancelled,
            "expired" => Standing::Expired,
            _ => Standing::Failed,
        },
        error: row.try_get(3)?,
        account_id,
        created: account_id.map(|_| created),
        interval_seconds: row.try_get(6)?,
        expires_at: row.try_get(7)?,
    })
}

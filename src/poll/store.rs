//! Statements of `account_polls`.

use std::time::Duration;

use tokio_postgres::Row;

use super::{Due, Question, Schedule};
use crate::{
    db::{Db, Error},
    ids::AccountId,
    statements,
};

statements! { "poll";
    /// Accounts are locked against deletion; one that is locked otherwise comes the next time.
    COVER: [TEXT, FLOAT8] = "
        with missing as (
            select account_id from accounts
            where not exists (select from account_polls asked where asked.account_id = accounts.account_id and kind = $1)
            order by account_id for key share skip locked)
        insert into account_polls (account_id, kind, due_at)
        select account_id, $1, clock_timestamp() + make_interval(secs => $2 * (row_number() over (order by account_id) - 1) / count(*) over ())
        from missing
        on conflict do nothing";

    /// Of two replicas one finds the row locked and takes another: moving `due_at` is the claim.
    CLAIM: [TEXT, FLOAT8] = "
        update account_polls set due_at = clock_timestamp() + make_interval(secs => $2)
        where (account_id, kind) = (
            select account_id, kind from account_polls join accounts using (account_id)
            where kind = $1 and due_at <= clock_timestamp() and status = 'active'
            order by due_at limit 1 for update of account_polls skip locked)
        returning account_id, answered_at, failures";

    /// Whoever was answered; a late answer is one too.
    ANSWERED: [TEXT, UUID] = "
        update account_polls set answered_at = clock_timestamp(), failures = 0, error = null where kind = $1 and account_id = $2";

    /// A failure puts off, it never brings forward.
    FAILED: [TEXT, UUID, TEXT, FLOAT8] = "
        update account_polls
        set failures = failures + 1, error = $3, due_at = greatest(due_at, clock_timestamp() + make_interval(secs => $4))
        where kind = $1 and account_id = $2";

    /// A plain read.
    OF: [UUID] = "
        select kind, due_at, answered_at, failures, error from account_polls where account_id = $1 order by kind";
}

pub(super) async fn cover(db: &Db, question: Question, spread: Duration) -> Result<(), Error> {
    db.exec(&COVER, &[&question.as_str(), &spread.as_secs_f64()])
        .await
        .map(drop)
}

pub(super) async fn claim(
    db: &Db,
    question: Question,
    every: Duration,
) -> Result<Option<Due>, Error> {
    let row = db
        .opt(&CLAIM, &[&question.as_str(), &every.as_secs_f64()])
        .await?;
    let due = |row: Row| {
        Ok(Due {
            account: row.try_get(0)?,
            answered_at: row.try_get(1)?,
            failures: row.try_get::<_, i32>(2)?.try_into().unwrap_or(0),
        })
    };
    row.map(due).transpose()
}

pub(super) async fn answered(db: &Db, question: Question, account: AccountId) -> Result<(), Error> {
    db.exec(&ANSWERED, &[&question.as_str(), &account])
        .await
        .map(drop)
}

pub(super) async fn failed(
    db: &Db,
    question: Question,
    account: AccountId,
    code: &str,
    pause: Duration,
) -> Result<(), Error> {
    db.exec(
        &FAILED,
        &[&question.as_str(), &account, &code, &pause.as_secs_f64()],
    )
    .await
    .map(drop)
}

pub(super) async fn of(db: &Db, account: AccountId) -> Result<Vec<Schedule>, Error> {
    let standing = |row: &Row| {
        Ok(Schedule {
            question: row.try_get(0)?,
            due_at: row.try_get(1)?,
            answered_at: row.try_get(2)?,
            failures: row.try_get(3)?,
            error: row.try_get(4)?,
        })
    };
    db.all(&OF, &[&account])
        .await?
        .iter()
        .map(standing)
        .collect()
}

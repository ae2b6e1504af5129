//! Statements that move turns and their log from accounts that were merged away. Each moves one batch and notes how far it came, so that
//! whoever goes on, after whatever, begins there; replicas that do it at once only wait for each other.

use crate::{
    db::{Db, Error, dependents},
    ids::AccountId,
    statements,
};

statements! { "ledger/history";
    /// A merge whose history is not all moved. A pass that is done waits until no turn can run any more that began before the merge.
    NEXT: [FLOAT8] = "
        select from_id, to_id from account_merges
        where done_at is null
            and (not turns_done or log_day is distinct from 'infinity' or merged_at < clock_timestamp() - make_interval(secs => $1))
        order by pass_began, from_id limit 1";

    /// A batch of turns in the order of their ids. Open ones are their owner's: it writes them whole, and a later pass finds them settled.
    TURNS: [UUID, UUID, INT8] = "
        with mine as (
            select turns_after from account_merges where from_id = $1 and not turns_done for update
        ), page as (
            select t.turn_id from mine, turns t
            where t.turn_id > coalesce(turns_after, '00000000-0000-0000-0000-000000000000') order by t.turn_id limit $3
        ), moved as (
            update turns t set account_id = case account_id when $1 then $2 else account_id end,
                attempts = replace(attempts::text, $1::text, $2::text)::jsonb
            from page
            where t.turn_id = page.turn_id and t.state <> 'open' and (t.account_id = $1 or t.attempts::text like '%' || $1::text || '%')
        )
        update account_merges m set turns_done = (select count(*) from page) < $3,
            turns_after = coalesce((select turn_id from page order by turn_id desc limit 1), m.turns_after)
        from mine where from_id = $1";

    /// A batch of the log, whole turns at a time. The day that never comes says that it is done.
    LOG: [UUID, UUID, INT8] = "
        with mine as (
            select log_day, log_after from account_merges where from_id = $1 and log_day is distinct from 'infinity' for update
        ), page as (
            select l.day, l.turn_id from mine, request_log l
            where (l.day, l.turn_id) > (coalesce(log_day, '-infinity'), coalesce(log_after, '00000000-0000-0000-0000-000000000000'))
            order by l.day, l.turn_id limit $3
        ), last as (
            select day, turn_id from page order by day desc, turn_id desc limit 1
        ), moved as (
            update request_log l set account_id = $2 from (select distinct day, turn_id from page) p
            where l.day = p.day and l.turn_id = p.turn_id and l.account_id = $1
        )
        update account_merges set log_day = case when (select count(*) from page) < $3 then 'infinity' else (select day from last) end,
            log_after = (select turn_id from last)
        from mine where from_id = $1";

    /// After a whole pass: it was the last if no turn of before the merge could run any more when it began, else there is another.
    END: [UUID, FLOAT8] = "
        update account_merges set done_at = case when last then clock_timestamp() end,
            pass_began = case when last then pass_began else clock_timestamp() end,
            turns_done = last, log_day = case when last then log_day end, turns_after = null, log_after = null
        from (select pass_began > merged_at + make_interval(secs => $2) as last from account_merges where from_id = $1) pass
        where from_id = $1 and turns_done and log_day = 'infinity' and done_at is null
            and (last or merged_at < clock_timestamp() - make_interval(secs => $2))";
}

pub(super) async fn next(db: &Db, settled: f64) -> Result<Option<(AccountId, AccountId)>, Error> {
    let row = db.opt(&NEXT, &[&settled]).await?;
    Ok(row
        .map(|row| Ok::<_, tokio_postgres::Error>((row.try_get(0)?, row.try_get(1)?)))
        .transpose()?)
}

/// Moves one batch of each kind, or ends the pass.
pub(super) async fn batch(
    db: &Db,
    (from, to): (AccountId, AccountId),
    rows: i64,
    settled: f64,
) -> Result<(), Error> {
    let connection = db.connection().await?;
    let mut batches = 0;
    for stmt in [&TURNS, &LOG] {
        batches += connection.exec(stmt, &[&from, &to, &rows]).await?;
    }
    if batches == 0 {
        dependents::repoint_stragglers(&connection, from, to).await?;
        connection.exec(&END, &[&from, &settled]).await?;
    }
    Ok(())
}

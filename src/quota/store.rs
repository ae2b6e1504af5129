//! Statements of `quota_windows`, `quota_blocks`, `quota_credits` and `usage_history`.

use std::collections::BTreeSet;

use tokio_postgres::types::ToSql;

use super::{Block, CreditSample, Sample, state::Rows};
use crate::{
    bus::{self, Topic},
    db::{
        Db, Error,
        dependents::{later_block, later_credits},
    },
    ids::AccountId,
    protocol::limits::{Credits, Family},
    statements,
};

statements! { "quota";
    /// A plain read; states only merge, so an old snapshot is merely late.
    WINDOWS: [] = "
        select account_id, family, window_minutes, used_percent, extract(epoch from resets_at)::bigint, observed_at, source
        from quota_windows";

    /// As `WINDOWS`. Also what has ended: it may have ended an older one that somebody still believes in.
    BLOCKS: [] = "
        select account_id, family, blocked_at, extract(epoch from blocked_until)::bigint, reason, lifted_at from quota_blocks";

    /// As `WINDOWS`.
    CREDITS: [] = "select account_id, has_credits, unlimited, balance, observed_at, source from quota_credits";

    /// Before anything is saved of them, so that who merges or deletes an account meets nobody who saves, and moves what they have saved.
    HOLD: [UUID_ARRAY] = "select from accounts where account_id = any($1) order by account_id for key share";

    /// `merge_window`, row by row: under the row lock the older of two writers finds the newer state and leaves it. Rows are locked in the
    /// order of their keys, so that two writers cannot deadlock. An account that was deleted meanwhile is left out. No observation is from
    /// the future: a clock that runs ahead cannot shut out the others.
    SAVE_WINDOWS: [UUID_ARRAY, TEXT_ARRAY, INT4_ARRAY, FLOAT8_ARRAY, INT8_ARRAY, TIMESTAMPTZ_ARRAY, TEXT_ARRAY] = "
        insert into quota_windows as known (account_id, family, window_minutes, used_percent, resets_at, observed_at, source)
        select account_id, family, minutes, used, to_timestamp(resets_at), least(observed_at, clock_timestamp()), source
        from unnest($1, $2, $3, $4, $5, $6, $7) as seen (account_id, family, minutes, used, resets_at, observed_at, source)
        join accounts using (account_id)
        order by account_id, family, minutes
        on conflict (account_id, family, window_minutes) do update
        set used_percent = excluded.used_percent, resets_at = excluded.resets_at,
            observed_at = excluded.observed_at, source = excluded.source
        where (excluded.observed_at, coalesce(excluded.resets_at, '-infinity'), excluded.used_percent, excluded.source)
            > (known.observed_at, coalesce(known.resets_at, '-infinity'), known.used_percent, known.source)";

    /// `merge_block`, row by row; locks and deleted accounts as in `SAVE_WINDOWS`.
    SAVE_BLOCKS: [UUID_ARRAY, TEXT_ARRAY, TIMESTAMPTZ_ARRAY, INT8_ARRAY, TEXT_ARRAY, TIMESTAMPTZ_ARRAY] = concat!("
        insert into quota_blocks as known (account_id, family, blocked_at, blocked_until, reason, lifted_at)
        select account_id, family, least(blocked_at, clock_timestamp()), to_timestamp(blocked_until), reason,
            case when lifted_at is not null then least(lifted_at, clock_timestamp()) end
        from unnest($1, $2, $3, $4, $5, $6) as seen (account_id, family, blocked_at, blocked_until, reason, lifted_at)
        join accounts using (account_id)
        order by account_id, family
        on conflict (account_id, family) do update
        ", later_block!());

    /// The newer observation counts; locks and deleted accounts as in `SAVE_WINDOWS`.
    SAVE_CREDITS: [UUID_ARRAY, BOOL_ARRAY, BOOL_ARRAY, FLOAT8_ARRAY, TIMESTAMPTZ_ARRAY, TEXT_ARRAY] = concat!("
        insert into quota_credits as known (account_id, has_credits, unlimited, balance, observed_at, source)
        select account_id, has_credits, unlimited, balance, least(observed_at, clock_timestamp()), source
        from unnest($1, $2, $3, $4, $5, $6) as seen (account_id, has_credits, unlimited, balance, observed_at, source)
        join accounts using (account_id)
        order by account_id
        on conflict (account_id) do update
        ", later_credits!());

    /// With `SAVE_WINDOWS`. Two replicas that learn the same at once may both write it: a history may say a thing twice.
    SAVE_HISTORY: [UUID_ARRAY, TEXT_ARRAY, INT4_ARRAY, FLOAT8_ARRAY, INT8_ARRAY, TIMESTAMPTZ_ARRAY, TEXT_ARRAY] = "
        insert into usage_history (account_id, family, window_minutes, observed_at, used_percent, resets_at, source)
        select account_id, family, minutes, least(seen.observed_at, clock_timestamp()), used, to_timestamp(seen.resets_at), source
        from unnest($1, $2, $3, $4, $5, $6, $7) as seen (account_id, family, minutes, used, resets_at, observed_at, source)
        join accounts using (account_id)
        left join lateral (
            select used_percent, resets_at, observed_at from usage_history
            where account_id = seen.account_id and family = seen.family and window_minutes = minutes
            order by observed_at desc limit 1) as last on true
        where source <> 'unlisted' and (last.observed_at is null or seen.observed_at > last.observed_at
            and (floor(last.used_percent) <> floor(used)
                or abs(coalesce(extract(epoch from last.resets_at), 0) - coalesce(seen.resets_at, 0)) > 60))
        on conflict do nothing";

    /// Old rows matter to nobody; of two replicas that delete the same one finds nothing.
    PURGE_HISTORY: [INT4, INT8] = "
        delete from usage_history where (account_id, family, window_minutes, observed_at) in (
            select account_id, family, window_minutes, observed_at from usage_history
            where observed_at < clock_timestamp() - make_interval(days => $1) order by observed_at limit $2)";
}

pub(super) async fn load(db: &Db) -> Result<Rows, Error> {
    let connection = db.connection().await?;
    let mut rows = Rows::default();
    for row in connection.all(&WINDOWS, &[]).await? {
        let key = (
            row.try_get(0)?,
            Family::new(row.try_get(1)?),
            u32::try_from(row.try_get::<_, i32>(2)?).unwrap_or(0),
        );
        // A newer release may have sources that this one does not know.
        let Ok(source) = row.try_get::<_, &str>(6)?.parse() else {
            continue;
        };
        let sample = Sample {
            used_percent: row.try_get(3)?,
            resets_at: row.try_get(4)?,
            observed_at: row.try_get(5)?,
            source,
        };
        rows.windows.push((key, sample));
    }
    for row in connection.all(&BLOCKS, &[]).await? {
        let key = (row.try_get(0)?, Family::new(row.try_get(1)?));
        let block = Block {
            blocked_at: row.try_get(2)?,
            until: row.try_get(3)?,
            reason: row.try_get(4)?,
            lifted_at: row.try_get(5)?,
        };
        rows.blocks.push((key, block));
    }
    for row in connection.all(&CREDITS, &[]).await? {
        let Ok(source) = row.try_get::<_, &str>(5)?.parse() else {
            continue;
        };
        let credits = Credits {
            has_credits: row.try_get(1)?,
            unlimited: row.try_get(2)?,
            balance: row.try_get(3)?,
        };
        let sample = CreditSample {
            credits,
            observed_at: row.try_get(4)?,
            source,
        };
        rows.credits.push((row.try_get(0)?, sample));
    }
    Ok(rows)
}

/// Deletes at most `limit` rows of the history that are older than that.
pub(super) async fn purge(db: &Db, retention_days: u16, limit: i64) -> Result<u64, Error> {
    db.exec(&PURGE_HISTORY, &[&i32::from(retention_days), &limit])
        .await
}

/// Merges states into the database and announces them: all or nothing.
pub(super) async fn save(
    db: &Db,
    Rows {
        windows,
        blocks,
        credits,
    }: &Rows,
) -> Result<(), Error> {
    let accounts: BTreeSet<AccountId> = (windows.iter().map(|((account, ..), _)| *account))
        .chain(blocks.iter().map(|((account, _), _)| *account))
        .chain(credits.iter().map(|(account, _)| *account))
        .collect();
    let tx = db.begin().await?;
    tx.exec(&HOLD, &[&Vec::from_iter(accounts)]).await?;
    if !windows.is_empty() {
        let params: [&(dyn ToSql + Sync); 7] = [
            &column(windows, |((account, ..), _)| *account),
            &column(windows, |((_, family, _), _)| family.as_str()),
            &column(windows, |((.., minutes), _)| {
                i32::try_from(*minutes).unwrap_or(i32::MAX)
            }),
            &column(windows, |(_, sample)| sample.used_percent),
            &column(windows, |(_, sample)| sample.resets_at),
            &column(windows, |(_, sample)| sample.observed_at),
            &column(windows, |(_, sample)| sample.source.as_str()),
        ];
        tx.exec(&SAVE_WINDOWS, &params).await?;
        tx.exec(&SAVE_HISTORY, &params).await?;
    }
    if !credits.is_empty() {
        let params: [&(dyn ToSql + Sync); 6] = [
            &column(credits, |(account, _)| *account),
            &column(credits, |(_, sample)| sample.credits.has_credits),
            &column(credits, |(_, sample)| sample.credits.unlimited),
            &column(credits, |(_, sample)| sample.credits.balance),
            &column(credits, |(_, sample)| sample.observed_at),
            &column(credits, |(_, sample)| sample.source.as_str()),
        ];
        tx.exec(&SAVE_CREDITS, &params).await?;
    }
    if !blocks.is_empty() {
        let params: [&(dyn ToSql + Sync); 6] = [
            &column(blocks, |((account, _), _)| *account),
            &column(blocks, |((_, family), _)| family.as_str()),
            &column(blocks, |(_, block)| block.blocked_at),
            &column(blocks, |(_, block)| block.until),
            &column(blocks, |(_, block)| block.reason.as_str()),
            &column(blocks, |(_, block)| block.lifted_at),
        ];
        tx.exec(&SAVE_BLOCKS, &params).await?;
    }
    bus::commit(tx, &[Topic::Quota]).await
}

fn column<'a, Row, Value>(rows: &'a [Row], value: impl Fn(&'a Row) -> Value) -> Vec<Value> {
    rows.iter().map(value).collect()
}

//! Statements of `turns` and `request_log`, and the sticky preference that a settlement leaves.

use std::{borrow::Cow, time::Duration};

use tokio_postgres::{
    Row,
    types::{Json, ToSql},
};

use super::{
    attempt::{Attempt, millis},
    log::{Entry, day},
    record::Record,
    sweep::{Found, Lost, Range, Reconciliation, Side},
    turn::{Booked, Fence, NotOpened, Opened, Opening, Settlement},
    used::Used,
};
use crate::{
    db::{Db, Error, LockClass},
    ids::{ApiKeyId, BootId, TurnId},
    secret, statements,
};

/// Columns of `request_log` that an entry fills.
macro_rules! log_columns {
    () => {
        "day, turn_id, request_id, scope_id, api_key_id, account_id, route, transport, model, status, outcome, reason, bridge_outcome, \
         bridge_reason, error_code, attempts, input_tokens, cached_input_tokens, output_tokens, reasoning_tokens, cost_nanodollars, estimated, first_event_ms, \
         total_ms, user_agent, explanation"
    };
}

/// A request that was refused at one replica, or never begun there, may have been served by another: that counts.
macro_rules! served {
    () => {
        "on conflict (day, turn_id, request_id) do update
        set (account_id, transport, status, outcome, reason, bridge_outcome, bridge_reason, error_code, attempts, input_tokens,
            cached_input_tokens, output_tokens, reasoning_tokens, cost_nanodollars, estimated, first_event_ms, total_ms, explanation)
            = (excluded.account_id, excluded.transport, excluded.status, excluded.outcome, excluded.reason, excluded.bridge_outcome,
            excluded.bridge_reason, excluded.error_code, excluded.attempts, excluded.input_tokens, excluded.cached_input_tokens,
            excluded.output_tokens, excluded.reasoning_tokens, excluded.cost_nanodollars, excluded.estimated, excluded.first_event_ms,
            excluded.total_ms, excluded.explanation)
        where request_log.attempts = 0 and excluded.attempts > 0"
    };
}

/// What closes a turn; a condition on what it was before follows.
macro_rules! book {
    () => {
        "update turns set state = $3, outcome = $4, reason = $5, response_id = $6, account_id = $7, attempts = $8, input_tokens = $9,
                cached_input_tokens = $10, output_tokens = $11, reasoning_tokens = $12, cost_nanodollars = $13, estimated = $14,
                first_event_ms = $15, total_ms = $16, settled_at = clock_timestamp()
            where turn_id = $1 and request_id = $2"
    };
}

statements! { "ledger";
    /// BEGIN, the only gate to an upstream send. With a lease ($11) the fence and the reservation are one fact: both or none. Without, it is
    /// the plain insert. Two racing retries lock the same row: the second waits, finds it open again, and becomes a turn of its own, as does
    /// a request whose predecessor still runs. The row's previous sums stay until it is settled again. One request begins once, on whichever
    /// replica: `turns_request` is unique, and one that is among a turn's attempts already is no retry of it, but meets its primary key.
    OPEN: [UUID, UUID, UUID, TEXT, UUID, TEXT, TEXT, TEXT, UUID, JSONB, UUID, INT8] = "
        with fenced as (
            update http_bridge_leases set busy_turn = $1, busy_since = clock_timestamp(), turn_seq = turn_seq + 1, account_id = $9,
                last_turn_at = clock_timestamp()
            where lease_id = $11 and scope_id = $2 and generation = $12 and owner_boot = $5 and busy_turn is null
                and not exists (select from bridge_replicas r where r.boot_id = $5 and r.dead_at is not null)
            returning lease_id
        ), mine as (
            select where $11::uuid is null or exists (select from fenced)
        ), newest as (
            select turn_id from mine, turns where scope_id = $2 and client_turn_id = $4 order by turn_id desc limit 1
        ), reopened as (
            update turns t set state = 'open', request_id = $1, api_key_id = $3, boot_id = $5, route = $6, transport = $7, model = $8,
                account_id = $9, attempts = t.attempts || $10, requests = t.requests + 1, outcome = null, reason = null,
                response_id = null, lease_id = $11, generation = $12, opened_at = clock_timestamp(), settled_at = null
            from newest
            where t.turn_id = newest.turn_id and t.state <> 'open' and t.outcome <> 'completed' and t.requests < 32
                and not t.attempts @> jsonb_build_array(jsonb_build_object('request', $1))
            returning t.turn_id, t.attempts
        ), begun as (
            select turn_id from turns
            where scope_id = $2 and client_turn_id = $4 and attempts @> jsonb_build_array(jsonb_build_object('request', $1)) limit 1
        ), inserted as (
            insert into turns (turn_id, request_id, scope_id, api_key_id, client_turn_id, boot_id, route, transport, model, account_id,
                attempts, lease_id, generation)
            select coalesce((select turn_id from begun), $1), $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12 from mine where not exists (select from reopened)
            returning turn_id, attempts
        )
        select * from reopened union all select * from inserted";

    /// Only the process that holds the turn knows `request_id`, so it is the fence. A swept turn is not open; on a lease that somebody has
    /// claimed since, its owner being dead, nothing more is sent.
    ATTEMPT: [UUID, UUID, UUID, JSONB] = "
        update turns t set attempts = $4, account_id = $3 where turn_id = $1 and request_id = $2 and state = 'open'
            and (lease_id is null or exists (select from http_bridge_leases l where l.lease_id = t.lease_id and l.generation = t.generation))";

    /// FINISH. Fence of the turn as in ATTEMPT: a repeated call finds it closed. The lease is moved only by the owner that began this turn
    /// on it; a snapshot is an immutable fact about one response, so it needs no fence. Lock order: account (so that it cannot vanish under
    /// the preference), lease, snapshot, turn, preference. A preference that says the same is only prolonged when an eighth of its time has
    /// passed.
    SETTLE: [UUID, UUID, TEXT, TEXT, TEXT, TEXT, UUID, JSONB, INT8, INT8, INT8, INT8, INT8, BOOL, INT4, INT4, TEXT, BYTEA, UUID, FLOAT8,
        UUID, INT8, UUID, FLOAT8, BOOL, UUID, TEXT, UUID, UUID, TEXT, BOOL, BOOL, INT4, TEXT, BYTEA] = concat!("
        with seat as (
            select account_id from accounts where account_id = $19 for key share
        ), moved as (
            update http_bridge_leases set busy_turn = null, busy_since = null, account_id = coalesce($7, account_id),
                head_response_id = case when $25 then $6 else head_response_id end, last_turn_at = clock_timestamp(),
                retain_until = clock_timestamp() + make_interval(secs => $24)
            where lease_id = $21 and generation = $22 and owner_boot = $23 and busy_turn = $2 and (select count(*) from seat) >= 0
            returning lease_id
        ), kept as (
            insert into response_snapshots (scope_id, response_id, parent_response_id, chain_id, lease_id, account_id, model, is_root, complete,
                bytes, key_id, body)
            select $26, $6, $27, $28, $29, $7, $30, $31, $32, $33, $34, $35 where $28 is not null and (select count(*) from moved) >= 0
            on conflict do nothing
            returning 1
        ), booked as (
            ", book!(), " and state = 'open' and (select count(*) from kept) >= 0
            returning scope_id
        ), preferred as (
            insert into sticky_sessions as s (scope_id, key_kind, key_hash, account_id, expires_at)
            select scope_id, $17, $18, account_id, clock_timestamp() + make_interval(secs => $20) from booked, seat
            on conflict (scope_id, key_kind, key_hash) do update
            set account_id = excluded.account_id, expires_at = excluded.expires_at,
                moved_at = case when s.account_id = excluded.account_id then s.moved_at else excluded.moved_at end
            where s.account_id <> excluded.account_id or s.expires_at < excluded.expires_at - make_interval(secs => $20 / 8)
        )
        select (select count(*) from booked), (select count(*) from moved)");

    /// A turn that a sweep gave up, because a peer took its owner for dead: what its owner knows replaces the estimate, here and in the log,
    /// which is written anew. Not if a retry has it by now: then the estimate is an attempt of that. A repeated call finds it told.
    FOUND: [UUID, UUID, TEXT, TEXT, TEXT, TEXT, UUID, JSONB, INT8, INT8, INT8, INT8, INT8, BOOL, INT4, INT4, DATE] = concat!("
        with found as (
            ", book!(), " and state = 'settled' and outcome = 'lost'
            returning turn_id, request_id
        ), unlogged as (
            delete from request_log l using found where l.day = $17 and (l.turn_id, l.request_id) = (found.turn_id, found.request_id)
        )
        select count(*) from found");

    /// Finds the opening by its request, if it landed under this fence: nothing was sent, so it leaves no attempt, and its lease is idle
    /// again. The same request may run on another replica, which has taken the lease since.
    WITHDRAW: [UUID, UUID, INT8] = "
        with idle as (
            update http_bridge_leases set busy_turn = null, busy_since = null
            where lease_id = $2 and generation = $3 and busy_turn = $1
            returning 1
        )
        update turns set state = case when requests > 1 then 'settled' else 'released' end, outcome = 'failed', reason = 'withdrawn',
            attempts = attempts - (-1), requests = requests - 1, settled_at = clock_timestamp()
        where request_id = $1 and lease_id is not distinct from $2 and generation is not distinct from $3 and state = 'open'
            and (select count(*) from idle) >= 0";

    /// Records a turn that ran while Postgres was away, before it is settled. If its BEGIN has landed all the same, its lease is idle again
    /// and its row is there already, or the earlier turn that it reopened is closed again; if that lands later, it finds this row and is
    /// undone as a whole. Also records again what a database has forgotten.
    OPEN_LATE: [UUID, UUID, UUID, TEXT, UUID, TEXT, TEXT, TEXT, UUID, JSONB, UUID, INT8, UUID] = "
        with idle as (
            update http_bridge_leases set busy_turn = null, busy_since = null
            where lease_id = $11 and generation = $12 and busy_turn = $1
            returning 1
        ), undone as (
            update turns set state = 'settled', outcome = 'failed', reason = 'withdrawn', request_id = turn_id, attempts = attempts - (-1),
                requests = requests - 1, settled_at = clock_timestamp()
            where request_id = $1 and turn_id not in ($1, $13) and state = 'open' and (select count(*) from idle) >= 0
            returning 1
        )
        insert into turns (turn_id, request_id, scope_id, api_key_id, client_turn_id, boot_id, route, transport, model, account_id, attempts)
        select $13, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10 where (select count(*) from undone) >= 0
        on conflict do nothing";

    /// Whether a turn has, or had before another one, this retry.
    HEARD: [UUID, UUID] = "
        select from turns where turn_id = $1 and attempts @> jsonb_build_array(jsonb_build_object('request', $2))";

    /// An entry that is there stays as it is, unless it was of no attempt. Rows are locked in the order of their keys.
    LOG: [JSONB] = concat!("
        insert into request_log (", log_columns!(), ")
        select distinct on (day, turn_id, request_id) ", log_columns!(), " from jsonb_populate_recordset(null::request_log, $1)
        order by day, turn_id, request_id, attempts desc ", served!());

    /// A plain read: booking decides. A tombstone is never taken back; an incarnation registers before it opens turns.
    FIND_LOST: [FLOAT8, INT8] = "
        select turn_id, request_id, scope_id, api_key_id, route, transport, model, outcome, reason, first_event_ms, total_ms, attempts
        from turns t
        where state = 'open' and (opened_at < clock_timestamp() - make_interval(secs => $1)
            or not exists (select from bridge_replicas r where r.boot_id = t.boot_id and r.dead_at is null))
        order by turn_id limit $2";

    /// Books a turn only as it was read: not if its owner settled it or began an attempt, nor if a retry or another sweep has it.
    /// The log follows the booking in one statement. A lease on which a living owner left it is idle again; that of a dead owner is
    /// claimed as it is. Lock order: leases, turns.
    BOOK_LOST: [JSONB, JSONB] = concat!("
        with lost as (
            select * from jsonb_to_recordset($1) as lost(turn_id uuid, request_id uuid, attempts jsonb, input_tokens bigint,
                output_tokens bigint, cached_input_tokens bigint, reasoning_tokens bigint, cost_nanodollars bigint)
        ), busy as (
            select lost.turn_id, l.lease_id, l.busy_turn
            from lost join turns t using (turn_id) join http_bridge_leases l on l.lease_id = t.lease_id and l.busy_turn = lost.request_id
            where not exists (select from bridge_replicas r where r.boot_id = l.owner_boot and r.dead_at is not null)
            order by l.lease_id for update of l
        ), held as (
            select t.turn_id from turns t join lost using (turn_id)
            where t.state = 'open' and (select count(*) from busy) >= 0 order by t.turn_id for update of t skip locked
        ), booked as (
            update turns t set state = 'settled', outcome = 'lost', attempts = lost.attempts, input_tokens = lost.input_tokens,
                cached_input_tokens = lost.cached_input_tokens, output_tokens = lost.output_tokens,
                reasoning_tokens = lost.reasoning_tokens, cost_nanodollars = lost.cost_nanodollars, estimated = true,
                settled_at = clock_timestamp()
            from lost join held using (turn_id)
            where t.turn_id = lost.turn_id and t.request_id = lost.request_id and t.state = 'open'
                and jsonb_array_length(t.attempts) = jsonb_array_length(lost.attempts)
            returning t.turn_id
        ), idle as (
            update http_bridge_leases l set busy_turn = null, busy_since = null
            from busy join booked using (turn_id) where l.lease_id = busy.lease_id and l.busy_turn = busy.busy_turn
        ), logged as (
            insert into request_log (", log_columns!(), ")
            select ", log_columns!(), " from jsonb_populate_recordset(null::request_log, $2) join booked using (turn_id)
            order by day, turn_id, request_id ", served!(), "
        )
        select count(*) from booked");

    /// Turns whose log was lost with the process that queued it. A plain read, once through both sides; LOG keeps what has come since.
    FIND_UNLOGGED: [UUID, UUID, DATE, DATE, INT8] = "
        with sides as (
            select turn_id, requests from turns
            where turn_id >= $1 and turn_id < $2 and state <> 'open' and settled_at < clock_timestamp() - interval '1 minute'
            union all
            select turn_id, -1 from request_log where day between $3 and $4 and turn_id >= $1 and turn_id < $2 and attempts > 0
        ), missing as (
            select turn_id from sides group by turn_id having sum(requests) > 0 limit $5
        )
        select turn_id, request_id, scope_id, api_key_id, route, transport, model, outcome, reason, first_event_ms, total_ms, attempts
        from turns join missing using (turn_id)";

    /// One snapshot of both sides. Requests without an attempt used nothing and are no turns.
    RECONCILE: [UUID, UUID, DATE, DATE] = "
        with booked as (
            select turn_id, jsonb_array_length(attempts)::bigint attempts, input_tokens, cached_input_tokens, output_tokens,
                reasoning_tokens, cost_nanodollars, estimated
            from turns where turn_id >= $1 and turn_id < $2 and state <> 'open' and jsonb_array_length(attempts) > 0
        ), logged as (
            select turn_id, sum(attempts)::bigint attempts, sum(input_tokens)::bigint input_tokens,
                sum(cached_input_tokens)::bigint cached_input_tokens, sum(output_tokens)::bigint output_tokens,
                sum(reasoning_tokens)::bigint reasoning_tokens,
                case when bool_and(cost_nanodollars is not null) then sum(cost_nanodollars)::bigint end cost_nanodollars,
                bool_or(estimated) estimated
            from request_log where day between $3 and $4 and turn_id >= $1 and turn_id < $2 and attempts > 0 group by turn_id
        ), sides as (
            select false logged, * from booked union all select true, * from logged
        ), summed as (
            select logged, count(*) turns, coalesce(sum(attempts), 0)::bigint, coalesce(sum(input_tokens), 0)::bigint,
                coalesce(sum(cached_input_tokens), 0)::bigint, coalesce(sum(output_tokens), 0)::bigint,
                coalesce(sum(reasoning_tokens), 0)::bigint, coalesce(sum(cost_nanodollars), 0)::bigint,
                count(*) filter (where estimated)
            from sides group by logged
        ), one_sided as (
            select turn_id from (select * from booked except select * from logged) b
            union select turn_id from (select * from logged except select * from booked) l
        )
        select *, array(select turn_id from one_sided limit 100) from summed";

    /// For people. A request is logged under the day of its turn, which began on the same day or, if it is a retry, the day before.
    RECORD: [UUID, DATE] = "
        with found as (
            select turn_id from turns where turn_id = $1 or request_id = $1
            union select turn_id from request_log where day between $2 - 1 and $2 and (turn_id = $1 or request_id = $1)
        )
        select jsonb_build_object(
            'turn', (select to_jsonb(t) from turns t where t.turn_id = found.turn_id),
            'requests', (select coalesce(jsonb_agg(to_jsonb(l) order by l.request_id), '[]') from request_log l
                where l.turn_id = found.turn_id and l.day between $2 - 1 and $2))
        from found limit 1";

    /// A plain read of what is booked.
    USED: [UUID] = "
        select coalesce(sum(requests), 0)::bigint, coalesce(sum(input_tokens + output_tokens), 0)::bigint,
            coalesce(sum(cached_input_tokens), 0)::bigint, coalesce(sum(cost_nanodollars), 0)::bigint
        from turns where api_key_id = $1 and state = 'settled'";

    /// The transaction-level lock lasts as long as the statement: one replica at a time deletes.
    PRUNE: [INT4, INT4, INT4, INT8] = "
        with turn as materialized (select pg_try_advisory_xact_lock($1, $2) mine),
        old as (
            select day, turn_id, request_id from request_log
            where (select mine from turn) and day < (clock_timestamp() at time zone 'utc')::date - $3
            limit $4
        )
        delete from request_log l using old where (l.day, l.turn_id, l.request_id) = (old.day, old.turn_id, old.request_id)";
}

pub(super) async fn used(db: &Db, key: ApiKeyId) -> Result<Used, Error> {
    let row = db.one(&USED, &[&key]).await?;
    Ok(Used {
        requests: row.try_get(0)?,
        tokens: row.try_get(1)?,
        cached_input_tokens: row.try_get(2)?,
        cost_nanodollars: row.try_get(3)?,
    })
}

/// Yields the turn and its earlier attempts; `None` if the lease is not ours.
pub(super) async fn open(
    db: &Db,
    boot: BootId,
    opening: &Opening,
    first: &Attempt,
) -> Result<Option<(TurnId, Vec<Attempt>)>, NotOpened> {
    let request = &opening.request;
    let fence = opening.fence.as_ref();
    let opened = db
        .opt(
            &OPEN,
            &[
                &request.id,
                &request.scope,
                &request.api_key,
                &opening.client_turn.as_deref().map(client_turn),
                &boot,
                &request.route,
                &request.transport,
                &plain(&request.model, 100),
                &first.account_id,
                &Json([first]),
                &fence.map(|fence| fence.lease),
                &fence.map(|fence| fence.generation),
            ],
        )
        .await;
    let row = match opened {
        Ok(Some(row)) => row,
        Ok(None) => return Ok(None),
        Err(error) if matches!(error.constraint(), Some("turns_request" | "turns_pkey")) => {
            return Err(NotOpened::Begun);
        }
        Err(error) => return Err(error.into()),
    };
    let read = |row: &Row| -> Result<_, tokio_postgres::Error> {
        let Json(mut attempts): Json<Vec<Attempt>> = row.try_get(1)?;
        attempts.pop();
        Ok((row.try_get(0)?, attempts))
    };
    let opened = read(&row).map_err(Error::from)?;
    Ok(Some(opened))
}

/// `begun` is the lease on which an opening that was given up may have begun it. True if it was not there.
pub(super) async fn open_late(
    db: &Db,
    boot: BootId,
    begun: Option<Fence>,
    opened: &Opened,
) -> Result<bool, Error> {
    let request = opened.request();
    db.exec(
        &OPEN_LATE,
        &[
            &request.id,
            &request.scope,
            &request.api_key,
            &opened.client_turn().map(client_turn),
            &boot,
            &request.route,
            &request.transport,
            &plain(&request.model, 100),
            &opened.account(),
            &Json(opened.all_attempts()),
            &begun.map(|fence| fence.lease),
            &begun.map(|fence| fence.generation),
            &opened.turn(),
        ],
    )
    .await
    .map(|rows| rows == 1)
}

pub(super) async fn has_heard(db: &Db, opened: &Opened) -> Result<bool, Error> {
    db.opt(&HEARD, &[&opened.turn(), &opened.request().id])
        .await
        .map(|row| row.is_some())
}

pub(super) async fn attempt(db: &Db, opened: &Opened) -> Result<bool, Error> {
    let attempts = Json(opened.all_attempts());
    db.exec(
        &ATTEMPT,
        &[
            &opened.turn(),
            &opened.request().id,
            &opened.account(),
            &attempts,
        ],
    )
    .await
    .map(|rows| rows == 1)
}

pub(super) async fn settle(
    db: &Db,
    opened: &Opened,
    settlement: &Settlement,
) -> Result<Booked, Error> {
    let totals = opened.totals();
    let [input, cached, output, reasoning] = columns(&totals.usage);
    let state = if input == 0 && output == 0 {
        "released"
    } else {
        "settled"
    };
    let answer = &settlement.answer;
    let sticky = settlement.sticky.as_ref();
    let fence = opened.fence();
    // A response without an id cannot be asked for.
    let snapshot = settlement
        .snapshot
        .as_ref()
        .filter(|_| settlement.response_id.is_some());
    let book: [&(dyn ToSql + Sync); 16] = [
        &opened.turn(),
        &opened.request().id,
        &state,
        &answer.outcome.as_str(),
        &answer.reason,
        &settlement.response_id.as_deref().map(|id| plain(id, 200)),
        &opened.account(),
        &Json(opened.all_attempts()),
        &input,
        &cached,
        &output,
        &reasoning,
        &totals.cost,
        &totals.estimated,
        &answer.first_event.map(millis),
        &millis(answer.total),
    ];
    let keep: [&(dyn ToSql + Sync); 19] = [
        &sticky.map(|sticky| sticky.kind),
        &sticky.map(|sticky| sticky.hash.as_slice()),
        &sticky.map(|sticky| sticky.account),
        &sticky.map(|sticky| sticky.ttl.as_secs_f64()),
        &fence.map(|fence| fence.lease),
        &fence.map(|fence| fence.generation),
        &opened.boot(),
        &fence.map(|fence| fence.retain.as_secs_f64()),
        &settlement.complete,
        &opened.request().scope,
        &snapshot.and_then(|snapshot| snapshot.parent.as_deref()),
        &snapshot.map(|snapshot| snapshot.chain),
        &snapshot.and_then(|snapshot| snapshot.lease),
        &plain(&opened.request().model, 100),
        &snapshot.is_some_and(|snapshot| snapshot.is_root),
        &snapshot.is_some_and(|snapshot| snapshot.complete),
        &snapshot.map_or(0, |snapshot| snapshot.bytes),
        &snapshot.and_then(|snapshot| snapshot.key_id.as_deref()),
        &snapshot.and_then(|snapshot| snapshot.body.as_deref()),
    ];
    let row = db.one(&SETTLE, &[&book[..], &keep[..]].concat()).await?;
    let lease = fence.is_none() || row.try_get::<_, i64>(1)? == 1;
    let mut turn = row.try_get::<_, i64>(0)? == 1;
    if !turn {
        // Either an earlier call landed, or nobody believed in us any more.
        let day: &(dyn ToSql + Sync) = &day(opened.turn());
        let row = db.one(&FOUND, &[&book[..], &[day]].concat()).await?;
        turn = row.try_get::<_, i64>(0)? == 1;
    }
    Ok(Booked { turn, lease })
}

pub(super) async fn withdraw(db: &Db, request: TurnId, fence: Option<Fence>) -> Result<(), Error> {
    let lease = fence.map(|fence| fence.lease);
    let generation = fence.map(|fence| fence.generation);
    db.exec(&WITHDRAW, &[&request, &lease, &generation])
        .await
        .map(drop)
}

pub(super) async fn log(db: &Db, entries: &[Entry]) -> Result<(), Error> {
    db.exec(&LOG, &[&Json(entries)]).await.map(drop)
}

pub(super) async fn find_lost(
    db: &Db,
    patience: Duration,
    limit: i64,
) -> Result<Vec<Found>, Error> {
    let rows = db
        .all(&FIND_LOST, &[&patience.as_secs_f64(), &limit])
        .await?;
    rows.iter().map(found).collect()
}

pub(super) async fn book_lost(db: &Db, lost: &[Lost], entries: &[Entry]) -> Result<i64, Error> {
    let row = db.one(&BOOK_LOST, &[&Json(lost), &Json(entries)]).await?;
    Ok(row.try_get(0)?)
}

pub(super) async fn find_unlogged(db: &Db, range: &Range, limit: i64) -> Result<Vec<Found>, Error> {
    let Range { ids, days } = range;
    let rows = db
        .all(
            &FIND_UNLOGGED,
            &[&ids.start, &ids.end, &days.0, &days.1, &limit],
        )
        .await?;
    rows.iter().map(found).collect()
}

fn found(row: &Row) -> Result<Found, Error> {
    let Json(attempts) = row.try_get("attempts")?;
    Ok(Found {
        turn: row.try_get("turn_id")?,
        request: row.try_get("request_id")?,
        scope: row.try_get("scope_id")?,
        api_key: row.try_get("api_key_id")?,
        route: row.try_get("route")?,
        transport: row.try_get("transport")?,
        model: row.try_get("model")?,
        outcome: row.try_get("outcome")?,
        reason: row.try_get("reason")?,
        first_event_ms: row.try_get("first_event_ms")?,
        total_ms: row.try_get("total_ms")?,
        attempts,
    })
}

pub(super) async fn reconcile(db: &Db, range: &Range) -> Result<Reconciliation, Error> {
    let Range { ids, days } = range;
    let mut reconciliation = Reconciliation::default();
    for row in db
        .all(&RECONCILE, &[&ids.start, &ids.end, &days.0, &days.1])
        .await?
    {
        let side = Side {
            turns: row.try_get(1)?,
            attempts: row.try_get(2)?,
            input_tokens: row.try_get(3)?,
            cached_input_tokens: row.try_get(4)?,
            output_tokens: row.try_get(5)?,
            reasoning_tokens: row.try_get(6)?,
            cost_nanodollars: row.try_get(7)?,
            estimated: row.try_get(8)?,
        };
        if row.try_get(0)? {
            reconciliation.log = side;
        } else {
            reconciliation.turns = side;
        }
        reconciliation.differing = row.try_get(9)?;
    }
    Ok(reconciliation)
}

pub(super) async fn prune(db: &Db, days: i32, limit: i64) -> Result<u64, Error> {
    /// The job within its class of locks.
    const REQUEST_LOG: i32 = 1;
    let class = LockClass::Job as i32;
    db.exec(&PRUNE, &[&class, &REQUEST_LOG, &days, &limit])
        .await
}

pub(super) async fn record(db: &Db, id: TurnId) -> Result<Option<Record>, Error> {
    let row = db.opt(&RECORD, &[&id, &day(id)]).await?;
    row.map(|row| {
        let Json(record) = row.try_get(0)?;
        Ok(record)
    })
    .transpose()
}

/// Text of others as a column takes it: without NUL, and not longer than `most` bytes.
pub(super) fn plain(text: &str, most: usize) -> Cow<'_, str> {
    let text = &text[..text.floor_char_boundary(most)];
    if text.contains('\0') {
        Cow::Owned(text.replace('\0', ""))
    } else {
        Cow::Borrowed(text)
    }
}

/// An index takes keys of limited length: a long one is kept as its digest.
fn client_turn(text: &str) -> Cow<'_, str> {
    if text.len() <= 100 && !text.contains('\0') {
        return Cow::Borrowed(text);
    }
    let digest = secret::digest(&[text.as_bytes()]);
    Cow::Owned(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Input, cached input, output, reasoning.
pub(super) fn columns(usage: &crate::protocol::usage::Usage) -> [i64; 4] {
    [
        usage.input,
        usage.cached_input,
        usage.output,
        usage.reasoning,
    ]
    .map(|count| i64::try_from(count).unwrap_or(i64::MAX))
}

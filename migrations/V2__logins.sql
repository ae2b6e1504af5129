-- One row per seat, unless an import was told to put a row beside it: beside is nil for the seat's row, its own id for such a one.
alter table accounts add column beside uuid not null default '00000000-0000-0000-0000-000000000000';
create unique index accounts_seat_row on accounts (chatgpt_account_id, chatgpt_user_id, beside);
drop index accounts_seat;

-- Rows that were merged away. Readers of history resolve through it; to_id is never itself merged away. A job moves the history in batches:
-- turns_after and log_day, log_after are how far its present pass is. Turns that ran during the merge are written after it, so the last pass
-- begins some hours later.
create table account_merges (
    from_id uuid primary key,
    to_id uuid not null references accounts on delete cascade,
    merged_at timestamptz not null default clock_timestamp(),
    pass_began timestamptz not null default clock_timestamp(),
    turns_after uuid,
    turns_done boolean not null default false,
    log_day date,
    log_after uuid,
    done_at timestamptz
);
create index account_merges_to on account_merges (to_id);
create index account_merges_open on account_merges (pass_began) where done_at is null;

-- Who exchanges the refresh token of an account, of all replicas, and since when it has not helped. A claim ends by itself.
create table refresh_claims (
    account_id uuid primary key references accounts on delete cascade,
    claimed_by uuid not null,
    claimed_until timestamptz not null,
    failures integer not null default 0,
    retry_at timestamptz
);

-- Logins under way. secrets_sealed is what the exchange needs; state_hash finds a browser's login by what comes back. claimed_by is who
-- polls or exchanges at this moment, until claimed_until. wanted_account_id: only the login of that account's seat will do; it refers to
-- nothing, so that a login for an account that is gone fails instead of making another. account_id is what came of it.
create table login_flows (
    flow_id uuid primary key,
    method text not null constraint login_flows_method check (method in ('device', 'browser')),
    status text not null default 'pending' constraint login_flows_status check (status in ('pending', 'succeeded', 'failed', 'cancelled')),
    error text,
    wanted_account_id uuid,
    label text,
    state_hash bytea,
    secrets_sealed bytea not null,
    interval_seconds integer not null default 0,
    claimed_by uuid,
    claimed_until timestamptz,
    polled_at timestamptz,
    account_id uuid,
    created boolean not null default false,
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    finished_at timestamptz
);
create unique index login_flows_state on login_flows (state_hash);
create index login_flows_expires on login_flows (expires_at);

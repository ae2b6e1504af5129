-- Windows that the usage endpoint has stopped listing are known to be gone.
alter table quota_windows
    drop constraint quota_windows_source,
    add constraint quota_windows_source check (source in ('header', 'event', 'error', 'poll', 'unlisted'));

-- What is known of the credits that stand in for full windows. observed_at is when the observation began.
create table quota_credits (
    account_id uuid primary key references accounts on delete cascade,
    has_credits boolean not null,
    unlimited boolean not null,
    balance double precision,
    observed_at timestamptz not null,
    source text not null
);

-- How windows went: a row where the whole percent or the reset changed, until the log's retention ends. No foreign key: history outlives its
-- account, and follows it into another one.
create table usage_history (
    account_id uuid not null,
    family text not null,
    window_minutes integer not null,
    observed_at timestamptz not null,
    used_percent double precision not null,
    resets_at timestamptz,
    source text not null,
    primary key (account_id, family, window_minutes, observed_at)
);
create index usage_history_observed on usage_history (observed_at);

-- When upstream is asked about an account next. A replica claims a question by moving due_at.
create table account_polls (
    account_id uuid not null references accounts on delete cascade,
    kind text not null,
    due_at timestamptz not null,
    answered_at timestamptz,
    failures integer not null default 0,
    error text,
    primary key (account_id, kind)
);
create index account_polls_due on account_polls (kind, due_at);

-- A smaller plan that the usage endpoint named once: believed when it is named again.
create table plan_sightings (
    account_id uuid primary key references accounts on delete cascade,
    plan_type text not null,
    seen_at timestamptz not null
);

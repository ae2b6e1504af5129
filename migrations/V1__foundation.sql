-- Versions of what replicas cache; see bus.rs.
create table bus_versions (
    topic text primary key,
    version bigint not null default 0,
    changed_at timestamptz not null default clock_timestamp()
);
insert into bus_versions (topic) values ('accounts'), ('api_keys'), ('models'), ('quota');

-- Secrets of the installation as a whole, sealed under a master key.
create table installation (
    name text primary key,
    sealed bytea not null,
    created_at timestamptz not null default clock_timestamp()
);

-- One row per start of a process. dead_at is a tombstone: set once, never cleared.
create table bridge_replicas (
    boot_id uuid primary key,
    replica_name text not null,
    endpoint_url text,
    started_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    draining_at timestamptz,
    dead_at timestamptz
);

-- Fencing tokens; one sequence for all leases, so that none ever repeats, purged leases included.
create sequence lease_generations;

-- The durable right to own a bridge session. Keys are stored as SHA-256 of length-framed (kind, value).
-- owner_boot null = free; busy_turn = the request whose turn runs on it; taken_at is set by a takeover from a silent owner alone.
create table http_bridge_leases (
    lease_id uuid primary key,
    scope_id uuid not null,
    key_kind text not null,
    key_hash bytea not null,
    generation bigint not null,
    owner_boot uuid references bridge_replicas on delete set null,
    busy_turn uuid,
    busy_since timestamptz,
    turn_seq bigint not null default 0,
    taken_at timestamptz,
    account_id uuid,
    head_response_id text,
    created_at timestamptz not null default clock_timestamp(),
    last_turn_at timestamptz not null default clock_timestamp(),
    retain_until timestamptz not null,
    constraint http_bridge_leases_key unique (scope_id, key_kind, key_hash)
) with (fillfactor = 70);
create index http_bridge_leases_owner on http_bridge_leases (owner_boot) where owner_boot is not null;
create index http_bridge_leases_retain on http_bridge_leases (retain_until);

-- The sealed record of a finished response: the items that its turn added. complete = false: the record was not kept, and nothing can be
-- rebuilt through it. A chain is purged whole: 24 h after its newest link, 7 days after its root. No foreign keys: history outlives both
-- account and lease.
create table response_snapshots (
    scope_id uuid not null,
    response_id text not null,
    parent_response_id text,
    chain_id uuid not null,
    lease_id uuid,
    account_id uuid,
    model text not null,
    is_root boolean not null,
    complete boolean not null,
    bytes integer not null,
    key_id text,
    body bytea,
    created_at timestamptz not null default clock_timestamp(),
    primary key (scope_id, response_id)
);
create index response_snapshots_chain on response_snapshots (chain_id, created_at);

-- One row per upstream login. status is the life cycle alone; limits live in quota_windows and quota_blocks.
create table accounts (
    account_id uuid primary key,
    chatgpt_account_id text,
    chatgpt_user_id text,
    email_sealed bytea,
    email_hash bytea,
    label text,
    plan_type text not null default 'unknown',
    status text not null default 'active' constraint accounts_status check (status in ('active', 'paused', 'reauth_required', 'deactivated')),
    status_reason text,
    status_changed_at timestamptz not null default clock_timestamp(),
    created_at timestamptz not null default clock_timestamp()
);
create unique index accounts_seat on accounts (chatgpt_account_id, chatgpt_user_id);
create index accounts_email on accounts (email_hash);

-- Tokens, sealed with (table, account, column) as associated data; generation guards their rotation.
create table account_credentials (
    account_id uuid primary key references accounts on delete cascade,
    generation bigint not null default 1,
    access_sealed bytea not null,
    refresh_sealed bytea not null,
    id_sealed bytea,
    access_expires_at timestamptz,
    refreshed_at timestamptz not null default clock_timestamp()
);

-- The model catalogue of each account as upstream gave it last.
create table account_models (
    account_id uuid primary key references accounts on delete cascade,
    models jsonb not null,
    changed_at timestamptz not null default clock_timestamp()
);

-- A durable preference: affinity key -> account. Keys are stored as SHA-256 of length-framed (kind, value).
create table sticky_sessions (
    scope_id uuid not null,
    key_kind text not null,
    key_hash bytea not null,
    account_id uuid not null references accounts on delete cascade,
    moved_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    primary key (scope_id, key_kind, key_hash)
);
create index sticky_sessions_account on sticky_sessions (account_id);
create index sticky_sessions_expires on sticky_sessions (expires_at);

-- What is known of one (account, family, window). observed_at is when the observation began.
create table quota_windows (
    account_id uuid not null references accounts on delete cascade,
    family text not null,
    window_minutes integer not null,
    used_percent double precision not null,
    resets_at timestamptz,
    observed_at timestamptz not null,
    source text not null constraint quota_windows_source check (source in ('header', 'event', 'error', 'poll')),
    primary key (account_id, family, window_minutes)
);

-- Until when an account may not be used for a family, and why. Written by upstream errors alone. Refusals from before lifted_at are over.
create table quota_blocks (
    account_id uuid not null references accounts on delete cascade,
    family text not null,
    blocked_at timestamptz not null,
    blocked_until timestamptz not null,
    reason text not null,
    lifted_at timestamptz,
    primary key (account_id, family)
);

create table api_keys (
    api_key_id uuid primary key,
    scope_id uuid not null,
    name text not null,
    hash bytea not null constraint api_keys_hash unique,
    prefix text not null,
    grants jsonb not null default '{}',
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz
);

-- The ledger: one row per turn. An open row is a reservation. attempts is an array, one element per try of the turn at an account.
-- A turn's id is that of its first request; request_id is that of its newest, which holds it while it is open. opened_at follows it.
create table turns (
    turn_id uuid primary key,
    request_id uuid not null,
    scope_id uuid not null,
    api_key_id uuid,
    client_turn_id text,
    boot_id uuid not null,
    lease_id uuid,
    generation bigint,
    state text not null default 'open' constraint turns_state check (state in ('open', 'settled', 'released')),
    route text not null,
    transport text not null,
    model text not null,
    account_id uuid,
    response_id text,
    outcome text,
    reason text,
    attempts jsonb not null default '[]',
    requests integer not null default 1,
    input_tokens bigint not null default 0,
    cached_input_tokens bigint not null default 0,
    output_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    cost_nanodollars bigint,
    estimated boolean not null default false,
    first_event_ms integer,
    total_ms integer,
    opened_at timestamptz not null default clock_timestamp(),
    settled_at timestamptz
);
create index turns_client on turns (scope_id, client_turn_id, turn_id desc) where client_turn_id is not null;
create unique index turns_request on turns (request_id);
create index turns_open on turns (boot_id) where state = 'open';

-- One row per answered request, written in batches; day is that of the turn's id, so a repeated batch changes nothing.
-- A request that never became a turn has its own id in both places. status is null where the process died with the answer.
create table request_log (
    day date not null,
    turn_id uuid not null,
    request_id uuid not null,
    scope_id uuid not null,
    api_key_id uuid,
    account_id uuid,
    route text not null,
    transport text not null,
    model text,
    status integer,
    outcome text not null,
    reason text,
    bridge_outcome text,
    bridge_reason text,
    error_code text,
    attempts integer not null,
    input_tokens bigint not null default 0,
    cached_input_tokens bigint not null default 0,
    output_tokens bigint not null default 0,
    reasoning_tokens bigint not null default 0,
    cost_nanodollars bigint,
    estimated boolean not null default false,
    first_event_ms integer,
    total_ms integer not null,
    user_agent text,
    explanation jsonb,
    written_at timestamptz not null default clock_timestamp(),
    primary key (day, turn_id, request_id)
);

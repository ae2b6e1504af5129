-- The credential whose refresh token upstream refused by a word that this release does not know: the second time in a row it is believed.
alter table refresh_claims add column doubted_generation bigint;

-- What follows an account that is merged away or deleted, while the account is locked. Both tables are purged and stay small.
create index http_bridge_leases_account on http_bridge_leases (account_id) where account_id is not null;
create index response_snapshots_account on response_snapshots (account_id) where account_id is not null;

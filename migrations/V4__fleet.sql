-- When the key last made us ask upstream about its accounts: it may do so only so often, on whichever replica.
alter table api_keys add column refreshed_at timestamptz;

-- What a key has used.
create index turns_api_key on turns (api_key_id) where api_key_id is not null;

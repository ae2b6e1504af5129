-- What each process runs, for operators and for the rotation of master keys, which must leave nobody behind. master_keys are the ids of its
-- keys with a fingerprint each, the one that seals first; never a key. Null: a release that did not say.
alter table bridge_replicas add column version text, add column master_keys text[];

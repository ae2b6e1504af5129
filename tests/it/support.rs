//! What the tests stand on.

pub(crate) mod chaos;
pub(crate) mod cluster;
pub(crate) mod codex;
pub(crate) mod codex_socket;
pub(crate) mod exposition;
pub(crate) mod house;
pub(crate) mod pg;
pub(crate) mod pgbouncer;
pub(crate) mod process;
pub(crate) mod redis;
pub(crate) mod runbook;
pub(crate) mod store;
pub(crate) mod wait;

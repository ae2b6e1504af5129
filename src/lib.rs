//! Drawbridge: a proxy that lets many Codex clients share a pool of ChatGPT accounts over many replicas.
//!
//! The map of the rooms is in `ARCHITECTURE.md`.

pub mod account;
pub mod api_key;
pub mod bus;
pub mod cli;
pub mod config;
pub mod db;
pub mod error;
pub mod forward;
pub mod ids;
pub mod ingress;
pub mod jobs;
pub mod lease;
pub mod ledger;
pub mod poll;
pub mod protocol;
pub mod quota;
pub mod replica;
pub mod routing;
pub mod secret;
pub mod server;
pub mod snapshot;
pub mod task;
pub mod telemetry;
pub mod token;
pub mod turn;
pub mod upstream;

//! Drawbridge: a proxy that lets many Codex clients share a pool of ChatGPT accounts over many replicas.
//!
//! The map of the rooms is in `ARCHITECTURE.md`.

pub mod bus;
pub mod db;
pub mod ids;
pub mod protocol;
pub mod replica;
pub mod routing;
pub mod secret;
pub mod task;
pub mod telemetry;

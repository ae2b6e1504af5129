//! The promises that need a real Postgres, real sockets or real processes: one file each.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod architecture;
mod codex;
mod embedded;
mod http;
mod keys;
mod ledger;
mod process;
mod quota;
mod support;
mod websocket;

//! The promises that need a real Postgres, real sockets or real processes: one file each.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]
#![expect(
    clippy::disallowed_methods,
    reason = "tests spawn, read clocks and look behind the service's back"
)]

mod accounts;
mod accounts_command;
mod architecture;
mod codex;
mod credentials;
mod embedded;
mod http;
mod keys;
mod ledger;
mod process;
mod quota;
mod support;
mod websocket;

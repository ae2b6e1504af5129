//! The promises that need a real Postgres, real sockets or real processes: one file each.
#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]
#![expect(
    clippy::disallowed_methods,
    reason = "tests spawn, read clocks and look behind the service's back"
)]

mod accounts;
mod accounts_command;
mod architecture;
mod bad_input;
mod bus;
mod chaos;
mod cluster;
mod codex;
mod credentials;
mod dashboards;
mod doctor;
mod documents;
mod embedded;
mod fleet;
mod forward;
mod grants;
mod http;
mod keys;
mod leases;
mod ledger;
mod limits;
mod login_flows;
mod logins;
mod merges;
mod metrics;
mod model;
mod process;
mod quota;
mod reauthentication;
mod refresh;
mod replicas;
mod rotation;
mod runbooks;
mod snapshots;
mod statements;
mod support;
mod usage;
mod websocket;

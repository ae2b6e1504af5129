//! What the bytes between clients and upstream mean.
//!
//! Owns the SSE framing, the recognition of events, the terminal forms, the failure taxonomy, token usage, rate-limit
//! observations and the contract that SDK clients rely on. It must not know accounts, databases, sockets or clocks:
//! every function is a function of values, and the time is a parameter (epoch seconds).
//!
//! Invariant: what need not change is never rebuilt. Readers borrow, take upstream's spellings leniently, and never
//! fail a stream for a field that they did not need.
pub mod compact;
pub mod contract;
pub mod event;
pub mod failure;
pub mod headers;
mod lenient;
pub mod limits;
pub mod request;
pub mod sse;
pub mod trace;
pub mod usage;

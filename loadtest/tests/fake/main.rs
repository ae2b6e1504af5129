//! The fake is as strict as the backend it stands for, and each fault does what it says.

#![expect(
    clippy::unwrap_used,
    reason = "a helper that cannot go on fails its test"
)]

mod credentials;
mod faults;
mod requests;
mod sockets;
mod support;

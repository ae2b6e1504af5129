//! What the tests stand on.

pub(crate) mod pg;
pub(crate) mod pgbouncer;
pub(crate) mod store;

//! Postgres: the embedded cluster.

pub mod embedded;

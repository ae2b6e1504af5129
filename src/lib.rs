//! Drawbridge.
pub mod protocol;

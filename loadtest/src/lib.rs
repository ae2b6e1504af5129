//! Fake upstream, load generator and measurements for Drawbridge.

pub mod bench;
pub mod clock;
pub mod demo;
pub mod drive;
pub mod process;
pub mod rig;
pub mod upstream;

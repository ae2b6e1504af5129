//! Fake upstream, load generator and measurements for Drawbridge.

pub mod bench;
pub mod chaos;
pub mod clock;
pub mod demo;
pub mod drive;
pub mod edge;
pub mod load;
pub mod page;
pub mod process;
pub mod rig;
pub mod upstream;

/// Tells whoever looks on; nobody may.
pub(crate) fn say(text: &str) {
    use std::io::Write as _;
    let _nobody_looks = writeln!(std::io::stdout().lock(), "{text}");
}

//! Drawbridge.
fn main() {}

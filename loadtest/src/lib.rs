//! Fake upstream, load generator and measurements for Drawbridge.

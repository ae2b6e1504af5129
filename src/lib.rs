//! Drawbridge.

pub mod db;

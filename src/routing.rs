//! Chooses the account of a turn: a pure function of what is known of the pool and what the turn asks for.
//!
//! It never awaits, reads no clock and takes no lock; the view is an immutable snapshot and the time is part of the question.

mod view;

pub use self::view::{Account, Block, Lifecycle, View, Window};

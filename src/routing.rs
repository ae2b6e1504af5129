//! Chooses the account of a turn: a pure function of what is known of the pool and what the turn asks for.
//!
//! It never awaits, reads no clock and takes no lock; the view is an immutable snapshot and the time is part of the question.
//!
//! Invariant: samples rank, upstream's errors block. A window at 100 % makes an account the last choice; only its life cycle, the key's
//! grants, its catalogue or a block exclude it. What failed of late ranks behind what did not.

mod explain;
mod limits;
mod penalty;
mod select;
mod view;

pub use self::{
    explain::{Chosen, Excluded, Exclusion, Explanation},
    limits::{Status, effective_used, family_of, plan_weight, status},
    penalty::Penalty,
    select::{Ask, Choice, Decision, Sticky, select},
    view::{Account, Block, Lifecycle, View, Window},
};

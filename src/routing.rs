//! Chooses the account of a turn: a pure function of what is known of the pool and what the turn asks for.
//!
//! It never awaits, reads no clock and takes no lock; the view is an immutable snapshot and the time is part of the question.
//!
//! Invariant: samples rank, upstream's errors block. A window at 100 % makes an account the last choice; only its life cycle, the key's
//! grants, its catalogue, a block or a full cap exclude it. What failed of late ranks behind what did not.

mod explain;
mod limits;
mod load;
mod penalty;
mod policy;
mod select;
mod view;

pub use self::{
    explain::{Chosen, Excluded, Exclusion, Explanation},
    limits::{
        Standing, Status, effective_used, family_name, family_of, knows_plan, plan_weight, status,
    },
    load::{Load, Points},
    penalty::Penalty,
    policy::{BadWeights, Policy, Strategy, UnknownStrategy, Weights},
    select::{Ask, Choice, Decision, Sticky, select},
    view::{Account, Block, Lifecycle, View, Window},
};

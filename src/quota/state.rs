//! What is known of every account's limits, and what of it the database does not know yet. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use jiff::Timestamp;

use super::{Block, Sample, Source, lifts, merge_block, merge_window};
use crate::{
    ids::AccountId,
    protocol::limits::{Family, Observation},
    routing::{self, effective_used},
};

/// The key of one window; the number is its nominal length in minutes.
pub(super) type WindowKey = (AccountId, Family, u32);
/// The key of one block.
pub(super) type BlockKey = (AccountId, Family);

/// States on their way to or from the database, in the order of their keys.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) windows: Vec<(WindowKey, Sample)>,
    pub(super) blocks: Vec<(BlockKey, Block)>,
}

impl Rows {
    pub(super) fn is_empty(&self) -> bool {
        self.windows.is_empty() && self.blocks.is_empty()
    }
}

/// What a change means for others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Change {
    /// Selection would see something else.
    pub(super) seen: bool,
    /// It is to be stored at once.
    pub(super) urgent: bool,
}

#[derive(Debug, Default)]
pub(super) struct State {
    accounts: HashMap<AccountId, Limits>,
    unsaved_windows: BTreeSet<WindowKey>,
    unsaved_blocks: BTreeSet<BlockKey>,
}

/// The limits of one account.
#[derive(Debug, Default)]
struct Limits {
    windows: BTreeMap<(Family, u32), Sample>,
    blocks: BTreeMap<Family, Block>,
}

impl State {
    pub(super) fn observe(
        &mut self,
        account: AccountId,
        observation: &Observation,
        observed_at: Timestamp,
        source: Source,
        now: Timestamp,
    ) -> Change {
        let mut change = Change::default();
        if observation.windows.is_empty() {
            return change;
        }
        let family = &observation.family;
        let limits = self.accounts.entry(account).or_default();
        for seen in &observation.windows {
            let minutes = seen.window.minutes();
            let sample = Sample {
                used_percent: seen.used_percent,
                resets_at: seen.resets_at,
                observed_at,
                source,
            };
            let (before, after) = limits.merge_window((family.clone(), minutes), sample);
            if before != Some(after) {
                self.unsaved_windows
                    .insert((account, family.clone(), minutes));
            }
            change.seen |= before.is_none_or(|before| before.ranks() != after.ranks());
        }
        if limits.lift(family, observed_at, source, now.as_second()) {
            tracing::info!(%account, %family, "a block is lifted early");
            self.unsaved_blocks.insert((account, family.clone()));
            change = Change {
                seen: true,
                urgent: true,
            };
        }
        change
    }

    pub(super) fn block(&mut self, account: AccountId, family: &Family, block: Block) -> Change {
        self.accounts
            .entry(account)
            .or_default()
            .merge_block(family.clone(), block);
        self.unsaved_blocks.insert((account, family.clone()));
        Change {
            seen: true,
            urgent: true,
        }
    }

    /// Takes in what the database knows.
    pub(super) fn merge(&mut self, rows: Rows) -> Change {
        let mut seen = false;
        for ((account, family, minutes), sample) in rows.windows {
            let (before, after) = self
                .accounts
                .entry(account)
                .or_default()
                .merge_window((family, minutes), sample);
            seen |= before.is_none_or(|before| before.ranks() != after.ranks());
        }
        for ((account, family), block) in rows.blocks {
            seen |= self
                .accounts
                .entry(account)
                .or_default()
                .merge_block(family, block);
        }
        Change {
            seen,
            urgent: false,
        }
    }

    /// What the database does not know yet, in the order of its keys; from now on it counts as known.
    pub(super) fn take_unsaved(&mut self) -> Rows {
        let windows = std::mem::take(&mut self.unsaved_windows).into_iter();
        let blocks = std::mem::take(&mut self.unsaved_blocks).into_iter();
        Rows {
            windows: windows
                .filter_map(|(account, family, minutes)| {
                    let sample = *self
                        .accounts
                        .get(&account)?
                        .windows
                        .get(&(family.clone(), minutes))?;
                    Some(((account, family, minutes), sample))
                })
                .collect(),
            blocks: blocks
                .filter_map(|key| {
                    let block = self.accounts.get(&key.0)?.blocks.get(&key.1)?.clone();
                    Some((key, block))
                })
                .collect(),
        }
    }

    /// Takes back what could not be stored.
    pub(super) fn keep_unsaved(&mut self, rows: Rows) {
        self.unsaved_windows
            .extend(rows.windows.into_iter().map(|(key, _)| key));
        self.unsaved_blocks
            .extend(rows.blocks.into_iter().map(|(key, _)| key));
    }

    pub(super) fn snapshot(
        &self,
        account: AccountId,
    ) -> (Vec<routing::Window>, Vec<routing::Block>) {
        let Some(limits) = self.accounts.get(&account) else {
            return (Vec::new(), Vec::new());
        };
        let windows = limits
            .windows
            .iter()
            .map(|((family, minutes), sample)| sample.view(family, *minutes));
        let standing = limits.blocks.iter().filter(|(_, block)| block.stands());
        let blocks = standing.map(|(family, block)| routing::Block {
            family: family.to_string(),
            until: block.until,
            reason: block.reason.clone(),
        });
        (windows.collect(), blocks.collect())
    }
}

impl Limits {
    /// What was known before, and what is now.
    fn merge_window(&mut self, key: (Family, u32), sample: Sample) -> (Option<Sample>, Sample) {
        let before = self.windows.get(&key).copied();
        let after = before.map_or(sample, |before| merge_window(before, sample));
        self.windows.insert(key, after);
        (before, after)
    }

    /// Whether that changed anything.
    fn merge_block(&mut self, family: Family, block: Block) -> bool {
        let before = self.blocks.get(&family).cloned();
        let after = match before.clone() {
            Some(before) => merge_block(before, block),
            None => block,
        };
        let changed = before.as_ref() != Some(&after);
        self.blocks.insert(family, after);
        changed
    }

    /// Ends the family's block if what is known since `observed_at` proves it over.
    fn lift(&mut self, family: &Family, observed_at: Timestamp, source: Source, now: i64) -> bool {
        let windows = self.windows.iter().filter(|((of, _), _)| of == family);
        let worst = windows
            .map(|((family, minutes), sample)| effective_used(&sample.view(family, *minutes), now));
        match self.blocks.get_mut(family) {
            Some(block)
                if block.stands()
                    && block.until > now
                    && lifts(block, observed_at, source, worst.fold(0.0, f64::max)) =>
            {
                block.lifted_at = Some(observed_at);
                true
            }
            _ => false,
        }
    }
}

impl Sample {
    /// What selection looks at.
    fn ranks(&self) -> (f64, Option<i64>) {
        (self.used_percent, self.resets_at)
    }

    fn view(&self, family: &Family, minutes: u32) -> routing::Window {
        routing::Window {
            family: family.to_string(),
            minutes,
            used_percent: self.used_percent,
            resets_at: self.resets_at,
            observed_at: self.observed_at.as_second(),
        }
    }
}

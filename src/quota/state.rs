//! What is known of every account's limits, and what of it the database does not know yet. Pure.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use jiff::Timestamp;

use super::{Block, CreditSample, Evidence, Sample, Source, lifts, merge_block, merge_window};
use crate::{
    ids::AccountId,
    protocol::limits::{Credits, Family, Observation, UsageReport},
    routing::{self, effective_used},
};

/// The key of one window; the number is its nominal length in minutes.
pub(super) type WindowKey = (AccountId, Family, u32);
/// The key of one block.
pub(super) type BlockKey = (AccountId, Family);

/// The family of reviews: the usage endpoint gives it a place of its own, not one in the list of further families.
const CODE_REVIEW: &str = "code_review";

/// States on their way to or from the database, in the order of their keys.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) windows: Vec<(WindowKey, Sample)>,
    pub(super) blocks: Vec<(BlockKey, Block)>,
    pub(super) credits: Vec<(AccountId, CreditSample)>,
}

impl Rows {
    pub(super) fn is_empty(&self) -> bool {
        self.windows.is_empty() && self.blocks.is_empty() && self.credits.is_empty()
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

impl Change {
    /// Selection sees it, and the other replicas are to know at once.
    const URGENT: Self = Self {
        seen: true,
        urgent: true,
    };

    fn and(self, other: Self) -> Self {
        Self {
            seen: self.seen || other.seen,
            urgent: self.urgent || other.urgent,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct State {
    accounts: HashMap<AccountId, Limits>,
    /// Of the accounts that were merged into others, by the id that is gone.
    heirs: Arc<HashMap<AccountId, AccountId>>,
    unsaved_windows: BTreeSet<WindowKey>,
    unsaved_blocks: BTreeSet<BlockKey>,
    unsaved_credits: BTreeSet<AccountId>,
}

/// The limits of one account.
#[derive(Clone, Debug, Default)]
pub(super) struct Limits {
    pub(super) windows: BTreeMap<(Family, u32), Sample>,
    pub(super) blocks: BTreeMap<Family, Block>,
    pub(super) credits: Option<CreditSample>,
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
        let account = self.heir(account);
        let mut change = Change::default();
        if let Some(credits) = observation.credits {
            let sample = CreditSample {
                credits,
                observed_at,
                source,
            };
            let limits = self.accounts.entry(account).or_default();
            if let Some(known) = limits.merge_credits(sample) {
                self.unsaved_credits.insert(account);
                change.seen |= known.is_none_or(|known| known.credits != credits);
            }
        }
        for seen in &observation.windows {
            let sample = Sample {
                used_percent: seen.used_percent,
                resets_at: seen.resets_at,
                observed_at,
                source,
            };
            let key = (account, observation.family.clone(), seen.window.minutes());
            change = change.and(self.learn(key, sample));
        }
        if !observation.windows.is_empty()
            && self.lift(account, observation, observed_at, source, now)
        {
            change = Change::URGENT;
        }
        change
    }

    /// Takes in the answer of the usage endpoint. What it leaves out is no more: a window of a family that it lists, and a family where it
    /// lists families at all.
    pub(super) fn report(
        &mut self,
        account: AccountId,
        report: &UsageReport,
        observed_at: Timestamp,
        now: Timestamp,
    ) -> Change {
        let account = self.heir(account);
        let told = |family: &Family| {
            let observation = report
                .observations
                .iter()
                .find(|observation| &observation.family == family);
            observation.map(|observation| &observation.windows)
        };
        let known = self.accounts.get(&account).into_iter();
        let gone: Vec<_> = known
            .flat_map(|limits| &limits.windows)
            .filter(|((family, minutes), sample)| {
                let listed = match told(family) {
                    Some(windows) => {
                        windows.is_empty()
                            || windows.iter().any(|seen| seen.window.minutes() == *minutes)
                    }
                    None => {
                        !report.lists_families
                            || *family == Family::CODEX
                            || family.as_str() == CODE_REVIEW
                    }
                };
                sample.source != Source::Unlisted && !listed
            })
            .map(|(key, _)| key.clone())
            .collect();
        let mut change = Change::default();
        for (family, minutes) in gone {
            let sample = Sample {
                used_percent: 0.0,
                resets_at: None,
                observed_at,
                source: Source::Unlisted,
            };
            change = change.and(self.learn((account, family, minutes), sample));
        }
        for observation in &report.observations {
            let observed = self.observe(account, observation, observed_at, Source::Poll, now);
            change = change.and(observed);
        }
        change
    }

    /// Takes in a sample of this replica's own.
    fn learn(&mut self, key: WindowKey, sample: Sample) -> Change {
        let (account, family, minutes) = key.clone();
        let limits = self.accounts.entry(account).or_default();
        let (before, after) = limits.merge_window((family, minutes), sample);
        if before != Some(after) {
            self.unsaved_windows.insert(key);
        }
        Change {
            seen: before.is_none_or(|before| before.ranks() != after.ranks()),
            urgent: false,
        }
    }

    /// Ends the family's block if what is known since the observation proves it over.
    fn lift(
        &mut self,
        account: AccountId,
        observation: &Observation,
        observed_at: Timestamp,
        source: Source,
        now: Timestamp,
    ) -> bool {
        let family = &observation.family;
        let limits = self.accounts.entry(account).or_default();
        let windows = limits.windows.iter().filter(|((of, _), _)| of == family);
        let now = now.as_second();
        let evidence = Evidence {
            observed_at,
            source,
            worst_used: windows
                .map(|((family, minutes), sample)| {
                    effective_used(&sample.view(family, *minutes), now)
                })
                .fold(0.0, f64::max),
            credits: limits.credits.is_some_and(|sample| sample.credits.usable()),
            limit_reached: observation.limit_reached,
        };
        let Some(block) = limits.blocks.get_mut(family) else {
            return false;
        };
        if !block.stands() || block.until <= now {
            return false;
        }
        let lifted_at = lifts(block, &evidence);
        block.lifted_at = lifted_at.or(block.lifted_at);
        if lifted_at.is_some() {
            self.unsaved_blocks.insert((account, family.clone()));
        }
        lifted_at.is_some()
    }

    pub(super) fn block(&mut self, account: AccountId, family: &Family, block: Block) -> Change {
        let account = self.heir(account);
        self.accounts
            .entry(account)
            .or_default()
            .merge_block(family.clone(), block);
        self.unsaved_blocks.insert((account, family.clone()));
        Change::URGENT
    }

    /// Takes over what is known under ids that are gone. What was learnt under one may never have been stored, so none of it counts as that.
    pub(super) fn inherit(&mut self, heirs: Arc<HashMap<AccountId, AccountId>>) -> Change {
        self.heirs = heirs;
        let heirs = Arc::clone(&self.heirs);
        let mut change = Change::default();
        for (gone, heir) in heirs.iter() {
            if let Some(limits) = self.accounts.remove(gone) {
                let rows = limits.of(*heir);
                self.keep_unsaved(&rows);
                change = change.and(self.merge(rows));
            }
        }
        change
    }

    /// The account under the id that it has now.
    fn heir(&self, account: AccountId) -> AccountId {
        self.heirs.get(&account).copied().unwrap_or(account)
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
        for (account, sample) in rows.credits {
            let known = self
                .accounts
                .entry(account)
                .or_default()
                .merge_credits(sample);
            seen |= known
                .is_some_and(|known| known.is_none_or(|known| known.credits != sample.credits));
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
            credits: std::mem::take(&mut self.unsaved_credits)
                .into_iter()
                .filter_map(|account| Some((account, self.accounts.get(&account)?.credits?)))
                .collect(),
        }
    }

    /// Takes back what could not be stored.
    pub(super) fn keep_unsaved(&mut self, rows: &Rows) {
        self.unsaved_windows
            .extend(rows.windows.iter().map(|(key, _)| key.clone()));
        self.unsaved_blocks
            .extend(rows.blocks.iter().map(|(key, _)| key.clone()));
        self.unsaved_credits
            .extend(rows.credits.iter().map(|(account, _)| *account));
    }

    /// Everything that is known of an account.
    pub(super) fn limits(&self, account: AccountId) -> Limits {
        self.accounts.get(&account).cloned().unwrap_or_default()
    }

    /// What stands in for full windows.
    pub(super) fn credits(&self, account: AccountId) -> Option<Credits> {
        Some(self.accounts.get(&account)?.credits?.credits)
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
            .filter(|(_, sample)| sample.source != Source::Unlisted)
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
    /// All of it as the rows of an account.
    fn of(self, account: AccountId) -> Rows {
        let windows = self.windows.into_iter();
        let blocks = self.blocks.into_iter();
        Rows {
            windows: windows
                .map(|((family, minutes), sample)| ((account, family, minutes), sample))
                .collect(),
            blocks: blocks
                .map(|(family, block)| ((account, family), block))
                .collect(),
            credits: self
                .credits
                .map(|sample| (account, sample))
                .into_iter()
                .collect(),
        }
    }

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

    /// What was known before, if the sample is newer.
    #[expect(clippy::option_option, reason = "nothing may have been known before")]
    fn merge_credits(&mut self, sample: CreditSample) -> Option<Option<CreditSample>> {
        let newer = |known: CreditSample| sample.observed_at > known.observed_at;
        self.credits
            .is_none_or(newer)
            .then(|| self.credits.replace(sample))
    }
}

impl Sample {
    /// What selection looks at.
    fn ranks(&self) -> (f64, Option<i64>, bool) {
        let unlisted = self.source == Source::Unlisted;
        (self.used_percent, self.resets_at, unlisted)
    }

    pub(super) fn view(&self, family: &Family, minutes: u32) -> routing::Window {
        routing::Window {
            family: family.to_string(),
            minutes,
            used_percent: self.used_percent,
            resets_at: self.resets_at,
            observed_at: self.observed_at.as_second(),
        }
    }
}

#[cfg(test)]
mod tests;

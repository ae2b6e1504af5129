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
        let Some(block) = self.blocks.get_mut(family) else {
            return false;
        };
        if !block.stands() || block.until <= now {
            return false;
        }
        let windows = self.windows.iter().filter(|((of, _), _)| of == family);
        let worst = windows
            .map(|((family, minutes), sample)| effective_used(&sample.view(family, *minutes), now))
            .fold(0.0, f64::max);
        let lifted_at = lifts(block, observed_at, source, worst);
        block.lifted_at = lifted_at.or(block.lifted_at);
        lifted_at.is_some()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        protocol::limits::{Window, WindowSample},
        routing::{Account, Lifecycle, Status, status},
    };

    const NOW: i64 = 1_800_000_000;
    const HOUR: i64 = 3_600;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(NOW + seconds).unwrap()
    }

    fn seen(family: &str, windows: &[(Window, f64, i64)]) -> Observation {
        let sample = |&(window, used_percent, resets_in): &(Window, f64, i64)| WindowSample {
            window,
            used_percent,
            window_minutes: window.minutes(),
            resets_at: Some(NOW + resets_in),
        };
        Observation {
            family: Family::new(family),
            windows: windows.iter().map(sample).collect(),
            ..Observation::default()
        }
    }

    fn refused(at_second: i64, until: i64) -> Block {
        Block {
            blocked_at: at(at_second),
            until: NOW + until,
            reason: "rate_limit_exceeded".into(),
            lifted_at: None,
        }
    }

    fn is_blocked(state: &State, id: AccountId, family: &str, seconds: i64) -> bool {
        let (windows, blocks) = state.snapshot(id);
        let account = Account {
            id,
            lifecycle: Lifecycle::Active,
            plan: "plus".into(),
            windows,
            blocks,
            models: None,
            in_flight: Default::default(),
            penalty: Default::default(),
        };
        status(&account, family, NOW + seconds) != Status::Active
    }

    #[test]
    fn a_429_for_60_s_at_40_percent_blocks_for_60_s_and_an_older_observation_does_not_lift_it() {
        let (mut state, id) = (State::default(), AccountId::new());
        let at_40 = seen(
            "codex",
            &[
                (Window::FiveHour, 40.0, 5 * HOUR),
                (Window::Weekly, 40.0, 144 * HOUR),
            ],
        );
        state.observe(id, &at_40, at(0), Source::Header, at(1));
        state.block(id, &Family::CODEX, refused(10, 70));
        // A slow turn that began before the refusal ends after it.
        state.observe(id, &at_40, at(5), Source::Header, at(20));
        assert_eq!(
            state.snapshot(id).0[0].used_percent,
            40.0,
            "a refusal invents no use"
        );
        for (second, blocked) in [(11, true), (69, true), (70, false)] {
            assert_eq!(is_blocked(&state, id, "codex", second), blocked, "{second}");
        }
        assert!(
            !is_blocked(&state, id, "codex_bengalfox", 11),
            "other families stay usable"
        );
        let lifted = state.observe(id, &at_40, at(12), Source::Header, at(20));
        assert!(
            lifted.urgent && !is_blocked(&state, id, "codex", 20),
            "a turn that began after it was served"
        );
    }

    #[test]
    fn a_full_window_holds_a_block_until_its_reset_though_upstream_omits_it() {
        for (what, family, weekly, blocked) in [
            ("nothing else is known", "codex", None, false),
            (
                "another window has room",
                "codex",
                Some((99.0, HOUR)),
                false,
            ),
            ("another window is full", "codex", Some((100.0, HOUR)), true),
            ("its reset has passed", "codex", Some((100.0, 15)), false),
            (
                "the observation is of another family",
                "codex_bengalfox",
                None,
                true,
            ),
        ] {
            let (mut state, id) = (State::default(), AccountId::new());
            if let Some((used, resets_in)) = weekly {
                state.observe(
                    id,
                    &seen("codex", &[(Window::Weekly, used, resets_in)]),
                    at(0),
                    Source::Header,
                    at(1),
                );
            }
            state.block(id, &Family::CODEX, refused(10, HOUR));
            state.observe(
                id,
                &seen(family, &[(Window::FiveHour, 1.0, HOUR)]),
                at(12),
                Source::Header,
                at(20),
            );
            assert_eq!(is_blocked(&state, id, "codex", 20), blocked, "{what}");
        }
    }

    #[test]
    fn what_a_peer_lifted_or_learnt_later_reaches_this_replica_and_what_is_newer_here_stays() {
        let (mut here, mut peer, id) = (State::default(), State::default(), AccountId::new());
        here.observe(
            id,
            &seen("codex", &[(Window::Weekly, 10.0, HOUR)]),
            at(0),
            Source::Header,
            at(0),
        );
        here.block(id, &Family::CODEX, refused(10, HOUR));
        assert!(peer.merge(here.take_unsaved()).seen);
        peer.observe(
            id,
            &seen("codex", &[(Window::Weekly, 20.0, HOUR)]),
            at(12),
            Source::Header,
            at(12),
        );
        here.observe(
            id,
            &seen("codex", &[(Window::Weekly, 30.0, HOUR)]),
            at(9),
            Source::Error,
            at(12),
        );
        assert!(here.merge(peer.take_unsaved()).seen);
        assert!(!is_blocked(&here, id, "codex", 20));
        assert_eq!(here.snapshot(id).0[0].used_percent, 20.0);
    }

    #[test]
    fn what_could_not_be_stored_is_stored_later_and_nothing_twice() {
        let (mut state, id) = (State::default(), AccountId::new());
        let sample = seen("codex", &[(Window::Weekly, 10.0, HOUR)]);
        assert!(
            state
                .observe(id, &sample, at(0), Source::Header, at(0))
                .seen
        );
        assert!(
            !state
                .observe(id, &sample, at(1), Source::Header, at(1))
                .seen,
            "selection sees no difference"
        );
        state.block(id, &Family::CODEX, refused(2, 60));
        let failed = state.take_unsaved();
        assert!(state.take_unsaved().is_empty());
        state.keep_unsaved(failed);
        let rows = state.take_unsaved();
        assert_eq!((rows.windows.len(), rows.blocks.len()), (1, 1));
        assert_eq!(rows.windows[0].1.observed_at, at(1));
        assert_eq!(
            state.merge(rows),
            Change::default(),
            "our own write comes back"
        );
        assert!(state.take_unsaved().is_empty());
    }
}

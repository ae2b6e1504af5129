//! What the rules of merging and lifting come to for an account.

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
        weight: 1.0,
        windows,
        blocks,
        credits: None,
        models: None,
        load: Default::default(),
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

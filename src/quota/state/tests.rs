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
    state.keep_unsaved(&failed);
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

#[test]
fn a_spark_429_leaves_the_default_family_usable_and_the_reverse() {
    for (hit, other) in [("codex", "codex_bengalfox"), ("codex_bengalfox", "codex")] {
        let (mut state, id) = (State::default(), AccountId::new());
        state.block(id, &Family::new(hit), refused(10, HOUR));
        assert!(is_blocked(&state, id, hit, 20));
        assert!(!is_blocked(&state, id, other, 20));
        // Nor does what is seen of one family end the block of the other, or erase it.
        let full = seen(other, &[(Window::FiveHour, 100.0, HOUR)]);
        state.observe(id, &full, at(12), Source::Header, at(20));
        assert!(is_blocked(&state, id, hit, 20));
        assert!(!is_blocked(&state, id, other, 20), "samples do not block");
    }
}

#[test]
fn an_exhausted_review_quota_does_not_block_ordinary_turns() {
    let (mut state, id) = (State::default(), AccountId::new());
    let review = seen("code_review", &[(Window::Weekly, 100.0, HOUR)]);
    state.observe(id, &review, at(0), Source::Poll, at(0));
    state.block(id, &Family::new("code_review"), refused(10, HOUR));
    assert!(!is_blocked(&state, id, "codex", 20));
}

#[test]
fn a_quota_that_was_reset_early_or_topped_up_is_noticed_by_a_poll() {
    let quota_block = || Block {
        reason: "usage_limit_reached".into(),
        ..refused(10, 144 * HOUR)
    };
    let topped_up = Credits {
        has_credits: true,
        ..Credits::default()
    };
    for (what, used, credits, reached, began, lifted) in [
        ("reset early", 1.0, None, None, 200, true),
        ("still full", 100.0, None, None, 200, false),
        (
            "credits were bought",
            100.0,
            Some(topped_up),
            Some(false),
            200,
            true,
        ),
        (
            "credits that do not help",
            100.0,
            Some(topped_up),
            Some(true),
            200,
            false,
        ),
        ("too soon to be true", 1.0, None, None, 60, false),
    ] {
        let (mut state, id) = (State::default(), AccountId::new());
        let full = seen("codex", &[(Window::Weekly, 100.0, 144 * HOUR)]);
        state.observe(id, &full, at(9), Source::Error, at(9));
        state.block(id, &Family::CODEX, quota_block());
        let report = UsageReport {
            observations: vec![Observation {
                credits,
                limit_reached: reached,
                ..seen("codex", &[(Window::Weekly, used, 144 * HOUR)])
            }],
            ..UsageReport::default()
        };
        state.report(id, &report, at(began), at(began));
        assert_eq!(!is_blocked(&state, id, "codex", began), lifted, "{what}");
    }
}

#[test]
fn what_the_usage_endpoint_leaves_out_is_gone_unless_it_says_nothing_of_the_kind() {
    let week = |family| seen(family, &[(Window::Weekly, 40.0, HOUR)]);
    let nothing = |family| seen(family, &[]);
    let spark = "codex_bengalfox";
    for (what, observations, lists_families, left) in [
        (
            "it lists both",
            vec![week("codex"), week(spark)],
            true,
            vec!["code_review", "codex", spark],
        ),
        (
            "it lists no windows at all",
            vec![nothing("codex")],
            false,
            vec!["code_review", "codex", "codex 5h", spark],
        ),
        (
            "no further family",
            vec![week("codex")],
            true,
            vec!["code_review", "codex"],
        ),
        (
            "it does not list families",
            vec![week("codex")],
            false,
            vec!["code_review", "codex", spark],
        ),
    ] {
        let (mut state, id) = (State::default(), AccountId::new());
        for family in ["codex", "code_review", spark] {
            state.observe(id, &week(family), at(0), Source::Header, at(0));
        }
        let short = seen("codex", &[(Window::FiveHour, 100.0, HOUR)]);
        state.observe(id, &short, at(0), Source::Header, at(0));
        let report = UsageReport {
            observations,
            lists_families,
            ..UsageReport::default()
        };
        state.report(id, &report, at(60), at(60));
        let known = state.snapshot(id).0;
        let names: Vec<String> = known
            .iter()
            .map(|window| match window.minutes {
                300 => format!("{} 5h", window.family),
                _ => window.family.clone(),
            })
            .collect();
        let mut left: Vec<&str> = left;
        let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
        names.sort_unstable();
        left.sort_unstable();
        assert_eq!(names, left, "{what}");
    }
}

#[test]
fn what_is_known_of_an_account_that_was_merged_away_is_its_heirs_and_is_stored_again() {
    let (gone, heir) = (AccountId::new(), AccountId::new());
    let mut state = State::default();
    let week = |used| seen("codex", &[(Window::Weekly, used, 144 * HOUR)]);
    state.observe(gone, &week(40.0), at(5), Source::Header, at(5));
    state.block(gone, &Family::CODEX, refused(10, 70));
    state.observe(heir, &week(30.0), at(2), Source::Header, at(2));
    // As if it had been stored after its row was gone, which stores nothing.
    drop(state.take_unsaved());
    let heirs = Arc::new(HashMap::from([(gone, heir)]));
    assert!(state.inherit(Arc::clone(&heirs)).seen);
    assert!(is_blocked(&state, heir, "codex", 11));
    assert_eq!(state.snapshot(heir).0[0].used_percent, 40.0);
    assert_eq!(state.snapshot(gone), (Vec::new(), Vec::new()));
    let unsaved = state.take_unsaved();
    assert_eq!(unsaved.windows[0].0.0, heir);
    assert_eq!(unsaved.blocks[0].0.0, heir);
    // A turn that still runs there knows the old id.
    state.observe(gone, &week(50.0), at(20), Source::Header, at(20));
    state.block(gone, &Family::CODEX, refused(30, 90));
    assert!(is_blocked(&state, heir, "codex", 80));
    assert_eq!(state.snapshot(heir).0[0].used_percent, 50.0);
    assert_eq!(state.inherit(heirs), Change::default(), "nothing is left");
}

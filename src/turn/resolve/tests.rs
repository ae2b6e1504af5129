//! The decision table. A row's name is its number; rows that several inputs share appear several times.

use super::*;

const BASE: Inputs = Inputs {
    evidence: Evidence::None,
    key: Key::None,
    local: Local::None,
    row: Row::Absent,
    continuity: OPTIONAL,
    conflict: false,
    draining: false,
    full: false,
    forwarded: false,
    socket: false,
};
const OPTIONAL: Continuity = Continuity::Optional;
const KEPT: Continuity = Continuity::Required { snapshot: true };
const LOST: Continuity = Continuity::Required { snapshot: false };
const IDLE: Local = Local::Idle { remembers: true };
const BRANCH: Local = Local::Idle { remembers: false };
const BUSY: Local = Local::Busy {
    remembers: true,
    abandoned: false,
};
const REMOTE: Row = Row::Remote { forwardable: true };
const CLOSED: Row = Row::Remote { forwardable: false };

fn token(local: Local, row: Row, continuity: Continuity) -> Inputs {
    Inputs {
        evidence: Evidence::Token,
        local,
        row,
        continuity,
        ..BASE
    }
}

fn with(evidence: Evidence, row: Row, continuity: Continuity) -> Inputs {
    Inputs {
        evidence,
        row,
        continuity,
        ..BASE
    }
}

fn keyed(key: Key, local: Local, row: Row, continuity: Continuity) -> Inputs {
    Inputs {
        key,
        local,
        row,
        continuity,
        ..BASE
    }
}

#[test]
fn the_decision_table() {
    use Outcome as O;
    use Step as S;
    let reject = S::Reject;
    #[rustfmt::skip]
    let rows: &[(&str, Inputs, O, S)] = &[
        ("D1", with(Evidence::Invalid, Row::Absent, OPTIONAL), O::TokenInvalid, reject(Reject::TokenInvalid)),
        ("D2", with(Evidence::Invalid, REMOTE, KEPT), O::TokenInvalid, reject(Reject::TokenInvalid)),
        ("D3", with(Evidence::UnknownKey, Row::Absent, OPTIONAL), O::FreshStart, S::Claim),
        ("D4", with(Evidence::UnknownKey, Row::Free, KEPT), O::SnapshotRecovery, S::Claim),
        ("D5", with(Evidence::UnknownKey, Row::Absent, LOST), O::ExpiredContinuity, reject(Reject::ExpiredContinuity)),
        ("D6", token(IDLE, Row::Mine, OPTIONAL), O::LiveAliasReuse, S::Reuse),
        ("D6 old", Inputs { evidence: Evidence::Old, ..token(IDLE, Row::Mine, OPTIONAL) }, O::LiveAliasReuse, S::Reuse),
        ("D6 busy", token(BUSY, Row::Mine, OPTIONAL), O::LiveAliasReuse, S::Reuse),
        ("D7", token(IDLE, Row::Mine, KEPT), O::LiveAliasReuse, S::Reuse),
        ("D7 without a snapshot", token(IDLE, Row::Mine, LOST), O::LiveAliasReuse, S::Reuse),
        ("D8", token(BRANCH, Row::Mine, KEPT), O::SnapshotRecovery, S::Rebuild),
        ("D9", token(BRANCH, Row::Mine, LOST), O::PreviousResponseNotFound, reject(Reject::PreviousResponseNotFound)),
        ("D10 remote", token(IDLE, REMOTE, OPTIONAL), O::StaleRecovery, S::Evict),
        ("D10 dead", token(BUSY, Row::Dead, KEPT), O::StaleRecovery, S::Evict),
        ("D10 free", token(BRANCH, Row::Free, LOST), O::StaleRecovery, S::Evict),
        ("D10 none", token(IDLE, Row::Absent, OPTIONAL), O::StaleRecovery, S::Evict),
        ("D11", token(Local::None, Row::Mine, OPTIONAL), O::StaleRecovery, S::Claim),
        ("D12", token(Local::None, Row::Mine, KEPT), O::SnapshotRecovery, S::Claim),
        ("D13", token(Local::None, Row::Mine, LOST), O::ExpiredContinuity, reject(Reject::ExpiredContinuity)),
        ("D14", token(Local::None, REMOTE, OPTIONAL), O::OwnerForward, S::Forward),
        ("D14 kept", token(Local::None, REMOTE, KEPT), O::OwnerForward, S::Forward),
        ("D14 lost", token(Local::None, REMOTE, LOST), O::OwnerForward, S::Forward),
        ("D15", token(Local::None, CLOSED, OPTIONAL), O::StaleRecovery, S::Take),
        ("D15 kept", token(Local::None, CLOSED, KEPT), O::SnapshotRecovery, S::Fork),
        ("D15 lost", token(Local::None, CLOSED, LOST), O::WrongInstance, reject(Reject::WrongInstance)),
        ("D16", Inputs { forwarded: true, ..token(Local::None, REMOTE, OPTIONAL) }, O::WrongInstance, reject(Reject::WrongInstance)),
        ("D22", token(Local::None, Row::Dead, OPTIONAL), O::StaleRecovery, S::Claim),
        ("D22 free", token(Local::None, Row::Free, OPTIONAL), O::StaleRecovery, S::Claim),
        ("D23", token(Local::None, Row::Dead, KEPT), O::SnapshotRecovery, S::Claim),
        ("D23 free", token(Local::None, Row::Free, KEPT), O::SnapshotRecovery, S::Claim),
        ("D24", token(Local::None, Row::Dead, LOST), O::ExpiredContinuity, reject(Reject::ExpiredContinuity)),
        ("D25", token(Local::None, Row::Absent, OPTIONAL), O::StaleRecovery, S::Claim),
        ("D26", token(Local::None, Row::Absent, KEPT), O::SnapshotRecovery, S::Claim),
        ("D26 lost", token(Local::None, Row::Absent, LOST), O::ExpiredContinuity, reject(Reject::ExpiredContinuity)),
        ("D27", with(Evidence::Old, Row::Free, OPTIONAL), O::FreshStart, S::Claim),
        ("D28", with(Evidence::Old, Row::Dead, KEPT), O::SnapshotRecovery, S::Claim),
        ("D28 lost", with(Evidence::Old, Row::Free, LOST), O::ExpiredContinuity, reject(Reject::ExpiredContinuity)),
        ("D29", with(Evidence::Old, REMOTE, OPTIONAL), O::OwnerForward, S::Forward),
        ("D30", keyed(Key::Hard, IDLE, Row::Mine, OPTIONAL), O::LiveAliasReuse, S::Reuse),
        ("D31", keyed(Key::Hard, BUSY, Row::Mine, OPTIONAL), O::Fork, S::Fork),
        (
            "D31 abandoned",
            keyed(Key::Hard, Local::Busy { remembers: true, abandoned: true }, Row::Mine, OPTIONAL),
            O::LiveAliasReuse,
            S::Hurry,
        ),
        ("D32 as D7", keyed(Key::Soft, IDLE, Row::Mine, KEPT), O::LiveAliasReuse, S::Reuse),
        ("D32 as D8", keyed(Key::Hard, BRANCH, Row::Mine, KEPT), O::SnapshotRecovery, S::Rebuild),
        ("D32 as D9", keyed(Key::Hard, BRANCH, Row::Mine, LOST), O::PreviousResponseNotFound, reject(Reject::PreviousResponseNotFound)),
        ("D33", keyed(Key::Hard, Local::None, REMOTE, OPTIONAL), O::OwnerForward, S::Forward),
        ("D33 on a socket", Inputs { socket: true, ..keyed(Key::Hard, Local::None, REMOTE, OPTIONAL) }, O::StaleRecovery, S::Take),
        ("D34", keyed(Key::Soft, Local::None, REMOTE, OPTIONAL), O::Fork, S::Fork),
        ("D35", token(Local::None, REMOTE, KEPT), O::OwnerForward, S::Forward),
        ("D36", keyed(Key::Hard, Local::None, REMOTE, LOST), O::OwnerForward, S::Forward),
        ("D36 soft", keyed(Key::Soft, Local::None, REMOTE, LOST), O::OwnerForward, S::Forward),
        ("D37", keyed(Key::Hard, Local::None, Row::Free, LOST), O::PreviousResponseNotFound, reject(Reject::PreviousResponseNotFound)),
        ("D38", keyed(Key::Hard, Local::None, Row::Dead, OPTIONAL), O::FreshStart, S::Claim),
        ("D38 soft", keyed(Key::Soft, Local::None, Row::Free, OPTIONAL), O::FreshStart, S::Claim),
        ("D38 none", keyed(Key::Hard, Local::None, Row::Absent, OPTIONAL), O::FreshStart, S::Claim),
        ("D39", Inputs { conflict: true, ..token(IDLE, Row::Mine, KEPT) }, O::SnapshotRecovery, S::Fork),
        (
            "D39 lost",
            Inputs { conflict: true, ..token(IDLE, Row::Mine, LOST) },
            O::ContinuityConflict,
            reject(Reject::ContinuityConflict),
        ),
        ("D40", Inputs { key: Key::Hard, ..token(Local::None, Row::Free, OPTIONAL) }, O::StaleRecovery, S::Claim),
        ("D41", keyed(Key::Hard, Local::None, Row::Unknown, OPTIONAL), O::FreshStart, S::Detached),
        ("D42", token(IDLE, Row::Unknown, OPTIONAL), O::FreshStart, S::Detached),
        ("D43", token(Local::None, Row::Unknown, KEPT), O::MetadataUnavailable, reject(Reject::MetadataUnavailable)),
        ("D44", Inputs { draining: true, ..BASE }, O::Draining, reject(Reject::Draining)),
        ("D45", Inputs { draining: true, ..token(Local::None, Row::Free, KEPT) }, O::Draining, reject(Reject::Draining)),
        ("D47 optional", Inputs { full: true, ..keyed(Key::Hard, Local::None, Row::Free, OPTIONAL) }, O::FreshStart, S::Detached),
        ("D47 required", Inputs { full: true, ..token(Local::None, Row::Free, KEPT) }, O::Overloaded, reject(Reject::Overloaded)),
    ];
    for (name, inputs, outcome, step) in rows {
        let resolution = resolve(inputs);
        assert_eq!(
            (resolution.outcome, resolution.step),
            (*outcome, *step),
            "{name}: {inputs:?}"
        );
    }
}

/// D17 to D20 are one row: the fence decides.
#[test]
fn what_a_silent_owner_leaves_open() {
    let optional = token(Local::None, REMOTE, OPTIONAL);
    let kept = token(Local::None, REMOTE, KEPT);
    let lost = token(Local::None, REMOTE, LOST);
    for (inputs, taken, outcome, step) in [
        (optional, None, Outcome::StaleRecovery, Step::Take),
        (optional, Some(false), Outcome::Fork, Step::Fork),
        (kept, None, Outcome::SnapshotRecovery, Step::Take),
        (kept, Some(false), Outcome::SnapshotRecovery, Step::Fork),
        (
            lost,
            None,
            Outcome::OwnerUnreachable,
            Step::Reject(Reject::OwnerUnreachable),
        ),
        (
            lost,
            Some(false),
            Outcome::OwnerUnreachable,
            Step::Reject(Reject::OwnerUnreachable),
        ),
    ] {
        let resolution = owner_silent(&inputs, taken);
        assert_eq!(
            (resolution.outcome, resolution.step),
            (outcome, step),
            "{inputs:?} {taken:?}"
        );
    }
}

/// Everything that can be known.
fn every_input() -> Vec<Inputs> {
    let flags = [false, true];
    let mut all = Vec::new();
    for evidence in [
        Evidence::None,
        Evidence::Token,
        Evidence::Old,
        Evidence::Invalid,
        Evidence::UnknownKey,
    ] {
        for key in [Key::None, Key::Soft, Key::Hard] {
            for local in [
                Local::None,
                IDLE,
                BRANCH,
                BUSY,
                Local::Busy {
                    remembers: false,
                    abandoned: false,
                },
                Local::Busy {
                    remembers: true,
                    abandoned: true,
                },
            ] {
                for row in [
                    Row::Absent,
                    Row::Mine,
                    REMOTE,
                    CLOSED,
                    Row::Dead,
                    Row::Free,
                    Row::Unknown,
                ] {
                    for continuity in [OPTIONAL, KEPT, LOST] {
                        for bits in 0..32_usize {
                            let flag = |bit: usize| flags[bits >> bit & 1];
                            all.push(Inputs {
                                evidence,
                                key,
                                local,
                                row,
                                continuity,
                                conflict: flag(0),
                                draining: flag(1),
                                full: flag(2),
                                forwarded: flag(3),
                                socket: flag(4),
                            });
                        }
                    }
                }
            }
        }
    }
    all
}

#[test]
fn a_forwarded_turn_is_served_or_refused() {
    for inputs in every_input().iter().filter(|inputs| inputs.forwarded) {
        let step = resolve(inputs).step;
        assert!(!matches!(step, Step::Forward | Step::Take), "{inputs:?}");
    }
}

#[test]
fn an_invalid_token_is_told_whatever_else_is_known() {
    let invalid = |inputs: &&Inputs| inputs.evidence == Evidence::Invalid;
    for inputs in every_input().iter().filter(invalid) {
        assert_eq!(resolve(inputs).step, Step::Reject(Reject::TokenInvalid));
    }
}

#[test]
fn a_lost_history_is_never_sent_as_if_it_were_whole() {
    for inputs in every_input()
        .iter()
        .filter(|inputs| inputs.continuity == LOST)
    {
        let step = resolve(inputs).step;
        let remembered = matches!(
            inputs.local,
            Local::Idle { remembers: true }
                | Local::Busy {
                    remembers: true,
                    ..
                }
        );
        let sends = matches!(
            step,
            Step::Claim | Step::Take | Step::Fork | Step::Detached | Step::Rebuild
        );
        assert!(!sends, "{inputs:?}: {step:?}");
        assert!(step != Step::Reuse || remembered, "{inputs:?}");
    }
}

#[test]
fn a_request_that_brings_everything_is_served() {
    for inputs in every_input() {
        let sound = inputs.evidence != Evidence::Invalid && !inputs.conflict && !inputs.draining;
        if !sound || inputs.continuity != OPTIONAL || inputs.forwarded {
            continue;
        }
        let step = resolve(&inputs).step;
        assert!(!matches!(step, Step::Reject(_)), "{inputs:?}: {step:?}");
    }
}

#[test]
fn a_session_is_used_only_under_its_own_lease() {
    for inputs in every_input() {
        let step = resolve(&inputs).step;
        if matches!(step, Step::Reuse | Step::Rebuild | Step::Hurry) {
            assert!(
                inputs.local != Local::None && inputs.row == Row::Mine,
                "{inputs:?}"
            );
        }
    }
}

#[test]
fn a_silent_owner_makes_no_room_where_every_session_is_busy() {
    for inputs in every_input().into_iter().filter(|inputs| inputs.full) {
        for taken in [None, Some(false)] {
            let step = owner_silent(&inputs, taken).step;
            assert!(
                matches!(step, Step::Detached | Step::Reject(_)),
                "{inputs:?}: {step:?}"
            );
        }
    }
}

#[test]
fn every_outcome_and_every_reason_has_plain_words() {
    let decided = every_input();
    let silent = decided
        .iter()
        .flat_map(|inputs| [None, Some(false)].map(|taken| owner_silent(inputs, taken)));
    for resolution in decided.iter().map(resolve).chain(silent) {
        assert!(
            words::outcome(resolution.outcome.as_str()).is_some(),
            "{resolution:?}"
        );
        assert!(words::reason(resolution.reason).is_some(), "{resolution:?}");
    }
    // What the router finds by itself.
    let router = include_str!("../route.rs");
    let reasons = router.split("bridge(Outcome::").skip(1);
    let reasons: Vec<&str> = reasons.filter_map(|call| call.split('"').nth(1)).collect();
    assert!(reasons.len() >= 5, "{reasons:?}");
    for reason in reasons {
        assert!(words::reason(reason).is_some(), "{reason}");
    }
}

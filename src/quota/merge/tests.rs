//! The rules of merging, one row or property each.

use proptest::prelude::*;

use super::*;

const NOW: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(NOW + seconds).unwrap()
}

fn block(blocked_at: i64, until: i64, lifted_at: Option<i64>) -> Block {
    Block {
        blocked_at: at(blocked_at),
        until: NOW + until,
        reason: "usage_limit_reached".into(),
        lifted_at: lifted_at.map(at),
    }
}

fn sample(observed_at: i64, resets_at: Option<i64>, used_percent: f64) -> Sample {
    Sample {
        used_percent,
        resets_at,
        observed_at: at(observed_at),
        source: Source::Header,
    }
}

#[test]
fn of_two_samples_the_one_counts_whose_observation_began_later() {
    for (what, loser, winner) in [
        (
            "a later start wins over a higher use",
            sample(0, Some(9), 90.0),
            sample(1, None, 10.0),
        ),
        (
            "one attempt: use grows",
            sample(0, Some(9), 40.0),
            sample(0, Some(9), 42.0),
        ),
        (
            "one attempt: a reset lies between",
            sample(0, Some(9), 99.0),
            sample(0, Some(900), 1.0),
        ),
    ] {
        assert_eq!(merge_window(loser, winner), winner, "{what}");
        assert_eq!(
            merge_window(winner, loser),
            winner,
            "{what}, the other way round"
        );
    }
}

#[test]
fn a_block_never_shrinks_by_another_refusal() {
    for (what, one, other, merged) in [
        (
            "the later end counts",
            block(0, 900, None),
            block(5, 60, None),
            block(5, 900, None),
        ),
        (
            "one that ended is outlived",
            block(0, 60, None),
            block(100, 160, None),
            block(100, 160, None),
        ),
        (
            "a lift is kept",
            block(0, 900, Some(3)),
            block(0, 900, None),
            block(0, 900, Some(3)),
        ),
        (
            "what was lifted does not count",
            block(0, 900, Some(3)),
            block(5, 60, None),
            block(5, 60, Some(3)),
        ),
        (
            "nor do two that were lifted",
            block(0, 900, None),
            block(2, 60, Some(3)),
            block(2, 900, Some(3)),
        ),
    ] {
        assert_eq!(merge_block(one.clone(), other.clone()), merged, "{what}");
        assert_eq!(
            merge_block(other, one),
            merged,
            "{what}, the other way round"
        );
    }
}

#[test]
fn a_block_is_lifted_by_proof_that_began_after_it() {
    use Source::*;
    let quota = block(10, 900, None);
    let throttle = Block {
        reason: "rate_limit_exceeded".into(),
        ..block(10, 900, None)
    };
    let evidence = |began, source, worst_used| Evidence {
        observed_at: at(began),
        source,
        worst_used,
        credits: false,
        limit_reached: None,
    };
    let with_credits = |began, source| Evidence {
        credits: true,
        ..evidence(began, source, 100.0)
    };
    let reached = |evidence| Evidence {
        limit_reached: Some(true),
        ..evidence
    };
    for (what, block, evidence, expected) in [
        ("a served turn", &quota, evidence(12, Header, 40.0), true),
        ("a running turn", &quota, evidence(12, Event, 40.0), true),
        ("it began before", &quota, evidence(9, Header, 40.0), false),
        (
            "within the clocks' error",
            &quota,
            evidence(11, Header, 40.0),
            false,
        ),
        (
            "a window is full",
            &quota,
            evidence(12, Header, 100.0),
            false,
        ),
        ("credits stand in", &quota, with_credits(12, Header), true),
        (
            "it was refused itself",
            &quota,
            evidence(12, Error, 40.0),
            false,
        ),
        ("quota is reported", &quota, evidence(131, Poll, 40.0), true),
        (
            "credits are reported",
            &quota,
            with_credits(131, Poll),
            true,
        ),
        (
            "but the limit is called reached",
            &quota,
            reached(with_credits(131, Poll)),
            false,
        ),
        (
            "an event calls it reached",
            &quota,
            reached(evidence(12, Event, 40.0)),
            false,
        ),
        (
            "the report may be behind",
            &quota,
            evidence(130, Poll, 40.0),
            false,
        ),
        (
            "no proof for a throttle",
            &throttle,
            evidence(131, Poll, 40.0),
            false,
        ),
        (
            "served in spite of it",
            &throttle,
            evidence(12, Header, 40.0),
            true,
        ),
    ] {
        let lifted = lifts(block, &evidence);
        let began = evidence.observed_at.as_second() - NOW;
        assert_eq!(lifted, expected.then_some(at(began - 1)), "{what}");
        if let Some(lifted_at) = lifted {
            let lift = Block {
                lifted_at: Some(lifted_at),
                ..block.clone()
            };
            assert!(!merge_block(lift, block.clone()).stands(), "{what}");
        }
    }
}

#[test]
fn a_deadline_of_upstream_is_exact_and_only_a_guess_has_jitter_upwards() {
    let year_2446 = 15_023_672_358;
    for (what, named, jitter, expected) in [
        ("to the second", Some(NOW + 77), 0.9, 77),
        ("within a year", Some(NOW + HORIZON), 0.0, HORIZON),
        ("too far away", Some(NOW + HORIZON + 1), 0.0, 60),
        ("milliseconds, or a typing error", Some(year_2446), 0.0, 60),
        ("overflow", Some(i64::MAX), 0.0, 60),
        ("already past", Some(NOW), 0.0, 60),
        ("not named", None, 0.0, 60),
        ("jitter", None, 0.5, 66),
    ] {
        assert_eq!(block_until(named, at(0), jitter) - NOW, expected, "{what}");
    }
    let between = Timestamp::from_millisecond(NOW * 1_000 + 100).unwrap();
    assert_eq!(
        block_until(None, between, 0.0),
        NOW + 61,
        "never less than a minute"
    );
}

proptest! {
    #[test]
    fn any_order_of_the_same_samples_gives_the_same_state(
        parts in proptest::collection::vec((0_i64..4, proptest::option::of(0_i64..3), 0_u8..4), 1..6),
        order in any::<proptest::sample::Index>(),
    ) {
        let samples: Vec<Sample> = parts.iter().map(|(began, reset, used)| sample(*began, *reset, f64::from(*used))).collect();
        let merged = |order: &[Sample]| order.iter().copied().reduce(merge_window);
        let mut other = samples.clone();
        other.rotate_left(order.index(samples.len()));
        prop_assert_eq!(merged(&samples), merged(&other));
        other.reverse();
        prop_assert_eq!(merged(&samples), merged(&other));
    }

    #[test]
    fn any_order_of_the_same_refusals_gives_the_same_block_and_none_shrinks_it(
        parts in proptest::collection::vec((0_i64..4, 0_i64..4), 1..6),
        order in any::<proptest::sample::Index>(),
    ) {
        let blocks: Vec<Block> = parts.iter().map(|(at, until)| block(*at, *until, None)).collect();
        let merged = |order: &[Block]| order.iter().cloned().reduce(merge_block);
        let mut other = blocks.clone();
        other.rotate_left(order.index(blocks.len()));
        prop_assert_eq!(merged(&blocks), merged(&other));
        let until = merged(&blocks).map(|block| block.until);
        prop_assert_eq!(until, blocks.iter().map(|block| block.until).max());
    }

    #[test]
    fn two_states_of_a_block_merge_alike_from_either_side(
        one in (0_i64..4, 0_i64..4, proptest::option::of(0_i64..5)),
        other in (0_i64..4, 0_i64..4, proptest::option::of(0_i64..5)),
    ) {
        let (one, other) = (block(one.0, one.1, one.2), block(other.0, other.1, other.2));
        let merged = merge_block(one.clone(), other.clone());
        prop_assert_eq!(&merged, &merge_block(other, one.clone()));
        prop_assert_eq!(&merged, &merge_block(merged.clone(), one), "a repeated write changes nothing");
    }
}

//! The strategies, the cap and fairness.

use rand::{Rng as _, RngExt as _, SeedableRng as _, rngs::StdRng};

use super::*;
use crate::{protocol::limits::Credits, routing::Points};

/// The accounts in the order in which turns that begin and end at once go to them.
fn sequence(accounts: Vec<Account>, strategy: Strategy, turns: usize) -> Vec<usize> {
    let view = View { accounts };
    let points = Points::new(7);
    let turn = |_| {
        let (number, point) = points.take();
        let ask = Ask {
            point,
            ..by(strategy)
        };
        let Decision::Use(choice) = select(&view, &ask) else {
            panic!("there are accounts");
        };
        assert!(choice.explanation.to_string().contains(strategy.as_str()));
        let load = &view.account(choice.account).unwrap().load;
        load.enter(number, None);
        load.leave();
        usize::try_from(choice.account.0.as_u128()).unwrap()
    };
    (0..turns).map(turn).collect()
}

#[test]
fn strategy_formulas_against_a_fixed_vector_set() {
    use Strategy::*;
    let ends = |number, used, hours: i64| {
        with(account(number, used), |account| {
            account.windows[0].resets_at = Some(NOW + hours * 3_600);
            account.windows.push(window("codex", 300, 1.0));
        })
    };
    let pool = || {
        vec![
            planned(ends(1, 50.0, 100), "pro"),
            ends(2, 20.0, 30),
            ends(3, 100.0, 2),
            penalised(ends(4, 0.0, 1)),
            with(account(5, 0.0), |account| account.windows.clear()),
        ]
    };
    for (what, strategy, pool, expected) in [
        // 3.335 of a pro account, 0.8 of a plus one, 0.5 of one that nobody knows.
        (
            "shares of what is left",
            Capacity,
            pool(),
            vec![1, 1, 2, 1, 1, 1, 1, 5, 1, 1],
        ),
        (
            "the next to lose",
            SoonestReset,
            pool().drain(..4).collect(),
            vec![2; 4],
        ),
        (
            "resets within an hour are one",
            SoonestReset,
            vec![
                ends(1, 0.0, 30),
                ends(2, 0.0, 30),
                ends(3, 0.0, 31),
                account(4, 100.0),
            ],
            vec![2, 1, 2, 1, 1, 2, 1, 2],
        ),
        (
            "also around a full hour",
            SoonestReset,
            vec![
                with(ends(1, 0.0, 30), |account| {
                    account.windows[0].resets_at = Some(NOW + 30 * 3_600 - 1);
                }),
                ends(2, 0.0, 30),
            ],
            vec![2, 1, 2, 1],
        ),
        (
            "without a running window last",
            SoonestReset,
            vec![
                with(account(1, 0.0), |account| {
                    account.windows[0].resets_at = Some(NOW);
                }),
                ends(2, 90.0, 160),
            ],
            vec![2; 3],
        ),
        (
            "one that nobody knows is made known",
            SoonestReset,
            vec![
                with(account(1, 0.0), |account| account.windows.clear()),
                ends(2, 50.0, 160),
                ends(3, 50.0, 170),
            ],
            vec![2, 1, 2, 1],
        ),
        (
            "in turns, whatever the size",
            RoundRobin,
            pool(),
            vec![2, 1, 5, 2, 1, 5, 2, 1, 5],
        ),
        (
            "credits before nothing",
            RoundRobin,
            vec![
                account(1, 100.0),
                with(account(2, 100.0), |account| {
                    account.credits = Some(Credits {
                        has_credits: true,
                        ..Credits::default()
                    });
                }),
            ],
            vec![2; 3],
        ),
    ] {
        let chosen = sequence(pool, strategy, expected.len());
        assert_eq!(chosen, expected, "{what}");
    }
}

#[test]
fn all_over_budget_still_serves() {
    for strategy in Strategy::ALL {
        let pool = vec![account(1, 100.0), account(2, 130.0)];
        let decision = decide(pool, &by(strategy));
        assert!(matches!(decision, Decision::Use(_)), "{strategy}");
    }
}

#[test]
fn a_single_account_that_failed_serves_and_of_two_the_one_that_is_over_soonest() {
    let twice = |number| {
        with(penalised(account(number, 0.0)), |account| {
            account.load.penalty.strike(NOW + 30);
        })
    };
    for strategy in Strategy::ALL {
        let ask = Ask {
            now: NOW + 31,
            ..by(strategy)
        };
        let late = || {
            with(account(2, 90.0), |account| {
                account.load.penalty.strike(NOW + 31);
            })
        };
        for (pool, expected) in [(vec![twice(1)], 1), (vec![twice(1), late()], 2)] {
            let Decision::Use(choice) = decide(pool, &ask) else {
                panic!("nobody");
            };
            assert_eq!(choice.account, id(expected), "{strategy}");
        }
    }
}

#[test]
fn an_account_that_failed_gets_turns_again_while_healthy_ones_exist() {
    let ask = Ask {
        now: NOW + 30,
        ..by(Strategy::RoundRobin)
    };
    let healthy = busy(account(2, 0.0), 1);
    let Decision::Use(choice) = decide(vec![penalised(account(1, 0.0)), healthy], &ask) else {
        panic!("nobody");
    };
    assert_eq!(choice.account, id(1));
}

#[test]
fn pinned_over_budget_and_the_pool_also_over_stays_and_a_better_pool_moves_it_once() {
    let decided = |sticky, pool| {
        let ask = Ask {
            sticky: Some(id(sticky)),
            ..ASK
        };
        match decide(pool, &ask) {
            Decision::Use(choice) => (choice.sticky, choice.account),
            other => panic!("{other:?}"),
        }
    };
    let (full, better) = (|| account(1, 99.0), || account(2, 30.0));
    let also_over = decided(1, vec![full(), account(2, 97.0)]);
    assert_eq!(also_over, (Sticky::Kept, id(1)));
    let moved = decided(1, vec![full(), better()]);
    assert_eq!(moved, (Sticky::Moved, id(2)));
    let there = decided(2, vec![full(), better()]);
    assert_eq!(there, (Sticky::Kept, id(2)), "it does not move back");
}

#[test]
fn a_full_account_is_passed_over_until_a_turn_ends_there() {
    let capped = Ask {
        policy: Policy {
            turns_per_account: Some(2),
            ..ASK.policy
        },
        ..ASK
    };
    let mine = Ask {
        sticky: Some(id(1)),
        ..capped
    };
    let pool = || vec![busy(account(1, 0.0), 2), account(2, 90.0)];
    for (ask, sticky) in [(capped, Sticky::New), (mine, Sticky::Detour)] {
        let Decision::Use(choice) = decide(pool(), &ask) else {
            panic!("one has room");
        };
        assert_eq!((choice.account, choice.sticky), (id(2), sticky));
        assert_eq!(choice.explanation.excluded.count(Exclusion::Busy), 1);
    }
    let full = busy(account(1, 0.0), 2);
    let one_limited = vec![full.clone(), blocked(account(2, 0.0), 60)];
    let decision = decide(one_limited, &capped);
    assert!(matches!(decision, Decision::Busy { .. }), "{decision:?}");
    full.load.leave();
    assert!(matches!(decide(vec![full], &mine), Decision::Use(_)));
}

/// Draws pools, and 10,000 turns of each: no share is off by more than 5 % of itself.
#[test]
fn capacity_weighting_is_fair_within_5_percent_over_10_000_turns() {
    let seed = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let plans = ["free", "plus", "prolite", "pro"];
    for _ in 0..20 {
        let pool: Vec<Account> = (0..rng.random_range(2..=12))
            .map(|number| {
                let used = rng.random_range(0.0..90.0);
                let plan = plans[rng.random_range(0..plans.len())];
                planned(account(number, used), plan)
            })
            .collect();
        let left =
            |account: &Account| account.weight * (1.0 - account.windows[0].used_percent / 100.0);
        let total: f64 = pool.iter().map(left).sum();
        let view = View { accounts: pool };
        let points = Points::new(rng.next_u64());
        let mut turns: BTreeMap<AccountId, u32> = BTreeMap::new();
        for _ in 0..10_000 {
            let (_, point) = points.take();
            let Decision::Use(choice) = select(&view, &Ask { point, ..ASK }) else {
                panic!("there are accounts");
            };
            *turns.entry(choice.account).or_default() += 1;
        }
        for account in &view.accounts {
            let expected = left(account) / total * 10_000.0;
            let got = f64::from(turns.get(&account.id).copied().unwrap_or_default());
            // A share of a few turns cannot be met to 5 %: there a handful counts.
            let most = (0.05 * expected).max(8.0);
            assert!(
                (got - expected).abs() <= most,
                "{got} turns instead of {expected:.0} ({seed})"
            );
        }
    }
}

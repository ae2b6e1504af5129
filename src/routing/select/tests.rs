//! Selection as tables and as a property.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::AtomicU32},
};

use proptest::prelude::*;
use rand::{SeedableRng as _, rngs::StdRng};
use uuid::Uuid;

use super::*;
use crate::routing::{Block, Lifecycle, Window};

const NOW: i64 = 1_800_000_000;
const MINUTE: i64 = 60;

fn id(number: usize) -> AccountId {
    AccountId(Uuid::from_u128(number as u128))
}

/// An active `plus` account with this much of its weekly window used.
fn account(number: usize, used_percent: f64) -> Account {
    Account {
        id: id(number),
        lifecycle: Lifecycle::Active,
        plan: "plus".into(),
        windows: vec![window("codex", 10_080, used_percent)],
        blocks: Vec::new(),
        models: None,
        in_flight: Arc::new(AtomicU32::new(0)),
        penalty: Arc::default(),
    }
}

fn window(family: &str, minutes: u32, used_percent: f64) -> Window {
    Window {
        family: family.into(),
        minutes,
        used_percent,
        resets_at: Some(NOW + 3_600),
        observed_at: NOW - 10,
    }
}

fn blocked(mut account: Account, seconds: i64) -> Account {
    account.blocks.push(Block {
        family: "codex".into(),
        until: NOW + seconds,
        reason: "usage_limit_reached".into(),
    });
    account
}

fn penalised(account: Account) -> Account {
    account.penalty.strike(NOW);
    account
}

fn with(mut account: Account, change: impl FnOnce(&mut Account)) -> Account {
    change(&mut account);
    account
}

fn listing(account: Account, models: &[&str]) -> Account {
    with(account, |account| {
        account.models = Some(Arc::new(
            models.iter().map(|&model| model.to_owned()).collect(),
        ));
    })
}

const ASK: Ask<'static> = Ask {
    now: NOW,
    model: "gpt-5.3-codex",
    family: "codex",
    sticky: None,
    tried: &[],
    allowed: None,
    anchored: false,
};

fn decide(accounts: Vec<Account>, ask: &Ask<'_>) -> Decision {
    select(&View { accounts }, ask, &mut StdRng::seed_from_u64(7))
}

/// How often each account is drawn in 10,000 turns.
fn shares(accounts: Vec<Account>) -> BTreeMap<AccountId, f64> {
    let view = View { accounts };
    let mut rng = StdRng::seed_from_u64(7);
    let mut shares = BTreeMap::new();
    for _ in 0..10_000 {
        let Decision::Use(choice) = select(&view, &ASK, &mut rng) else {
            panic!("there are accounts");
        };
        *shares.entry(choice.account).or_default() += 1.0 / 10_000.0;
    }
    shares
}

#[test]
fn turns_are_spread_by_what_is_left_and_by_what_runs() {
    let pro = with(account(2, 40.0), |account| account.plan = "pro".into());
    let busy = with(account(2, 40.0), |account| {
        account.in_flight = Arc::new(AtomicU32::new(3))
    });
    let unknown = with(account(2, 0.0), |account| account.windows.clear());
    let scarce = with(account(2, 40.0), |account| {
        account.windows.push(window("codex", 300, 80.0))
    });
    let other_family = with(account(2, 40.0), |account| {
        account.windows.push(window("codex_bengalfox", 300, 99.0))
    });
    let reset = with(account(2, 99.0), |account| {
        account.windows[0].resets_at = Some(NOW)
    });
    // What account 1, 40 % used, gets beside another.
    for (what, other, expected) in [
        ("equal", account(2, 40.0), 0.5),
        ("half as much left", account(2, 70.0), 2.0 / 3.0),
        ("a larger plan", pro, 1.0 / 7.67),
        ("three turns in flight", busy, 0.8),
        ("use unknown: as if half were left", unknown, 6.0 / 11.0),
        ("the scarcer window counts", scarce, 0.75),
        ("another family's window does not", other_family, 0.5),
        ("a window whose reset has passed is unused", reset, 0.375),
        ("a full one is the last choice", account(2, 100.0), 1.0),
        (
            "one that failed is not chosen",
            penalised(account(2, 0.0)),
            1.0,
        ),
    ] {
        let share = shares(vec![account(1, 40.0), other])[&id(1)];
        assert!(
            (share - expected).abs() < 0.05 * expected,
            "{what}: {share} instead of {expected}"
        );
    }
}

#[test]
fn full_accounts_still_serve_and_share_by_size() {
    let pro = with(account(2, 105.0), |account| account.plan = "pro".into());
    let shares = shares(vec![account(1, 100.0), pro]);
    assert!((shares[&id(2)] - 0.87).abs() < 0.05, "{shares:?}");
}

#[test]
fn a_conversation_keeps_its_account_unless_another_is_clearly_better() {
    use Sticky::*;
    let pro = |used| with(account(2, used), |account| account.plan = "pro".into());
    let paused = with(account(1, 0.0), |account| {
        account.lifecycle = Lifecycle::Paused
    });
    let gone = account(3, 0.0);
    let without_model = listing(account(1, 0.0), &["gpt-4"]);
    // The preferred account 1, and account 2 beside it.
    let cases = [
        ("it serves", account(1, 60.0), account(2, 0.0), Kept, 1),
        (
            "nearly used is not yet over",
            account(1, 95.0),
            account(2, 0.0),
            Kept,
            1,
        ),
        (
            "over, and another has much more",
            account(1, 96.0),
            account(2, 10.0),
            Moved,
            2,
        ),
        (
            "over, and the other is over too",
            account(1, 99.0),
            account(2, 96.0),
            Kept,
            1,
        ),
        (
            "both are full",
            account(1, 100.0),
            account(2, 100.0),
            Kept,
            1,
        ),
        (
            "over, but the other has hardly more",
            with(account(1, 96.0), |a| a.plan = "pro".into()),
            account(2, 60.0),
            Kept,
            1,
        ),
        (
            "over, and the other is large",
            account(1, 96.0),
            pro(90.0),
            Moved,
            2,
        ),
        (
            "blocked for a minute",
            blocked(account(1, 40.0), MINUTE),
            account(2, 0.0),
            Detour,
            2,
        ),
        (
            "blocked for an hour",
            blocked(account(1, 40.0), 60 * MINUTE),
            account(2, 0.0),
            Detour,
            2,
        ),
        (
            "blocked for longer",
            blocked(account(1, 40.0), 60 * MINUTE + 1),
            account(2, 0.0),
            Moved,
            2,
        ),
        (
            "the block has passed",
            blocked(account(1, 40.0), 0),
            account(2, 0.0),
            Kept,
            1,
        ),
        ("paused", paused, account(2, 0.0), Moved, 2),
        (
            "gone",
            gone,
            listing(account(2, 0.0), &[ASK.model]),
            Moved,
            2,
        ),
        (
            "it lacks the model",
            without_model,
            listing(account(2, 0.0), &[ASK.model]),
            Moved,
            2,
        ),
    ];
    for (what, preferred, other, sticky, number) in cases {
        let ask = Ask {
            sticky: Some(id(1)),
            allowed: Some(&[id(1), id(2)]),
            ..ASK
        };
        let Decision::Use(choice) = decide(vec![preferred, other], &ask) else {
            panic!("{what}: nobody");
        };
        assert_eq!(
            (choice.sticky, choice.account),
            (sticky, id(number)),
            "{what}"
        );
    }
}

#[test]
fn an_account_that_failed_serves_where_no_other_can_and_its_conversations_return() {
    use Sticky::*;
    let (failed, full, other) = (
        || penalised(account(1, 0.0)),
        || account(2, 100.0),
        || account(2, 50.0),
    );
    let mine = Ask {
        sticky: Some(id(1)),
        ..ASK
    };
    let anchored = Ask {
        anchored: true,
        ..mine
    };
    let later = Ask {
        now: NOW + 30,
        ..mine
    };
    for (what, pool, ask, sticky, number) in [
        (
            "a full one comes first",
            vec![failed(), full()],
            ASK,
            New,
            2,
        ),
        ("alone it serves", vec![failed()], ASK, New, 1),
        ("alone it is kept", vec![failed()], mine, Kept, 1),
        ("detoured", vec![failed(), other()], mine, Detour, 2),
        (
            "both failed",
            vec![failed(), penalised(other())],
            mine,
            Kept,
            1,
        ),
        (
            "its socket remembers",
            vec![failed(), other()],
            anchored,
            Kept,
            1,
        ),
        (
            "the penalty has passed",
            vec![failed(), other()],
            later,
            Kept,
            1,
        ),
    ] {
        let Decision::Use(choice) = decide(pool, &ask) else {
            panic!("{what}: nobody");
        };
        assert_eq!(
            (choice.sticky, choice.account),
            (sticky, id(number)),
            "{what}"
        );
    }
}

#[test]
fn a_failed_try_detours_and_a_withdrawn_grant_moves() {
    let pool = || vec![account(1, 0.0), account(2, 0.0)];
    let ask = Ask {
        sticky: Some(id(1)),
        ..ASK
    };
    for (ask, sticky) in [
        (
            Ask {
                tried: &[id(1)],
                ..ask
            },
            Sticky::Detour,
        ),
        (
            Ask {
                allowed: Some(&[id(2)]),
                ..ask
            },
            Sticky::Moved,
        ),
        (
            Ask {
                sticky: None,
                tried: &[id(1)],
                ..ask
            },
            Sticky::New,
        ),
    ] {
        let Decision::Use(choice) = decide(pool(), &ask) else {
            panic!("{ask:?}: nobody");
        };
        assert_eq!((choice.sticky, choice.account), (sticky, id(2)), "{ask:?}");
    }
}

#[test]
fn without_an_account_the_decision_says_whether_waiting_helps() {
    let paused = |number| {
        with(account(number, 0.0), |account| {
            account.lifecycle = Lifecycle::Paused
        })
    };
    let limited = |number, seconds| blocked(account(number, 0.0), seconds);
    // The pool, what was tried, and the earliest reset if waiting helps.
    let one = [id(1)];
    let cases: [(_, _, &[AccountId], _); 6] = [
        ("no account", vec![], &[], None),
        ("all set aside", vec![paused(1), paused(2)], &[], None),
        (
            "all blocked",
            vec![limited(1, 900), limited(2, 60)],
            &[],
            Some(60),
        ),
        (
            "one set aside, one blocked",
            vec![paused(1), limited(2, 60)],
            &[],
            Some(60),
        ),
        (
            "blocked by this very turn",
            vec![limited(1, 60)],
            &one,
            Some(60),
        ),
        (
            "one failed, one blocked",
            vec![account(1, 0.0), limited(2, 60)],
            &one,
            None,
        ),
    ];
    for (what, accounts, tried, expected) in cases {
        let resets_at = match decide(accounts, &Ask { tried, ..ASK }) {
            Decision::Use(choice) => panic!("{what}: {choice:?}"),
            Decision::Exhausted { resets_at, .. } => Some(resets_at - NOW),
            Decision::Nobody { .. } => None,
        };
        assert_eq!(resets_at, expected, "{what}");
    }
}

#[test]
fn a_block_holds_for_its_own_family_alone() {
    let pool = || vec![blocked(account(1, 0.0), 60)];
    assert!(matches!(decide(pool(), &ASK), Decision::Exhausted { .. }));
    let spark = Ask {
        family: "codex_bengalfox",
        ..ASK
    };
    assert!(matches!(decide(pool(), &spark), Decision::Use(_)));
}

#[test]
fn a_catalogue_excludes_only_where_another_has_the_model() {
    let (has, lacks, unknown) = (
        || listing(account(1, 0.0), &[ASK.model]),
        || listing(account(2, 0.0), &["gpt-4"]),
        || account(3, 0.0),
    );
    for (what, pool, eligible) in [
        ("one has it, one does not", vec![has(), lacks()], 1),
        (
            "a missing catalogue excludes nobody",
            vec![has(), lacks(), unknown()],
            2,
        ),
        (
            "a model in no catalogue is upstream's to refuse",
            vec![lacks(), unknown()],
            2,
        ),
    ] {
        let Decision::Use(choice) = decide(pool, &ASK) else {
            panic!("{what}: nobody");
        };
        assert_eq!(choice.explanation.eligible, eligible, "{what}");
    }
}

#[test]
fn an_explanation_reads_well_as_json_and_as_text() {
    let pool = vec![
        with(account(1, 37.0), |account| {
            account.in_flight = Arc::new(AtomicU32::new(2))
        }),
        with(account(2, 0.0), |account| {
            account.lifecycle = Lifecycle::Paused
        }),
        blocked(account(3, 0.0), 60),
        account(4, 0.0),
        penalised(account(5, 0.0)),
    ];
    let ask = Ask {
        sticky: Some(id(1)),
        allowed: Some(&[id(1), id(2), id(3), id(5)]),
        ..ASK
    };
    let Decision::Use(choice) = decide(pool, &ask) else {
        panic!("there is one");
    };
    assert_eq!(
        serde_json::to_value(&choice.explanation).unwrap(),
        serde_json::json!({
            "considered": 5,
            "eligible": 2,
            "penalised": 1,
            "excluded": {"not_granted": 1, "paused": 1, "blocked": 1},
            "named": [[id(2), "paused"], [id(3), "blocked"]],
            "chosen": {"account": id(1), "used_percent": 37.0, "capacity": 0.63, "in_flight": 2, "sticky": "kept"},
        })
    );
    assert_eq!(
        choice.explanation.to_string(),
        format!(
            "2 of 5 accounts eligible (1 not_granted, 1 paused, 1 blocked), 1 of them penalised; chose {} with capacity 0.63, 37 % used, 2 in flight, sticky kept",
            id(1)
        )
    );
}

fn any_account() -> impl Strategy<Value = (Account, bool, bool)> {
    let lifecycle = prop_oneof![
        4 => Just(Lifecycle::Active),
        1 => Just(Lifecycle::Paused),
        1 => Just(Lifecycle::ReauthRequired),
        1 => Just(Lifecycle::Deactivated),
    ];
    let block = proptest::option::weighted(0.4, (-100_i64..100, any::<bool>()));
    let models = proptest::option::of(any::<bool>());
    (
        lifecycle,
        block,
        models,
        0.0..120.0,
        0_u32..9,
        any::<(bool, bool, bool)>(),
    )
        .prop_map(
            |(lifecycle, block, has_model, used, in_flight, (tried, allowed, failed))| {
                let mut made = with(account(0, used), |account| {
                    account.lifecycle = lifecycle;
                    account.in_flight = Arc::new(AtomicU32::new(in_flight));
                });
                if let Some((seconds, own_family)) = block {
                    made = blocked(made, seconds);
                    if !own_family {
                        made.blocks[0].family = "codex_bengalfox".into();
                    }
                }
                if let Some(has_model) = has_model {
                    made = listing(made, if has_model { &[ASK.model] } else { &["gpt-4"] });
                }
                if failed {
                    made = penalised(made);
                }
                (made, tried, allowed)
            },
        )
}

proptest! {
    #[test]
    fn only_an_account_that_may_serve_is_chosen_and_always_one_if_there_is(
        made in proptest::collection::vec(any_account(), 0..8),
        sticky in proptest::option::of(0_usize..10),
        seed: u64,
    ) {
        let (mut accounts, mut tried, mut allowed) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (mut account, was_tried, is_allowed)) in made.into_iter().enumerate() {
            account.id = id(number);
            tried.extend(was_tried.then_some(account.id));
            allowed.extend(is_allowed.then_some(account.id));
            accounts.push(account);
        }
        let has = |account: &Account| account.models.as_ref().map(|models| models.contains(ASK.model));
        let listed = accounts.iter().any(|account| has(account) == Some(true));
        let may_serve = |account: &Account| {
            account.lifecycle == Lifecycle::Active
                && !account.blocks.iter().any(|block| block.family == "codex" && block.until > NOW)
                && !(listed && has(account) == Some(false))
                && allowed.contains(&account.id)
                && !tried.contains(&account.id)
        };
        let expected: Vec<AccountId> = accounts.iter().filter(|account| may_serve(account)).map(|account| account.id).collect();
        let ask = Ask { sticky: sticky.map(id), tried: &tried, allowed: Some(&allowed), ..ASK };
        let view = View { accounts };
        let decision = select(&view, &ask, &mut StdRng::seed_from_u64(seed));
        prop_assert_eq!(&decision, &select(&view, &ask, &mut StdRng::seed_from_u64(seed)), "a seed decides");
        match decision {
            Decision::Use(choice) => {
                prop_assert!(expected.contains(&choice.account));
                prop_assert_eq!(choice.explanation.eligible as usize, expected.len());
                prop_assert_eq!(choice.sticky == Sticky::Kept, ask.sticky == Some(choice.account));
                let excluded: u32 = choice.explanation.excluded.iter().map(|(_, count)| count).sum();
                prop_assert_eq!(choice.explanation.eligible + excluded, choice.explanation.considered);
            }
            Decision::Exhausted { resets_at, .. } => {
                prop_assert!(expected.is_empty());
                prop_assert!(resets_at > NOW);
            }
            Decision::Nobody { .. } => prop_assert!(expected.is_empty()),
        }
    }
}

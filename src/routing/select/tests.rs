//! Selection as tables and as a property.

use std::{collections::BTreeMap, sync::Arc};

use uuid::Uuid;

use super::*;
use crate::routing::{Block, Lifecycle, Points, Window, plan_weight};

mod random;
mod strategies;

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
        weight: 1.0,
        windows: vec![window("codex", 10_080, used_percent)],
        blocks: Vec::new(),
        credits: None,
        models: None,
        load: Arc::default(),
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
    account.load.penalty.strike(NOW);
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
    policy: Policy {
        strategy: Strategy::Capacity,
        turns_per_account: None,
    },
    point: 0.5,
};

/// Of a plan.
fn planned(account: Account, plan: &str) -> Account {
    with(account, |account| {
        account.plan = plan.into();
        account.weight = plan_weight(plan);
    })
}

/// With so many turns in flight.
fn busy(account: Account, turns: u32) -> Account {
    (1..=turns).for_each(|turn| assert!(account.load.enter(turn.into(), None)));
    account
}

fn decide(accounts: Vec<Account>, ask: &Ask<'_>) -> Decision {
    select(&View { accounts }, ask)
}

fn by(strategy: Strategy) -> Ask<'static> {
    Ask {
        policy: Policy {
            strategy,
            turns_per_account: None,
        },
        ..ASK
    }
}

/// How often each account is drawn in 10,000 turns.
fn shares(accounts: Vec<Account>) -> BTreeMap<AccountId, f64> {
    let view = View { accounts };
    let points = Points::new(7);
    let mut shares = BTreeMap::new();
    for _ in 0..10_000 {
        let (_, point) = points.take();
        let Decision::Use(choice) = select(&view, &Ask { point, ..ASK }) else {
            panic!("there are accounts");
        };
        *shares.entry(choice.account).or_default() += 1.0 / 10_000.0;
    }
    shares
}

#[test]
fn what_accounts_list_that_cannot_serve_the_caller_excludes_nobody() {
    let hides = || listing(account(1, 0.0), &["gpt-5"]);
    let lists = || listing(account(2, 0.0), &[ASK.model]);
    let own = [id(1)];
    let granted = Ask {
        allowed: Some(&own),
        ..ASK
    };
    let deactivated = with(lists(), |account| {
        account.lifecycle = Lifecycle::Deactivated;
    });
    for (what, other, ask) in [
        ("deactivated", deactivated, ASK),
        ("not granted", lists(), granted),
    ] {
        let Decision::Use(choice) = decide(vec![hides(), other], &ask) else {
            panic!("{what}: nobody");
        };
        assert_eq!(choice.account, id(1), "{what}");
    }
    let blocked = blocked(lists(), 60);
    let decision = decide(vec![hides(), blocked], &ASK);
    assert!(
        matches!(decision, Decision::Exhausted { .. }),
        "a blocked one will serve again: {decision:?}"
    );
}

#[test]
fn turns_are_spread_by_what_is_left_and_by_what_runs() {
    let pro = planned(account(2, 40.0), "pro");
    let busy = busy(account(2, 40.0), 3);
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
    let pro = planned(account(2, 105.0), "pro");
    let shares = shares(vec![account(1, 100.0), pro]);
    assert!((shares[&id(2)] - 0.87).abs() < 0.05, "{shares:?}");
}

#[test]
fn a_conversation_keeps_its_account_unless_another_is_clearly_better() {
    use Sticky::*;
    let pro = |used| planned(account(2, used), "pro");
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
            planned(account(1, 96.0), "pro"),
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
            Decision::Busy { .. } | Decision::Nobody { .. } => None,
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
        busy(account(1, 37.0), 2),
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
            "strategy": "capacity",
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
            "2 of 5 accounts eligible (1 not_granted, 1 paused, 1 blocked), 1 of them penalised; chose {} by capacity with capacity 0.63, 37 % used, 2 in flight, sticky kept",
            id(1)
        )
    );
}

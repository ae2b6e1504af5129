//! Any pool.

use proptest::{
    prelude::{Just, any, prop_assert, prop_assert_eq, prop_oneof, proptest},
    strategy::Strategy as _,
};

use super::*;

fn any_account() -> impl proptest::strategy::Strategy<Value = (Account, bool, bool)> {
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
                });
                made = busy(made, in_flight);
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
    fn never_picks_paused_reauth_blocked_or_out_of_scope_and_always_one_if_there_is(
        made in proptest::collection::vec(any_account(), 0..8),
        sticky in proptest::option::of(0_usize..10),
        strategy in proptest::sample::select(Strategy::ALL.to_vec()),
        cap in proptest::option::of(1_u32..9),
        point in 0.0..1.0,
    ) {
        let (mut accounts, mut tried, mut allowed) = (Vec::new(), Vec::new(), Vec::new());
        for (number, (mut account, was_tried, is_allowed)) in made.into_iter().enumerate() {
            account.id = id(number);
            tried.extend(was_tried.then_some(account.id));
            allowed.extend(is_allowed.then_some(account.id));
            accounts.push(account);
        }
        let has = |account: &Account| account.models.as_ref().map(|models| models.contains(ASK.model));
        let counts = |account: &&Account| account.lifecycle == Lifecycle::Active && allowed.contains(&account.id);
        let listed = accounts.iter().filter(counts).any(|account| has(account) == Some(true));
        let may_serve = |account: &Account| {
            account.lifecycle == Lifecycle::Active
                && !account.blocks.iter().any(|block| block.family == "codex" && block.until > NOW)
                && !(listed && has(account) == Some(false))
                && allowed.contains(&account.id)
                && !tried.contains(&account.id)
                && cap.is_none_or(|cap| account.load.in_flight() < cap)
        };
        let expected: Vec<AccountId> = accounts.iter().filter(|account| may_serve(account)).map(|account| account.id).collect();
        let policy = Policy { strategy, turns_per_account: cap };
        let ask = Ask { sticky: sticky.map(id), tried: &tried, allowed: Some(&allowed), policy, point, ..ASK };
        let view = View { accounts };
        let decision = select(&view, &ask);
        prop_assert_eq!(&decision, &select(&view, &ask), "the point decides");
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
            Decision::Busy { .. } | Decision::Nobody { .. } => prop_assert!(expected.is_empty()),
        }
    }
}

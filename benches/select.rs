//! What the choice of an account costs among 200: `cargo bench --bench select`.
#![expect(clippy::print_stdout, reason = "a measurement talks to people")]

use std::{collections::BTreeSet, hint::black_box, sync::Arc, time::Instant};

use drawbridge::{
    ids::AccountId,
    routing::{
        Account, Ask, Block, Decision, Lifecycle, Points, Policy, Strategy, View, Window,
        plan_weight, select,
    },
};

const ACCOUNTS: u32 = 200;
const TURNS: u32 = 100_000;
const NOW: i64 = 1_800_000_000;

fn main() {
    let view = pool();
    for strategy in Strategy::ALL {
        let points = Points::new(7);
        let policy = Policy {
            strategy,
            turns_per_account: Some(1_000),
        };
        let mut took: Vec<u64> = (0..TURNS)
            .map(|_| {
                let (number, point) = points.take();
                let ask = Ask {
                    now: NOW,
                    model: "gpt-5.5",
                    family: "codex",
                    sticky: None,
                    tried: &[],
                    allowed: None,
                    anchored: false,
                    policy,
                    point,
                };
                let began = Instant::now();
                let decision = black_box(select(black_box(&view), &ask));
                let took = began.elapsed();
                if let Decision::Use(choice) = decision
                    && let Some(account) = view.account(choice.account)
                {
                    account.load.enter(number, None);
                    account.load.leave();
                }
                u64::try_from(took.as_nanos()).unwrap_or(u64::MAX)
            })
            .collect();
        took.sort_unstable();
        let at = |share: f64| took[(f64::from(TURNS) * share) as usize] as f64 / 1_000.0;
        println!(
            "{ACCOUNTS} accounts, {strategy}: {:.1} us in the median, {:.1} us at 99 %",
            at(0.5),
            at(0.99)
        );
    }
}

/// Plans of all sizes, two windows each, a tenth blocked, catalogues of their own.
fn pool() -> View {
    let models: BTreeSet<String> = ["gpt-5.4", "gpt-5.4-mini", "gpt-5.5", "gpt-5.6-sol"]
        .map(str::to_owned)
        .into();
    let window = |minutes, used| Window {
        family: "codex".into(),
        minutes,
        used_percent: f64::from(used),
        resets_at: Some(NOW + 3_600 + i64::from(used) * 600),
        observed_at: NOW - 60,
    };
    let account = |number: u32| {
        let plan = ["free", "plus", "prolite", "pro"][(number % 4) as usize];
        let block = Block {
            family: "codex".into(),
            until: NOW + 600,
            reason: "usage_limit_reached".into(),
        };
        Account {
            id: AccountId::new(),
            lifecycle: Lifecycle::Active,
            plan: plan.into(),
            weight: plan_weight(plan),
            windows: vec![window(300, number % 90), window(10_080, number % 70)],
            blocks: (number.is_multiple_of(10))
                .then_some(block)
                .into_iter()
                .collect(),
            credits: None,
            models: Some(Arc::new(models.clone())),
            load: Arc::default(),
        }
    };
    let mut accounts: Vec<Account> = (0..ACCOUNTS).map(account).collect();
    accounts.sort_by_key(|account| account.id);
    View { accounts }
}

//! What a hop costs: turns of one conversation, sent in turn to the replica that owns it and to another one, which forwards them.

use std::time::Instant;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::rig::{Drawbridge, client, per_unit};

/// Turns by each way.
const TURNS: u64 = 2_000;

/// Times of whole turns in milliseconds, by way, and what the hop adds.
pub(super) async fn measure(
    owner: &Drawbridge,
    other: &Drawbridge,
    key: &str,
) -> anyhow::Result<Value> {
    let client = client()?;
    let turn = async |at: &Drawbridge| -> anyhow::Result<f64> {
        let began = Instant::now();
        let answer = client
            .post(format!("{}/v1/responses", at.origin()))
            .bearer_auth(key)
            .header("session-id", "bench-hop")
            .json(&json!({ "model": "gpt-5.5", "input": "hi" }))
            .send()
            .await?;
        let status = answer.status();
        drop(answer.bytes().await?);
        ensure!(status.is_success(), "a turn was answered with {status}");
        Ok(began.elapsed().as_secs_f64() * 1e3)
    };
    let (mut direct, mut forwarded) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        turn(owner).await.context("warming up")?;
        turn(other).await.context("warming up")?;
    }
    for _ in 0..TURNS {
        direct.push(turn(owner).await?);
        forwarded.push(turn(other).await?);
    }
    let outcomes = owner.outcomes().await?;
    let mut statements = serde_json::Map::new();
    for (way, at) in [("direct", owner), ("forwarded", other)] {
        let before = (owner.statements().await?, other.statements().await?);
        for _ in 0..TURNS {
            turn(at).await?;
        }
        let after = (owner.statements().await?, other.statements().await?);
        let by_replica = json!({
            "owner": per_unit(&before.0, &after.0, TURNS),
            "other": per_unit(&before.1, &after.1, TURNS),
        });
        statements.insert(way.to_owned(), by_replica);
    }
    let (direct, forwarded) = (Times::of(direct), Times::of(forwarded));
    Ok(json!({
        "turns": TURNS,
        "direct_ms": direct.json(),
        "forwarded_ms": forwarded.json(),
        "added_ms": { "p50": forwarded.p50 - direct.p50, "p99": forwarded.p99 - direct.p99 },
        "statements_per_turn": statements,
        "bridge_outcomes": outcomes.into_iter().collect::<std::collections::BTreeMap<_, _>>(),
    }))
}

struct Times {
    p50: f64,
    p99: f64,
}

impl Times {
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |share: usize| times[times.len() * share / 100];
        Self {
            p50: at(50),
            p99: at(99),
        }
    }

    fn json(&self) -> Value {
        json!({ "p50": self.p50, "p99": self.p99 })
    }
}

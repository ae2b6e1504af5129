//! What it costs to keep a long conversation: the same turns through a replica that keeps snapshots in full and one that keeps none.

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    process::cpu,
    rig::{Drawbridge, Fake, client},
    say,
};

/// Items of each turn, and what each says.
const ITEMS: usize = 300;
const ITEM_BYTES: usize = 1000;
/// Turns of a round, each of its own conversation, so that everything is new.
const TURNS: u32 = 60;
const ROUNDS: usize = 5;

/// CPU per turn in milliseconds, each way and the difference: medians over rounds that alternate.
pub(super) async fn measure(
    binary: &Path,
    dir: &Path,
    fake: &Fake,
    key: &str,
) -> anyhow::Result<Value> {
    let mut replicas = Vec::new();
    for mode in ["off", "full"] {
        let settings = [("DRAWBRIDGE_SNAPSHOTS", mode)];
        let replica = Drawbridge::with(binary, dir, fake, mode, &settings).await?;
        replicas.push((mode, replica, Vec::new()));
    }
    let client = client()?;
    let mut bytes = 0;
    for round in 0..=ROUNDS {
        for (_, replica, times) in &mut replicas {
            let before = cpu(&[replica.pid()])?;
            for _ in 0..TURNS {
                let body = body();
                bytes = body.len();
                let answer = client
                    .post(format!("{}/backend-api/codex/responses", replica.origin()))
                    .bearer_auth(key)
                    .header("session-id", Uuid::now_v7().to_string())
                    .header("content-type", "application/json")
                    .body(body)
                    .send()
                    .await?;
                let status = answer.status();
                let said = answer.text().await?;
                ensure!(
                    status.is_success() && said.contains("response.completed"),
                    "a turn was answered with {status}"
                );
            }
            let used = cpu(&[replica.pid()])?.saturating_sub(before) / TURNS;
            // The first round warms up.
            if round > 0 {
                times.push(used.as_secs_f64() * 1e3);
            }
        }
    }
    let mut medians = replicas.into_iter().map(|(mode, _, mut times)| {
        times.sort_by(f64::total_cmp);
        (mode, times[times.len() / 2])
    });
    let off = medians.next().context("two modes")?;
    let full = medians.next().context("two modes")?;
    let added = full.1 - off.1;
    say(&format!(
        "keeping a turn of {ITEMS} items ({} KiB) costs {added:.2} ms of CPU",
        bytes >> 10
    ));
    Ok(json!({
        "items": ITEMS, "body_bytes": bytes, "turns": TURNS, "rounds": ROUNDS,
        "cpu_ms_per_turn": { off.0: off.1, full.0: full.1 }, "added_ms": added, "goal_ms": 5.0,
    }))
}

/// A conversation that brings everything, as the Codex CLI writes it.
fn body() -> String {
    let item = |number: usize| {
        let (role, kind) = [("user", "input_text"), ("assistant", "output_text")][number % 2];
        let mut text = format!("{number} {} ", Uuid::new_v4());
        text.extend(std::iter::repeat_n(
            "words of a conversation, ",
            ITEM_BYTES / 25,
        ));
        json!({ "type": "message", "role": role, "content": [{ "type": kind, "text": text }] })
    };
    let input: Vec<Value> = (0..=ITEMS).map(item).collect();
    json!({ "model": "gpt-5.5", "input": input, "stream": true, "store": false }).to_string()
}

//! Something to look at without an account of one's own: a fake upstream, Drawbridge before it, three accounts and light traffic.
//!
//! One account runs into its limit after a while and another one's token expires; the conversations go on. Nothing outlives the demo.

use std::{fmt::Write as _, path::Path, time::Duration};

use anyhow::Context as _;
use serde_json::Value;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::{
    drive::{Plan, Report, Transport, drive},
    process::RunDir,
    rig::{Drawbridge, Fake, client},
    upstream::{Fault, Kind},
};

/// Runs until the time is up, or for ever; the caller ends it by dropping the future.
///
/// # Errors
/// If something does not start or stops.
pub async fn run(binary: &Path, seconds: Option<u64>) -> anyhow::Result<()> {
    let dir = RunDir::make("demo")?;
    say("starting a fake upstream and Drawbridge on an embedded database ..");
    let fake = Fake::start(dir.path(), &["--deltas", "30", "--percent-per-turn", "0.5"]).await?;
    let mut drawbridge = Drawbridge::start(binary, dir.path(), &fake).await?;
    drawbridge.import(&fake, &["alice", "bob", "carol"]).await?;
    let key = drawbridge.key("demo").await?;
    say(&introduction(&drawbridge, binary, &key));

    let traffic = async {
        tokio::try_join!(
            converse(&drawbridge, &key, Transport::Sse, 3),
            converse(&drawbridge, &key, Transport::Ws, 2),
            misfortunes(&fake)
        )
    };
    let watch = async {
        let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let mut ticks = interval(Duration::from_secs(5));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            match end {
                Some(end) => tokio::select! {
                    _ = ticks.tick() => {}
                    () = tokio::time::sleep_until(end) => return anyhow::Ok(()),
                },
                None => drop(ticks.tick().await),
            }
            say(&picture(&drawbridge, &fake, &key).await?);
        }
    };
    let ended = tokio::select! {
        ended = watch => ended,
        ended = traffic => ended.map(drop),
    };
    drawbridge.alive()?;
    ended
}

/// Conversations one after the other, a few at a time.
async fn converse(
    drawbridge: &Drawbridge,
    key: &str,
    transport: Transport,
    streams: usize,
) -> anyhow::Result<()> {
    loop {
        let plan = Plan {
            url: format!("{}/backend-api/codex", drawbridge.origin()),
            key: key.to_owned(),
            account_id: None,
            streams,
            rate: 0.7,
            turns: 6,
            transport,
            body_bytes: 12_000,
            ramp: Duration::ZERO,
            timeout: Duration::from_secs(60),
        };
        let Report { errors, .. } = drive(&plan).await?;
        for (error, times) in errors {
            say(&format!("  a {transport:?} client saw: {error} ({times}x)"));
        }
    }
}

/// What happens to real accounts, in the same order every time.
async fn misfortunes(fake: &Fake) -> anyhow::Result<()> {
    loop {
        sleep(Duration::from_secs(8)).await;
        fake.fault(&Fault::once(Kind::RateLimit { resets_in: 20 }).at("bob"))
            .await?;
        say("  * the next turn of bob will run into a limit that ends in 20 s");
        sleep(Duration::from_secs(8)).await;
        fake.expire("carol").await?;
        say("  * carol's access token has expired");
        sleep(Duration::from_secs(20)).await;
    }
}

fn introduction(drawbridge: &Drawbridge, binary: &Path, key: &str) -> String {
    let origin = drawbridge.origin();
    let binary = binary.canonicalize().unwrap_or_else(|_| binary.to_owned());
    let settings: Vec<String> = drawbridge
        .settings()
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    format!(
        r#"
Drawbridge listens on {origin}; a client key is {key}

Try in another terminal:

  curl -N {origin}/v1/responses -H 'authorization: Bearer {key}' -H 'content-type: application/json' \
    -d '{{"model":"gpt-5.5","stream":true,"input":"hello"}}'

  CODEX_HOME=$(mktemp -d) DEMO_KEY={key} codex exec --skip-git-repo-check -m gpt-5.5 -c model_provider=demo \
    -c 'model_providers.demo={{name="demo",base_url="{origin}/backend-api/codex",env_key="DEMO_KEY",wire_api="responses",supports_websockets=true}}' \
    'say something, and then [tool]'

  env {} \
    {} accounts list

Ctrl-C ends it.
"#,
        settings.join(" "),
        binary.display()
    )
}

/// The accounts as Drawbridge sees them, beside what the fake has counted, and the sums.
async fn picture(drawbridge: &Drawbridge, fake: &Fake, key: &str) -> anyhow::Result<String> {
    let listed = drawbridge
        .cli(&["accounts", "list", "--json"], None)
        .await?;
    let listed: Value = serde_json::from_str(&listed).context("accounts list")?;
    let client = client()?;
    let pool: Value = client
        .get(format!("{}/backend-api/wham/usage", drawbridge.origin()))
        .bearer_auth(key)
        .send()
        .await?
        .json()
        .await?;
    let metrics = client
        .get(format!("{}/metrics", drawbridge.admin()))
        .send()
        .await?
        .text()
        .await?;
    let paid = fake.paid().await?;

    let mut text = format!(
        "{:<10}{:<18}{:>8}{:>8}{:>12}{:>12}\n",
        "account", "status", "used", "turns", "tokens", "refreshes"
    );
    for account in listed.as_array().context("accounts list")? {
        let name = account["label"].as_str().unwrap_or("?");
        let (status, paid) = (account["status"].as_str().unwrap_or("?"), &paid[name]);
        let used = paid["used_percent"].as_f64().unwrap_or_default();
        let count = |field: &str| paid[field].as_u64().unwrap_or_default();
        let _infallible = writeln!(
            text,
            "{name:<10}{status:<18}{used:>7.1}%{:>8}{:>12}{:>12}",
            count("turns"),
            count("tokens"),
            count("exchanges")
        );
    }
    let used = pool["rate_limit"]["primary_window"]["used_percent"]
        .as_f64()
        .unwrap_or_default();
    let sum = |name: &str| -> f64 {
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
            .sum()
    };
    let _infallible = write!(
        text,
        "the pool, as clients see it: {used:.1}% used; turns: {}; attempts that were made up for: {}",
        sum("drawbridge_turns_total"),
        sum("drawbridge_attempt_failures_total")
    );
    Ok(text)
}

#[expect(clippy::print_stdout, reason = "there is somebody to look at it")]
fn say(text: &str) {
    println!("{text}");
}

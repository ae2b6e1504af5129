//! Something to look at without an account of one's own: a fake upstream, two replicas of Drawbridge before it, three accounts and light
//! traffic that knows no affinity.
//!
//! One account runs into its limit after a while and another one's token expires; the conversations go on. So does one that asks the
//! replicas in turn and names nothing but the response before. Nothing outlives the demo.

use std::{fmt::Write as _, path::Path, time::Duration};

use anyhow::Context as _;
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::{
    drive::{Plan, Report, Transport, drive},
    process::RunDir,
    rig::{Drawbridge, Fake, client},
    say,
    upstream::{Fault, Kind},
};

/// Runs until the time is up, or for ever; the caller ends it by dropping the future.
///
/// # Errors
/// If something does not start or stops.
pub async fn run(binary: &Path, seconds: Option<u64>) -> anyhow::Result<()> {
    let dir = RunDir::make("demo")?;
    say("starting a fake upstream and two replicas of Drawbridge on one embedded database ..");
    let fake = Fake::start(dir.path(), &["--deltas", "30", "--percent-per-turn", "0.5"]).await?;
    let mut drawbridge = Drawbridge::replica(binary, dir.path(), &fake, "one").await?;
    let other = Drawbridge::replica(binary, dir.path(), &fake, "two").await?;
    drawbridge.import(&fake, &["alice", "bob", "carol"]).await?;
    let key = drawbridge.key("demo").await?;
    say(&introduction(&drawbridge, &other, binary, &key));

    let traffic = async {
        tokio::try_join!(
            converse(&drawbridge, &key, Transport::Sse, 2),
            converse(&other, &key, Transport::Sse, 1),
            converse(&drawbridge, &key, Transport::Ws, 1),
            converse(&other, &key, Transport::Ws, 1),
            wander([&drawbridge, &other], &key),
            linger(&drawbridge, &fake, &key),
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
            say(&picture([&drawbridge, &other], &fake, &key).await?);
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
            pause: Duration::ZERO,
        };
        let Report { errors, .. } = drive(&plan).await?;
        let failed = !errors.is_empty();
        for (error, times) in errors {
            say(&format!("  a {transport:?} client saw: {error} ({times}x)"));
        }
        if failed {
            sleep(Duration::from_secs(5)).await;
        }
    }
}

/// One conversation after the other, each of whose turns asks the next replica and names nothing but the response before.
async fn wander(replicas: [&Drawbridge; 2], key: &str) -> anyhow::Result<()> {
    const TURNS: usize = 4;
    let client = client()?;
    let mut previous = Value::Null;
    for turn in 0_usize.. {
        sleep(Duration::from_secs(1)).await;
        if turn % TURNS == 0 {
            previous = Value::Null;
        }
        let body = json!({"model": "gpt-5.5", "input": format!("question {turn}"), "previous_response_id": previous});
        let answer = client
            .post(format!("{}/v1/responses", replicas[turn % 2].origin()))
            .bearer_auth(key)
            .json(&body)
            .send()
            .await;
        // Gone, as whoever practises a loss wants it: the other one goes on.
        let Ok(answer) = answer else { continue };
        let status = answer.status();
        let Ok(answer) = answer.json::<Value>().await else {
            continue;
        };
        if status.is_success() {
            if turn % TURNS == TURNS - 1 && !previous.is_null() {
                say(
                    "  * a conversation that names nothing but its last response went on over both replicas",
                );
            }
            previous = answer["id"].clone();
        } else {
            say(&format!("  a wandering client saw: {status} {answer}"));
            previous = Value::Null;
        }
    }
    Ok(())
}

/// One conversation whose every turn takes two minutes, for whoever looks for a lease in a turn.
async fn linger(drawbridge: &Drawbridge, fake: &Fake, key: &str) -> anyhow::Result<()> {
    let client = reqwest::Client::builder().no_proxy().build()?;
    for turn in 0.. {
        let name = format!("long-{turn}");
        let slow = Fault::once(Kind::Paced(600, 200)).for_turn(&name);
        fake.fault(&slow).await?;
        let answer = client
            .post(format!("{}/v1/responses", drawbridge.origin()))
            .bearer_auth(key)
            .header("session-id", "long")
            .header(
                "x-codex-turn-metadata",
                json!({"turn_id": name}).to_string(),
            )
            .json(&json!({"model": "gpt-5.5", "stream": true, "input": "take your time"}))
            .send()
            .await?;
        drop(answer.bytes().await);
    }
    Ok(())
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

fn introduction(drawbridge: &Drawbridge, other: &Drawbridge, binary: &Path, key: &str) -> String {
    let (origin, second) = (drawbridge.origin(), other.origin());
    let binary = binary.canonicalize().unwrap_or_else(|_| binary.to_owned());
    let settings: Vec<String> = drawbridge
        .settings()
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    format!(
        r#"
The replicas listen on {origin} and {second}; a client key is {key}

Try in another terminal:

  curl -N {origin}/v1/responses -H 'authorization: Bearer {key}' -H 'content-type: application/json' \
    -d '{{"model":"gpt-5.5","stream":true,"input":"hello"}}'

  CODEX_HOME=$(mktemp -d) DEMO_KEY={key} codex exec --skip-git-repo-check -m gpt-5.5 -c model_provider=demo \
    -c 'model_providers.demo={{name="demo",base_url="{origin}/backend-api/codex",env_key="DEMO_KEY",wire_api="responses",supports_websockets=true}}' \
    'say something, and then [tool]'

  alias drawbridge='env {} {}'
  drawbridge leases list        # or accounts list, replicas list, explain ID

  ADMIN={}         # the metrics of "one"; {} those of "two"
  kill -9 {}                 # "two" is lost; see deploy/runbooks/lease-recovery.md

Ctrl-C ends it.
"#,
        settings.join(" "),
        binary.display(),
        drawbridge.admin().trim_start_matches("http://"),
        other.admin().trim_start_matches("http://"),
        other.pid(),
    )
}

/// The accounts as Drawbridge sees them, beside what the fake has counted, and the sums over both replicas.
async fn picture(replicas: [&Drawbridge; 2], fake: &Fake, key: &str) -> anyhow::Result<String> {
    let [drawbridge, _] = replicas;
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
    let mut metrics = String::new();
    for replica in replicas {
        let page = client.get(format!("{}/metrics", replica.admin())).send();
        if let Ok(page) = page.await {
            metrics += &page.text().await?;
        }
    }
    let paid = fake.paid().await?;

    let mut text = format!(
        "{:<10}{:<18}{:>8}{:>8}{:>12}{:>12}\n",
        "account", "status", "used", "turns", "tokens", "refreshes"
    );
    for account in listed.as_array().context("accounts list")? {
        let name = account["label"]
            .as_str()
            .context("an account without a label")?;
        let status = account["lifecycle"]
            .as_str()
            .context("an account without a life cycle")?;
        let paid = &paid[name];
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
    let sum = |name: &str| {
        let lines = metrics.lines().filter(|line| line.starts_with(name));
        lines
            .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
            .sum::<u64>()
    };
    let _infallible = write!(
        text,
        "the pool, as clients see it: {used:.1}% used; turns: {}; attempts that were made up for: {}",
        sum("drawbridge_turns_total"),
        sum("drawbridge_attempt_failures_total")
    );
    text.push_str("\nhow conversations went on:");
    for (outcome, times) in drawbridge.outcomes().await? {
        let _infallible = write!(text, " {outcome} {times}");
    }
    Ok(text)
}

//! A load that lasts: whether anything grows, and whether everything is given back.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::{
    bench::{machine, version, write},
    drive::{Plan, Report, Transport, drive},
    process::{RunDir, cpu, rss_kib},
    rig::{Drawbridge, Fake, client},
    say,
    upstream::{Fault, Kind},
};

/// Between two looks.
const LOOK: Duration = Duration::from_secs(5);
/// How long the process may take to give everything back.
const REST: Duration = Duration::from_secs(60);
/// Gauges that are 0 when nothing runs.
const GUARDS: [&str; 3] = [
    "drawbridge_sessions_busy",
    "drawbridge_unbooked_turns",
    "drawbridge_tasks{task=\"turn\"}",
];

/// One look.
#[derive(Clone, Copy, Debug, Serialize)]
struct Look {
    seconds: f64,
    rss_kib: u64,
}

/// Loads one replica for so long with conversations over both transports that come and go, and writes what was seen. A few hundred
/// sessions are its most, so that it is full early on: what grows then grows for ever.
///
/// # Errors
/// If something does not start.
pub async fn soak(binary: &Path, minutes: f64, out: &Path) -> anyhow::Result<()> {
    let dir = RunDir::make("soak")?;
    let fake = Fake::start(dir.path(), &[]).await?;
    let settings = [("DRAWBRIDGE_MAX_SESSIONS", "300")];
    let drawbridge = Drawbridge::with(binary, dir.path(), &fake, "drawbridge", &settings).await?;
    drawbridge.import(&fake, &["alice", "bob", "carol"]).await?;
    fake.fault(&Fault::always(Kind::Paced(40, 50))).await?;
    let key = drawbridge.key("soak").await?;
    let fresh = rss_kib(&[drawbridge.pid()])?;
    let began = Instant::now();
    let end = began + Duration::from_secs_f64(minutes * 60.0);
    let before = cpu(&[drawbridge.pid()])?;
    let mut looks = Vec::new();
    let watch = async {
        loop {
            sleep(LOOK).await;
            let seconds = began.elapsed().as_secs_f64();
            let rss_kib = rss_kib(&[drawbridge.pid()])?;
            looks.push(Look { seconds, rss_kib });
            if looks.len() % 12 == 0 {
                say(&format!("{:>5.0} s  {:>4} MiB", seconds, rss_kib >> 10));
            }
        }
        #[expect(unreachable_code, reason = "names the type of the errors")]
        anyhow::Ok(())
    };
    let talk = async {
        tokio::try_join!(
            converse(&drawbridge, &key, Transport::Sse, end),
            converse(&drawbridge, &key, Transport::Ws, end),
        )
    };
    let (over_http, over_sockets) = tokio::select! {
        reports = talk => reports?,
        gone = watch => return Err(gone.err().context("the watch ends only by an error")?),
    };
    let used = cpu(&[drawbridge.pid()])?.saturating_sub(before);
    let guards = rested(&drawbridge).await?;
    let slope = slope(&looks);
    let result = json!({
        "machine": machine(),
        "versions": { "drawbridge": version(binary, "--version") },
        "minutes": minutes,
        "fresh_rss_kib": fresh,
        "rested_rss_kib": rss_kib(&[drawbridge.pid()])?,
        "slope_mib_per_hour": slope,
        "cpu_ms": u64::try_from(used.as_millis())?,
        "guards": guards,
        "over_http": over_http,
        "over_sockets": over_sockets,
        "looks": looks,
    });
    say(&format!(
        "{} turns; {slope:.2} MiB an hour over the second half; {guards}",
        over_http.completed + over_sockets.completed
    ));
    write(out, &result)
}

/// Conversations of a few turns each, a new crowd whenever one has ended.
async fn converse(
    drawbridge: &Drawbridge,
    key: &str,
    transport: Transport,
    end: Instant,
) -> anyhow::Result<Report> {
    let mut sum = Report::default();
    while Instant::now() < end {
        let plan = Plan {
            url: format!("{}/backend-api/codex", drawbridge.origin()),
            key: key.to_owned(),
            account_id: None,
            streams: 60,
            rate: 12.0,
            turns: 5,
            transport,
            body_bytes: 40_000,
            ramp: Duration::ZERO,
            timeout: Duration::from_secs(60),
            pause: Duration::ZERO,
        };
        let report = drive(&plan).await?;
        sum.turns += report.turns;
        sum.completed += report.completed;
        sum.deltas += report.deltas;
        sum.seconds += report.seconds;
        for (error, times) in report.errors {
            *sum.errors.entry(error).or_default() += times;
        }
        // The last crowd's; one is like the other.
        (sum.ttft, sum.hop) = (report.ttft, report.hop);
    }
    Ok(sum)
}

/// The guards once nothing runs any more, or after a while.
async fn rested(drawbridge: &Drawbridge) -> anyhow::Result<Value> {
    let deadline = Instant::now() + REST;
    loop {
        sleep(LOOK).await;
        let page = client()?
            .get(format!("{}/metrics", drawbridge.admin()))
            .send()
            .await?
            .text()
            .await?;
        let read = |name: &str| {
            let value = page
                .lines()
                .find_map(|line| line.strip_prefix(name)?.trim().parse::<f64>().ok());
            (name.to_owned(), value)
        };
        let guards: Vec<_> = GUARDS.into_iter().map(read).collect();
        let given_back = guards.iter().all(|(_, value)| value.unwrap_or(0.0) == 0.0);
        if given_back || Instant::now() > deadline {
            return Ok(Value::Object(
                guards
                    .into_iter()
                    .map(|(name, value)| (name, json!(value)))
                    .collect(),
            ));
        }
    }
}

/// By how much memory grows in an hour, from the looks of the second half, by least squares.
#[expect(clippy::cast_precision_loss, reason = "KiB of one process")]
fn slope(looks: &[Look]) -> f64 {
    let half = &looks[looks.len() / 2..];
    let count = half.len() as f64;
    let mean = |of: fn(&Look) -> f64| half.iter().map(of).sum::<f64>() / count.max(1.0);
    let (x, y) = (mean(|look| look.seconds), mean(|look| look.rss_kib as f64));
    let (mut above, mut below) = (0.0, 0.0);
    for look in half {
        above += (look.seconds - x) * (look.rss_kib as f64 - y);
        below += (look.seconds - x).powi(2);
    }
    if below == 0.0 {
        return 0.0;
    }
    above / below * 3600.0 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grows_by_a_kib_a_second_grows_by_three_and_a_half_mib_an_hour() {
        let look = |second: u64, rss_kib| Look {
            seconds: second as f64,
            rss_kib,
        };
        let growing: Vec<Look> = (0..100).map(|at| look(at, 1_000 + at)).collect();
        assert!((slope(&growing) - 3600.0 / 1024.0).abs() < 1e-9);
        let full: Vec<Look> = (0..100).map(|at| look(at, 1_000 + at.min(40))).collect();
        assert!(slope(&full).abs() < 1e-9, "only the second half counts");
        assert!(slope(&[]).abs() < 1e-9);
    }
}

//! What the measurements have written, as a page for people: tables, and plots beside them. Made from the JSON alone.

mod plot;

use std::{fmt::Write as _, fs, path::Path};

use anyhow::Context as _;
use serde_json::Value;

use self::plot::{Bars, Line};
use crate::{
    load::{self, Measured},
    say,
};

/// Writes `README.md` and the plots beside the JSON of a directory. What was not measured is left out.
///
/// # Errors
/// If a file cannot be read as what its name says, or written.
pub fn write(dir: &Path) -> anyhow::Result<()> {
    let mut page = String::from(
        "# Measurements\n\nMade by `loadtest page` from the JSON in this folder, which `make bench`, `make load`, `make soak`, `make chaos` and \
         `make drills` write. All programs of a run share one machine; where nginx stands beside Drawbridge, both had the same load in the same \
         run. nginx only hands bytes on; Drawbridge does so with keys, limits, continuity, ledger and request log on.\n",
    );
    if let Some(bench) = json(dir, "bench.json")? {
        page += &compared(dir, &bench)?;
    }
    if let Some(text) = text(dir, "load.json")? {
        page += &loads(dir, &text)?;
    }
    if let Some(soak) = json(dir, "soak.json")? {
        page += &soaked(dir, &soak)?;
    }
    page += &broken(dir)?;
    fs::write(dir.join("README.md"), page.trim_end().to_owned() + "\n")?;
    say(&format!("written to {}", dir.join("README.md").display()));
    Ok(())
}

fn text(dir: &Path, name: &str) -> anyhow::Result<Option<String>> {
    let path = dir.join(name);
    match path.exists() {
        true => Ok(Some(fs::read_to_string(path)?)),
        false => Ok(None),
    }
}

fn json(dir: &Path, name: &str) -> anyhow::Result<Option<Value>> {
    let read = |text: String| serde_json::from_str(&text).with_context(|| name.to_owned());
    text(dir, name)?.map(read).transpose()
}

/// On what it ran.
fn machine(of: &Value) -> String {
    let machine = &of["machine"];
    let versions = of["versions"].as_object().into_iter().flatten();
    let versions: Vec<&str> = versions.filter_map(|(_, said)| said.as_str()).collect();
    format!(
        "\n{}, {} cores, {}, Linux {}. {}\n",
        machine["cpu"].as_str().unwrap_or("?"),
        machine["cores"],
        machine["memory"].as_str().unwrap_or("?"),
        machine["kernel"].as_str().unwrap_or("?"),
        versions.join(", ")
    )
}

/// The bench.
fn compared(dir: &Path, bench: &Value) -> anyhow::Result<String> {
    let mut page = String::from("\n## The cost of a turn\n");
    page += &machine(bench);
    page += "\nMedians of the rounds, from `bench.json`.\n\n| | nginx | Drawbridge | ratio |\n|---|---|---|---|\n";
    let mut bars = Bars::new("Processor time, microseconds");
    for row in bench["summary"].as_array().into_iter().flatten() {
        let name = row["name"].as_str().unwrap_or("?");
        let value = |of: &str| row["values"][of].as_f64().unwrap_or_default();
        let (nginx, ours) = (value("nginx"), value("drawbridge"));
        let ratio = match nginx > 0.0 {
            true => format!("{:.1}x", ours / nginx),
            false => String::new(),
        };
        writeln!(page, "| {name} | {nginx:.1} | {ours:.1} | {ratio} |")?;
        if name.starts_with("CPU per") {
            let label = name.trim_start_matches("CPU per ").trim_end_matches(", us");
            bars.group(label, &[("nginx", nginx), ("Drawbridge", ours)]);
        }
    }
    fs::write(dir.join("cost.svg"), bars.svg())?;
    page += "\n![processor time](cost.svg)\n";
    Ok(page)
}

/// The scenarios.
fn loads(dir: &Path, text: &str) -> anyhow::Result<String> {
    let (measured, all) = load::read(text).context("load.json")?;
    let mut page = String::from("\n## Kinds of load\n");
    page += &machine(&all);
    page += "\nOne run of each, from `load.json`. The hop is from upstream's sending of an event to the client's reading of it, all processes \
             on the same cores.\n\n| scenario | | CPU a turn | memory before, most | turns | first text p50, p99 | hop p50, p99 |\n|---|---|---|---|---|---|---|\n";
    let mut hops = Bars::new("Hop at p99, milliseconds");
    let mut last = "";
    for one in &measured {
        for (label, report) in &one.loads {
            let what = match one.scenario == last {
                true => String::new(),
                false => format!("**{}**: {}", one.scenario.replace('_', " "), one.what),
            };
            last = &one.scenario;
            let hop = match report.hop.count {
                0 => String::new(),
                _ => format!(
                    "{:.2}, {:.2} ms",
                    millis(report.hop.p50),
                    millis(report.hop.p99)
                ),
            };
            writeln!(
                page,
                "| {what} | {}, {label} | {:.0} us | {:.0}, {:.0} MiB | {} | {:.1}, {:.1} ms | {hop} |",
                one.target,
                one.cpu_us_per_turn,
                mib(one.rss_before_kib),
                mib(one.rss_peak_kib),
                report.turns,
                millis(report.ttft.p50),
                millis(report.ttft.p99),
            )?;
        }
    }
    for scenario in ["paced", "many"] {
        let of = |target: &str| {
            let found = measured
                .iter()
                .find(|one| one.scenario == scenario && one.target == target);
            found.map_or(0.0, |one| millis(hop_p99(one)))
        };
        hops.group(
            scenario,
            &[("nginx", of("nginx")), ("Drawbridge", of("drawbridge"))],
        );
    }
    fs::write(dir.join("hop.svg"), hops.svg())?;
    page += "\n![hop](hop.svg)\n";
    page += &memory(&measured, &all["idle"])?;
    Ok(page)
}

fn hop_p99(one: &Measured) -> u64 {
    one.loads
        .values()
        .map(|report| report.hop.p99)
        .max()
        .unwrap_or_default()
}

/// Memory per thousand streams.
#[expect(clippy::cast_precision_loss, reason = "KiB of one process")]
fn memory(measured: &[Measured], idle: &Value) -> anyhow::Result<String> {
    let ours = |name: &str| {
        measured
            .iter()
            .find(|one| one.scenario == name && one.target == "drawbridge")
    };
    let mut page = String::new();
    if let Some(many) = ours("many") {
        let streams: u64 = many.loads.values().map(|report| report.turns).sum();
        write!(
            page,
            "\nWith {streams} streams at once Drawbridge had {:.0} MiB, {:.0} MiB more than before them: {:.1} MiB for 1,000.",
            mib(many.rss_peak_kib),
            mib(many.rss_peak_kib.saturating_sub(many.rss_before_kib)),
            mib(many.rss_peak_kib.saturating_sub(many.rss_before_kib)) * 1000.0
                / streams.max(1) as f64,
        )?;
        writeln!(
            page,
            " After it all, with {} idle conversations kept, it had {:.0} MiB.",
            idle["sessions"],
            idle["rss_kib"].as_f64().unwrap_or_default() / 1024.0
        )?;
    }
    Ok(page)
}

/// The soak.
fn soaked(dir: &Path, soak: &Value) -> anyhow::Result<String> {
    let looks = soak["looks"].as_array().into_iter().flatten();
    let looks = looks.filter_map(|look| {
        Some((
            look["seconds"].as_f64()? / 60.0,
            look["rss_kib"].as_f64()? / 1024.0,
        ))
    });
    let line = Line {
        title: "Memory over minutes, MiB",
        points: looks.collect(),
    };
    fs::write(dir.join("soak.svg"), line.svg())?;
    let turns = |of: &str| soak[of]["completed"].as_u64().unwrap_or_default();
    let errors = |of: &str| {
        soak[of]["errors"]
            .as_object()
            .map_or(0, serde_json::Map::len)
    };
    let mut page = String::from("\n## Thirty minutes\n");
    page += &machine(soak);
    writeln!(
        page,
        "\n{} minutes of conversations that come and go, {} turns over HTTP and {} over WebSockets, {} kinds of errors; at most 300 sessions. \
         Over the second half memory grew by {:.2} MiB an hour. Guards afterwards: {}.\n\n![memory](soak.svg)",
        soak["minutes"],
        turns("over_http"),
        turns("over_sockets"),
        errors("over_http") + errors("over_sockets"),
        soak["slope_mib_per_hour"].as_f64().unwrap_or_default(),
        soak["guards"],
    )?;
    Ok(page)
}

/// The chaos runs and drills.
fn broken(dir: &Path) -> anyhow::Result<String> {
    let mut page = String::from(
        "\n## What was broken on purpose\n\nThree replicas, clients that remember what they meant, and afterwards every history compared: with the ledger, with upstream's own \
         record, with what the clients were told. A violation is a broken promise.\n\n| run | length | clients | faults | turns completed | forwards | takeovers | rebuilds | violations |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    let mut names: Vec<String> = fs::read_dir(dir)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            (name.starts_with("chaos") || name.starts_with("drill-")) && name.ends_with(".json")
        })
        .collect();
    names.sort();
    for name in names {
        let run = json(dir, &name)?.unwrap_or_default();
        let faults = run["faults"].as_object().into_iter().flatten();
        let faults: u64 = faults.filter_map(|(_, times)| times.as_u64()).sum();
        writeln!(
            page,
            "| `{name}`: {}, seed {} | {} s | {} | {faults} | {} | {} | {} | {} | {} |",
            run["course"].as_str().unwrap_or("random"),
            run["seed"],
            run["seconds"],
            run["clients"],
            run["turns"]["settled completed"],
            run["forwards"],
            run["takes"],
            run["rebuilds"],
            run["violations"].as_array().map_or(0, Vec::len),
        )?;
    }
    Ok(page)
}

#[expect(clippy::cast_precision_loss, reason = "microseconds of one run")]
fn millis(micros: u64) -> f64 {
    micros as f64 / 1e3
}
/// Of KiB.
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

//! Medians, ratios and goals.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;
use serde_json::{Map, Value};

use super::{Round, Scenario};

/// What is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Goal {
    /// At most so many times what nginx needs.
    TimesNginx(f64),
    /// At most this.
    AtMost(f64),
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    name: &'static str,
    /// By proxy.
    values: BTreeMap<String, f64>,
    goal: Option<Goal>,
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        let nginx = *self.values.get("nginx")?;
        let ours = *self.values.get("drawbridge")?;
        (nginx > 0.0).then(|| ours / nginx)
    }

    /// Whether the goal is met; `None` if there is no goal, or nothing to hold against it.
    fn met(&self) -> Option<bool> {
        match self.goal? {
            Goal::TimesNginx(times) => Some(self.ratio()? <= times),
            Goal::AtMost(most) => Some(*self.values.get("drawbridge")? <= most),
        }
    }
}

/// The figures of each round that are worth a line.
type Figure = (&'static str, Scenario, Option<Goal>, fn(&Round) -> f64);

#[expect(
    clippy::cast_precision_loss,
    reason = "microseconds and KiB of one run"
)]
const FIGURES: [Figure; 9] = [
    (
        "CPU per burst request, us",
        Scenario::Burst,
        Some(Goal::TimesNginx(2.5)),
        |round| round.cpu_us_per_unit,
    ),
    (
        "CPU per paced event, us",
        Scenario::Paced,
        Some(Goal::TimesNginx(1.5)),
        |round| round.cpu_us_per_unit,
    ),
    (
        "RSS at 200 paced streams, MiB",
        Scenario::Paced,
        Some(Goal::AtMost(60.0)),
        |round| round.rss_kib as f64 / 1024.0,
    ),
    ("burst TTFT p50, ms", Scenario::Burst, None, |round| {
        round.report.ttft.p50 as f64 / 1e3
    }),
    ("burst TTFT p99, ms", Scenario::Burst, None, |round| {
        round.report.ttft.p99 as f64 / 1e3
    }),
    ("paced TTFT p50, ms", Scenario::Paced, None, |round| {
        round.report.ttft.p50 as f64 / 1e3
    }),
    ("paced TTFT p99, ms", Scenario::Paced, None, |round| {
        round.report.ttft.p99 as f64 / 1e3
    }),
    ("paced hop p50, us", Scenario::Paced, None, |round| {
        round.report.hop.p50 as f64
    }),
    ("paced hop p99, us", Scenario::Paced, None, |round| {
        round.report.hop.p99 as f64
    }),
];

/// The table's lines.
pub(super) fn rows(rounds: &[Round], targets: &[&str], idle: &Map<String, Value>) -> Vec<Row> {
    let figure = |(name, scenario, goal, read): &Figure| {
        let of = |target: &str| {
            rounds
                .iter()
                .filter(|round| round.scenario == *scenario && round.target == target)
                .map(read)
                .collect()
        };
        let values = targets
            .iter()
            .map(|target| ((*target).to_owned(), median(of(target))))
            .collect();
        Row {
            name,
            values,
            goal: *goal,
        }
    };
    let mut rows: Vec<Row> = FIGURES.iter().map(figure).collect();
    let values = idle
        .iter()
        .map(|(name, kib)| (name.clone(), kib.as_f64().unwrap_or_default() / 1024.0))
        .collect();
    rows.insert(
        3,
        Row {
            name: "RSS idle, MiB",
            values,
            goal: Some(Goal::AtMost(30.0)),
        },
    );
    rows
}

/// The lines as text.
pub(super) fn table(rows: &[Row], targets: &[&str]) -> String {
    let mut text = format!("{:<32}", "");
    for target in targets {
        let _infallible = write!(text, "{target:>12}");
    }
    let _infallible = writeln!(text, "{:>10}{:>14}", "ratio", "goal");
    for row in rows {
        let _infallible = write!(text, "{:<32}", row.name);
        for target in targets {
            let _infallible = write!(
                text,
                "{:>12.1}",
                row.values.get(*target).copied().unwrap_or_default()
            );
        }
        let ratio = row
            .ratio()
            .map_or_else(String::new, |ratio| format!("{ratio:.2}x"));
        let goal = match row.goal {
            Some(Goal::TimesNginx(times)) => format!("<= {times}x nginx"),
            Some(Goal::AtMost(most)) => format!("<= {most}"),
            None => String::new(),
        };
        let met = match row.met() {
            Some(true) => "met",
            Some(false) => "MISSED",
            None => "",
        };
        let _infallible = writeln!(
            text,
            "{}",
            format!("{ratio:>10}{goal:>14}  {met}").trim_end()
        );
    }
    text
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_one() {
        for (values, middle) in [
            (vec![], 0.0),
            (vec![3.0], 3.0),
            (vec![9.0, 1.0, 2.0], 2.0),
            (vec![4.0, 1.0, 2.0, 9.0], 3.0),
        ] {
            assert_eq!(median(values.clone()), middle, "{values:?}");
        }
    }

    #[test]
    fn goals_are_held_against_what_they_speak_of() {
        let row = |nginx: f64, ours: f64, goal| Row {
            name: "",
            values: [("nginx".to_owned(), nginx), ("drawbridge".to_owned(), ours)].into(),
            goal: Some(goal),
        };
        assert_eq!(row(100.0, 250.0, Goal::TimesNginx(2.5)).met(), Some(true));
        assert_eq!(row(100.0, 251.0, Goal::TimesNginx(2.5)).met(), Some(false));
        assert_eq!(row(5.0, 59.0, Goal::AtMost(60.0)).met(), Some(true));
        assert_eq!(row(5.0, 61.0, Goal::AtMost(60.0)).met(), Some(false));
    }
}

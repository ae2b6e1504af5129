//! `drawbridge quota`: what is known of the limits of accounts, each value with its source and its age.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::Serialize;

use super::{Context, accounts};
use crate::{
    account::{Accounts, Listed},
    ids::AccountId,
    poll::{Polls, Schedule},
    protocol::limits::{Family, Window as Kind},
    quota::{Known, Quota, Source},
    routing::{self, Lifecycle, effective_used},
};

/// Prints one account, or all.
///
/// # Errors
/// Of the database, or if there is no such account.
pub(super) async fn run(name: Option<&str>, context: &Context) -> anyhow::Result<()> {
    let pepper = context.installation.pepper.clone();
    let accounts = Accounts::new(context.db.clone(), context.ring.clone(), pepper);
    let mut listed = accounts.list().await?;
    if let Some(name) = name {
        let id = accounts::find(&listed, name)?;
        listed.retain(|account| account.id == id);
    }
    let (quota, polls) = (
        Quota::read(&context.db).await?,
        Polls::new(context.db.clone()),
    );
    let now = context.db.clock().now();
    let mut reports = Vec::new();
    for account in listed {
        let known = quota.known(account.id);
        let (windows, blocks) = quota.snapshot(account.id);
        let polls = polls.of(account.id).await?;
        reports.push(report(account, known, windows, blocks, polls, now));
    }
    if context.json {
        say!("{}", serde_json::to_string(&reports)?);
    } else {
        let texts: Vec<String> = reports.iter().map(|report| text(report, now)).collect();
        say!("{}", texts.join("\n\n"));
    }
    Ok(())
}

#[derive(Serialize)]
struct Report {
    account: AccountId,
    label: Option<String>,
    plan: String,
    /// The life cycle, which limits are no part of.
    status: &'static str,
    families: BTreeMap<String, FamilyReport>,
    credits: Option<Credits>,
    polls: Vec<Schedule>,
}

#[derive(Default, Serialize)]
struct FamilyReport {
    /// As selection sees it now.
    status: &'static str,
    windows: Vec<Window>,
    block: Option<Block>,
}

#[derive(Serialize)]
struct Window {
    minutes: u32,
    used_percent: f64,
    resets_at: Option<Timestamp>,
    source: String,
    observed_at: Timestamp,
    age_seconds: i64,
}

#[derive(Serialize)]
struct Block {
    until: Option<Timestamp>,
    reason: String,
    blocked_at: Timestamp,
    age_seconds: i64,
    lifted: bool,
}

#[derive(Serialize)]
struct Credits {
    has_credits: bool,
    unlimited: bool,
    balance: Option<f64>,
    source: String,
    observed_at: Timestamp,
    age_seconds: i64,
}

fn report(
    listed: Listed,
    known: Known,
    windows: Vec<routing::Window>,
    blocks: Vec<routing::Block>,
    polls: Vec<Schedule>,
    now: Timestamp,
) -> Report {
    let age = |at: Timestamp| now.duration_since(at).as_secs().max(0);
    let account = routing::Account {
        id: listed.id,
        lifecycle: listed.lifecycle,
        weight: routing::plan_weight(&listed.plan),
        plan: listed.plan,
        windows,
        blocks,
        credits: known.credits.map(|sample| sample.credits),
        models: None,
        load: Default::default(),
    };
    let mut families: BTreeMap<String, FamilyReport> = BTreeMap::new();
    // Ordinary traffic comes first in people's minds, known or not.
    families.entry(Family::CODEX.to_string()).or_default();
    for (family, minutes, sample) in known.windows {
        if sample.source == Source::Unlisted {
            continue;
        }
        let window = routing::Window {
            family: family.to_string(),
            minutes,
            used_percent: sample.used_percent,
            resets_at: sample.resets_at,
            observed_at: sample.observed_at.as_second(),
        };
        let entry = families.entry(family.to_string()).or_default();
        entry.windows.push(Window {
            minutes,
            used_percent: effective_used(&window, now.as_second()),
            resets_at: sample
                .resets_at
                .and_then(|at| Timestamp::from_second(at).ok()),
            source: sample.source.to_string(),
            observed_at: sample.observed_at,
            age_seconds: age(sample.observed_at),
        });
    }
    for (family, block) in known.blocks {
        let lifted = !block.stands();
        families.entry(family.to_string()).or_default().block = Some(Block {
            until: Timestamp::from_second(block.until).ok(),
            reason: block.reason,
            blocked_at: block.blocked_at,
            age_seconds: age(block.blocked_at),
            lifted,
        });
    }
    for (family, entry) in &mut families {
        entry.status = routing::status(&account, family, now.as_second()).as_str();
    }
    Report {
        account: account.id,
        label: listed.label.or(listed.email),
        plan: account.plan,
        status: Lifecycle::as_str(account.lifecycle),
        families,
        credits: known.credits.map(|sample| Credits {
            has_credits: sample.credits.has_credits,
            unlimited: sample.credits.unlimited,
            balance: sample.credits.balance,
            source: sample.source.to_string(),
            observed_at: sample.observed_at,
            age_seconds: age(sample.observed_at),
        }),
        polls,
    }
}

fn text(report: &Report, now: Timestamp) -> String {
    let name = report.label.as_deref().unwrap_or("no label");
    let mut lines = vec![format!(
        "{}  {name}, plan {}, {}",
        report.account, report.plan, report.status
    )];
    for (family, known) in &report.families {
        let heading = routing::family_name(family);
        lines.push(format!("  {heading}: {}", known.status));
        for window in &known.windows {
            let resets = window.resets_at.filter(|at| *at > now).map_or_else(
                || "no reset ahead".to_owned(),
                |at| format!("resets {at:.0}"),
            );
            lines.push(format!(
                "    {:<10} {:>5.1} % used, {resets}  ({}, {} ago)",
                length(window.minutes),
                window.used_percent,
                window.source,
                span(window.age_seconds)
            ));
        }
        if known.windows.is_empty() {
            lines.push("    nothing is known of its windows".to_owned());
        }
        if let Some(block) = &known.block {
            let end = match block.until {
                _ if block.lifted => "lifted".to_owned(),
                Some(until) if until > now => format!("until {until:.0}"),
                Some(until) => format!("ended {until:.0}"),
                None => "without end".to_owned(),
            };
            lines.push(format!(
                "    blocked    {}, {end}  (error, {} ago)",
                block.reason,
                span(block.age_seconds)
            ));
        }
    }
    if let Some(credits) = &report.credits {
        let amount = match (credits.unlimited, credits.balance) {
            (true, _) => "unlimited".to_owned(),
            (false, Some(balance)) => format!("balance {balance}"),
            (false, None) if credits.has_credits => "some".to_owned(),
            (false, None) => "none".to_owned(),
        };
        lines.push(format!(
            "  credits: {amount}  ({}, {} ago)",
            credits.source,
            span(credits.age_seconds)
        ));
    }
    for poll in &report.polls {
        let answered = poll.answered_at.map_or_else(
            || "never answered".to_owned(),
            |at| format!("answered {} ago", span(now.duration_since(at).as_secs())),
        );
        let failed = poll.error.as_ref().map_or_else(String::new, |error| {
            format!(", failed {} times: {error}", poll.failures)
        });
        let wait = poll.due_at.duration_since(now).as_secs();
        let next = match wait {
            ..=0 => "due".to_owned(),
            wait => format!("next in {}", span(wait)),
        };
        lines.push(format!("  {}: {answered}{failed}, {next}", poll.question));
    }
    lines.join("\n")
}

fn length(minutes: u32) -> String {
    match Kind::from_minutes(minutes) {
        Kind::FiveHour => "5 hours".to_owned(),
        Kind::Weekly => "week".to_owned(),
        Kind::Monthly => "month".to_owned(),
        Kind::Other(minutes) => format!("{minutes} min"),
    }
}

/// Roughly so long, never negative.
pub(super) fn span(seconds: i64) -> String {
    match seconds.max(0) {
        seconds @ ..120 => format!("{seconds} s"),
        seconds @ ..7_200 => format!("{} min", seconds / 60),
        seconds @ ..172_800 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{self, CreditSample, Sample};

    #[test]
    fn each_value_is_shown_with_its_source_and_its_age() {
        let at = |seconds: i64| Timestamp::from_second(1_800_000_000 + seconds).unwrap();
        let sample = |used_percent, resets_in: i64, ago: i64, source| Sample {
            used_percent,
            resets_at: Some(at(resets_in).as_second()),
            observed_at: at(-ago),
            source,
        };
        let known = Known {
            windows: vec![
                (Family::CODEX, 300, sample(40.0, 900, 12, Source::Header)),
                (Family::CODEX, 10_080, sample(70.0, -5, 600, Source::Poll)),
                (Family::CODEX, 43_200, sample(0.0, 0, 600, Source::Unlisted)),
            ],
            blocks: vec![(
                Family::new("codex_bengalfox"),
                quota::Block {
                    blocked_at: at(-60),
                    until: at(3_600).as_second(),
                    reason: "usage_limit_reached".into(),
                    lifted_at: None,
                },
            )],
            credits: Some(CreditSample {
                credits: crate::protocol::limits::Credits {
                    has_credits: true,
                    unlimited: false,
                    balance: Some(12.5),
                },
                observed_at: at(-86_400 * 3),
                source: Source::Poll,
            }),
        };
        let listed = Listed {
            id: "019a0000-0000-7000-8000-000000000001".parse().unwrap(),
            email: None,
            label: Some("mine".into()),
            plan: "plus".into(),
            lifecycle: Lifecycle::Active,
            reason: None,
            created_at: at(0),
            refreshed_at: at(0),
            access_expires_at: None,
        };
        let blocks = vec![routing::Block {
            family: "codex_bengalfox".into(),
            until: at(3_600).as_second(),
            reason: "usage_limit_reached".into(),
        }];
        let polls = vec![Schedule {
            question: "usage".into(),
            due_at: at(48),
            answered_at: Some(at(-7_200)),
            failures: 2,
            error: Some("http_404".into()),
        }];
        let report = report(listed, known, Vec::new(), blocks, polls, at(0));
        assert_eq!(
            text(&report, at(0)),
            "019a0000-0000-7000-8000-000000000001  mine, plan plus, active
  codex: active
    5 hours     40.0 % used, resets 2027-01-15T08:15:00Z  (header, 12 s ago)
    week         0.0 % used, no reset ahead  (poll, 10 min ago)
  GPT-5.3-Codex-Spark: rate_limited
    nothing is known of its windows
    blocked    usage_limit_reached, until 2027-01-15T09:00:00Z  (error, 60 s ago)
  credits: balance 12.5  (poll, 3 days ago)
  usage: answered 2 h ago, failed 2 times: http_404, next in 48 s"
        );
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["families"]["codex"]["windows"][0]["source"], "header");
        assert_eq!(json["families"]["codex"]["windows"][0]["age_seconds"], 12);
        assert_eq!(
            json["families"]["codex_bengalfox"]["status"],
            "rate_limited"
        );
    }
}

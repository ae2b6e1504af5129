//! `drawbridge leases`: shows who may continue which conversation, and takes that right from an owner that is stuck.

use anyhow::bail;
use clap::Subcommand;
use jiff::Timestamp;
use serde_json::json;

use super::{Context, quota::span};
use crate::{
    ids::LeaseId,
    lease::{Leases, Listed, Which},
};

/// What to do with leases.
#[derive(Debug, Subcommand)]
pub(super) enum LeasesCommand {
    /// List the leases, the last used first
    List {
        /// Those in a turn alone, the longest first
        #[arg(long)]
        busy: bool,
        /// Those of this replica alone
        #[arg(long, value_name = "NAME")]
        owner: Option<String>,
        /// So many at most
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// Show one lease in full
    Show {
        /// The lease's id
        lease: LeaseId,
    },
    /// Free a lease, whoever owns it: the next request of its conversation claims it, on any replica
    Release {
        /// The lease's id
        lease: LeaseId,
    },
}

/// Runs one of them.
///
/// # Errors
/// Of the database, or if there is no such lease.
pub(super) async fn run(command: LeasesCommand, context: &Context) -> anyhow::Result<()> {
    let leases = Leases::new(context.db.clone());
    let find = async |lease| match leases.show(lease).await? {
        Some(found) => Ok(found),
        None => bail!("there is no lease {lease}"),
    };
    let (value, text) = match command {
        LeasesCommand::List { busy, owner, limit } => {
            let which = Which {
                lease: None,
                busy,
                owner,
            };
            let listed = leases.list(&which, limit).await?;
            (json!(listed), table(&listed, context.db.clock().now()))
        }
        LeasesCommand::Show { lease } => {
            let lease = find(lease).await?;
            (json!(lease), in_full(&lease))
        }
        LeasesCommand::Release { lease } => {
            let before = find(lease).await?;
            if !leases.free(lease).await? {
                bail!("the lease {lease} was deleted meanwhile");
            }
            let value = json!({"lease_id": lease, "done": "released", "fenced": before.owner_boot});
            (value, released(&before))
        }
    };
    say!(
        "{}",
        if context.json {
            value.to_string()
        } else {
            text
        }
    );
    Ok(())
}

fn table(leases: &[Listed], now: Timestamp) -> String {
    let heading = format!(
        "{:<36}  {:<12}  {:<8}  {:<7}  {:>6}  {:<16}  OWNER",
        "LEASE", "KEY", "STATE", "BUSY", "TURNS", "LAST TURN (UTC)"
    );
    let row = |lease: &Listed| {
        let busy = lease
            .busy_since
            .map(|since| span(now.duration_since(since).as_secs()));
        format!(
            "{:<36}  {:<12}  {:<8}  {:<7}  {:>6}  {:<16}  {}",
            lease.lease_id.to_string(),
            lease.key_kind,
            lease.owner_state,
            busy.as_deref().unwrap_or("-"),
            lease.turn_seq,
            lease.last_turn_at.strftime("%Y-%m-%d %H:%M").to_string(),
            lease.owner.as_deref().unwrap_or("-"),
        )
    };
    let rows: Vec<_> = std::iter::once(heading)
        .chain(leases.iter().map(row))
        .collect();
    rows.join("\n")
}

/// Who owns it.
pub(super) fn owner(lease: &Listed) -> String {
    match (&lease.owner, lease.owner_boot) {
        (Some(name), Some(boot)) => format!("{name} ({boot}) owns it, {}", lease.owner_state),
        _ => "nobody owns it; the next request claims it".to_owned(),
    }
}

/// A line for each fact.
fn in_full(lease: &Listed) -> String {
    let turn = match (lease.busy_turn, lease.busy_since) {
        (Some(turn), Some(since)) => format!("request {turn} since {since:.0}"),
        _ => "none".to_owned(),
    };
    let or_none = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    let facts = [
        ("lease", lease.lease_id.to_string()),
        ("scope", lease.scope_id.to_string()),
        ("found by", lease.key_kind.clone()),
        ("owner", owner(lease)),
        ("generation", lease.generation.to_string()),
        ("running turn", turn),
        ("turns so far", lease.turn_seq.to_string()),
        (
            "account",
            or_none(lease.account_id.map(|id| id.to_string())),
        ),
        ("last response", or_none(lease.head_response_id.clone())),
        ("last turn", format!("{:.0}", lease.last_turn_at)),
        (
            "last takeover",
            or_none(lease.taken_at.map(|at| format!("{at:.0}"))),
        ),
        ("kept until", format!("{:.0}", lease.retain_until)),
    ];
    let lines = facts.map(|(name, value)| format!("{name:<14}  {value}"));
    lines.join("\n")
}

fn released(before: &Listed) -> String {
    let lease = before.lease_id;
    let Some(owner) = &before.owner else {
        return format!("{lease} was free already; nobody owns it");
    };
    let turn = before.busy_turn.map_or_else(String::new, |turn| {
        format!(
            " Its running request {turn} is booked as usual, but no longer moves the conversation."
        )
    });
    format!(
        "{lease} is free: the next request of its conversation claims it, on any replica.\n\
         {owner} is fenced: it can begin no further turn under generation {}.{turn}",
        before.generation
    )
}

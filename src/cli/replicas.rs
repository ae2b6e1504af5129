//! `drawbridge replicas`: shows the processes that share the pool.

use clap::Subcommand;
use serde_json::json;

use super::Context;
use crate::replica::{self, Listed};

/// What to do with replicas.
#[derive(Debug, Subcommand)]
pub(super) enum ReplicasCommand {
    /// List every process that runs, and those that died within a day
    List,
}

/// Runs one of them.
///
/// # Errors
/// Of the database.
pub(super) async fn run(command: ReplicasCommand, context: &Context) -> anyhow::Result<()> {
    let ReplicasCommand::List = command;
    let replicas = replica::list(&context.db, context.timing).await?;
    if context.json {
        say!("{}", json!(replicas));
    } else {
        print_table(&replicas);
    }
    Ok(())
}

fn print_table(replicas: &[Listed]) {
    say!(
        "{:<36}  {:<8}  {:<16}  {:>9}  {:<28}  NAME",
        "BOOT",
        "STATE",
        "STARTED (UTC)",
        "HEARTBEAT",
        "ENDPOINT"
    );
    for replica in replicas {
        say!(
            "{:<36}  {:<8}  {:<16}  {:>7.1} s  {:<28}  {}",
            replica.boot_id.to_string(),
            replica.state,
            replica.started_at.strftime("%Y-%m-%d %H:%M").to_string(),
            replica.heartbeat_age_seconds,
            replica.endpoint.as_deref().unwrap_or("-"),
            replica.name,
        );
    }
}

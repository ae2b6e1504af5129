//! What an operator does on purpose, or has to live through: the runbooks, done to a fleet under load.

use std::{sync::Arc, time::Duration};

use anyhow::ensure;
use tokio::time::{Instant, sleep};

use super::{
    fleet::{Fleet, master_key},
    plan::{Fault, What},
};
use crate::say;

/// Between two steps, and before the first: clients talk.
const PAUSE: Duration = Duration::from_secs(3);

/// Every replica once, one after the other.
pub(super) async fn roll(fleet: &Arc<Fleet>) -> anyhow::Result<()> {
    for number in 0..fleet.replicas.len() {
        sleep(PAUSE).await;
        say(&format!("replica {number} is replaced ..."));
        strike(fleet, What::Drain(number), Duration::ZERO).await?;
    }
    Ok(())
}

/// Round after round, as long as one may begin.
pub(super) async fn rolling(fleet: &Arc<Fleet>, until: Instant) -> anyhow::Result<()> {
    while Instant::now() < until {
        roll(fleet).await?;
    }
    Ok(())
}

/// A new master key is made known, used, and the old one forgotten.
pub(super) async fn rotation(fleet: &Arc<Fleet>) -> anyhow::Result<()> {
    let (old, new) = (fleet.kept(), master_key("k2"));
    say("every replica learns the new master key ..");
    fleet.keep(&[&old, &new]);
    roll(fleet).await?;
    say("every replica seals with the new master key ..");
    fleet.keep(&[&new, &old]);
    roll(fleet).await?;
    say("what is sealed with the old master key is sealed again ..");
    fleet.operate(&["keys", "rotate-master"]).await?;
    say("every replica forgets the old master key ..");
    fleet.keep(&[&new]);
    roll(fleet).await?;
    let accounts = fleet.operate(&["--json", "accounts", "list"]).await?;
    ensure!(!accounts.contains("reauth_required"), "an account was lost");
    Ok(())
}

/// Postgres is away for half a minute.
pub(super) async fn outage(fleet: &Arc<Fleet>, lasts: Duration) -> anyhow::Result<()> {
    sleep(PAUSE).await;
    strike(fleet, What::Stop, lasts).await
}

/// A standby without the last two seconds takes over.
pub(super) async fn promotion(fleet: &Arc<Fleet>) -> anyhow::Result<()> {
    sleep(PAUSE).await;
    strike(fleet, What::Promote, Duration::from_secs(2)).await
}

async fn strike(fleet: &Arc<Fleet>, what: What, lasts: Duration) -> anyhow::Result<()> {
    let lasts = u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX);
    let fault = Fault { at: 0, lasts, what };
    Arc::clone(fleet).strike(fault).await
}

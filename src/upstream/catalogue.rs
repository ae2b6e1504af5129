//! The model catalogue: what upstream lists for each account, the last good copy kept in the database.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::Value;
use tokio::sync::watch;

use super::{Upstream, usage::Unanswered};
use crate::{
    account::Accounts,
    bus::{Bus, Topic},
    db,
    ids::AccountId,
    routing::Lifecycle,
    task::Tasks,
    telemetry,
};

/// The client version that is told to upstream; it decides which models are listed.
const CLIENT_VERSION: &str = "0.169.0";
/// After the database could not be asked.
const PAUSE: Duration = Duration::from_secs(1);

type PerAccount = Vec<(AccountId, Vec<Value>)>;

/// What every account lists, as read from the database.
#[derive(Clone)]
pub(super) struct Catalogue(watch::Receiver<Arc<PerAccount>>);

impl Catalogue {
    /// Reads it, and again whenever it moves.
    pub(super) async fn keep(
        accounts: Accounts,
        bus: &Bus,
        tasks: &Tasks,
    ) -> Result<Self, db::Error> {
        let mut moved = bus.subscribe(Topic::Models);
        let known = accounts.models().await?;
        label(&known);
        let (sender, receiver) = watch::channel(Arc::new(known));
        let stop = tasks.stopping();
        tasks.essential("catalogue", async move {
            let follow = async {
                while moved.changed().await.is_some() {
                    let models = loop {
                        match accounts.models().await {
                            Ok(models) => break models,
                            Err(error) => tracing::warn!(%error, "the model catalogue is old"),
                        }
                        tokio::time::sleep(PAUSE).await;
                    };
                    label(&models);
                    sender.send_replace(Arc::new(models));
                }
            };
            stop.run_until_cancelled(follow).await;
        });
        Ok(Self(receiver))
    }
}

/// What upstream lists may be a label of a metric.
fn label(models: &PerAccount) {
    let entries = models.iter().flat_map(|(_, entries)| entries);
    telemetry::models(entries.filter_map(|entry| entry["slug"].as_str()));
}

impl Upstream {
    /// The union of what the allowed accounts in service list, by slug; of two entries of one slug that of the older account.
    #[must_use]
    pub fn models(&self, allowed: Option<&[AccountId]>) -> Vec<Value> {
        let catalogue = Arc::clone(&self.catalogue.0.borrow());
        let view = self.view();
        let mut seen = BTreeSet::new();
        let mut order = Vec::new();
        for (account, entries) in catalogue.iter() {
            let known = view.account(*account);
            if known.is_none_or(|known| known.lifecycle != Lifecycle::Active)
                || allowed.is_some_and(|allowed| !allowed.contains(account))
            {
                continue;
            }
            for entry in entries {
                if let Some(slug) = entry["slug"].as_str()
                    && seen.insert(slug)
                {
                    order.push(entry.clone());
                }
            }
        }
        order
    }

    /// Reads the catalogue of an account. What fails keeps its last good copy.
    pub(super) async fn ask_models(&self, account: AccountId) -> Result<(), Unanswered> {
        let path = format!("/codex/models?client_version={CLIENT_VERSION}");
        let (body, _) = self.ask(account, &path).await?;
        let models = listed(&body).ok_or_else(|| Unanswered::new("not_understood"))?;
        Ok(self.accounts.store_models(account, &models).await?)
    }

    /// Ends when accounts were added or removed, at the latest after `patience`.
    pub(super) async fn accounts_changed(&self, patience: Duration) {
        let mut view = self.view.clone();
        let known: Vec<AccountId> = view
            .borrow_and_update()
            .accounts
            .iter()
            .map(|account| account.id)
            .collect();
        let other = view.wait_for(|view| {
            !view
                .accounts
                .iter()
                .map(|account| account.id)
                .eq(known.iter().copied())
        });
        drop(tokio::time::timeout(patience, other).await);
    }
}

/// What a catalogue lists; nothing is no answer: an account without any model is not one that upstream would serve.
fn listed(body: &[u8]) -> Option<Value> {
    let mut catalogue: Value = serde_json::from_slice(body).ok()?;
    let models = catalogue.get_mut("models")?.take();
    let named = models
        .as_array()?
        .iter()
        .any(|model| model["slug"].is_string());
    named.then_some(models)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_catalogue_without_a_model_is_no_answer() {
        for (body, understood) in [
            (r#"{"models":[{"slug":"gpt-5.5"},{}]}"#, true),
            (r#"{"models":[]}"#, false),
            (r#"{"models":[{"id":"gpt-5.5"},7]}"#, false),
            (r#"{"models":{"slug":"gpt-5.5"}}"#, false),
            (r#"{"data":[{"slug":"gpt-5.5"}]}"#, false),
            ("[]", false),
            ("<html>", false),
        ] {
            assert_eq!(listed(body.as_bytes()).is_some(), understood, "{body}");
        }
    }
}

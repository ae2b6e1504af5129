//! Asking upstream about accounts: their usage, their models. One replica at a time per account, see [`crate::poll`].
//!
//! Whatever goes wrong here changes no account's life cycle: a missing endpoint is not a missing account. Only the token exchange that a 401
//! leads to may find that a login has ended.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::timeout;

use super::{
    Upstream,
    credential::{CredentialError, Freshness},
};
use crate::{
    ids::AccountId,
    poll::Question,
    protocol::{
        failure::Failure,
        limits::{self, UsageReport},
    },
    telemetry,
};

/// For a whole question.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often the model catalogues are read.
const MODELS: Duration = Duration::from_secs(3600);
/// Between two looks for questions that are due, at least and at most.
const LOOK: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// Why a question was not answered: a code for the operator.
pub(super) struct Unanswered(String);

impl Unanswered {
    pub(super) fn new(code: impl Into<String>) -> Self {
        Self(code.into())
    }
}

impl From<Failure> for Unanswered {
    fn from(failure: Failure) -> Self {
        Self(match failure.status {
            Some(status) => format!("http_{status}"),
            None => failure.class.name().to_owned(),
        })
    }
}

impl From<CredentialError> for Unanswered {
    fn from(error: CredentialError) -> Self {
        Self::new(match error {
            CredentialError::Unknown => "no_such_account",
            CredentialError::LoginRequired => "login_required",
            CredentialError::Transient => "token_endpoint",
            CredentialError::Db(_) => "database",
        })
    }
}

impl From<crate::db::Error> for Unanswered {
    fn from(error: crate::db::Error) -> Self {
        tracing::warn!(%error, "an answer cannot be stored");
        Self::new("database")
    }
}

impl Upstream {
    /// Asks about usage for as long as it is polled; what turns tell meanwhile saves questions.
    pub async fn poll_usage(&self, every: Duration) {
        self.poll(Question::Usage, every, every).await;
    }

    /// Reads the model catalogues for as long as it is polled; of new accounts at once.
    pub async fn poll_models(&self) {
        self.poll(Question::Models, MODELS, Duration::ZERO).await;
    }

    async fn poll(&self, question: Question, every: Duration, spread: Duration) {
        loop {
            if let Err(error) = self.ask_all(question, every, spread).await {
                tracing::warn!(%error, question = question.as_str(), "cannot see what is to be asked");
            }
            let accounts = u32::try_from(self.view().accounts.len()).unwrap_or(u32::MAX);
            let (least, most) = LOOK;
            self.accounts_changed((every / accounts.max(1)).clamp(least, most))
                .await;
        }
    }

    /// Asks whatever is due, one account after the other. In one pass no more than there are: new ones come with the next.
    async fn ask_all(
        &self,
        question: Question,
        every: Duration,
        spread: Duration,
    ) -> Result<(), crate::db::Error> {
        self.polls.cover(question, spread).await?;
        for _ in 0..self.view().accounts.len().max(1) {
            let Some(due) = self.polls.claim(question, every).await? else {
                break;
            };
            if question == Question::Usage
                && let Some(why) = self.quota.skips(due.account, due.answered_at, every)
            {
                tracing::trace!(account_id = %due.account, ?why, "usage is not asked for");
                continue;
            }
            let asked = async {
                match question {
                    Question::Usage => self.ask_usage(due.account).await,
                    Question::Models => self.ask_models(due.account).await,
                }
            };
            let outcome = match timeout(PATIENCE, asked).await {
                Ok(outcome) => outcome,
                Err(_) => Err(Unanswered::new("timeout")),
            };
            telemetry::polled(question.as_str(), outcome.is_ok());
            match outcome {
                Ok(()) => self.polls.answered(question, &due).await?,
                Err(Unanswered(code)) => {
                    tracing::debug!(account_id = %due.account, question = question.as_str(), code, "upstream did not tell");
                    self.polls.failed(question, &due, &code).await?;
                }
            }
        }
        Ok(())
    }

    async fn ask_usage(&self, account: AccountId) -> Result<(), Unanswered> {
        let (report, began) = self.usage_of(account).await?;
        self.quota.report(account, &report, began);
        self.see_plan(account, &report).await
    }

    /// What upstream tells of an account's usage, and when the question began.
    pub(super) async fn usage_of(
        &self,
        account: AccountId,
    ) -> Result<(UsageReport, Instant), Unanswered> {
        let began = Instant::now();
        let (body, workspace) = self.ask(account, "/wham/usage").await?;
        let report = limits::from_usage(&body, self.now())
            .ok_or_else(|| Unanswered::new("not_understood"))?;
        // An answer for another workspace says nothing of this account.
        if let (Some(told), Some(ours)) = (&report.workspace_id, &workspace)
            && told != ours
        {
            return Err(Unanswered::new("other_workspace"));
        }
        Ok((report, began))
    }

    /// Takes in the plan that was told.
    pub(super) async fn see_plan(
        &self,
        account: AccountId,
        report: &UsageReport,
    ) -> Result<(), Unanswered> {
        let plan = report
            .observations
            .iter()
            .find_map(|observation| observation.plan_type.as_deref());
        if let Some(plan) = plan {
            self.accounts.see_plan(account, plan).await?;
        }
        Ok(())
    }

    /// A document of an account and the workspace it was asked of. A refused token is renewed once.
    pub(super) async fn ask(
        &self,
        account: AccountId,
        path: &str,
    ) -> Result<(Bytes, Option<String>), Unanswered> {
        let mut freshness = Freshness::Any;
        loop {
            let credential = self.credentials.fresh(account, freshness).await?;
            match self.document(account, &credential, path).await {
                Ok(body) => return Ok((body, credential.chatgpt_account_id.clone())),
                Err(failure) if failure.status == Some(401) && freshness == Freshness::Any => {
                    freshness = Freshness::NotGeneration(credential.generation);
                }
                Err(failure) => return Err(failure.into()),
            }
        }
    }
}

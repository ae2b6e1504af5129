//! What is known of the pool at one moment.

use std::{collections::BTreeSet, fmt, str::FromStr, sync::Arc};

use super::Load;
use crate::{ids::AccountId, protocol::limits::Credits};

/// The life of an account as operators and upstream's verdicts shape it; limits are no part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lifecycle {
    /// May serve.
    Active,
    /// Set aside by the operator; its credential is kept fresh.
    Paused,
    /// Upstream refused its login; only a new login brings it back.
    ReauthRequired,
    /// Upstream closed it.
    Deactivated,
}

impl Lifecycle {
    /// The word in the database, in JSON and in texts.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Paused => "paused",
            Self::ReauthRequired => "reauth_required",
            Self::Deactivated => "deactivated",
        }
    }
}

impl fmt::Display for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Lifecycle {
    type Err = UnknownLifecycle;

    fn from_str(text: &str) -> Result<Self, UnknownLifecycle> {
        [
            Self::Active,
            Self::Paused,
            Self::ReauthRequired,
            Self::Deactivated,
        ]
        .into_iter()
        .find(|lifecycle| lifecycle.as_str() == text)
        .ok_or(UnknownLifecycle)
    }
}

/// A word that names no [`Lifecycle`].
#[derive(Debug, thiserror::Error)]
#[error("unknown account status")]
pub struct UnknownLifecycle;

/// The pool as selection sees it. Immutable but for the load of this process.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Every account, in order of its id.
    pub accounts: Vec<Account>,
}

impl View {
    /// The account of that id.
    #[must_use]
    pub fn account(&self, id: AccountId) -> Option<&Account> {
        let index = self
            .accounts
            .binary_search_by_key(&id, |account| account.id);
        self.accounts.get(index.ok()?)
    }
}

/// One account of the pool.
#[derive(Clone, Debug)]
pub struct Account {
    /// Its id.
    pub id: AccountId,
    /// Only [`Lifecycle::Active`] may serve.
    pub lifecycle: Lifecycle,
    /// Upstream's name of the plan, such as `plus` or `pro`.
    pub plan: String,
    /// The size of its windows relative to a `plus` account.
    pub weight: f64,
    /// The last known windows of every family.
    pub windows: Vec<Window>,
    /// The blocks of every family; past ones may still be listed.
    pub blocks: Vec<Block>,
    /// What stands in for full windows, where known.
    pub credits: Option<Credits>,
    /// Slugs upstream lists for this account, or else for its plan; `None` while unknown (then it may serve any).
    pub models: Option<Arc<BTreeSet<String>>>,
    /// What this process does there now.
    pub load: Arc<Load>,
}

/// One quota window of one family.
#[derive(Clone, Debug, PartialEq)]
pub struct Window {
    /// `codex` or the name of an additional limit.
    pub family: String,
    /// Length; tells 5 hours, a week and a month apart.
    pub minutes: u32,
    /// 0 to 100 and more.
    pub used_percent: f64,
    /// Epoch seconds; a window whose reset has passed counts as unused.
    pub resets_at: Option<i64>,
    /// Epoch seconds at which the observation began.
    pub observed_at: i64,
}

/// Until when an account may not be used for a family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// As in [`Window`].
    pub family: String,
    /// Epoch seconds.
    pub until: i64,
    /// Upstream's code, such as `usage_limit_reached`.
    pub reason: String,
}

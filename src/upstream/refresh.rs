//! Asks upstream about the usage of many accounts now, because somebody wants to know.
//!
//! One question per account runs at a time, and a fresh answer serves whoever asks next. Whoever runs [`Upstream::refresh_usage`] does so in
//! a task of its own: what came is stored, and announced once, also if nobody waits any more. Nothing that goes wrong here changes an
//! account's life cycle; only the token exchange that a 401 leads to may find that a login has ended.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt as _, StreamExt as _,
    future::{BoxFuture, Shared},
    stream,
};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Upstream;
use crate::{db, ids::AccountId, protocol::limits::UsageReport, routing::Lifecycle};

/// For one question, and for all of a refresh: what has not come by then is not waited for.
const PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE_OF_ALL: Duration = Duration::from_secs(30);
/// An answer that is younger serves whoever asks.
const FRESH: Duration = Duration::from_secs(15);
/// Questions of one refresh at a time.
const AT_ONCE: usize = 8;

/// What came of a refresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refreshed {
    /// Accounts that were named and exist.
    pub accounts: usize,
    /// Those of them that serve and were asked about before the time was over.
    pub attempted: usize,
    /// Whether upstream told anything, and that was stored.
    pub written: bool,
    /// Whether the process ended before everything came.
    pub cut: bool,
}

/// An answer and when its question began.
struct Answer {
    account: AccountId,
    report: UsageReport,
    began: Instant,
}

/// A question under way, or a fresh answer; `None` inside is a failure.
struct Flight {
    began: Instant,
    answer: Shared<BoxFuture<'static, Option<Arc<Answer>>>>,
}

impl Flight {
    /// Whether it can serve one more.
    fn serves(&self) -> bool {
        match self.answer.peek() {
            // One that nobody waits for does not go on.
            None => self.began.elapsed() < PATIENCE,
            Some(answer) => answer.is_some() && self.began.elapsed() < FRESH,
        }
    }
}

/// The questions of one process by account. Clones share them.
#[derive(Clone, Default)]
pub(super) struct Flights(Arc<Mutex<HashMap<AccountId, Flight>>>);

impl Flights {
    /// Joins the question about an account, or asks it.
    fn join(
        &self,
        upstream: &Upstream,
        account: AccountId,
    ) -> Shared<BoxFuture<'static, Option<Arc<Answer>>>> {
        let mut flights = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        flights.retain(|_, flight| flight.serves());
        let flight = flights.entry(account).or_insert_with(|| {
            let upstream = upstream.clone();
            let ask = async move {
                let told = timeout(PATIENCE, upstream.usage_of(account)).await;
                let (report, began) = told.ok()?.ok()?;
                Some(Arc::new(Answer {
                    account,
                    report,
                    began,
                }))
            };
            Flight {
                began: Instant::now(),
                answer: ask.boxed().shared(),
            }
        });
        flight.answer.clone()
    }
}

impl Upstream {
    /// Asks about the named accounts that serve, and stores what they tell; `None` names all. Ends early when the process stops.
    ///
    /// # Errors
    /// If the database cannot say which accounts there are.
    pub async fn refresh_usage(
        &self,
        named: Option<&[AccountId]>,
        stop: CancellationToken,
    ) -> Result<Refreshed, db::Error> {
        let mut accounts = self.accounts.load_all().await?;
        accounts.retain(|account| named.is_none_or(|named| named.contains(&account.id)));
        let serving: Vec<AccountId> = accounts
            .iter()
            .filter(|account| account.lifecycle == Lifecycle::Active)
            .map(|account| account.id)
            .collect();
        let end = async {
            tokio::select! {
                () = stop.cancelled() => {}
                () = sleep(PATIENCE_OF_ALL) => {}
            }
        };
        let mut attempted = 0;
        let answers: Vec<_> = stream::iter(serving)
            .map(|account| {
                attempted += 1;
                self.flights.join(self, account)
            })
            .buffer_unordered(AT_ONCE)
            .take_until(end)
            .filter_map(std::future::ready)
            .collect()
            .await;
        // All at once, so that it is announced once.
        for answer in &answers {
            let Answer {
                account,
                report,
                began,
            } = &**answer;
            self.quota.report(*account, report, *began);
        }
        let stored = self.quota.flush().await;
        for answer in &answers {
            // A failure is logged there, and the next question tells it again.
            drop(self.see_plan(answer.account, &answer.report).await);
        }
        Ok(Refreshed {
            accounts: accounts.len(),
            attempted,
            written: stored && !answers.is_empty(),
            cut: stop.is_cancelled(),
        })
    }
}

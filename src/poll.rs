//! Questions to upstream about each account, asked by one replica at a time and spread over time: how much is used, which models there are.
//!
//! The claim is the moving of the due time, in one statement: a replica that dies with a claim delays one question by one interval. This
//! room knows neither upstream nor what an answer means.

mod store;

use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;

pub use self::store::STATEMENTS;
use crate::{
    db::{Db, Error},
    ids::AccountId,
};

/// After the first failure; doubled by each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(60);
/// At most.
const LONGEST_PAUSE: Duration = Duration::from_secs(1800);

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    /// How much of its limits an account has used.
    Usage,
    /// Which models it may use.
    Models,
}

impl Question {
    /// The word in the database, in logs and in texts.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Usage => "usage",
            Self::Models => "models",
        }
    }
}

/// A claimed question.
#[derive(Clone, Copy, Debug)]
pub struct Due {
    /// About whom.
    pub account: AccountId,
    /// When it was last answered.
    pub answered_at: Option<Timestamp>,
    /// How often it has failed since.
    pub failures: u32,
}

/// How asking stands, for people.
#[derive(Clone, Debug, Serialize)]
pub struct Schedule {
    /// What is asked.
    pub question: String,
    /// When next.
    pub due_at: Timestamp,
    /// When it was last answered.
    pub answered_at: Option<Timestamp>,
    /// How often it has failed since.
    pub failures: i32,
    /// Why it failed last, a code.
    pub error: Option<String>,
}

/// The questions of an installation. Cheap to clone; nothing is kept in memory.
#[derive(Clone, Debug)]
pub struct Polls(Db);

impl Polls {
    /// Of a database.
    #[must_use]
    pub fn new(db: Db) -> Self {
        Self(db)
    }

    /// Sees to it that the question is asked about every account: the first of those that are new at once, the others spread over `spread`.
    ///
    /// # Errors
    /// Of the database.
    pub async fn cover(&self, question: Question, spread: Duration) -> Result<(), Error> {
        store::cover(&self.0, question, spread).await
    }

    /// The most overdue question about an account in service, if any is due. It is due again after `every`, whatever becomes of it.
    ///
    /// # Errors
    /// Of the database.
    pub async fn claim(&self, question: Question, every: Duration) -> Result<Option<Due>, Error> {
        store::claim(&self.0, question, every).await
    }

    /// Notes an answer.
    ///
    /// # Errors
    /// Of the database.
    pub async fn answered(&self, question: Question, due: &Due) -> Result<(), Error> {
        store::answered(&self.0, question, due.account).await
    }

    /// Notes a failure by its code; the question is put off, the longer the more often it has failed.
    ///
    /// # Errors
    /// Of the database.
    pub async fn failed(&self, question: Question, due: &Due, code: &str) -> Result<(), Error> {
        store::failed(&self.0, question, due.account, code, pause(due.failures)).await
    }

    /// How asking about an account stands.
    ///
    /// # Errors
    /// Of the database.
    pub async fn of(&self, account: AccountId) -> Result<Vec<Schedule>, Error> {
        store::of(&self.0, account).await
    }
}

/// After so many failures before this one.
fn pause(failures: u32) -> Duration {
    FIRST_PAUSE
        .saturating_mul(1 << failures.min(8))
        .min(LONGEST_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_that_fails_is_put_off_longer_and_longer() {
        let pauses: Vec<u64> = (0..7).map(|failures| pause(failures).as_secs()).collect();
        assert_eq!(pauses, [60, 120, 240, 480, 960, 1800, 1800]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}

//! Who exchanges an account's refresh token, of all replicas. A claim is a row with an end of its own, so that one who dies in the middle
//! keeps nobody waiting for ever; what it guards is told by the credential's generation, never by the claim.

use std::time::Duration;

use uuid::Uuid;

use super::{Accounts, store};
use crate::{db, ids::AccountId};

/// What became of an attempt to claim an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is ours until it ends or is given back. What was read before may be old.
    Mine(Uuid),
    /// Somebody else has it.
    Theirs,
    /// An exchange has failed a moment ago; another would not help.
    Failed,
}

impl Accounts {
    /// Claims the exchange of an account's refresh token for `time`.
    ///
    /// # Errors
    /// Of the database.
    pub async fn claim(&self, id: AccountId, time: Duration) -> Result<Claim, db::Error> {
        let me = Uuid::new_v4();
        Ok(if store::claim(&self.db, id, me, time).await? {
            Claim::Mine(me)
        } else if store::claim_holder(&self.db, id).await? == Some(Uuid::nil()) {
            Claim::Failed
        } else {
            Claim::Theirs
        })
    }

    /// Keeps a claim for another `time`, unless it has ended.
    ///
    /// # Errors
    /// Of the database.
    pub async fn renew_claim(
        &self,
        id: AccountId,
        claim: Uuid,
        time: Duration,
    ) -> Result<(), db::Error> {
        store::renew_claim(&self.db, id, claim, time).await
    }

    /// Notes that upstream refused a generation by a word that nobody knows; yields whether the exchange before had the same end.
    ///
    /// # Errors
    /// Of the database.
    pub async fn doubt(
        &self,
        id: AccountId,
        claim: Uuid,
        generation: i64,
    ) -> Result<bool, db::Error> {
        store::doubt(&self.db, id, claim, generation).await
    }

    /// Gives a claim back after an exchange that was answered.
    ///
    /// # Errors
    /// Of the database; then the claim ends by itself.
    pub async fn unclaim(&self, id: AccountId, claim: Uuid) -> Result<(), db::Error> {
        store::unclaim(&self.db, id, claim).await
    }

    /// Gives a claim back after an exchange that did not help: nobody tries again for `pause`.
    ///
    /// # Errors
    /// Of the database; then the claim ends by itself.
    pub async fn unclaim_failed(
        &self,
        id: AccountId,
        claim: Uuid,
        pause: Duration,
    ) -> Result<(), db::Error> {
        store::unclaim_failed(&self.db, id, claim, pause).await
    }

    /// Accounts, in service or paused, whose access token ends within `lead` or whose tokens are older than `age`. One whose last exchanges
    /// failed comes ever more rarely, but once an hour.
    ///
    /// # Errors
    /// Of the database.
    pub async fn due(&self, lead: Duration, age: Duration) -> Result<Vec<AccountId>, db::Error> {
        store::due(&self.db, lead, age).await
    }
}

//! Stores a login: one row per seat, however often and under whatever address somebody logs in. What [`merge`] decided is carried out in one
//! transaction, under its locks, so that no replica ever sees half of it.

use super::{
    Accounts, AuthFile, Error, Imported, email_of,
    flow::Held,
    merge::{self, Policy, Who},
    store::{self, HeldRow, NewAccount},
};
use crate::{
    bus::{self, Topic},
    db::{Class, Tx},
    ids::AccountId,
};

/// Tries of a login that meets others half-way.
const TRIES: usize = 5;

/// How a login is stored.
#[derive(Clone, Copy)]
pub(super) struct How<'a> {
    pub(super) policy: Policy,
    /// Without one the old one stays.
    pub(super) label: Option<&'a str>,
    /// The login under way that it finishes, and the account that this one is meant for.
    pub(super) flow: Option<&'a Held>,
}

impl Accounts {
    /// Stores a login: into the row of its seat if there is one, which makes it active again and takes in every other row of the seat; else
    /// into a new one. Without a label the old one stays.
    ///
    /// # Errors
    /// Of the database.
    pub async fn import(&self, file: &AuthFile, label: Option<&str>) -> Result<Imported, Error> {
        self.import_by(Policy::LOGIN, file, label).await
    }

    /// [`Accounts::import`] by another rule of which rows are replaced.
    ///
    /// # Errors
    /// Of the database.
    pub async fn import_by(
        &self,
        policy: Policy,
        file: &AuthFile,
        label: Option<&str>,
    ) -> Result<Imported, Error> {
        let how = How {
            policy,
            label,
            flow: None,
        };
        self.reconcile(file, how).await
    }

    /// Stores a login, and that it is finished. Repeated as a whole where it meets others half-way.
    pub(super) async fn reconcile(&self, file: &AuthFile, how: How<'_>) -> Result<Imported, Error> {
        let turn = self.logins.acquire().await;
        let _turn = turn.expect("the semaphore is never closed");
        let mut tries = 1;
        loop {
            let stored = async {
                let tx = self.db.begin().await?;
                let imported = self.store(&tx, file, how).await?;
                if let Some(flow) = how.flow
                    && !flow.finish(&tx, &imported).await?
                {
                    return Err(Error::Over);
                }
                let topics: &[Topic] = match imported.merged[..] {
                    [] => &[Topic::Accounts],
                    _ => &Topic::ALL,
                };
                bus::commit(tx, topics).await?;
                Ok(imported)
            };
            match stored.await {
                Err(error) if again(&error) && tries < TRIES => tries += 1,
                done => return done,
            }
        }
    }

    async fn store(
        &self,
        tx: &Tx,
        file: &AuthFile,
        How {
            policy,
            label,
            flow,
        }: How<'_>,
    ) -> Result<Imported, Error> {
        let target = flow.and_then(Held::wanted);
        let claims = &file.claims;
        let hash = |email: &String| self.pepper.hash("email", email.to_lowercase().as_bytes());
        let mut who = Who {
            workspace: claims.chatgpt_account_id.clone(),
            user: claims.chatgpt_user_id.clone(),
            email: claims.email.as_ref().map(|email| hash(email).to_vec()),
        };
        let new = AccountId::new();
        for (class, key) in merge::locks(&who, policy, new) {
            store::advisory(tx, class, key).await?;
        }
        let held = hold(tx, &who, policy, target).await?;
        let (id, merged) = match &held[..] {
            [] => (new, Vec::new()),
            [kept, others @ ..] => (kept.id, others.iter().map(|row| row.id).collect()),
        };
        // Of rows that become one, the oldest word counts.
        let label = label.or_else(|| held.iter().find_map(|row| row.label.as_deref()));
        who.user = who
            .user
            .or_else(|| held.iter().find_map(|row| row.user.clone()));
        for from in &merged {
            store::merge(tx, *from, id).await?;
        }
        let email = claims.email.as_ref();
        let email_sealed =
            email.map(|email| self.ring.seal(email_of(&id.to_string()), email.as_bytes()));
        let account = NewAccount {
            id,
            who: &who,
            email_sealed: email_sealed.as_deref(),
            label,
            plan: claims.plan.as_deref(),
            beside: !policy.by_seat,
        };
        let (label, plan) = store::save_account(tx, &account).await?;
        let issued = file.refreshed_at.unwrap_or_else(|| self.db.clock().now());
        let generation = held.iter().map(|row| row.generation).max().unwrap_or(0) + 1;
        let sealed = self.seal(id, &file.tokens);
        store::save_credential(tx, id, &sealed, issued, generation).await?;
        Ok(Imported {
            id,
            created: held.is_empty(),
            merged,
            email: email.cloned(),
            label,
            plan,
        })
    }
}

/// Locks the rows of a login, oldest first. Whoever deletes one at this moment does not know our locks: then it is looked for again.
async fn hold(
    tx: &Tx,
    who: &Who,
    policy: Policy,
    target: Option<AccountId>,
) -> Result<Vec<HeldRow>, Error> {
    loop {
        let target = match target {
            Some(target) => Some(store::canonical(tx, target).await?),
            None => None,
        };
        let rows = store::rows(tx, who, target).await?;
        let ids = match target {
            None => merge::rows_of(who, &rows, policy),
            Some(target) => {
                let mut all = rows.iter();
                let target = all.find(|row| row.id == target).ok_or(Error::Unknown)?;
                merge::rows_for(target, who, &rows, policy).ok_or(Error::OtherSeat)?
            }
        };
        let held = store::hold(tx, &ids).await?;
        if held.len() == ids.len() {
            return Ok(held);
        }
    }
}

/// A deadlock, or a row of the seat that came by a way that takes no lock of ours: an older release, or an import by address alone.
fn again(error: &Error) -> bool {
    let Error::Db(error) = error else {
        return false;
    };
    matches!(error.class(), Class::Retryable) || error.constraint() == Some("accounts_seat_row")
}

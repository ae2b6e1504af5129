//! Stores a login: one row per seat, however often and under whatever address somebody logs in. What [`merge`] decided is carried out in one
//! transaction, under its locks, so that no replica ever sees half of it.

use secrecy::{ExposeSecret as _, SecretString};

use super::{
    Accounts, AuthFile, Error, Imported, email_of,
    flow::Held,
    merge::{self, Policy, Who},
    store::{self, KnownRow, NewAccount},
};
use crate::{
    bus::{self, Topic},
    db::{Class, Tx},
    ids::AccountId,
    routing::Lifecycle,
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
    /// [`Error::Older`], or of the database.
    pub async fn import(&self, file: &AuthFile, label: Option<&str>) -> Result<Imported, Error> {
        self.import_by(Policy::LOGIN, file, label).await
    }

    /// [`Accounts::import`] by another rule of which rows are replaced.
    ///
    /// # Errors
    /// As there.
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
                let tx = self.db.begin_bounded().await?;
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
            mut label,
            flow,
        }: How<'_>,
    ) -> Result<Imported, Error> {
        let target = flow.and_then(Held::wanted);
        let claims = &file.claims;
        let mut who = Who {
            workspace: claims.chatgpt_account_id.clone(),
            user: claims.chatgpt_user_id.clone(),
            email: claims.email.as_deref().map(|email| self.email_hash(email)),
        };
        let new = AccountId::new();
        for (class, key) in merge::locks(&who, policy, new) {
            store::advisory(tx, class, key).await?;
        }
        let held = hold(tx, &who, policy, target).await?;
        if flow.is_none() && held.iter().any(|row| is_newer(row, file)) {
            return Err(Error::Older);
        }
        let (id, merged) = match &held[..] {
            [] => (new, Vec::new()),
            [kept, others @ ..] => (kept.row.id, others.iter().map(|one| one.row.id).collect()),
        };
        for from in &merged {
            store::merge(tx, *from, id).await?;
        }
        // What the login does not say is as it was: of rows that become one, the oldest word counts.
        let mut email = claims.email.clone().map(SecretString::from);
        let mut plan = claims.plan.as_deref();
        for KnownRow {
            row,
            email_sealed,
            label: named,
            plan: known,
            ..
        } in &held
        {
            who.workspace = who.workspace.or_else(|| row.who.workspace.clone());
            who.user = who.user.or_else(|| row.who.user.clone());
            label = label.or(named.as_deref());
            plan = plan.or(known.as_deref());
            if let (None, Some(sealed)) = (&email, email_sealed) {
                email = self
                    .ring
                    .open_text(email_of(&row.id.to_string()), sealed)
                    .ok();
            }
        }
        who.email = email
            .as_ref()
            .map(|email| self.email_hash(email.expose_secret()));
        let email_sealed =
            email.map(|email| self.ring.seal_text(email_of(&id.to_string()), &email));
        let account = NewAccount {
            id,
            who: &who,
            email_sealed: email_sealed.as_deref(),
            label,
            plan,
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
            email: claims.email.clone(),
            label,
            plan,
        })
    }

    fn email_hash(&self, email: &str) -> Vec<u8> {
        let email = email.to_lowercase();
        self.pepper.hash("email", email.as_bytes()).to_vec()
    }
}

/// Whether the row has tokens that are good, as far as is known, and that were issued after those of the file.
fn is_newer(row: &KnownRow, file: &AuthFile) -> bool {
    matches!(row.lifecycle, Lifecycle::Active | Lifecycle::Paused)
        && file
            .refreshed_at
            .is_some_and(|issued| row.refreshed_at > Some(issued))
}

/// Locks the rows of a login, oldest first. Whoever changes one at this moment may not know our locks: it is theirs only if it still is when
/// it is locked.
async fn hold(
    tx: &Tx,
    who: &Who,
    policy: Policy,
    target: Option<AccountId>,
) -> Result<Vec<KnownRow>, Error> {
    let mut held = Vec::new();
    loop {
        let target = match target {
            Some(target) => Some(store::canonical(tx, target).await?),
            None => None,
        };
        let mut known = store::rows(tx, who, target).await?;
        let rows: Vec<merge::Row> = known.iter().map(|known| known.row.clone()).collect();
        let ids = match target {
            None => merge::rows_of(who, &rows, policy),
            Some(target) => {
                let mut all = rows.iter();
                let target = all.find(|row| row.id == target).ok_or(Error::Unknown)?;
                merge::rows_for(target, who, &rows, policy).ok_or(Error::OtherSeat)?
            }
        };
        if ids == held {
            known.retain(|known| ids.contains(&known.row.id));
            known.sort_by_key(|known| ids.iter().position(|id| *id == known.row.id));
            return Ok(known);
        }
        store::hold(tx, &ids).await?;
        held = ids;
    }
}

/// A deadlock, or a row of the seat that came by a way that takes no lock of ours: an older release, or an import by address alone.
fn again(error: &Error) -> bool {
    let Error::Db(error) = error else {
        return false;
    };
    matches!(error.class(), Class::Retryable) || error.constraint() == Some("accounts_seat_row")
}

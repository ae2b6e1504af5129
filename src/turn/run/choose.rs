//! Chooses the account of an attempt and holds the turn's place there.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{sync::Notify, time::Instant, time::timeout_at};

use super::{Finish, Turn};
use crate::{
    ids::AccountId,
    routing::{self, Decision, Load, Points, Policy, family_of},
    turn::Stop,
};

/// How long a turn waits for a place at an account; well within the time that its head may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the choices of one process share.
pub(in crate::turn) struct Chooser {
    policy: Policy,
    points: Points,
    /// Told when a turn has left its account.
    vacated: Notify,
}

impl Chooser {
    pub(in crate::turn) fn new(policy: Policy) -> Self {
        Self {
            policy,
            points: Points::new(rand::random()),
            vacated: Notify::new(),
        }
    }
}

/// A turn in flight at an account.
pub(super) struct Slot<'a> {
    load: Arc<Load>,
    vacated: &'a Notify,
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        self.load.leave();
        self.vacated.notify_waiters();
    }
}

impl Turn<'_> {
    /// The account for the next attempt, where the turn now has its place. Waits for one where all that could serve are full.
    pub(super) async fn choose(
        &mut self,
        preferred: Option<AccountId>,
    ) -> Result<AccountId, Finish> {
        self.slot = None;
        let patience = Instant::now() + PATIENCE;
        let engine = self.engine;
        loop {
            let mut vacated = pin!(engine.chooser.vacated.notified());
            vacated.as_mut().enable();
            match self.look(preferred).map_err(Finish::Stop)? {
                Some(account) => return Ok(account),
                None => match self.unless_over(timeout_at(patience, vacated)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return Err(Finish::Stop(Stop::Busy)),
                    Err(over) => return Err(over.into()),
                },
            }
        }
    }

    /// The account for the next attempt, if there is a place.
    fn look(&mut self, preferred: Option<AccountId>) -> Result<Option<AccountId>, Stop> {
        let engine = self.engine;
        let Chooser {
            policy,
            points,
            vacated,
        } = &engine.chooser;
        let view = engine.upstream.view();
        // What was remembered before accounts were merged means the one that they are now, also where the view is newer than the key.
        let canonical = |account: AccountId| engine.upstream.canonical(account);
        let exhausted = |resets_at| Stop::Exhausted {
            resets_at: self.ask.caller.sees(engine.hide_quota).limits(resets_at),
        };
        let granted = self.ask.caller.accounts();
        let allowed: Option<Vec<AccountId>> =
            granted.map(|granted| granted.iter().copied().map(canonical).collect());
        let model = &self.ask.request.facts.model;
        loop {
            let (number, point) = points.take();
            let ask = routing::Ask {
                now: self.now(),
                model,
                family: family_of(model),
                sticky: preferred.map(canonical),
                tried: &self.tried,
                allowed: allowed.as_deref(),
                anchored: self.ask.request.facts.previous_response_id.is_some(),
                policy: *policy,
                point,
            };
            match routing::select(&view, &ask) {
                Decision::Use(choice) => {
                    let account = choice.account;
                    let load = view.account(account).map(|account| &account.load);
                    let entered =
                        load.is_some_and(|load| load.enter(number, policy.turns_per_account));
                    if !entered {
                        // Another turn took the last place meanwhile.
                        continue;
                    }
                    self.slot = load.map(|load| Slot {
                        load: Arc::clone(load),
                        vacated,
                    });
                    self.detour |= choice.sticky == routing::Sticky::Detour;
                    self.choice = Some(choice);
                    return Ok(Some(account));
                }
                Decision::Exhausted { resets_at, .. } => return Err(exhausted(resets_at)),
                Decision::Busy { .. } => return Ok(None),
                Decision::Nobody { explanation } => {
                    // Accounts that failed in this turn may all be at their limits by now: then that is what the client should read.
                    let ask = routing::Ask { tried: &[], ..ask };
                    return Err(match routing::select(&view, &ask) {
                        Decision::Exhausted { resets_at, .. } => exhausted(resets_at),
                        _ => Stop::Nobody {
                            why: explanation.to_string(),
                        },
                    });
                }
            }
        }
    }
}

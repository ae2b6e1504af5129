//! The sessions of this replica, found by lease, by key and by the response that their socket remembers.
//!
//! The registry is a map of handles; what a session is doing it says itself, through its handle. Claims of one key are made one at a time,
//! so that a process never fences itself.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{OwnedMutexGuard, mpsc, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::{Item, relay, session::Job};
use crate::{
    ids::{BootId, LeaseId, ScopeId},
    lease::{Held, Key},
};

/// What a session is doing, as it says itself.
#[derive(Clone, Debug)]
pub(super) struct State {
    /// The turn that runs.
    pub(super) running: Option<relay::Watch<Item>>,
    /// The response that upstream remembers on its socket.
    pub(super) head: Option<Arc<str>>,
    /// When it last became idle.
    pub(super) since: Instant,
}

/// A session, as others reach it.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    pub(super) scope: ScopeId,
    pub(super) held: Held,
    pub(super) jobs: mpsc::Sender<Box<Job>>,
    pub(super) state: watch::Receiver<State>,
    /// Turns that were sent to it and have not ended.
    pub(super) queued: Arc<AtomicUsize>,
    /// Asks it to end as soon as it is idle.
    pub(super) retire: CancellationToken,
}

impl Handle {
    /// Nothing runs and nothing waits.
    pub(super) fn is_idle(&self) -> bool {
        self.queued.load(Ordering::Acquire) == 0
    }

    /// Whether upstream would know this response id.
    pub(super) fn remembers(&self, response_id: &str) -> bool {
        self.state.borrow().head.as_deref() == Some(response_id)
    }

    /// Whether the turn that runs, or ran last, has lost its client.
    pub(super) fn is_abandoned(&self) -> bool {
        let running = self.state.borrow().running.clone();
        running.is_some_and(|running| running.is_abandoned())
    }

    /// Hurries an abandoned turn to its end, and waits for it at most `patience`.
    pub(super) async fn hurry(&self, patience: Duration) {
        let mut state = self.state.clone();
        if let Some(running) = &state.borrow_and_update().running {
            running.hurry();
        }
        drop(timeout(patience, state.wait_for(|state| state.running.is_none())).await);
    }
}

/// How many sessions there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sessions {
    /// All of them.
    pub open: usize,
    /// Those in a turn.
    pub busy: usize,
    /// As many as there may be.
    pub limit: usize,
}

/// The handles. Cheap to share.
#[derive(Debug)]
pub(super) struct Registry {
    most: usize,
    index: Mutex<Index>,
}

#[derive(Debug, Default)]
struct Index {
    leases: HashMap<LeaseId, Handle>,
    keys: HashMap<(ScopeId, Key), LeaseId>,
    heads: HashMap<(ScopeId, Arc<str>), LeaseId>,
    claims: HashMap<(ScopeId, Key), Weak<tokio::sync::Mutex<()>>>,
}

impl Index {
    fn forget(&mut self, handle: &Handle) {
        let (scope, held) = (handle.scope, &handle.held);
        self.leases.remove(&held.lease);
        if self.keys.get(&(scope, held.key)) == Some(&held.lease) {
            self.keys.remove(&(scope, held.key));
        }
        if let Some(head) = handle.state.borrow().head.clone() {
            self.heads.remove(&(scope, head));
        }
    }
}

impl Registry {
    /// Room for `most` sessions.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            index: Mutex::default(),
        }
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn by_lease(&self, scope: ScopeId, lease: LeaseId) -> Option<Handle> {
        let index = self.index();
        let handle = index.leases.get(&lease)?;
        (handle.scope == scope).then(|| handle.clone())
    }

    pub(super) fn by_key(&self, scope: ScopeId, key: Key) -> Option<Handle> {
        let index = self.index();
        let lease = index.keys.get(&(scope, key))?;
        index.leases.get(lease).cloned()
    }

    /// The session whose socket remembers a response.
    pub(super) fn by_head(&self, scope: ScopeId, response_id: &str) -> Option<Handle> {
        let index = self.index();
        let lease = index.heads.get(&(scope, response_id.into()))?;
        index.leases.get(lease).cloned()
    }

    /// Whether there are as many sessions as there may be, all of them busy.
    pub(super) fn is_full(&self) -> bool {
        let index = self.index();
        index.leases.len() >= self.most && !index.leases.values().any(Handle::is_idle)
    }

    /// Enters a session, if it must in the place of the one that has been idle longest. Of two with the same lease the older generation is
    /// told to retire.
    pub(super) fn insert(&self, handle: Handle) {
        let mut index = self.index();
        let (scope, held) = (handle.scope, handle.held);
        if let Some(present) = index.leases.get(&held.lease) {
            if present.held.generation > held.generation {
                handle.retire.cancel();
                return;
            }
            present.retire.cancel();
        } else if index.leases.len() >= self.most {
            let idle = index.leases.values().filter(|handle| handle.is_idle());
            let oldest = idle
                .min_by_key(|handle| handle.state.borrow().since)
                .cloned();
            if let Some(oldest) = oldest {
                oldest.retire.cancel();
                index.forget(&oldest);
            }
        }
        index.keys.insert((scope, held.key), held.lease);
        index.leases.insert(held.lease, handle);
    }

    /// Removes a session, unless its lease has a newer one.
    pub(super) fn remove(&self, scope: ScopeId, held: &Held) {
        let mut index = self.index();
        let newest = index.leases.get(&held.lease).cloned();
        if let Some(handle) = newest.filter(|newest| newest.held.generation == held.generation) {
            debug_assert_eq!(handle.scope, scope, "a lease has one scope");
            index.forget(&handle);
        }
    }

    /// A session's socket remembers `now` instead of `before`.
    pub(super) fn moved(
        &self,
        scope: ScopeId,
        lease: LeaseId,
        before: Option<&Arc<str>>,
        now: Option<&Arc<str>>,
    ) {
        let mut index = self.index();
        if let Some(before) = before {
            index.heads.remove(&(scope, Arc::clone(before)));
        }
        if let Some(now) = now {
            index.heads.insert((scope, Arc::clone(now)), lease);
        }
    }

    /// One claim of a key at a time.
    pub(super) async fn claiming(&self, scope: ScopeId, key: Key) -> OwnedMutexGuard<()> {
        let lock = {
            let mut index = self.index();
            let known = index.claims.get(&(scope, key)).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                // Those of claims that are over go when there are many.
                if index.claims.len() > self.most {
                    index.claims.retain(|_, lock| lock.strong_count() > 0);
                }
                let lock = Arc::new(tokio::sync::Mutex::new(()));
                index.claims.insert((scope, key), Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }

    /// Tells every session to end as soon as it is idle.
    pub(super) fn retire_all(&self) {
        for handle in self.index().leases.values() {
            handle.retire.cancel();
        }
    }

    /// Tells the sessions of other incarnations of this process to end: their leases are not ours any more.
    pub(super) fn retire_others(&self, boot: BootId) {
        for handle in self.index().leases.values() {
            if handle.held.boot != boot {
                handle.retire.cancel();
            }
        }
    }

    /// Sessions now.
    pub(super) fn count(&self) -> Sessions {
        let index = self.index();
        let busy = index.leases.values().filter(|handle| !handle.is_idle());
        Sessions {
            open: index.leases.len(),
            busy: busy.count(),
            limit: self.most,
        }
    }
}

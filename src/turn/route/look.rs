//! What is known of a turn's conversation: its evidence, the session here, the row, the snapshot.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::Router;
use crate::{
    config, db,
    ids::LeaseId,
    lease::{self, Owner},
    token,
    turn::{
        Inner, Transport,
        affinity::affinity,
        registry::Handle,
        resolve::{Continuity, Evidence, Inputs, Key as KeyStrength, Local, Row as RowState},
    },
};

/// A read or a compare-and-set of a lease.
const STATEMENT: Duration = Duration::from_secs(2);

/// There is nothing to resolve: the turn needs no lease.
pub(super) struct NoSession;

/// What the evidence names, and what is known of it.
pub(super) struct Known {
    pub(super) key: Option<(lease::Key, KeyStrength)>,
    /// The lease that the evidence names.
    pub(super) lease: Option<LeaseId>,
    pub(super) local: Option<Handle>,
    pub(super) row: Option<lease::Row>,
    pub(super) inputs: Inputs,
}

impl Router {
    /// Reads the evidence.
    pub(super) async fn look(&mut self) -> Result<Known, NoSession> {
        let engine = Arc::clone(&self.engine);
        let facts = &self.ask.request.facts;
        let affinity = affinity(&self.ask);
        let key = affinity.as_ref().map(|affinity| {
            let strength = if affinity.is_hard() {
                KeyStrength::Hard
            } else {
                KeyStrength::Soft
            };
            (affinity.lease(), strength)
        });
        let socket = self.ask.transport == Transport::WebSocket;
        let now = engine.upstream.clock().now().as_second();
        let presented = self.ask.turn_state.as_deref();
        let (mut evidence, mut lease) = match engine.tokens.read(presented, self.scope, now) {
            token::Token::None => (Evidence::None, None),
            token::Token::Good(lease) => (Evidence::Token, Some(lease)),
            token::Token::Old(lease) => (Evidence::Old, Some(lease)),
            token::Token::Invalid => (Evidence::Invalid, None),
            token::Token::UnknownKey => (Evidence::UnknownKey, None),
        };
        // What a client's socket rode before is as good as a token; where a peer saw the lease is where to look.
        let own_key = key.is_some_and(|(_, strength)| strength == KeyStrength::Hard);
        if evidence == Evidence::None
            && !own_key
            && let Some(line) = self.ask.line
        {
            (evidence, lease) = (Evidence::Token, Some(line));
        }
        if evidence == Evidence::None && key.is_none() && self.forwarded.is_some() {
            evidence = Evidence::Token;
        }
        // Where a peer saw the lease contradicts nobody.
        let told = lease;
        lease = lease.or(self.forwarded);
        let previous = facts.previous_response_id.as_deref();
        let mut local = lease.and_then(|lease| engine.sessions.by_lease(self.scope, lease));
        let mut conflict = false;
        let mut snapshot = None;
        if let Some(id) = previous {
            let remembers = local.as_ref().is_some_and(|local| local.remembers(id));
            if let Some(handle) = engine
                .sessions
                .by_head(self.scope, id)
                .filter(|_| !remembers)
            {
                conflict = told.is_some_and(|lease| lease != handle.held.lease);
                if !conflict && evidence != Evidence::Invalid {
                    (evidence, lease) = (Evidence::Token, Some(handle.held.lease));
                    local = Some(handle);
                }
            }
            let known_here = local.as_ref().is_some_and(|local| local.remembers(id));
            if !known_here && evidence != Evidence::Invalid {
                match engine.within(engine.snapshots.find(self.scope, id)).await {
                    Some(found) => {
                        snapshot = Some(found.as_ref().is_some_and(|found| found.complete));
                        let named = found.and_then(|found| found.lease);
                        if let Some(named) = named {
                            conflict |= told.is_some_and(|lease| lease != named);
                            if lease.is_none() {
                                (evidence, lease) = (Evidence::Token, Some(named));
                                local = engine.sessions.by_lease(self.scope, named);
                            }
                        }
                    }
                    None => return Ok(self.away()),
                }
            }
        }
        if evidence == Evidence::Old && previous.is_none() && local.is_none() && key.is_some() {
            // Too old to bring its conversation back; the key may have one.
            lease = None;
        }
        if lease.is_none()
            && let Some((key, _)) = key
        {
            local = engine.sessions.by_key(self.scope, key);
        }
        if engine.upstream.transport() == config::Transport::Http
            || (lease.is_none() && key.is_none() && previous.is_none() && !socket)
        {
            // An invalid token is told as such whatever else would be done.
            if evidence != Evidence::Invalid {
                return Err(NoSession);
            }
        }
        let me = engine.replica.boot();
        local = local.filter(|handle| handle.held.boot == me);
        // Without heartbeats peers may bury us at any moment: nothing is begun on a lease. While Postgres is known to be away, a turn that
        // needs no lease does not wait for it.
        let unleased = local.is_none() && previous.is_none() && engine.ledger.is_away();
        if evidence != Evidence::Invalid && (unleased || !engine.replica.admits()) {
            return Ok(self.away());
        }
        let mut row = None;
        // A session here is believed until a turn of it is fenced; one in a turn may take long to find out that an operator has freed its
        // lease. A conversation that names nothing but its key is claimed unread: if it has an owner, the claim says so.
        let named = lease.is_some() || previous.is_some();
        let in_turn = local.as_ref().is_some_and(|local| !local.is_idle());
        let doubted = self.again || (in_turn && !engine.ledger.is_away());
        let state = if evidence == Evidence::Invalid || (local.is_some() && !doubted) {
            RowState::Mine
        } else if !named && !doubted {
            RowState::Free
        } else {
            let read = async {
                match (lease, key) {
                    (Some(lease), _) => engine.leases.by_id(me, self.scope, lease).await,
                    (None, Some((key, _))) => engine.leases.by_key(me, self.scope, key).await,
                    (None, None) => Ok(None),
                }
            };
            match engine.within(read).await {
                Some(found) => row = found,
                None => return Ok(self.away()),
            }
            row_state(&engine, row.as_ref())
        };
        if let (Some(handle), true) = (&local, self.again)
            && row.as_ref().map(|row| row.generation) != Some(handle.held.generation)
        {
            handle.retire.cancel();
            engine.sessions.remove(self.scope, &handle.held);
            local = None;
        }
        let remembers = match (&local, previous) {
            (Some(handle), Some(id)) => handle.remembers(id),
            (local, None) => local.is_some(),
            (None, Some(_)) => false,
        };
        let local_state = match &local {
            None => Local::None,
            Some(handle) if handle.is_idle() => Local::Idle { remembers },
            Some(handle) => Local::Busy {
                remembers,
                abandoned: !self.hurried && handle.is_abandoned(),
            },
        };
        let continuity = match (previous, snapshot) {
            (None, _) => Continuity::Optional,
            (Some(_), Some(snapshot)) => Continuity::Required { snapshot },
            (Some(_), None) if remembers || evidence == Evidence::Invalid => {
                Continuity::Required { snapshot: false }
            }
            // It did when it was looked at first: a turn has ended since.
            (Some(id), None) => match engine.within(engine.snapshots.find(self.scope, id)).await {
                Some(found) => Continuity::Required {
                    snapshot: found.is_some_and(|found| found.complete),
                },
                None => return Ok(self.away()),
            },
        };
        let full = engine.sessions.is_full();
        Ok(Known {
            key,
            lease,
            local,
            row,
            inputs: Inputs {
                evidence,
                key: key.map_or(KeyStrength::None, |(_, strength)| strength),
                local: local_state,
                row: state,
                continuity,
                conflict,
                draining: engine.is_closing(),
                full,
                forwarded: self.forwarded.is_some(),
                socket: socket && !self.asked,
            },
        })
    }

    /// What is known while Postgres does not answer: no lease can be used, whatever the evidence names.
    pub(super) fn away(&self) -> Known {
        let required = self.ask.request.facts.previous_response_id.is_some();
        let continuity = if required {
            Continuity::Required { snapshot: false }
        } else {
            Continuity::Optional
        };
        Known {
            key: None,
            lease: None,
            local: None,
            row: None,
            inputs: Inputs {
                evidence: Evidence::None,
                key: KeyStrength::None,
                local: Local::None,
                row: RowState::Unknown,
                continuity,
                conflict: false,
                draining: self.engine.is_closing(),
                full: false,
                forwarded: self.forwarded.is_some(),
                socket: false,
            },
        }
    }
}

/// What a row says to `resolve`.
fn row_state(engine: &Inner, row: Option<&lease::Row>) -> RowState {
    match row.map(|row| &row.owner) {
        None => RowState::Absent,
        Some(Owner::Nobody) => RowState::Free,
        Some(Owner::Me) => RowState::Mine,
        Some(Owner::Dead) => RowState::Dead,
        Some(Owner::Other {
            endpoint, draining, ..
        }) => RowState::Remote {
            forwardable: engine.peers.is_some() && endpoint.is_some() && !draining,
        },
    }
}

impl Inner {
    /// The answer of a statement; `None` when Postgres does not give one in time.
    pub(super) async fn within<T>(
        &self,
        statement: impl Future<Output = Result<T, db::Error>>,
    ) -> Option<T> {
        let asked = Instant::now();
        match tokio::time::timeout(STATEMENT, statement).await {
            Ok(Ok(value)) => Some(value),
            Ok(Err(error)) => {
                tracing::warn!(%error, "continuity cannot be read");
                if error.is_unavailable() {
                    self.ledger.missed(asked, STATEMENT);
                }
                None
            }
            Err(_) => {
                tracing::warn!("continuity cannot be read within 2 s");
                self.ledger.missed(asked, STATEMENT);
                None
            }
        }
    }
}

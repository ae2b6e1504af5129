//! How a conversation is continued, as a function of what is known: evidence, local session, row, continuity, snapshot.
//!
//! Whether continuity is required comes from the request's own evidence, a `previous_response_id`, never from the kind of key. Nothing is
//! asked and nothing done here. What acts on the decision is a compare-and-set, so a decision may be out of date without harm.

#[cfg(test)]
mod tests;
pub mod words;

/// What the request brings to name its conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// At most a key.
    None,
    /// A token, or a known response: it names a lease.
    Token,
    /// A token older than a day.
    Old,
    /// A token that is damaged, forged or of another scope.
    Invalid,
    /// A token under a master key that is gone.
    UnknownKey,
}

/// What the request says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Nothing.
    None,
    /// A prompt cache key: several conversations may share it.
    Soft,
    /// A thread or a session.
    Hard,
}

/// The session of the conversation on this replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Local {
    /// There is none.
    None,
    /// It waits.
    Idle {
        /// Its socket knows the response that the request continues, or the request continues none.
        remembers: bool,
    },
    /// It runs a turn.
    Busy {
        /// As above.
        remembers: bool,
        /// The client of that turn is gone.
        abandoned: bool,
    },
}

/// The lease's row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// There is none.
    Absent,
    /// This incarnation owns it.
    Mine,
    /// Another one does, and nobody has declared it dead.
    Remote {
        /// Turns can be sent there.
        forwardable: bool,
    },
    /// Its owner was declared dead.
    Dead,
    /// Nobody owns it.
    Free,
    /// Postgres does not say.
    Unknown,
}

/// Whether the request stands by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Continuity {
    /// It brings all that it needs.
    Optional,
    /// It continues a response.
    Required {
        /// The whole chain is kept in this scope.
        snapshot: bool,
    },
}

/// All that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inputs {
    /// What names the conversation.
    pub evidence: Evidence,
    /// What the request says of itself.
    pub key: Key,
    /// The session here.
    pub local: Local,
    /// The row.
    pub row: Row,
    /// Whether the request stands by itself.
    pub continuity: Continuity,
    /// Token and response name different leases.
    pub conflict: bool,
    /// This replica takes no new work.
    pub draining: bool,
    /// Every session that there may be is busy.
    pub full: bool,
    /// A peer sent it: it is served here or refused, never sent on.
    pub forwarded: bool,
    /// The client is on a WebSocket of this replica, and will be for its next turn.
    pub socket: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send it to the session here.
    Reuse,
    /// The same; upstream is told everything again.
    Rebuild,
    /// Hurry the turn whose client is gone, then look again.
    Hurry,
    /// The session here has lost its lease: end it, then look again.
    Evict,
    /// Send it to the owner.
    Forward,
    /// Claim the lease.
    Claim,
    /// Take the idle lease from its owner; [`owner_silent`] says what if that fails.
    Take,
    /// Claim a lease of its own.
    Fork,
    /// Serve it without a lease.
    Detached,
    /// Refuse it.
    Reject(Reject),
}

/// What becomes of the conversation, by its name in metrics, logs and the request log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum Outcome {
    LiveAliasReuse,
    OwnerForward,
    StaleRecovery,
    SnapshotRecovery,
    FreshStart,
    Fork,
    TokenInvalid,
    WrongInstance,
    ExpiredContinuity,
    PreviousResponseNotFound,
    ContinuityConflict,
    OwnerUnreachable,
    MetadataUnavailable,
    Draining,
    Overloaded,
}

impl Outcome {
    /// The word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LiveAliasReuse => "live_alias_reuse",
            Self::OwnerForward => "owner_forward",
            Self::StaleRecovery => "stale_recovery",
            Self::SnapshotRecovery => "snapshot_recovery",
            Self::FreshStart => "fresh_start",
            Self::Fork => "fork",
            Self::TokenInvalid => "token_invalid",
            Self::WrongInstance => "wrong_instance",
            Self::ExpiredContinuity => "expired_continuity",
            Self::PreviousResponseNotFound => "previous_response_not_found",
            Self::ContinuityConflict => "continuity_conflict",
            Self::OwnerUnreachable => "owner_unreachable",
            Self::MetadataUnavailable => "metadata_unavailable",
            Self::Draining => "draining",
            Self::Overloaded => "overloaded",
        }
    }
}

/// Why a conversation cannot be continued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reject {
    /// The token is not one of this scope's.
    TokenInvalid,
    /// Another replica owns it, and turns are not sent there.
    WrongInstance,
    /// The token's conversation is gone.
    ExpiredContinuity,
    /// Nobody knows the response.
    PreviousResponseNotFound,
    /// Token and response name different conversations.
    ContinuityConflict,
    /// Its owner does not answer, and is not dead yet.
    OwnerUnreachable,
    /// Postgres does not answer.
    MetadataUnavailable,
    /// This replica is leaving.
    Draining,
    /// There is no room.
    Overloaded,
}

impl Reject {
    /// The outcome of the same name.
    #[must_use]
    pub fn outcome(self) -> Outcome {
        match self {
            Self::TokenInvalid => Outcome::TokenInvalid,
            Self::WrongInstance => Outcome::WrongInstance,
            Self::ExpiredContinuity => Outcome::ExpiredContinuity,
            Self::PreviousResponseNotFound => Outcome::PreviousResponseNotFound,
            Self::ContinuityConflict => Outcome::ContinuityConflict,
            Self::OwnerUnreachable => Outcome::OwnerUnreachable,
            Self::MetadataUnavailable => Outcome::MetadataUnavailable,
            Self::Draining => Outcome::Draining,
            Self::Overloaded => Outcome::Overloaded,
        }
    }

    /// The status and code that a client of HTTP gets.
    #[must_use]
    pub fn answer(self) -> (u16, &'static str) {
        match self {
            Self::TokenInvalid => (409, "bridge_token_invalid"),
            Self::WrongInstance => (409, "bridge_wrong_instance"),
            Self::ExpiredContinuity => (409, "bridge_session_expired"),
            Self::PreviousResponseNotFound => (400, "previous_response_not_found"),
            Self::ContinuityConflict => (409, "continuity_conflict"),
            Self::OwnerUnreachable => (503, "bridge_owner_unreachable"),
            Self::MetadataUnavailable => (503, "continuity_unavailable"),
            Self::Draining => (503, "bridge_drain_active"),
            Self::Overloaded => (429, "bridge_capacity"),
        }
    }
}

/// A decision: what to do, what it is called, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resolution {
    /// Its name.
    pub outcome: Outcome,
    /// Why, out of a bounded set of words.
    pub reason: &'static str,
    /// What to do.
    pub step: Step,
}

fn to(outcome: Outcome, reason: &'static str, step: Step) -> Resolution {
    Resolution {
        outcome,
        reason,
        step,
    }
}

fn refuse(reject: Reject, reason: &'static str) -> Resolution {
    to(reject.outcome(), reason, Step::Reject(reject))
}

/// Decides. The tests are the decision table, row by row.
#[must_use]
pub fn resolve(inputs: &Inputs) -> Resolution {
    within_room(inputs, decide(inputs))
}

/// Where every session is busy, a request that brings everything goes without one, and only one that does not is refused.
fn within_room(inputs: &Inputs, decided: Resolution) -> Resolution {
    if !inputs.full || !matches!(decided.step, Step::Claim | Step::Fork | Step::Take) {
        return decided;
    }
    match (inputs.continuity, inputs.row) {
        (_, Row::Remote { forwardable: true })
            if !inputs.forwarded && decided.step == Step::Take =>
        {
            to(Outcome::OwnerForward, "no_room", Step::Forward)
        }
        (Continuity::Optional, _) => to(Outcome::FreshStart, "no_room", Step::Detached),
        (Continuity::Required { .. }, _) => refuse(Reject::Overloaded, "no_room"),
    }
}

fn decide(inputs: &Inputs) -> Resolution {
    if inputs.evidence == Evidence::Invalid {
        return refuse(Reject::TokenInvalid, "invalid_token");
    }
    if inputs.draining {
        return refuse(Reject::Draining, "draining");
    }
    if inputs.row == Row::Unknown {
        return match inputs.continuity {
            Continuity::Optional => to(Outcome::FreshStart, "postgres_away", Step::Detached),
            Continuity::Required { .. } => refuse(Reject::MetadataUnavailable, "postgres_away"),
        };
    }
    if inputs.conflict {
        return match inputs.continuity {
            Continuity::Required { snapshot: true } => {
                to(Outcome::SnapshotRecovery, "response_wins", Step::Fork)
            }
            _ => refuse(Reject::ContinuityConflict, "token_and_response_differ"),
        };
    }
    if inputs.local != Local::None && inputs.row != Row::Mine {
        return to(Outcome::StaleRecovery, "lease_lost", Step::Evict);
    }
    match (inputs.local, inputs.continuity) {
        (Local::None, Continuity::Optional) => optional(inputs),
        (Local::None, Continuity::Required { snapshot }) => required(inputs, snapshot),
        (
            Local::Busy {
                abandoned: true, ..
            },
            _,
        ) => to(Outcome::LiveAliasReuse, "abandoned_turn", Step::Hurry),
        (Local::Idle { .. }, Continuity::Optional)
        | (Local::Idle { remembers: true }, Continuity::Required { .. }) => {
            to(Outcome::LiveAliasReuse, "idle", Step::Reuse)
        }
        // A token asks for this very session; a key that two requests share at once does not.
        (Local::Busy { .. }, Continuity::Optional) if inputs.evidence == Evidence::None => {
            to(Outcome::Fork, "session_busy", Step::Fork)
        }
        (Local::Busy { .. }, Continuity::Optional)
        | (
            Local::Busy {
                remembers: true, ..
            },
            Continuity::Required { .. },
        ) => to(Outcome::LiveAliasReuse, "queued", Step::Reuse),
        (Local::Idle { .. }, Continuity::Required { snapshot: true }) => {
            to(Outcome::SnapshotRecovery, "not_the_head", Step::Rebuild)
        }
        (Local::Busy { .. }, Continuity::Required { snapshot: true }) => {
            to(Outcome::SnapshotRecovery, "session_busy", Step::Fork)
        }
        (_, Continuity::Required { snapshot: false }) => {
            refuse(Reject::PreviousResponseNotFound, "not_the_head")
        }
    }
}

/// A request that brings everything, without a session here.
fn optional(inputs: &Inputs) -> Resolution {
    let named = matches!(inputs.evidence, Evidence::Token | Evidence::Old);
    if let Row::Remote { forwardable } = inputs.row {
        return if inputs.forwarded {
            refuse(Reject::WrongInstance, "not_owner")
        } else if !named && inputs.key == Key::Soft {
            to(Outcome::Fork, "soft_key_elsewhere", Step::Fork)
        } else if inputs.socket {
            to(Outcome::StaleRecovery, "to_the_clients_socket", Step::Take)
        } else if forwardable {
            to(Outcome::OwnerForward, "owner_elsewhere", Step::Forward)
        } else {
            to(Outcome::StaleRecovery, "owner_takes_no_turns", Step::Take)
        };
    }
    match (inputs.evidence, inputs.row) {
        (Evidence::Token, Row::Dead) => to(Outcome::StaleRecovery, "owner_dead", Step::Claim),
        (Evidence::Token, Row::Free) => to(Outcome::StaleRecovery, "owner_free", Step::Claim),
        (Evidence::Token, Row::Absent) => to(Outcome::StaleRecovery, "purged", Step::Claim),
        (Evidence::Token, _) => to(Outcome::StaleRecovery, "session_gone", Step::Claim),
        (Evidence::Old, _) => to(Outcome::FreshStart, "old_token", Step::Claim),
        (Evidence::UnknownKey, _) => to(Outcome::FreshStart, "unknown_key", Step::Claim),
        (_, Row::Dead) => to(Outcome::FreshStart, "owner_dead", Step::Claim),
        (_, Row::Mine) => to(Outcome::FreshStart, "session_gone", Step::Claim),
        _ => to(Outcome::FreshStart, "owner_free", Step::Claim),
    }
}

/// A request that continues a response, without a session here.
fn required(inputs: &Inputs, snapshot: bool) -> Resolution {
    if let Row::Remote { forwardable } = inputs.row {
        return if inputs.forwarded {
            refuse(Reject::WrongInstance, "not_owner")
        } else if forwardable {
            // Its socket may remember, which is cheaper than telling everything again.
            to(Outcome::OwnerForward, "owner_elsewhere", Step::Forward)
        } else if snapshot {
            to(
                Outcome::SnapshotRecovery,
                "owner_takes_no_turns",
                Step::Fork,
            )
        } else {
            refuse(Reject::WrongInstance, "owner_takes_no_turns")
        };
    }
    if !snapshot {
        return if inputs.evidence == Evidence::None {
            refuse(Reject::PreviousResponseNotFound, "unknown_response")
        } else {
            refuse(Reject::ExpiredContinuity, "no_snapshot")
        };
    }
    let reason = match inputs.row {
        Row::Dead => "owner_dead",
        Row::Mine => "session_gone",
        Row::Absent => "purged",
        _ => "owner_free",
    };
    to(Outcome::SnapshotRecovery, reason, Step::Claim)
}

/// Decides what to do when the owner gave no answer to a turn that was sent to it. `taken`: `None` before its lease was tried, else what
/// came of it. The turn's own row in the ledger decides whether it was begun, so serving it here cannot serve it twice.
#[must_use]
pub fn owner_silent(inputs: &Inputs, taken: Option<bool>) -> Resolution {
    let decided = match (inputs.continuity, taken) {
        (Continuity::Required { snapshot: false }, _) => {
            refuse(Reject::OwnerUnreachable, "owner_silent")
        }
        (Continuity::Optional, None | Some(true)) => {
            to(Outcome::StaleRecovery, "owner_silent", Step::Take)
        }
        (Continuity::Optional, Some(false)) => to(Outcome::Fork, "owner_silent", Step::Fork),
        (Continuity::Required { snapshot: true }, None | Some(true)) => {
            to(Outcome::SnapshotRecovery, "owner_silent", Step::Take)
        }
        (Continuity::Required { snapshot: true }, Some(false)) => {
            to(Outcome::SnapshotRecovery, "owner_silent", Step::Fork)
        }
    };
    let silent = Row::Remote { forwardable: false };
    within_room(
        &Inputs {
            row: silent,
            ..*inputs
        },
        decided,
    )
}

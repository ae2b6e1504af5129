//! The table: (failure class, phase, tries so far) -> (what next, effect on the account).

use super::{Class, Deadline, Failure};
use crate::protocol::event::Kind;

/// At most so many accounts are tried for one request.
pub const MAX_ACCOUNTS: u8 = 3;

/// At most so many further tries at one account for an HTTP 500.
pub const MAX_SAME_ACCOUNT: u8 = 2;

/// How far an attempt had come when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// No byte of the request can have reached upstream.
    BeforeSend,
    /// The request was sent, or may have been; no event has come.
    Sent,
    /// Upstream has named the response; the client has seen no output.
    Created,
    /// The client has seen output.
    Visible,
}

impl Phase {
    /// The phase after an event of kind `kind`.
    pub fn after(self, kind: Kind) -> Self {
        match kind {
            kind if kind.is_visible() => Self::Visible,
            Kind::Created | Kind::InProgress => self.max(Self::Created),
            _ => self,
        }
    }
}

/// What was tried already for this request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tries {
    /// Accounts tried, the current one included.
    pub accounts: u8,
    /// Repeats at the current account.
    pub same_account: u8,
    /// The current account's credential was refreshed for this request.
    pub refreshed: bool,
}

impl Tries {
    /// What is known of them at the next account.
    #[must_use]
    pub fn at_next_account(self) -> Self {
        Self {
            accounts: self.accounts.saturating_add(1),
            ..Self::default()
        }
    }
}

/// What to do with the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Next {
    /// Try the account again, on a new connection.
    SameAccount {
        /// Only once its credential was refreshed; if that fails, as if this account had failed for good.
        after_refresh: bool,
    },
    /// Try another account.
    NextAccount,
    /// Tell the client.
    Surface,
}

/// What the failure means for the account that it happened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Nothing: it is not the account's fault.
    None,
    /// Its limit is reached: block the failure's family.
    Block {
        /// Until when, epoch seconds; `None` leaves the guess to the quota.
        until: Option<i64>,
    },
    /// Its access token is no good: refresh it.
    RefreshCredential,
    /// Its owner must log in again.
    ReauthRequired,
    /// It is gone.
    Deactivate,
    /// Count one error against its health.
    Penalise,
}

/// Decides on a failure. Pure: the caller counts the tries and carries out the effect.
pub fn decide(failure: &Failure, phase: Phase, tries: Tries) -> (Next, Effect) {
    use Phase::{BeforeSend, Created, Sent, Visible};
    let other = if tries.accounts < MAX_ACCOUNTS {
        Next::NextAccount
    } else {
        Next::Surface
    };
    let once = |otherwise| {
        if tries.same_account == 0 {
            AGAIN
        } else {
            otherwise
        }
    };
    let refresh = if tries.refreshed {
        other
    } else {
        Next::SameAccount {
            after_refresh: true,
        }
    };
    let cure = |incurable| {
        if tries.refreshed {
            incurable
        } else {
            Effect::RefreshCredential
        }
    };

    let (next, effect) = match (failure.class, phase) {
        // The account's limits and standing: another account answers differently. A limit is met before any work, so it counts
        // against no number of tries: every account of the pool may be asked.
        (Class::RateLimit | Class::Quota, _) => (
            Next::NextAccount,
            Effect::Block {
                until: failure.blocked_until(),
            },
        ),
        (Class::Auth, _) => (refresh, cure(Effect::Penalise)),
        (Class::ReauthRequired, _) => (refresh, cure(Effect::ReauthRequired)),
        (Class::Deactivated, _) => (other, Effect::Deactivate),
        // Once, wherever it is offered; the refusal is the answer if two accounts agree.
        (Class::ModelUnsupported, _) if tries.accounts > 1 => (Next::Surface, Effect::None),
        (Class::ModelUnsupported, _) => (other, Effect::None),

        // Upstream's own trouble. Once the response exists, a repeat might be charged and run twice.
        (Class::Transient, BeforeSend | Sent)
            if failure.status == Some(500) && tries.same_account < MAX_SAME_ACCOUNT =>
        {
            (AGAIN, Effect::None)
        }
        (Class::Transient, BeforeSend | Sent) => (other, Effect::Penalise),
        (Class::Transient, Created | Visible) => (Next::Surface, Effect::Penalise),
        (Class::Overloaded, BeforeSend | Sent) => (other, Effect::None),
        (Class::Overloaded, Created | Visible) => (Next::Surface, Effect::None),

        // Ours: another account's login may be in memory.
        (Class::Database, _) => (other, Effect::None),

        // The way there. A stream that breaks off is repeated once, without a tour of the pool.
        (Class::ConnectionLimit, _) => (once(other), Effect::None),
        (Class::Network, BeforeSend) => (once(other), Effect::None),
        (Class::Network, Sent | Created | Visible) => (Next::Surface, Effect::None),
        (Class::Truncated, BeforeSend | Sent) => (once(Next::Surface), Effect::None),
        (Class::Truncated, Created | Visible) => (once(Next::Surface), Effect::Penalise),
        (Class::Timeout(Deadline::Total), _) => (Next::Surface, Effect::None),
        (Class::Timeout(_), _) => (other, Effect::None),

        // The request's own, or nobody's.
        (Class::PreviousResponseNotFound | Class::Request, _) => (Next::Surface, Effect::None),
        (Class::TooLarge | Class::Cancelled, _) => (Next::Surface, Effect::None),
    };
    // The hard rule, over every row.
    if phase == Visible {
        (Next::Surface, effect)
    } else {
        (next, effect)
    }
}

const AGAIN: Next = Next::SameAccount {
    after_refresh: false,
};

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000;
    const REFRESHED: Next = Next::SameAccount {
        after_refresh: true,
    };
    const FIRST: Tries = Tries {
        accounts: 1,
        same_account: 0,
        refreshed: false,
    };
    const AGAIN_1: Tries = Tries {
        same_account: 1,
        ..FIRST
    };
    const AGAIN_2: Tries = Tries {
        same_account: 2,
        ..FIRST
    };
    const AFTER_REFRESH: Tries = Tries {
        refreshed: true,
        ..AGAIN_1
    };
    const SECOND: Tries = Tries {
        accounts: 2,
        ..FIRST
    };
    const LAST: Tries = Tries {
        accounts: 3,
        ..FIRST
    };
    const LAST_AFTER_REFRESH: Tries = Tries {
        accounts: 3,
        ..AFTER_REFRESH
    };

    #[test]
    fn a_pool_of_hundreds_may_be_asked_and_the_number_of_tries_never_starts_anew() {
        let mut tries = AFTER_REFRESH;
        for _ in 0..300 {
            tries = tries.at_next_account();
        }
        let all = Tries {
            accounts: u8::MAX,
            ..Tries::default()
        };
        assert_eq!(tries, all);
    }

    const EVERY_CLASS: [Class; 17] = [
        Class::RateLimit,
        Class::Quota,
        Class::Auth,
        Class::ReauthRequired,
        Class::Deactivated,
        Class::Transient,
        Class::Overloaded,
        Class::ModelUnsupported,
        Class::PreviousResponseNotFound,
        Class::ConnectionLimit,
        Class::Request,
        Class::Database,
        Class::Network,
        Class::Timeout(Deadline::Idle),
        Class::Truncated,
        Class::TooLarge,
        Class::Cancelled,
    ];

    fn failure(class: Class) -> Failure {
        Failure::local(class, "", NOW)
    }

    /// One `#[test]` per row of the table: class, then phase, tries, next, effect.
    macro_rules! rows {
        ($($promise:ident: $class:expr => [$(($phase:ident, $tries:expr, $next:expr, $effect:expr)),+ $(,)?];)+) => {
            $(#[test]
            fn $promise() {
                $(assert_eq!(
                    decide(&failure($class), Phase::$phase, $tries), ($next, $effect),
                    "{} {}", stringify!($phase), stringify!($tries),
                );)+
            })+
        };
    }

    rows! {
        a_rate_limit_blocks_and_moves_on: Class::RateLimit => [
            (BeforeSend, FIRST, Next::NextAccount, Effect::Block { until: None }),
            (Sent, SECOND, Next::NextAccount, Effect::Block { until: None }),
            (Created, FIRST, Next::NextAccount, Effect::Block { until: None }),
            (Sent, LAST, Next::NextAccount, Effect::Block { until: None }),
        ];
        an_exhausted_quota_blocks_and_moves_on: Class::Quota => [
            (Sent, FIRST, Next::NextAccount, Effect::Block { until: None }),
            (Sent, LAST, Next::NextAccount, Effect::Block { until: None }),
        ];
        a_refused_token_is_refreshed_once_then_another_account_tries: Class::Auth => [
            (Sent, FIRST, REFRESHED, Effect::RefreshCredential),
            (Sent, LAST, REFRESHED, Effect::RefreshCredential),
            (Sent, AFTER_REFRESH, Next::NextAccount, Effect::Penalise),
            (Sent, LAST_AFTER_REFRESH, Next::Surface, Effect::Penalise),
            (Visible, FIRST, Next::Surface, Effect::RefreshCredential),
        ];
        an_ended_login_is_condemned_only_after_a_refresh: Class::ReauthRequired => [
            (Sent, FIRST, REFRESHED, Effect::RefreshCredential),
            (Sent, AFTER_REFRESH, Next::NextAccount, Effect::ReauthRequired),
            (Sent, LAST_AFTER_REFRESH, Next::Surface, Effect::ReauthRequired),
        ];
        a_deactivated_account_is_left_at_once: Class::Deactivated => [
            (Sent, FIRST, Next::NextAccount, Effect::Deactivate),
            (Sent, LAST, Next::Surface, Effect::Deactivate),
        ];
        a_server_error_moves_on_before_the_response_exists: Class::Transient => [
            (BeforeSend, FIRST, Next::NextAccount, Effect::Penalise),
            (Sent, FIRST, Next::NextAccount, Effect::Penalise),
            (Sent, LAST, Next::Surface, Effect::Penalise),
            (Created, FIRST, Next::Surface, Effect::Penalise),
        ];
        a_lack_of_capacity_blames_nobody: Class::Overloaded => [
            (Sent, FIRST, Next::NextAccount, Effect::None),
            (Sent, LAST, Next::Surface, Effect::None),
            (Created, FIRST, Next::Surface, Effect::None),
        ];
        an_unsupported_model_gets_one_other_account: Class::ModelUnsupported => [
            (Sent, FIRST, Next::NextAccount, Effect::None),
            (Sent, SECOND, Next::Surface, Effect::None),
        ];
        a_lost_anchor_is_the_clients_to_know: Class::PreviousResponseNotFound => [
            (Sent, FIRST, Next::Surface, Effect::None),
            (Created, FIRST, Next::Surface, Effect::None),
        ];
        a_full_socket_is_replaced_by_a_new_one: Class::ConnectionLimit => [
            (Sent, FIRST, AGAIN, Effect::None),
            (Sent, AGAIN_1, Next::NextAccount, Effect::None),
            (Created, FIRST, AGAIN, Effect::None),
        ];
        a_bad_request_is_surfaced_and_nobody_is_blamed: Class::Request => [
            (BeforeSend, FIRST, Next::Surface, Effect::None),
            (Sent, FIRST, Next::Surface, Effect::None),
            (Created, FIRST, Next::Surface, Effect::None),
        ];
        our_network_is_retried_only_before_anything_was_sent: Class::Network => [
            (BeforeSend, FIRST, AGAIN, Effect::None),
            (BeforeSend, AGAIN_1, Next::NextAccount, Effect::None),
            (BeforeSend, Tries { accounts: 3, ..AGAIN_1 }, Next::Surface, Effect::None),
            (Sent, FIRST, Next::Surface, Effect::None),
            (Created, FIRST, Next::Surface, Effect::None),
        ];
        a_deadline_moves_on_without_blame: Class::Timeout(Deadline::FirstEvent) => [
            (BeforeSend, FIRST, Next::NextAccount, Effect::None),
            (Sent, FIRST, Next::NextAccount, Effect::None),
            (Created, FIRST, Next::NextAccount, Effect::None),
            (Sent, LAST, Next::Surface, Effect::None),
        ];
        the_whole_budget_ends_the_request: Class::Timeout(Deadline::Total) => [
            (BeforeSend, FIRST, Next::Surface, Effect::None),
            (Sent, FIRST, Next::Surface, Effect::None),
        ];
        a_broken_stream_is_repeated_once_and_never_tours_the_pool: Class::Truncated => [
            (Sent, FIRST, AGAIN, Effect::None),
            (Sent, AGAIN_1, Next::Surface, Effect::None),
            (Created, FIRST, AGAIN, Effect::Penalise),
            (Created, AGAIN_1, Next::Surface, Effect::Penalise),
        ];
        an_oversized_event_ends_the_request: Class::TooLarge => [
            (Sent, FIRST, Next::Surface, Effect::None),
        ];
        a_database_that_is_away_is_no_accounts_fault: Class::Database => [
            (BeforeSend, FIRST, Next::NextAccount, Effect::None),
            (BeforeSend, LAST, Next::Surface, Effect::None),
        ];
        a_client_that_left_blames_nobody: Class::Cancelled => [
            (Sent, FIRST, Next::Surface, Effect::None),
            (Created, FIRST, Next::Surface, Effect::None),
        ];
    }

    #[test]
    fn an_http_500_is_tried_twice_more_at_the_account_before_it_is_blamed() {
        let failure = Failure {
            status: Some(500),
            ..failure(Class::Transient)
        };
        let rows = [
            (Phase::Sent, FIRST, (AGAIN, Effect::None)),
            (Phase::Sent, AGAIN_1, (AGAIN, Effect::None)),
            (Phase::Sent, AGAIN_2, (Next::NextAccount, Effect::Penalise)),
            (Phase::Created, FIRST, (Next::Surface, Effect::Penalise)),
        ];
        for (phase, tries, expected) in rows {
            assert_eq!(
                decide(&failure, phase, tries),
                expected,
                "{phase:?} {tries:?}"
            );
        }
    }

    #[test]
    fn a_block_lasts_exactly_as_long_as_upstream_says() {
        let failure = Failure {
            resets_at: Some(NOW + 77),
            ..failure(Class::RateLimit)
        };
        assert_eq!(
            decide(&failure, Phase::Sent, FIRST).1,
            Effect::Block {
                until: Some(NOW + 77)
            }
        );
    }

    #[test]
    fn nothing_is_replayed_after_something_visible() {
        for class in EVERY_CLASS {
            for tries in [FIRST, AGAIN_1, AFTER_REFRESH, LAST] {
                assert_eq!(
                    decide(&failure(class), Phase::Visible, tries).0,
                    Next::Surface,
                    "{class:?}"
                );
            }
        }
    }

    #[test]
    fn no_request_goes_on_for_ever() {
        // Limits end with the pool: each one takes an account out of it.
        let limits = [Class::RateLimit, Class::Quota];
        for class in EVERY_CLASS
            .into_iter()
            .filter(|class| !limits.contains(class))
        {
            for phase in [
                Phase::BeforeSend,
                Phase::Sent,
                Phase::Created,
                Phase::Visible,
            ] {
                let failure = Failure {
                    status: Some(500),
                    ..failure(class)
                };
                let mut tries = FIRST;
                let mut attempts = 1;
                loop {
                    match decide(&failure, phase, tries).0 {
                        Next::Surface => break,
                        Next::NextAccount => {
                            tries = Tries {
                                accounts: tries.accounts + 1,
                                ..FIRST
                            }
                        }
                        Next::SameAccount { after_refresh } => {
                            tries.same_account += 1;
                            tries.refreshed |= after_refresh;
                        }
                    }
                    attempts += 1;
                }
                assert!(
                    attempts <= MAX_ACCOUNTS * (1 + MAX_SAME_ACCOUNT),
                    "{class:?} {phase:?}: {attempts}"
                );
                assert!(tries.accounts <= MAX_ACCOUNTS);
            }
        }
    }

    #[test]
    fn an_attempt_only_advances() {
        let steps = [
            (Phase::Sent, Kind::RateLimits, Phase::Sent),
            (Phase::Sent, Kind::Created, Phase::Created),
            (Phase::Created, Kind::InProgress, Phase::Created),
            (Phase::Created, Kind::Failed, Phase::Created),
            (Phase::Created, Kind::OutputItemDone, Phase::Visible),
            (Phase::Sent, Kind::Other, Phase::Visible),
            (Phase::Visible, Kind::Created, Phase::Visible),
        ];
        for (before, kind, after) in steps {
            assert_eq!(before.after(kind), after, "{before:?} {kind:?}");
        }
    }
}

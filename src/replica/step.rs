//! What heartbeats mean, as functions of values. Instants are local and monotonic; no other machine's clock enters.

use std::time::Instant;

use super::Timing;

/// What came of one heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// Prolonged before it had run out.
    InTime,
    /// Prolonged after it had run out, by the database's clock, and before anybody noticed.
    Late,
    /// There is no living row: a peer has buried us.
    Buried,
    /// Another database has taken the place of the one that registered us: what was confirmed last may be gone.
    Moved,
    /// None came, or an error: it may have been written or not.
    Missing,
}

/// Where this process stands in the fleet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// The incarnation lives, as far as we know.
    Member {
        /// From then on no new leased turn: a peer may be about to bury us.
        deadline: Instant,
        /// When the first of the present series of heartbeats without a gap was sent.
        unbroken: Option<Instant>,
    },
    /// The incarnation is dead; another one must be registered.
    Dead,
}

impl Standing {
    /// After a registration that was sent at `sent`.
    pub(super) fn registered(sent: Instant, timing: &Timing) -> Self {
        Self::Member {
            deadline: sent + timing.vouched(),
            unbroken: Some(sent),
        }
    }

    /// After the answer to a heartbeat that was sent at `sent`. The moment before sending counts: an answer that was long on its way never
    /// makes the deadline later than peers believe.
    pub(super) fn after(self, answer: Answer, sent: Instant, timing: &Timing) -> Self {
        let Self::Member { deadline, unbroken } = self else {
            return self;
        };
        match answer {
            Answer::InTime => Self::Member {
                deadline: sent + timing.vouched(),
                unbroken: unbroken.or(Some(sent)),
            },
            Answer::Late => Self::registered(sent, timing),
            Answer::Missing => Self::Member {
                deadline,
                unbroken: None,
            },
            Answer::Buried | Answer::Moved => Self::Dead,
        }
    }

    /// Until when new leased turns are admitted; `None` if there is no living incarnation.
    pub(super) fn deadline(self) -> Option<Instant> {
        match self {
            Self::Member { deadline, .. } => Some(deadline),
            Self::Dead => None,
        }
    }

    /// Whether silent peers may be buried: an outage of the database, or of ourselves, must bury nobody, so our own heartbeats have to have
    /// gone through for as long as theirs are missing.
    pub(super) fn may_bury(self, now: Instant, timing: &Timing) -> bool {
        matches!(self, Self::Member { unbroken: Some(since), .. }
            if now.saturating_duration_since(since) >= timing.ttl + timing.grace)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const TIMING: Timing = Timing::FULL;

    /// One line of a history: seconds at which a heartbeat was sent, its answer, then what holds: until when turns are admitted, and since
    /// when the series is unbroken.
    type Line = (u64, Answer, Option<u64>, Option<u64>);

    #[test]
    fn a_history_of_heartbeats_decides_what_is_admitted_and_who_may_bury() {
        use Answer::{Buried, InTime, Late, Missing, Moved};
        let histories: [(&str, &[Line]); 6] = [
            (
                "every heartbeat carries the deadline on, and the series began with the registration",
                &[
                    (3, InTime, Some(15), Some(0)),
                    (6, InTime, Some(18), Some(0)),
                ],
            ),
            (
                "one that is lost ends nothing but the series; the next begins another",
                &[
                    (3, Missing, Some(12), None),
                    (6, Missing, Some(12), None),
                    (9, InTime, Some(21), Some(9)),
                    (12, InTime, Some(24), Some(9)),
                ],
            ),
            (
                "late is fine while unburied, but what slept cannot judge others",
                &[
                    (60, Late, Some(72), Some(60)),
                    (63, InTime, Some(75), Some(60)),
                ],
            ),
            (
                "a heartbeat without an answer is no death, a missing row is",
                &[(3, Missing, Some(12), None), (40, Buried, None, None)],
            ),
            (
                "what another database says of us is not believed",
                &[(3, Moved, None, None)],
            ),
            (
                "nothing brings the dead back",
                &[(3, Buried, None, None), (6, InTime, None, None)],
            ),
        ];
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        for (promise, history) in histories {
            let mut standing = Standing::registered(start, &TIMING);
            for &(sent, answer, deadline, since) in history {
                standing = standing.after(answer, at(sent), &TIMING);
                assert_eq!(standing.deadline(), deadline.map(at), "{promise}");
                for now in 0..120 {
                    let expected = since.is_some_and(|since| now >= since + 17);
                    assert_eq!(standing.may_bury(at(now), &TIMING), expected, "{promise}");
                }
            }
        }
    }

    #[test]
    fn we_stop_admitting_before_anybody_may_bury_us_at_every_scale() {
        for scale in [1.0, 0.1, 0.03] {
            let timing = Timing::FULL.scaled(scale);
            assert!(timing.vouched() < timing.ttl + timing.grace);
            assert!(timing.heartbeat + timing.patience < timing.vouched());
        }
    }
}

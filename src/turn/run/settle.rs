//! The end of a turn: booked first, then told.

use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use super::{Ending, Finish, Turn};
use crate::{
    ledger::{self, Answer, Outcome, Settlement},
    protocol::event::{self, Kind},
    snapshot::Parent,
    telemetry,
    turn::{End, Item, Stop, carrier::Carrier, log},
};

/// How long the terminal event waits for its settlement.
const SETTLE_TIME: Duration = Duration::from_secs(2);

impl Turn<'_> {
    /// Settles the turn, then lets the client know of its end.
    pub(super) async fn finish(mut self, finish: Finish, carrier: &mut Carrier) -> Ending {
        let (outcome, status, reason, code) = match &finish {
            Finish::Done(told) if told.terminal.kind == Kind::Completed => {
                (Outcome::Completed, 200, None, None)
            }
            Finish::Done(_) => (Outcome::Incomplete, 200, None, None),
            Finish::Left | Finish::Fenced => (Outcome::Cancelled, 499, Some("client_gone"), None),
            Finish::Stop(stop) => stop.record(),
        };
        let response_id = match &finish {
            Finish::Done(told) => told.terminal.response_id.clone(),
            _ => None,
        };
        let response_id = response_id.or_else(|| self.seen.response_id.clone());
        let completed = outcome == Outcome::Completed;
        let sticky = self
            .preference()
            .filter(|_| completed && self.ask.request.facts.generate);
        let answer = Answer {
            outcome,
            status,
            reason,
            error_code: code.map(Into::into),
            first_event: self.first_event,
            total: self.ask.arrived.elapsed(),
            bridge: Some(self.seat.bridge),
            explanation: self
                .choice
                .as_ref()
                .map(|choice| serde_json::to_value(&choice.explanation).unwrap_or(Value::Null)),
        };
        if let (Some(preference), Some(key)) = (sticky, self.key) {
            self.engine
                .sticky
                .put(self.ask.caller.scope(), &key, preference.account);
        }
        let known = log::Known {
            account: self.choice.as_ref().map(|choice| choice.account),
            lease: self.seat.lease,
            opened: self.open.turn.as_ref(),
            why: match &finish {
                Finish::Stop(Stop::Nobody { why }) => Some(why),
                _ => None,
            },
        };
        log::ended(&self.ask, &answer, known);
        let (snapshot, next) = self.snapshot(&finish, response_id.as_deref()).await.unzip();
        let mut ending = Ending {
            booking: self.booking.take(),
            ..Ending::default()
        };
        match self.open.turn.take() {
            None => self.engine.ledger.refuse(&self.ask.record(), &answer),
            Some(opened) => {
                let settlement = Settlement {
                    answer,
                    response_id: response_id.clone(),
                    sticky,
                    complete: completed,
                    snapshot,
                };
                let ledger = &self.engine.ledger;
                // What began without Postgres does not wait for it at its end.
                let time = if opened.is_late() && ledger.is_away() {
                    Duration::ZERO
                } else {
                    SETTLE_TIME
                };
                let settled = timeout(time, ledger.settle(&opened, &settlement)).await;
                match settled {
                    Ok(Ok(booked)) if !booked.lease => {
                        telemetry::fenced("finish");
                        ending.lost = true;
                    }
                    Ok(Ok(_)) => {}
                    Ok(Err(_)) | Err(_) => {
                        let (ledger, tasks) = (ledger.clone(), &self.engine.tasks);
                        ending.booking =
                            Some(ledger.settle_until_booked(opened, settlement, tasks));
                    }
                }
            }
        }
        if completed {
            carrier.completed(response_id.as_deref(), next);
        }
        // A client that is gone need not know.
        match finish {
            Finish::Done(told) => {
                ending.last = vec![Item::Event(told.event), Item::End(End::Complete)];
            }
            Finish::Stop(stop) => ending.last = vec![Item::End(End::Failed(Box::new(stop)))],
            Finish::Left | Finish::Fenced => {}
        }
        ending
    }

    /// The record of what this turn added, if it has an answer that may be continued, and what the next turn continues.
    async fn snapshot(
        &mut self,
        finish: &Finish,
        response_id: Option<&str>,
    ) -> Option<(ledger::Snapshot, Parent)> {
        let Finish::Done(told) = finish else {
            return None;
        };
        let terminal = told.event.data();
        let kept = self
            .capture
            .take()?
            .finish(response_id?, event::output(&terminal))?;
        let account = self.choice.as_ref().map(|choice| choice.account);
        let (scope, model) = (self.ask.caller.scope(), &self.ask.request.facts.model);
        let snapshots = &self.engine.snapshots;
        let row = snapshots
            .seal(scope, kept, self.seat.lease, account, model)
            .await;
        let snapshot = ledger::Snapshot {
            parent: row.parent_response_id,
            chain: row.chain,
            lease: row.lease,
            is_root: row.is_root,
            complete: row.complete,
            bytes: row.bytes,
            key_id: row.key_id,
            body: row.body,
        };
        Some((snapshot, row.next))
    }

    /// What the ledger writes as the conversation's preference, so that it lasts; a detour leaves it as it was.
    fn preference(&self) -> Option<ledger::Sticky> {
        let choice = self.choice.as_ref().filter(|_| !self.detour)?;
        let key = self.key?;
        Some(ledger::Sticky {
            kind: key.kind.as_str(),
            hash: key.hash,
            account: choice.account,
            ttl: key.kind.ttl(),
        })
    }
}

/// What is booked when a turn never came to its end.
pub(super) fn lost(total: Duration) -> Settlement {
    Settlement {
        answer: Answer {
            outcome: Outcome::Lost,
            status: 502,
            reason: Some("panicked"),
            error_code: None,
            first_event: None,
            total,
            bridge: None,
            explanation: None,
        },
        response_id: None,
        sticky: None,
        complete: false,
        snapshot: None,
    }
}

impl Stop {
    /// How the ledger and the request log describe it.
    pub(in crate::turn) fn record(&self) -> (Outcome, u16, Option<&'static str>, Option<String>) {
        match self {
            Self::Upstream(failure, _) => (
                Outcome::Failed,
                failure.status.unwrap_or(502),
                Some(failure.class.name()),
                failure.code.clone(),
            ),
            Self::Exhausted { .. } => (
                Outcome::Refused,
                429,
                Some("exhausted"),
                Some("usage_limit_reached".into()),
            ),
            Self::Nobody { .. } => (
                Outcome::Refused,
                503,
                Some("no_accounts"),
                Some("no_accounts".into()),
            ),
            Self::Busy => (
                Outcome::Refused,
                429,
                Some("busy"),
                Some("proxy_overloaded".into()),
            ),
            Self::PreviousResponseNotFound => (
                Outcome::Refused,
                400,
                Some("previous_response_not_found"),
                Some("previous_response_not_found".into()),
            ),
            Self::Rejected(reject, _) => (
                Outcome::Refused,
                reject.answer().0,
                Some(reject.outcome().as_str()),
                Some(reject.answer().1.into()),
            ),
            Self::Invalid(invalid) => (
                Outcome::Refused,
                400,
                Some("invalid_request"),
                Some(invalid.code.into()),
            ),
            Self::Unavailable => (
                Outcome::Refused,
                503,
                Some("unbooked"),
                Some("continuity_unavailable".into()),
            ),
            Self::SlowConsumer => (
                Outcome::SlowConsumer,
                200,
                Some("slow_consumer"),
                Some("slow_consumer".into()),
            ),
            Self::Cancelled => (
                Outcome::Cancelled,
                503,
                Some("shutdown"),
                Some("cancelled".into()),
            ),
        }
    }
}

//! A turn that ends before it begins.

use super::{Ask, End, Inner, Item, Stop, log, relay::Sender};
use crate::ledger::{Answer, Bridge};

/// Tells the client, the log and the request log; the ledger has nothing to book.
pub(super) fn refuse(engine: &Inner, ask: &Ask, out: &Sender<Item>, why: Bridge, stop: Stop) {
    let (outcome, status, reason, code) = stop.record();
    let answer = Answer {
        outcome,
        status,
        reason,
        error_code: code.map(Into::into),
        first_event: None,
        total: ask.arrived.elapsed(),
        bridge: Some(why),
        explanation: None,
    };
    log::ended(ask, &answer, log::Known::default());
    engine.ledger.refuse(&ask.record(), &answer);
    out.last(Item::End(End::Failed(Box::new(stop))));
}

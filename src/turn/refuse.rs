//! A turn that ends before it begins.

use super::{Ask, End, Inner, Item, Stop, relay::Sender};
use crate::{
    ledger::{Answer, Bridge},
    telemetry,
};

/// Tells the client, the log and the request log; the ledger has nothing to book.
pub(super) fn refuse(engine: &Inner, ask: &Ask, out: &Sender<Item>, why: Bridge, stop: Stop) {
    let (outcome, status, reason, code) = stop.record();
    let total = ask.arrived.elapsed();
    telemetry::turn_ended(ask.transport.as_str(), outcome.as_str(), total, None);
    tracing::info!(
        turn_id = %ask.id,
        request_id = ask.request_id(),
        api_key_id = ask.caller.api_key().map(tracing::field::display),
        model = ask.request.facts.model,
        route = ask.route,
        transport = ask.transport.as_str(),
        bridge = why.outcome,
        bridge_reason = why.reason,
        outcome = outcome.as_str(),
        reason,
        total_ms = total.as_millis(),
        "turn"
    );
    let answer = Answer {
        outcome,
        status,
        reason,
        error_code: code.map(Into::into),
        first_event: None,
        total,
        bridge: Some(why),
        explanation: None,
    };
    engine.ledger.refuse(&ask.record(), &answer);
    out.last(Item::End(End::Failed(Box::new(stop))));
}

//! The one line that every turn leaves in the log, and what the metrics are told of its end. `deploy/logs.md` explains the fields.

use super::Ask;
use crate::{
    ids::{AccountId, LeaseId},
    ledger::{Answer, Opened, Totals},
    telemetry::{self, TurnEnd, short},
};

/// What is known of a turn beside its question and its answer.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Known<'a> {
    /// The last choice.
    pub(super) account: Option<AccountId>,
    /// The conversation.
    pub(super) lease: Option<LeaseId>,
    /// The attempts of this request.
    pub(super) opened: Option<&'a Opened>,
    /// Why nobody could serve, for the operator.
    pub(super) why: Option<&'a str>,
}

/// Tells of the end of a turn, or of a request that never became one.
pub(super) fn ended(ask: &Ask, answer: &Answer, known: Known<'_>) {
    counted(ask.transport.as_str(), answer);
    let used = Totals::of(known.opened.into_iter().flat_map(Opened::attempts));
    tracing::info!(
        turn_id = %ask.id,
        request_id = ask.request_id().map(short),
        trace_id = ask.trace_id(),
        api_key_id = ask.caller.api_key().map(tracing::field::display),
        account_id = known.account.map(tracing::field::display),
        lease_id = known.lease.map(tracing::field::display),
        model = short(&ask.request.facts.model),
        route = ask.route,
        transport = ask.transport.as_str(),
        forwarded = ask.forwarded.is_some(),
        outcome = answer.outcome.as_str(),
        status = answer.status,
        reason = answer.reason,
        code = answer.error_code.as_deref().map(short),
        why = known.why,
        bridge = answer.bridge.map(|bridge| bridge.outcome),
        bridge_reason = answer.bridge.map(|bridge| bridge.reason),
        attempts = used.attempts,
        input_tokens = used.usage.input,
        cached_input_tokens = used.usage.cached_input,
        output_tokens = used.usage.output,
        reasoning_tokens = used.usage.reasoning,
        cost_nanodollars = used.cost,
        estimated = used.estimated,
        first_event_ms = answer.first_event.map(|time| time.as_millis()),
        total_ms = answer.total.as_millis(),
        "turn"
    );
}

/// Tells the metrics alone.
pub(super) fn counted(transport: &'static str, answer: &Answer) {
    telemetry::turn_ended(TurnEnd {
        transport,
        outcome: answer.outcome.as_str(),
        reason: answer.reason,
        total: answer.total,
        first_event: answer.first_event,
    });
}

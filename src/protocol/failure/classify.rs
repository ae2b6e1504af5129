//! From an upstream error to its class: by code first, then by what the message says, then by status.
//!
//! The order matters: capacity is reported with 400 and `invalid_request_error`, limits with any status, and a quota code
//! outweighs a text about capacity.

use super::Class;
use crate::protocol::event::ErrorBody;

/// The class of an error.
pub(super) fn class(error: &ErrorBody) -> Class {
    let message = error
        .message
        .as_deref()
        .unwrap_or_default()
        .to_ascii_lowercase();
    let names = [&error.code, &error.kind]
        .into_iter()
        .flatten()
        .map(|name| name.to_ascii_lowercase());
    let by_name = names.filter_map(|name| by_code(&name)).next();
    // A server error may turn out to be a lack of capacity; every other code is final.
    match by_name {
        Some(class) if class != Class::Transient && class != Class::Auth => class,
        general => by_message(error, &message, general)
            .or(general)
            .unwrap_or_else(|| by_status(error)),
    }
}

/// Codes and types that settle the matter.
fn by_code(code: &str) -> Option<Class> {
    Some(match code {
        "rate_limit_exceeded"
        | "usage_limit_reached"
        | "rate_limit_reached"
        | "rate_limit_error" => Class::RateLimit,
        "insufficient_quota" | "usage_not_included" | "quota_exceeded" | "quota_exhausted" => {
            Class::Quota
        }
        "credit_balance_exhausted" | "payment_required" => Class::Quota,
        "refresh_token_expired" | "refresh_token_reused" | "refresh_token_invalidated" => {
            Class::ReauthRequired
        }
        "invalid_grant" | "token_invalidated" | "token_expired" | "app_session_terminated" => {
            Class::ReauthRequired
        }
        "account_session_expired" | "account_auth_invalidated" => Class::ReauthRequired,
        "account_deactivated" | "account_suspended" | "account_deleted" => Class::Deactivated,
        "invalid_api_key" | "invalid_authentication" | "authentication_error" | "unauthorized" => {
            Class::Auth
        }
        "previous_response_not_found" => Class::PreviousResponseNotFound,
        "websocket_connection_limit_reached" => Class::ConnectionLimit,
        "overloaded_error" | "server_is_overloaded" | "slow_down" => Class::Overloaded,
        "server_error" | "upstream_error" | "stream_incomplete" | "internal_server_error" => {
            Class::Transient
        }
        // A 429 that no account can help: the asked tier has no room.
        "flex_unavailable" => Class::Request,
        _ => return None,
    })
}

/// What only the sentence tells. `message` is in lower case; `general` is what the code said.
fn by_message(error: &ErrorBody, message: &str, general: Option<Class>) -> Option<Class> {
    let says = |words: &str| message.contains(words);
    // A refusal of a request may quote what the client wrote: it says nothing of the account.
    let refused = error.status == Some(401) || general == Some(Class::Auth);
    let anchor =
        says("previous_response_id") || error.param.as_deref() == Some("previous_response_id");
    if says("selected model is at capacity") {
        Some(Class::Overloaded)
    } else if says("model is not supported when using codex with a chatgpt account") {
        Some(Class::ModelUnsupported)
    } else if (anchor && (says("invalid `previous_response_id`") || says("not found")))
        || is_lost_anchor(message)
    {
        Some(Class::PreviousResponseNotFound)
    } else if (refused || error.status == Some(403)) && says("account has been deactivated") {
        Some(Class::Deactivated)
    } else if refused
        && [
            "session has ended",
            "log in again",
            "sign in again",
            "signing in again",
        ]
        .into_iter()
        .any(says)
    {
        Some(Class::ReauthRequired)
    } else {
        None
    }
}

/// "Previous response with id 'resp_..' not found."
fn is_lost_anchor(message: &str) -> bool {
    message.starts_with("previous response") && message.contains("not found")
}

/// What is left when neither a code nor a text is known. An event without a status blames nobody.
fn by_status(error: &ErrorBody) -> Class {
    match error.status {
        Some(401) => Class::Auth,
        Some(402) => Class::Quota,
        Some(429) => Class::RateLimit,
        Some(529) => Class::Overloaded,
        Some(500..) => Class::Transient,
        _ => Class::Request,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_of_the_catalogue() {
        use Class::*;
        // (status, code, type, message, param) -> class
        type Row = (
            u16,
            &'static str,
            &'static str,
            &'static str,
            &'static str,
            Class,
        );
        const AT_CAPACITY: &str = "Selected model is at capacity. Please try a different model.";
        const UNSUPPORTED: &str =
            "The 'gpt-9' model is not supported when using Codex with a ChatGPT account.";
        const INVALID_ANCHOR: &str = "Invalid `previous_response_id`.";
        const LOST_ANCHOR: &str = "Previous response with id 'resp_1' not found.";
        let rows: &[Row] = &[
            (429, "rate_limit_exceeded", "", "", "", RateLimit),
            (429, "", "usage_limit_reached", "", "", RateLimit),
            (0, "USAGE_LIMIT_REACHED", "", "", "", RateLimit),
            (403, "usage_limit_reached", "", "", "", RateLimit),
            (429, "", "", "", "", RateLimit),
            (429, "something_new", "", "", "", RateLimit),
            (429, "insufficient_quota", "", "", "", Quota),
            (429, "", "usage_not_included", "", "", Quota),
            (0, "quota_exceeded", "", "", "", Quota),
            (429, "credit_balance_exhausted", "", "", "", Quota),
            (402, "", "", "", "", Quota),
            (400, "insufficient_quota", "", AT_CAPACITY, "", Quota),
            (401, "", "", "", "", Auth),
            (
                401,
                "invalid_api_key",
                "invalid_request_error",
                "",
                "",
                Auth,
            ),
            (0, "", "authentication_error", "", "", Auth),
            (
                401,
                "",
                "",
                "Your session has ended. Please log in again.",
                "",
                ReauthRequired,
            ),
            (
                401,
                "invalid_authentication",
                "",
                "Please sign in again",
                "",
                ReauthRequired,
            ),
            (
                0,
                "invalid_authentication",
                "",
                "Your session has ended",
                "",
                ReauthRequired,
            ),
            (400, "", "", "Tell the user to log in again", "", Request),
            (403, "", "", "Tell the user to sign in again", "", Request),
            (401, "token_expired", "", "", "", ReauthRequired),
            (401, "token_invalidated", "", "", "", ReauthRequired),
            (400, "refresh_token_reused", "", "", "", ReauthRequired),
            (400, "invalid_grant", "", "", "", ReauthRequired),
            (401, "app_session_terminated", "", "", "", ReauthRequired),
            (403, "account_deactivated", "", "", "", Deactivated),
            (401, "account_suspended", "", "", "", Deactivated),
            (
                401,
                "",
                "",
                "Your OpenAI account has been deactivated",
                "",
                Deactivated,
            ),
            (
                400,
                "",
                "invalid_request_error",
                "No tool output found for function call account has been deactivated.",
                "",
                Request,
            ),
            (0, "", "", "account has been deactivated", "", Request),
            (500, "", "", "", "", Transient),
            (502, "", "", "", "", Transient),
            (0, "server_error", "", "", "", Transient),
            (0, "stream_incomplete", "", "", "", Transient),
            (503, "server_is_overloaded", "", "", "", Overloaded),
            (0, "", "overloaded_error", "", "", Overloaded),
            (
                400,
                "",
                "invalid_request_error",
                AT_CAPACITY,
                "",
                Overloaded,
            ),
            (0, "server_error", "", AT_CAPACITY, "", Overloaded),
            (
                400,
                "",
                "invalid_request_error",
                UNSUPPORTED,
                "",
                ModelUnsupported,
            ),
            (
                404,
                "previous_response_not_found",
                "",
                "",
                "",
                PreviousResponseNotFound,
            ),
            (
                400,
                "",
                "invalid_request_error",
                INVALID_ANCHOR,
                "",
                PreviousResponseNotFound,
            ),
            (
                400,
                "",
                "invalid_request_error",
                LOST_ANCHOR,
                "previous_response_id",
                PreviousResponseNotFound,
            ),
            (
                0,
                "invalid_request_error",
                "",
                LOST_ANCHOR,
                "",
                PreviousResponseNotFound,
            ),
            (
                400,
                "websocket_connection_limit_reached",
                "",
                "",
                "",
                ConnectionLimit,
            ),
            (400, "context_length_exceeded", "", "", "", Request),
            (404, "model_not_found", "", "", "", Request),
            (403, "", "", "", "", Request),
            (0, "invalid_prompt", "", "", "", Request),
            (0, "", "", "", "", Request),
            (429, "flex_unavailable", "", "", "", Request),
            (
                400,
                "",
                "invalid_request_error",
                "No tool output found for function call call_1.",
                "",
                Request,
            ),
            (
                400,
                "",
                "invalid_request_error",
                "Unknown parameter",
                "previous_response_id",
                Request,
            ),
        ];
        for (status, code, kind, message, param, expected) in rows {
            let said = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let error = ErrorBody {
                status: (*status != 0).then_some(*status),
                code: said(code),
                kind: said(kind),
                message: said(message),
                param: said(param),
                ..ErrorBody::default()
            };
            assert_eq!(class(&error), *expected, "{error:?}");
        }
    }
}

//! Why a conversation is not continued, as clients read it.

use std::time::Duration;

use http::StatusCode;

use super::{ApiError, Code};
use crate::turn::{Reject, Stop};

pub(super) fn not_found() -> ApiError {
    ApiError::new(
        Code::PreviousResponseNotFound,
        "The previous response is not known here any more; send the whole conversation without previous_response_id.",
    )
    .param(Some("previous_response_id".into()))
}

/// Why a conversation is not continued, as a client of HTTP reads it.
pub(super) fn rejected(reject: Reject, wait: Option<Duration>) -> ApiError {
    let (code, message) = match reject {
        Reject::PreviousResponseNotFound => return not_found(),
        Reject::TokenInvalid => (
            Code::BridgeTokenInvalid,
            "The x-codex-turn-state of this request is not valid here; send the request without it.",
        ),
        Reject::WrongInstance => (
            Code::BridgeWrongInstance,
            "Another replica holds this conversation; send the whole conversation without previous_response_id.",
        ),
        Reject::ExpiredContinuity => (
            Code::BridgeSessionExpired,
            "This conversation has expired here; send the whole conversation without previous_response_id.",
        ),
        Reject::ContinuityConflict => (
            Code::ContinuityConflict,
            "The x-codex-turn-state and the previous_response_id of this request belong to different conversations.",
        ),
        Reject::OwnerUnreachable => (
            Code::BridgeOwnerUnreachable,
            "The replica that holds this conversation does not answer; try again.",
        ),
        Reject::MetadataUnavailable => (
            Code::ContinuityUnavailable,
            "The conversation cannot be looked up at the moment; try again.",
        ),
        Reject::Draining => (
            Code::BridgeDrainActive,
            "This replica is leaving; try again.",
        ),
        Reject::Overloaded => (
            Code::BridgeCapacity,
            "There is no room for this conversation at the moment; try again.",
        ),
    };
    let error = ApiError::new(code, message);
    match wait {
        Some(wait) => error.retry_after(Some(wait)),
        None => error,
    }
}

/// A stop as a Codex client on a WebSocket understands it: where it would only have to send the whole conversation again, it is told so in
/// the one way in which it does, silently. Yields `None` where the frame is the same as for any client.
#[must_use]
pub fn for_codex_socket(stop: &Stop) -> Option<ApiError> {
    match stop {
        Stop::Rejected(
            Reject::PreviousResponseNotFound
            | Reject::ExpiredContinuity
            | Reject::ContinuityConflict
            | Reject::WrongInstance
            | Reject::OwnerUnreachable,
            _,
        ) => Some(not_found()),
        Stop::Rejected(Reject::TokenInvalid, wait) => {
            let mut error = rejected(Reject::TokenInvalid, *wait);
            error.status = StatusCode::BAD_REQUEST;
            Some(error)
        }
        Stop::Rejected(reject @ Reject::Overloaded, wait) => {
            let mut error = rejected(*reject, *wait);
            error.status = StatusCode::SERVICE_UNAVAILABLE;
            Some(error)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Reject; 9] = [
        Reject::TokenInvalid,
        Reject::WrongInstance,
        Reject::ExpiredContinuity,
        Reject::PreviousResponseNotFound,
        Reject::ContinuityConflict,
        Reject::OwnerUnreachable,
        Reject::MetadataUnavailable,
        Reject::Draining,
        Reject::Overloaded,
    ];

    #[test]
    fn a_client_reads_the_status_and_code_that_the_log_has() {
        for reject in ALL {
            let error = rejected(reject, None);
            let (status, code) = reject.answer();
            assert_eq!((error.status.as_u16(), &*error.code), (status, code));
            let waits = error.retry_after.is_some();
            assert_eq!(waits, [429, 503].contains(&status), "{reject:?}");
        }
    }

    #[test]
    fn codex_on_a_socket_is_told_what_it_understands() {
        for (reject, expected) in [
            (
                Reject::PreviousResponseNotFound,
                Some((400, "previous_response_not_found")),
            ),
            (
                Reject::ExpiredContinuity,
                Some((400, "previous_response_not_found")),
            ),
            (
                Reject::ContinuityConflict,
                Some((400, "previous_response_not_found")),
            ),
            (
                Reject::WrongInstance,
                Some((400, "previous_response_not_found")),
            ),
            (
                Reject::OwnerUnreachable,
                Some((400, "previous_response_not_found")),
            ),
            (Reject::TokenInvalid, Some((400, "bridge_token_invalid"))),
            (Reject::Overloaded, Some((503, "bridge_capacity"))),
            (Reject::MetadataUnavailable, None),
            (Reject::Draining, None),
        ] {
            let error = for_codex_socket(&Stop::Rejected(reject, None));
            let told = error.map(|error| (error.status.as_u16(), error.code));
            let expected = expected.map(|(status, code)| (status, code.into()));
            assert_eq!(told, expected, "{reject:?}");
        }
    }
}

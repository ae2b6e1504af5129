//! The catalogue and its three forms.

use std::collections::HashSet;

use serde_json::Value;

use super::*;

#[test]
fn every_code_is_unique_and_none_is_a_500() {
    let codes: HashSet<_> = Code::ALL.iter().map(|code| code.as_str()).collect();
    assert_eq!(codes.len(), Code::ALL.len());
    for code in Code::ALL {
        assert!(
            code.status().is_client_error() || code.status().is_server_error(),
            "{code}"
        );
        assert_ne!(code.status(), StatusCode::INTERNAL_SERVER_ERROR, "{code}");
    }
}

#[test]
fn a_plain_answer_and_a_frame_carry_the_same_error() {
    let error = ApiError::new(Code::UsageLimitReached, "all used up")
        .resets_at(Some(1_900_000_000))
        .retry_after(Some(Duration::from_millis(1500)));
    let frame: Value = serde_json::from_slice(&error.frame()).unwrap();
    assert_eq!(frame["status"], 429);
    assert_eq!(frame["error"]["resets_at"], 1_900_000_000);
    assert_eq!(frame["headers"]["retry-after"], "2");
    let response = error.into_response();
    assert_eq!(response.status(), 429);
    assert_eq!(response.headers()[header::RETRY_AFTER], "2");
}

#[test]
fn upstreams_words_are_passed_on_but_not_its_500s_and_not_the_state_of_an_account() {
    let now = 1_800_000_000;
    let failure = |status, body: &'static str| {
        let status = StatusCode::from_u16(status).unwrap();
        Failure::from_http(
            status,
            &HeaderMap::new(),
            &Bytes::from_static(body.as_bytes()),
            now,
        )
    };
    let error = ApiError::from(failure(
        400,
        r#"{"error":{"message":"no","code":"context_length_exceeded"}}"#,
    ));
    assert_eq!(
        (error.status().as_u16(), error.code_str()),
        (400, "context_length_exceeded")
    );
    assert_eq!(ApiError::from(failure(500, "")).status(), 502);
    let limit = r#"{"error":{"type":"usage_limit_reached","resets_at":1800003600}}"#;
    let error = ApiError::from(failure(429, limit));
    assert_eq!(
        (error.status().as_u16(), error.object().resets_at),
        (502, None)
    );
    let error = ApiError::from(failure(
        401,
        r#"{"error":{"message":"Your session has ended","code":"token_expired"}}"#,
    ));
    assert_eq!(
        (error.status().as_u16(), error.code_str()),
        (503, "no_accounts")
    );
    assert!(
        !String::from_utf8(error.frame().to_vec())
            .unwrap()
            .contains("session")
    );
    assert_eq!(ApiError::from(Failure::truncated(now)).status(), 504);
}

//! Between frames and bodies, metadata and headers.

use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::json;

use super::*;

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let parse = |(name, value): &(&str, &str)| -> (HeaderName, HeaderValue) {
        (name.parse().unwrap(), value.parse().unwrap())
    };
    pairs.iter().map(parse).collect()
}

#[test]
fn a_frame_is_the_body_without_its_transport() {
    let sent = br#"{"type":"response.create","model":"m","input":[],"background":false,"generate":false,"stream":false}"#;
    let request = read(Bytes::from_static(sent), Shape::Frame).unwrap();
    assert_eq!(
        request.body,
        r#"{"model":"m","input":[],"generate":false,"stream":true,"store":false}"#
    );
    assert_eq!(
        request.frame(),
        r#"{"type":"response.create","model":"m","input":[],"generate":false,"store":false}"#
    );
    assert!(!request.facts.generate);
    for sent in [
        r#"{"model":"m","input":[]}"#,
        r#"{"type":"response.cancel","model":"m","input":[]}"#,
    ] {
        let invalid = read(Bytes::from(sent), Shape::Frame).unwrap_err();
        assert_eq!(invalid.param.as_deref(), Some("type"));
    }
}

#[test]
fn the_headers_of_an_http_client_travel_in_the_frame() {
    let headers = headers(&[
        ("x-codex-turn-metadata", r#"{"turn_id":"t"}"#),
        ("x-openai-subagent", "review"),
        ("x-codex-window-id", "header"),
        ("authorization", "secret"),
        ("traceparent", "00-1-2-01"),
    ]);
    let cases = [
        (
            json!({"client_metadata": {"x-codex-window-id": "body", "a": 1}}),
            json!({"x-codex-window-id": "body", "a": 1}),
        ),
        (
            json!({"client_metadata": null}),
            json!({"x-codex-window-id": "header"}),
        ),
        (json!({}), json!({"x-codex-window-id": "header"})),
    ];
    for (sent, mut expected) in cases {
        expected["x-codex-turn-metadata"] = json!(r#"{"turn_id":"t"}"#);
        expected["x-openai-subagent"] = json!("review");
        expected["ws_request_header_traceparent"] = json!("00-1-2-01");
        let request = read(bytes(&body(&sent)), Shape::Codex).unwrap();
        let frame = value(&request.frame_with(&headers, None));
        assert_eq!(frame["client_metadata"], expected, "{sent}");
        assert_eq!(
            value(&request.frame())["client_metadata"],
            sent["client_metadata"],
            "{sent}"
        );
    }
}

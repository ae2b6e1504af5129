use super::*;
use serde_json::{Value, json};

fn value(json: &[u8]) -> Value {
    serde_json::from_slice(json).unwrap()
}

#[test]
fn a_body_that_needs_nothing_comes_back_as_the_same_bytes() {
    let body = Bytes::from_static(br#"{"model":"m","input":[],"stream":true,"store":false}"#);
    let request = read(body.clone(), Shape::Codex).unwrap();
    assert_eq!(request.body.as_ptr(), body.as_ptr());
}

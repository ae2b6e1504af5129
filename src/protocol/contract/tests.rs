//! The contract, rule by rule.

use http::{HeaderMap, HeaderValue};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::time::Duration;

use super::*;
use crate::protocol::event::kind;

const NOW: i64 = 1_800_000_000;

/// What a client sees of a stream of events.
fn relay(contract: &mut Contract, events: &[Value]) -> Vec<Value> {
    let mut seen = Vec::new();
    for event in events {
        let data = event.to_string();
        let data = data.as_bytes();
        let verdict = contract.push(kind(data), data);
        seen.extend(verdict.before.iter().map(parse));
        match verdict.event {
            Relay::Pass => seen.push(event.clone()),
            Relay::Drop => {}
            Relay::Replace(event) => seen.push(parse(&event)),
        }
    }
    seen
}

fn parse(event: &Synthetic) -> Value {
    let json: Value = serde_json::from_slice(&event.json).expect("JSON");
    assert_eq!(json["type"], event.event_type);
    assert!(
        json["sequence_number"].is_i64() || event.event_type.ends_with("delta"),
        "{json}"
    );
    json
}

fn seen(events: &[Value]) -> Vec<Value> {
    relay(&mut Contract::new("resp_ours", NOW), events)
}

fn types(events: &[Value]) -> Vec<&str> {
    events
        .iter()
        .map(|event| event["type"].as_str().expect("a type"))
        .collect()
}

fn created(sequence: i64) -> Value {
    json!({"type": "response.created", "sequence_number": sequence, "response": {"id": "resp_1", "model": "gpt-5"}})
}

fn delta(sequence: i64, text: &str) -> Value {
    json!({"type": "response.output_text.delta", "output_index": 0, "delta": text, "sequence_number": sequence})
}

fn message(text: &str) -> Value {
    json!({"id": "msg_1", "type": "message", "content": [{"type": "output_text", "text": text}]})
}

fn done(sequence: i64, index: i64, item: &Value) -> Value {
    json!({"type": "response.output_item.done", "output_index": index, "item": item, "sequence_number": sequence})
}

fn completed(sequence: i64, output: &Value) -> Value {
    json!({"type": "response.completed", "sequence_number": sequence,
        "response": {"id": "resp_1", "status": "completed", "output": output, "usage": {"input_tokens": 1}}})
}

#[test]
fn a_stream_that_keeps_the_contract_passes_untouched() {
    let item = message("hi");
    let stream = [
        created(0),
        json!({"type": "response.in_progress", "sequence_number": 1, "response": {"id": "resp_1"}}),
        delta(2, "hi"),
        json!({"type": "response.brand_new", "sequence_number": 3}),
        done(4, 0, &item),
        completed(5, &json!([item])),
    ];
    assert_eq!(seen(&stream), stream);
}

#[test]
fn codex_events_do_not_reach_an_sdk() {
    let stream = [
        json!({"type": "codex.rate_limits"}),
        json!({"type": "response.metadata", "headers": {}}),
        created(0),
        json!({"type": "codex.keepalive"}),
        delta(1, "hi"),
        completed(2, &json!([message("hi")])),
    ];
    assert_eq!(
        types(&seen(&stream)),
        [
            "response.created",
            "response.output_text.delta",
            "response.completed"
        ]
    );
}

#[test]
fn a_missing_created_is_made_from_the_first_event_that_names_the_response() {
    let stream = [
        json!({"type": "response.in_progress", "sequence_number": 1, "response": {"id": "resp_1", "model": "m"}}),
    ];
    let seen = seen(&stream);
    assert_eq!(types(&seen), ["response.created", "response.in_progress"]);
    let response = &seen[0]["response"];
    assert_eq!(
        (&response["id"], &response["model"]),
        (&json!("resp_1"), &json!("m"))
    );
    assert_eq!(
        (&response["status"], &response["output"]),
        (&json!("in_progress"), &json!([]))
    );
    assert_eq!(seen[0]["sequence_number"], 0);
}

#[test]
fn a_made_created_never_takes_a_number_that_is_taken() {
    let stream = [completed(0, &json!([]))];
    let numbers: Vec<_> = seen(&stream)
        .iter()
        .map(|event| event["sequence_number"].as_i64())
        .collect();
    assert_eq!(numbers, [Some(-1), Some(0)]);
}

#[test]
fn early_text_waits_for_created_and_early_indexed_events_are_left_out() {
    let early = json!({"type": "response.output_text.delta", "delta": "early"});
    let stream = [
        early.clone(),
        delta(1, "lost"),
        completed(2, &json!([message("early")])),
    ];
    let seen = seen(&stream);
    assert_eq!(
        types(&seen),
        [
            "response.created",
            "response.output_text.delta",
            "response.completed"
        ]
    );
    assert_eq!(seen[1], early);
}

#[test]
fn early_text_is_held_within_a_bound() {
    let mut contract = Contract::new("resp_ours", NOW);
    let early = json!({"type": "response.output_text.delta", "delta": "x"});
    relay(&mut contract, &vec![early; HELD_EVENTS + 10]);
    assert_eq!(
        relay(&mut contract, &[completed(1, &json!([]))]).len(),
        1 + HELD_EVENTS + 1
    );
}

#[test]
fn a_lacking_output_is_filled_from_the_done_items_in_their_order() {
    let (first, second) = (
        message("a"),
        json!({"type": "function_call", "call_id": "c", "arguments": "{}"}),
    );
    for lacking in [json!([]), json!(null)] {
        let stream = [
            created(0),
            delta(1, "a"),
            done(2, 1, &second),
            done(3, 0, &first),
            completed(4, &lacking),
        ];
        let seen = seen(&stream);
        assert_eq!(seen[4]["response"]["output"], json!([first, second]));
        assert_eq!(seen[4]["response"]["usage"], json!({"input_tokens": 1}));
        assert_eq!(seen[4]["sequence_number"], 4);
    }
    let mut bare = completed(3, &json!([]));
    bare["response"]
        .as_object_mut()
        .expect("an object")
        .remove("output");
    let seen = seen(&[created(0), delta(1, "a"), done(2, 0, &first), bare]);
    assert_eq!(seen[3]["response"]["output"], json!([first]));
}

#[test]
fn an_error_becomes_a_failed_response_with_the_next_number() {
    let stream = [
        created(0),
        delta(1, "a"),
        json!({"type": "error", "code": "server_error", "message": "Oops", "error_type": "t"}),
    ];
    let seen = seen(&stream);
    let failed = &seen[2];
    assert_eq!(
        (&failed["type"], &failed["sequence_number"]),
        (&json!("response.failed"), &json!(2))
    );
    assert_eq!(failed["response"]["id"], "resp_1");
    assert_eq!(
        failed["response"]["error"],
        json!({"code": "server_error", "message": "Oops", "type": "t"})
    );
}

#[test]
fn a_stream_that_only_fails_still_begins_with_created() {
    for stream in [
        json!({"type": "error", "error": {"code": "server_error", "message": "Oops"}}),
        json!({"type": "response.failed", "sequence_number": 1, "response": {"id": "resp_1", "error": {}}}),
    ] {
        assert_eq!(
            types(&seen(&[stream])),
            ["response.created", "response.failed"]
        );
    }
}

#[test]
fn text_that_comes_only_at_the_end_comes_as_one_delta_before_it() {
    let stream = [
        created(0),
        completed(
            1,
            &json!([{"type": "reasoning", "summary": []}, message("late")]),
        ),
    ];
    let seen = seen(&stream);
    assert_eq!(
        types(&seen),
        [
            "response.created",
            "response.output_text.delta",
            "response.completed"
        ]
    );
    assert_eq!(
        (
            &seen[1]["delta"],
            &seen[1]["item_id"],
            &seen[1]["output_index"]
        ),
        (&json!("late"), &json!("msg_1"), &json!(1))
    );
    let numbers: Vec<_> = seen
        .iter()
        .map(|event| event["sequence_number"].as_i64())
        .collect();
    assert_eq!(numbers, [Some(0), Some(1), Some(2)]);
}

#[test]
fn text_of_a_done_item_that_never_streamed_comes_as_a_delta_too() {
    let seen = seen(&[
        created(0),
        done(1, 0, &message("late")),
        completed(2, &json!([])),
    ]);
    assert_eq!(seen[2]["delta"], "late");
    assert_eq!(seen[3]["response"]["output"], json!([message("late")]));
}

#[test]
fn nothing_follows_the_terminal_event_but_one_end_marker() {
    let mut contract = Contract::new("resp_ours", NOW);
    assert_eq!(contract.push(Kind::Done, b"[DONE]").event, Relay::Drop);
    relay(&mut contract, &[created(0), completed(1, &json!([]))]);
    assert!(contract.has_ended());
    assert_eq!(
        relay(&mut contract, &[delta(2, "x"), completed(3, &json!([]))]),
        [] as [Value; 0]
    );
    assert_eq!(contract.push(Kind::Done, b"[DONE]").event, Relay::Pass);
    assert_eq!(contract.push(Kind::Done, b"[DONE]").event, Relay::Drop);
    assert!(contract.fail(&ErrorObject::default()).is_empty());
}

#[test]
fn our_own_failure_ends_an_open_stream_well_formed() {
    let error = ErrorObject {
        message: "Upstream closed the stream",
        r#type: "server_error",
        code: "stream_incomplete",
        retry_after: Some(Duration::from_millis(2_500)),
        ..ErrorObject::default()
    };
    let mut contract = Contract::new("resp_ours", NOW);
    relay(&mut contract, &[created(0), delta(6, "a")]);
    let [failed] = &contract.fail(&error)[..] else {
        panic!("one event")
    };
    assert_eq!(
        parse(failed),
        json!({"type": "response.failed", "sequence_number": 7, "response": {"id": "resp_1", "object": "response",
            "created_at": NOW, "status": "failed", "model": "gpt-5", "output": [], "incomplete_details": null,
            "error": {"message": "Upstream closed the stream", "type": "server_error", "code": "stream_incomplete",
                "headers": {"retry-after": "3"}}}})
    );
    assert!(failed.frame().starts_with(
        b"event: response.failed\ndata: {\"type\":\"response.failed\",\"sequence_number\":7,"
    ));

    let events = Contract::new("resp_ours", NOW).fail(&error);
    let events: Vec<_> = events.iter().map(parse).collect();
    assert_eq!(types(&events), ["response.created", "response.failed"]);
    assert_eq!(
        (&events[1]["sequence_number"], &events[1]["response"]["id"]),
        (&json!(1), &json!("resp_ours"))
    );
}

#[test]
fn an_error_frame_always_has_a_status() {
    let error = ErrorObject {
        message: "The usage limit has been reached",
        r#type: "usage_limit_reached",
        code: "usage_limit_reached",
        resets_at: Some(NOW),
        ..ErrorObject::default()
    };
    let mut headers = HeaderMap::new();
    headers.insert(
        "x-codex-primary-used-percent",
        HeaderValue::from_static("100"),
    );
    let frame: Value = serde_json::from_slice(&error_frame(429, &error, &headers)).expect("JSON");
    assert_eq!(
        frame,
        json!({"type": "error", "status": 429,
            "error": {"message": "The usage limit has been reached", "type": "usage_limit_reached", "code": "usage_limit_reached", "resets_at": NOW},
            "headers": {"x-codex-primary-used-percent": "100"}})
    );
}

fn collect(events: &[Value]) -> Result<Value, CollectError> {
    let mut collector = Collector::new();
    for event in events {
        let data = event.to_string();
        collector.push(kind(data.as_bytes()), data.as_bytes());
    }
    collector
        .finish()
        .map(|json| serde_json::from_slice(&json).expect("JSON"))
}

#[test]
fn a_collected_response_is_the_terminal_object_with_its_output() {
    let mut terminal = completed(3, &json!([]));
    terminal["response"]["error"] = json!(null);
    terminal["response"]["new_field"] = json!({"kept": null});
    let response = collect(&[
        created(0),
        done(1, 0, &message("hi")),
        terminal,
        delta(4, "x"),
    ])
    .expect("a response");
    assert_eq!(
        response,
        json!({"id": "resp_1", "status": "completed", "output": [message("hi")], "usage": {"input_tokens": 1}, "new_field": {"kept": null}})
    );
    let incomplete = json!({"type": "response.incomplete", "response": {"id": "resp_1", "status": "incomplete", "output": []}});
    assert_eq!(
        collect(&[incomplete]).expect("a response")["status"],
        "incomplete"
    );
}

#[test]
fn a_collected_response_fails_for_a_reason() {
    let failed = |error: Result<Value, CollectError>| match error {
        Err(CollectError::Failed(error)) => error.code,
        other => panic!("{other:?}"),
    };
    let code = Some("server_error".to_owned());
    let error = json!({"code": "server_error", "message": "Oops"});
    assert_eq!(
        failed(collect(&[json!({"type": "error", "error": error})])),
        code
    );
    assert_eq!(
        failed(collect(&[
            json!({"type": "response.failed", "response": {"error": error}})
        ])),
        code
    );
    assert_eq!(
        failed(collect(&[
            json!({"type": "response.completed", "response": {"status": "failed", "error": error}})
        ])),
        code
    );
    assert_eq!(
        collect(&[created(0), delta(1, "a")]),
        Err(CollectError::Truncated)
    );

    let mut collector = Collector::new();
    collector.push(Kind::Comment, b"");
    collector.push(Kind::Unknown, b"{\"no\":\"type\"}");
    collector.push(Kind::Unknown, b"{oops");
    assert_eq!(collector.finish(), Err(CollectError::InvalidJson));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_upstream_sends_the_client_sees_one_whole_stream(picks in prop::collection::vec(0usize..12, 0..20)) {
        let palette = |sequence: i64, pick: usize| match pick {
            0 => created(sequence),
            1 => json!({"type": "response.in_progress", "sequence_number": sequence, "response": {"id": "resp_1"}}),
            2 => completed(sequence, &json!([])),
            3 => completed(sequence, &json!([message("late")])),
            4 => json!({"type": "response.incomplete", "response": {}}),
            5 => json!({"type": "response.failed", "sequence_number": sequence, "response": {"error": null}}),
            6 => json!({"type": "error"}),
            7 => json!({"type": "codex.rate_limits"}),
            8 => done(sequence, sequence % 3, &message("item")),
            9 => json!({"type": "response.output_text.delta", "delta": "x"}),
            10 => json!({"type": "response.completed"}),
            _ => delta(sequence, "x"),
        };
        let events: Vec<Value> = (1..).zip(picks).map(|(sequence, pick)| palette(sequence, pick)).collect();
        let mut contract = Contract::new("resp_ours", NOW);
        let mut seen = relay(&mut contract, &events);
        seen.extend(contract.fail(&ErrorObject::default()).iter().map(parse));

        let types = types(&seen);
        prop_assert_eq!(types[0], "response.created");
        let terminal = |name: &&str| ["response.completed", "response.incomplete", "response.failed"].contains(name);
        prop_assert!(types.last().is_some_and(terminal), "{:?}", types);
        prop_assert_eq!(types.iter().filter(|name| terminal(name)).count(), 1);
        prop_assert_eq!(types.iter().filter(|name| **name == "response.created").count(), 1);
        let numbers: Vec<i64> = seen.iter().filter_map(|event| event["sequence_number"].as_i64()).collect();
        prop_assert!(numbers.is_sorted_by(|a, b| a < b), "{:?}", numbers);
    }
}

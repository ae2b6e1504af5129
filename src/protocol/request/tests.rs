//! The rules, a row each: what a client sends, what upstream gets.

mod frames;
mod random;

use serde_json::{Value, json};

use super::*;

fn value(json: &[u8]) -> Value {
    serde_json::from_slice(json).unwrap()
}

fn bytes(value: &Value) -> Bytes {
    Bytes::from(value.to_string())
}

/// `fields` over a body that needs nothing.
fn body(fields: &Value) -> Value {
    let mut body = json!({"model": "m", "input": [], "stream": true, "store": false});
    for (key, value) in fields.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Sends `sent` and compares what upstream gets; null in `expected` says that the field is absent.
fn check(shape: Shape, sent: &Value, expected: &Value) {
    let request = read(bytes(&body(sent)), shape);
    let request = request.unwrap_or_else(|invalid| panic!("{sent}: {invalid}"));
    let got = value(&request.body);
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(
            got.get(key).unwrap_or(&Value::Null),
            value,
            "{key} of {sent}"
        );
    }
}

fn user(text: &str) -> Value {
    json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]})
}

#[test]
fn a_body_that_needs_nothing_comes_back_as_the_same_bytes() {
    let native = r#" {"model":"gpt-5.5","stream":true, "input":[
        {"type":"additional_tools","id":"at_1","role":"developer","tools":[{"n":1.50e3}]},
        {"type":"message","role":"developer","content":[{"type":"input_text","text":"be\u00e9"}]},
        {"type":"reasoning","id":"rs_1","summary":[],"content":null,"encrypted_content":"x"},
        {"type":"function_call_output","call_id":"c","output":[{"type":"input_image","image_url":"data:,"}]},
        {"type":"unheard_of","content":{"a":[]}}],
        "tools":[{"type":"web_search"}],"tool_choice":"auto","parallel_tool_calls":true,"reasoning":{"effort":"medium"},
        "store":false,"include":["reasoning.encrypted_content"],"prompt_cache_key":"k","text":{"verbosity":"low"},
        "new":1,"new":2,"client_metadata":{"turn_id":"t"}} "#;
    let body = Bytes::from_static(native.as_bytes());
    let request = read(body.clone(), Shape::Codex).unwrap();
    assert_eq!(request.body.as_ptr(), body.as_ptr());
    assert_eq!(request.body.len(), body.len());
}

#[test]
fn fields_become_what_upstream_takes() {
    let cases = [
        (json!({"stream": false}), json!({"stream": true})),
        (json!({"stream": null}), json!({"stream": true})),
        (json!({"store": true}), json!({"store": false})),
        (json!({"store": null}), json!({"store": false})),
        (json!({"background": true}), json!({"background": null})),
        (json!({"input": "hi"}), json!({"input": [user("hi")]})),
        (
            json!({"max_output_tokens": 5, "metadata": {}, "prompt_cache_retention": "24h", "promptCacheRetention": "24h",
                "safety_identifier": "s", "temperature": 1, "top_p": 0.5, "user": "u", "prompt_cache_options": {}}),
            json!({"max_output_tokens": null, "metadata": null, "prompt_cache_retention": null,
                "promptCacheRetention": null, "safety_identifier": null, "temperature": null, "top_p": null, "user": null,
                "prompt_cache_options": null}),
        ),
        (
            json!({"service_tier": "fast"}),
            json!({"service_tier": "priority"}),
        ),
        (
            json!({"service_tier": "flex"}),
            json!({"service_tier": "flex"}),
        ),
        (
            json!({"service_tier": "auto"}),
            json!({"service_tier": null}),
        ),
        (
            json!({"service_tier": "default"}),
            json!({"service_tier": null}),
        ),
        (json!({"truncation": "auto"}), json!({"truncation": null})),
        (
            json!({"truncation": "disabled"}),
            json!({"truncation": null}),
        ),
        (
            json!({"previous_response_id": " r "}),
            json!({"previous_response_id": "r"}),
        ),
        (
            json!({"previous_response_id": " "}),
            json!({"previous_response_id": null}),
        ),
        (
            json!({"previous_response_id": "r", "conversation": null}),
            json!({"previous_response_id": "r"}),
        ),
        (
            json!({"prompt_cache_key": " k"}),
            json!({"prompt_cache_key": "k"}),
        ),
        (
            json!({"promptCacheKey": "k"}),
            json!({"prompt_cache_key": "k", "promptCacheKey": null}),
        ),
        (
            json!({"prompt_cache_key": "k", "promptCacheKey": "x"}),
            json!({"prompt_cache_key": "k", "promptCacheKey": null}),
        ),
        (
            json!({"textVerbosity": "low", "text": {"format": {}}}),
            json!({"text": {"format": {}, "verbosity": "low"}, "textVerbosity": null}),
        ),
        (
            json!({"verbosity": "low", "text": {"verbosity": "high"}}),
            json!({"text": {"verbosity": "high"}, "verbosity": null}),
        ),
        (
            json!({"reasoning": {"effort": "minimal", "x": 1}}),
            json!({"reasoning": {"effort": "low", "x": 1}}),
        ),
        (
            json!({"reasoning": {"effort": "ultra"}}),
            json!({"reasoning": {"effort": "max"}}),
        ),
        (
            json!({"reasoningEffort": "minimal", "reasoningSummary": "auto"}),
            json!({"reasoning": {"effort": "low", "summary": "auto"}, "reasoningEffort": null, "reasoningSummary": null}),
        ),
        (
            json!({"thinking": "minimal", "enable_thinking": true}),
            json!({"reasoning": {"effort": "low"}, "thinking": null, "enable_thinking": null}),
        ),
        (
            json!({"thinking": {"effort": "high"}, "reasoning": {"summary": "auto"}}),
            json!({"reasoning": {"effort": "high", "summary": "auto"}, "thinking": null}),
        ),
        (
            json!({"thinking": {"type": "enabled", "budget_tokens": 9}}),
            json!({"reasoning": null, "thinking": null}),
        ),
        (
            json!({"thinking": true}),
            json!({"reasoning": null, "thinking": null}),
        ),
        (
            json!({"thinking": "high", "reasoning": {"effort": "low"}}),
            json!({"reasoning": {"effort": "low"}, "thinking": null}),
        ),
        (
            json!({"reasoning_effort": "high", "reasoning": {"effort": "low"}}),
            json!({"reasoning": {"effort": "low"}, "reasoning_effort": null}),
        ),
        (
            json!({"tools": [{"type": "web_search_preview", "a": 1}, {"type": "x"}],
                "tool_choice": {"type": "web_search_preview"}}),
            json!({"tools": [{"type": "web_search", "a": 1}, {"type": "x"}], "tool_choice": {"type": "web_search"}}),
        ),
        (json!({"tools": []}), json!({"tools": []})),
        (
            json!({}),
            json!({"tools": null, "tool_choice": null, "parallel_tool_calls": null}),
        ),
        (json!({"instructions": null}), json!({"instructions": null})),
    ];
    for (sent, expected) in cases {
        check(Shape::Codex, &sent, &expected);
        check(Shape::OpenAi, &sent, &expected);
    }
}

#[test]
fn items_become_what_upstream_takes() {
    let assistant = |content: Value| json!({"role": "assistant", "content": content});
    let cases = [
        (
            assistant(json!("a")),
            assistant(json!([{"type": "output_text", "text": "a"}])),
        ),
        (
            assistant(
                json!([{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "refusal"},
                {"type": "reasoning_text", "text": "c"}]),
            ),
            assistant(
                json!([{"type": "output_text", "text": "a"}, {"type": "output_text", "text": "b"}, {"type": "refusal"}]),
            ),
        ),
        (
            json!({"role": "user", "content": "u"}),
            json!({"role": "user", "content": "u"}),
        ),
        (
            json!({"role": "user", "reasoning_content": "r", "reasoning_details": [], "tool_calls": [], "function_call": {},
                "content": [{"type": "input_text", "text": "u", "reasoning_content": "r", "prompt_cache_breakpoint": {}}]}),
            json!({"role": "user", "content": [{"type": "input_text", "text": "u"}]}),
        ),
        (
            json!({"role": "tool", "tool_call_id": "c", "content": "out", "name": "f"}),
            json!({"type": "function_call_output", "call_id": "c", "output": "out"}),
        ),
        (
            json!({"type": "message", "role": "tool", "toolCallId": "c", "content": [{"type": "text", "text": "a"}]}),
            json!({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "a"}]}),
        ),
        (
            json!({"role": "tool", "call_id": "c", "content": {"a": 1}}),
            json!({"type": "function_call_output", "call_id": "c", "output": "{\"a\":1}"}),
        ),
        (
            json!({"role": "tool", "call_id": "c", "content": null}),
            json!({"type": "function_call_output", "call_id": "c", "output": ""}),
        ),
        (
            json!({"type": "function_call", "namespace": "n", "call_id": "c", "name": "f", "arguments": "{}"}),
            json!({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}),
        ),
        (
            json!({"type": "custom_tool_call", "namespace": "n"}),
            json!({"type": "custom_tool_call"}),
        ),
        (
            json!({"type": "apply_patch_call", "namespace": "n"}),
            json!({"type": "apply_patch_call"}),
        ),
        (
            json!({"type": "other", "namespace": "n"}),
            json!({"type": "other", "namespace": "n"}),
        ),
        (
            json!({"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]}),
            json!({"type": "reasoning", "content": [{"type": "reasoning_text", "text": "t"}]}),
        ),
        (
            json!({"type": "additional_tools", "role": "developer", "tool_calls": 1}),
            json!({"type": "additional_tools", "role": "developer", "tool_calls": 1}),
        ),
    ];
    for (sent, expected) in cases {
        for shape in [Shape::Codex, Shape::OpenAi] {
            check(
                shape,
                &json!({"input": [sent]}),
                &json!({"input": [expected]}),
            );
        }
    }
}

#[test]
fn system_messages_become_instructions_where_the_client_means_them_so() {
    use Shape::{Codex, OpenAi};
    let says = |role: &str| json!({"role": role, "content": role});
    let both = json!([says("system"), says("developer"), user("hi")]);
    let lite = json!([{"type": "additional_tools", "role": "developer"}, says("developer"), says("system")]);
    let image = json!({"type": "input_image", "image_url": "data:,"});
    let mixed = json!([{"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}, image,
        {"type": "text", "text": "b"}]}]);
    let cases = [
        (
            OpenAi,
            json!({"input": both}),
            json!({"instructions": "system\ndeveloper", "input": [user("hi")]}),
        ),
        (
            OpenAi,
            json!({"input": both, "instructions": "mine"}),
            json!({"instructions": "mine\nsystem", "input": [says("developer"), user("hi")]}),
        ),
        (
            OpenAi,
            json!({"input": lite}),
            json!({"instructions": null, "input": lite}),
        ),
        (
            OpenAi,
            json!({"input": mixed}),
            json!({"instructions": "a\nb", "input": [{"type": "message", "role": "user", "content": [image]}]}),
        ),
        (
            OpenAi,
            json!({"input": [{"role": "developer"}]}),
            json!({"instructions": null, "input": []}),
        ),
        (
            OpenAi,
            json!({"input": both, "client_metadata": {}}),
            json!({"instructions": "system", "input": [says("developer"), user("hi")]}),
        ),
        (
            Codex,
            json!({"input": both}),
            json!({"instructions": "system", "input": [says("developer"), user("hi")]}),
        ),
        (
            Codex,
            json!({"input": both, "truncation": "auto"}),
            json!({"instructions": "system\ndeveloper", "input": [user("hi")]}),
        ),
        (
            Codex,
            json!({"input": mixed}),
            json!({"instructions": null, "input": mixed}),
        ),
    ];
    for (shape, sent, expected) in cases {
        check(shape, &sent, &expected);
    }
}

#[test]
fn chat_messages_become_items() {
    let call =
        json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}});
    let custom = json!({"id": "d", "type": "custom", "custom": {"name": "g", "input": "i"}});
    let cases = [
        (
            json!([{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "n"}]),
            json!({"messages": null, "instructions": "first\ns", "input": [user("u")]}),
        ),
        (
            json!([{"role": "user", "content": [{"type": "text", "text": "u"},
                {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
                {"type": "file", "file": {"file_id": "f"}}]}]),
            json!({"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "u"},
                {"type": "input_image", "image_url": "https://x/y.png", "detail": "low"},
                {"type": "input_file", "file_id": "f"}]}]}),
        ),
        (
            json!([{"role": "assistant", "content": null, "tool_calls": [call, custom]},
                {"role": "tool", "tool_call_id": "c", "content": "out"}, {"role": "assistant", "content": "done"}]),
            json!({"input": [
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{\"a\":1}"},
                {"type": "custom_tool_call", "call_id": "d", "name": "g", "input": "i"},
                {"type": "function_call_output", "call_id": "c", "output": "out"},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "done"}]}]}),
        ),
    ];
    for (messages, expected) in cases {
        let sent = json!({"messages": messages, "instructions": "first"});
        for shape in [Shape::OpenAi, Shape::Codex] {
            check(shape, &sent, &expected);
        }
    }
}

#[test]
fn what_upstream_would_refuse_obscurely_is_refused_clearly() {
    let image = |part: Value| json!({"input": [{"role": "user", "content": [part]}]});
    let trigger = json!({"type": "compaction_trigger"});
    let cases = [
        (json!({"model": null}), "model"),
        (json!({"model": " "}), "model"),
        (json!({"model": 7}), "model"),
        (json!({"model": "a\nb"}), "model"),
        (json!({"model": "m".repeat(257)}), "model"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"store": 1}), "store"),
        (json!({"input": 7}), "input"),
        (json!({"input": null}), "input"),
        (json!({"input": ["secret"]}), "input"),
        (json!({"input": "secret", "messages": []}), "messages"),
        (json!({"messages": "secret"}), "messages"),
        (json!({"messages": [{"role": "secret"}]}), "messages"),
        (
            json!({"messages": [{"role": "user", "content": 7}]}),
            "messages",
        ),
        (
            json!({"messages": [{"role": "assistant", "tool_calls": [
                {"id": "c", "function": {"name": "f", "arguments": {"secret": 1}}}]}]}),
            "messages",
        ),
        (json!({"instructions": ["secret"]}), "instructions"),
        (
            json!({"input": [{"role": "tool", "content": "secret"}]}),
            "input",
        ),
        (json!({"include": ["secret"]}), "include"),
        (json!({"include": "secret"}), "include"),
        (json!({"reasoning": "secret"}), "reasoning"),
        (json!({"service_tier": 7}), "service_tier"),
        (json!({"previous_response_id": 7}), "previous_response_id"),
        (
            json!({"previous_response_id": "r", "conversation": "c"}),
            "previous_response_id",
        ),
        (json!({"truncation": "secret"}), "truncation"),
        (json!({"prompt_cache_key": 7}), "prompt_cache_key"),
        (json!({"promptCacheKey": 7}), "promptCacheKey"),
        (json!({"input": [trigger, trigger]}), "input"),
        (json!({"input": [trigger, user("secret")]}), "input"),
        (
            image(json!({"type": "input_image", "file_id": "secret"})),
            "input",
        ),
        (
            image(json!({"type": "input_image", "image_url": "sediment://secret"})),
            "input",
        ),
    ];
    for (sent, param) in cases {
        for shape in [Shape::Codex, Shape::OpenAi, Shape::Compact] {
            let invalid = read(bytes(&body(&sent)), shape).expect_err(param);
            assert_eq!(invalid.param.as_deref(), Some(param), "{sent}");
            let image = sent.to_string().contains("input_image");
            let code = if image {
                "unsupported_input_image_format"
            } else {
                "invalid_request_error"
            };
            assert_eq!(invalid.code, code, "{sent}");
            assert!(!invalid.message.contains("secret"), "{sent}");
        }
    }
}

#[test]
fn what_is_no_body_is_refused_by_its_place_alone() {
    let deep = format!(
        r#"{{"model":"m","input":[],"x":{}{}}}"#,
        "[".repeat(127),
        "]".repeat(127)
    );
    let cases: [(&[u8], &str, &str); 8] = [
        (b"", "invalid_json", "line 1, column 0"),
        (b"{\"secret\":\n oops}", "invalid_json", "line 2, column 2"),
        (b"{\"model\":\"m\"} {}", "invalid_json", "line 1, column 15"),
        (b"[\"secret\"]", "invalid_json", "JSON object"),
        (b"\"secret\"", "invalid_json", "JSON object"),
        (b"{\"model\":\"\xff\"}", "invalid_json", "UTF-8"),
        (deep.as_bytes(), "invalid_json", "deeper than 127"),
        (
            br#"{"model":"m","input":[],"mod\u0065l":"n"}"#,
            "invalid_request_error",
            "`model` stands twice",
        ),
    ];
    for (body, code, message) in cases {
        let invalid = read(Bytes::copy_from_slice(body), Shape::Codex).unwrap_err();
        assert_eq!(invalid.code, code);
        assert!(invalid.message.contains(message), "{}", invalid.message);
        assert!(!invalid.message.contains("secret"), "{}", invalid.message);
    }
}

#[test]
fn what_is_passed_on_can_be_read_by_any_reader_with_the_usual_limit() {
    let nested = |levels: usize| {
        let (open, close) = ("[".repeat(levels), "]".repeat(levels));
        Bytes::from(format!(
            r#"{{"model":"m","input":[],"x":{open}"]\\\"["{close}}}"#
        ))
    };
    let request = read(nested(126), Shape::Codex).unwrap();
    assert!(serde_json::from_slice::<Value>(&request.body).is_ok());
    assert!(read(nested(127), Shape::Codex).is_err());
    assert!(serde_json::from_slice::<Value>(&nested(127)).is_err());
}

#[test]
fn the_absence_of_input_is_refused_and_an_empty_list_is_not() {
    let absent = Bytes::from_static(br#"{"model":"m"}"#);
    let invalid = read(absent, Shape::OpenAi).unwrap_err();
    assert_eq!(invalid.param.as_deref(), Some("input"));
    for shape in [Shape::Codex, Shape::OpenAi] {
        assert!(read(bytes(&body(&json!({}))), shape).is_ok());
    }
}

#[test]
fn unknown_fields_and_numbers_keep_their_bytes() {
    let sent = r#"{"z":1.50,"stream":false, "a" : {"b" : 1e999} ,"model":"m","temperature":1,"input":[{"x":1.0,"role":"assistant","content":"\u00e9"}],"z":"\u0041"}"#;
    let expected = r#"{"z":1.50,"stream":true, "a" : {"b" : 1e999} ,"model":"m","input":[{"x":1.0,"role":"assistant","content":[{"type":"output_text","text":"\u00e9"}]}],"z":"\u0041","store":false}"#;
    let request = read(Bytes::from_static(sent.as_bytes()), Shape::Codex).unwrap();
    assert_eq!(request.body, expected);
    let sent =
        br#"{"temperature":1 ,"model":"m","input":[],"stream":true,"store":false,"user":"u"}"#;
    let request = read(Bytes::from_static(sent), Shape::Codex).unwrap();
    assert_eq!(
        request.body,
        r#"{"model":"m","input":[],"stream":true,"store":false}"#
    );
}

#[test]
fn the_facts_are_what_the_body_says() {
    let image = json!({"type": "input_image", "image_url": "https://x/y.png"});
    let sent = json!({"model": "gpt-5", "stream": false, "generate": false, "previous_response_id": " r ", "prompt_cache_key": "k",
        "service_tier": "fast", "input": [{"type": "function_call_output", "output": [image]}],
        "client_metadata": {"thread_id": "t"}});
    let facts = read(bytes(&body(&sent)), Shape::OpenAi).unwrap().facts;
    let expected = Facts {
        model: "gpt-5".into(),
        alias: None,
        stream: false,
        generate: false,
        previous_response_id: Some("r".into()),
        prompt_cache_key: Some("k".into()),
        service_tier: Some("priority".into()),
        input_images: true,
        inline_bytes: 0,
        client: Client {
            thread_id: Some("t".into()),
            ..Client::default()
        },
    };
    assert_eq!(facts, expected);
    let native = read(bytes(&body(&json!({"stream": false}))), Shape::Codex)
        .unwrap()
        .facts;
    assert_eq!(
        (native.stream, native.generate, native.input_images),
        (true, true, false)
    );
}

#[test]
fn images_and_files_that_stand_in_the_input_are_counted_apart_from_its_text() {
    let (image, file) = ("data:image/png;base64,AAAA", "JVBERi0x");
    let content = json!([
        {"type": "input_text", "text": image},
        {"type": "input_image", "image_url": image},
        {"type": "input_image", "image_url": "https://x/y.png"},
        {"type": "input_file", "filename": "a.pdf", "file_data": file},
        {"type": "input_file", "file_id": "f"},
    ]);
    let chat = json!([
        {"type": "image_url", "image_url": {"url": image}},
        {"type": "file", "file": {"file_data": file}},
    ]);
    let both = (image.len() + file.len()) as u64;
    for (what, sent) in [
        (
            "a message",
            json!({"input": [{"role": "user", "content": content}]}),
        ),
        (
            "a tool's output",
            json!({"input": [{"type": "function_call_output", "output": content}]}),
        ),
        (
            "a chat",
            json!({"input": null, "messages": [{"role": "user", "content": chat}]}),
        ),
    ] {
        let facts = read(bytes(&body(&sent)), Shape::OpenAi).unwrap().facts;
        assert_eq!(facts.inline_bytes, both, "{what}");
    }
}

#[test]
fn a_compaction_ends_in_one_trigger_and_asks_for_nothing_else() {
    let trigger = json!({"type": "compaction_trigger"});
    let extras = json!({"tools": null, "tool_choice": null, "text": null, "client_metadata": null, "parallel_tool_calls": false});
    for input in [
        json!([user("hi")]),
        json!([user("hi"), trigger]),
        json!("hi"),
    ] {
        let sent = json!({"input": input, "tools": [], "tool_choice": "auto", "text": {}, "parallel_tool_calls": true,
            "client_metadata": {"thread_id": "t"}});
        let mut expected = extras.clone();
        expected["input"] = json!([user("hi"), trigger]);
        check(Shape::Compact, &sent, &expected);
        let facts = read(bytes(&body(&sent)), Shape::Compact).unwrap().facts;
        assert_eq!(facts.client.thread_id.as_deref(), Some("t"));
    }
}

#[test]
fn a_request_does_not_print_its_prompt() {
    let request = read(bytes(&body(&json!({"input": "secret"}))), Shape::Codex).unwrap();
    assert!(!format!("{request:?}").contains("secret"));
}

#[test]
fn an_alias_changes_the_model_and_nothing_else() {
    let body = r#"{ "input":[{"role":"user","content":"the model is fast"}],  "model":"fast", "stream":true,"store":false}"#;
    let text = |request: &Request| String::from_utf8(request.body.to_vec()).unwrap();
    let mut request = read(Bytes::from(body), Shape::Codex).unwrap();
    let expected = text(&request).replace(r#""model":"fast""#, r#""model":"gpt-5.4-mini""#);
    request.redirect("gpt-5.4-mini");
    assert_eq!(text(&request), expected);
    assert_eq!(request.facts.model, "gpt-5.4-mini");
    assert_eq!(request.facts.asked_model(), "fast");
}

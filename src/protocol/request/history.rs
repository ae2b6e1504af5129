//! A conversation told again: the items of its finished turns, put before those of a request.
//!
//! Owns which items of a history another reader may get, and the edit that makes a request whole. It must not know where a history is
//! kept. The request's own items are the client's word and are not touched.
//!
//! Invariant: a history is told whole or not at all, and what is not edited keeps its bytes, in the items and in the body.

use std::borrow::Cow;
use std::collections::HashSet;

use bytes::Bytes;

use super::splice::{Container, string};
use super::{Invalid, parse};

/// What one finished turn added to a conversation.
#[derive(Debug, Clone, Copy)]
pub struct Past<'a> {
    /// Its input items, then its output items: a JSON array of objects.
    pub items: &'a str,
    /// The account that reads them now is the one that wrote them.
    pub own: bool,
}

/// Why a history cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Untold {
    /// The request does not fit its history; 400.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The history is damaged, or holds what only the account that wrote it can read (a compaction): as if it were not kept.
    #[error("the history cannot be told to this account")]
    Lost,
}

/// The `input` of a normalised body, as it stands there.
pub fn input(body: &Bytes) -> Option<&str> {
    let object = Container::object(std::str::from_utf8(body).ok()?).ok()?;
    object.get("input")
}

/// The items of an `input` as an array: a string counts as one message of the user. `None` for anything else.
pub fn items(input: &str) -> Option<Cow<'_, str>> {
    if input.starts_with('"') {
        string(input)?;
        let part = format!(r#"{{"type":"input_text","text":{input}}}"#);
        return Some(Cow::Owned(format!(
            r#"[{{"type":"message","role":"user","content":[{part}]}}]"#
        )));
    }
    input.starts_with('[').then_some(Cow::Borrowed(input))
}

/// The members of two arrays as one array, as they stand there; `None` where either is no array.
pub fn concat(first: &str, second: &str) -> Option<String> {
    let (head, tail) = (inner(first)?, inner(second)?);
    let comma = if head.is_empty() || tail.is_empty() {
        ""
    } else {
        ","
    };
    Some(format!("[{head}{comma}{tail}]"))
}

/// What a reader gets of a history, as one array.
///
/// # Errors
/// [`Untold::Lost`].
pub fn told<'a>(past: impl IntoIterator<Item = Past<'a>>) -> Result<String, Untold> {
    Told::of(past).map(|told| told.array())
}

/// The request with its history before its own items, and without `previous_response_id`.
///
/// # Errors
/// [`Untold::Invalid`] where a tool call of the history is answered neither there nor in the request: a success is not invented.
/// [`Untold::Lost`].
pub fn rebuild<'a>(
    body: &Bytes,
    past: impl IntoIterator<Item = Past<'a>>,
) -> Result<Bytes, Untold> {
    let wrong = |message: &str| Invalid::new("input", message);
    let text = std::str::from_utf8(body).map_err(|_| wrong("The request is not UTF-8."))?;
    let mut object = parse(text)?;
    let own = object.get("input").and_then(items);
    let own = own.ok_or_else(|| wrong("`input` must be a string or an array."))?;
    let told = Told::of(past)?;
    let (_, objects) = Container::objects(&own)
        .map_err(|_| wrong("`input` must be an array, and every item of it an object."))?;
    let answers: HashSet<_> = objects.iter().filter_map(answered).collect();
    if let Some(call) = told.open().find(|call| !answers.contains(*call)) {
        return Err(wrong(&format!(
            "The tool call {call} of the previous response has no output in `input`."
        ))
        .into());
    }
    let whole = concat(&told.array(), &own).expect("both are arrays");
    object.remove("previous_response_id");
    object.set("input", whole);
    let edited = object.finish();
    Ok(edited.map_or_else(|| body.clone(), Bytes::from))
}

/// A request that brings its whole history, without what a model has thought in it: another account cannot read that. `None` where there
/// is nothing of the kind.
pub fn without_thoughts(body: &Bytes) -> Option<Bytes> {
    let mut object = parse(std::str::from_utf8(body).ok()?).ok()?;
    let (mut list, objects) = Container::objects(object.get("input")?).ok()?;
    for (index, item) in objects.iter().enumerate() {
        if kind(item) == "reasoning" && item.present("encrypted_content").is_some() {
            list.remove_at(index);
        }
    }
    object.set("input", list.finish()?);
    object.finish().map(Bytes::from)
}

/// What stands between the brackets.
fn inner(array: &str) -> Option<&str> {
    let inner = array.trim().strip_prefix('[')?.strip_suffix(']')?;
    Some(inner.trim())
}

/// The items of a history that are told, and the tool calls among them.
#[derive(Default)]
struct Told<'a> {
    items: Vec<Cow<'a, str>>,
    calls: Vec<Cow<'a, str>>,
    answers: HashSet<Cow<'a, str>>,
}

impl<'a> Told<'a> {
    fn of(past: impl IntoIterator<Item = Past<'a>>) -> Result<Self, Untold> {
        let mut told = Self::default();
        for Past { items, own } in past {
            let (list, objects) = Container::objects(items).map_err(|_| Untold::Lost)?;
            for (raw, item) in list.values().zip(objects) {
                told.calls.extend(called(&item));
                told.answers.extend(answered(&item));
                told.items.extend(retold(raw, item, own)?);
            }
        }
        Ok(told)
    }

    fn array(&self) -> String {
        format!("[{}]", self.items.join(","))
    }

    /// The calls that nothing in the history answers.
    fn open(&self) -> impl Iterator<Item = &Cow<'a, str>> {
        self.calls
            .iter()
            .filter(|call| !self.answers.contains(*call))
    }
}

/// The id under which an item asks the client to run a tool. What upstream runs itself has none.
fn called<'a>(item: &Container<'a>) -> Option<Cow<'a, str>> {
    item.string("call_id")
        .filter(|_| kind(item).ends_with("_call"))
}

/// The id of the call that an item answers.
fn answered<'a>(item: &Container<'a>) -> Option<Cow<'a, str>> {
    item.string("call_id")
        .filter(|_| kind(item).ends_with("_output"))
}

fn kind<'a>(item: &Container<'a>) -> Cow<'a, str> {
    item.string("type").unwrap_or(Cow::Borrowed("message"))
}

/// An item as the reader gets it, if at all.
fn retold<'a>(
    raw: &'a str,
    mut item: Container<'a>,
    own: bool,
) -> Result<Option<Cow<'a, str>>, Untold> {
    let encrypted = item.present("encrypted_content").is_some();
    match &*kind(&item) {
        "compaction_trigger" => return Ok(None), // may stand only at the end of a request
        // Without its content it is a mere reference to what upstream does not store.
        "reasoning" => return Ok((own && encrypted).then_some(Cow::Borrowed(raw))),
        _ if own => return Ok(Some(Cow::Borrowed(raw))),
        "item_reference" => return Err(Untold::Lost),
        _ if encrypted => return Err(Untold::Lost),
        _ => item.remove("id"),
    }
    if let Some(parts) = item.present("content").and_then(without_files) {
        if inner(&parts).is_none_or(str::is_empty) {
            return Ok(None);
        }
        item.set("content", parts);
    }
    if let Some(parts) = item.present("output").and_then(without_files) {
        item.set("output", parts); // its call stays answered, be it with nothing
    }
    Ok(Some(item.finish().map_or(Cow::Borrowed(raw), Cow::Owned)))
}

/// A list of parts without those that name a file of an account; `None` where there are none.
fn without_files(raw: &str) -> Option<String> {
    let (mut list, parts) = Container::objects(raw).ok()?;
    for (index, part) in parts.iter().enumerate() {
        if part.present("file_id").is_some() {
            list.remove_at(index);
        }
    }
    list.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn body(input: &str) -> Bytes {
        Bytes::from(format!(
            r#"{{ "model" : "m", "previous_response_id":"resp_1" ,"input" : {input}, "x": 1.0 }}"#
        ))
    }

    fn rebuilt(past: &[(&str, bool)], input: &str) -> Result<String, Untold> {
        let past = past.iter().map(|&(items, own)| Past { items, own });
        let whole = rebuild(&body(input), past)?;
        let whole = std::str::from_utf8(&whole).unwrap();
        let input = whole
            .strip_prefix(r#"{ "model" : "m" ,"input" : "#)
            .and_then(|rest| rest.strip_suffix(r#", "x": 1.0 }"#))
            .expect("the rest of the body keeps its bytes");
        Ok(input.trim().to_owned())
    }

    const HI: &str = r#"{"role":"user","content":"hi"}"#;

    #[test]
    fn the_history_stands_before_the_request_s_own_items() {
        let reasoning = r#"{"type":"reasoning","id":"rs_1","summary":[],"encrypted_content":"e"}"#;
        let call = r#"{"type":"function_call","id":"fc_1","call_id":"c\u0031","name":"f","arguments":"{}"}"#;
        let output = r#"{"type":"function_call_output","call_id":"c1","output":"é 🦀"}"#;
        let custom = r#"{"type":"custom_tool_call","call_id":"c2","name":"f","input":""}"#;
        let custom_output = r#"{"type":"custom_tool_call_output","call_id":"c2","output":""}"#;
        let search = r#"{"type":"web_search_call","id":"ws_1","status":"completed"}"#;
        let compaction = r#"{"type":"compaction","id":"cmp_1","encrypted_content":"e"}"#;
        let file = r#"{"role":"user","content":[{"type":"input_file","file_id":"f"},{"type":"input_text","text":"t"}]}"#;
        let file_alone = r#"{"role":"user","content":[{"type":"input_file","file_id":"f"}]}"#;
        let file_output = r#"{"type":"function_call_output","call_id":"c1","output":[{"type":"input_file","file_id":"f"}]}"#;
        let one = |item: &str| format!("[{item}]");
        let two = |a: &str, b: &str| format!("[{a},{b}]");
        // The items of the history, whether they are the reader's own, the request's input, what becomes of it.
        let cases: Vec<(String, bool, String, Result<String, &str>)> = vec![
            ("[]".into(), true, one(HI), Ok(one(HI))),
            (one(HI), true, "[]".into(), Ok(one(HI))),
            (one(HI), true, " [ {} ] ".into(), Ok(format!("[{HI},{{}}]"))),
            (
                one(HI),
                true,
                r#""\u00e9""#.into(),
                Ok(format!(
                    r#"[{HI},{{"type":"message","role":"user","content":[{{"type":"input_text","text":"\u00e9"}}]}}]"#
                )),
            ),
            (two(reasoning, HI), true, one(HI), Ok(format!("[{reasoning},{HI},{HI}]"))),
            (two(reasoning, HI), false, one(HI), Ok(two(HI, HI))),
            (r#"[{"type":"reasoning","id":"rs_1","summary":[],"encrypted_content":null}]"#.into(), true, one(HI), Ok(one(HI))),
            (r#"[{"type":"compaction_trigger"}]"#.into(), true, one(HI), Ok(one(HI))),
            (two(call, output), true, one(HI), Ok(format!("[{call},{output},{HI}]"))),
            (one(call), true, one(output), Ok(two(call, output))),
            (one(custom), true, one(custom_output), Ok(two(custom, custom_output))),
            (
                two(call, output),
                false,
                one(call),
                Ok(format!(
                    r#"[{{"type":"function_call","call_id":"c\u0031","name":"f","arguments":"{{}}"}},{output},{call}]"#
                )),
            ),
            (one(call), true, one(HI), Err("invalid_request_error: The tool call c1 of")),
            (one(call), true, one(custom_output), Err("invalid_request_error: The tool call c1 of")),
            (one(search), true, one(HI), Ok(two(search, HI))),
            (one(search), false, one(HI), Ok(format!(r#"[{{"type":"web_search_call","status":"completed"}},{HI}]"#))),
            (one(compaction), true, one(HI), Ok(two(compaction, HI))),
            (one(compaction), false, one(HI), Err("the history")),
            (r#"[{"type":"item_reference","id":"i"}]"#.into(), false, one(HI), Err("the history")),
            (one(file), true, one(file), Ok(two(file, file))),
            (
                one(file),
                false,
                one(file),
                Ok(format!(r#"[{{"role":"user","content":[{{"type":"input_text","text":"t"}}]}},{file}]"#)),
            ),
            (one(file_alone), false, one(HI), Ok(one(HI))),
            (
                two(call, file_output),
                false,
                "[]".into(),
                Ok(r#"[{"type":"function_call","call_id":"c\u0031","name":"f","arguments":"{}"},{"type":"function_call_output","call_id":"c1","output":[]}]"#.into()),
            ),
            ("[7]".into(), true, one(HI), Err("the history")),
            ("{}".into(), true, one(HI), Err("the history")),
            (one(HI), true, "[7]".into(), Err("invalid_request_error")),
            (one(HI), true, "7".into(), Err("invalid_request_error")),
        ];
        for (items, own, input, expected) in cases {
            let got = rebuilt(&[(&items, own)], &input);
            match (&got, expected) {
                (Ok(got), Ok(expected)) => assert_eq!(*got, expected, "{items} {own} {input}"),
                (Err(error), Err(expected)) => {
                    assert!(
                        error.to_string().starts_with(expected),
                        "{error} {items} {own} {input}"
                    );
                }
                _ => panic!("{got:?} for {items} {own} {input}"),
            }
        }
    }

    #[test]
    fn each_turn_is_told_by_who_wrote_it() {
        let theirs =
            r#"[{"type":"reasoning","encrypted_content":"a"},{"id":"m","role":"assistant"}]"#;
        let ours = r#"[{"type":"reasoning","encrypted_content":"b"}]"#;
        assert_eq!(
            rebuilt(&[(theirs, false), (ours, true)], "[]").unwrap(),
            r#"[{"role":"assistant"},{"type":"reasoning","encrypted_content":"b"}]"#
        );
    }

    #[test]
    fn three_hundred_items_keep_their_order_and_their_bytes() {
        let items: Vec<_> = (0..300)
            .map(|number| format!(r#"{{ "role":"user","content" : "é\u00e9 {number} 🦀" }}"#))
            .collect();
        let turns: Vec<_> = items
            .chunks(7)
            .map(|turn| format!("[{}]", turn.join(",")))
            .collect();
        let past: Vec<_> = turns.iter().map(|turn| (turn.as_str(), true)).collect();
        let whole = rebuilt(&past, &format!("[{HI}]")).unwrap();
        assert_eq!(whole, format!("[{},{HI}]", items.join(",")));
    }

    #[test]
    fn thoughts_are_left_out_and_nothing_else() {
        let thought = r#"{"type":"reasoning","id":"rs_1","summary":[],"encrypted_content":"e"}"#;
        let said = r#"{"role":"assistant","content":"x", "id":"m"}"#;
        let without = |input: &str| {
            let body = without_thoughts(&body(input))?;
            input_of(&body)
        };
        let whole = format!("[{thought},{said},{thought}]");
        let left: Vec<Value> = serde_json::from_str(&without(&whole).unwrap()).unwrap();
        assert_eq!(left, [serde_json::from_str::<Value>(said).unwrap()]);
        for input in [format!("[{said}]"), r#""text""#.to_owned()] {
            assert_eq!(without(&input), None, "{input}");
        }
    }

    fn input_of(body: &Bytes) -> Option<String> {
        input(body).map(str::to_owned)
    }

    #[test]
    fn the_input_of_a_body_is_read_as_it_stands() {
        assert_eq!(input(&body(" [ {} ]")), Some("[ {} ]"));
        assert_eq!(input(&Bytes::from_static(b"{}")), None);
    }

    fn any_item() -> impl Strategy<Value = Value> {
        let kind = proptest::sample::select(vec![
            "message",
            "web_search_call",
            "function_call_output",
            "other",
        ]);
        (
            kind,
            "\\PC{0,12}",
            proptest::option::of("[a-c]"),
            any::<bool>(),
        )
            .prop_map(|(kind, text, id, parts)| {
                let content = if parts {
                    json!([{"type": "input_text", "text": text}])
                } else {
                    json!(text)
                };
                let mut item = json!({"type": kind, "content": content});
                if kind.ends_with("_output") {
                    item["call_id"] = json!("c");
                }
                if let Some(id) = id {
                    item["id"] = json!(id);
                }
                item
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_history_is_told_whole_and_in_order(
            turns in proptest::collection::vec((proptest::collection::vec(any_item(), 0..60), any::<bool>()), 0..6),
            own in proptest::collection::vec(any_item(), 0..4),
        ) {
            let texts: Vec<_> = turns.iter().map(|(items, own)| (json!(items).to_string(), *own)).collect();
            let past: Vec<_> = texts.iter().map(|(items, own)| (items.as_str(), *own)).collect();
            let whole: Value = serde_json::from_str(&rebuilt(&past, &json!(own).to_string()).unwrap()).unwrap();
            let mut expected = Vec::new();
            for (items, own) in turns {
                for mut item in items {
                    if !own {
                        item.as_object_mut().unwrap().remove("id");
                    }
                    expected.push(item);
                }
            }
            expected.extend(own);
            prop_assert_eq!(whole, json!(expected));
        }
    }
}

//! The rules of the top-level fields.
//!
//! Each function reads the original value of its field, refuses it or edits it, and returns the fact that it makes.

use std::borrow::Cow;

use super::client::{Client, TURN_STATE};
use super::input::{self, Hoist};
use super::splice::{Container, quoted, string};
use super::{Facts, Invalid, Shape, chat};

/// Upstream refuses these from ChatGPT accounts, with any value.
const REFUSED: [&str; 12] = [
    "background",
    "enable_thinking",
    "max_output_tokens",
    "metadata",
    "prompt_cache_options",
    "prompt_cache_retention",
    "promptCacheRetention",
    "safety_identifier",
    "temperature",
    "thinking",
    "top_p",
    "user",
];

/// Other spellings of a member of a field: the field, the member, the aliases.
const ALIASES: [(&str, &str, &[&str]); 3] = [
    (
        "reasoning",
        "effort",
        &["reasoning_effort", "reasoningEffort"],
    ),
    (
        "reasoning",
        "summary",
        &["reasoning_summary", "reasoningSummary"],
    ),
    ("text", "verbosity", &["verbosity", "textVerbosity"]),
];

/// The fields that we read. One that stands twice would be read differently by different readers.
const READ: [&str; 21] = [
    "client_metadata",
    "conversation",
    "generate",
    "include",
    "input",
    "instructions",
    "messages",
    "model",
    "parallel_tool_calls",
    "previous_response_id",
    "promptCacheKey",
    "prompt_cache_key",
    "reasoning",
    "service_tier",
    "store",
    "stream",
    "text",
    "tool_choice",
    "tools",
    "truncation",
    "type",
];

const INCLUDES: [&str; 7] = [
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
];

/// The efforts that clients name.
const EFFORTS: [&str; 8] = [
    "none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra",
];

/// The longest name of a model, in bytes.
const MODEL: usize = 256;

/// Edits the body and says what is in it.
pub(super) fn normalise(body: &mut Container<'_>, shape: Shape) -> Result<Facts, Invalid> {
    unambiguous(body)?;
    if shape == Shape::Frame {
        if body.string("type").as_deref() != Some("response.create") {
            return Err(Invalid::new("type", "`type` must be `response.create`."));
        }
        body.remove("type");
    }
    let model = model(body)?;
    let asked = boolean(body, "stream")?.unwrap_or(false);
    boolean(body, "store")?;
    force(body, "stream", "true");
    force(body, "store", "false");
    for field in REFUSED {
        body.remove(field);
    }
    let previous_response_id = identifier(body, "previous_response_id")?;
    if previous_response_id.is_some() && body.present("conversation").is_some() {
        let message = "`previous_response_id` cannot be combined with `conversation`.";
        return Err(Invalid::new("previous_response_id", message));
    }
    let service_tier = service_tier(body)?;
    let prompt_cache_key = prompt_cache_key(body)?;
    include(body)?;
    fold(body, "reasoning")?;
    fold(body, "text")?;
    tools(body);
    let client = body
        .get("client_metadata")
        .map(Client::of_metadata)
        .unwrap_or_default();
    if client.turn_state.is_some() {
        without_turn_state(body);
    }
    let (input_images, inline_bytes) = input(body, shape)?;
    truncation(body)?;
    if shape == Shape::Compact {
        force(body, "parallel_tool_calls", "false");
        for field in ["tools", "tool_choice", "text", "client_metadata"] {
            body.remove(field);
        }
    }
    Ok(Facts {
        model,
        alias: None,
        stream: asked || matches!(shape, Shape::Codex | Shape::Frame),
        generate: body.get("generate") != Some("false"),
        previous_response_id,
        prompt_cache_key,
        service_tier,
        input_images,
        inline_bytes,
        client,
    })
}

fn unambiguous(body: &Container<'_>) -> Result<(), Invalid> {
    let aliases = ALIASES.iter().flat_map(|(_, _, aliases)| aliases.iter());
    for field in READ.iter().chain(aliases).copied() {
        if body.keys().filter(|key| *key == field).count() > 1 {
            return Err(Invalid::new(field, format!("`{field}` stands twice.")));
        }
    }
    Ok(())
}

fn model(body: &Container<'_>) -> Result<String, Invalid> {
    let model = body.string("model").unwrap_or_default();
    if model.trim().is_empty() || model.len() > MODEL || model.contains(char::is_control) {
        return Err(Invalid::new(
            "model",
            "`model` must be the name of a model.",
        ));
    }
    Ok(model.into_owned())
}

fn boolean(body: &Container<'_>, field: &str) -> Result<Option<bool>, Invalid> {
    match body.get(field) {
        None | Some("null") => Ok(None),
        Some("true") => Ok(Some(true)),
        Some("false") => Ok(Some(false)),
        Some(_) => Err(wrong(field, "a boolean")),
    }
}

fn force(body: &mut Container<'_>, field: &str, json: &str) {
    if body.get(field) != Some(json) {
        body.set(field, json);
    }
}

fn wrong(field: &str, expected: &str) -> Invalid {
    Invalid::new(field, format!("`{field}` must be {expected}."))
}

/// A field that is a string, or null, or absent.
fn text(body: &Container<'_>, field: &str) -> Result<Option<String>, Invalid> {
    let Some(raw) = body.present(field) else {
        return Ok(None);
    };
    let text = string(raw).ok_or_else(|| wrong(field, "a string"))?;
    Ok(Some(text.into_owned()))
}

/// A name that is sent trimmed, and not at all where it says nothing.
fn identifier(body: &mut Container<'_>, field: &str) -> Result<Option<String>, Invalid> {
    if body.get(field).is_none() {
        return Ok(None);
    }
    let sent = text(body, field)?.unwrap_or_default();
    let trimmed = sent.trim();
    if trimmed.is_empty() {
        body.remove(field);
        return Ok(None);
    }
    if trimmed.len() != sent.len() {
        body.set(field, quoted(trimmed));
    }
    Ok(Some(trimmed.to_owned()))
}

fn prompt_cache_key(body: &mut Container<'_>) -> Result<Option<String>, Invalid> {
    let key = identifier(body, "prompt_cache_key")?;
    let alias = identifier(body, "promptCacheKey")?;
    body.remove("promptCacheKey");
    if let (None, Some(alias)) = (&key, &alias) {
        body.set("prompt_cache_key", quoted(alias));
    }
    Ok(key.or(alias))
}

fn service_tier(body: &mut Container<'_>) -> Result<Option<String>, Invalid> {
    let tier = text(body, "service_tier")?;
    match tier.as_deref() {
        None | Some("auto" | "default") => {
            body.remove("service_tier");
            Ok(None)
        }
        Some("fast") => {
            body.set("service_tier", quoted("priority"));
            Ok(Some("priority".to_owned()))
        }
        Some(_) => Ok(tier),
    }
}

fn include(body: &Container<'_>) -> Result<(), Invalid> {
    let Some(raw) = body.present("include") else {
        return Ok(());
    };
    let known = |raw| string(raw).is_some_and(|name| INCLUDES.contains(&&*name));
    match Container::array(raw) {
        Ok(names) if names.values().all(known) => Ok(()),
        Ok(_) => Err(Invalid::new(
            "include",
            format!("`include` takes {}.", INCLUDES.join(", ")),
        )),
        Err(_) => Err(wrong("include", "an array")),
    }
}

/// Brings what the aliases say into `field`, where it says nothing itself.
fn fold(body: &mut Container<'_>, field: &str) -> Result<(), Invalid> {
    let raw = body.present(field).unwrap_or("{}");
    let mut object = Container::object(raw).map_err(|_| wrong(field, "an object"))?;
    for (_, member, aliases) in ALIASES.iter().filter(|(of, ..)| *of == field) {
        let said = object.present(member);
        let aliased = aliases.iter().find_map(|alias| body.present(alias));
        let aliased = aliased.or_else(|| thinking(body).filter(|_| *member == "effort"));
        if let Some(value) = said.or(aliased).map(|raw| respelled(member, raw))
            && said != Some(value)
        {
            object.set(member, value);
        }
        for alias in *aliases {
            body.remove(alias);
        }
    }
    if let Some(edited) = object.finish() {
        body.set(field, edited);
    }
    Ok(())
}

/// The effort that `thinking` names. That it is on or off says nothing that upstream knows.
fn thinking<'a>(body: &Container<'a>) -> Option<&'a str> {
    let raw = body.present("thinking")?;
    let named = Container::object(raw)
        .ok()
        .and_then(|object| object.present("effort"));
    let effort = named.unwrap_or(raw);
    EFFORTS.contains(&&*string(effort)?).then_some(effort)
}

/// Upstream never answers `minimal`, and does not know `ultra`.
fn respelled<'a>(member: &str, raw: &'a str) -> &'a str {
    match (member, raw) {
        ("effort", r#""minimal""#) => r#""low""#,
        ("effort", r#""ultra""#) => r#""max""#,
        _ => raw,
    }
}

/// Tools go out as they came, but for the one that upstream knows by another name.
fn tools(body: &mut Container<'_>) {
    let tools = body.get("tools").and_then(renamed_each);
    if let Some(tools) = tools {
        body.set("tools", tools);
    }
    let choice = body.get("tool_choice").and_then(|raw| {
        let mut choice = Container::object(raw).ok()?;
        if let Some(tools) = choice.get("tools").and_then(renamed_each) {
            choice.set("tools", tools);
        }
        rename(&mut choice);
        choice.finish()
    });
    if let Some(choice) = choice {
        body.set("tool_choice", choice);
    }
}

fn renamed_each(raw: &str) -> Option<String> {
    let (mut tools, each) = Container::objects(raw).ok()?;
    for (index, mut tool) in each.into_iter().enumerate() {
        if rename(&mut tool)
            && let Some(edited) = tool.finish()
        {
            tools.set_at(index, edited);
        }
    }
    tools.finish()
}

fn rename(tool: &mut Container<'_>) -> bool {
    let old = tool.string("type").as_deref() == Some("web_search_preview");
    if old {
        tool.set("type", quoted("web_search"));
    }
    old
}

fn truncation(body: &mut Container<'_>) -> Result<(), Invalid> {
    match text(body, "truncation")?.as_deref() {
        None | Some("auto" | "disabled") => body.remove("truncation"),
        Some(_) => return Err(wrong("truncation", "auto or disabled")),
    }
    Ok(())
}

/// The turn state of a client is ours, or nobody's: it stays here.
fn without_turn_state(body: &mut Container<'_>) {
    let metadata = body.get("client_metadata").map(Container::object);
    if let Some(Ok(mut metadata)) = metadata {
        metadata.remove(TURN_STATE);
        if let Some(edited) = metadata.finish() {
            body.set("client_metadata", edited);
        }
    }
}

/// Brings `messages`, `input` and `instructions` into the one form that upstream takes. Returns whether there are images, and
/// the bytes of those, and of files, that stand in it.
fn input(body: &mut Container<'_>, shape: Shape) -> Result<(bool, u64), Invalid> {
    let instructions = text(body, "instructions")?;
    if instructions.is_none() {
        body.remove("instructions");
    }
    let messages = body.present("messages");
    body.remove("messages");
    let list = items(body, messages)?;
    // Only Codex sends its metadata, on whichever route; its developer messages stand where it means them.
    let native = body
        .get("client_metadata")
        .is_some_and(|raw| raw.starts_with('{'));
    let foreign = (shape == Shape::OpenAi && !native) || body.get("truncation").is_some();
    let hoist = if messages.is_some() || (foreign && instructions.is_none()) {
        Hoist::Guidance
    } else {
        Hoist::System
    };
    let read = input::normalise(&list, hoist, shape == Shape::Compact)?;
    match (read.edited, list) {
        (Some(list), _) | (None, Cow::Owned(list)) => body.set("input", list),
        (None, Cow::Borrowed(_)) => {}
    }
    if !read.hoisted.is_empty() {
        let said = instructions.filter(|said| !said.is_empty());
        let all: Vec<_> = said.into_iter().chain(read.hoisted).collect();
        body.set("instructions", quoted(&all.join("\n")));
    }
    Ok((read.images, read.inline_bytes))
}

/// The list of items: as it came, or made of what the client has sent instead.
fn items<'a>(body: &Container<'a>, messages: Option<&str>) -> Result<Cow<'a, str>, Invalid> {
    let input = body.get("input");
    if let Some(messages) = messages {
        let nothing =
            |raw| raw == "null" || Container::array(raw).is_ok_and(|list| list.is_empty());
        return if input.is_none_or(nothing) {
            chat::items(messages).map(Cow::Owned)
        } else {
            let message = "Send either `input` or `messages`.";
            Err(Invalid::new("messages", message))
        };
    }
    match input {
        None => Err(Invalid::new("input", "`input` is missing.")),
        Some(list) if list.starts_with('[') => Ok(Cow::Borrowed(list)),
        Some(text) if text.starts_with('"') => {
            let part = format!(r#"{{"type":"input_text","text":{text}}}"#);
            let item = format!(r#"{{"type":"message","role":"user","content":[{part}]}}"#);
            Ok(Cow::Owned(format!("[{item}]")))
        }
        Some(_) => Err(wrong("input", "a string or an array")),
    }
}

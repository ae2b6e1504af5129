//! The rules of input items.
//!
//! One look at every item: its type, its role, its content. An item that breaks no rule keeps its bytes.

use std::borrow::Cow;

use super::Invalid;
use super::splice::{Container, quoted, string};

/// Which messages become instructions, unless the items carry their own tools (`additional_tools`): then none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hoist {
    /// Those of role `system`, which upstream refuses.
    System,
    /// Those of role `developer` too, as clients of the public API mean them.
    Guidance,
}

/// What the items say.
#[derive(Debug, Default)]
pub(super) struct Read {
    /// The list, where an item had to change.
    pub(super) edited: Option<String>,
    /// The text of the messages that become instructions.
    pub(super) hoisted: Vec<String>,
    /// Some item holds an image.
    pub(super) images: bool,
    /// Bytes of images and files that stand in the items.
    pub(super) inline_bytes: u64,
}

/// Traces of other APIs, which upstream refuses.
const FOREIGN: [&str; 4] = [
    "reasoning_content",
    "reasoning_details",
    "tool_calls",
    "function_call",
];

const TRIGGER: &str = "compaction_trigger";

/// Edits a list of items, a raw array; `compact` sees to it that it ends in a compaction trigger.
pub(super) fn normalise(list: &str, hoist: Hoist, compact: bool) -> Result<Read, Invalid> {
    let (mut list, items) = Container::objects(list)
        .map_err(|_| wrong("`input` must be an array, and every item of it an object."))?;
    let items: Vec<_> = items.into_iter().map(Item::new).collect();
    let hoist = Some(hoist).filter(|_| !items.iter().any(|item| item.kind == "additional_tools"));
    let trigger = items.iter().position(|item| item.kind == TRIGGER);
    if trigger.is_some_and(|at| at + 1 < items.len()) {
        return Err(wrong(
            "A compaction trigger must be the last item, and the only one.",
        ));
    }
    let mut read = Read::default();
    for (index, item) in items.into_iter().enumerate() {
        match item.edit(hoist, &mut read)? {
            Edit::Keep => {}
            Edit::Drop => list.remove_at(index),
            Edit::Set(json) => list.set_at(index, json),
        }
    }
    if compact && trigger.is_none() {
        list.push(format!(r#"{{"type":"{TRIGGER}"}}"#));
    }
    read.edited = list.finish();
    Ok(read)
}

fn wrong(message: &str) -> Invalid {
    Invalid::new("input", message)
}

enum Edit {
    Keep,
    Drop,
    Set(String),
}

impl From<Option<String>> for Edit {
    fn from(edited: Option<String>) -> Self {
        edited.map_or(Self::Keep, Self::Set)
    }
}

struct Item<'a> {
    fields: Container<'a>,
    kind: Cow<'a, str>,
    role: Cow<'a, str>,
}

impl<'a> Item<'a> {
    fn new(fields: Container<'a>) -> Self {
        Self {
            kind: fields.string("type").unwrap_or(Cow::Borrowed("message")),
            role: fields.string("role").unwrap_or_default(),
            fields,
        }
    }

    fn edit(mut self, hoist: Option<Hoist>, read: &mut Read) -> Result<Edit, Invalid> {
        let role = match (&*self.kind, &*self.role) {
            ("message", "tool") => return self.tool_output(read).map(Edit::Set),
            ("message", "assistant") => Role::Assistant,
            ("message", "system") if hoist.is_some() => Role::Hoisted,
            ("message", "developer") if hoist == Some(Hoist::Guidance) => Role::Hoisted,
            ("message", _) => Role::Other,
            (_, "system" | "developer") => return Ok(Edit::Keep), // such as additional_tools
            _ => Role::None,
        };
        for key in FOREIGN {
            self.fields.remove(key);
        }
        if matches!(
            &*self.kind,
            "function_call" | "custom_tool_call" | "apply_patch_call"
        ) {
            self.fields.remove("namespace");
        }
        clean(&mut self.fields, &self.kind, read)?;
        for key in ["content", "output"] {
            let Some(raw) = self.fields.present(key) else {
                continue;
            };
            match (role, raw.as_bytes()[0]) {
                (_, b'[') => match parts(raw, role, read)? {
                    Edit::Keep => {}
                    Edit::Set(content) => self.fields.set(key, content),
                    Edit::Drop => return Ok(Edit::Drop),
                },
                (Role::Assistant, b'"') => {
                    self.fields
                        .set(key, format!(r#"[{{"type":"output_text","text":{raw}}}]"#));
                }
                (Role::Hoisted, b'"') => {
                    read.hoisted.push(self::text(raw)?);
                    return Ok(Edit::Drop);
                }
                _ => {}
            }
        }
        if role == Role::Hoisted {
            if self.fields.present("content").is_none() {
                return Ok(Edit::Drop);
            }
            self.fields.set("role", quoted("user"));
        }
        Ok(self.fields.finish().into())
    }

    /// A message of role `tool` as the output of the call that it answers.
    fn tool_output(&self, read: &mut Read) -> Result<String, Invalid> {
        let id = ["tool_call_id", "toolCallId", "call_id"]
            .iter()
            .find_map(|key| self.fields.string(key).filter(|id| !id.trim().is_empty()))
            .ok_or_else(|| wrong("A message of role tool must have a `tool_call_id`."))?;
        let said = self
            .fields
            .present("content")
            .or_else(|| self.fields.present("output"));
        let output = match said.unwrap_or(r#""""#) {
            raw if raw.starts_with('[') => match parts(raw, Role::Tool, read)? {
                Edit::Set(parts) => parts,
                Edit::Keep => raw.to_owned(),
                Edit::Drop => r#""""#.to_owned(),
            },
            raw if raw.starts_with('"') => raw.to_owned(),
            raw => quoted(raw),
        };
        let id = quoted(&id);
        Ok(format!(
            r#"{{"type":"function_call_output","call_id":{id},"output":{output}}}"#
        ))
    }
}

/// How the parts of an item are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Assistant,
    Hoisted,
    Tool,
    Other,
    /// Of an item that is no message.
    None,
}

fn text(raw: &str) -> Result<String, Invalid> {
    let text = string(raw).ok_or_else(|| wrong("The text of a message must be a string."))?;
    Ok(text.into_owned())
}

/// Edits a list of parts; `Drop` where nothing is left of it.
fn parts(raw: &str, role: Role, read: &mut Read) -> Result<Edit, Invalid> {
    let Ok((mut list, parts)) = Container::objects(raw) else {
        return Ok(Edit::Keep); // no list of parts; upstream will say what it thinks of it
    };
    let mut left = parts.len();
    for (index, mut part) in parts.into_iter().enumerate() {
        let kind = part.string("type").unwrap_or_default();
        let is_text = matches!(&*kind, "text" | "input_text" | "output_text");
        if role == Role::Hoisted && is_text {
            read.hoisted.push(text(part.get("text").unwrap_or("null"))?);
        }
        if role != Role::None && (role == Role::Hoisted && is_text || kind.starts_with("reasoning"))
        {
            list.remove_at(index);
            left -= 1;
            continue;
        }
        match role {
            Role::Assistant if matches!(&*kind, "text" | "input_text") => {
                part.set("type", quoted("output_text"));
            }
            Role::Tool if kind == "text" => part.set("type", quoted("input_text")),
            _ => {}
        }
        if role != Role::None {
            for key in FOREIGN {
                part.remove(key);
            }
        }
        clean(&mut part, &kind, read)?;
        if let Some(edited) = part.finish() {
            list.set_at(index, edited);
        }
    }
    Ok(if left == 0 && role == Role::Hoisted {
        Edit::Drop
    } else {
        list.finish().into()
    })
}

/// What holds for items and for parts alike.
fn clean(fields: &mut Container<'_>, kind: &str, read: &mut Read) -> Result<(), Invalid> {
    fields.remove("prompt_cache_breakpoint");
    if kind == "input_image" {
        read.images = true;
        let url = fields.string("image_url").unwrap_or_default();
        if url.starts_with("data:") {
            read.inline_bytes += url.len() as u64;
        }
        if fields.present("file_id").is_some() || url.starts_with("sediment://") {
            return Err(Invalid {
                code: "unsupported_input_image_format",
                ..wrong("An input image must be an http(s) URL or a data URL.")
            });
        }
    }
    if kind == "input_file" {
        let data = fields.string("file_data").unwrap_or_default();
        read.inline_bytes += data.len() as u64;
    }
    Ok(())
}

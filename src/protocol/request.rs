//! What a client asks for, made fit for upstream.
//!
//! Owns the validation and the normalisation of `/responses` bodies and `response.create` frames, and the [`Facts`] that
//! the engine acts on. It must not know accounts, routes, or what becomes of the request.
//!
//! Invariant: normalisation splices the original bytes. Unknown fields, the order of keys, the spelling of numbers and
//! tools survive exactly, and a body that needs nothing comes back as the same bytes.

mod chat;
mod client;
mod fields;
pub mod history;
mod input;
mod splice;
#[cfg(test)]
mod tests;

use std::fmt;

use bytes::Bytes;
use http::HeaderMap;

pub use client::Client;
use client::{TRACE, TURN_STATE};
use splice::{Container, quoted};

/// What the body must be read as, which depends on the route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shape {
    /// A body of `/backend-api/codex/responses`.
    Codex,
    /// A body of `/v1/responses`.
    OpenAi,
    /// A WebSocket `response.create`.
    Frame,
    /// A body of `/responses/compact`, which becomes an ordinary request that ends in a compaction trigger.
    Compact,
}

/// A request as upstream takes it, and what we know of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Request {
    /// The body of an upstream HTTP call: `"stream":true`, `"store":false`.
    pub body: Bytes,
    /// What the engine acts on.
    pub facts: Facts,
}

/// What the engine needs to know of a request.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Facts {
    /// `model`, as upstream gets it; never empty.
    pub model: String,
    /// The name by which the client asked for it, where that is another one.
    #[serde(default)]
    pub alias: Option<String>,
    /// The client wants events. Always so for [`Shape::Codex`] and [`Shape::Frame`].
    pub stream: bool,
    /// False for a prewarm, which generates nothing.
    pub generate: bool,
    /// `previous_response_id`; never empty.
    pub previous_response_id: Option<String>,
    /// `prompt_cache_key`; never empty.
    pub prompt_cache_key: Option<String>,
    /// `service_tier` as upstream gets it.
    pub service_tier: Option<String>,
    /// Some input is an image.
    pub input_images: bool,
    /// Bytes of images and files that stand in the input itself: they say nothing of its tokens.
    pub inline_bytes: u64,
    /// Who asks; the body's word alone until [`Client::with_headers`].
    pub client: Client,
}

/// Why a request is refused with 400. Nothing of the prompt is in it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Invalid {
    /// `invalid_json`, `invalid_request_error` or `unsupported_input_image_format`.
    pub code: &'static str,
    /// For people.
    pub message: String,
    /// The field at fault.
    pub param: Option<String>,
}

impl Invalid {
    fn new(param: &str, message: impl Into<String>) -> Self {
        Self {
            code: "invalid_request_error",
            message: message.into(),
            param: Some(param.to_owned()),
        }
    }

    fn json(message: impl Into<String>) -> Self {
        Self {
            code: "invalid_json",
            message: message.into(),
            param: None,
        }
    }
}

/// Reads a request and makes it fit for upstream.
///
/// # Errors
/// Where the body is not JSON, or breaks a rule that upstream would only answer obscurely, or not at all.
pub fn read(body: Bytes, shape: Shape) -> Result<Request, Invalid> {
    let text = std::str::from_utf8(&body)
        .map_err(|_| Invalid::json("The request body is not valid UTF-8."))?;
    let mut object = parse(text)?;
    if depth(text.as_bytes()) > DEPTH {
        return Err(Invalid::json(format!(
            "The request body is nested deeper than {DEPTH} levels."
        )));
    }
    let facts = fields::normalise(&mut object, shape)?;
    let edited = object.finish();
    let body = edited.map_or_else(|| body.clone(), Bytes::from);
    Ok(Request { body, facts })
}

fn parse(text: &str) -> Result<Container<'_>, Invalid> {
    splice::check(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        Invalid::json(format!(
            "The request body is not valid JSON: line {line}, column {column}."
        ))
    })?;
    Container::object(text).map_err(|_| Invalid::json("The request body must be a JSON object."))
}

/// What `serde_json` takes; a deeper body could not be read by others either.
const DEPTH: usize = 127;

/// How deep valid JSON is nested.
fn depth(mut json: &[u8]) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    while let Some(byte) = json.first() {
        match byte {
            b'{' | b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        let length = if *byte == b'"' {
            splice::quoted_length(json)
        } else {
            1
        };
        json = &json[length..];
    }
    deepest
}

/// The headers that a WebSocket cannot repeat per request, and what they are called in `client_metadata`.
const CARRIED: [(&str, &str); 7] = [
    ("x-codex-turn-metadata", "x-codex-turn-metadata"),
    ("x-openai-subagent", "x-openai-subagent"),
    ("x-codex-parent-thread-id", "x-codex-parent-thread-id"),
    ("x-codex-window-id", "x-codex-window-id"),
    (
        "x-openai-internal-codex-responses-lite",
        "ws_request_header_x_openai_internal_codex_responses_lite",
    ),
    ("traceparent", TRACE),
    ("tracestate", "ws_request_header_tracestate"),
];

impl Facts {
    /// The model's name as the client wrote it.
    pub fn asked_model(&self) -> &str {
        self.alias.as_deref().unwrap_or(&self.model)
    }
}

impl Request {
    /// Asks upstream for another model than the client named.
    pub fn redirect(&mut self, model: &str) {
        let edited = std::str::from_utf8(&self.body).ok().and_then(|text| {
            let mut body = Container::object(text).ok()?;
            body.set("model", splice::quoted(model));
            body.finish()
        });
        if let Some(edited) = edited {
            self.body = edited.into();
            let asked = std::mem::replace(&mut self.facts.model, model.to_owned());
            self.facts.alias = Some(asked);
        }
    }

    /// The `response.create` frame of this request.
    pub fn frame(&self) -> Bytes {
        self.frame_with(&HeaderMap::new(), None)
    }

    /// The `response.create` frame for a client that came over HTTP: what its headers say of the turn goes into
    /// `client_metadata`, unless it is there already; so does the turn state that this socket's upstream gave.
    pub fn frame_with(&self, headers: &HeaderMap, turn_state: Option<&str>) -> Bytes {
        let text = std::str::from_utf8(&self.body).expect("the body was read as UTF-8");
        let mut object = Container::object(text).expect("the body was read as an object");
        object.remove("type");
        object.remove("stream");
        object.remove("background");
        carry(&mut object, headers, turn_state);
        let mut frame = object.finish().unwrap_or_else(|| text.to_owned());
        let open = frame.find('{').map_or(0, |at| at + 1);
        frame.replace_range(..open, r#"{"type":"response.create","#);
        Bytes::from(frame)
    }
}

fn carry(object: &mut Container<'_>, headers: &HeaderMap, turn_state: Option<&str>) {
    let raw = object.get("client_metadata").unwrap_or("null");
    let raw = if raw == "null" { "{}" } else { raw };
    let Ok(mut metadata) = Container::object(raw) else {
        return; // upstream will say what it thinks of it
    };
    for (name, key) in CARRIED {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(value) = value.filter(|_| metadata.get(key).is_none()) {
            metadata.set(key, quoted(value));
        }
    }
    if let Some(turn_state) = turn_state {
        metadata.set(TURN_STATE, quoted(turn_state));
    }
    if let Some(edited) = metadata.finish() {
        object.set("client_metadata", edited);
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("bytes", &self.body.len())
            .field("facts", &self.facts)
            .finish()
    }
}

//! The outputs of a response: collected while they pass, put back where the terminal event lacks them.

use std::borrow::Cow;
use std::fmt;

use bytes::Bytes;
use memchr::memmem;
use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};

/// A JSON object whose values are not looked into: its order and their spelling survive.
#[derive(Debug, Default)]
pub(super) struct Fields<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Fields<'a> {
    pub(super) fn get(&self, name: &str) -> Option<&'a RawValue> {
        self.0
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| *value)
    }

    pub(super) fn set(&mut self, name: &'static str, value: &'a RawValue) {
        match self.0.iter_mut().find(|(key, _)| key == name) {
            Some((_, old)) => *old = value,
            None => self.0.push((Cow::Borrowed(name), value)),
        }
    }

    pub(super) fn drop_nulls(&mut self) {
        self.0.retain(|(_, value)| value.get() != "null");
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                #[derive(Deserialize)]
                struct Key<'a>(#[serde(borrow)] Cow<'a, str>);
                let mut fields = Vec::with_capacity(32);
                while let Some((Key(key), value)) = map.next_entry()? {
                    fields.push((key, value));
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

/// A terminal event and its `response`, as fields.
pub(super) fn response(data: &[u8]) -> Option<(Fields<'_>, Fields<'_>)> {
    let event: Fields<'_> = serde_json::from_slice(data).ok()?;
    let response = serde_json::from_str(event.get("response")?.get()).ok()?;
    Some((event, response))
}

/// Whether an event refers to an output by its index.
pub(super) fn has_index(data: &[u8]) -> bool {
    memmem::find(data, b"\"output_index\":").is_some()
}

/// The items that were reported done.
#[derive(Debug, Default)]
pub(super) struct Items(Vec<(u64, Box<RawValue>)>);

impl Items {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Keeps the item of an `output_item.done`, in the order of its index.
    pub(super) fn add(&mut self, data: &[u8]) {
        #[derive(Deserialize)]
        struct Done {
            output_index: Option<u64>,
            item: Box<RawValue>,
        }
        let Ok(done) = serde_json::from_slice::<Done>(data) else {
            return;
        };
        let index = done
            .output_index
            .unwrap_or_else(|| self.0.last().map_or(0, |(last, _)| last + 1));
        match self.0.binary_search_by_key(&index, |(index, _)| *index) {
            Ok(at) => self.0[at].1 = done.item,
            Err(at) => self.0.insert(at, (index, done.item)),
        }
    }

    /// The output that `response` lacks; `None` where it has one, or where there is nothing to put in.
    pub(super) fn backfill(&self, response: &Fields<'_>) -> Option<Box<RawValue>> {
        let reported = response.get("output").map_or("", RawValue::get);
        let lacking = matches!(reported, "" | "null") || is_empty_array(reported);
        if !lacking || self.is_empty() {
            return None;
        }
        to_raw_value(&self.0.iter().map(|(_, item)| item).collect::<Vec<_>>()).ok()
    }
}

fn is_empty_array(json: &str) -> bool {
    json.strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .is_some_and(|inner| inner.trim().is_empty())
}

/// Text that never streamed.
pub(super) struct Late {
    item_id: String,
    output_index: usize,
    text: String,
}

/// The text of an output's messages; `None` where there is none.
pub(super) fn text(output: Option<&RawValue>) -> Option<Late> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Item<'a> {
        #[serde(borrow)]
        id: Option<Cow<'a, str>>,
        content: Option<Vec<Part>>,
    }
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Part {
        r#type: Option<String>,
        text: Option<String>,
    }
    let items: Vec<&RawValue> = serde_json::from_str(output?.get()).ok()?;
    let mut late = None::<Late>;
    for (output_index, item) in items.into_iter().enumerate() {
        // An item of another shape has no text for us.
        let Ok(item) = serde_json::from_str::<Item<'_>>(item.get()) else {
            continue;
        };
        let parts = item.content.unwrap_or_default().into_iter();
        let texts = parts
            .filter(|part| part.r#type.as_deref() == Some("output_text"))
            .filter_map(|part| part.text);
        let text: String = texts.collect();
        match &mut late {
            _ if text.is_empty() => {}
            Some(late) => late.text.push_str(&text),
            None => {
                late = Some(Late {
                    item_id: item.id.unwrap_or_default().into_owned(),
                    output_index,
                    text,
                })
            }
        }
    }
    late
}

impl Late {
    /// The text as one `response.output_text.delta`.
    pub(super) fn delta(&self, sequence_number: i64) -> Bytes {
        #[derive(Serialize)]
        struct Delta<'a> {
            r#type: &'static str,
            sequence_number: i64,
            item_id: &'a str,
            output_index: usize,
            content_index: usize,
            delta: &'a str,
            logprobs: [(); 0],
        }
        let delta = Delta {
            r#type: "response.output_text.delta",
            sequence_number,
            item_id: &self.item_id,
            output_index: self.output_index,
            content_index: 0,
            delta: &self.text,
            logprobs: [],
        };
        serde_json::to_vec(&delta)
            .expect("plain data serialises")
            .into()
    }
}

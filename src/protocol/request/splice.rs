//! JSON containers, edited in place.
//!
//! A [`Container`] is one level of an object or an array: its members borrow from the text, and what lies deeper is
//! skipped. Members are replaced, dropped and added by splices over the original bytes.
//!
//! Texts were [`check`]ed once, as a whole; after that reading is little more than a search for quotes. Invariant: the bytes of a member that is not edited survive exactly, and so do the order and the spacing.

use std::borrow::Cow;

use memchr::memchr;
use serde::de::IgnoredAny;

/// A JSON string; borrowed where nothing in it is escaped.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// A raw value that is a string.
pub(super) fn string(raw: &str) -> Option<Cow<'_, str>> {
    let text: Option<Text<'_>> = serde_json::from_str(raw).ok();
    text.map(|text| text.0)
}

/// `text` as a JSON string.
pub(super) fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[derive(Debug)]
enum Edit {
    Keep,
    Drop,
    Set(String),
}

#[derive(Debug)]
struct Member<'a> {
    key: Cow<'a, str>, // empty in an array
    value: &'a str,
    edit: Edit,
}

impl<'a> Member<'a> {
    fn element(value: &'a str) -> Self {
        Self {
            key: Cow::Borrowed(""),
            value,
            edit: Edit::Keep,
        }
    }
}

/// The text is JSON, but not of the kind that was asked for.
#[derive(Debug)]
pub(super) struct Otherwise;

/// One level of an object or an array, and the edits to it.
#[derive(Debug)]
pub(super) struct Container<'a> {
    text: &'a str,
    members: Vec<Member<'a>>,
    added: Vec<(String, String)>, // the key is empty in an array
}

impl<'a> Container<'a> {
    /// Reads an object; `text` is valid JSON, as below.
    ///
    /// # Errors
    /// Where it is something else.
    pub(super) fn object(text: &'a str) -> Result<Self, Otherwise> {
        let members = Reader::new(text).object().ok_or(Otherwise)?;
        Ok(Self::new(text, members))
    }

    /// Reads an array.
    ///
    /// # Errors
    /// Where it is something else.
    pub(super) fn array(text: &'a str) -> Result<Self, Otherwise> {
        let mut members = Vec::new();
        let each = |reader: &mut Reader<'a>| members.push(Member::element(reader.value()));
        Reader::new(text).array(each).ok_or(Otherwise)?;
        Ok(Self::new(text, members))
    }

    /// Reads an array of objects, and the objects, in one pass.
    ///
    /// # Errors
    /// Where it is something else, or holds anything but objects.
    pub(super) fn objects(text: &'a str) -> Result<(Self, Vec<Self>), Otherwise> {
        let (mut list, mut objects) = (Vec::new(), Some(Vec::new()));
        let each = |reader: &mut Reader<'a>| {
            let start = reader.at;
            match (reader.object(), &mut objects) {
                (Some(members), Some(objects)) => {
                    let value = &text[start..reader.at];
                    list.push(Member::element(value));
                    objects.push(Self::new(value, members));
                }
                _ => {
                    objects = None;
                    reader.value();
                }
            }
        };
        Reader::new(text).array(each).ok_or(Otherwise)?;
        Ok((Self::new(text, list), objects.ok_or(Otherwise)?))
    }

    fn new(text: &'a str, members: Vec<Member<'a>>) -> Self {
        Self {
            text,
            members,
            added: Vec::new(),
        }
    }

    /// The original value of `key`; the last one where it stands twice, as most readers take it.
    pub(super) fn get(&self, key: &str) -> Option<&'a str> {
        let member = self.members.iter().rfind(|member| member.key == key)?;
        Some(member.value)
    }

    /// The original value of `key`, if it says anything.
    pub(super) fn present(&self, key: &str) -> Option<&'a str> {
        self.get(key).filter(|raw| *raw != "null")
    }

    /// The original value of `key`, if it is a string.
    pub(super) fn string(&self, key: &str) -> Option<Cow<'a, str>> {
        self.get(key).and_then(string)
    }

    /// The original keys, in order.
    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|member| &*member.key)
    }

    /// The original values, in order.
    pub(super) fn values(&self) -> impl Iterator<Item = &'a str> {
        self.members.iter().map(|member| member.value)
    }

    /// Without a member of its own.
    pub(super) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Makes `json` the value of `key`, where it stands or else at the end.
    pub(super) fn set(&mut self, key: &str, json: impl Into<String>) {
        self.remove(key);
        match self.members.iter().rposition(|member| member.key == key) {
            Some(last) => self.set_at(last, json.into()),
            None => self.added.push((key.to_owned(), json.into())),
        }
    }

    /// Takes out every `key`.
    pub(super) fn remove(&mut self, key: &str) {
        self.added.retain(|(added, _)| added != key);
        for member in self.members.iter_mut().filter(|member| member.key == key) {
            member.edit = Edit::Drop;
        }
    }

    /// Makes `json` the value of the member at `index`; equal bytes are no edit.
    pub(super) fn set_at(&mut self, index: usize, json: String) {
        let member = &mut self.members[index];
        member.edit = if json == member.value {
            Edit::Keep
        } else {
            Edit::Set(json)
        };
    }

    /// Takes out the member at `index`.
    pub(super) fn remove_at(&mut self, index: usize) {
        self.members[index].edit = Edit::Drop;
    }

    /// Adds an element to an array.
    pub(super) fn push(&mut self, json: String) {
        self.added.push((String::new(), json));
    }

    /// The edited text; `None` where no edit was needed.
    pub(super) fn finish(&self) -> Option<String> {
        let kept = |member: &Member<'_>| matches!(member.edit, Edit::Keep);
        if self.added.is_empty() && self.members.iter().all(kept) {
            return None;
        }
        let mut out = String::with_capacity(self.text.len() + 64);
        let mut from = self.text.find(['{', '[']).map_or(0, |open| open + 1);
        out.push_str(&self.text[..from]);
        let mut first = true;
        for member in &self.members {
            let start = offset(self.text, member.value);
            let lead = &self.text[from..start]; // the comma and the key
            from = start + member.value.len();
            let value = match &member.edit {
                Edit::Keep => member.value,
                Edit::Set(json) => json,
                Edit::Drop => continue,
            };
            let bare = lead.trim_start().strip_prefix(',').filter(|_| first);
            out.push_str(bare.unwrap_or(lead));
            out.push_str(value);
            first = false;
        }
        for (key, json) in &self.added {
            if !first {
                out.push(',');
            }
            if !key.is_empty() {
                out.push_str(&quoted(key));
                out.push(':');
            }
            out.push_str(json);
            first = false;
        }
        out.push_str(&self.text[from..]);
        Some(out)
    }
}

/// Where `part`, a slice of `text`, begins.
fn offset(text: &str, part: &str) -> usize {
    part.as_ptr() as usize - text.as_ptr() as usize
}

/// Checks that `text` is JSON, which everything else here takes for granted.
///
/// # Errors
/// Where it is not.
pub(super) fn check(text: &str) -> serde_json::Result<()> {
    serde_json::from_str::<IgnoredAny>(text).map(drop)
}

/// Reads valid JSON, without looking into what it skips more than it must.
struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn new(text: &'a str) -> Self {
        let mut reader = Self { text, at: 0 };
        reader.space();
        reader
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn rest(&self) -> &'a [u8] {
        &self.text.as_bytes()[self.at..]
    }

    fn space(&mut self) {
        let blank = |byte: &&u8| matches!(byte, b' ' | b'\n' | b'\r' | b'\t');
        self.at += self.rest().iter().take_while(blank).count();
    }

    /// The members of the object that stands here; `None` moves nothing.
    fn object(&mut self) -> Option<Vec<Member<'a>>> {
        let mut members = Vec::new();
        self.each(b'{', b'}', |reader| {
            let raw = reader.value();
            let bare = &raw[1..raw.len() - 1];
            let key = if bare.contains('\\') {
                string(raw)
            } else {
                None
            };
            reader.space();
            reader.at += 1; // the colon
            reader.space();
            members.push(Member {
                key: key.unwrap_or(Cow::Borrowed(bare)),
                value: reader.value(),
                edit: Edit::Keep,
            });
        })?;
        Some(members)
    }

    /// Calls `element` at each element of the array that stands here.
    fn array(&mut self, element: impl FnMut(&mut Self)) -> Option<()> {
        self.each(b'[', b']', element)
    }

    fn each(&mut self, open: u8, close: u8, mut member: impl FnMut(&mut Self)) -> Option<()> {
        if self.peek() != Some(open) {
            return None;
        }
        self.at += 1;
        self.space();
        while self.peek().is_some_and(|byte| byte != close) {
            member(self);
            self.space();
            if self.peek() == Some(b',') {
                self.at += 1;
                self.space();
            }
        }
        self.at += 1;
        Some(())
    }

    /// The value that stands here.
    fn value(&mut self) -> &'a str {
        let start = self.at;
        let mut depth = 0_usize;
        while let Some(byte) = self.peek() {
            match byte {
                b'"' => self.at += quoted_length(self.rest()),
                b'{' | b'[' => {
                    depth += 1;
                    self.at += 1;
                }
                b'}' | b']' => {
                    depth = depth.saturating_sub(1);
                    self.at += 1;
                }
                b',' | b':' | b' ' | b'\n' | b'\r' | b'\t' => self.at += 1,
                _ => {
                    self.at += self
                        .rest()
                        .iter()
                        .take_while(|byte| !ends_bare(**byte))
                        .count()
                }
            }
            if depth == 0 {
                break;
            }
        }
        &self.text[start..self.at]
    }
}

/// Whether a number or a word ends before this byte.
fn ends_bare(byte: u8) -> bool {
    matches!(byte, b',' | b']' | b'}' | b' ' | b'\n' | b'\r' | b'\t')
}

/// The length of the string that `json` begins with, quotes included.
pub(super) fn quoted_length(json: &[u8]) -> usize {
    // Escapes are many and quotes are few: what matters is how many backslashes stand before a quote.
    let mut end = 1;
    while let Some(quote) = memchr(b'"', &json[end..]) {
        let before = json[end..end + quote].iter().rev();
        end += quote + 1;
        if before.take_while(|byte| **byte == b'\\').count() % 2 == 0 {
            break;
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_the_elements_of_their_list() {
        let cases = [
            " [ ] ",
            "[{}]",
            r#" [ { } , {"a" : [{"b":"}{"}] } ,{"\u0061":{} }, {"{":"}", "c":1}] "#,
        ];
        for text in cases {
            let (list, objects) = Container::objects(text).unwrap();
            let expected = Container::array(text).unwrap();
            assert!(list.values().eq(expected.values()), "{text}");
            for (mut object, value) in objects.into_iter().zip(list.values()) {
                let mut expected = Container::object(value).unwrap();
                assert!(object.keys().eq(expected.keys()), "{text}");
                object.set("a", "2");
                expected.set("a", "2");
                assert_eq!(object.finish(), expected.finish(), "{text}");
            }
        }
        for text in ["{}", "7", "[7]", r#"[{},"{}"]"#] {
            assert!(Container::objects(text).is_err(), "{text}");
        }
    }

    #[test]
    fn an_edit_leaves_the_other_members_as_they_are() {
        type Change = fn(&mut Container<'_>);
        let cases: [(&str, Change, Option<&str>); 9] = [
            (r#"{ "a" : 1 }"#, |_| {}, None),
            (r#"{"a":1}"#, |object| object.set("a", "1"), None),
            (
                r#"{ "a" : 1 }"#,
                |object| object.set("a", "2"),
                Some(r#"{ "a" : 2 }"#),
            ),
            ("{ }", |object| object.set("b", "2"), Some(r#"{"b":2 }"#)),
            (
                r#"{"a":1 , "b" : 2}"#,
                |object| object.remove("a"),
                Some(r#"{ "b" : 2}"#),
            ),
            (
                r#"{"a":1 , "b" : 2 }"#,
                |object| object.remove("b"),
                Some(r#"{"a":1 }"#),
            ),
            (
                r#"{"a":1,"b":2,"a":3}"#,
                |object| object.set("a", "4"),
                Some(r#"{"b":2,"a":4}"#),
            ),
            (
                r#"{"\u0061":",}"}"#,
                |object| object.remove("a"),
                Some("{}"),
            ),
            (
                r#"{"a":[{}]}"#,
                |object| {
                    object.set("b", "2");
                    object.set("b", "3");
                    object.set("c", "4");
                    object.remove("c");
                },
                Some(r#"{"a":[{}],"b":3}"#),
            ),
        ];
        for (text, change, expected) in cases {
            let mut object = Container::object(text).unwrap();
            change(&mut object);
            assert_eq!(object.finish().as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn an_array_is_edited_by_index() {
        let mut array = Container::array(" [1, 2 ,3] ").unwrap();
        array.remove_at(0);
        array.set_at(2, "4".to_owned());
        array.push("5".to_owned());
        assert_eq!(array.finish().as_deref(), Some(" [ 2 ,4,5] "));
    }
}

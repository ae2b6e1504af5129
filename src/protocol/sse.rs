//! Server-sent events, cut at their boundaries and otherwise left alone.
//!
//! Owns the framing alone: where an event ends, which bytes of it are data, how a JSON message is put into a frame. It
//! does not know what an event means. Line ends are CR, LF and CRLF, nothing else: JSON may hold U+2028.
//!
//! Invariants: the concatenation of all [`Event::raw`] and the remainder is the input, byte for byte; every input byte
//! is scanned once for boundaries, whatever the chunking; an event that lies within one chunk is a slice of that chunk;
//! an event whose blank line did not arrive is never emitted.

use std::borrow::Cow;
use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};
use memchr::{memchr, memchr2};

/// Default ceiling of one event, in bytes: built-in tools put whole files into one event.
pub const MAX_EVENT_BYTES: usize = 32 << 20;

/// Keep-alive for Codex clients: their idle timer counts data events only, of whatever type.
pub const KEEPALIVE_DATA: Bytes =
    Bytes::from_static(b"event: codex.keepalive\ndata: {\"type\":\"codex.keepalive\"}\n\n");

/// Keep-alive for SDK clients, which throw at unknown leading events but skip comments.
pub const KEEPALIVE_COMMENT: Bytes = Bytes::from_static(b": keepalive\n\n");

/// The end marker that some streams carry after their terminal event.
pub const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// An event outgrew the splitter's ceiling. The stream is of no further use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a server-sent event is larger than {limit} bytes")]
pub struct TooLarge {
    /// The ceiling, in bytes.
    pub limit: usize,
}

/// One event: its bytes as they came, and where its data lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// All bytes of the event, its terminating blank line included.
    pub raw: Bytes,
    data: Data,
    name: Range<usize>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Data {
    None,
    Line(Range<usize>),
    Lines(Vec<Range<usize>>),
}

impl Event {
    fn new(raw: Bytes, first: bool) -> Self {
        let (mut data, mut name) = (Data::None, 0..0);
        for (field, value) in fields(&raw, first) {
            match field {
                b"data" => {
                    data = match data {
                        Data::None => Data::Line(value),
                        Data::Line(line) => Data::Lines(vec![line, value]),
                        Data::Lines(mut lines) => {
                            lines.push(value);
                            Data::Lines(lines)
                        }
                    }
                }
                b"event" => name = value,
                _ => {}
            }
        }
        Self { raw, data, name }
    }

    /// The payload: borrowed where it is one line, joined by LF where it is several, empty where there is none.
    pub fn data(&self) -> Cow<'_, [u8]> {
        match &self.data {
            Data::None => Cow::Borrowed(&[]),
            Data::Line(range) => Cow::Borrowed(&self.raw[range.clone()]),
            Data::Lines(lines) => {
                let lines: Vec<&[u8]> = lines.iter().map(|line| &self.raw[line.clone()]).collect();
                Cow::Owned(lines.join(&b'\n'))
            }
        }
    }

    /// The payload as shared bytes: a slice of [`raw`](Self::raw) where it is one line.
    pub fn data_bytes(&self) -> Bytes {
        match &self.data {
            Data::Line(range) => self.raw.slice(range.clone()),
            Data::None | Data::Lines(_) => Bytes::from(self.data().into_owned()),
        }
    }

    /// The value of the last `event:` line; empty where there is none. The payload's own `type` is what counts.
    pub fn name(&self) -> &[u8] {
        &self.raw[self.name.clone()]
    }

    /// Whether the block dispatches nothing: comments, `retry:` or `id:` alone.
    pub fn is_comment(&self) -> bool {
        self.data == Data::None
    }
}

/// The fields of one event block: name, and the range of the value in `raw`.
fn fields(raw: &[u8], first: bool) -> impl Iterator<Item = (&[u8], Range<usize>)> {
    let mut at = if first && raw.starts_with(b"\xEF\xBB\xBF") {
        3
    } else {
        0
    };
    std::iter::from_fn(move || {
        (at < raw.len()).then(|| {
            let start = at;
            let end =
                memchr2(b'\n', b'\r', &raw[start..]).map_or(raw.len(), |offset| start + offset);
            at = end + 1; // a CRLF leaves an empty line behind, which is no field
            match memchr(b':', &raw[start..end]) {
                None => (&raw[start..end], end..end),
                Some(colon) => {
                    let value = start + colon + 1;
                    let space = usize::from(raw[value..end].first() == Some(&b' '));
                    (&raw[start..start + colon], value + space..end)
                }
            }
        })
    })
}

/// Cuts a byte stream into events.
///
/// Push a chunk, take events until `None`, push the next. Pushing without draining is correct but copies.
#[derive(Debug)]
pub struct Splitter {
    limit: usize,
    /// The beginning of an event that did not end in its chunk; always scanned.
    carry: BytesMut,
    /// What follows it: scanned up to `scanned`.
    chunk: Bytes,
    scanned: usize,
    /// The current line has no byte yet.
    line_empty: bool,
    /// The last byte scanned was a CR, so that an LF right behind it ends no further line.
    after_cr: bool,
    /// The current block has a line that is not blank.
    in_event: bool,
    first: bool,
    failed: bool,
}

impl Splitter {
    /// A splitter for one stream; events over `max_event_bytes` are an error.
    pub fn new(max_event_bytes: usize) -> Self {
        Self {
            limit: max_event_bytes,
            carry: BytesMut::new(),
            chunk: Bytes::new(),
            scanned: 0,
            line_empty: true,
            after_cr: false,
            in_event: false,
            first: true,
            failed: false,
        }
    }

    /// Takes the next chunk of the stream.
    pub fn push(&mut self, chunk: Bytes) {
        if self.chunk.is_empty() {
            self.chunk = chunk;
        } else {
            let mut joined = BytesMut::with_capacity(self.chunk.len() + chunk.len());
            joined.extend_from_slice(&self.chunk);
            joined.extend_from_slice(&chunk);
            self.chunk = joined.freeze();
        }
    }

    /// Whether the stream, if it ended here, would end inside an event.
    pub fn finish(self) -> bool {
        self.failed || self.in_event || !self.line_empty || self.chunk.has_remaining()
    }

    /// The next complete event; `None` asks for more bytes. After an error there are no further events.
    #[expect(
        clippy::should_implement_trait,
        reason = "`None` means not yet, which an iterator could not say"
    )]
    pub fn next(&mut self) -> Option<Result<Event, TooLarge>> {
        if self.failed {
            return None;
        }
        let end = self.scan();
        if self.carry.len() + self.scanned > self.limit {
            self.failed = true;
            self.carry = BytesMut::new();
            self.chunk = Bytes::new();
            return Some(Err(TooLarge { limit: self.limit }));
        }
        let Some(end) = end else {
            // The copy lets the connection's read buffer go; its doubling keeps the sum of copies linear.
            self.carry.extend_from_slice(&self.chunk);
            self.chunk = Bytes::new();
            self.scanned = 0;
            return None;
        };
        // The last event of a chunk takes the chunk along: its memory goes when the event does.
        let tail = if end == self.chunk.len() {
            std::mem::take(&mut self.chunk)
        } else {
            self.chunk.split_to(end)
        };
        self.scanned = 0;
        self.in_event = false;
        let raw = if self.carry.is_empty() {
            tail
        } else {
            self.carry.extend_from_slice(&tail);
            std::mem::take(&mut self.carry).freeze()
        };
        Some(Ok(Event::new(raw, std::mem::take(&mut self.first))))
    }

    /// Scans on from where the last scan stopped; the end of the current event, if the chunk has it.
    fn scan(&mut self) -> Option<usize> {
        let bytes = &self.chunk[..];
        while let Some(offset) = memchr2(b'\n', b'\r', &bytes[self.scanned..]) {
            let at = self.scanned + offset;
            let blank = self.line_empty && offset == 0;
            let second_half = blank && self.after_cr && bytes[at] == b'\n';
            self.scanned = at + 1;
            self.line_empty = true;
            self.after_cr = bytes[at] == b'\r';
            if second_half {
                continue;
            }
            if !blank {
                self.in_event = true;
            } else if self.in_event {
                // An LF that is not here yet becomes the blank head of the next event: waiting for it could be forever.
                if self.after_cr && bytes.get(self.scanned) == Some(&b'\n') {
                    self.scanned += 1;
                    self.after_cr = false;
                }
                return Some(self.scanned);
            }
        }
        if self.scanned < bytes.len() {
            self.line_empty = false;
            self.scanned = bytes.len();
        }
        None
    }
}

impl Default for Splitter {
    fn default() -> Self {
        Self::new(MAX_EVENT_BYTES)
    }
}

/// One frame for a JSON message that did not come as SSE: `event: <type>`, `data: <json>`, blank line.
pub fn encode(event_type: &str, json: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(event_type.len() + json.len() + 17);
    frame.extend_from_slice(b"event: ");
    frame.extend_from_slice(event_type.as_bytes());
    frame.extend_from_slice(b"\ndata: ");
    let data = frame.len();
    frame.extend_from_slice(json);
    // Between the tokens of a JSON text a line end is mere space; inside its strings there is none.
    let mut from = data;
    while let Some(offset) = memchr2(b'\n', b'\r', &frame[from..]) {
        frame[from + offset] = b' ';
        from += offset + 1;
    }
    frame.extend_from_slice(b"\n\n");
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What one event says: name, data, whether there was data at all.
    type Said = (Vec<u8>, Vec<u8>, bool);

    fn split(chunks: &[&[u8]]) -> (Vec<Said>, Vec<u8>, bool) {
        let mut splitter = Splitter::default();
        let (mut said, mut raw) = (Vec::new(), Vec::new());
        for chunk in chunks {
            splitter.push(Bytes::copy_from_slice(chunk));
            while let Some(event) = splitter.next() {
                let event = event.expect("no event is near the limit");
                raw.extend_from_slice(&event.raw);
                assert_eq!(*event.data(), *event.data_bytes());
                said.push((
                    event.name().to_vec(),
                    event.data().into_owned(),
                    !event.is_comment(),
                ));
            }
        }
        (said, raw, splitter.finish())
    }

    /// The standard's algorithm, one line at a time over the whole text.
    fn naive(input: &[u8]) -> Vec<Said> {
        let mut lines = Vec::new();
        let mut rest = input.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(input);
        let marked = rest.len() != input.len();
        while let Some(end) = rest
            .iter()
            .position(|byte| *byte == b'\n' || *byte == b'\r')
        {
            lines.push(&rest[..end]);
            rest = rest[end..]
                .strip_prefix(b"\r\n")
                .unwrap_or_else(|| &rest[end + 1..]);
        }
        let mut events = Vec::new();
        let (mut name, mut data, mut seen) = (Vec::new(), None::<Vec<u8>>, false);
        for (number, line) in lines.into_iter().enumerate() {
            if line.is_empty() && !(marked && number == 0) {
                if std::mem::take(&mut seen) {
                    let data = data.take();
                    events.push((
                        std::mem::take(&mut name),
                        data.clone().unwrap_or_default(),
                        data.is_some(),
                    ));
                }
                continue;
            }
            seen = true;
            let colon = line
                .iter()
                .position(|byte| *byte == b':')
                .unwrap_or(line.len());
            let value = line.get(colon + 1..).unwrap_or_default();
            let value = value.strip_prefix(b" ").unwrap_or(value);
            match &line[..colon] {
                b"event" => name = value.to_vec(),
                b"data" => match &mut data {
                    None => data = Some(value.to_vec()),
                    Some(data) => {
                        data.push(b'\n');
                        data.extend_from_slice(value);
                    }
                },
                _ => {}
            }
        }
        events
    }

    fn text() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            8 => prop::sample::select(vec!["\n", "\r", "\r\n", "\n\n", "\r\n\r\n", "\r\r"]),
            4 => prop::sample::select(vec!["data:", "data: ", "event: ", "data", ":", " ", ": ping", "retry: 3", "\u{FEFF}"]),
            2 => prop::sample::select(vec!["{\"a\":1}", "x", "\u{2028}", "\u{85}", "response.created"]),
        ];
        prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat().into_bytes())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_chunking_says_what_the_standard_says(input in text(), cuts in prop::collection::vec(0usize..200, 0..12)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(input.len())).chain([0, input.len()]).collect();
            cuts.sort_unstable();
            let chunks: Vec<&[u8]> = cuts.windows(2).map(|pair| &input[pair[0]..pair[1]]).collect();
            let (said, raw, _) = split(&chunks);
            prop_assert_eq!(&said, &naive(&input));
            prop_assert!(input.starts_with(&raw), "the raw events are the input");
        }

        #[test]
        fn only_blank_lines_may_follow_the_last_event_of_a_clean_stream(input in text()) {
            let (_, raw, partial) = split(&[&input]);
            let rest = &input[raw.len()..];
            prop_assert_eq!(partial, rest.iter().any(|byte| !b"\r\n".contains(byte)));
        }
    }

    #[test]
    fn an_event_within_one_chunk_is_a_slice_of_it() {
        let chunk = Bytes::from_static(b"event: a\ndata: {}\n\ndata: 1\r\n\r\n");
        let mut splitter = Splitter::default();
        splitter.push(chunk.clone());
        let first = splitter.next().expect("complete").expect("small");
        let second = splitter.next().expect("complete").expect("small");
        assert_eq!(first.raw.as_ptr(), chunk.as_ptr());
        assert_eq!(second.raw.as_ptr(), chunk[first.raw.len()..].as_ptr());
        assert!(matches!(second.data(), Cow::Borrowed(b"1")));
        assert!(splitter.next().is_none());
    }

    #[test]
    fn chunks_pushed_without_draining_lose_nothing() {
        let mut splitter = Splitter::default();
        for chunk in ["data: a\n", "\ndata: b\n\nda", "ta: c\n\n"] {
            splitter.push(Bytes::from_static(chunk.as_bytes()));
        }
        let data: Vec<_> = std::iter::from_fn(|| splitter.next())
            .map(|event| event.expect("small").data_bytes())
            .collect();
        assert_eq!(data, ["a", "b", "c"]);
    }

    #[test]
    fn a_truncated_event_is_reported_and_never_emitted() {
        for (input, events, partial) in [
            ("data: a\n\n", 1, false),
            ("data: a\r\r", 1, false),
            ("data: a\n", 0, true),
            ("data: a", 0, true),
            ("data: a\n\n: ", 1, true),
            ("\n\n", 0, false),
            ("", 0, false),
        ] {
            let (said, _, left) = split(&[input.as_bytes()]);
            assert_eq!((said.len(), left), (events, partial), "{input:?}");
        }
    }

    #[test]
    fn an_event_over_the_ceiling_ends_the_stream() {
        for chunks in [
            vec!["data: 0123456789\n\n"],
            vec!["data: 01", "2345", "6789", "\n\ndata: a\n\n"],
        ] {
            let mut splitter = Splitter::new(15);
            let mut results = Vec::new();
            for chunk in chunks {
                splitter.push(Bytes::from_static(chunk.as_bytes()));
                results.extend(std::iter::from_fn(|| splitter.next()));
            }
            assert_eq!(results, [Err(TooLarge { limit: 15 })]);
        }
        let mut splitter = Splitter::new(9);
        splitter.push(Bytes::from_static(b"data: a\n\ndata: b\n\ndata: c\n\n"));
        assert_eq!(
            std::iter::from_fn(|| splitter.next())
                .filter(Result::is_ok)
                .count(),
            3,
            "the ceiling is per event"
        );
    }

    #[test]
    fn a_huge_event_in_small_chunks_is_scanned_once() {
        let body = vec![b'x'; 16 << 20];
        let mut splitter = Splitter::default();
        splitter.push(Bytes::from_static(b"data: "));
        for chunk in body.chunks(8 << 10) {
            assert!(splitter.next().is_none());
            assert_eq!(splitter.scanned, 0);
            splitter.push(Bytes::copy_from_slice(chunk));
            assert!(
                splitter.chunk.len() <= 8 << 10,
                "what was scanned is never scanned again"
            );
        }
        assert!(splitter.next().is_none());
        splitter.push(Bytes::from_static(b"\n\n"));
        let event = splitter.next().expect("complete").expect("within 32 MiB");
        assert_eq!(event.data().len(), body.len());
    }

    #[test]
    fn encoding_is_what_the_splitter_reads_back() {
        let frame = encode(
            "response.created",
            b"{\n\"type\": \"response.created\"\r\n}",
        );
        let mut splitter = Splitter::default();
        splitter.push(frame);
        let event = splitter.next().expect("complete").expect("small");
        assert_eq!(event.name(), b"response.created");
        assert_eq!(&*event.data(), b"{ \"type\": \"response.created\"  }");
        assert_eq!(encode("a", b"{}"), "event: a\ndata: {}\n\n");
    }

    #[test]
    fn keepalives_are_whole_frames() {
        for (frame, comment) in [
            (KEEPALIVE_DATA, false),
            (KEEPALIVE_COMMENT, true),
            (DONE, false),
        ] {
            let mut splitter = Splitter::default();
            splitter.push(frame);
            assert_eq!(
                splitter
                    .next()
                    .expect("complete")
                    .expect("small")
                    .is_comment(),
                comment
            );
            assert!(!splitter.finish());
        }
    }
}

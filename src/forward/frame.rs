//! The answer of an owner: frames of one byte of kind, four of length, and a payload. The last is the end, so that a cut is not taken for one.

use std::pin::Pin;

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::Stream;
use http::{HeaderMap, HeaderName, HeaderValue};

/// A payload at most; an event is at most 64 MiB.
const LONGEST: usize = 65 << 20;
const HEAD: usize = 5;

/// One step of a turn's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// How the client comes back; opaque here.
    Token(Bytes),
    /// Upstream's headers, filtered.
    Head(HeaderMap),
    /// The JSON of an event.
    Event(Bytes),
    /// Nothing follows; opaque here.
    End(Bytes),
}

/// What an owner answers.
pub type Frames = Pin<Box<dyn Stream<Item = Frame> + Send>>;

/// What came is no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl Frame {
    pub(super) fn write(&self, out: &mut BytesMut) {
        match self {
            Self::Token(token) => put(out, 1, token),
            Self::Head(headers) => {
                let mut text = Vec::new();
                for (name, value) in headers {
                    text.extend_from_slice(name.as_str().as_bytes());
                    text.push(b'\0');
                    text.extend_from_slice(value.as_bytes());
                    text.push(b'\0');
                }
                put(out, 2, &text);
            }
            Self::Event(json) => put(out, 3, json),
            Self::End(end) => put(out, 4, end),
        }
    }

    fn read(kind: u8, payload: Bytes) -> Result<Self, Malformed> {
        match kind {
            1 => Ok(Self::Token(payload)),
            2 => {
                let mut headers = HeaderMap::new();
                let mut parts = payload.split(|byte| *byte == 0);
                while let (Some(name), Some(value)) = (parts.next(), parts.next()) {
                    let name = HeaderName::from_bytes(name).map_err(|_| Malformed)?;
                    let value = HeaderValue::from_bytes(value).map_err(|_| Malformed)?;
                    headers.append(name, value);
                }
                Ok(Self::Head(headers))
            }
            3 => Ok(Self::Event(payload)),
            4 => Ok(Self::End(payload)),
            _ => Err(Malformed),
        }
    }
}

fn put(out: &mut BytesMut, kind: u8, payload: &[u8]) {
    out.reserve(HEAD + payload.len());
    out.put_u8(kind);
    out.put_u32(u32::try_from(payload.len()).expect("an event is at most 64 MiB"));
    out.put_slice(payload);
}

/// Makes frames of bytes, however they were cut.
#[derive(Debug, Default)]
pub(super) struct Decoder(BytesMut);

impl Decoder {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next frame, if it is here.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, Malformed> {
        let Some((head, _)) = self.0.split_first_chunk::<HEAD>() else {
            return Ok(None);
        };
        let [kind, length @ ..] = *head;
        let length = usize::try_from(u32::from_be_bytes(length)).map_err(|_| Malformed)?;
        if length > LONGEST || !(1..=4).contains(&kind) {
            return Err(Malformed);
        }
        if self.0.len() < HEAD + length {
            return Ok(None);
        }
        self.0.advance(HEAD);
        Frame::read(kind, self.0.split_to(length).freeze()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frames() -> Vec<Frame> {
        let mut headers = HeaderMap::new();
        headers.append("a", HeaderValue::from_static("1"));
        headers.append("a", HeaderValue::from_static("two words"));
        vec![
            Frame::Token(Bytes::from_static(b"t")),
            Frame::Head(HeaderMap::new()),
            Frame::Head(headers),
            Frame::Event(Bytes::from(vec![b'x'; 70_000])),
            Frame::Event(Bytes::new()),
            Frame::End(Bytes::from_static(b"{}")),
        ]
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(sizes in proptest::collection::vec(1_usize..9000, 1..50)) {
            let mut bytes = BytesMut::new();
            for frame in frames() {
                frame.write(&mut bytes);
            }
            let mut sizes = sizes.into_iter().cycle();
            let (mut decoder, mut read) = (Decoder::default(), Vec::new());
            while !bytes.is_empty() {
                let size = sizes.next().unwrap_or(1).min(bytes.len());
                decoder.push(&bytes.split_to(size));
                while let Some(frame) = decoder.next().unwrap() {
                    read.push(frame);
                }
            }
            prop_assert_eq!(read, frames());
        }
    }

    #[test]
    fn what_is_no_frame_is_not_waited_for() {
        for bytes in [[9, 0, 0, 0, 1], [3, 255, 255, 255, 255], [0, 0, 0, 0, 0]] {
            let mut decoder = Decoder::default();
            decoder.push(&bytes);
            assert_eq!(decoder.next(), Err(Malformed));
        }
    }
}

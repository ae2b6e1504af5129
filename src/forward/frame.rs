//! The answer's encoding: a kind byte, a length of four bytes (big-endian), the payload. Pure but for the stream it polls.
//!
//! The encoder puts what is ready into one chunk and leaves large payloads where they are. The decoder takes any chunking and refuses
//! what no encoder writes before it makes room for it.

use std::{
    convert::Infallible,
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::{Stream, StreamExt as _};
use http::{HeaderMap, HeaderName, HeaderValue};
use hyper::body::{self, Body};

/// One frame of an answer.
#[derive(Clone, PartialEq, Eq)]
pub enum Frame {
    /// The turn-state token for the client.
    Token(String),
    /// The head of upstream's answer.
    Head(HeaderMap),
    /// An event, as JSON.
    Json(Bytes),
    /// The typed end, as JSON; opaque here. Always the last.
    End(Bytes),
}

/// What no encoder writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Malformed;

const HEADER: usize = 5;
/// The largest payload: a body of 64 MiB with what may be put around it.
const PAYLOAD_BYTES: usize = 128 << 20;
/// Up to here a payload is copied into the chunk of its neighbours.
const COPIED: usize = 8 << 10;
/// A chunk is sent when it has reached this size.
const CHUNK: usize = 64 << 10;

/// What the model said does not print.
impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Token(_) => "Token(..)",
            Self::Head(_) => "Head(..)",
            Self::Json(_) => "Json(..)",
            Self::End(_) => "End(..)",
        })
    }
}

impl Frame {
    fn kind(&self) -> u8 {
        match self {
            Self::Token(_) => 1,
            Self::Head(_) => 2,
            Self::Json(_) => 3,
            Self::End(_) => 4,
        }
    }

    fn into_payload(self) -> Bytes {
        match self {
            Self::Token(token) => token.into(),
            Self::Head(headers) => lines(&headers),
            Self::Json(payload) | Self::End(payload) => payload,
        }
    }

    fn read(kind: u8, payload: Bytes) -> Result<Self, Malformed> {
        match kind {
            1 => String::from_utf8(payload.into())
                .map(Self::Token)
                .map_err(|_| Malformed),
            2 => headers(&payload).map(Self::Head).ok_or(Malformed),
            3 => Ok(Self::Json(payload)),
            4 => Ok(Self::End(payload)),
            _ => Err(Malformed),
        }
    }
}

/// `name:value` in lines: a name holds no colon, neither holds a line feed.
fn lines(headers: &HeaderMap) -> Bytes {
    let mut out = BytesMut::new();
    for (name, value) in headers {
        out.extend_from_slice(name.as_ref());
        out.put_u8(b':');
        out.extend_from_slice(value.as_bytes());
        out.put_u8(b'\n');
    }
    out.freeze()
}

fn headers(lines: &[u8]) -> Option<HeaderMap> {
    let mut headers = HeaderMap::new();
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\n")?;
        let colon = memchr::memchr(b':', line)?;
        let name = HeaderName::from_bytes(&line[..colon]).ok()?;
        let value = HeaderValue::from_bytes(&line[colon + 1..]).ok()?;
        headers.try_append(name, value).ok()?;
    }
    Some(headers)
}

/// The frames of a stream, up to its end, as the body of an answer.
pub(super) struct Encoder<S> {
    /// `None` after its end.
    frames: Option<S>,
    /// A large payload whose header has gone.
    payload: Option<Bytes>,
}

impl<S: Stream<Item = Frame> + Unpin> Encoder<S> {
    pub(super) fn new(frames: S) -> Self {
        Self {
            frames: Some(frames),
            payload: None,
        }
    }

    /// What is ready now; `None` when there will be no more.
    fn poll_chunk(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if let Some(payload) = self.payload.take() {
            return Poll::Ready(Some(payload));
        }
        let mut chunk = BytesMut::new();
        while let Some(frames) = &mut self.frames
            && self.payload.is_none()
            && chunk.len() < CHUNK
        {
            match frames.poll_next_unpin(context) {
                Poll::Ready(Some(frame)) => self.put(frame, &mut chunk),
                Poll::Ready(None) => self.frames = None,
                Poll::Pending if chunk.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready((!chunk.is_empty()).then(|| chunk.freeze()))
    }

    fn put(&mut self, frame: Frame, chunk: &mut BytesMut) {
        let (kind, is_end) = (frame.kind(), matches!(frame, Frame::End(_)));
        let payload = frame.into_payload();
        let Some(length) = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() <= PAYLOAD_BYTES)
        else {
            // The other side would not read it: the answer is cut here.
            tracing::error!(
                bytes = payload.len(),
                "a frame is too large to be forwarded"
            );
            self.frames = None;
            return;
        };
        chunk.put_u8(kind);
        chunk.put_u32(length);
        if payload.len() <= COPIED {
            chunk.extend_from_slice(&payload);
        } else {
            self.payload = Some(payload);
        }
        if is_end {
            self.frames = None;
        }
    }
}

impl<S: Stream<Item = Frame> + Unpin> Body for Encoder<S> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<body::Frame<Bytes>, Infallible>>> {
        self.poll_chunk(context)
            .map(|chunk| chunk.map(|chunk| Ok(body::Frame::data(chunk))))
    }

    /// Known with the last chunk, so that the end of the body goes out beside it.
    fn is_end_stream(&self) -> bool {
        self.frames.is_none() && self.payload.is_none()
    }
}

/// Finds frames in chunks.
#[derive(Default)]
pub(super) struct Decoder(BytesMut);

impl Decoder {
    pub(super) fn push(&mut self, chunk: &[u8]) {
        self.0.extend_from_slice(chunk);
    }

    /// The next frame that is complete.
    pub(super) fn next(&mut self) -> Result<Option<Frame>, Malformed> {
        let Some((&[kind, a, b, c, d], rest)) = self.0.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if !(1..=5).contains(&kind) || length > PAYLOAD_BYTES {
            return Err(Malformed);
        }
        if let Some(missing) = length
            .checked_sub(rest.len())
            .filter(|missing| *missing > 0)
        {
            self.0.reserve(missing);
            return Ok(None);
        }
        self.0.advance(HEADER);
        Frame::read(kind, self.0.split_to(length).freeze()).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt as _, stream};
    use http_body_util::BodyExt as _;
    use proptest::prelude::*;

    use super::*;

    fn chunks(frames: Vec<Frame>) -> Vec<Bytes> {
        let mut body = Encoder::new(stream::iter(frames));
        let mut chunks = Vec::new();
        while let Some(Ok(chunk)) = body.frame().now_or_never().unwrap() {
            chunks.push(chunk.into_data().unwrap());
        }
        assert!(body.is_end_stream());
        chunks
    }

    fn encoded(frames: &[Frame]) -> Vec<u8> {
        chunks(frames.to_vec()).concat()
    }

    fn decoded<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Result<Vec<Frame>, Malformed> {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for piece in pieces {
            decoder.push(piece);
            while let Some(frame) = decoder.next()? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    fn some_headers() -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.append("x-a", HeaderValue::from_static("1: 2"));
        headers.append("x-a", HeaderValue::from_bytes(b"\xfc\t").unwrap());
        headers.append("x-empty", HeaderValue::from_static(""));
        headers
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let bytes = prop::collection::vec(any::<u8>(), 0..3 * COPIED).prop_map(Bytes::from);
        prop_oneof![
            any::<String>().prop_map(Frame::Token),
            Just(Frame::Head(some_headers())),
            Just(Frame::Head(HeaderMap::new())),
            bytes.prop_map(Frame::Json),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_chunking_yields_the_same_frames_and_a_cut_yields_whole_ones(
            mut frames in prop::collection::vec(frame(), 0..8),
            piece in 1_usize..5_000,
            cut in any::<prop::sample::Index>(),
        ) {
            frames.push(Frame::End(Bytes::from_static(b"{}")));
            let bytes = encoded(&frames);
            prop_assert_eq!(&decoded(bytes.chunks(piece)).unwrap(), &frames);
            let before = decoded(bytes[..cut.index(bytes.len())].chunks(piece)).unwrap();
            prop_assert!(before.len() < frames.len());
            prop_assert_eq!(&before[..], &frames[..before.len()]);
        }

        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            drop(decoded(std::iter::once(&bytes[..])));
        }
    }

    #[test]
    fn what_no_encoder_writes_is_refused_at_its_header() {
        let too_long = u32::try_from(PAYLOAD_BYTES + 1).unwrap().to_be_bytes();
        let with = |kind: u8, length: [u8; 4]| [&[kind], &length[..]].concat();
        for header in [
            with(0, [0; 4]),
            with(5, [0; 4]),
            with(3, too_long),
            with(3, [0xff; 4]),
        ] {
            assert_eq!(decoded(std::iter::once(&header[..])), Err(Malformed));
        }
        for (kind, payload) in [(1, &b"\xff"[..]), (2, b"a:b"), (2, b"a\n"), (2, b"a b:c\n")] {
            let mut bytes = with(kind, u32::try_from(payload.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(payload);
            assert_eq!(decoded(std::iter::once(&bytes[..])), Err(Malformed));
        }
    }

    #[test]
    fn what_is_ready_is_one_chunk_and_a_large_payload_is_not_copied() {
        let small = Frame::Json(Bytes::from_static(b"{}"));
        assert_eq!(chunks(vec![small.clone(); 100]).len(), 1);
        let large = Bytes::from(vec![1; COPIED + 1]);
        let sent = chunks(vec![small, Frame::Json(large.clone())]);
        assert_eq!(sent.len(), 2);
        assert_eq!(sent[1].as_ptr(), large.as_ptr());
    }

    #[test]
    fn a_frame_of_64_mib_and_more_travels() {
        let frames = [Frame::Json(Bytes::from(vec![b' '; (64 << 20) + 1]))];
        let bytes = encoded(&frames);
        assert!(decoded(bytes.chunks(1 << 20)).unwrap() == frames);
    }

    #[test]
    fn nothing_follows_an_end_and_a_frame_too_large_cuts() {
        let end = Frame::End(Bytes::new());
        let after = [end.clone(), Frame::Token("late".into())];
        assert_eq!(encoded(&after), encoded(std::slice::from_ref(&end)));
        let large = Frame::Json(Bytes::from(vec![0; PAYLOAD_BYTES + 1]));
        assert!(encoded(&[large, end]).is_empty());
    }
}

//! Reads request bodies: bounded on the wire and decoded, zstd and gzip, within one budget of bytes for the whole replica.

use std::sync::Arc;

use async_compression::tokio::bufread::{GzipDecoder, ZstdDecoder};
use axum::body::Body;
use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _};
use http::{HeaderMap, header};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_util::io::StreamReader;

use crate::error::{ApiError, Code};

/// One body, on the wire and decoded.
pub(super) const LIMIT: usize = 64 << 20;
/// All bodies held at once by this replica.
const BUDGET: usize = 512 << 20;
/// The unit in which the budget is counted.
const UNIT: usize = 1 << 10;

/// The replica's budget of body bytes.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Semaphore>);

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(BUDGET / UNIT)))
    }
}

/// Bytes taken from the budget, given back when dropped.
#[derive(Debug)]
pub(crate) struct Held(#[expect(dead_code, reason = "held for its Drop")] Option<OwnedSemaphorePermit>);

impl Budget {
    /// Takes room for a body.
    ///
    /// # Errors
    /// 429 when the replica holds as much as it may.
    pub(super) fn take(&self, bytes: usize) -> Result<Held, ApiError> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX);
        Arc::clone(&self.0).try_acquire_many_owned(units).map(|permit| Held(Some(permit))).map_err(|_| {
            ApiError::new(Code::Overloaded, "This replica is holding as many request bodies as it may; try again shortly.")
        })
    }
}

/// Reads and decodes a body.
///
/// # Errors
/// 413 over the limit, 400 for an encoding we do not read or that is damaged, 429 over the budget.
pub(super) async fn read(headers: &HeaderMap, body: Body, budget: &Budget) -> Result<(Bytes, Held), ApiError> {
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > LIMIT) {
        return Err(too_large());
    }
    let encoding = headers.get(header::CONTENT_ENCODING).map(|encoding| encoding.to_str().unwrap_or("?").trim().to_ascii_lowercase());
    match encoding.as_deref() {
        None | Some("" | "identity") => plain(body, announced, budget).await,
        Some("zstd") => decoded(ZstdDecoder::new(reader(body)), budget).await,
        Some("gzip" | "x-gzip") => decoded(GzipDecoder::new(reader(body)), budget).await,
        Some(_) => Err(ApiError::new(Code::InvalidEncoding, "Content-Encoding must be zstd, gzip or identity.")),
    }
}

async fn plain(body: Body, announced: Option<usize>, budget: &Budget) -> Result<(Bytes, Held), ApiError> {
    let mut chunks = body.into_data_stream();
    // Room for what was announced is taken at once; without a length it is taken as it grows.
    let mut held = vec![budget.take(announced.unwrap_or(0))?];
    let mut room = announced.unwrap_or(0);
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|_| cut())?;
        let length = first.len() + rest.len() + chunk.len();
        if length > LIMIT {
            return Err(too_large());
        }
        if length > room {
            held.push(budget.take((length - room).max(64 * UNIT))?);
            room = length.max(room + 64 * UNIT);
        }
        if first.is_empty() && rest.is_empty() {
            first = chunk;
        } else {
            if rest.is_empty() {
                rest.reserve(announced.unwrap_or(0).max(first.len() + chunk.len()));
                rest.extend_from_slice(&std::mem::take(&mut first));
            }
            rest.extend_from_slice(&chunk);
        }
    }
    let body = if rest.is_empty() { first } else { rest.freeze() };
    Ok((body, merge(held)))
}

async fn decoded(decoder: impl AsyncRead + Unpin, budget: &Budget) -> Result<(Bytes, Held), ApiError> {
    let mut decoder = decoder.take(LIMIT as u64 + 1);
    let mut held = Vec::new();
    let mut room = 0;
    let mut body = BytesMut::new();
    loop {
        if body.len() == room {
            let more = room.clamp(64 * UNIT, 8 << 20);
            held.push(budget.take(more)?);
            room += more;
            body.reserve(more);
        }
        match decoder.read_buf(&mut body).await {
            Ok(0) => break,
            Ok(_) if body.len() > LIMIT => return Err(too_large()),
            Ok(_) => {}
            Err(_) => {
                return Err(ApiError::new(Code::InvalidEncoding, "The body is not what its Content-Encoding says, or was cut short."));
            }
        }
        room = room.max(body.len());
    }
    Ok((body.freeze(), merge(held)))
}

fn reader(body: Body) -> StreamReader<impl futures_util::Stream<Item = Result<Bytes, std::io::Error>> + Unpin, Bytes> {
    let mut wire = 0usize;
    let bounded = body.into_data_stream().map_err(std::io::Error::other).and_then(move |chunk| {
        wire += chunk.len();
        std::future::ready(if wire > LIMIT { Err(std::io::Error::other("too large")) } else { Ok(chunk) })
    });
    StreamReader::new(Box::pin(bounded))
}

fn merge(held: Vec<Held>) -> Held {
    let permits = held.into_iter().filter_map(|held| held.0);
    Held(permits.reduce(|mut all, more| {
        all.merge(more);
        all
    }))
}

fn too_large() -> ApiError {
    ApiError::new(Code::PayloadTooLarge, format!("The request body is larger than {} MiB.", LIMIT >> 20))
}

fn cut() -> ApiError {
    ApiError::new(Code::InvalidRequest, "The request body was cut short.")
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    async fn send(encoding: Option<&'static str>, body: Vec<u8>) -> Result<Bytes, ApiError> {
        let mut headers = HeaderMap::new();
        if let Some(encoding) = encoding {
            headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static(encoding));
        }
        let budget = Budget::default();
        let result = read(&headers, Body::from(body), &budget).await.map(|(body, _held)| body);
        assert_eq!(budget.0.available_permits(), BUDGET / UNIT, "everything taken is given back");
        result
    }

    #[tokio::test]
    async fn bodies_are_decoded() {
        let text = b"hello ".repeat(100_000);
        assert_eq!(send(None, text.clone()).await.unwrap(), text);
        assert_eq!(send(Some("zstd"), zstd::encode_all(text.as_slice(), 1).unwrap()).await.unwrap(), text);
    }

    #[tokio::test]
    async fn a_bomb_is_refused_without_being_held() {
        let bomb = zstd::encode_all(std::io::repeat(0).take(200 << 20), 1).unwrap();
        assert!(bomb.len() < 1 << 20);
        assert_eq!(send(Some("zstd"), bomb).await.unwrap_err().code_str(), "payload_too_large");
    }

    #[tokio::test]
    async fn damaged_cut_and_unknown_encodings_are_refused() {
        let good = zstd::encode_all(b"hello ".repeat(1000).as_slice(), 1).unwrap();
        for (encoding, body) in [
            ("zstd", b"not zstd".to_vec()),
            ("zstd", good[..good.len() / 2].to_vec()),
            ("gzip", good.clone()),
            ("br", good.clone()),
        ] {
            assert_eq!(send(Some(encoding), body).await.unwrap_err().code_str(), "invalid_encoding", "{encoding}");
        }
    }

    #[tokio::test]
    async fn a_full_replica_says_so() {
        let budget = Budget::default();
        let _all = budget.take(BUDGET).unwrap();
        let error = read(&HeaderMap::new(), Body::from("x"), &budget).await.unwrap_err();
        assert_eq!(error.status(), 429);
    }

    use std::io::Read as _;
}

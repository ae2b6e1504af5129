//! Reads request bodies: bounded on the wire and decoded, zstd and gzip, within one budget of bytes for the whole replica.

use std::time::Duration;

use async_compression::tokio::bufread::{GzipDecoder, ZstdDecoder};
use axum::body::Body;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _};
use http::{HeaderMap, header};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    time::timeout,
};
use tokio_util::io::StreamReader;

use crate::{
    error::{ApiError, Code},
    telemetry,
    turn::{Budget, Held},
};

/// One body, on the wire and decoded.
pub(super) const LIMIT: usize = 64 << 20;
/// How long a client may pause within a body.
const CHUNK_TIME: Duration = Duration::from_secs(30);
/// By how much room grows at first, where the length is not announced.
const STEP: usize = 64 << 10;

/// Reads and decodes a body.
///
/// # Errors
/// 413 over the limit, 400 for an encoding we do not read or that is damaged, 429 over the budget.
pub(super) async fn read(
    headers: &HeaderMap,
    body: Body,
    budget: &Budget,
) -> Result<(Bytes, Held), ApiError> {
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if announced.is_some_and(|length| length > LIMIT) {
        return Err(too_large());
    }
    let encoding = headers
        .get(header::CONTENT_ENCODING)
        .map(|encoding| encoding.to_str().unwrap_or("?").trim().to_ascii_lowercase());
    match encoding.as_deref() {
        None | Some("" | "identity") => plain(body, announced, budget).await,
        Some("zstd") => decoded(ZstdDecoder::new(reader(body)), budget).await,
        Some("gzip" | "x-gzip") => decoded(GzipDecoder::new(reader(body)), budget).await,
        Some(_) => Err(ApiError::new(
            Code::InvalidEncoding,
            "Content-Encoding must be zstd, gzip or identity.",
        )),
    }
}

async fn plain(
    body: Body,
    announced: Option<usize>,
    budget: &Budget,
) -> Result<(Bytes, Held), ApiError> {
    let mut chunks = body.into_data_stream();
    // Room for what was announced is taken at once; without a length it is taken as it grows.
    let mut held = take(budget, announced.unwrap_or(0))?;
    let mut room = announced.unwrap_or(0);
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(chunk) = timeout(CHUNK_TIME, chunks.next())
        .await
        .map_err(|_| cut())?
    {
        let chunk = chunk.map_err(|_| cut())?;
        let length = first.len() + rest.len() + chunk.len();
        if length > LIMIT {
            return Err(too_large());
        }
        if length > room {
            held.merge(take(budget, (length - room).max(STEP))?);
            room = length.max(room + STEP);
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
    let body = if rest.is_empty() {
        first
    } else {
        rest.freeze()
    };
    Ok((body, held))
}

async fn decoded(
    decoder: impl AsyncRead + Unpin,
    budget: &Budget,
) -> Result<(Bytes, Held), ApiError> {
    let mut decoder = decoder.take(LIMIT as u64 + 1);
    let mut held = Held::default();
    let mut room = 0;
    let mut body = BytesMut::new();
    loop {
        if body.len() == room {
            let more = room.clamp(STEP, 1 << 20);
            held.merge(take(budget, more)?);
            room += more;
            body.reserve(more);
        }
        // No further than what was taken: its room is larger.
        let more = room - body.len();
        let mut within = (&mut body).limit(more);
        match timeout(CHUNK_TIME, decoder.read_buf(&mut within))
            .await
            .map_err(|_| cut())?
        {
            Ok(0) => break,
            Ok(_) if body.len() > LIMIT => return Err(too_large()),
            Ok(_) => {}
            Err(_) => {
                return Err(ApiError::new(
                    Code::InvalidEncoding,
                    "The body is not what its Content-Encoding says, or was cut short.",
                ));
            }
        }
    }
    Ok((body.freeze(), held))
}

fn reader(
    body: Body,
) -> StreamReader<impl futures_util::Stream<Item = Result<Bytes, std::io::Error>> + Unpin, Bytes> {
    let mut wire = 0usize;
    let bounded = body
        .into_data_stream()
        .map_err(std::io::Error::other)
        .and_then(move |chunk| {
            wire += chunk.len();
            std::future::ready(if wire > LIMIT {
                Err(std::io::Error::other("too large"))
            } else {
                Ok(chunk)
            })
        });
    StreamReader::new(Box::pin(bounded))
}

fn take(budget: &Budget, bytes: usize) -> Result<Held, ApiError> {
    budget.take(bytes).ok_or_else(full)
}

/// There is no room in the budget.
pub(super) fn full() -> ApiError {
    telemetry::limit_rejected("memory");
    ApiError::new(
        Code::Overloaded,
        "This replica is holding as many request bodies as it may; try again shortly.",
    )
}

fn too_large() -> ApiError {
    ApiError::new(
        Code::PayloadTooLarge,
        format!("The request body is larger than {} MiB.", LIMIT >> 20),
    )
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
        let result = read(&headers, Body::from(body), &budget)
            .await
            .map(|(body, _held)| body);
        assert_eq!(
            budget.free(),
            Budget::default().free(),
            "everything taken is given back"
        );
        result
    }

    #[tokio::test]
    async fn a_decoded_body_is_held_for_what_it_is() {
        let text = vec![b' '; 30 << 20];
        let mut packed = Vec::new();
        let mut encoder = async_compression::tokio::bufread::ZstdEncoder::new(&text[..]);
        encoder.read_to_end(&mut packed).await.unwrap();
        let headers = [(header::CONTENT_ENCODING, HeaderValue::from_static("zstd"))];
        let budget = Budget::default();
        let read = read(&headers.into_iter().collect(), Body::from(packed), &budget).await;
        let (body, _held) = read.unwrap();
        assert_eq!(body.len(), text.len());
        assert!((text.len()..text.len() + (2 << 20)).contains(&budget.used().0));
    }

    #[tokio::test]
    async fn bodies_are_decoded() {
        let text = b"hello ".repeat(100_000);
        assert_eq!(send(None, text.clone()).await.unwrap(), text);
        assert_eq!(
            send(Some("zstd"), zstd::encode_all(text.as_slice(), 1).unwrap())
                .await
                .unwrap(),
            text
        );
    }

    #[tokio::test]
    async fn a_bomb_is_refused_without_being_held() {
        let bomb = zstd::encode_all(std::io::repeat(0).take(200 << 20), 1).unwrap();
        assert!(bomb.len() < 1 << 20);
        assert_eq!(
            send(Some("zstd"), bomb).await.unwrap_err().code_str(),
            "payload_too_large"
        );
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
            assert_eq!(
                send(Some(encoding), body).await.unwrap_err().code_str(),
                "invalid_encoding",
                "{encoding}"
            );
        }
    }

    #[tokio::test]
    async fn a_full_replica_says_so() {
        let budget = Budget::default();
        let _all = budget.take(budget.free()).unwrap();
        let error = read(&HeaderMap::new(), Body::from("x"), &budget)
            .await
            .unwrap_err();
        assert_eq!(error.status(), 429);
    }

    use std::io::Read as _;
}

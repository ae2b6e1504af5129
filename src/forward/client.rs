//! The sending end.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use rustls::{ClientConfig, RootCertStore, crypto::ring};
use tokio::time::timeout;

use super::{
    ENVELOPE, Envelope, Keys, MAC, PATH, Refusal,
    frame::{Decoder, Frame},
};
use crate::telemetry;

/// How long an owner may take to say that it has begun, and to be connected to.
const HEAD: Duration = Duration::from_secs(1);
/// A large body gets more: so many bytes a second.
const RATE: usize = 16 << 20;

/// Sends turns to owners. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Client {
    client: reqwest::Client,
    keys: Keys,
}

/// Why a turn was not served by its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotSent {
    /// No answer in time, refused or reset: whether the owner has begun is for the ledger to say.
    Silent,
    /// The owner said no.
    Refused(Refusal),
}

/// The stream broke off without an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut;

/// An owner's answer. Dropping it tells the owner that the client is gone.
#[derive(Debug)]
pub struct Answer {
    response: reqwest::Response,
    decoder: Decoder,
    ended: bool,
}

impl Client {
    /// A client of its own: no proxies, connections kept.
    ///
    /// # Errors
    /// If TLS cannot be set up.
    pub fn new(keys: Keys) -> anyhow::Result<Self> {
        let roots = RootCertStore::from_iter(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        let tls = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .context("TLS versions")?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .http1_only()
            .no_proxy()
            .tcp_nodelay(true)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .connect_timeout(HEAD)
            .pool_idle_timeout(Duration::from_secs(60))
            .build()
            .context("the client for other replicas")?;
        Ok(Self { client, keys })
    }

    /// Sends a turn. Comes back when the owner has begun it.
    ///
    /// # Errors
    /// [`NotSent`].
    pub async fn send(
        &self,
        endpoint: &str,
        envelope: &Envelope,
        payload: Bytes,
    ) -> Result<Answer, NotSent> {
        let began = Instant::now();
        let (text, mac) = self.keys.sign(envelope);
        let patience = HEAD + HEAD.mul_f64(payload.len() as f64 / RATE as f64);
        let request = self
            .client
            .post(format!("{endpoint}{PATH}"))
            .header(ENVELOPE, text)
            .header(MAC, mac)
            .body(payload);
        let response = match timeout(patience, request.send()).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => {
                tracing::debug!(%error, endpoint, "a replica cannot be reached");
                return Err(NotSent::Silent);
            }
            Err(_) => {
                tracing::debug!(endpoint, "a replica does not answer");
                return Err(NotSent::Silent);
            }
        };
        if response.status().is_success() {
            telemetry::observe("drawbridge_forward_head_seconds", began.elapsed());
            return Ok(Answer {
                response,
                decoder: Decoder::default(),
                ended: false,
            });
        }
        // What is no refusal of ours was not said by a replica.
        Refusal::of(response.status()).map_or(Err(NotSent::Silent), |refusal| {
            Err(NotSent::Refused(refusal))
        })
    }
}

impl Answer {
    /// The next frame; `None` after the end. Cancel-safe.
    ///
    /// # Errors
    /// [`Cut`].
    pub async fn next(&mut self) -> Result<Option<Frame>, Cut> {
        while !self.ended {
            if let Some(frame) = self.decoder.next().map_err(|_| Cut)? {
                self.ended = matches!(frame, Frame::End(_));
                return Ok(Some(frame));
            }
            match self.response.chunk().await {
                Ok(Some(bytes)) => self.decoder.push(&bytes),
                Ok(None) | Err(_) => return Err(Cut),
            }
        }
        Ok(None)
    }
}

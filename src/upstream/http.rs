//! Requests and event streams over HTTP.

use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio::time::timeout;

use super::{Unsent, Upstream, authorize, credential::Credential, deadline};
use crate::{
    db::Clock,
    ids::AccountId,
    protocol::{
        failure::{Class, Deadline, Failure},
        limits,
        sse::{self, Splitter},
    },
    quota::Source,
};

/// How much of a refusal is read, and for how long.
const REFUSAL_BYTES: usize = 256 << 10;
const REFUSAL_TIME: Duration = Duration::from_secs(10);

/// An open event stream.
pub struct Events {
    response: Box<reqwest::Response>,
    splitter: Splitter,
    clock: Clock,
}

impl Upstream {
    /// Sends the body of a turn; yields the event stream once upstream has accepted it. `began` is when the attempt began.
    ///
    /// # Errors
    /// Classified: upstream's refusal, or what the network did.
    pub async fn create(
        &self,
        account: AccountId,
        credential: &Credential,
        mut headers: HeaderMap,
        body: Bytes,
        began: Instant,
    ) -> Result<Events, Unsent> {
        headers.insert(
            header::ACCEPT,
            HeaderValue::from_static("text/event-stream"),
        );
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        authorize(&mut headers, credential);
        let request = self
            .client
            .post(format!("{}/codex/responses", self.base))
            .headers(headers)
            .body(body);
        let response = self.answered(account, request, began, Source::Header);
        let response = response.await?;
        Ok(Events {
            response: Box::new(response),
            splitter: Splitter::default(),
            clock: self.clock.clone(),
        })
    }

    /// A small JSON document below the base URL.
    ///
    /// # Errors
    /// As [`Upstream::create`].
    pub async fn document(
        &self,
        account: AccountId,
        credential: &Credential,
        path: &str,
    ) -> Result<Bytes, Failure> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        authorize(&mut headers, credential);
        let request = self
            .client
            .get(format!("{}{path}", self.base))
            .headers(headers);
        let answered = self.answered(account, request, Instant::now(), Source::Poll);
        let response = answered.await.map_err(Unsent::failure)?;
        let body = timeout(deadline::HEADERS, super::bounded(response))
            .await
            .map_err(|_| Failure::timeout(Deadline::Idle, self.now()))?;
        body.map(Bytes::from)
            .map_err(|_| Failure::truncated(self.now()))
    }

    /// Sends a request and waits for a head that says 200.
    async fn answered(
        &self,
        account: AccountId,
        request: reqwest::RequestBuilder,
        began: Instant,
        accepted: Source,
    ) -> Result<reqwest::Response, Unsent> {
        let response = self.head(account, request, began, accepted).await?;
        if response.status() == StatusCode::OK {
            Ok(response)
        } else {
            Err(Unsent::Perhaps(self.refused(response).await))
        }
    }

    /// Sends a request and waits for its head, whose limits are taken in whatever it says; `accepted` is what they are worth unless it
    /// refuses.
    pub(super) async fn head(
        &self,
        account: AccountId,
        request: reqwest::RequestBuilder,
        began: Instant,
        accepted: Source,
    ) -> Result<reqwest::Response, Unsent> {
        let response = timeout(deadline::CONNECT + deadline::HEADERS, request.send())
            .await
            .map_err(|_| Unsent::Perhaps(Failure::timeout(Deadline::Headers, self.now())))?
            .map_err(|error| self.network(&error))?;
        let source = match response.status() {
            StatusCode::OK | StatusCode::SWITCHING_PROTOCOLS => accepted,
            _ => Source::Error,
        };
        for observation in limits::from_headers(response.headers(), self.now()) {
            self.quota.observe(account, &observation, began, source);
        }
        Ok(response)
    }

    /// What the network did, without URLs or addresses. Only a connection that never came up is known to have carried nothing.
    fn network(&self, error: &reqwest::Error) -> Unsent {
        let now = self.now();
        match (error.is_connect(), error.is_timeout()) {
            (true, true) => Unsent::Nothing(Failure::timeout(Deadline::Connect, now)),
            (true, false) => {
                let message = "Upstream cannot be reached";
                Unsent::Nothing(Failure::local(Class::Network, message, now))
            }
            (false, _) => Unsent::Perhaps(Failure::truncated(now)),
        }
    }

    /// Upstream's refusal, with the beginning of its body.
    pub(super) async fn refused(&self, response: reqwest::Response) -> Failure {
        let (status, headers) = (response.status(), response.headers().clone());
        let body = timeout(REFUSAL_TIME, refusal(response))
            .await
            .unwrap_or_default();
        Failure::from_http(status, &headers, &body, self.now())
    }
}

/// The beginning of a refusal's body.
async fn refusal(mut response: reqwest::Response) -> Bytes {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() >= REFUSAL_BYTES {
            body.truncate(REFUSAL_BYTES);
            break;
        }
    }
    body.into()
}

impl Events {
    /// The head of the answer.
    #[must_use]
    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// The next event, comments included; `None` at the end of the stream. Cancel-safe.
    ///
    /// # Errors
    /// If the stream breaks, or an event is too large.
    pub async fn next(&mut self) -> Result<Option<sse::Event>, Failure> {
        loop {
            match self.splitter.next() {
                Some(Ok(event)) => return Ok(Some(event)),
                Some(Err(too_large)) => return Err(self.too_large(&too_large)),
                None => {}
            }
            match self.response.chunk().await {
                Ok(Some(chunk)) => self.splitter.push(chunk),
                Ok(None) => return Ok(None),
                Err(_) => return Err(Failure::truncated(self.clock.now().as_second())),
            }
        }
    }

    /// The next event if it has arrived already.
    ///
    /// # Errors
    /// As [`Events::next`].
    pub fn ready(&mut self) -> Result<Option<sse::Event>, Failure> {
        self.splitter
            .next()
            .transpose()
            .map_err(|too_large| self.too_large(&too_large))
    }

    fn too_large(&self, error: &sse::TooLarge) -> Failure {
        Failure::local(
            Class::TooLarge,
            error.to_string(),
            self.clock.now().as_second(),
        )
    }
}

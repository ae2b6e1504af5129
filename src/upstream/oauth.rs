//! The token endpoint: exchanges a refresh token for fresh ones.
//!
//! It knows neither accounts nor their rows. A refresh token may be spent by the exchange even if no answer comes back, so whoever calls
//! must know whether the request left: only one that did not may be sent again. No token ever reaches an error or a log line.

pub mod login;

use std::time::Duration;

use http::StatusCode;
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::json;

use super::bounded;
use crate::{account::Tokens, protocol::event::ErrorBody, routing::Lifecycle};

/// The public client of the Codex CLI, in whose name accounts are logged in.
const CLIENT_ID: &str = "app_EMoamEEZ73f0CkXaXp7hrann";
/// For the whole exchange.
const TIMEOUT: Duration = Duration::from_secs(8);
/// Nothing was sent.
const CONNECT: &str = "connect";
/// The longest text that is believed to be a code.
const CODE_CHARS: usize = 64;

/// Why there are no fresh tokens.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RefreshError {
    /// Upstream will never take this refresh token again.
    #[error("upstream refused the refresh token: {code}")]
    Refused {
        /// Upstream's code.
        code: String,
        /// What the account is from now on: `ReauthRequired` or `Deactivated`.
        lifecycle: Lifecycle,
    },
    /// Upstream refused by a word that is not in the table: for good perhaps, or everybody at the moment.
    #[error("upstream refused the refresh token by a word that is not known: {code}")]
    Unknown {
        /// Upstream's code.
        code: String,
    },
    /// It may work later.
    #[error("the token endpoint did not help: {reason}")]
    Transient {
        /// Whether the request may have reached upstream, and the token be spent.
        dispatched: bool,
        /// What happened, for logs: `connect`, `timeout`, `network`, `malformed`, or a status and a code.
        reason: String,
    },
}

/// Exchanges a refresh token. What the answer lacks stays as it is: an unchanged refresh token, or no id token.
pub(super) async fn refresh(
    client: &reqwest::Client,
    auth_url: &str,
    refresh: &SecretString,
) -> Result<Tokens, RefreshError> {
    let body = json!({
        "grant_type": "refresh_token",
        "client_id": CLIENT_ID,
        "refresh_token": refresh.expose_secret(),
        "scope": "openid profile email",
    });
    let url = format!("{auth_url}/oauth/token");
    let asked = ask(client.post(url).json(&body)).await;
    let (status, answer) = asked.map_err(|reason| RefreshError::Transient {
        dispatched: reason != CONNECT,
        reason: reason.to_owned(),
    })?;
    if status != StatusCode::OK {
        return Err(refused(status, &answer));
    }
    let answer: Answer = serde_json::from_slice(&answer).map_err(|_| transient("malformed"))?;
    Ok(Tokens {
        access: secret(answer.access_token).ok_or_else(|| transient("malformed"))?,
        refresh: secret(answer.refresh_token).unwrap_or_else(|| refresh.clone()),
        id_token: secret(answer.id_token),
    })
}

#[derive(Deserialize)]
struct Answer {
    access_token: Option<String>,
    refresh_token: Option<String>,
    id_token: Option<String>,
}

/// What fits into a header is a token; nothing else is worth storing.
fn secret(text: Option<String>) -> Option<SecretString> {
    text.filter(|text| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()))
        .map(SecretString::from)
}

/// Asks the login server; yields status and body, or a word for what the network did.
async fn ask(request: reqwest::RequestBuilder) -> Result<(StatusCode, Vec<u8>), &'static str> {
    let exchange = async {
        let response = request.send().await?;
        Ok::<_, reqwest::Error>((response.status(), bounded(response).await?))
    };
    match tokio::time::timeout(TIMEOUT, exchange).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) if error.is_connect() => Err(CONNECT),
        Ok(Err(_)) => Err("network"),
        Err(_) => Err("timeout"),
    }
}

/// What the codes mean for the account; nothing, where every account would be refused alike: the request, the place, the moment.
const CODES: &[(&str, Option<Lifecycle>)] = &[
    ("refresh_token_expired", Some(Lifecycle::ReauthRequired)),
    ("refresh_token_reused", Some(Lifecycle::ReauthRequired)),
    ("refresh_token_invalidated", Some(Lifecycle::ReauthRequired)),
    ("invalid_grant", Some(Lifecycle::ReauthRequired)),
    ("token_invalidated", Some(Lifecycle::ReauthRequired)),
    ("token_expired", Some(Lifecycle::ReauthRequired)),
    ("app_session_terminated", Some(Lifecycle::ReauthRequired)),
    ("account_session_expired", Some(Lifecycle::ReauthRequired)),
    ("account_auth_invalidated", Some(Lifecycle::ReauthRequired)),
    ("account_deactivated", Some(Lifecycle::Deactivated)),
    ("account_suspended", Some(Lifecycle::Deactivated)),
    ("account_deleted", Some(Lifecycle::Deactivated)),
    ("invalid_request", None),
    ("invalid_request_error", None),
    ("invalid_client", None),
    ("invalid_scope", None),
    ("unauthorized_client", None),
    ("unsupported_grant_type", None),
    ("unsupported_country_region_territory", None),
    ("request_forbidden", None),
    ("rate_limit_exceeded", None),
    ("slow_down", None),
    ("server_error", None),
    ("temporarily_unavailable", None),
];

/// A refusal is final by its code alone, and only as the client's fault: no outage, and nobody on the way, may cost the pool its accounts.
fn refused(status: StatusCode, body: &[u8]) -> RefreshError {
    let error = ErrorBody::parse(body).unwrap_or_default();
    let named = error.code.is_some();
    let code = error.code.or(error.kind).unwrap_or_default();
    let code = plain(&code).unwrap_or_default();
    let judged = matches!(
        status,
        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN
    );
    match CODES.iter().find(|(name, _)| *name == code) {
        Some((_, Some(lifecycle))) if judged => RefreshError::Refused {
            code,
            lifecycle: *lifecycle,
        },
        None if judged && named && !code.is_empty() => RefreshError::Unknown { code },
        _ => transient(format!("{} {code}", status.as_u16()).trim_end()),
    }
}

/// The code of a refusal, or nothing.
fn code_of(body: &[u8]) -> String {
    let error = ErrorBody::parse(body).unwrap_or_default();
    let code = error.code.or(error.kind);
    code.and_then(|code| plain(&code)).unwrap_or_default()
}

/// A text that is believed to be a code: nothing that could be a secret, or more than a word.
fn plain(code: &str) -> Option<String> {
    let code = code.to_ascii_lowercase();
    let letter = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
    (!code.is_empty() && code.len() <= CODE_CHARS && code.bytes().all(letter)).then_some(code)
}

fn transient(reason: &str) -> RefreshError {
    RefreshError::Transient {
        dispatched: true,
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
pub(super) mod fake {
    //! A token endpoint on loopback.

    use std::sync::{Arc, Mutex};

    use axum::{Json, Router, routing::post};
    use http::StatusCode;
    use serde_json::Value;
    use tokio::net::TcpListener;

    use crate::task::Tasks;

    /// What the endpoint was asked, in order.
    pub(in crate::upstream) type Asked = Arc<Mutex<Vec<Value>>>;

    /// Answers with what `answer` makes of the number of the call (from 1). Yields the base URL and what was asked.
    pub(in crate::upstream) async fn endpoint<A, F>(tasks: &Tasks, answer: A) -> (String, Asked)
    where
        A: Fn(usize) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = (StatusCode, Value)> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Asked::default();
        let log = Arc::clone(&asked);
        let exchange = async move |Json(body): Json<Value>| {
            let number = {
                let mut log = log.lock().unwrap();
                log.push(body);
                log.len()
            };
            let (status, body) = answer(number).await;
            (status, Json(body))
        };
        let router = Router::new().route("/oauth/token", post(exchange));
        drop(tasks.spawn("fake token endpoint", async move {
            axum::serve(listener, router).await
        }));
        (url, asked)
    }

    /// A client that trusts nobody: loopback needs no TLS.
    pub(in crate::upstream) fn client() -> reqwest::Client {
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::ring::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
        reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .no_proxy()
            .build()
            .unwrap()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::task::Tasks;

    async fn exchange(status: u16, body: Value) -> (Result<Tokens, RefreshError>, Value) {
        let answer =
            move |_| std::future::ready((StatusCode::from_u16(status).unwrap(), body.clone()));
        let (url, asked) = fake::endpoint(&Tasks::new(), answer).await;
        let result = refresh(&fake::client(), &url, &"old-refresh".into()).await;
        let asked = asked.lock().unwrap()[0].clone();
        (result, asked)
    }

    #[tokio::test]
    async fn an_exchange_asks_as_codex_does_and_keeps_what_the_answer_lacks() {
        let cases = [
            (
                json!({"access_token": "a", "refresh_token": "r", "id_token": "i", "expires_in": 864_000}),
                ("a", "r", Some("i")),
            ),
            (
                json!({"access_token": "a", "refresh_token": null}),
                ("a", "old-refresh", None),
            ),
            (
                json!({"access_token": "a", "refresh_token": ""}),
                ("a", "old-refresh", None),
            ),
        ];
        for (answer, expected) in cases {
            let (tokens, asked) = exchange(200, answer.clone()).await;
            let tokens = tokens.unwrap();
            let id_token = tokens.id_token.as_ref().map(|token| token.expose_secret());
            assert_eq!(
                (
                    tokens.access.expose_secret(),
                    tokens.refresh.expose_secret(),
                    id_token
                ),
                expected,
                "{answer}"
            );
            let expected = json!({"grant_type": "refresh_token", "client_id": "app_EMoamEEZ73f0CkXaXp7hrann",
                "refresh_token": "old-refresh", "scope": "openid profile email"});
            assert_eq!(asked, expected);
        }
    }

    #[tokio::test]
    async fn an_answer_without_an_access_token_may_have_spent_the_refresh_token() {
        let (tokens, _) = exchange(200, json!({"refresh_token": "r"})).await;
        assert_eq!(tokens.unwrap_err(), transient("malformed"));
        for access in ["two words", "line\nbreak", "n\u{f6}"] {
            let (tokens, _) = exchange(200, json!({"access_token": access})).await;
            assert_eq!(tokens.unwrap_err(), transient("malformed"), "{access}");
        }
        let endless = "x".repeat(2 * crate::upstream::LARGEST);
        let (tokens, _) = exchange(200, json!({"access_token": endless})).await;
        assert_eq!(tokens.unwrap_err(), transient("malformed"), "it is cut");
    }

    #[tokio::test]
    async fn a_refused_connection_sent_nothing() {
        // Bound, and nobody listens.
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let url = format!("http://{}", socket.local_addr().unwrap());
        let error = refresh(&fake::client(), &url, &"old-refresh".into())
            .await
            .unwrap_err();
        assert_eq!(
            error,
            RefreshError::Transient {
                dispatched: false,
                reason: "connect".to_owned()
            }
        );
    }

    #[test]
    fn a_code_means_the_same_for_every_status_that_judges_a_token() {
        for (code, lifecycle) in CODES {
            for status in [400, 401, 403] {
                let body = json!({ "error": { "code": code } }).to_string();
                let found = refused(StatusCode::from_u16(status).unwrap(), body.as_bytes());
                let expected = match *lifecycle {
                    Some(lifecycle) => RefreshError::Refused {
                        code: (*code).to_owned(),
                        lifecycle,
                    },
                    None => transient(&format!("{status} {code}")),
                };
                assert_eq!(found, expected);
            }
        }
    }

    #[test]
    fn every_row_of_the_refusals() {
        use Lifecycle::{Deactivated, ReauthRequired};
        let rows = [
            (
                400,
                json!({"error": {"code": "refresh_token_expired"}}),
                Ok(ReauthRequired),
            ),
            (
                401,
                json!({"error": {"code": "refresh_token_reused", "type": "invalid_request_error"}}),
                Ok(ReauthRequired),
            ),
            (
                401,
                json!({"error": {"code": "refresh_token_invalidated"}}),
                Ok(ReauthRequired),
            ),
            (
                400,
                json!({"error": "invalid_grant", "error_description": "secret-token"}),
                Ok(ReauthRequired),
            ),
            (
                401,
                json!({"error": {"code": "TOKEN_INVALIDATED"}}),
                Ok(ReauthRequired),
            ),
            (401, json!({"code": "token_expired"}), Ok(ReauthRequired)),
            (
                401,
                json!({"error": {"code": "app_session_terminated"}}),
                Ok(ReauthRequired),
            ),
            (
                401,
                json!({"error": {"code": "account_session_expired"}}),
                Ok(ReauthRequired),
            ),
            (
                401,
                json!({"error": {"code": "account_auth_invalidated"}}),
                Ok(ReauthRequired),
            ),
            (
                403,
                json!({"error": {"code": "account_deactivated"}}),
                Ok(Deactivated),
            ),
            (
                403,
                json!({"error": {"code": "account_suspended"}}),
                Ok(Deactivated),
            ),
            (
                403,
                json!({"error": {"code": "account_deleted"}}),
                Ok(Deactivated),
            ),
            (
                400,
                json!({"error": "invalid_request"}),
                Err("400 invalid_request"),
            ),
            (
                401,
                json!({"error": {"code": "something_new"}}),
                Err("something_new"),
            ),
            (
                403,
                json!({"error": {"code": "client_version_unsupported", "type": "invalid_grant"}}),
                Err("client_version_unsupported"),
            ),
            (
                401,
                json!({"error": {"type": "something_new"}}),
                Err("401 something_new"),
            ),
            (
                400,
                json!({"error": {"code": null, "type": "invalid_request_error"}}),
                Err("400 invalid_request_error"),
            ),
            (
                403,
                json!({"error": {"code": "unsupported_country_region_territory"}}),
                Err("403 unsupported_country_region_territory"),
            ),
            (
                429,
                json!({"error": {"code": "something_new"}}),
                Err("429 something_new"),
            ),
            (401, json!({"error": {"code": "rt_5ecret"}}), Err("401")),
            (401, json!("no object"), Err("401")),
            (
                404,
                json!({"error": "invalid_grant"}),
                Err("404 invalid_grant"),
            ),
            (
                429,
                json!({"error": {"code": "rate_limit_exceeded"}}),
                Err("429 rate_limit_exceeded"),
            ),
            (
                500,
                json!({"error": {"code": "refresh_token_reused"}}),
                Err("500 refresh_token_reused"),
            ),
            (302, json!(null), Err("302")),
        ];
        for (status, body, expected) in rows {
            let error = refused(
                StatusCode::from_u16(status).unwrap(),
                body.to_string().as_bytes(),
            );
            assert!(!error.to_string().contains("ecret"), "{error}");
            match (&error, expected) {
                (RefreshError::Refused { lifecycle, .. }, Ok(expected)) => {
                    assert_eq!(*lifecycle, expected, "{status} {body}")
                }
                (
                    RefreshError::Transient {
                        dispatched: true,
                        reason,
                    },
                    Err(expected),
                ) => assert_eq!(reason, expected, "{status} {body}"),
                (RefreshError::Unknown { code }, Err(expected)) => {
                    assert_eq!(code, expected, "{status} {body}")
                }
                _ => panic!("{status} {body}: {error}"),
            }
        }
    }
}

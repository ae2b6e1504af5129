//! What operators do over HTTP: logins, on the admin listener, under the operator's token. Without a token in the settings none of it is there.
//! Errors have the OpenAI envelope, like everywhere.

use std::sync::Arc;

use axum::{
    Json, Router,
    body::Bytes,
    extract::{
        Path, Request, State,
        rejection::{BytesRejection, PathRejection},
    },
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{get, post},
};
use http::{HeaderMap, StatusCode, header};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    account::flow::{Flow, Method},
    error::{ApiError, Code},
    ids::{AccountId, FlowId},
    secret::Pepper,
    upstream::login::{Error, Logins},
};

/// The routes.
pub(super) fn router(token: &SecretString, logins: Logins) -> Router {
    let token = Arc::new(Token::new(token));
    Router::new()
        .route("/api/accounts/login", post(begin))
        .route("/api/accounts/login/{id}", get(status).delete(cancel))
        .route("/api/accounts/login/{id}/complete", post(complete))
        .layer(middleware::from_fn_with_state(token, admit))
        .with_state(logins)
}

/// The operator's token, as a hash under a key of this process: comparing hashes takes as long wherever they differ.
struct Token {
    pepper: Pepper,
    hash: [u8; 32],
}

impl Token {
    fn new(token: &SecretString) -> Self {
        let pepper = Pepper::new(rand::random());
        let hash = pepper.hash("operator", token.expose_secret().as_bytes());
        Self { pepper, hash }
    }

    fn admits(&self, headers: &HeaderMap) -> bool {
        let bearer = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.as_bytes().split_at_checked("Bearer ".len()))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Bearer "));
        bearer.is_some_and(|(_, given)| self.pepper.hash("operator", given) == self.hash)
    }
}

async fn admit(State(token): State<Arc<Token>>, request: Request, next: Next) -> Response {
    if token.admits(request.headers()) {
        next.run(request).await
    } else {
        let error = "This needs the operator's token (DRAWBRIDGE_OPERATOR_TOKEN) as a bearer.";
        ApiError::new(Code::InvalidApiKey, error)
            .code("invalid_operator_token")
            .into_response()
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Begin {
    method: Method,
    account_id: Option<AccountId>,
    label: Option<String>,
}

async fn begin(State(logins): State<Logins>, body: Body) -> Result<Response, ApiError> {
    let Begin {
        method,
        account_id,
        label,
    } = read(body)?;
    let label = label
        .as_deref()
        .map(str::trim)
        .filter(|label| !label.is_empty());
    let begun = logins.begin(method, account_id, label).await?;
    Ok((StatusCode::CREATED, unkept(), Json(begun)).into_response())
}

async fn status(State(logins): State<Logins>, id: Id) -> Result<Json<Flow>, ApiError> {
    Ok(Json(logins.status(flow(id)?).await?))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Complete {
    callback_url: String,
}

async fn complete(
    State(logins): State<Logins>,
    id: Id,
    body: Body,
) -> Result<Json<Flow>, ApiError> {
    let Complete { callback_url } = read(body)?;
    Ok(Json(logins.complete(flow(id)?, &callback_url).await?))
}

async fn cancel(State(logins): State<Logins>, id: Id) -> Result<Json<Flow>, ApiError> {
    Ok(Json(logins.cancel(flow(id)?).await?))
}

/// What is shown once is kept by nobody on the way.
fn unkept() -> [(header::HeaderName, &'static str); 1] {
    [(header::CACHE_CONTROL, "no-store")]
}

/// A login's name in the path, or text that is none.
type Id = Result<Path<FlowId>, PathRejection>;

fn flow(id: Id) -> Result<FlowId, ApiError> {
    id.map(|Path(id)| id).map_err(|_| Error::Unknown.into())
}

/// A body, or why none came: more than two MiB, or not to its end.
type Body = Result<Bytes, BytesRejection>;

/// What does not fit is told by its place, never by its text: it may hold a code.
fn read<T: DeserializeOwned>(body: Body) -> Result<T, ApiError> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::new(Code::PayloadTooLarge, "The body is larger than 2 MiB.")
        }
        _ => ApiError::new(Code::InvalidRequest, "The body cannot be read."),
    })?;
    serde_json::from_slice(&body).map_err(|error| {
        let message = format!(
            "The body is not what this takes (line {}, column {}).",
            error.line(),
            error.column()
        );
        ApiError::new(Code::InvalidRequest, message)
    })
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        use crate::upstream::oauth::login::LoginError::{NoDevices, Refused, Unreachable};

        let mut message = error.to_string();
        message[..1].make_ascii_uppercase();
        message.push('.');
        let (code, finer) = match &error {
            Error::Unknown => (Code::NotFound, "login_not_found"),
            Error::NoAccount => (Code::NotFound, "account_not_found"),
            Error::NoCallback => (Code::InvalidRequest, "invalid_callback_url"),
            Error::OtherLogin => (Code::InvalidRequest, "callback_of_another_login"),
            Error::OtherSeat => (Code::LoginConflict, "other_seat"),
            Error::Over(_) => (Code::LoginConflict, "login_over"),
            Error::Busy => (Code::LoginConflict, "login_busy"),
            Error::Upstream(Refused(_)) => (Code::InvalidRequest, "login_refused"),
            Error::Upstream(NoDevices) => (Code::InvalidRequest, "device_login_unavailable"),
            Error::Upstream(Unreachable(_)) => (Code::UpstreamUnavailable, "upstream_unavailable"),
            Error::Account(error) => {
                tracing::warn!(%error, "a login cannot be stored");
                "The database does not answer; try again.".clone_into(&mut message);
                (Code::ContinuityUnavailable, "storage_unavailable")
            }
        };
        Self::new(code, message).code(finer)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn only_the_operators_token_comes_in() {
        let token = Token::new(&"operator-token-1234".into());
        for (given, expected) in [
            (Some("Bearer operator-token-1234"), true),
            (Some("bearer operator-token-1234"), true),
            (Some("Bearer operator-token-12345"), false),
            (Some("Bearer operator-token-123"), false),
            (Some("Bearer "), false),
            (Some("Basic operator-token-1234"), false),
            (Some("operator-token-1234"), false),
            (None, false),
        ] {
            let given = given.map(|given| (header::AUTHORIZATION, HeaderValue::from_static(given)));
            let headers = given.into_iter().collect();
            assert_eq!(token.admits(&headers), expected, "{headers:?}");
        }
    }
}

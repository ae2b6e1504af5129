//! Accounts, their tokens, and the token endpoint.

use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    body::Bytes,
    extract,
    response::{IntoResponse, Response},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderMap, StatusCode, header};
use serde_json::{Value, json};

use super::{login, state::Shared};

/// An account's secrets as the backend knows them.
#[derive(Clone, Debug)]
pub struct Login {
    /// Workspace.
    pub chatgpt_account_id: String,
    /// Person.
    pub chatgpt_user_id: String,
    /// The person's address.
    email: String,
    /// Its plan.
    pub plan: String,
    /// The token that is accepted; `None` once it has expired.
    access: Option<String>,
    /// The only refresh token that may be used, once.
    refresh: String,
    used_refresh: Vec<String>,
    revoked: bool,
    lifetime: Duration,
    /// Responses that were completed.
    pub turns: u32,
    /// Tokens of those.
    pub tokens: u64,
    /// Exchanges that gave new tokens.
    pub exchanges: usize,
    /// Exchanges that were refused because the token had been used.
    pub reuses: usize,
    /// Statuses with which the next exchanges fail.
    failures: Vec<u16>,
    /// How long an exchange takes to arrive, and its answer to come back.
    delay: Duration,
    answer_delay: Duration,
    /// What the usage endpoint answers instead of the ordinary, and with which status.
    usage: Option<(u16, Value)>,
    /// The slugs of its catalogue, where it has one of its own; of none it answers 500.
    models: Option<Vec<String>>,
    /// Reads of its catalogue.
    pub models_reads: usize,
}

impl Login {
    fn new(name: &str, email: String, serial: u64) -> Self {
        let lifetime = Duration::from_secs(86_400);
        let access = token_text(name, &email, lifetime, serial);
        Self {
            chatgpt_account_id: format!("acct-{}", seat(name)),
            chatgpt_user_id: format!("user-{}", seat(name)),
            email,
            plan: "plus".into(),
            access: Some(access),
            refresh: format!("rt-{name}-0"),
            used_refresh: Vec::new(),
            revoked: false,
            lifetime,
            turns: 0,
            tokens: 0,
            exchanges: 0,
            reuses: 0,
            failures: Vec::new(),
            delay: Duration::ZERO,
            answer_delay: Duration::ZERO,
            usage: None,
            models: None,
            models_reads: 0,
        }
    }
}

/// A further session of an account: its tokens are its own.
pub(super) fn session(shared: &Arc<Shared>, name: &str, email: &str) -> String {
    drop(Account::of(shared, name));
    shared.change(|state| {
        let key = format!("{name}#{}", state.id("session"));
        let login = Login::new(&key, email.to_owned(), state.logins.len() as u64);
        state.logins.insert(key.clone(), login);
        key
    })
}

/// The account of a session.
fn seat(name: &str) -> &str {
    name.split('#').next().unwrap_or(name)
}

/// A handle to one account.
#[derive(Clone)]
pub struct Account {
    shared: Arc<Shared>,
    name: String,
}

impl Account {
    pub(super) fn of(shared: &Arc<Shared>, name: &str) -> Self {
        shared.change(|state| {
            if !state.logins.contains_key(name) {
                let email = format!("{name}@example.test");
                let login = Login::new(name, email, state.logins.len() as u64);
                state.logins.insert(name.to_owned(), login);
            }
        });
        Self {
            shared: Arc::clone(shared),
            name: name.to_owned(),
        }
    }

    /// The Codex CLI's `auth.json` with the present tokens.
    #[must_use]
    pub fn auth_json(&self) -> String {
        self.read(|login| {
            json!({
                "auth_mode": "chatgpt",
                "OPENAI_API_KEY": null,
                "tokens": tokens(&self.name, login),
            })
            .to_string()
        })
    }

    /// The token that is accepted now.
    #[must_use]
    pub fn access_token(&self) -> String {
        self.read(|login| login.access.clone().unwrap_or_default())
    }

    /// `chatgpt_account_id`.
    #[must_use]
    pub fn id(&self) -> String {
        self.read(|login| login.chatgpt_account_id.clone())
    }

    /// From now on the access token that is out answers 401; a refresh gives a new one.
    pub fn expire(&self) {
        self.change(|login| login.access = None);
    }

    /// Lets the present token, and those that follow, claim to last only so long. They are accepted all the same.
    pub fn expires_in(&self, lifetime: Duration) {
        let name = self.name.clone();
        self.change(|login| {
            login.lifetime = lifetime;
            login.access = Some(token_text(
                &name,
                &login.email,
                lifetime,
                1000 + login.exchanges as u64,
            ));
        });
    }

    /// The login has ended: refreshes are refused for good, and the access token with them.
    pub fn revoke(&self) {
        self.change(|login| {
            login.revoked = true;
            login.access = None;
        });
    }

    /// The next exchange answers this status.
    pub fn fail_exchange(&self, status: u16) {
        self.change(|login| login.failures.push(status));
    }

    /// Exchanges take so long.
    pub fn delay_exchange(&self, delay: Duration) {
        self.change(|login| login.delay = delay);
    }

    /// Answers of exchanges, whose tokens are spent by then, take so long.
    pub fn delay_answer(&self, delay: Duration) {
        self.change(|login| login.answer_delay = delay);
    }

    /// From now on the usage endpoint answers this.
    pub fn answer_usage(&self, status: u16, body: Value) {
        self.change(|login| login.usage = Some((status, body)));
    }

    /// Questions to the usage endpoint.
    #[must_use]
    pub fn usage_reads(&self) -> usize {
        self.shared
            .read(|state| state.usage_reads.get(&self.name).copied().unwrap_or(0))
    }

    /// From now on its catalogue lists these; of none the endpoint answers 500.
    pub fn list_models(&self, slugs: &[&str]) {
        self.change(|login| {
            login.models = Some(slugs.iter().map(|&slug| slug.to_owned()).collect())
        });
    }

    /// Reads of its catalogue.
    #[must_use]
    pub fn models_reads(&self) -> usize {
        self.read(|login| login.models_reads)
    }

    /// Exchanges that gave new tokens.
    #[must_use]
    pub fn exchanges(&self) -> usize {
        self.read(|login| login.exchanges)
    }

    /// Exchanges refused because the token had been used.
    #[must_use]
    pub fn reuses(&self) -> usize {
        self.read(|login| login.reuses)
    }

    /// Uses the refresh token that is out, as a second holder of the same login would; yields the new tokens.
    #[must_use]
    pub fn exchange_elsewhere(&self) -> Value {
        let name = self.name.clone();
        self.change(|login| rotate(&name, login))
    }

    fn read<T>(&self, read: impl FnOnce(&Login) -> T) -> T {
        self.shared.read(|state| read(&state.logins[&self.name]))
    }

    fn change<T>(&self, change: impl FnOnce(&mut Login) -> T) -> T {
        self.shared.change(|state| {
            change(
                state
                    .logins
                    .get_mut(&self.name)
                    .expect("accounts are never removed"),
            )
        })
    }
}

/// What the usage endpoint answers for an account instead of the ordinary.
pub(super) fn asked_for_usage(shared: &Shared, account: &str) -> Option<(StatusCode, Value)> {
    shared.read(|state| {
        let (status, body) = state.logins.get(account)?.usage.clone()?;
        Some((StatusCode::from_u16(status).expect("a status"), body))
    })
}

/// The slugs of an account's own catalogue; counts the read.
pub(super) fn asked_for_models(shared: &Shared, account: &str) -> Option<Vec<String>> {
    shared.change(|state| {
        let login = state.logins.get_mut(account)?;
        login.models_reads += 1;
        login.models.clone()
    })
}

/// `POST /oauth/token`.
pub(super) async fn token_exchange(shared: &Shared, given: &str) -> (StatusCode, Value) {
    let refused = |status, code: &str, message: &str| {
        (
            status,
            json!({ "error": { "code": code, "message": message, "type": "invalid_request_error" } }),
        )
    };
    let owner = shared.change(|state| {
        state.exchanging += 1;
        let owns = |login: &Login| {
            login.refresh == given || login.used_refresh.iter().any(|used| used == given)
        };
        state
            .logins
            .iter()
            .find(|(_, login)| owns(login))
            .map(|(name, login)| (name.clone(), login.delay, login.answer_delay))
    });
    let Some((name, delay, answer_delay)) = owner else {
        return refused(
            StatusCode::UNAUTHORIZED,
            "refresh_token_expired",
            "no such token",
        );
    };
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    let answer = shared.change(|state| {
        let login = state
            .logins
            .get_mut(&name)
            .expect("accounts are never removed");
        if let Some(status) = login.failures.pop() {
            return (
                StatusCode::from_u16(status).expect("a status"),
                json!({ "error": { "message": "not now" } }),
            );
        }
        if login.revoked {
            return refused(
                StatusCode::BAD_REQUEST,
                "refresh_token_invalidated",
                "Your refresh token has been invalidated",
            );
        }
        if login.refresh != given {
            login.reuses += 1;
            return refused(
                StatusCode::UNAUTHORIZED,
                "refresh_token_reused",
                "Your refresh token has already been used",
            );
        }
        (StatusCode::OK, rotate(&name, login))
    });
    if !answer_delay.is_zero() {
        tokio::time::sleep(answer_delay).await;
    }
    answer
}

/// `POST /oauth/token`, JSON or form.
pub(super) async fn token(
    extract::State(shared): extract::State<Arc<Shared>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let form = headers.get(header::CONTENT_TYPE).is_some_and(|kind| {
        kind.as_bytes()
            .starts_with(b"application/x-www-form-urlencoded")
    });
    let given = if form {
        let Some(fields) = fields(&body) else {
            return StatusCode::BAD_REQUEST.into_response();
        };
        let field = |name| fields.iter().find(|(key, _)| key == name);
        if field("grant_type").is_some_and(|(_, kind)| kind == "authorization_code") {
            let (status, json) = login::spend(&shared, &fields);
            return (status, Json(json)).into_response();
        }
        field("refresh_token").map(|(_, token)| token.clone())
    } else {
        let json: Value = serde_json::from_slice(&body).unwrap_or_default();
        (json["grant_type"] == "refresh_token")
            .then(|| json["refresh_token"].as_str().map(str::to_owned))
            .flatten()
    };
    let Some(given) = given else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let (status, json) = token_exchange(&shared, &given).await;
    (status, Json(json)).into_response()
}

/// The fields of a form.
fn fields(body: &[u8]) -> Option<Vec<(String, String)>> {
    let text = std::str::from_utf8(body).ok()?;
    let url: reqwest::Url = format!("http://form.test/?{text}").parse().ok()?;
    Some(url.query_pairs().into_owned().collect())
}

/// Whose token and account id these are; else the refusal.
pub(super) fn authorize(shared: &Shared, headers: &HeaderMap) -> Result<String, Response> {
    let text = |name: &str| {
        headers
            .get(name)
            .and_then(|value| value.to_str().ok())
            .unwrap_or_default()
    };
    let bearer = text("authorization")
        .strip_prefix("Bearer ")
        .unwrap_or_default()
        .to_owned();
    let id = text("chatgpt-account-id").to_owned();
    let name = shared.read(|state| {
        let lives = |login: &Login| {
            login.access.as_deref() == Some(bearer.as_str()) && login.chatgpt_account_id == id
        };
        state
            .logins
            .iter()
            .find(|(_, login)| lives(login))
            .map(|(name, _)| seat(name).to_owned())
    });
    name.ok_or_else(|| {
        let error = json!({ "error": { "message": "Provided authentication token is expired. Please try signing in again.", "type": null, "code": "token_expired", "param": null }, "status": 401 });
        (StatusCode::UNAUTHORIZED, Json(error)).into_response()
    })
}

fn rotate(name: &str, login: &mut Login) -> Value {
    login.exchanges += 1;
    let next = format!("rt-{name}-{}", login.exchanges);
    login
        .used_refresh
        .push(std::mem::replace(&mut login.refresh, next));
    login.access = Some(token_text(
        name,
        &login.email,
        login.lifetime,
        login.exchanges as u64,
    ));
    tokens(name, login)
}

pub(super) fn tokens(name: &str, login: &Login) -> Value {
    let auth = json!({
        "chatgpt_account_id": login.chatgpt_account_id,
        "chatgpt_user_id": login.chatgpt_user_id,
        "user_id": login.chatgpt_user_id,
        "chatgpt_plan_type": login.plan,
    });
    let claims = json!({
        "email": login.email,
        "exp": epoch() + login.lifetime.as_secs(),
        "https://api.openai.com/auth": auth,
    });
    json!({
        "id_token": jwt(&claims),
        "access_token": login.access.clone().unwrap_or_else(|| token_text(name, &login.email, login.lifetime, 0)),
        "refresh_token": login.refresh,
        "account_id": login.chatgpt_account_id,
    })
}

fn token_text(name: &str, email: &str, lifetime: Duration, serial: u64) -> String {
    let claims = json!({
        "exp": epoch() + lifetime.as_secs(),
        "jti": format!("{name}-{serial}"),
        "https://api.openai.com/auth": {
            "chatgpt_account_id": format!("acct-{}", seat(name)),
            "chatgpt_user_id": format!("user-{}", seat(name)),
            "chatgpt_plan_type": "plus",
        },
        "https://api.openai.com/profile": { "email": email },
    });
    jwt(&claims)
}

fn jwt(claims: &Value) -> String {
    let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
    format!(
        "{}.{}.c2ln",
        part(&json!({ "alg": "RS256", "typ": "JWT" })),
        part(claims)
    )
}

/// Seconds since 1970.
pub(super) fn epoch() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

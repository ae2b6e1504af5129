//! Logins: a browser's with PKCE, and a device's code. Each makes a session of its own, whose tokens live beside those of the account's other
//! sessions. A code can be spent once, and only by who knows its secret half.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Json, extract,
    response::{IntoResponse as _, Response},
};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http::StatusCode;
use reqwest::Url;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{Upstream, account, state::Shared};

const CLIENT: &str = "app_EMoamEEZ73f0CkXaXp7hrann";
const REDIRECT: &str = "http://localhost:1455/auth/callback";
/// Between two questions of a device.
const INTERVAL: Duration = Duration::from_secs(1);

/// A code that is out.
#[derive(Clone, Debug)]
pub(super) struct Grant {
    /// Whose tokens it buys.
    session: String,
    challenge: String,
    redirect: String,
    spent: bool,
}

/// A device that waits.
#[derive(Clone, Debug)]
pub(super) struct Device {
    user_code: String,
    /// The person's answer: a session, or no.
    answer: Option<Option<String>>,
    asked: Option<Instant>,
}

impl Upstream {
    /// A person logs in at the address in a browser, as this account and under this e-mail address. Yields where the browser ends.
    ///
    /// # Panics
    /// If the address is none that the real page would take.
    #[must_use]
    pub fn log_in(&self, authorize_url: &str, name: &str, email: &str) -> String {
        assert!(
            !authorize_url.contains('+'),
            "the page takes no plus: {authorize_url}"
        );
        let url: Url = authorize_url.parse().expect("a URL");
        let find = |wanted: &str| {
            let mut pairs = url.query_pairs();
            let found = pairs.find(|(key, _)| key == wanted);
            found
                .unwrap_or_else(|| panic!("no {wanted}"))
                .1
                .into_owned()
        };
        for (key, value) in [
            ("client_id", CLIENT),
            ("response_type", "code"),
            ("code_challenge_method", "S256"),
            ("redirect_uri", REDIRECT),
            ("scope", "openid profile email offline_access"),
        ] {
            assert_eq!(find(key), value, "{key}");
        }
        let code = self.grant(name, email, find("code_challenge"), REDIRECT);
        format!(
            "{REDIRECT}?code={code}&scope=openid+email&state={}",
            find("state")
        )
    }

    /// A person types in a device's code, as this account; `None`: they refuse.
    ///
    /// # Panics
    /// If no device shows this code.
    pub fn approve(&self, user_code: &str, person: Option<(&str, &str)>) {
        let session = person.map(|(name, email)| account::session(&self.shared, name, email));
        self.shared.change(|state| {
            let mut devices = state.devices.values_mut();
            let device = devices.find(|device| device.user_code == user_code);
            device.expect("a device shows this code").answer = Some(session);
        });
    }

    fn grant(&self, name: &str, email: &str, challenge: String, redirect: &str) -> String {
        let session = account::session(&self.shared, name, email);
        grant(&self.shared, session, challenge, redirect)
    }
}

fn grant(shared: &Shared, session: String, challenge: String, redirect: &str) -> String {
    let grant = Grant {
        session,
        challenge,
        redirect: redirect.to_owned(),
        spent: false,
    };
    shared.change(|state| {
        let code = state.id("ac");
        state.grants.insert(code.clone(), grant);
        code
    })
}

/// `POST /oauth/token` with a code.
pub(super) fn spend(shared: &Shared, form: &[(String, String)]) -> (StatusCode, Value) {
    let field = |wanted: &str| {
        let mut fields = form.iter();
        let found = fields.find(|(key, _)| key == wanted);
        found.map(|(_, value)| value.as_str()).unwrap_or_default()
    };
    let refused = |code: &str| {
        (
            StatusCode::BAD_REQUEST,
            json!({ "error": { "code": code, "message": "no" } }),
        )
    };
    shared.change(|state| {
        let Some(grant) = state.grants.get_mut(field("code")) else {
            return refused("invalid_grant");
        };
        let challenge = BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(field("code_verifier")));
        if field("client_id") != CLIENT
            || challenge != grant.challenge
            || !field("redirect_uri").ends_with(&grant.redirect)
        {
            return refused("invalid_request");
        }
        if std::mem::replace(&mut grant.spent, true) {
            state.violations.push("a code was spent twice".to_owned());
            return refused("invalid_grant");
        }
        let session = grant.session.clone();
        let login = &state.logins[&session];
        (StatusCode::OK, account::tokens(&session, login))
    })
}

/// `POST /api/accounts/deviceauth/usercode`.
pub(super) async fn device(
    extract::State(shared): extract::State<Arc<Shared>>,
    Json(body): Json<Value>,
) -> Response {
    if body["client_id"] != CLIENT {
        return StatusCode::BAD_REQUEST.into_response();
    }
    if shared.read(|state| state.no_devices) {
        return StatusCode::NOT_FOUND.into_response();
    }
    let answer = shared.change(|state| {
        let (id, user_code) = (state.id("dev"), state.id("CODE"));
        let device = Device {
            user_code: user_code.clone(),
            answer: None,
            asked: None,
        };
        state.devices.insert(id.clone(), device);
        json!({ "device_auth_id": id, "usercode": user_code, "interval": INTERVAL.as_secs().to_string(), "expires_in": 900 })
    });
    Json(answer).into_response()
}

/// `POST /api/accounts/deviceauth/token`.
pub(super) async fn device_token(
    extract::State(shared): extract::State<Arc<Shared>>,
    Json(body): Json<Value>,
) -> Response {
    let answer = shared.change(|state| {
        let device = state
            .devices
            .get_mut(body["device_auth_id"].as_str().unwrap_or_default())
            .filter(|device| body["user_code"] == *device.user_code)?;
        let asked = device.asked.replace(Instant::now());
        let answer = device.answer.clone();
        if asked.is_some_and(|asked| asked.elapsed() < INTERVAL / 2) {
            state.violations.push("a device asked too often".to_owned());
        }
        answer
    });
    let refused =
        |status, code: &str| (status, Json(json!({ "error": { "code": code } }))).into_response();
    match answer {
        None => refused(StatusCode::FORBIDDEN, "deviceauth_authorization_unknown"),
        Some(None) => refused(StatusCode::BAD_REQUEST, "access_denied"),
        Some(Some(session)) => {
            let verifier = format!("verifier-of-{session}");
            let challenge = BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(&verifier));
            let code = grant(&shared, session, challenge, "/deviceauth/callback");
            Json(json!({ "authorization_code": code, "code_verifier": verifier })).into_response()
        }
    }
}

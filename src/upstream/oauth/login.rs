//! The requests of a login: a browser's authorization code with PKCE, and the device code. In both a person proves to upstream who they
//! are, and what comes back here is spent for the tokens, once.

use std::time::Duration;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use http::StatusCode;
use reqwest::{RequestBuilder, Url};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{Answer, CLIENT_ID, code_of};
use crate::account::Tokens;

/// Where upstream sends a browser after a login: registered with the client, so nothing else can stand here. Nobody needs to listen there.
const REDIRECT: &str = "http://localhost:1455/auth/callback";
const SCOPE: &str = "openid profile email offline_access";
const ORIGINATOR: &str = "codex_cli_rs";
/// How long a device's code holds, and between two questions, where upstream does not say.
const DEVICE_TIME: Duration = Duration::from_secs(900);
const DEVICE_INTERVAL: Duration = Duration::from_secs(5);
/// The longest code or state that is believed to be one.
const LONGEST: usize = 4096;

/// Why a request of a login did not lead on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoginError {
    /// Upstream refused; carries its code, which is empty if it said none.
    #[error("upstream refused the login ({0})")]
    Refused(String),
    /// Upstream does not offer device codes to this workspace or in this place.
    #[error("upstream does not offer device codes here; log in with a browser")]
    NoDevices,
    /// Upstream could not be reached, or its answer makes no sense.
    #[error("upstream could not be asked ({0})")]
    Unreachable(String),
}

/// What a browser's login needs until its callback comes back.
pub struct Pkce {
    /// The secret half.
    pub verifier: SecretString,
    /// Tells which login a callback belongs to.
    pub state: SecretString,
}

impl Pkce {
    /// A new one.
    #[must_use]
    pub fn draw() -> Self {
        let draw = || {
            BASE64_URL_SAFE_NO_PAD
                .encode(rand::random::<[u8; 32]>())
                .into()
        };
        Self {
            verifier: draw(),
            state: draw(),
        }
    }

    /// Where the person logs in.
    #[must_use]
    pub fn authorize_url(&self, auth_url: &str) -> String {
        let challenge = Sha256::digest(self.verifier.expose_secret());
        let challenge = BASE64_URL_SAFE_NO_PAD.encode(challenge);
        let query = [
            ("response_type", "code"),
            ("client_id", CLIENT_ID),
            ("redirect_uri", REDIRECT),
            ("scope", SCOPE),
            ("code_challenge", &challenge),
            ("code_challenge_method", "S256"),
            ("id_token_add_organizations", "true"),
            ("codex_cli_simplified_flow", "true"),
            ("state", self.state.expose_secret()),
            ("originator", ORIGINATOR),
        ];
        let path = format!("{auth_url}/oauth/authorize");
        match Url::parse_with_params(&path, query) {
            // The page does not take a plus for a space.
            Ok(url) => url.as_str().replace('+', "%20"),
            Err(_) => path,
        }
    }
}

/// What a browser's address bar shows after a login.
pub struct Callback {
    /// Which login it belongs to.
    pub state: SecretString,
    /// The code, or upstream's word for why there is none.
    pub code: Result<SecretString, String>,
}

impl Callback {
    /// Reads the address, or its query alone. `None` if it is not the address of a finished login.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let query = text.split_once('?').map_or(text, |(_, query)| query);
        let query = query.split('#').next().unwrap_or_default();
        let url = Url::parse(&format!("{REDIRECT}?{query}")).ok()?;
        let find = |name: &str| {
            let mut pairs = url.query_pairs();
            let (_, value) = pairs.find(|(key, _)| key == name)?;
            (!value.is_empty() && value.len() <= LONGEST).then(|| value.into_owned())
        };
        let code = match (find("code"), find("error")) {
            (Some(code), _) => Ok(code.into()),
            (None, Some(error)) => Err(super::plain(&error).unwrap_or_default()),
            (None, None) => return None,
        };
        Some(Self {
            state: find("state")?.into(),
            code,
        })
    }
}

/// What a device's login needs until it is approved.
#[derive(Clone, Debug)]
pub struct Device {
    /// Names it to upstream.
    pub device_auth_id: SecretString,
    /// What the person types in.
    pub user_code: SecretString,
    /// Between two questions.
    pub interval: Duration,
    /// How long the code holds.
    pub lifetime: Duration,
}

/// What upstream says of a device's login.
pub enum Approval {
    /// The person has not answered yet.
    Pending,
    /// The same; it is asked too often.
    SlowDown,
    /// A code, with the secret half that upstream drew.
    Code(SecretString, SecretString),
    /// The tokens themselves.
    Tokens(Tokens),
}

/// Where the person types a device's code.
#[must_use]
pub fn device_url(auth_url: &str) -> String {
    format!("{auth_url}/codex/device")
}

/// Begins a device's login.
///
/// # Errors
/// [`LoginError`].
pub async fn device_begin(client: &reqwest::Client, auth_url: &str) -> Result<Device, LoginError> {
    #[derive(Deserialize)]
    struct Begun {
        device_auth_id: String,
        #[serde(alias = "usercode")]
        user_code: String,
        interval: Option<Value>,
        expires_in: Option<Value>,
    }
    let url = format!("{auth_url}/api/accounts/deviceauth/usercode");
    let (status, body) = ask(client.post(url).json(&json!({ "client_id": CLIENT_ID }))).await?;
    match status {
        StatusCode::OK => {}
        StatusCode::NOT_FOUND => return Err(LoginError::NoDevices),
        _ => return Err(refused(status, &body)),
    }
    let begun: Begun = serde_json::from_slice(&body).map_err(|_| malformed())?;
    let seconds = |value: Option<Value>, otherwise: Duration| {
        let number = value.and_then(|value| match value {
            Value::String(text) => text.trim().parse().ok(),
            value => value.as_u64(),
        });
        number
            .filter(|seconds| (1..=3600).contains(seconds))
            .map_or(otherwise, Duration::from_secs)
    };
    Ok(Device {
        device_auth_id: begun.device_auth_id.into(),
        user_code: begun.user_code.into(),
        interval: seconds(begun.interval, DEVICE_INTERVAL),
        lifetime: seconds(begun.expires_in, DEVICE_TIME),
    })
}

/// Asks whether a device's login is approved.
///
/// # Errors
/// [`LoginError`]; after [`LoginError::Refused`] it never will be.
pub async fn device_ask(
    client: &reqwest::Client,
    auth_url: &str,
    device_auth_id: &SecretString,
    user_code: &SecretString,
) -> Result<Approval, LoginError> {
    #[derive(Deserialize)]
    struct Approved {
        authorization_code: Option<String>,
        code_verifier: Option<String>,
        status: Option<String>,
    }
    let url = format!("{auth_url}/api/accounts/deviceauth/token");
    let body = json!({
        "device_auth_id": device_auth_id.expose_secret(),
        "user_code": user_code.expose_secret(),
    });
    let (status, body) = ask(client.post(url).json(&body)).await?;
    if status != StatusCode::OK {
        let code = code_of(&body);
        return match (status, code.as_str()) {
            (_, "slow_down") => Ok(Approval::SlowDown),
            (_, "authorization_pending") => Ok(Approval::Pending),
            (_, "access_denied" | "expired_token") => Err(LoginError::Refused(code)),
            (StatusCode::FORBIDDEN | StatusCode::NOT_FOUND, _) => Ok(Approval::Pending),
            _ => Err(refused(status, &body)),
        };
    }
    let approved: Approved = serde_json::from_slice(&body).map_err(|_| malformed())?;
    match (approved.authorization_code, approved.code_verifier) {
        (Some(code), Some(verifier)) => Ok(Approval::Code(code.into(), verifier.into())),
        _ if approved.status.as_deref() == Some("pending") => Ok(Approval::Pending),
        _ => tokens(&body).map(Approval::Tokens),
    }
}

/// Spends a browser's code.
///
/// # Errors
/// [`LoginError`]. After [`LoginError::Unreachable`] the code may be spent.
pub async fn spend_browser(
    client: &reqwest::Client,
    auth_url: &str,
    code: &SecretString,
    verifier: &SecretString,
) -> Result<Tokens, LoginError> {
    spend(client, auth_url, code, verifier, REDIRECT).await
}

/// Spends a device's code.
///
/// # Errors
/// As [`spend_browser`].
pub async fn spend_device(
    client: &reqwest::Client,
    auth_url: &str,
    code: &SecretString,
    verifier: &SecretString,
) -> Result<Tokens, LoginError> {
    let redirect = format!("{auth_url}/deviceauth/callback");
    spend(client, auth_url, code, verifier, &redirect).await
}

async fn spend(
    client: &reqwest::Client,
    auth_url: &str,
    code: &SecretString,
    verifier: &SecretString,
    redirect: &str,
) -> Result<Tokens, LoginError> {
    let form = [
        ("grant_type", "authorization_code"),
        ("client_id", CLIENT_ID),
        ("code", code.expose_secret()),
        ("code_verifier", verifier.expose_secret()),
        ("redirect_uri", redirect),
    ];
    let url = format!("{auth_url}/oauth/token");
    let (status, body) = ask(client.post(url).form(&form)).await?;
    if status == StatusCode::OK {
        tokens(&body)
    } else {
        Err(refused(status, &body))
    }
}

/// All three tokens, or it is no login.
fn tokens(body: &[u8]) -> Result<Tokens, LoginError> {
    let answer: Answer = serde_json::from_slice(body).map_err(|_| malformed())?;
    let secret = |text| super::secret(text).ok_or_else(malformed);
    Ok(Tokens {
        access: secret(answer.access_token)?,
        refresh: secret(answer.refresh_token)?,
        id_token: Some(secret(answer.id_token)?),
    })
}

async fn ask(request: RequestBuilder) -> Result<(StatusCode, Vec<u8>), LoginError> {
    let unreachable = |why: &str| LoginError::Unreachable(why.to_owned());
    super::ask(request).await.map_err(unreachable)
}

/// A client's fault is a refusal; everything else may work later.
fn refused(status: StatusCode, body: &[u8]) -> LoginError {
    match status {
        StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            LoginError::Refused(code_of(body))
        }
        _ => LoginError::Unreachable(status.as_u16().to_string()),
    }
}

fn malformed() -> LoginError {
    LoginError::Unreachable("malformed".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_login_is_as_upstream_wants_it() {
        let pkce = Pkce {
            verifier: "verifier".into(),
            state: "st ate".into(),
        };
        assert_eq!(
            pkce.authorize_url("https://auth.test"),
            "https://auth.test/oauth/authorize?response_type=code&client_id=app_EMoamEEZ73f0CkXaXp7hrann\
             &redirect_uri=http%3A%2F%2Flocalhost%3A1455%2Fauth%2Fcallback&scope=openid%20profile%20email%20offline_access\
             &code_challenge=iMnq5o6zALKXGivsnlom_0F5_WYda32GHkxlV7mq7hQ&code_challenge_method=S256\
             &id_token_add_organizations=true&codex_cli_simplified_flow=true&state=st%20ate&originator=codex_cli_rs"
        );
        let (one, other) = (Pkce::draw(), Pkce::draw());
        let text = one.verifier.expose_secret();
        assert_eq!(text.len(), 43);
        assert_ne!(text, other.verifier.expose_secret());
        assert_ne!(text, one.state.expose_secret());
    }

    #[test]
    fn a_pasted_callback_is_read_however_much_of_it_was_copied() {
        for (text, expected) in [
            (
                "http://localhost:1455/auth/callback?code=c%2Bd&state=s",
                Some(("s", Ok("c+d"))),
            ),
            (
                "  localhost:1455/auth/callback?state=s&scope=openid+email&code=c#frag ",
                Some(("s", Ok("c"))),
            ),
            ("code=c&state=s", Some(("s", Ok("c")))),
            (
                "http://localhost:1455/auth/callback?error=access_denied&state=s",
                Some(("s", Err("access_denied"))),
            ),
            ("?error=%3Cscript%3E&state=s", Some(("s", Err("")))),
            ("http://localhost:1455/auth/callback?code=c", None),
            ("http://localhost:1455/auth/callback?code=&state=s", None),
            ("http://localhost:1455/auth/callback", None),
            ("", None),
        ] {
            let callback = Callback::parse(text);
            let found = callback.as_ref().map(|callback| {
                let code = callback.code.as_ref();
                let code = code
                    .map(|code| code.expose_secret())
                    .map_err(String::as_str);
                (callback.state.expose_secret(), code)
            });
            assert_eq!(found, expected, "{text}");
        }
    }
}

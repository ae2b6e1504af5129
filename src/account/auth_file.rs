//! The Codex CLI's `auth.json`. Only a ChatGPT login can be pooled; a file with an API key alone is refused. Keys are accepted in snake
//! and in camel case, unknown ones are ignored. No error carries anything of the file.

use jiff::{Timestamp, Unit};
use secrecy::SecretString;
use serde_json::Value;

use super::{
    Tokens,
    claims::{self, Claims},
};

/// A login, as the Codex CLI leaves it in a file or as upstream has just issued it. It does not print.
pub struct AuthFile {
    pub(super) tokens: Tokens,
    pub(super) claims: Claims,
    /// When the tokens were issued, as the file says.
    pub(super) refreshed_at: Option<Timestamp>,
}

/// Why a file is no login.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthFileError {
    /// Not JSON, or no object.
    #[error("the file is not a JSON object")]
    NotJson,
    /// No `tokens`.
    #[error(
        "the file has no ChatGPT login (`tokens`); an API key alone cannot be pooled: run `codex login` with ChatGPT"
    )]
    NoLogin,
    /// A token that is needed is missing, or is no printable text.
    #[error("`tokens.{0}` is missing or is not a token")]
    Token(&'static str),
    /// Nothing by which the login could be told from another.
    #[error("the tokens name neither a workspace nor a user nor an e-mail address")]
    Anonymous,
}

impl AuthFile {
    /// Reads the content of an `auth.json`.
    ///
    /// # Errors
    /// If there is no complete login in it.
    pub fn parse(content: &[u8]) -> Result<Self, AuthFileError> {
        let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
        let file: Value = serde_json::from_slice(content).map_err(|_| AuthFileError::NotJson)?;
        let file = file.as_object().ok_or(AuthFileError::NotJson)?;
        let login = file
            .get("tokens")
            .filter(|login| login.is_object())
            .ok_or(AuthFileError::NoLogin)?;
        let find = |snake: &str, camel: &str| {
            login
                .get(snake)
                .or_else(|| login.get(camel))
                .and_then(claims::text)
        };
        let token = |snake: &'static str, camel: &str| {
            find(snake, camel)
                .filter(|text| text.bytes().all(|byte| byte.is_ascii_graphic()))
                .ok_or(AuthFileError::Token(snake))
        };
        let secret = |text: String| SecretString::from(text);
        let tokens = Tokens {
            access: token("access_token", "accessToken").map(secret)?,
            refresh: token("refresh_token", "refreshToken").map(secret)?,
            id_token: token("id_token", "idToken").map(secret).ok(),
        };
        let mut claims = tokens.claims();
        claims.chatgpt_account_id = find("account_id", "accountId").or(claims.chatgpt_account_id);
        let issued = file
            .get("last_refresh")
            .or_else(|| file.get("lastRefreshAt"))
            .and_then(Value::as_str);
        Self {
            tokens,
            claims,
            refreshed_at: issued.and_then(moment),
        }
        .named()
    }

    /// The login of tokens that upstream has just issued.
    ///
    /// # Errors
    /// [`AuthFileError::Anonymous`].
    pub fn issued(tokens: Tokens) -> Result<Self, AuthFileError> {
        let claims = tokens.claims();
        Self {
            tokens,
            claims,
            refreshed_at: None,
        }
        .named()
    }

    fn named(self) -> Result<Self, AuthFileError> {
        let Claims {
            email,
            chatgpt_account_id,
            chatgpt_user_id,
            ..
        } = &self.claims;
        match (chatgpt_account_id, chatgpt_user_id, email) {
            (None, None, None) => Err(AuthFileError::Anonymous),
            _ => Ok(self),
        }
    }
}

/// As exactly as the database keeps it, so that the two can be compared.
fn moment(text: &str) -> Option<Timestamp> {
    let exact: Timestamp = text.parse().ok()?;
    exact.round(Unit::Microsecond).ok()
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;
    use serde_json::json;

    use super::{super::claims::tests::jwt, *};

    fn id_token() -> String {
        jwt(&json!({
            "email": "u@example.test",
            "https://api.openai.com/auth": {"chatgpt_account_id": "acct-1", "chatgpt_user_id": "user-1", "chatgpt_plan_type": "pro"},
        }))
    }

    fn parse(file: &Value) -> Result<AuthFile, AuthFileError> {
        AuthFile::parse(file.to_string().as_bytes())
    }

    #[test]
    fn a_file_of_the_codex_cli_is_read() {
        let file = parse(&json!({
            "auth_mode": "chatgpt", "OPENAI_API_KEY": null, "last_refresh": "2026-01-02T03:04:05.678901234Z",
            "tokens": {"id_token": id_token(), "access_token": "access", "refresh_token": "refresh", "account_id": "acct-2"},
        }))
        .ok()
        .unwrap();
        assert_eq!(file.tokens.access.expose_secret(), "access");
        assert_eq!(file.tokens.refresh.expose_secret(), "refresh");
        assert_eq!(file.tokens.id_token.unwrap().expose_secret(), id_token());
        assert_eq!(
            file.claims.chatgpt_account_id.as_deref(),
            Some("acct-2"),
            "the file's own id counts first"
        );
        assert_eq!(file.claims.chatgpt_user_id.as_deref(), Some("user-1"));
        assert_eq!(
            file.refreshed_at,
            Some("2026-01-02T03:04:05.678901Z".parse().unwrap()),
            "as exactly as the database keeps it"
        );
    }

    #[test]
    fn camel_case_a_missing_id_token_and_a_byte_order_mark_are_fine() {
        let json = json!({"lastRefreshAt": "yesterday", "tokens": {"accessToken": id_token(), "refreshToken": "refresh"}});
        let file = AuthFile::parse(format!("\u{feff}{json}").as_bytes())
            .ok()
            .unwrap();
        assert!(file.tokens.id_token.is_none());
        assert_eq!(file.claims.chatgpt_account_id.as_deref(), Some("acct-1"));
        assert_eq!(file.refreshed_at, None);
    }

    #[test]
    fn what_is_no_login_is_refused_by_what_is_missing() {
        for (file, expected) in [
            (json!([]), AuthFileError::NotJson),
            (json!("sk-canary"), AuthFileError::NotJson),
            (json!({}), AuthFileError::NoLogin),
            (
                json!({"OPENAI_API_KEY": "sk-canary", "tokens": null}),
                AuthFileError::NoLogin,
            ),
            (json!({"tokens": "canary"}), AuthFileError::NoLogin),
            (
                json!({"tokens": {"refresh_token": "canary"}}),
                AuthFileError::Token("access_token"),
            ),
            (
                json!({"tokens": {"access_token": "a", "refresh_token": ""}}),
                AuthFileError::Token("refresh_token"),
            ),
            (
                json!({"tokens": {"access_token": 7, "refresh_token": "canary"}}),
                AuthFileError::Token("access_token"),
            ),
            (
                json!({"tokens": {"access_token": "can ary", "refresh_token": "r"}}),
                AuthFileError::Token("access_token"),
            ),
            (
                json!({"tokens": {"access_token": "canary", "refresh_token": "r"}}),
                AuthFileError::Anonymous,
            ),
        ] {
            let error = parse(&file).err().unwrap();
            assert_eq!(error, expected);
            assert!(!format!("{error} {error:?}").contains("canary"));
        }
        for garbage in [
            &b""[..],
            b"{",
            b"\xff\xfe",
            b"{\"tokens\": canary}",
            b"access_token=canary",
        ] {
            assert_eq!(
                AuthFile::parse(garbage).err().unwrap(),
                AuthFileError::NotJson
            );
        }
    }
}

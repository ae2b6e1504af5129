//! The Codex CLI's `auth.json`.

use secrecy::SecretString;
use serde::Deserialize;

use super::{Claims, Tokens};

/// A login as the Codex CLI keeps it.
pub struct AuthFile {
    pub(super) tokens: Tokens,
    pub(super) account_id: Option<String>,
}

/// Why a file is no login. Never quotes it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AuthFileError {
    /// Not JSON, or not an object of the expected shape.
    #[error("this is not the Codex CLI's auth.json (line {0})")]
    NotJson(usize),
    /// A login by API key.
    #[error(
        "this auth.json holds an API key and no ChatGPT login; run `codex login` and sign in with ChatGPT"
    )]
    ApiKeyOnly,
    /// Something is missing.
    #[error("this auth.json has no {0}")]
    Missing(&'static str),
}

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    tokens: Option<FileTokens>,
    #[serde(default, rename = "OPENAI_API_KEY")]
    api_key: Option<SecretString>,
}

#[derive(Deserialize)]
struct FileTokens {
    #[serde(default, alias = "idToken")]
    id_token: Option<SecretString>,
    #[serde(default, alias = "accessToken")]
    access_token: Option<SecretString>,
    #[serde(default, alias = "refreshToken")]
    refresh_token: Option<SecretString>,
    #[serde(default, alias = "accountId")]
    account_id: Option<String>,
}

impl AuthFile {
    /// Reads the content of a file.
    ///
    /// # Errors
    /// If it is no login by ChatGPT.
    pub fn parse(content: &[u8]) -> Result<Self, AuthFileError> {
        let file: File = serde_json::from_slice(content)
            .map_err(|error| AuthFileError::NotJson(error.line()))?;
        let tokens = match (file.tokens, file.api_key) {
            (Some(tokens), _) => tokens,
            (None, Some(_)) => return Err(AuthFileError::ApiKeyOnly),
            (None, None) => return Err(AuthFileError::Missing("tokens")),
        };
        let tokens_of = Tokens {
            access: tokens
                .access_token
                .ok_or(AuthFileError::Missing("access_token"))?,
            refresh: tokens
                .refresh_token
                .ok_or(AuthFileError::Missing("refresh_token"))?,
            id_token: tokens.id_token,
        };
        let named = tokens.account_id.filter(|id| !id.is_empty());
        let mut file = Self {
            tokens: tokens_of,
            account_id: None,
        };
        file.account_id = named.or_else(|| file.claims().account_id);
        Ok(file)
    }

    /// What its tokens say of the seat: the id token first.
    #[must_use]
    pub fn claims(&self) -> Claims {
        let access = Claims::of(&self.tokens.access);
        let id = self
            .tokens
            .id_token
            .as_ref()
            .map(Claims::of)
            .unwrap_or_default();
        Claims {
            email: id.email.or(access.email),
            plan: id.plan.or(access.plan),
            account_id: id.account_id.or(access.account_id),
            user_id: id.user_id.or(access.user_id),
            expires_at: access.expires_at,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_login_is_named_without_being_quoted() {
        let secret = "sk-very-secret";
        for (content, expected) in [
            ("not json sk-very-secret", AuthFileError::NotJson(1)),
            (r#"["sk-very-secret"]"#, AuthFileError::NotJson(1)),
            (
                r#"{"OPENAI_API_KEY":"sk-very-secret"}"#,
                AuthFileError::ApiKeyOnly,
            ),
            ("{}", AuthFileError::Missing("tokens")),
            (
                r#"{"tokens":{"refresh_token":"sk-very-secret"}}"#,
                AuthFileError::Missing("access_token"),
            ),
            (
                r#"{"tokens":{"access_token":"sk-very-secret"}}"#,
                AuthFileError::Missing("refresh_token"),
            ),
        ] {
            let error = AuthFile::parse(content.as_bytes()).err().unwrap();
            assert_eq!(error, expected, "{content}");
            assert!(!error.to_string().contains(secret));
        }
    }

    #[test]
    fn both_spellings_are_read() {
        for content in [
            r#"{"tokens":{"access_token":"a","refresh_token":"r","account_id":"acct"},"OPENAI_API_KEY":null}"#,
            r#"{"tokens":{"accessToken":"a","refreshToken":"r","accountId":"acct"},"more":1}"#,
        ] {
            assert_eq!(
                AuthFile::parse(content.as_bytes())
                    .ok()
                    .unwrap()
                    .account_id
                    .as_deref(),
                Some("acct")
            );
        }
    }
}

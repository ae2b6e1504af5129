//! What a JWT says. The signature is not verified: tokens come from the token endpoint over TLS, or from the operator; nothing is
//! authorised by them here.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::Timestamp;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::Value;

/// The claims that matter; absent where the token does not say, or is no JWT.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Claims {
    /// Of the person.
    pub email: Option<String>,
    /// Upstream's name of the plan.
    pub plan: Option<String>,
    /// The workspace.
    pub account_id: Option<String>,
    /// The person within the workspace.
    pub user_id: Option<String>,
    /// When the token ends.
    pub expires_at: Option<Timestamp>,
}

impl Claims {
    /// Reads a token.
    #[must_use]
    pub fn of(token: &SecretString) -> Self {
        read(token.expose_secret()).unwrap_or_default()
    }
}

fn read(token: &str) -> Option<Claims> {
    let payload = token.split('.').nth(1)?;
    let payload = BASE64_URL_SAFE_NO_PAD
        .decode(payload.trim_end_matches('='))
        .ok()?;
    let claims: Value = serde_json::from_slice(&payload).ok()?;
    let auth = &claims["https://api.openai.com/auth"];
    let first = |names: &[&str]| {
        let found = names
            .iter()
            .find_map(|name| auth[*name].as_str().or(claims[*name].as_str()));
        found.filter(|text| !text.is_empty()).map(str::to_owned)
    };
    let profile = claims["https://api.openai.com/profile"]["email"]
        .as_str()
        .map(str::to_owned);
    Some(Claims {
        email: first(&["email"]).or(profile),
        plan: first(&["chatgpt_plan_type"]),
        account_id: first(&["chatgpt_account_id"]),
        user_id: first(&[
            "chatgpt_user_id",
            "user_id",
            "chatgpt_account_user_id",
            "sub",
        ]),
        expires_at: claims["exp"]
            .as_i64()
            .and_then(|seconds| Timestamp::from_second(seconds).ok()),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn token(claims: &Value) -> SecretString {
        SecretString::from(format!(
            "e30.{}.sig",
            BASE64_URL_SAFE_NO_PAD.encode(claims.to_string())
        ))
    }

    #[test]
    fn claims_are_found_where_upstream_puts_them() {
        let claims = Claims::of(&token(&json!({
            "exp": 1_900_000_000,
            "https://api.openai.com/auth": { "chatgpt_account_id": "a", "chatgpt_user_id": "u", "chatgpt_plan_type": "pro" },
            "https://api.openai.com/profile": { "email": "x@example.test" },
        })));
        assert_eq!(claims.account_id.as_deref(), Some("a"));
        assert_eq!(claims.user_id.as_deref(), Some("u"));
        assert_eq!(claims.plan.as_deref(), Some("pro"));
        assert_eq!(claims.email.as_deref(), Some("x@example.test"));
        assert_eq!(claims.expires_at.unwrap().as_second(), 1_900_000_000);
    }

    #[test]
    fn the_subject_stands_in_for_an_unnamed_user() {
        assert_eq!(
            Claims::of(&token(&json!({ "sub": "s" })))
                .user_id
                .as_deref(),
            Some("s")
        );
    }

    #[test]
    fn what_is_no_jwt_says_nothing() {
        for text in ["", "opaque", "a.b.c", "..", "e30.bm90IGpzb24.x"] {
            assert!(
                Claims::of(&SecretString::from(text)) == Claims::default(),
                "{text}"
            );
        }
    }
}

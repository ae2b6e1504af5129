//! What a login's tokens say about it, read without verification: they come from the token endpoint or from the operator's own file, and
//! nothing here is an authorisation. A token that is no JWT says nothing; that is not an error.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use jiff::Timestamp;
use serde_json::Value;

/// Where upstream puts its own claims.
const AUTH: &str = "https://api.openai.com/auth";
const PROFILE: &str = "https://api.openai.com/profile";

/// Places of one claim, the best first.
type Places = &'static [&'static [&'static str]];

const EMAIL: Places = &[&["email"], &[PROFILE, "email"]];
const PLAN: Places = &[&[AUTH, "chatgpt_plan_type"], &["chatgpt_plan_type"]];
const ACCOUNT: Places = &[&[AUTH, "chatgpt_account_id"], &["chatgpt_account_id"]];
const USER: Places = &[
    &[AUTH, "chatgpt_user_id"],
    &[AUTH, "user_id"],
    &[AUTH, "chatgpt_account_user_id"],
    &["chatgpt_user_id"],
    &["user_id"],
    &["sub"],
];

/// Who a login belongs to. It carries an e-mail address, so it does not print.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Claims {
    /// The person's address, as upstream writes it.
    pub email: Option<String>,
    /// Upstream's name of the plan, such as `plus`.
    pub plan: Option<String>,
    /// The workspace.
    pub chatgpt_account_id: Option<String>,
    /// The person within it.
    pub chatgpt_user_id: Option<String>,
}

impl Claims {
    /// Reads the tokens of one login. The place of a claim counts before the order of the tokens: a weak substitute in the first never
    /// hides the real claim in the second.
    #[must_use]
    pub fn read(tokens: &[&str]) -> Self {
        let payloads: Vec<Value> = tokens.iter().filter_map(|token| payload(token)).collect();
        let find = |places: Places| {
            places.iter().find_map(|path| {
                let at = |payload| {
                    path.iter()
                        .try_fold(payload, |value: &Value, key| value.get(key))
                };
                payloads.iter().filter_map(at).find_map(text)
            })
        };
        Self {
            email: find(EMAIL),
            plan: find(PLAN),
            chatgpt_account_id: find(ACCOUNT),
            chatgpt_user_id: find(USER),
        }
    }
}

/// When a token ends by its own word.
#[must_use]
pub fn expires_at(token: &str) -> Option<Timestamp> {
    Timestamp::from_second(payload(token)?.get("exp")?.as_i64()?).ok()
}

/// A text worth keeping: not blank, nothing that a database or a header would refuse.
pub(super) fn text(value: &Value) -> Option<String> {
    let text = value.as_str()?.trim();
    (!text.is_empty() && !text.contains(char::is_control)).then(|| text.to_owned())
}

/// The middle part of a JWT.
fn payload(token: &str) -> Option<Value> {
    let mut parts = token.split('.');
    let (Some(_), Some(payload), Some(_), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let json = BASE64_URL_SAFE_NO_PAD
        .decode(payload.trim_end_matches('='))
        .ok()?;
    serde_json::from_slice(&json).ok()
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// A token with these claims and no signature.
    pub(crate) fn jwt(claims: &Value) -> String {
        format!(
            "e30.{}.c2ln",
            BASE64_URL_SAFE_NO_PAD.encode(claims.to_string())
        )
    }

    #[test]
    fn each_claim_is_found_in_its_best_place() {
        let id = jwt(&json!({
            "email": " u@example.test ", "sub": "auth0|1",
            AUTH: {"chatgpt_account_id": "acct", "chatgpt_plan_type": "pro", "user_id": "user"},
        }));
        let access = jwt(&json!({
            AUTH: {"chatgpt_user_id": "user-1", "chatgpt_plan_type": "free"}, PROFILE: {"email": "other@example.test"},
        }));
        let claims = Claims::read(&[&id, &access]);
        assert_eq!(claims.email.as_deref(), Some("u@example.test"));
        assert_eq!(claims.plan.as_deref(), Some("pro"));
        assert_eq!(claims.chatgpt_account_id.as_deref(), Some("acct"));
        assert_eq!(claims.chatgpt_user_id.as_deref(), Some("user-1"));
        let claims = Claims::read(&[&access]);
        assert_eq!(claims.email.as_deref(), Some("other@example.test"));
        assert_eq!(claims.chatgpt_account_id, None);
    }

    #[test]
    fn what_is_no_jwt_or_no_text_says_nothing() {
        let odd = jwt(
            &json!({"email": 7, "sub": "", "chatgpt_account_id": "a\0b", AUTH: "text", "exp": "soon"}),
        );
        let list = jwt(&json!(["email"]));
        for token in [
            "",
            "opaque",
            "a.b",
            "a.b.c",
            "a.e30.c.d",
            "a.!!.c",
            &odd,
            &list,
        ] {
            assert!(Claims::read(&[token]) == Claims::default(), "{token}");
            assert_eq!(expires_at(token), None, "{token}");
        }
    }

    #[test]
    fn a_token_ends_when_it_says() {
        let token = jwt(&json!({"exp": 1_900_000_000}));
        assert_eq!(
            expires_at(&token),
            Some(Timestamp::constant(1_900_000_000, 0))
        );
        assert_eq!(expires_at(&jwt(&json!({"exp": i64::MAX}))), None);
    }
}

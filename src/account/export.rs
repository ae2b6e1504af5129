//! Logins in bulk: what a codex-lb hands out, one or several, beside the Codex CLI's own file. Each entry is taken whole or not at all, and
//! says why not. Settings of an account there are not ours, but for its name; those that would be missed are named.
//!
//! Read are objects in a row, arrays and `{"accounts": [..]}` of: an `auth.json`, an export with `codexAuthJson`, with `opencodeAuthJson` or
//! with `authJson` (an object, or its text), and the file of `OpenCode`. What is encrypted there cannot be read here.

use jiff::Timestamp;
use serde_json::{Value, json};

use super::{AuthFile, AuthFileError, claims::text};

/// One login of a file.
pub struct Entry {
    /// The login, or why there is none.
    pub login: Result<AuthFile, NotTaken>,
    /// What the account was called there.
    pub label: Option<String>,
    /// What was set there and is not taken, such as `routingPolicy`.
    pub left: Vec<&'static str>,
}

/// Why an entry is not taken. It carries nothing of the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// Ciphertext of the other service.
    #[error(
        "its tokens are encrypted with the other service's key or a passphrase; export the account there by itself (its `auth.json`) and import that"
    )]
    Encrypted,
    /// A list of accounts without their tokens.
    #[error("it has no tokens; export the account there with its `auth.json`")]
    NoTokens,
    /// No login in it, or half a login.
    #[error(transparent)]
    Login(#[from] AuthFileError),
}

/// Settings there, each with its value that means nothing.
const SETTINGS: [(&str, &str, &str); 4] = [
    ("routingPolicy", "routing_policy", "normal"),
    ("limitWarmupEnabled", "limit_warmup_enabled", "false"),
    (
        "securityWorkAuthorized",
        "security_work_authorized",
        "false",
    ),
    ("status", "status", "active"),
];

/// Words in the names of fields that hold ciphertext.
const ENCRYPTED: [&str; 4] = ["encrypted", "ciphertext", "salt", "kdf"];

/// The entries of a file, in its order.
///
/// # Errors
/// [`AuthFileError::NotJson`]: then nothing of it is read.
pub fn read(content: &[u8]) -> Result<Vec<Entry>, AuthFileError> {
    let content = content.strip_prefix(b"\xef\xbb\xbf").unwrap_or(content);
    let values = serde_json::Deserializer::from_slice(content).into_iter::<Value>();
    let mut entries = Vec::new();
    for value in values {
        flatten(value.map_err(|_| AuthFileError::NotJson)?, &mut entries);
    }
    match &entries[..] {
        [] => Err(AuthFileError::NotJson),
        entries if entries.iter().any(|entry| !entry.is_object()) => Err(AuthFileError::NotJson),
        entries => Ok(entries.iter().map(Entry::read).collect()),
    }
}

fn flatten(value: Value, entries: &mut Vec<Value>) {
    match value {
        Value::Array(values) => values.into_iter().for_each(|one| flatten(one, entries)),
        Value::Object(mut fields) => match fields.remove("accounts") {
            Some(accounts @ Value::Array(_)) => flatten(accounts, entries),
            Some(other) => {
                fields.insert("accounts".to_owned(), other);
                entries.push(Value::Object(fields));
            }
            None => entries.push(Value::Object(fields)),
        },
        other => entries.push(other),
    }
}

impl Entry {
    /// When its tokens were issued, as it says. Of two logins of one seat the newer must be stored last: its refresh token is the live one.
    #[must_use]
    pub fn issued(&self) -> Option<Timestamp> {
        self.login.as_ref().ok()?.refreshed_at
    }

    fn read(entry: &Value) -> Self {
        let account = Some(&entry["account"]).filter(|account| account.is_object());
        let find = |camel: &str, snake: &str| {
            let places = account.into_iter().chain([entry]);
            let mut found = places.flat_map(|place| [&place[camel], &place[snake]]);
            found.find(|value| !value.is_null())
        };
        let left = SETTINGS.into_iter().filter(|(camel, snake, nothing)| {
            find(camel, snake).is_some_and(|value| match value {
                Value::String(word) => word != nothing,
                other => serde_json::to_string(other).is_ok_and(|text| text != *nothing),
            })
        });
        Self {
            login: login(entry),
            label: find("alias", "alias").and_then(text),
            left: left.map(|(camel, ..)| camel).collect(),
        }
    }
}

/// The login of an entry in any of its forms.
fn login(entry: &Value) -> Result<AuthFile, NotTaken> {
    let forms = ["codexAuthJson", "authJson", "opencodeAuthJson"];
    let form = forms.into_iter().find_map(|name| match &entry[name] {
        Value::String(file) => serde_json::from_str(file).ok(),
        file @ Value::Object(_) => Some(file.clone()),
        _ => None,
    });
    let file = form.as_ref().unwrap_or(entry);
    let login = match &file["openai"] {
        tokens @ Value::Object(_) => AuthFile::parse(opencode(tokens).to_string().as_bytes()),
        _ => AuthFile::parse(file.to_string().as_bytes()),
    };
    login.map_err(|error| {
        let names = || {
            entry
                .as_object()
                .into_iter()
                .flat_map(|fields| fields.keys())
        };
        let any = |words: &[&str]| {
            names().any(|name| words.iter().any(|word| name.to_lowercase().contains(word)))
        };
        match error {
            AuthFileError::NoLogin if any(&ENCRYPTED) => NotTaken::Encrypted,
            AuthFileError::NoLogin if any(&["accountid", "account_id"]) => NotTaken::NoTokens,
            error => NotTaken::Login(error),
        }
    })
}

/// Tokens of `OpenCode` as the Codex CLI would write them.
fn opencode(tokens: &Value) -> Value {
    json!({ "tokens": {
        "access_token": tokens["access"],
        "refresh_token": tokens["refresh"],
        "account_id": tokens["accountId"],
    } })
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::{super::claims::tests::jwt, *};

    fn tokens(name: &str) -> Value {
        let id =
            jwt(&json!({ "email": format!("{name}@example.test"), "chatgpt_account_id": "ws" }));
        json!({ "id_token": id, "access_token": "access", "refresh_token": format!("rt_{name}"), "account_id": "ws" })
    }

    fn auth_json(name: &str) -> Value {
        json!({ "auth_mode": "chatgpt", "OPENAI_API_KEY": null, "tokens": tokens(name), "last_refresh": "2026-01-02T03:04:05Z" })
    }

    fn taken(content: &str) -> Vec<Result<String, NotTaken>> {
        let entries = read(content.as_bytes()).unwrap();
        let name = |entry: Entry| {
            entry
                .login
                .map(|login| login.tokens.refresh.expose_secret().to_owned())
        };
        entries.into_iter().map(name).collect()
    }

    #[test]
    fn every_form_of_an_export_is_read() {
        let openai = json!({ "openai": { "type": "oauth", "access": "access", "refresh": "rt_a", "expires": 0, "accountId": "ws" } });
        let camel = json!({ "idToken": "i", "accessToken": "access", "refreshToken": "rt_a", "expiresAtMs": 0 });
        let account = json!({ "accountId": "ws_1", "email": "a@example.test" });
        for entry in [
            auth_json("a"),
            json!({ "filename": "f", "account": account, "tokens": camel, "codexAuthJson": auth_json("a"), "opencodeAuthJson": openai }),
            json!({ "accountId": "ws_1", "email": "a@example.test", "status": "active", "authJson": auth_json("a").to_string() }),
            json!({ "filename": "f", "account": account, "authJson": openai }),
            openai,
        ] {
            assert_eq!(
                taken(&entry.to_string()),
                [Ok("rt_a".to_owned())],
                "{entry}"
            );
        }
    }

    #[test]
    fn several_are_read_from_a_row_an_array_or_a_list_of_accounts() {
        let (a, b) = (auth_json("a"), auth_json("b"));
        let expected = [Ok("rt_a".to_owned()), Ok("rt_b".to_owned())];
        for content in [
            format!("{a}\n{b}\n"),
            format!("\u{feff}{a}{b}"),
            json!([a, b]).to_string(),
            json!({ "accounts": [a, b] }).to_string(),
            format!("[{a}] [{b}]"),
        ] {
            assert_eq!(taken(&content), expected, "{content}");
        }
    }

    #[test]
    fn what_cannot_be_taken_says_why_and_stops_no_other() {
        let whole = auth_json("a");
        for (entry, why) in [
            (
                json!({ "accountId": "ws_1", "accessTokenEncrypted": "gAAA", "refreshTokenEncrypted": "gAAA" }),
                NotTaken::Encrypted,
            ),
            (
                json!({ "id": "ws_1", "access_token_encrypted": "gAAA" }),
                NotTaken::Encrypted,
            ),
            (
                json!({ "version": 1, "kdf": "scrypt", "ciphertext": "x" }),
                NotTaken::Encrypted,
            ),
            (
                json!({ "accountId": "ws_1", "email": "a@example.test", "status": "active" }),
                NotTaken::NoTokens,
            ),
            (
                json!({ "OPENAI_API_KEY": "sk-canary" }),
                NotTaken::Login(AuthFileError::NoLogin),
            ),
            (
                json!({ "codexAuthJson": { "tokens": { "access_token": "canary" } } }),
                NotTaken::Login(AuthFileError::Token("refresh_token")),
            ),
            (
                json!({ "tokens": { "access_token": "canary", "refresh_token": "canary" } }),
                NotTaken::Login(AuthFileError::Anonymous),
            ),
        ] {
            let content = json!([entry, whole]).to_string();
            assert_eq!(
                taken(&content),
                [Err(why), Ok("rt_a".to_owned())],
                "{entry}"
            );
            assert!(!why.to_string().contains("canary"));
        }
        for garbage in [
            "",
            " ",
            "[]",
            "{",
            "[1]",
            "\"canary\"",
            "{\"accounts\": []}",
        ] {
            assert_eq!(
                read(garbage.as_bytes()).err(),
                Some(AuthFileError::NotJson),
                "{garbage}"
            );
        }
        let half = format!("{whole}{{\"tokens\":");
        assert_eq!(
            read(half.as_bytes()).err(),
            Some(AuthFileError::NotJson),
            "nothing of it"
        );
    }

    #[test]
    fn the_name_is_taken_and_settings_that_would_be_missed_are_named() {
        let of = |account: Value| {
            let content =
                json!({ "account": account, "codexAuthJson": auth_json("a") }).to_string();
            read(content.as_bytes()).unwrap().remove(0)
        };
        let plain = of(
            json!({ "alias": " work ", "status": "active", "routingPolicy": "normal", "limitWarmupEnabled": false }),
        );
        assert_eq!((plain.label.as_deref(), plain.left), (Some("work"), vec![]));
        let set = of(
            json!({ "alias": null, "status": "paused", "routing_policy": "preserve", "limitWarmupEnabled": true }),
        );
        assert_eq!(set.label, None);
        assert_eq!(set.left, ["routingPolicy", "limitWarmupEnabled", "status"]);
    }
}

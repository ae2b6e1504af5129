//! Who may come in: a valid key, or, on a machine of one's own, nobody else's business.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderName, header};

use super::{Peer, State};
use crate::{
    api_key::AuthError,
    config::KeyRule,
    error::{ApiError, Code},
    telemetry,
    turn::Caller,
};

/// Carries the key beside an `Authorization` that means something else.
const KEY_HEADER: HeaderName = HeaderName::from_static("x-drawbridge-key");
const KEY_PREFIX: &str = "dbk_";

/// Headers that tell of a proxy or a browser in between. One of them, and the caller is not known to be on this machine.
const BETWEEN: [HeaderName; 6] = [
    header::FORWARDED,
    header::VIA,
    HeaderName::from_static("x-real-ip"),
    header::ORIGIN,
    HeaderName::from_static("sec-fetch-site"),
    HeaderName::from_static("x-forwarded"),
];

/// The rule for going without a key.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    rule: KeyRule,
    /// Whether the listener itself is reachable from this machine alone.
    loopback: bool,
}

impl Gate {
    /// The rule on a listener.
    #[must_use]
    pub fn new(rule: KeyRule, listen: SocketAddr) -> Self {
        Self {
            rule,
            loopback: listen.ip().is_loopback(),
        }
    }

    /// Why a request without a key is not let in; `None` if it is. `any_key` = whether a key was ever created.
    fn refusal(self, peer: Peer, headers: &HeaderMap, any_key: bool) -> Option<&'static str> {
        let forwarded = || {
            headers
                .keys()
                .any(|name| BETWEEN.contains(name) || name.as_str().starts_with("x-forwarded-"))
        };
        if self.rule == KeyRule::Always {
            Some("an API key is always required here")
        } else if any_key {
            Some("an API key is required since the first key was created")
        } else if !self.loopback {
            Some("an API key is required because the service listens beyond this machine")
        } else if !peer.0.ip().is_loopback() || !host_is_loopback(headers) {
            Some("an API key is required from other machines")
        } else if forwarded() {
            Some("an API key is required behind a proxy and from a browser")
        } else {
            None
        }
    }
}

/// Finds out who is calling.
///
/// # Errors
/// 401 as the rules of the gate say.
pub(super) async fn authenticate(
    state: &State,
    peer: Peer,
    headers: &HeaderMap,
) -> Result<Caller, ApiError> {
    let Some(key) = presented(headers) else {
        return match state.gate.refusal(peer, headers, state.keys.any_created()) {
            None => Ok(Caller::anonymous()),
            Some(why) => Err(rejected(
                "missing",
                Code::InvalidApiKey,
                &format!(
                    "No API key was sent: {why}. Send `Authorization: Bearer dbk_...`; `drawbridge keys create --name NAME` makes one."
                ),
            )),
        };
    };
    let (reason, code, message) = match state.keys.authenticate(key).await {
        Ok(key) => return Ok(Caller::of(&key)),
        Err(AuthError::Expired) => ("expired", Code::ExpiredApiKey, "This API key has expired."),
        Err(AuthError::Unavailable) => (
            "unavailable",
            Code::ContinuityUnavailable,
            "API keys cannot be checked now; try again shortly.",
        ),
        Err(AuthError::Malformed) => (
            "malformed",
            Code::InvalidApiKey,
            "This API key is mistyped or cut short.",
        ),
        Err(AuthError::Unknown) => ("unknown", Code::InvalidApiKey, NOT_KNOWN),
        Err(AuthError::Revoked) => ("revoked", Code::InvalidApiKey, NOT_KNOWN),
    };
    Err(rejected(reason, code, message))
}

/// Whether there ever was such a key is nobody's business.
const NOT_KNOWN: &str = "This API key is not known here, or was revoked.";

fn rejected(reason: &'static str, code: Code, message: &str) -> ApiError {
    telemetry::key_rejected(reason);
    ApiError::new(code, message)
}

/// The key a caller presents. Any other credential, such as a ChatGPT token, counts as none and is never looked at.
fn presented(headers: &HeaderMap) -> Option<&str> {
    if let Some(key) = headers.get(KEY_HEADER) {
        return Some(key.to_str().unwrap_or_default());
    }
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && token.starts_with(KEY_PREFIX)).then_some(token)
}

fn host_is_loopback(headers: &HeaderMap) -> bool {
    let Some(host) = headers
        .get(header::HOST)
        .and_then(|host| host.to_str().ok())
    else {
        return false;
    };
    let Ok(authority) = host.parse::<http::uri::Authority>() else {
        return false;
    };
    let name = authority.host().trim_matches(['[', ']']);
    name.eq_ignore_ascii_case("localhost")
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const LOCAL: &str = "127.0.0.1:2455";

    fn headers(extra: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, HeaderValue::from_static("localhost:2455"));
        for (name, value) in extra {
            headers.insert(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn refused(
        rule: KeyRule,
        listen: &str,
        peer: &str,
        headers: &HeaderMap,
        any_key: bool,
    ) -> bool {
        let gate = Gate::new(rule, listen.parse().unwrap());
        gate.refusal(Peer(peer.parse().unwrap()), headers, any_key)
            .is_some()
    }

    #[test]
    fn a_caller_on_this_machine_may_go_without_a_key_until_one_exists() {
        assert!(!refused(
            KeyRule::Auto,
            LOCAL,
            "127.0.0.1:9",
            &headers(&[]),
            false
        ));
        assert!(!refused(
            KeyRule::Auto,
            "[::1]:2455",
            "[::1]:9",
            &headers(&[("host", "[::1]:2455")]),
            false
        ));
        assert!(refused(
            KeyRule::Auto,
            LOCAL,
            "127.0.0.1:9",
            &headers(&[]),
            true
        ));
    }

    #[test]
    fn always_means_always() {
        assert!(refused(
            KeyRule::Always,
            LOCAL,
            "127.0.0.1:9",
            &headers(&[]),
            false
        ));
    }

    #[test]
    fn a_listener_beyond_this_machine_needs_a_key() {
        assert!(refused(
            KeyRule::Auto,
            "0.0.0.0:2455",
            "127.0.0.1:9",
            &headers(&[]),
            false
        ));
    }

    #[test]
    fn a_peer_from_elsewhere_needs_a_key() {
        assert!(refused(
            KeyRule::Auto,
            LOCAL,
            "10.0.0.7:9",
            &headers(&[]),
            false
        ));
    }

    #[test]
    fn a_host_that_is_not_loopback_needs_a_key() {
        for host in [
            "example.test",
            "10.0.0.1:2455",
            "localhost.example.test",
            "",
        ] {
            assert!(
                refused(
                    KeyRule::Auto,
                    LOCAL,
                    "127.0.0.1:9",
                    &headers(&[("host", host)]),
                    false
                ),
                "{host}"
            );
        }
        assert!(refused(
            KeyRule::Auto,
            LOCAL,
            "127.0.0.1:9",
            &HeaderMap::new(),
            false
        ));
    }

    #[test]
    fn a_proxy_or_browser_in_between_needs_a_key() {
        for name in [
            "forwarded",
            "x-forwarded-for",
            "x-forwarded-host",
            "x-forwarded-proto",
            "x-forwarded-prefix",
            "via",
            "x-real-ip",
            "origin",
            "sec-fetch-site",
        ] {
            assert!(
                refused(
                    KeyRule::Auto,
                    LOCAL,
                    "127.0.0.1:9",
                    &headers(&[(name, "x")]),
                    false
                ),
                "{name}"
            );
        }
    }

    #[test]
    fn only_a_key_of_ours_is_presented_and_the_own_header_wins() {
        assert_eq!(
            presented(&headers(&[("authorization", "Bearer dbk_1")])),
            Some("dbk_1")
        );
        assert_eq!(
            presented(&headers(&[("authorization", "bearer dbk_1")])),
            Some("dbk_1")
        );
        assert_eq!(
            presented(&headers(&[("authorization", "Bearer eyJhbGciOi")])),
            None
        );
        let both = headers(&[
            ("authorization", "Bearer eyJhbGciOi"),
            ("x-drawbridge-key", "dbk_2"),
        ]);
        assert_eq!(presented(&both), Some("dbk_2"));
    }
}

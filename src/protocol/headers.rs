//! Which headers cross the bridge, and which end here.
//!
//! Towards upstream everything goes that the client said about itself: nobody is disguised. What names another credential, describes
//! one hop or one body, or tells where the request came from stays here. Towards the client goes what helps it; what belongs to one
//! account (limits, turn state, ids) or to one connection does not. It must not know accounts or credentials: those are put on later.

use std::{borrow::Cow, collections::BTreeMap};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use serde_json::value::{RawValue, to_raw_value};

/// Names that end here in both directions: they speak of one connection, one body or one account.
const LOCAL: &[&str] = &[
    "chatgpt-account-id",
    "connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "via",
    "x-codex-turn-state",
];
const LOCAL_PREFIXES: &[&str] = &[
    "cf-",
    "content-",
    "proxy-",
    "sec-websocket-",
    "x-drawbridge-",
];

/// What a client says to us only. Keys in any of their spellings are among them.
const REQUEST: &[&str] = &[
    "accept",
    "accept-encoding",
    "api-key",
    "authorization",
    "baggage",
    "cookie",
    "expect",
    "forwarded",
    "host",
    "origin",
    "referer",
    "true-client-ip",
    "cdn-loop",
    "x-api-key",
    "x-client-ip",
    "x-cluster-client-ip",
    "x-real-ip",
];
const REQUEST_PREFIXES: &[&str] = &["sec-fetch-", "x-envoy-", "x-forwarded-"];

/// What upstream says to us only. The pool's limits, our turn state and our request id are put on elsewhere.
const RESPONSE: &[&str] = &[
    "alt-svc",
    "date",
    "nel",
    "openai-organization",
    "openai-project",
    "report-to",
    "server",
    "set-cookie",
    "strict-transport-security",
    "vary",
    "x-models-etag",
    "x-request-id",
];
const RESPONSE_PREFIXES: &[&str] = &["access-control-", "x-codex-", "x-ratelimit-"];
/// Families of limits besides `x-codex-*`: `x-<limit>-primary-used-percent` and the like.
const LIMITS: &[&str] = &[
    "-primary-",
    "-secondary-",
    "-monthly-",
    "-credits-",
    "-limit-name",
];

const BETA: HeaderName = HeaderName::from_static("openai-beta");
const BETA_WEBSOCKET: &str = "responses_websockets=2026-02-06";
const BETA_HTTP: &str = "responses=experimental";

/// A client's headers, as they travel with an HTTP request.
#[must_use]
pub fn to_upstream_http(client: &HeaderMap) -> HeaderMap {
    filter(client, |name, _| !listed(name, REQUEST, REQUEST_PREFIXES))
}

/// A client's headers, as they travel with a WebSocket handshake: the beta of WebSockets is asked for, that of HTTP is not.
#[must_use]
pub fn to_upstream_websocket(client: &HeaderMap) -> HeaderMap {
    let mut headers = to_upstream_http(client);
    let wanted = headers
        .get_all(BETA)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','));
    let mut betas: Vec<&str> = wanted
        .map(str::trim)
        .filter(|beta| !beta.is_empty() && *beta != BETA_HTTP)
        .collect();
    if !betas.contains(&BETA_WEBSOCKET) {
        betas.push(BETA_WEBSOCKET);
    }
    let betas = HeaderValue::from_str(&betas.join(", "))
        .unwrap_or(HeaderValue::from_static(BETA_WEBSOCKET));
    headers.insert(BETA, betas);
    headers
}

/// Upstream's headers, as the client may see them. `openai-model` only if it names the requested model: another one reads as a warning
/// that the account was flagged.
#[must_use]
pub fn to_client(upstream: &HeaderMap, requested_model: &str) -> HeaderMap {
    filter(upstream, |name, value| {
        for_client(name, value.as_bytes(), requested_model)
    })
}

/// A `response.metadata` event with its headers filtered as by [`to_client`]; `None` when nothing is left that is worth sending.
#[must_use]
pub fn metadata_to_client(json: &[u8], requested_model: &str) -> Option<Bytes> {
    type Fields<'a> = BTreeMap<String, &'a RawValue>;
    let mut event: Fields<'_> = serde_json::from_slice(json).ok()?;
    let headers: Fields<'_> = event
        .remove("headers")
        .and_then(|headers| serde_json::from_str(headers.get()).ok())
        .unwrap_or_default();
    let before = headers.len();
    let kept: Fields<'_> = headers
        .into_iter()
        .filter(|(name, value)| {
            let name = name.to_ascii_lowercase();
            let text = serde_json::from_str::<Cow<'_, str>>(value.get()).unwrap_or_default();
            !listed(&name, LOCAL, LOCAL_PREFIXES)
                && for_client(&name, text.as_bytes(), requested_model)
        })
        .collect();
    if kept.is_empty()
        && event
            .keys()
            .all(|name| matches!(name.as_str(), "type" | "sequence_number"))
    {
        return None;
    }
    if kept.len() == before {
        return Some(Bytes::copy_from_slice(json));
    }
    let kept = to_raw_value(&kept).ok()?;
    event.insert("headers".to_owned(), &kept);
    serde_json::to_vec(&event).map(Bytes::from).ok()
}

fn for_client(name: &str, value: &[u8], requested_model: &str) -> bool {
    let limits = name.starts_with("x-") && LIMITS.iter().any(|part| name.contains(part));
    let rerouted = name == "openai-model" && value != requested_model.as_bytes();
    !limits && !rerouted && !listed(name, RESPONSE, RESPONSE_PREFIXES)
}

/// The headers that speak of more than one hop, and that `keep` wants.
fn filter(headers: &HeaderMap, keep: impl Fn(&str, &HeaderValue) -> bool) -> HeaderMap {
    let connection = headers.get_all(header::CONNECTION);
    let hop: Vec<&str> = connection
        .iter()
        .filter_map(|names| names.to_str().ok())
        .flat_map(|names| names.split(','))
        .map(str::trim)
        .collect();
    headers
        .iter()
        .filter(|(name, value)| {
            let one_hop = hop
                .iter()
                .any(|hop| name.as_str().eq_ignore_ascii_case(hop));
            !one_hop && !listed(name.as_str(), LOCAL, LOCAL_PREFIXES) && keep(name.as_str(), value)
        })
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

fn listed(name: &str, names: &[&str], prefixes: &[&str]) -> bool {
    names.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// The same in memory of its own: values as they arrive are parts of the buffer that they were read into, and keep it whole.
#[must_use]
pub fn detached(headers: &HeaderMap) -> HeaderMap {
    let text: Vec<u8> = headers
        .values()
        .flat_map(HeaderValue::as_bytes)
        .copied()
        .collect();
    let mut text = Bytes::from(text);
    let mut detached = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers {
        let own = HeaderValue::from_maybe_shared(text.split_to(value.len()));
        let mut own = own.expect("it was a value before");
        own.set_sensitive(value.is_sensitive());
        detached.append(name, own);
    }
    detached
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_static(value),
                )
            })
            .collect()
    }

    #[test]
    fn what_is_detached_is_the_same_and_no_part_of_what_it_was_read_into() {
        let read = Bytes::from(vec![b'v'; 64]);
        let part = |range| HeaderValue::from_maybe_shared(read.slice(range)).unwrap();
        let mut headers = HeaderMap::new();
        headers.append("a", part(0..3));
        headers.append("a", part(3..7));
        headers.append("b", HeaderValue::from_static(""));
        let mut secret = part(7..60);
        secret.set_sensitive(true);
        headers.append("c", secret);
        let own = detached(&headers);
        assert_eq!(own, headers);
        assert!(own["c"].is_sensitive() && !own["a"].is_sensitive());
        drop(headers);
        assert!(read.is_unique());
    }

    #[test]
    fn what_a_client_says_about_itself_reaches_upstream() {
        for name in [
            "user-agent",
            "originator",
            "version",
            "session-id",
            "session_id",
            "thread-id",
            "x-codex-installation-id",
            "x-codex-turn-metadata",
            "x-codex-window-id",
            "x-openai-subagent",
            "x-openai-internal-codex-responses-lite",
            "x-stainless-lang",
            "openai-beta",
            "x-request-id",
            "accept-language",
            "idempotency-key",
            "traceparent",
            "tracestate",
        ] {
            let client = headers(&[(name, "v")]);
            assert_eq!(to_upstream_http(&client), client, "{name}");
            assert!(to_upstream_websocket(&client).contains_key(name), "{name}");
        }
    }

    #[test]
    fn credentials_hops_and_bodies_of_a_client_end_here() {
        for name in [
            "authorization",
            "x-api-key",
            "api-key",
            "chatgpt-account-id",
            "x-drawbridge-api-key",
            "cookie",
            "host",
            "content-length",
            "content-encoding",
            "content-type",
            "accept",
            "accept-encoding",
            "connection",
            "keep-alive",
            "te",
            "trailer",
            "transfer-encoding",
            "upgrade",
            "proxy-authorization",
            "proxy-connection",
            "forwarded",
            "via",
            "x-forwarded-for",
            "x-real-ip",
            "true-client-ip",
            "cf-connecting-ip",
            "origin",
            "referer",
            "sec-fetch-mode",
            "sec-websocket-key",
            "sec-websocket-extensions",
            "x-codex-turn-state",
            "expect",
            "baggage",
        ] {
            assert_eq!(
                to_upstream_http(&headers(&[(name, "v")])),
                HeaderMap::new(),
                "{name}"
            );
        }
    }

    #[test]
    fn names_listed_by_connection_are_of_one_hop_in_both_directions() {
        let given = headers(&[
            ("connection", "keep-alive, X-Hop"),
            ("connection", "x-other"),
            ("x-hop", "1"),
            ("x-other", "2"),
            ("x-kept", "3"),
        ]);
        let kept = headers(&[("x-kept", "3")]);
        assert_eq!(to_upstream_http(&given), kept);
        assert_eq!(to_client(&given, "m"), kept);
    }

    #[test]
    fn a_handshake_asks_for_websockets_and_keeps_other_betas() {
        let cases: &[(&[&str], &str)] = &[
            (&[], "responses_websockets=2026-02-06"),
            (
                &["responses_websockets=2026-02-06"],
                "responses_websockets=2026-02-06",
            ),
            (
                &["responses=experimental"],
                "responses_websockets=2026-02-06",
            ),
            (
                &["responses=experimental, other=1"],
                "other=1, responses_websockets=2026-02-06",
            ),
            (
                &["a=1", "responses_websockets=2026-02-06,b=2"],
                "a=1, responses_websockets=2026-02-06, b=2",
            ),
        ];
        for (given, expected) in cases {
            let client = given
                .iter()
                .map(|value| (BETA, HeaderValue::from_static(value)))
                .collect();
            let sent = to_upstream_websocket(&client);
            assert_eq!(
                sent.get_all(BETA).iter().collect::<Vec<_>>(),
                [expected],
                "{given:?}"
            );
        }
    }

    #[test]
    fn a_client_sees_what_helps_it_and_nothing_of_an_account() {
        for (name, value, seen) in [
            ("openai-processing-ms", "12", true),
            ("openai-version", "2020-10-01", true),
            ("x-reasoning-included", "true", true),
            ("retry-after", "5", true),
            ("x-oai-request-id", "req_1", true),
            ("openai-model", "gpt-5.5", true),
            ("openai-model", "gpt-5.4", false),
            ("openai-organization", "org", false),
            ("chatgpt-account-id", "acc", false),
            ("x-codex-turn-state", "t", false),
            ("x-codex-primary-used-percent", "12", false),
            ("x-codex-active-limit", "codex", false),
            ("x-spark-primary-used-percent", "12", false),
            ("x-spark-limit-name", "Spark", false),
            ("x-spark-monthly-used-percent", "12", false),
            ("x-spark-credits-balance", "12", false),
            ("x-ratelimit-remaining-tokens", "12", false),
            ("x-models-etag", "e", false),
            ("x-request-id", "r", false),
            ("content-type", "text/event-stream", false),
            ("content-length", "3", false),
            ("content-encoding", "gzip", false),
            ("transfer-encoding", "chunked", false),
            ("connection", "close", false),
            ("upgrade", "websocket", false),
            ("sec-websocket-accept", "x", false),
            ("set-cookie", "a=b", false),
            ("server", "cloudflare", false),
            ("date", "now", false),
            ("cf-ray", "1", false),
            ("alt-svc", "h3", false),
            ("strict-transport-security", "max-age=1", false),
            ("access-control-allow-origin", "*", false),
        ] {
            assert_eq!(
                to_client(&headers(&[(name, value)]), "gpt-5.5").contains_key(name),
                seen,
                "{name}: {value}"
            );
        }
    }

    #[test]
    fn a_metadata_event_is_filtered_like_headers() {
        let cases = [
            // Nothing to take out: not a byte changes.
            (
                r#"{"type": "response.metadata", "headers": {"x-reasoning-included": "true", "openai-model": "gpt-5.5"}}"#,
                Some(
                    r#"{"type": "response.metadata", "headers": {"x-reasoning-included": "true", "openai-model": "gpt-5.5"}}"#,
                ),
            ),
            (
                r#"{"type":"response.metadata","headers":{"X-Codex-Turn-State":"t","OpenAI-Model":"other","openai-version":1e1}}"#,
                Some(r#"{"headers":{"openai-version":1e1},"type":"response.metadata"}"#),
            ),
            (
                r#"{"type":"response.metadata","metadata":{"a":[1]},"headers":{"x-codex-turn-state":"t"}}"#,
                Some(r#"{"headers":{},"metadata":{"a":[1]},"type":"response.metadata"}"#),
            ),
            (
                r#"{"type":"response.metadata","sequence_number":3,"headers":{"x-codex-turn-state":"t"}}"#,
                None,
            ),
            (
                r#"{"type":"response.metadata","headers":{"openai-model":["gpt-5.5"]}}"#,
                None,
            ),
            (r#"{"type":"response.metadata"}"#, None),
            ("no JSON", None),
        ];
        for (event, expected) in cases {
            let sent = metadata_to_client(event.as_bytes(), "gpt-5.5");
            assert_eq!(sent.as_deref(), expected.map(str::as_bytes), "{event}");
        }
    }
}

//! Whether what stands in front of the service lets everything pass: a WebSocket is opened and sent a frame that is refused, and a large
//! body is refused. Whether event streams are held back shows only in an answer, so it is looked at where turns may be run; how long an idle
//! connection is left alone is not looked at.

use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, StreamExt as _};
use http::{StatusCode, header};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use tokio::time::timeout;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::client::generate_key, protocol::Role},
};

use super::{
    PATIENCE, bare,
    judge::{self, Finding, fail, ok, warn},
    said,
};
use crate::{config, upstream};

/// More than proxies let pass unless they are told to, and far less than a conversation with images.
const BODY: usize = 8 << 20;
/// For a whole turn.
const TURN: Duration = Duration::from_secs(120);
/// For a frame's answer.
const ECHO: Duration = Duration::from_secs(5);

/// Looks; with a `model` it may run a turn, which the service books.
pub(super) async fn run(
    url: &str,
    key: Option<&SecretString>,
    model: Option<&str>,
    config: &config::Upstream,
) -> Vec<Finding> {
    let shown = bare(url);
    let client = match upstream::client(config) {
        Ok(client) => client,
        Err(error) => {
            return vec![fail(
                "through",
                format!("{error:#}"),
                "correct DRAWBRIDGE_CA_FILE",
            )];
        }
    };
    let reached = client
        .get(format!("{url}/livez"))
        .timeout(PATIENCE)
        .send()
        .await;
    match reached {
        Ok(answer) if answer.status() == StatusCode::OK => {}
        Ok(answer) => {
            let seen = format!("{shown}/livez answers {}", answer.status().as_u16());
            return vec![fail(
                "through",
                seen,
                "point it at the client listener (DRAWBRIDGE_LISTEN)",
            )];
        }
        Err(error) => {
            return vec![fail(
                "through",
                format!("{shown}: {}", said(error)),
                "open the way to it",
            )];
        }
    }
    let mut found = vec![
        ok("through", format!("{shown} leads to the service")),
        websocket(&client, url, key).await,
    ];
    if key.is_some() {
        found.push(body(&client, url, key).await);
        if let Some(model) = model {
            found.push(stream(&client, url, key, model).await);
        }
    }
    found
}

fn with(request: reqwest::RequestBuilder, key: Option<&SecretString>) -> reqwest::RequestBuilder {
    let request = request.timeout(PATIENCE);
    match key {
        Some(key) => request.bearer_auth(key.expose_secret()),
        None => request,
    }
}

async fn websocket(client: &reqwest::Client, url: &str, key: Option<&SecretString>) -> Finding {
    let name = "through-ws";
    let request = client
        .get(format!("{url}/backend-api/codex/responses"))
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, generate_key());
    let answer = match with(request, key).send().await {
        Ok(answer) => answer,
        Err(error) => return fail(name, said(error), "let WebSocket upgrades pass"),
    };
    match (answer.status(), key) {
        (StatusCode::SWITCHING_PROTOCOLS, _) => {}
        (StatusCode::UNAUTHORIZED, None) => {
            return warn(
                name,
                "the handshake arrives and wants a key",
                "set DRAWBRIDGE_KEY to see whether frames and bodies pass",
            );
        }
        (StatusCode::UNAUTHORIZED, Some(_)) => {
            return fail(
                name,
                "the key is refused, or does not arrive",
                "check DRAWBRIDGE_KEY, and that Authorization passes",
            );
        }
        (status, _) => {
            let seen = format!("the handshake is answered {}", status.as_u16());
            return fail(
                name,
                seen,
                "pass the Upgrade and Connection headers on, over HTTP/1.1 (426 also if DRAWBRIDGE_UPSTREAM_TRANSPORT=http)",
            );
        }
    }
    let echo = async {
        let upgraded = answer.upgrade().await.ok()?;
        let mut socket = WebSocketStream::from_raw_socket(upgraded, Role::Client, None).await;
        // It has no type, so it is refused, and nothing is begun.
        socket.send(Message::text("{}")).await.ok()?;
        let refused = loop {
            if let Message::Text(text) = socket.next().await?.ok()? {
                break serde_json::from_str::<serde_json::Value>(&text).ok()?;
            }
        };
        drop(socket.close(None).await);
        (refused["type"] == "error").then_some(())
    };
    match timeout(ECHO, echo).await {
        Ok(Some(())) => ok(name, "the handshake passes, and frames both ways"),
        _ => fail(
            name,
            "the handshake passes, but a frame is not answered",
            "let WebSocket frames pass unbuffered, both ways",
        ),
    }
}

async fn body(client: &reqwest::Client, url: &str, key: Option<&SecretString>) -> Finding {
    let name = "through-body";
    // No object, so it is refused, and nothing is begun.
    let mut body = vec![b' '; BODY];
    body.extend_from_slice(b"[]");
    let request = client
        .post(format!("{url}/v1/responses"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(body);
    let mib = BODY >> 20;
    match with(request, key)
        .send()
        .await
        .map(|answer| answer.status())
    {
        Ok(StatusCode::BAD_REQUEST) => ok(name, format!("{mib} MiB pass")),
        Ok(StatusCode::PAYLOAD_TOO_LARGE) => fail(
            name,
            format!("{mib} MiB are refused on the way"),
            "allow bodies of 64 MiB (nginx: client_max_body_size 64m)",
        ),
        Ok(status) => fail(
            name,
            format!("{mib} MiB are answered {}", status.as_u16()),
            "look into the log of what stands in front",
        ),
        Err(error) => fail(
            name,
            format!("{mib} MiB are refused on the way: {}", said(error)),
            "allow bodies of 64 MiB (nginx: client_max_body_size 64m)",
        ),
    }
}

async fn stream(
    client: &reqwest::Client,
    url: &str,
    key: Option<&SecretString>,
    model: &str,
) -> Finding {
    let name = "through-sse";
    let body = json!({ "model": model, "input": "Count from 1 to 30, in digits.", "stream": true });
    let request = client.post(format!("{url}/v1/responses")).json(&body);
    let asked = Instant::now();
    let mut answer = match with(request, key).timeout(TURN).send().await {
        Ok(answer) if answer.status() == StatusCode::OK => answer,
        Ok(answer) => {
            let seen = format!("a turn is answered {}", answer.status().as_u16());
            return fail(name, seen, "`drawbridge explain` with its id says why");
        }
        Err(error) => {
            return fail(
                name,
                said(error),
                "look into the log of what stands in front",
            );
        }
    };
    let mut arrived = Vec::new();
    loop {
        match answer.chunk().await {
            Ok(Some(_)) => arrived.push(asked.elapsed()),
            Ok(None) => return judge::stream(&arrived),
            Err(error) => return fail(name, said(error), "let long answers pass"),
        }
    }
}

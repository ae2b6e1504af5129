//! Turn-state tokens that are damaged, foreign, rotated away or old.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use drawbridge::{
    ids::{LeaseId, ScopeId},
    secret::KeyRing,
    token,
};
use secrecy::ExposeSecret as _;
use serde_json::Value;

use crate::support::cluster::{Answer, Cluster, Plan, script};

const PREFIX: &str = "http_turn_v3_";

/// A token with a bit flipped.
fn flipped(token: &str, bit: usize) -> String {
    let mut bytes = BASE64_URL_SAFE_NO_PAD
        .decode(token.strip_prefix(PREFIX).unwrap())
        .unwrap();
    bytes[bit / 8] ^= 1 << (bit % 8);
    format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes))
}

async fn ask(
    cluster: &Cluster,
    number: usize,
    key: &str,
    token: &str,
    previous: Option<&str>,
) -> Answer {
    let mut body = script("next", false);
    if let Some(id) = previous {
        body["previous_response_id"] = id.into();
    }
    let request = cluster
        .post_at_as(number, "/v1/responses", key)
        .header("x-codex-turn-state", token)
        .json(&body);
    Answer::of(request.send().await.unwrap()).await
}

/// Every lease and every version of it.
async fn leases(cluster: &Cluster) -> Vec<(Value, String)> {
    let query = "select to_jsonb(l), xmin::text from http_bridge_leases l order by lease_id";
    let rows = cluster.client.query(query, &[]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[tokio::test]
async fn every_token_is_answered_as_the_table_says_by_every_replica() {
    let ring = KeyRing::generate("k1").expose_secret().to_owned();
    let mut cluster = Cluster::start_with(Plan::default(), &ring).await;
    let stranger = cluster.home.key("stranger").await;
    let key = cluster.key.clone();
    let first = cluster
        .post_at(0, "/v1/responses")
        .header("session-id", "s")
        .json(&script("first", false));
    let first = Answer::of(first.send().await.unwrap()).await;
    let (id, token) = (first.id().to_owned(), first.token().to_owned());
    assert!(token.starts_with(PREFIX));
    let before = leases(&cluster).await;
    assert_eq!(before.len(), 1);

    // Damaged, forged, oversized, or of another scope: one answer, and nothing is touched.
    let mut refused = vec![
        (key.as_str(), PREFIX.to_owned()),
        (&key, token[..token.len() - 1].to_owned()),
        (&key, format!("{PREFIX}{}", "A".repeat(10 << 10))),
        (&key, format!("{token}\u{e9}")),
        (&stranger, token.clone()),
    ];
    // Of the version, the lease, the scope, the time and the signature.
    for byte in [0, 2, 17, 18, 25, 26, 29, 30, 45] {
        refused.push((&key, flipped(&token, byte * 8 + byte % 8)));
    }
    let mut bodies = Vec::new();
    for (key, token) in &refused {
        for (number, previous) in [(0, None), (1, None), (0, Some(id.as_str())), (1, Some(&id))] {
            let answer = ask(&cluster, number, key, token, previous).await;
            let told = (answer.status, answer.code());
            assert_eq!(
                told,
                (409, "bridge_token_invalid"),
                "{token:.80}: {answer:#?}"
            );
            assert_eq!(answer.headers["x-should-retry"], "false");
            bodies.push(answer.body);
        }
    }
    bodies.dedup();
    assert_eq!(bodies.len(), 1, "they look the same: {bodies:#?}");
    assert_eq!(leases(&cluster).await, before, "no row was touched");
    let turns = cluster.turns().await.len();
    assert_eq!(turns, 1, "nothing was booked");

    // A key that nobody has any more: as if there were no token; what is required is in the snapshot.
    let unknown = flipped(&token, 8);
    let fresh = ask(&cluster, 1, &key, &unknown, None).await;
    fresh.id();
    assert_ne!(fresh.token(), unknown);
    ask(&cluster, 1, &key, &unknown, Some(&id)).await.id();

    // Older than a day: it finds a living session, and the response that is asked for.
    let scope = cluster
        .client
        .query_one("select scope_id::text from turns limit 1", &[]);
    let scope: ScopeId = scope.await.unwrap().get::<_, String>(0).parse().unwrap();
    let lease: LeaseId = before[0].0["lease_id"].as_str().unwrap().parse().unwrap();
    let minted = token::Keys::new(
        KeyRing::parse(&ring.clone().into())
            .unwrap()
            .derived("bridge-turn-token/v3"),
    );
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let old = minted.mint(lease, scope, now.as_secs() as i64 - 25 * 3600);
    for number in [0, 1] {
        ask(&cluster, number, &key, &old, None).await.id();
        ask(&cluster, number, &key, &old, Some(&id)).await.id();
    }

    // The API key rotates: the conversation is its scope's, not the secret's.
    let rotated = cluster
        .home
        .ok(&["keys", "rotate", "cluster", "--quiet"])
        .await;
    let rotated = rotated.trim_end().to_owned();
    let attempts = cluster.home.upstream.attempts().len();
    for number in [0, 1] {
        let answer = ask(&cluster, number, &rotated, &token, None).await;
        answer.id();
        assert_eq!(answer.token(), token, "the same conversation");
    }
    let sockets: Vec<_> = cluster.home.upstream.attempts()[attempts..]
        .iter()
        .map(|attempt| attempt.socket)
        .collect();
    assert_eq!(sockets[0], sockets[1], "the same socket");

    // The master key rotates, one replica after the other: old tokens are good while their key is in the ring.
    let newer = format!("{},{ring}", KeyRing::generate("k2").expose_secret());
    for number in [0, 1] {
        cluster.stop(number).await;
        cluster.set(number, "DRAWBRIDGE_MASTER_KEYS", newer.clone());
        cluster.serve(number).await;
    }
    for number in [0, 1] {
        let answer = ask(&cluster, number, &rotated, &token, None).await;
        answer.id();
        assert_eq!(answer.token(), token);
        ask(&cluster, number, &rotated, &token, Some(&id))
            .await
            .id();
    }
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

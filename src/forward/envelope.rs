//! What travels beside the body, sealed: pure functions of bytes, keys and a time.
//!
//! Text = base64url of: key id (1) | HMAC-SHA-256 (32) | version (1) | database time in ms (8) | SHA-256 of the body (32) | JSON. The MAC
//! covers everything behind it and is checked before anything of it is believed. There is no memory of what was seen: a replay within
//! the window meets the turn's row in the ledger.

use std::{fmt, sync::Arc};

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::Sha256;

use crate::{
    ids::{ApiKeyId, BootId, LeaseId, ScopeId, TurnId},
    secret::KeyRing,
};

const VERSION: u8 = 1;
const MAC: usize = 32;
/// How far an envelope's time may lie from ours, in ms of database time.
pub(super) const WINDOW: i64 = 30_000;
/// As text. With the rest of a request's head it stays below what listeners read.
pub(super) const TEXT_BYTES: usize = 56 << 10;

/// What the caller says about a turn. Version, time and the body's hash are added when it is sealed.
#[derive(Clone, Deserialize, Serialize)]
pub struct Envelope {
    /// Who calls.
    pub origin: BootId,
    /// The incarnation that is called; no other serves it.
    pub target: BootId,
    /// The session.
    pub lease: LeaseId,
    /// The lease's generation when the caller read it.
    pub generation: i64,
    /// Whose conversation it is.
    pub scope: ScopeId,
    /// The client's key; the callee looks up itself what it may do.
    pub api_key: Option<ApiKeyId>,
    /// The turn's id, drawn by the caller. It is served once.
    pub turn: TurnId,
    /// What the engine adds: opaque here.
    pub details: Box<RawValue>,
}

/// Details hold what the client sent.
impl fmt::Debug for Envelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envelope")
            .field("origin", &self.origin)
            .field("target", &self.target)
            .field("lease", &self.lease)
            .field("generation", &self.generation)
            .field("turn", &self.turn)
            .finish_non_exhaustive()
    }
}

/// Authenticates replicas to each other: the installation's current master key signs, every one verifies. Cheap to clone.
#[derive(Clone)]
pub struct Keys(Arc<[(u8, Hmac<Sha256>)]>);

impl Keys {
    /// The keys of this purpose.
    #[must_use]
    pub fn new(ring: &KeyRing) -> Self {
        let keys = ring.derived("bridge-forward/v1").into_iter();
        Self(keys.map(|(id, key)| (id, hmac(&key))).collect())
    }

    fn sign(&self, message: &[u8]) -> (u8, [u8; MAC]) {
        let (id, key) = self.0.first().expect("a ring has at least one key");
        let mac = key.clone().chain_update(message).finalize();
        (*id, mac.into_bytes().into())
    }

    fn verify(&self, id: u8, mac: &[u8], message: &[u8]) -> Option<()> {
        let (_, key) = self.0.iter().find(|(other, _)| *other == id)?;
        let key = key.clone().chain_update(message);
        key.verify_slice(mac).ok()
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(..)")
    }
}

fn hmac(key: &[u8; 32]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

/// Why an envelope, or the body with it, is not served. Told to the log only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Invalid {
    #[error("not sealed by a replica of this installation")]
    Seal,
    #[error("of another version")]
    Version,
    #[error("not of now")]
    Time,
    #[error("for another incarnation")]
    Target,
    #[error("cut, too large, or not the body that was sealed")]
    Body,
}

/// An authentic envelope for us; the body is still to be compared.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) envelope: Envelope,
    pub(super) body_sha256: [u8; 32],
}

/// Seals an envelope at `now` (database time in ms); `None` if it is too large to travel.
pub(super) fn seal(
    keys: &Keys,
    envelope: &Envelope,
    body_sha256: &[u8; 32],
    now: i64,
) -> Option<String> {
    let mut message = vec![VERSION];
    message.extend_from_slice(&now.to_be_bytes());
    message.extend_from_slice(body_sha256);
    serde_json::to_writer(&mut message, envelope).ok()?;
    let (id, mac) = keys.sign(&message);
    let text = BASE64_URL_SAFE_NO_PAD.encode([&[id], &mac[..], &message].concat());
    (text.len() <= TEXT_BYTES).then_some(text)
}

/// Opens what [`seal`] made for `me` within [`WINDOW`] of `now`.
pub(super) fn open(keys: &Keys, text: &[u8], me: BootId, now: i64) -> Result<Opened, Invalid> {
    let bytes = BASE64_URL_SAFE_NO_PAD
        .decode(text)
        .map_err(|_| Invalid::Seal)?;
    let (&id, rest) = bytes.split_first().ok_or(Invalid::Seal)?;
    let (mac, message) = rest.split_at_checked(MAC).ok_or(Invalid::Seal)?;
    keys.verify(id, mac, message).ok_or(Invalid::Seal)?;

    let rest = message.strip_prefix(&[VERSION]).ok_or(Invalid::Version)?;
    let (sent_at, rest) = rest.split_first_chunk().ok_or(Invalid::Version)?;
    let (body_sha256, json) = rest.split_first_chunk().ok_or(Invalid::Version)?;
    if now.abs_diff(i64::from_be_bytes(*sent_at)) > WINDOW.unsigned_abs() {
        return Err(Invalid::Time);
    }
    let envelope: Envelope = serde_json::from_slice(json).map_err(|_| Invalid::Version)?;
    if envelope.target != me {
        return Err(Invalid::Target);
    }
    Ok(Opened {
        envelope,
        body_sha256: *body_sha256,
    })
}

#[cfg(test)]
mod tests {
    use secrecy::SecretString;

    use super::*;

    const NOW: i64 = 1_800_000_000_000;
    const HASH: [u8; 32] = [7; 32];

    fn ring(ids: &[(&str, u8)]) -> KeyRing {
        let entry = |(id, byte): &(&str, u8)| {
            let key = base64::prelude::BASE64_STANDARD.encode([*byte; 32]);
            format!("{id}:{key}")
        };
        let text = ids.iter().map(entry).collect::<Vec<_>>().join(",");
        KeyRing::parse(&SecretString::from(text)).unwrap()
    }

    fn keys() -> Keys {
        Keys::new(&ring(&[("a", 1)]))
    }

    fn envelope() -> Envelope {
        Envelope {
            origin: BootId::new(),
            target: BootId::new(),
            lease: LeaseId::new(),
            generation: 8,
            scope: ScopeId::new(),
            api_key: Some(ApiKeyId::new()),
            turn: TurnId::new(),
            details: RawValue::from_string(r#"{"a":[1, 2]}"#.to_owned()).unwrap(),
        }
    }

    fn same(a: &Envelope, b: &Envelope) -> bool {
        serde_json::to_string(a).unwrap() == serde_json::to_string(b).unwrap()
    }

    #[test]
    fn what_is_sealed_opens_at_its_target_as_it_was() {
        let envelope = envelope();
        let text = seal(&keys(), &envelope, &HASH, NOW).unwrap();
        let opened = open(&keys(), text.as_bytes(), envelope.target, NOW).unwrap();
        assert!(same(&opened.envelope, &envelope));
        assert_eq!(opened.body_sha256, HASH);
    }

    #[test]
    fn any_flipped_bit_is_refused() {
        let envelope = envelope();
        let text = seal(&keys(), &envelope, &HASH, NOW).unwrap();
        let sealed = BASE64_URL_SAFE_NO_PAD.decode(text).unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let text = BASE64_URL_SAFE_NO_PAD.encode(flipped);
            let error = open(&keys(), text.as_bytes(), envelope.target, NOW).unwrap_err();
            assert_eq!(error, Invalid::Seal, "bit {bit}");
        }
    }

    #[test]
    fn every_prefix_and_every_garbage_is_refused() {
        let envelope = envelope();
        let text = seal(&keys(), &envelope, &HASH, NOW).unwrap();
        for length in 0..text.len() {
            let prefix = &text.as_bytes()[..length];
            assert!(open(&keys(), prefix, envelope.target, NOW).is_err());
        }
        for garbage in [vec![b'A'; 10_000], vec![0xff; 10_000], vec![b'{'; 10_000]] {
            let error = open(&keys(), &garbage, envelope.target, NOW).unwrap_err();
            assert_eq!(error, Invalid::Seal);
        }
    }

    #[test]
    fn the_time_and_the_target_are_checked() {
        let envelope = envelope();
        let me = envelope.target;
        let text = seal(&keys(), &envelope, &HASH, NOW).unwrap();
        for (at, now, refused) in [
            (me, NOW, None),
            (me, NOW + 30_000, None),
            (me, NOW - 30_000, None),
            (me, NOW + 31_000, Some(Invalid::Time)),
            (me, NOW - 31_000, Some(Invalid::Time)),
            (me, i64::MIN, Some(Invalid::Time)),
            (envelope.origin, NOW, Some(Invalid::Target)),
        ] {
            let opened = open(&keys(), text.as_bytes(), at, now);
            assert_eq!(opened.err(), refused, "{at} {now}");
        }
    }

    #[test]
    fn a_ring_that_rotates_verifies_both_ways_and_a_foreign_one_never() {
        let (old, new) = (("old", 1), ("new", 2));
        let envelope = envelope();
        for (signs, opens, fine) in [
            (&[old][..], &[old, new][..], true),
            (&[old, new], &[new, old], true),
            (&[new, old], &[old, new], true),
            (&[new], &[old, new], true),
            (&[new], &[old], false),
            (&[("old", 3)], &[old], false),
        ] {
            let text = seal(&Keys::new(&ring(signs)), &envelope, &HASH, NOW).unwrap();
            let keys = Keys::new(&ring(opens));
            let opened = open(&keys, text.as_bytes(), envelope.target, NOW);
            assert_eq!(opened.is_ok(), fine, "{signs:?} {opens:?}");
        }
    }

    #[test]
    fn another_version_is_refused_although_it_is_authentic() {
        let mut message = vec![VERSION + 1];
        message.extend_from_slice(&NOW.to_be_bytes());
        let (id, mac) = keys().sign(&message);
        let text = BASE64_URL_SAFE_NO_PAD.encode([&[id], &mac[..], &message].concat());
        let error = open(&keys(), text.as_bytes(), BootId::new(), NOW).unwrap_err();
        assert_eq!(error, Invalid::Version);
    }

    #[test]
    fn what_a_listener_would_not_read_is_not_sealed() {
        let mut envelope = envelope();
        let text = format!("\"{}\"", "x".repeat(TEXT_BYTES));
        envelope.details = RawValue::from_string(text).unwrap();
        assert!(seal(&keys(), &envelope, &HASH, NOW).is_none());
    }
}

//! What travels beside a turn, signed.

use std::sync::Arc;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde::{Deserialize, Serialize};
use sha2::Sha256;

use super::Refusal;
use crate::{
    ids::{ApiKeyId, BootId, LeaseId, ScopeId, TurnId},
    secret::{self, KeyRing},
};

const VERSION: u8 = 1;
/// How far the clocks of two replicas, both corrected to the database's, may be apart, in milliseconds.
const WINDOW: i64 = 30_000;

/// A turn on its way from one replica to another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    version: u8,
    /// Who sends it.
    pub origin: BootId,
    /// Who owns the lease.
    pub target: BootId,
    /// The lease.
    pub lease: LeaseId,
    /// Under which generation it was seen.
    pub generation: i64,
    /// In whose conversations.
    pub scope: ScopeId,
    /// Under which key.
    pub api_key: Option<ApiKeyId>,
    /// The request.
    pub turn: TurnId,
    /// When, in the database's milliseconds.
    sent_at: i64,
    /// SHA-256 of all that it carries.
    digest: [u8; 32],
}

/// Whom and what an envelope is about.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// As in [`Envelope`].
    pub origin: BootId,
    /// As in [`Envelope`].
    pub target: BootId,
    /// As in [`Envelope`].
    pub lease: LeaseId,
    /// As in [`Envelope`].
    pub generation: i64,
    /// As in [`Envelope`].
    pub scope: ScopeId,
    /// As in [`Envelope`].
    pub api_key: Option<ApiKeyId>,
    /// As in [`Envelope`].
    pub turn: TurnId,
}

/// The keys that sign envelopes; the current one signs, each verifies. Cheap to clone.
#[derive(Clone)]
pub struct Keys(Arc<[(u8, Hmac<Sha256>)]>);

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|(id, _)| id))
            .finish()
    }
}

impl Keys {
    /// The keys of an installation.
    #[must_use]
    pub fn new(ring: &KeyRing) -> Self {
        let keys = ring.derived("bridge-forward/v1").into_iter();
        Self(
            keys.map(|(id, key)| {
                let mac = Hmac::new_from_slice(&key).expect("HMAC takes keys of any length");
                (id, mac)
            })
            .collect(),
        )
    }

    /// The two headers of an envelope.
    pub(super) fn sign(&self, envelope: &Envelope) -> (String, String) {
        let json = serde_json::to_vec(envelope).expect("ids and numbers are JSON");
        let text = BASE64_URL_SAFE_NO_PAD.encode(json);
        let (id, mac) = self.0.first().expect("a key ring has at least one key");
        let mac = mac.clone().chain_update(&text).finalize().into_bytes();
        let mac = format!("{id}.{}", BASE64_URL_SAFE_NO_PAD.encode(mac));
        (text, mac)
    }

    /// The envelope, if it is one of ours, for `me`, of now, and about `payload`.
    pub(super) fn open(
        &self,
        text: &[u8],
        mac: &str,
        me: BootId,
        now: i64,
        payload: &[u8],
    ) -> Result<Envelope, Refusal> {
        let invalid = Refusal::Invalid;
        let (id, mac) = mac.split_once('.').ok_or(invalid)?;
        let id: u8 = id.parse().map_err(|_| invalid)?;
        let mac = BASE64_URL_SAFE_NO_PAD.decode(mac).map_err(|_| invalid)?;
        let (_, key) = self.0.iter().find(|(key, _)| *key == id).ok_or(invalid)?;
        key.clone()
            .chain_update(text)
            .verify_slice(&mac)
            .map_err(|_| invalid)?;
        let json = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| invalid)?;
        let envelope: Envelope = serde_json::from_slice(&json).map_err(|_| invalid)?;
        let late = envelope.sent_at.abs_diff(now) > WINDOW.unsigned_abs();
        if envelope.version != VERSION || late || envelope.digest != secret::digest(&[payload]) {
            return Err(invalid);
        }
        // A peer that remembers an incarnation before this one reads the row again.
        if envelope.target != me {
            return Err(Refusal::NotOwner);
        }
        Ok(envelope)
    }
}

impl Envelope {
    /// An envelope about `payload`, sent at `now` (the database's milliseconds).
    #[must_use]
    pub fn new(about: About, now: i64, payload: &[u8]) -> Self {
        Self {
            version: VERSION,
            origin: about.origin,
            target: about.target,
            lease: about.lease,
            generation: about.generation,
            scope: about.scope,
            api_key: about.api_key,
            turn: about.turn,
            sent_at: now,
            digest: secret::digest(&[payload]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000;

    fn keys() -> Keys {
        Keys::new(&KeyRing::parse(&KeyRing::generate("k1")).unwrap())
    }

    fn about() -> About {
        About {
            origin: BootId::new(),
            target: BootId::new(),
            lease: LeaseId::new(),
            generation: 7,
            scope: ScopeId::new(),
            api_key: None,
            turn: TurnId::new(),
        }
    }

    #[test]
    fn an_envelope_opens_at_its_target_within_the_window() {
        let (keys, about) = (keys(), about());
        let envelope = Envelope::new(about, NOW, b"body");
        let (text, mac) = keys.sign(&envelope);
        let open = |me, now, payload| keys.open(text.as_bytes(), &mac, me, now, payload);
        assert_eq!(open(about.target, NOW, b"body"), Ok(envelope.clone()));
        assert_eq!(open(about.target, NOW + WINDOW, b"body"), Ok(envelope));
        for (me, now, payload, refusal) in [
            (about.origin, NOW, b"body", Refusal::NotOwner),
            (about.target, NOW + WINDOW + 1, b"body", Refusal::Invalid),
            (about.target, NOW - WINDOW - 1, b"body", Refusal::Invalid),
            (about.target, NOW, b"bodY", Refusal::Invalid),
        ] {
            assert_eq!(open(me, now, payload), Err(refusal));
        }
    }

    #[test]
    fn a_forged_envelope_does_not_open() {
        let (keys, about) = (keys(), about());
        let (text, mac) = keys.sign(&Envelope::new(about, NOW, b""));
        let (_, foreign) = self::keys().sign(&Envelope::new(about, NOW, b""));
        let long = "A".repeat(10_000);
        for mac in [foreign.as_str(), "", "1", ".", "300.AA", "1.AA", &long] {
            let opened = keys.open(text.as_bytes(), mac, about.target, NOW, b"");
            assert_eq!(opened, Err(Refusal::Invalid), "{}", mac.len());
        }
        for index in 0..text.len() {
            let mut flipped = text.clone().into_bytes();
            flipped[index] ^= 1;
            let opened = keys.open(&flipped, &mac, about.target, NOW, b"");
            assert_eq!(opened, Err(Refusal::Invalid), "byte {index}");
        }
    }
}

//! Turn-state tokens: the signed value of `x-codex-turn-state`, by which a client comes back to its conversation.
//!
//! A token names a lease within a scope and grants nothing else. It says neither who owns the lease nor under which generation, so it stays
//! good over takeover, restart and the rotation of master keys (while the old one is in the ring). Time is a parameter, in seconds of the
//! database's clock.
//!
//! Layout: version 3, key id, lease (16), scope tag (8), minutes since the epoch (4, big endian), HMAC-SHA-256 cut to 16; base64url.

use std::fmt;

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use uuid::Uuid;

use crate::ids::{LeaseId, ScopeId};

/// What all tokens of ours begin with, whatever their version.
const FAMILY: &[u8] = b"http_turn_";
const PREFIX: &str = "http_turn_v3_";
const VERSION: u8 = 3;
const SIGNED: usize = 1 + 1 + 16 + 8 + 4;
const LENGTH: usize = SIGNED + 16;
/// Characters of the encoded part.
const ENCODED: usize = (LENGTH * 4).div_ceil(3);
/// An older token finds a conversation only where nothing else would.
const MAX_AGE_MINUTES: u32 = 24 * 60;

/// What a client presented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Nothing of ours; also a token from before the caller had a key.
    None,
    /// It names this lease.
    Good(LeaseId),
    /// It names this lease, and is older than a day.
    Old(LeaseId),
    /// Ours by its prefix, and damaged, forged, or of another scope: the three look the same from outside.
    Invalid,
    /// Made under a master key that is not in the ring.
    UnknownKey,
}

/// The keys that sign tokens, the current one first. Cheap to clone.
#[derive(Clone)]
pub struct Keys(std::sync::Arc<[Key]>);

struct Key {
    id: u8,
    sign: Hmac<Sha256>,
    tag: Hmac<Sha256>,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|key| key.id))
            .finish()
    }
}

impl Keys {
    /// Keys by their one-byte ids, the one that signs first.
    pub fn new(keys: impl IntoIterator<Item = (u8, [u8; 32])>) -> Self {
        let derive = |key: &[u8; 32], label: &[u8]| {
            let derived = mac(key).chain_update(label).finalize().into_bytes();
            mac(&derived.into())
        };
        let keys = keys.into_iter().map(|(id, key)| Key {
            id,
            sign: derive(&key, b"bridge-turn-token/v3/sign"),
            tag: derive(&key, b"bridge-turn-token/v3/scope"),
        });
        Self(keys.collect())
    }

    /// The token of a lease.
    ///
    /// # Panics
    /// Without a key: a ring has at least one.
    #[must_use]
    pub fn mint(&self, lease: LeaseId, scope: ScopeId, now: i64) -> String {
        let key = self.0.first().expect("a key ring has at least one key");
        let mut bytes = Vec::with_capacity(LENGTH);
        bytes.extend([VERSION, key.id]);
        bytes.extend(lease.0.as_bytes());
        bytes.extend(key.tag_of(scope));
        bytes.extend(minutes(now).to_be_bytes());
        let mac = key
            .sign
            .clone()
            .chain_update(&bytes)
            .finalize()
            .into_bytes();
        bytes.extend(&mac[..LENGTH - SIGNED]);
        format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(bytes))
    }

    /// What the value that a client presented says to this scope.
    #[must_use]
    pub fn read(&self, value: Option<&[u8]>, scope: ScopeId, now: i64) -> Token {
        let Some(value) = value.filter(|value| value.starts_with(FAMILY)) else {
            return Token::None;
        };
        let decoded = value
            .strip_prefix(PREFIX.as_bytes())
            .filter(|encoded| encoded.len() == ENCODED)
            .and_then(|encoded| BASE64_URL_SAFE_NO_PAD.decode(encoded).ok());
        let Some(Ok(bytes)) = decoded.map(<[u8; LENGTH]>::try_from) else {
            return Token::Invalid;
        };
        if bytes[0] != VERSION {
            return Token::Invalid;
        }
        let Some(key) = self.0.iter().find(|key| key.id == bytes[1]) else {
            return Token::UnknownKey;
        };
        let signed = key.sign.clone().chain_update(&bytes[..SIGNED]);
        if signed.verify_truncated_left(&bytes[SIGNED..]).is_err() {
            return Token::Invalid;
        }
        if bytes[18..26] != key.tag_of(scope) {
            // Whoever had no key yesterday may have one today.
            return if bytes[18..26] == key.tag_of(ScopeId::ANONYMOUS) {
                Token::None
            } else {
                Token::Invalid
            };
        }
        let lease = LeaseId(Uuid::from_slice(&bytes[2..18]).unwrap_or_default());
        let issued = u32::from_be_bytes([bytes[26], bytes[27], bytes[28], bytes[29]]);
        if minutes(now).saturating_sub(issued) > MAX_AGE_MINUTES {
            Token::Old(lease)
        } else {
            Token::Good(lease)
        }
    }
}

impl Key {
    fn tag_of(&self, scope: ScopeId) -> [u8; 8] {
        let mac = self.tag.clone().chain_update(scope.0.as_bytes());
        let mut tag = [0; 8];
        tag.copy_from_slice(&mac.finalize().into_bytes()[..8]);
        tag
    }
}

fn mac(key: &[u8; 32]) -> Hmac<Sha256> {
    Hmac::new_from_slice(key).expect("HMAC takes keys of any length")
}

fn minutes(seconds: i64) -> u32 {
    u32::try_from(seconds / 60).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: i64 = 1_800_000_000;

    fn keys() -> Keys {
        Keys::new([(7, [1; 32]), (9, [2; 32])])
    }

    fn scope() -> ScopeId {
        ScopeId(Uuid::from_u128(5))
    }

    fn read(keys: &Keys, text: &[u8]) -> Token {
        keys.read(Some(text), scope(), NOW)
    }

    #[test]
    fn a_token_names_its_lease_to_its_scope_for_a_day() {
        let lease = LeaseId::new();
        let token = keys().mint(lease, scope(), NOW);
        let at = |now| keys().read(Some(token.as_bytes()), scope(), now);
        assert_eq!(at(NOW), Token::Good(lease));
        assert_eq!(at(NOW - 600), Token::Good(lease), "clocks differ");
        assert_eq!(at(NOW + 24 * 3600), Token::Good(lease));
        assert_eq!(at(NOW + 24 * 3600 + 61), Token::Old(lease));
    }

    #[test]
    fn a_token_survives_the_rotation_of_keys_until_its_key_is_gone() {
        let lease = LeaseId::new();
        let token = Keys::new([(9, [2; 32])]).mint(lease, scope(), NOW);
        assert_eq!(read(&keys(), token.as_bytes()), Token::Good(lease));
        let without = Keys::new([(7, [1; 32])]);
        assert_eq!(read(&without, token.as_bytes()), Token::UnknownKey);
    }

    #[test]
    fn another_scope_learns_nothing() {
        let lease = LeaseId::new();
        let token = keys().mint(lease, ScopeId::new(), NOW);
        assert_eq!(read(&keys(), token.as_bytes()), Token::Invalid);
        let before = keys().mint(lease, ScopeId::ANONYMOUS, NOW);
        assert_eq!(read(&keys(), before.as_bytes()), Token::None);
    }

    #[test]
    fn what_is_not_a_token_is_either_opaque_or_invalid() {
        let long = [b"http_turn_v3_".as_slice(), &[b'A'; 10_000]].concat();
        let cases: [(&[u8], Token); 8] = [
            (b"", Token::None),
            (b"upstream-value", Token::None),
            (b"\xff\xfe", Token::None),
            (b"http_turn_", Token::Invalid),
            (b"http_turn_v2_AAAA", Token::Invalid),
            (b"http_turn_v3_", Token::Invalid),
            (b"http_turn_v3_\xff\xff", Token::Invalid),
            (&long, Token::Invalid),
        ];
        for (value, expected) in cases {
            assert_eq!(read(&keys(), value), expected, "{} bytes", value.len());
        }
        assert_eq!(keys().read(None, scope(), NOW), Token::None);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let token = keys().mint(LeaseId::new(), scope(), NOW);
        let bytes = BASE64_URL_SAFE_NO_PAD
            .decode(&token[PREFIX.len()..])
            .unwrap();
        for bit in 0..LENGTH * 8 {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let text = format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(&flipped));
            let expected = if bit / 8 == 1 {
                Token::UnknownKey
            } else {
                Token::Invalid
            };
            assert_eq!(read(&keys(), text.as_bytes()), expected, "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn nothing_but_a_token_passes(value in proptest::collection::vec(any::<u8>(), 0..100)) {
            let text = [PREFIX.as_bytes(), &value].concat();
            prop_assert_eq!(read(&keys(), &text), Token::Invalid);
        }

        #[test]
        fn a_cut_token_is_invalid(length in 0..PREFIX.len() + ENCODED) {
            let token = keys().mint(LeaseId(Uuid::from_u128(3)), scope(), NOW);
            let cut = read(&keys(), &token.as_bytes()[..length]);
            let expected = if length < FAMILY.len() { Token::None } else { Token::Invalid };
            prop_assert_eq!(cut, expected);
        }
    }
}

//! Sealing of what must not be readable in the database, and keyed hashes of what must be found again.
//!
//! A [`KeyRing`] holds the master keys of the installation: the first seals, every one opens. Each purpose uses a key of its own, derived by
//! HKDF-SHA-256. Sealed values are XChaCha20-Poly1305 with the table, row and column as associated data, so a value copied to another
//! row does not open. Nothing here prints a secret.

use std::{fmt, sync::Arc};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use chacha20poly1305::{
    KeyInit, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use hmac::{Hmac, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

/// Why a value could not be opened or a ring not be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The ring has no entry, an entry is not `id:base64(32 bytes)`, an id repeats, or two keys derive the same one-byte id.
    #[error("master key {0}: {1}")]
    Ring(usize, &'static str),
    /// Sealed with a key that this ring does not hold.
    #[error("sealed with master key `{0}`, which is not in DRAWBRIDGE_MASTER_KEYS")]
    UnknownKey(String),
    /// Damaged, or moved from another row, or a key of the same id but another value.
    #[error("a sealed value does not open: damaged, moved, or another key under the same id")]
    Broken,
}

/// Where a sealed value lives: part of what is authenticated.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// Table name.
    pub table: &'static str,
    /// The row's key as text.
    pub row: &'a str,
    /// Column name.
    pub column: &'static str,
}

/// The master keys of the installation, current first. Cheap to clone.
#[derive(Clone)]
pub struct KeyRing(Arc<[MasterKey]>);

struct MasterKey {
    id: String,
    /// Input of every derivation; never used directly.
    root: Zeroizing<[u8; 32]>,
    seal: XChaCha20Poly1305,
}

const FORMAT: u8 = 1;
const NONCE: usize = 24;

impl KeyRing {
    /// Reads `id:base64(32 bytes)`, comma separated, the current one first; ids are `[a-z0-9]{1,16}`.
    ///
    /// # Errors
    /// [`Error::Ring`] naming the position (from 1), never the key.
    pub fn parse(text: &SecretString) -> Result<Self, Error> {
        let mut keys: Vec<MasterKey> = Vec::new();
        for (index, entry) in text.expose_secret().split(',').map(str::trim).enumerate() {
            let refuse = |why| Error::Ring(index + 1, why);
            let (id, encoded) = entry
                .split_once(':')
                .ok_or_else(|| refuse("is not `id:base64`"))?;
            if id.is_empty()
                || id.len() > 16
                || !id
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
            {
                return Err(refuse("has an id that is not 1 to 16 of a-z and 0-9"));
            }
            let bytes = Zeroizing::new(
                BASE64_STANDARD
                    .decode(encoded)
                    .map_err(|_| refuse("is not base64"))?,
            );
            let root =
                <[u8; 32]>::try_from(bytes.as_slice()).map_err(|_| refuse("is not 32 bytes"))?;
            let key = MasterKey::new(id.to_owned(), root);
            if keys.iter().any(|other| other.id == key.id) {
                return Err(refuse("repeats an id"));
            }
            if keys.iter().any(|other| other.short_id() == key.short_id()) {
                return Err(refuse(
                    "shares its short id with another key; draw a new one",
                ));
            }
            keys.push(key);
        }
        Ok(Self(keys.into()))
    }

    /// A text that [`KeyRing::parse`] reads, with one new random key.
    #[must_use]
    pub fn generate(id: &str) -> SecretString {
        let root = Zeroizing::new(rand::random::<[u8; 32]>());
        SecretString::from(format!("{id}:{}", BASE64_STANDARD.encode(*root)))
    }

    /// Id of the key that seals.
    #[must_use]
    pub fn current_id(&self) -> &str {
        &self.current().id
    }

    /// `id:fingerprint` of every key, the one that seals first. They tell keys of one id apart and say nothing of their values.
    #[must_use]
    pub fn fingerprints(&self) -> Vec<String> {
        let fingerprint = |key: &MasterKey| {
            let [a, b, c, d, ..] = derive(&key.root, "fingerprint");
            format!("{}:{:08x}", key.id, u32::from_be_bytes([a, b, c, d]))
        };
        self.0.iter().map(fingerprint).collect()
    }

    /// Ids of every key, the one that seals first.
    pub fn ids(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|key| key.id.as_str())
    }

    /// Seals `plain` for one place.
    #[must_use]
    pub fn seal(&self, place: Place<'_>, plain: &[u8]) -> Vec<u8> {
        let key = self.current();
        let nonce = rand::random::<[u8; NONCE]>();
        let sealed = key
            .seal
            .encrypt(
                &XNonce::from(nonce),
                Payload {
                    msg: plain,
                    aad: &associated(place, &key.id),
                },
            )
            .expect("XChaCha20-Poly1305 refuses only messages over 256 GiB");
        let mut out = Vec::with_capacity(2 + key.id.len() + NONCE + sealed.len());
        out.push(FORMAT);
        out.push(u8::try_from(key.id.len()).expect("ids have at most 16 bytes"));
        out.extend_from_slice(key.id.as_bytes());
        out.extend_from_slice(&nonce);
        out.extend_from_slice(&sealed);
        out
    }

    /// Opens what [`KeyRing::seal`] made for the same place, with whichever key of the ring sealed it.
    ///
    /// # Errors
    /// [`Error::UnknownKey`] or [`Error::Broken`].
    pub fn open(&self, place: Place<'_>, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, Error> {
        let (id, rest) = split(sealed).ok_or(Error::Broken)?;
        let (nonce, sealed) = rest.split_first_chunk::<NONCE>().ok_or(Error::Broken)?;
        let key = self
            .0
            .iter()
            .find(|key| key.id == id)
            .ok_or_else(|| Error::UnknownKey(id.to_owned()))?;
        key.seal
            .decrypt(
                &XNonce::from(*nonce),
                Payload {
                    msg: sealed,
                    aad: &associated(place, id),
                },
            )
            .map(Zeroizing::new)
            .map_err(|_| Error::Broken)
    }

    /// [`KeyRing::seal`] for text.
    #[must_use]
    pub fn seal_text(&self, place: Place<'_>, plain: &SecretString) -> Vec<u8> {
        self.seal(place, plain.expose_secret().as_bytes())
    }

    /// [`KeyRing::open`] for text.
    ///
    /// # Errors
    /// As [`KeyRing::open`]; [`Error::Broken`] also when it is not UTF-8.
    pub fn open_text(&self, place: Place<'_>, sealed: &[u8]) -> Result<SecretString, Error> {
        let plain = self.open(place, sealed)?;
        std::str::from_utf8(&plain)
            .map(SecretString::from)
            .map_err(|_| Error::Broken)
    }

    /// One key for `purpose` per master key, with its one-byte id, current first. No two purposes share a key.
    #[must_use]
    pub fn derived(&self, purpose: &str) -> Vec<(u8, [u8; 32])> {
        let info = format!("for/{purpose}");
        self.0
            .iter()
            .map(|key| (key.short_id(), derive(&key.root, &info)))
            .collect()
    }

    fn current(&self) -> &MasterKey {
        self.0
            .first()
            .expect("`parse` yields at least one key or an error")
    }
}

/// The beginning of a sealed value up to its nonce: no other sealing has the same.
#[must_use]
pub fn head(sealed: &[u8]) -> &[u8] {
    let head = split(sealed).map_or(0, |(id, _)| 2 + id.len() + NONCE);
    &sealed[..head.min(sealed.len())]
}

/// The id of the key that sealed a value, and what follows it.
fn split(sealed: &[u8]) -> Option<(&str, &[u8])> {
    let [FORMAT, length, rest @ ..] = sealed else {
        return None;
    };
    let (id, rest) = rest.split_at_checked(usize::from(*length))?;
    Some((std::str::from_utf8(id).ok()?, rest))
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.0.iter().map(|key| &key.id))
            .finish()
    }
}

impl MasterKey {
    fn new(id: String, root: [u8; 32]) -> Self {
        let root = Zeroizing::new(root);
        let seal = XChaCha20Poly1305::new(&derive(&root, "seal").into());
        Self { id, root, seal }
    }

    /// The key id that fits in a turn-state token.
    fn short_id(&self) -> u8 {
        derive(&self.root, "kid")[0]
    }
}

/// A random secret of the installation under which API keys and e-mails are hashed. It is stored sealed and never changes, so that keys
/// survive the rotation of master keys.
#[derive(Clone)]
pub struct Pepper(Zeroizing<[u8; 32]>);

impl Pepper {
    /// Wraps the 32 bytes that the installation keeps.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// HMAC-SHA-256 of `value` for one purpose.
    #[must_use]
    pub fn hash(&self, purpose: &str, value: &[u8]) -> [u8; 32] {
        mac(&self.0, &[&framed(purpose.as_bytes()), value])
    }
}

impl fmt::Debug for Pepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pepper(..)")
    }
}

/// SHA-256 of length-framed parts: no two different lists of parts hash alike.
#[must_use]
pub fn digest(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(framed(part));
    }
    hash.finalize().into()
}

/// HKDF-SHA-256 of one block: an empty salt, `purpose` as info.
fn derive(root: &[u8; 32], purpose: &str) -> [u8; 32] {
    let pseudo_random = Zeroizing::new(mac(&[0; 32], &[root]));
    mac(&pseudo_random, &[b"drawbridge/", purpose.as_bytes(), &[1]])
}

fn mac(key: &[u8; 32], parts: &[&[u8]]) -> [u8; 32] {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

fn associated(place: Place<'_>, key_id: &str) -> Vec<u8> {
    [place.table, place.row, place.column, key_id]
        .iter()
        .flat_map(|part| framed(part.as_bytes()))
        .collect()
}

fn framed(part: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + part.len());
    out.extend_from_slice(&(part.len() as u64).to_be_bytes());
    out.extend_from_slice(part);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place<'static> = Place {
        table: "accounts",
        row: "1",
        column: "token",
    };

    fn ring(ids: &[&str]) -> KeyRing {
        loop {
            let text = ids
                .iter()
                .map(|id| KeyRing::generate(id).expose_secret().to_owned())
                .collect::<Vec<_>>()
                .join(",");
            match KeyRing::parse(&SecretString::from(text)) {
                // Two random keys share their short id once in 256 draws.
                Err(Error::Ring(_, "shares its short id with another key; draw a new one")) => {}
                ring => return ring.unwrap(),
            }
        }
    }

    #[test]
    fn a_sealed_value_opens_only_in_its_place() {
        let ring = ring(&["a"]);
        let sealed = ring.seal(PLACE, b"secret");
        assert_eq!(ring.open(PLACE, &sealed).unwrap().as_slice(), b"secret");
        for place in [
            Place {
                table: "keys",
                ..PLACE
            },
            Place { row: "2", ..PLACE },
            Place {
                column: "other",
                ..PLACE
            },
        ] {
            assert_eq!(ring.open(place, &sealed).unwrap_err(), Error::Broken);
        }
    }

    #[test]
    fn any_flipped_byte_is_noticed() {
        let ring = ring(&["a"]);
        let sealed = ring.seal(PLACE, b"secret");
        for index in 0..sealed.len() {
            let mut broken = sealed.clone();
            broken[index] ^= 1;
            assert!(ring.open(PLACE, &broken).is_err(), "byte {index}");
        }
        assert!(ring.open(PLACE, &[]).is_err());
    }

    #[test]
    fn an_older_key_of_the_ring_opens_and_a_foreign_one_is_named() {
        let old = ring(&["old"]);
        let sealed = old.seal(PLACE, b"secret");
        let key = MasterKey::new("old".into(), *old.0[0].root);
        let both = KeyRing(
            [MasterKey::new("new".into(), [7; 32]), key]
                .into_iter()
                .collect(),
        );
        assert_eq!(both.open(PLACE, &sealed).unwrap().as_slice(), b"secret");
        assert_eq!(
            ring(&["x"]).open(PLACE, &sealed).unwrap_err(),
            Error::UnknownKey("old".into())
        );
    }

    #[test]
    fn each_master_key_has_a_key_of_its_own_for_every_purpose() {
        let ring = ring(&["new", "old"]);
        let token = ring.derived("token");
        let ids: Vec<_> = token.iter().map(|(id, _)| *id).collect();
        assert_eq!(ids, [ring.0[0].short_id(), ring.0[1].short_id()]);
        assert_ne!(token[0].1, token[1].1);
        assert_eq!(token, ring.derived("token"));
        assert_ne!(token[0].1, ring.derived("forward")[0].1);
        assert_ne!(ring.derived("seal")[0].1, derive(&ring.0[0].root, "seal"));
    }

    #[test]
    fn a_head_is_of_one_sealing_and_a_fingerprint_of_one_key() {
        let (ring, other) = (ring(&["a"]), ring(&["a"]));
        let (one, two) = (ring.seal(PLACE, b"secret"), ring.seal(PLACE, b"secret"));
        assert_ne!(head(&one), head(&two));
        assert!(one.starts_with(head(&one)) && head(&one).len() < one.len());
        assert!(head(&[]).is_empty() && head(&[FORMAT, 200, 1]).is_empty());
        assert_eq!(ring.fingerprints(), ring.fingerprints());
        assert_ne!(ring.fingerprints(), other.fingerprints());
        assert!(ring.fingerprints()[0].starts_with("a:"));
    }

    #[test]
    fn a_bad_ring_is_refused_by_position_without_its_text() {
        let good = KeyRing::generate("a").expose_secret().to_owned();
        for (text, position) in [
            (String::new(), 1),
            ("a".into(), 1),
            ("A:AAAA".into(), 1),
            (format!("{good},b:AAAA"), 2),
            (format!("{good},{good}"), 2),
            (format!("{good},b:???"), 2),
        ] {
            let Err(Error::Ring(at, why)) = KeyRing::parse(&SecretString::from(text)) else {
                panic!("accepted")
            };
            assert_eq!(at, position, "{why}");
        }
    }

    #[test]
    fn parts_are_framed() {
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
        let pepper = Pepper::new([1; 32]);
        assert_ne!(pepper.hash("a", b"bc"), pepper.hash("ab", b"c"));
    }
}

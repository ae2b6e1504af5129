//! The text of a key: `dbk_`, 256 random bits, and a checksum that tells a typing error from an unknown key without asking anybody.

use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD};
use secrecy::SecretString;
use zeroize::Zeroizing;

use crate::secret::{Pepper, digest};

const MARK: &str = "dbk_";
/// 32 bytes in base64url, and 4 bytes of checksum.
const SECRET: usize = 43;
const CHECKSUM: usize = 6;
/// What is shown of a key later.
const SHOWN: usize = MARK.len() + 6;

/// A new key.
pub(super) fn draw() -> SecretString {
    let random = Zeroizing::new(rand::random::<[u8; 32]>());
    let body = Zeroizing::new(format!("{MARK}{}", BASE64_URL_SAFE_NO_PAD.encode(*random)));
    SecretString::from(format!("{}{}", *body, checksum(&body)))
}

/// The keyed hash under which a key is found; `None` for a text that [`draw`] never made.
pub(super) fn hash(pepper: &Pepper, text: &str) -> Option<[u8; 32]> {
    let well_formed = text.len() == MARK.len() + SECRET + CHECKSUM
        && text.starts_with(MARK)
        && text
            .split_at_checked(MARK.len() + SECRET)
            .is_some_and(|(body, sum)| checksum(body) == sum);
    well_formed.then(|| pepper.hash("api-key", text.as_bytes()))
}

/// The beginning of a key, to tell keys apart; it leaves over 200 bits unknown.
pub(super) fn prefix(text: &str) -> &str {
    text.get(..SHOWN).unwrap_or(MARK)
}

fn checksum(body: &str) -> String {
    let digest = digest(&[b"api-key checksum", body.as_bytes()]);
    BASE64_URL_SAFE_NO_PAD.encode(&digest[..4])
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    #[test]
    fn a_key_is_recognised_and_every_other_text_of_its_form_is_not() {
        let pepper = Pepper::new([1; 32]);
        let key = draw();
        let key = key.expose_secret();
        assert!(hash(&pepper, key).is_some());
        assert_ne!(hash(&pepper, key), hash(&Pepper::new([2; 32]), key));
        for index in 0..key.len() {
            let mut other = key.to_owned().into_bytes();
            other[index] = if other[index] == b'A' { b'B' } else { b'A' };
            let other = String::from_utf8(other).unwrap();
            assert_eq!(hash(&pepper, &other), None, "byte {index}");
        }
        let umlauts = format!("dbk_{}", "ü".repeat(24)) + "x";
        for other in [
            "",
            "dbk_",
            &key[1..],
            &format!("{key}A"),
            &key[..52],
            &umlauts,
        ] {
            assert_eq!(hash(&pepper, other), None, "{other}");
        }
    }

    #[test]
    fn what_is_shown_later_is_the_beginning_alone() {
        let key = draw();
        let shown = prefix(key.expose_secret());
        assert_eq!(shown.len(), 10);
        assert!(shown.starts_with("dbk_") && key.expose_secret().starts_with(shown));
    }
}

//! The sealed form of a turn's items: a version byte and zstd of their JSON array, sealed for the one row that they belong to.

use crate::{
    ids::ScopeId,
    secret::{self, KeyRing, Place},
};

/// The first byte of what is sealed.
const ZSTD: u8 = 1;
/// Fast; JSON with base64 in it gains little from more.
const LEVEL: i32 = 1;

/// Why a body cannot be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unreadable {
    #[error(transparent)]
    Sealed(#[from] secret::Error),
    #[error("a snapshot is of another version, or not what its row says")]
    Unlike,
}

/// Seals a turn's items for its row.
pub(super) fn seal(keys: &KeyRing, scope: ScopeId, response_id: &str, items: &str) -> Vec<u8> {
    let bound = zstd::zstd_safe::compress_bound(items.len());
    let mut plain = vec![0; 1 + bound];
    plain[0] = ZSTD;
    let written = zstd::bulk::compress_to_buffer(items.as_bytes(), &mut plain[1..], LEVEL)
        .expect("the buffer has zstd's bound");
    plain.truncate(1 + written);
    keys.seal(place(&row(scope, response_id)), &plain)
}

/// Opens what [`seal`] made for the same row; `bytes` is how long the items are.
pub(super) fn open(
    keys: &KeyRing,
    scope: ScopeId,
    response_id: &str,
    sealed: &[u8],
    bytes: usize,
) -> Result<String, Unreadable> {
    let plain = keys.open(place(&row(scope, response_id)), sealed)?;
    let [ZSTD, compressed @ ..] = plain.as_slice() else {
        return Err(Unreadable::Unlike);
    };
    zstd::bulk::decompress(compressed, bytes)
        .ok()
        .filter(|items| items.len() == bytes)
        .and_then(|items| String::from_utf8(items).ok())
        .ok_or(Unreadable::Unlike)
}

fn row(scope: ScopeId, response_id: &str) -> String {
    format!("{scope}/{response_id}")
}

fn place(row: &str) -> Place<'_> {
    Place {
        table: "response_snapshots",
        row,
        column: "body",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keys() -> KeyRing {
        KeyRing::parse(&KeyRing::generate("k")).unwrap()
    }

    #[test]
    fn a_body_opens_in_its_row_at_its_length_and_nowhere_else() {
        let (keys, scope, items) = (keys(), ScopeId::new(), r#"[{"é":"🦀"}]"#);
        let sealed = seal(&keys, scope, "resp_1", items);
        let open = |scope, id, bytes| open(&keys, scope, id, &sealed, bytes);
        assert_eq!(open(scope, "resp_1", items.len()).unwrap(), items);
        assert!(open(scope, "resp_1", items.len() - 1).is_err());
        assert!(open(scope, "resp_1", items.len() + 1).is_err());
        assert!(open(scope, "resp_2", items.len()).is_err());
        assert!(open(ScopeId::new(), "resp_1", items.len()).is_err());
        assert!(super::open(&self::keys(), scope, "resp_1", &sealed, items.len()).is_err());
    }

    #[test]
    fn another_version_and_a_bomb_are_refused() {
        let (keys, scope) = (keys(), ScopeId::new());
        let bomb = zstd::bulk::compress(&vec![b' '; 100 << 20], 1).unwrap();
        for plain in [
            [&[2][..], b"[]"].concat(),
            [&[ZSTD][..], &bomb].concat(),
            vec![],
        ] {
            let sealed = keys.seal(place(&row(scope, "r")), &plain);
            assert!(open(&keys, scope, "r", &sealed, 8 << 20).is_err());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_text_comes_back(items in "\\PC{0,200}") {
            let (keys, scope) = (keys(), ScopeId::new());
            let sealed = seal(&keys, scope, "resp_1", &items);
            prop_assert_eq!(open(&keys, scope, "resp_1", &sealed, items.len()).unwrap(), items);
        }
    }
}

//! A new master key takes the place of the old one.

use drawbridge::secret::KeyRing;
use secrecy::{ExposeSecret as _, SecretString};

use super::{go_on, open, plan, stand};
use crate::support::cluster::Cluster;

/// Gives every replica these keys, one after the other.
async fn roll(cluster: &mut Cluster, keys: &str) {
    for number in 0..cluster.replicas.len() {
        cluster.stop(number).await;
        cluster.set(number, "DRAWBRIDGE_MASTER_KEYS", keys.to_owned());
        cluster.serve(number).await;
    }
    go_on(cluster, 0, None).await.id();
}

#[tokio::test]
async fn master_key_rotation_is_as_written() {
    let old = KeyRing::generate("k1").expose_secret().to_owned();
    let mut cluster = Cluster::start_with(plan(), &old).await;
    let mut book = open("master-key-rotation", &cluster, 0);
    book.walk("What is sealed under what").await;
    book.walk("A new key").await;
    let mut new = std::fs::read_to_string(book.directory().join("k2")).unwrap();
    while KeyRing::parse(&SecretString::from(format!("{old},{}", new.trim()))).is_err() {
        KeyRing::generate("k2").expose_secret().clone_into(&mut new);
    }
    let new = new.trim();
    roll(&mut cluster, &format!("{old},{new}")).await;
    stand(&mut book, &cluster, 0);
    book.walk("Behind the others").await;
    roll(&mut cluster, &format!("{new},{old}")).await;
    stand(&mut book, &cluster, 0);
    book.walk("First").await;
    roll(&mut cluster, new).await;
    stand(&mut book, &cluster, 0);
    book.walk("Only the new key is left").await;
    book.done();
}

//! Upstream ends a login, and its owner logs in again.

use super::{ask, open, plan};
use crate::support::{
    cluster::{Answer, Cluster, Plan},
    wait::until,
};

#[tokio::test]
async fn account_login_is_as_written() {
    let plan = Plan {
        accounts: &["alice", "bob"],
        ..plan()
    };
    let cluster = Cluster::start(plan).await;
    let mut book = open("account-login", &cluster, 0);
    let upstream = &cluster.home.upstream;
    upstream.account("bob").revoke();
    let mut turns = 0;
    until("bob is asked", async || {
        turns += 1;
        let turn = format!("turn-{turns}");
        Answer::of(ask(&cluster, 0, &turn, &turn).await).await.id();
        let ended = "select count(*) from accounts where status = 'reauth_required'";
        cluster
            .client
            .query_one(ended, &[])
            .await
            .unwrap()
            .get::<_, i64>(0)
            == 1
    })
    .await;
    book.walk("Which account").await;
    book.walk_typing("By a code", async |said| {
        let code = said
            .split_whitespace()
            .find(|word| word.starts_with("CODE_"))?;
        upstream.approve(code, Some(("bob", "bob@example.test")));
        None
    })
    .await;
    book.walk_typing("By a browser", async |said| {
        let (before, _) = said.split_once("Address:")?;
        let address = before
            .lines()
            .find(|line| line.contains("/oauth/authorize"))?;
        Some(upstream.log_in(address, "bob", "bob@example.test") + "\n")
    })
    .await;
    book.walk("It serves again").await;
    book.done();
    assert_eq!(upstream.violations(), [""; 0]);
}

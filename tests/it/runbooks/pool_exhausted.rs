//! Every account is at its limit, until one more is added.

use loadtest::upstream::{Fault, Kind};

use super::{ask, open, plan};
use crate::support::{
    cluster::{Answer, Cluster, Plan},
    wait::until,
};

#[tokio::test]
async fn pool_exhausted_is_as_written() {
    let plan = Plan {
        accounts: &["alice", "bob"],
        ..plan()
    };
    let cluster = Cluster::start(plan).await;
    let mut book = open("pool-exhausted", &cluster, 0);
    for turn in ["one", "two", "three", "four"] {
        Answer::of(ask(&cluster, 0, turn, turn).await).await.id();
    }
    for account in ["alice", "bob"] {
        let limit = Fault::always(Kind::RateLimit { resets_in: 900 });
        cluster.home.upstream.fault(limit.at(account));
    }
    let refused = Answer::of(ask(&cluster, 0, "late", "late").await).await;
    assert_eq!(
        (refused.status, refused.code()),
        (429, "usage_limit_reached")
    );
    book.walk("What the accounts are").await;
    let refused = Answer::of(ask(&cluster, 0, "later", "later").await).await;
    assert_eq!(refused.status, 429);
    let refused = "select request_id::text from request_log where status = 429 and attempts = 0";
    let mut id = None;
    until("it is in the log", async || {
        let row = cluster.client.query_opt(refused, &[]).await.unwrap();
        id = row.map(|row| row.get::<_, String>(0));
        id.is_some()
    })
    .await;
    book.set("TURN", id.unwrap());
    book.walk("What clients get").await;
    book.walk("Turns fail, accounts are well").await;
    let login = cluster.home.upstream.account("carol").auth_json();
    std::fs::write(book.directory().join("auth.json"), login).unwrap();
    book.walk("Add an account").await;
    book.walk("It serves again").await;
    book.done();
}

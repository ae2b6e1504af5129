//! Postgres goes away and comes back, is replaced by its standby, and by an older state of itself.

use loadtest::{
    edge::Mode,
    upstream::{Fault, Kind},
};

use super::{ask, open, plan, stand, turn_id};
use crate::support::cluster::{Answer, Cluster, Plan};

#[tokio::test]
async fn postgres_is_as_written() {
    let plan = Plan {
        own_postgres: true,
        ..plan()
    };
    let mut cluster = Cluster::start(plan).await;
    let mut book = open("postgres", &cluster, 0);
    Answer::of(ask(&cluster, 0, "conversation", "first").await)
        .await
        .id();

    let slow = Fault::once(Kind::Paced(300, 20)).for_turn("running");
    cluster.home.upstream.fault(slow);
    let running = ask(&cluster, 0, "conversation", "running").await;
    for edge in cluster.postgres() {
        edge.set(Mode::Refuse);
        edge.cut();
    }
    Answer::of(ask(&cluster, 0, "another", "meanwhile").await)
        .await
        .id();
    book.walk("It does not answer").await;
    Answer::of(running).await.id();
    for edge in cluster.postgres() {
        edge.open().await;
    }
    cluster.booked().await;
    book.set("TURN", turn_id(&cluster, "meanwhile").await);
    book.walk("After an outage").await;

    cluster.fail_over().await;
    book.walk("Another one has taken over").await;
    book.walk("After a failover").await;
    Answer::of(ask(&cluster, 0, "conversation", "second").await)
        .await
        .id();

    book.walk("A backup").await;
    Answer::of(ask(&cluster, 0, "conversation", "since").await)
        .await
        .id();
    book.set("SINCE", turn_id(&cluster, "since").await);
    for number in 0..2 {
        cluster.stop(number).await;
    }
    book.walk("Restore from a backup").await;
    for number in 0..2 {
        cluster.serve(number).await;
    }
    stand(&mut book, &cluster, 0);
    book.walk("After a restore").await;
    Answer::of(ask(&cluster, 0, "conversation", "third").await)
        .await
        .id();
    book.done();
}

//! A replica far from Postgres, with a turn that it does not end; it is killed.

use std::time::Duration;

use loadtest::{
    edge::Mode,
    upstream::{Fault, Kind},
};

use super::{ask, open, plan, turn_id};
use crate::support::{
    cluster::{Answer, Cluster},
    wait::until,
};

#[tokio::test]
async fn slow_replica_is_as_written() {
    let mut cluster = Cluster::start(plan()).await;
    let mut book = open("slow-replica", &cluster, 0);
    Answer::of(ask(&cluster, 0, "conversation", "first").await)
        .await
        .id();
    let slow = Fault::once(Kind::Paced(3000, 20)).for_turn("endless");
    cluster.home.upstream.fault(slow);
    let running = ask(&cluster, 0, "conversation", "endless").await;
    until("it runs", async || {
        cluster.home.upstream.attempts().len() == 2
    })
    .await;
    cluster.replicas[0]
        .postgres
        .set(Mode::Delay(Duration::from_millis(150)));
    book.walk("One replica, or all").await;
    book.walk("What it holds").await;

    book.set("TURN", turn_id(&cluster, "endless").await);
    cluster.kill(0).await;
    drop(running);
    book.set("DRAWBRIDGE_DATABASE_URL", cluster.url());
    book.walk("It is gone").await;
    book.walk("What was killed is booked").await;
    book.done();
}

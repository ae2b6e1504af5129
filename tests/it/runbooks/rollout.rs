//! Replicas are replaced one after the other, by the next release and by the one before.

use loadtest::{
    edge::Mode,
    upstream::{Fault, Kind},
};
use rustix::process::Signal;

use super::{ask, open, plan, stand, turn_id};
use crate::support::cluster::{Answer, Cluster};

#[tokio::test]
async fn rollout_is_as_written() {
    let mut cluster = Cluster::start(plan()).await;
    let mut book = open("rollout", &cluster, 0);
    book.walk("Before a roll").await;
    book.walk("Upgrade").await;

    let slow = Fault::once(Kind::Paced(300, 20)).for_turn("running");
    cluster.home.upstream.fault(slow);
    let running = ask(&cluster, 0, "conversation", "running").await;
    cluster.replicas[0].clients.set(Mode::Refuse);
    cluster.signal(0, Signal::TERM);
    book.walk("A replica that does not end").await;
    Answer::of(running).await.id();
    cluster.replicas[0].service.as_mut().unwrap().ended().await;
    cluster.serve(0).await;
    stand(&mut book, &cluster, 0);
    book.walk("Between two replicas").await;

    // As a newer release would leave it.
    let newer = "insert into refinery_schema_history (version, name, applied_on, checksum) values (99, 'later', '2027-01-01T00:00:00Z', '0')";
    cluster.client.execute(newer, &[]).await.unwrap();
    cluster.stop(1).await;
    cluster.serve(1).await;
    book.walk("Rollback").await;
    book.set("TURN", turn_id(&cluster, "running").await);
    book.walk("It is over").await;
    book.done();
}

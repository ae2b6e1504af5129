//! Redis goes, and comes back.

use loadtest::edge::{Edge, Mode};

use super::{ask, open, plan};
use crate::support::cluster::{Answer, Cluster, Plan};

#[tokio::test]
async fn redis_loss_is_as_written() {
    let plan = Plan {
        redis: true,
        ..plan()
    };
    let mut cluster = Cluster::start(plan).await;
    let mut book = open("redis-loss", &cluster, 0);
    cluster.redis = None;
    let edges = |cluster: &Cluster, does: fn(&Edge)| {
        let replicas = cluster.replicas.iter();
        replicas
            .filter_map(|replica| replica.redis.as_ref())
            .for_each(does);
    };
    edges(&cluster, |edge| edge.set(Mode::Refuse));
    book.walk("What carries changes now").await;
    Answer::of(ask(&cluster, 0, "conversation", "without").await)
        .await
        .id();
    cluster.restart_redis().await;
    edges(&cluster, |edge| edge.set(Mode::Pass));
    book.walk("It is back").await;
    book.done();
}

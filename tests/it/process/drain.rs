//! The end of the process: at first nobody notices, then nobody new comes in, then everybody is told.

use std::time::Duration;

use drawbridge::db::embedded::Cluster;
use loadtest::upstream::{Fault, Kind, Stage};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::{net::TcpStream, time::timeout};

use crate::support::{
    codex_socket::create,
    house::{events, text_of},
    process::{Home, Service},
    wait::until,
};

#[tokio::test]
async fn a_lame_duck_still_serves_then_lets_nobody_in_and_leaves_when_the_last_turn_has_ended() {
    let home = Home::new()
        .await
        .set("DRAWBRIDGE_DRAIN_DELAY", "3s")
        .set("DRAWBRIDGE_DRAIN_GRACE", "60s");
    let mut service = home.serve().await;
    home.import("alice").await;
    let key = home.key("laptop").await;
    let mut idle = service.socket(&key).await;
    // It outlasts the delay by far.
    home.upstream
        .fault(Fault::once(Kind::Paced(400, 25)).for_turn("long"));
    let long = service.turn(&key, "long", "hi").await;
    service.signal(Signal::TERM);
    service.logged("draining").await;

    let readiness = service.get("/readyz").await;
    assert_eq!(readiness.status(), 503);
    assert_eq!(
        readiness.json::<Value>().await.unwrap()["status"],
        "draining"
    );
    assert_eq!(service.get("/livez").await.status(), 200);
    let late = service.turn(&key, "late", "hi").await;
    assert_eq!(late.status(), 200);
    assert_eq!(late.headers()["connection"], "close");
    assert_eq!(text_of(&events(late).await), "echo: hi..");

    closed(&service.address).await;
    let watched = service.watch("/metrics").await;
    assert!(watched.status().is_success(), "metrics last to the end");
    assert_eq!(service.watch("/readyz").await.status(), 503);
    let close = idle.closed().await.unwrap();
    assert_eq!(u16::from(close.code), 1012, "come back elsewhere");
    assert!(
        !home.upstream.attempts()[0].completed,
        "the test says nothing: the long turn ended too soon"
    );
    let long = events(long).await;
    assert_eq!(long.last().unwrap()["type"], "response.completed");
    assert_eq!(service.ended().await.code(), Some(0), "{}", service.log());

    assert_eq!(home.postmaster(), None, "its last user stops the database");
    let cluster = Cluster::open(home.path()).await.unwrap();
    let client = home.connect().await;
    let booked = "select string_agg(concat_ws(' ', t.client_turn_id, t.state, t.outcome, l.outcome, l.status, l.attempts), ', ' order by t.turn_id)
        from turns t left join request_log l using (turn_id)";
    let booked: String = client.query_one(booked, &[]).await.unwrap().get(0);
    assert_eq!(
        booked,
        "long settled completed completed 200 1, late settled completed completed 200 1"
    );
    drop(client);
    cluster.close().await.unwrap();
}

#[tokio::test]
async fn a_second_signal_ends_running_turns_with_a_terminal_event_and_books_them() {
    let home = Home::new().await.set("DRAWBRIDGE_DRAIN_DELAY", "60s");
    let mut service = home.serve().await;
    let (http, socket) = running_turns(&home, &service).await;
    service.signal(Signal::TERM);
    service.logged("draining").await;
    service.signal(Signal::TERM);
    cancelled(&home, service, http, socket).await;
}

#[tokio::test]
async fn a_grace_that_is_over_ends_running_turns_the_same_way() {
    let home = Home::new()
        .await
        .set("DRAWBRIDGE_DRAIN_DELAY", "0s")
        .set("DRAWBRIDGE_DRAIN_GRACE", "1s");
    let service = home.serve().await;
    let (http, socket) = running_turns(&home, &service).await;
    service.signal(Signal::TERM);
    cancelled(&home, service, http, socket).await;
}

type Ends = tokio::task::JoinHandle<Vec<Value>>;

/// Starts a turn over HTTP and one over a WebSocket; neither ends by itself.
async fn running_turns(home: &Home, service: &Service) -> (Ends, Ends) {
    home.import("alice").await;
    let key = home.key("laptop").await;
    home.upstream
        .fault(Fault::always(Kind::Silence(Stage::Visible)));
    let response = service.turn(&key, "http", "hi").await;
    let http = tokio::spawn(events(response));
    let mut socket = service.socket(&key).await;
    socket.send(&create("socket", "hi", None)).await;
    while socket.next().await.unwrap()["type"] != "response.output_text.delta" {}
    (http, tokio::spawn(async move { socket.response().await }))
}

/// Both turns end with an event that says so, are booked as cancelled, and the process says that it could not end well.
async fn cancelled(home: &Home, mut service: Service, http: Ends, socket: Ends) {
    for turn in [http, socket] {
        let told = turn.await.unwrap().pop().unwrap();
        assert_eq!(told["type"], "response.failed", "{told}");
        assert_eq!(told["response"]["error"]["code"], "cancelled");
    }
    assert_eq!(service.ended().await.code(), Some(1), "{}", service.log());
    assert_eq!(home.postmaster(), None);
    let cluster = Cluster::open(home.path()).await.unwrap();
    let turns = home.turns().await;
    assert_eq!(turns.len(), 2);
    for turn in turns {
        assert_eq!(turn["state"], "settled");
        assert_eq!(turn["outcome"], "cancelled");
        assert_eq!(turn["reason"], "shutdown");
        assert_eq!(turn["estimated"], true);
    }
    cluster.close().await.unwrap();
}

/// Waits until nobody listens at an address.
async fn closed(address: &str) {
    let refused = async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), refused)
        .await
        .expect("the listener closes");
}

#[tokio::test]
async fn a_stop_is_heard_while_the_database_keeps_the_start_waiting() {
    let home = Home::new().await;
    home.key("laptop").await;
    let cluster = Cluster::open(home.path()).await.unwrap();
    let mut client = home.connect().await;
    let lock = client.transaction().await.unwrap();
    lock.batch_execute("lock table bridge_replicas")
        .await
        .unwrap();
    let mut starting = home.command(&["serve"]).spawn().unwrap();
    until("it waits for the lock", async || {
        let waiting = "select exists (select from pg_locks where not granted)";
        lock.query_one(waiting, &[]).await.unwrap().get(0)
    })
    .await;
    let pid = i32::try_from(starting.id().unwrap()).unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    let ended = timeout(Duration::from_secs(30), starting.wait()).await;
    assert_eq!(ended.unwrap().unwrap().code(), Some(0));
    drop(lock);
    cluster.close().await.unwrap();
}

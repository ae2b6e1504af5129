//! `kill -9`: what was paid for is on record, and nothing stays taken.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use loadtest::upstream::{Attempt, Fault, Kind, Stage, Upstream};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::IndexedRandom as _};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use tokio::task::JoinSet;

use crate::support::{
    codex_socket::create,
    house::{events, text_of},
    process::{Home, Service},
};

/// What the sweep says when it has booked turns of the dead.
const SWEPT: &str = "turns that nobody finished were booked as lost";
/// Clients of a load.
const CLIENTS: usize = 12;
/// Turns of each; more than it lives to see.
const TURNS: usize = 60;
/// Starts that are killed.
const ROUNDS: usize = 3;

#[tokio::test]
async fn data_survives_and_the_open_turn_is_booked_as_lost_by_estimate() {
    let home = Home::new().await;
    let service = home.serve().await;
    home.import("alice").await;
    let key = home.key("laptop").await;
    home.upstream
        .fault(Fault::once(Kind::Silence(Stage::Visible)));
    let open = service.turn(&key, "open", "hi").await;
    service.kill().await;
    drop(open);

    let mut service = home.serve().await;
    assert_eq!(home.json(&["accounts", "list"]).await[0]["label"], "alice");
    assert_eq!(home.json(&["keys", "list"]).await[0]["name"], "laptop");
    let answer = service.turn(&key, "next", "hi").await;
    assert_eq!(text_of(&events(answer).await), "echo: hi..");

    service.logged(SWEPT).await;
    let turns = home.turns().await;
    let told: Vec<_> = ["client_turn_id", "state", "outcome", "estimated"]
        .map(|column| turns[0][column].clone())
        .into();
    assert_eq!(
        Value::from(told),
        serde_json::json!(["open", "settled", "lost", true])
    );
    assert!(turns[0]["input_tokens"].as_i64().unwrap() > 0);
    assert_eq!(turns[1]["outcome"], "completed");
    let (code, log) = service.stop().await;
    assert_eq!(code, Some(0), "{log}");
}

#[tokio::test]
async fn at_any_moment_of_a_load_run_the_ledger_has_what_upstream_saw_and_nothing_stays_taken() {
    let seed: u64 = rand::random();
    println!("seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let home = Home::new().await;
    let mut service = home.serve().await;
    home.import("alice").await;
    home.import("bob").await;
    let key = home.key("load").await;
    let completed = Completed::default();
    for round in 0..ROUNDS {
        script(&home.upstream, round, &mut rng);
        let fate = home.upstream.attempts().len() + rng.random_range(1..150);
        let load = Load::on(service, &key, round, &completed);
        home.upstream
            .wait("enough load", |state| state.attempts.len() >= fate)
            .await;
        // The moment of a death, not a wait: attempts arrive at moments of their own.
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..50))).await;
        load.kill().await;
        if round == 1 {
            // As when the machine goes down: the database dies with it.
            kill_process(home.postmaster().unwrap(), Signal::KILL).unwrap();
        }
        service = home.serve().await;
    }

    // Nothing of the dead is in the way of the living.
    for turn in 0..10 {
        let answer = service.turn(&key, &format!("after {turn}"), "hi").await;
        assert_eq!(text_of(&events(answer).await), "echo: hi..");
    }
    service.logged(SWEPT).await;
    let turns = home.turns().await;
    let completed = completed.lock().unwrap().clone();
    agree(&home.upstream.attempts(), &turns, &completed);
    let lost = turns
        .iter()
        .filter(|turn| turn["outcome"] == "lost")
        .count();
    println!(
        "{} turns, {lost} lost, {} seen to complete",
        turns.len(),
        completed.len()
    );
    assert_eq!(home.upstream.violations(), [""; 0]);
    let (code, log) = service.stop().await;
    assert_eq!(code, Some(0), "{log}");
}

/// Client turn ids whose terminal event a client has read.
type Completed = Arc<Mutex<BTreeSet<String>>>;

fn turn_id(round: usize, client: usize, turn: usize) -> String {
    format!("{round} {client} {turn}")
}

/// What upstream will do in a round, attempt by attempt.
fn script(upstream: &Upstream, round: usize, rng: &mut StdRng) {
    let paced = Kind::Paced(8, 4);
    let kinds = [
        paced.clone(),
        paced.clone(),
        paced,
        Kind::Burst(50),
        Kind::Slow(2),
        Kind::Overloaded,
        Kind::Status(500, "server_error".into()),
        Kind::Failed("server_error".into()),
        Kind::Cut(Stage::BeforeCreated),
        Kind::Cut(Stage::AfterCreated),
        Kind::Cut(Stage::Visible),
        Kind::End(Stage::BeforeTerminal),
    ];
    for (client, turn) in (0..CLIENTS).flat_map(|client| (0..TURNS).map(move |turn| (client, turn)))
    {
        for _ in 0..rng.random_range(1..=2) {
            let kind = kinds.choose(rng).unwrap().clone();
            upstream.fault(Fault::once(kind).for_turn(&turn_id(round, client, turn)));
        }
    }
}

/// Clients at work on a service: half of them over HTTP, half over a WebSocket.
struct Load {
    service: Arc<Service>,
    clients: JoinSet<()>,
}

impl Load {
    fn on(service: Service, key: &str, round: usize, completed: &Completed) -> Self {
        let service = Arc::new(service);
        let mut clients = JoinSet::new();
        for client in 0..CLIENTS {
            let (service, key) = (Arc::clone(&service), key.to_owned());
            let completed = Arc::clone(completed);
            let turns = (0..TURNS).map(move |turn| turn_id(round, client, turn));
            if client % 2 == 0 {
                clients.spawn(over_http(service, key, turns, completed));
            } else {
                clients.spawn(over_websocket(service, key, turns, completed));
            }
        }
        Self { service, clients }
    }

    async fn kill(mut self) {
        self.service.signal(Signal::KILL);
        // What the dead had still written is read to its end.
        while let Some(client) = self.clients.join_next().await {
            client.unwrap();
        }
        Arc::into_inner(self.service).unwrap().kill().await;
    }
}

async fn over_http(
    service: Arc<Service>,
    key: String,
    turns: impl Iterator<Item = String>,
    completed: Completed,
) {
    for turn in turns {
        let Ok(response) = service.try_turn(&key, &turn, "hi").await else {
            return;
        };
        let Ok(text) = response.text().await else {
            return;
        };
        if text.contains(r#""type":"response.completed""#) {
            completed.lock().unwrap().insert(turn);
        }
    }
}

async fn over_websocket(
    service: Arc<Service>,
    key: String,
    turns: impl Iterator<Item = String>,
    completed: Completed,
) {
    let mut socket = service.socket(&key).await;
    for turn in turns {
        if socket.try_send(&create(&turn, "hi", None)).await.is_err() {
            return;
        }
        let frames = socket.response().await;
        if frames
            .last()
            .is_some_and(|last| last["type"] == "response.completed")
        {
            completed.lock().unwrap().insert(turn);
        }
    }
}

/// Every attempt that upstream saw is in the ledger, in order, with what it reported or marked as an estimate.
fn agree(seen: &[Attempt], turns: &[Value], completed: &BTreeSet<String>) {
    let mut booked = BTreeMap::new();
    for turn in turns {
        assert_ne!(turn["state"], "open", "{turn}");
        let id = turn["client_turn_id"].as_str().unwrap();
        let earlier = booked.insert(id, turn);
        assert!(earlier.is_none(), "{id} is booked twice");
        if completed.contains(id) {
            assert_eq!(turn["outcome"], "completed", "{turn}");
        }
    }
    let mut by_turn: BTreeMap<&str, Vec<&Attempt>> = BTreeMap::new();
    for attempt in seen {
        let id = attempt.client_turn_id.as_deref().unwrap();
        by_turn.entry(id).or_default().push(attempt);
    }
    for (id, seen) in &by_turn {
        let turn = booked.get(id).unwrap_or_else(|| panic!("{id} is missing"));
        let attempts = turn["attempts"].as_array().unwrap();
        assert!(attempts.len() >= seen.len(), "{seen:#?}\n{turn:#}");
        for (seen, attempt) in seen.iter().zip(attempts) {
            let usage = ["input", "cached_input", "output", "reasoning"]
                .map(|kind| attempt["usage"][kind].as_u64().unwrap_or(0));
            match seen.usage {
                // The report was on its way when the process died.
                _ if attempt["estimated"] == true => {}
                Some(told) => assert_eq!(
                    usage,
                    [told.input, told.cached, told.output, told.reasoning],
                    "{turn:#}"
                ),
                None => {
                    assert_eq!(usage, [0; 4], "{turn:#}");
                    assert!(
                        seen.status != 200 || seen.completed,
                        "cut short and not marked: {turn:#}"
                    );
                }
            }
        }
    }
    for (id, turn) in &booked {
        let attempts = turn["attempts"].as_array().unwrap();
        let sum = |kind: &str| {
            attempts
                .iter()
                .filter_map(|attempt| attempt["usage"][kind].as_i64())
                .sum::<i64>()
        };
        assert_eq!(turn["input_tokens"], sum("input"), "{turn:#}");
        assert_eq!(turn["output_tokens"], sum("output"), "{turn:#}");
        let estimated = attempts.iter().any(|attempt| attempt["estimated"] == true);
        assert_eq!(turn["estimated"], estimated, "{turn:#}");
        // Booked before it is sent: what upstream never saw died on its way.
        let sent = by_turn.get(id).map_or(0, Vec::len);
        for attempt in &attempts[sent..] {
            assert_eq!(attempt["class"], "lost", "{turn:#}");
        }
    }
}

//! The real Codex CLI through a balancer over two replicas, while the one that serves it goes away.

use std::{collections::BTreeMap, path::Path};

use loadtest::upstream::{Fault, Kind, Stage, State};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use loadtest::edge::Mode;

use crate::support::{
    cluster::{Cluster, Plan},
    codex::{AppServer, Codex, WIRES, Wire},
    wait::until,
};

/// How a replica goes away.
#[derive(Clone, Copy, Debug)]
enum End {
    Killed,
    Drained,
    /// The next turn does not wait for its end.
    Draining,
}

/// Two replicas, and a CLI that knows only their balancer.
async fn meet(wire: Wire) -> (Cluster, Codex) {
    let cluster = Cluster::start(Plan {
        accounts: &["alice", "bob"],
        ..Plan::default()
    })
    .await;
    let url = format!("http://{}/backend-api/codex", cluster.balancer.address);
    let codex = Codex::new(&url, &cluster.key, wire);
    (cluster, codex)
}

impl End {
    /// Comes to the replica that serves the conversation; yields which.
    async fn comes(self, cluster: &mut Cluster) -> usize {
        let owner = cluster.owner().await;
        match self {
            Self::Killed => cluster.kill(owner).await,
            Self::Drained => cluster.stop(owner).await,
            Self::Draining => {
                cluster.signal(owner, Signal::TERM);
                cluster.replicas[owner].clients.set(Mode::Refuse);
            }
        }
        owner
    }
}

/// Upstream knows the conversation as a whole, by one account, and forgave everything; what it did is in the ledger, once, and closed.
/// The CLI never fell back to its other wire.
async fn in_order(cluster: &Cluster, wire: Wire, said: &[&str]) {
    cluster.booked().await;
    let (turns, attempts) = (cluster.turns().await, cluster.home.upstream.attempts());
    let (mut booked, mut seen) = (BTreeMap::<_, usize>::new(), BTreeMap::<_, usize>::new());
    let transport = match wire {
        Wire::Sse => "http",
        Wire::WebSocket => "websocket",
    };
    for turn in &turns {
        assert_eq!(turn["transport"], transport, "{turn:#}");
        let client = turn["client_turn_id"].as_str().map(str::to_owned);
        *booked.entry(client).or_default() += turn["attempts"].as_array().unwrap().len();
    }
    for attempt in &attempts {
        *seen.entry(attempt.client_turn_id.clone()).or_default() += 1;
    }
    assert_eq!(booked, seen, "{turns:#?}\n{}", cluster.logs());
    for attempt in attempts.iter().filter(|attempt| attempt.completed) {
        let (id, usage) = (attempt.response_id.as_deref(), attempt.usage.unwrap());
        let of_it = turns
            .iter()
            .filter(|turn| turn["response_id"].as_str() == id);
        let [turn] = of_it.collect::<Vec<_>>()[..] else {
            panic!("{id:?} is not booked once: {turns:#?}");
        };
        assert_eq!(turn["outcome"], "completed", "{turn:#}");
        // Earlier attempts of it were cut, and are estimated.
        let paid = &turn["attempts"].as_array().unwrap().last().unwrap()["usage"];
        assert_eq!(paid["input"].as_u64().unwrap_or(0), usage.input, "{turn:#}");
        assert_eq!(
            paid["output"].as_u64().unwrap_or(0),
            usage.output,
            "{turn:#}"
        );
    }
    let last = attempts.last().unwrap();
    assert!(attempts.iter().all(|one| one.account == last.account));
    let history = last.history.iter().map(Value::to_string);
    let history: String = history.collect();
    for text in said {
        assert_eq!(history.matches(text).count(), 1, "{text}: {history}");
    }
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

#[tokio::test]
async fn a_running_cli_notices_nothing_when_its_replica_is_killed_between_turns() {
    between_turns_of_one_process(End::Killed).await;
}

#[tokio::test]
async fn a_running_cli_notices_nothing_when_its_replica_is_drained_between_turns() {
    between_turns_of_one_process(End::Drained).await;
}

#[tokio::test]
async fn a_running_cli_notices_nothing_when_its_replica_drains_as_a_turn_begins() {
    between_turns_of_one_process(End::Draining).await;
}

async fn between_turns_of_one_process(end: End) {
    for wire in WIRES {
        let (mut cluster, codex) = meet(wire).await;
        let mut server = codex.app_server().await;
        let thread = server.thread(Path::new("/tmp")).await;
        answers(&mut server, &thread, "one").await;
        let first = end.comes(&mut cluster).await;
        answers(&mut server, &thread, "two").await;
        if matches!(end, End::Draining) {
            let mut draining = cluster.replicas[first].service.take().unwrap();
            let status = draining.ended().await;
            assert!(status.success(), "{wire:?}: {status}\n{}", draining.log());
        } else {
            assert_ne!(cluster.owner().await, first, "{wire:?}");
        }
        cluster.serve(first).await;
        answers(&mut server, &thread, "three").await;
        end.comes(&mut cluster).await;
        answers(&mut server, &thread, "four").await;
        assert_eq!(server.errors, [Value::Null; 0], "{wire:?} {end:?}");
        let said = ["echo: one..", "echo: two..", "echo: three..", "\"four\""];
        in_order(&cluster, wire, &said).await;
    }
}

async fn answers(server: &mut AppServer, thread: &str, text: &str) {
    assert_eq!(server.turn(thread, text).await, format!("echo: {text}.."));
}

#[tokio::test]
async fn a_conversation_is_resumed_when_its_replica_was_killed_meanwhile() {
    between_processes(End::Killed).await;
}

#[tokio::test]
async fn a_conversation_is_resumed_when_its_replica_was_drained_meanwhile() {
    between_processes(End::Drained).await;
}

async fn between_processes(end: End) {
    for wire in WIRES {
        let (mut cluster, codex) = meet(wire).await;
        let run = codex.exec("one").await;
        assert_eq!(run.expect_answer(), "echo: one..", "{wire:?}");
        let first = end.comes(&mut cluster).await;
        let run = codex.resume("two").await;
        assert_eq!(run.expect_answer(), "echo: two..", "{wire:?}");
        assert_eq!(run.errors(), [""; 0], "{wire:?} {end:?}");
        cluster.serve(first).await;
        end.comes(&mut cluster).await;
        let run = codex.resume("please [tool]").await;
        let answer = run.expect_answer();
        assert!(answer.contains("drawbridge-tool"), "{wire:?}: {answer}");
        assert_eq!(run.errors(), [""; 0], "{wire:?} {end:?}");
        in_order(
            &cluster,
            wire,
            &["echo: one..", "echo: two..", "please [tool]"],
        )
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn running_clis_notice_nothing_of_a_rolling_restart() {
    let mut cluster = Cluster::start(Plan {
        replicas: 3,
        accounts: &["alice", "bob"],
        settings: &[("DRAWBRIDGE_DRAIN_DELAY", "1s")],
        ..Plan::default()
    })
    .await;
    // Answers outlast the delay.
    let slow = Fault::always(Kind::Slow(80));
    cluster.home.upstream.fault(slow);
    let url = format!("http://{}/backend-api/codex", cluster.balancer.address);
    let over = CancellationToken::new();
    let loops = WIRES.map(|wire| {
        let (codex, over) = (Codex::new(&url, &cluster.key, wire), over.clone());
        tokio::spawn(async move {
            let mut turns = 0;
            while !over.is_cancelled() {
                let run = match turns {
                    0 => codex.exec("turn 0").await,
                    _ => codex.resume(&format!("turn {turns}")).await,
                };
                let answer = run.expect_answer();
                assert_eq!(answer, format!("echo: turn {turns}.."), "{wire:?}");
                assert_eq!(run.errors(), [""; 0], "{wire:?} {turns}");
                turns += 1;
            }
            turns
        })
    });
    for number in 0..3 {
        let begun = cluster.home.upstream.attempts().len();
        until("clients talk", async || {
            cluster.home.upstream.attempts().len() > begun + 1
        })
        .await;
        // As a balancer does that asks whether it is ready.
        cluster.signal(number, Signal::TERM);
        let replica = &mut cluster.replicas[number];
        replica.clients.set(Mode::Refuse);
        let mut draining = replica.service.take().unwrap();
        let status = draining.ended().await;
        assert!(status.success(), "{status}\n{}", draining.log());
        cluster.serve(number).await;
    }
    over.cancel();
    let mut asked = 0;
    for turns in loops {
        asked += turns.await.unwrap();
    }
    cluster.booked().await;
    // A socket is warmed up by a request that is no turn of the client's.
    let (mut turns, mut attempts) = (cluster.turns().await, cluster.home.upstream.attempts());
    turns.retain(|turn| !turn["client_turn_id"].is_null());
    attempts.retain(|attempt| attempt.client_turn_id.is_some());
    assert_eq!((turns.len(), attempts.len()), (asked, asked), "{turns:#?}");
    assert!(turns.iter().all(|turn| turn["outcome"] == "completed"));
    assert_eq!(cluster.home.upstream.violations(), [""; 0]);
}

/// How a turn runs, and which of its replicas dies in its midst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// The only one.
    Direct,
    /// The owner, to which another one forwards.
    Owner,
    /// The one that forwards.
    Entry,
}

#[tokio::test]
async fn the_clis_own_retry_completes_a_turn_whose_replica_is_killed_before_anything_visible() {
    for wire in WIRES {
        in_mid_turn(wire, Death::Direct, Stage::AfterCreated).await;
    }
}

#[tokio::test]
async fn the_clis_own_retry_completes_a_turn_whose_replica_is_killed_in_mid_answer() {
    for wire in WIRES {
        in_mid_turn(wire, Death::Direct, Stage::Visible).await;
    }
}

#[tokio::test]
async fn the_clis_own_retry_completes_a_forwarded_turn_whose_owner_is_killed() {
    for stage in [Stage::AfterCreated, Stage::Visible] {
        in_mid_turn(Wire::Sse, Death::Owner, stage).await;
    }
}

#[tokio::test]
async fn the_clis_own_retry_completes_a_forwarded_turn_whose_entry_is_killed() {
    for stage in [Stage::AfterCreated, Stage::Visible] {
        in_mid_turn(Wire::Sse, Death::Entry, stage).await;
    }
}

async fn in_mid_turn(wire: Wire, death: Death, stage: Stage) {
    let (mut cluster, codex) = meet(wire).await;
    let mut server = codex.app_server().await;
    let thread = server.thread(Path::new("/tmp")).await;
    answers(&mut server, &thread, "one").await;
    let owner = cluster.owner().await;
    let (entry, dies) = match death {
        Death::Direct => (owner, owner),
        Death::Owner => (1 - owner, owner),
        Death::Entry => (1 - owner, 1 - owner),
    };
    steer(&cluster, entry).await;
    cluster
        .home
        .upstream
        .fault(Fault::once(Kind::Silence(stage)));
    let dying = async {
        let silent = |state: &State| state.silent == 1;
        cluster.home.upstream.wait("a silence", silent).await;
        assert_eq!(cluster.owner().await, owner, "{wire:?} {death:?}");
        cluster.replicas[1 - dies].clients.set(Mode::Pass);
        cluster.kill(dies).await;
    };
    tokio::join!(answers(&mut server, &thread, "two"), dying);
    let repaired = server.errors.iter().all(|error| error["willRetry"] == true);
    assert!(
        repaired,
        "{wire:?} {death:?} {stage:?}: {:#?}",
        server.errors
    );
    assert_eq!(cluster.owner().await, 1 - dies, "{wire:?} {death:?}");
    cluster.serve(dies).await;
    answers(&mut server, &thread, "three").await;
    let said = ["echo: one..", "echo: two..", "\"three\""];
    in_order(&cluster, wire, &said).await;
    // What the dead cannot book, the sweep does.
    let turns = cluster.turns().await;
    let lost = turns.iter().filter(|turn| turn["outcome"] == "lost");
    let expected = usize::from(dies == owner);
    assert_eq!(lost.count(), expected, "{wire:?} {death:?}: {turns:#?}");
}

/// Whatever the CLI says next comes to this replica.
async fn steer(cluster: &Cluster, entry: usize) {
    let other = &cluster.replicas[1 - entry].clients;
    other.set(Mode::Refuse);
    until("it refuses", async || {
        TcpStream::connect(other.address).await.is_err()
    })
    .await;
    other.cut();
}

/// A tool that runs until it is told to end, in a directory of its own.
struct Tool(TempDir);

impl Tool {
    /// What to ask for.
    fn prompt(&self) -> String {
        let at = self.0.path().display();
        format!(
            "[tool touch {at}/began; until test -e {at}/end; do sleep 0.02; done; echo drawbridge-tool]"
        )
    }

    async fn began(&self) {
        until("the tool runs", async || {
            self.0.path().join("began").exists()
        })
        .await;
    }

    fn end(&self) {
        std::fs::write(self.0.path().join("end"), "").unwrap();
    }
}

#[tokio::test]
async fn the_result_of_a_tool_reaches_its_conversation_through_the_other_replica() {
    for wire in WIRES {
        let (cluster, codex) = meet(wire).await;
        let tool = Tool(TempDir::new().unwrap());
        let away = async {
            tool.began().await;
            let owner = cluster.owner().await;
            steer(&cluster, 1 - owner).await;
            tool.end();
            owner
        };
        let prompt = tool.prompt();
        let (run, owner) = tokio::join!(codex.exec(&prompt), away);
        let answer = run.expect_answer();
        assert!(answer.contains("tool said: "), "{wire:?}: {answer}");
        assert_eq!(run.errors(), [""; 0], "{wire:?}");
        // A request is forwarded; a socket takes its conversation along.
        let (stays, sockets) = match wire {
            Wire::Sse => (true, 1),
            Wire::WebSocket => (false, 2),
        };
        assert_eq!(cluster.owner().await == owner, stays, "{wire:?}");
        let opened = cluster.home.upstream.state().sockets;
        assert_eq!(opened, sockets, "{wire:?}");
        in_order(&cluster, wire, &["function_call_output"]).await;
    }
}

#[tokio::test]
async fn the_result_of_a_tool_reaches_its_conversation_when_its_replica_was_killed_meanwhile() {
    for wire in WIRES {
        let (mut cluster, codex) = meet(wire).await;
        let tool = Tool(TempDir::new().unwrap());
        let death = async {
            tool.began().await;
            let owner = End::Killed.comes(&mut cluster).await;
            tool.end();
            owner
        };
        let prompt = tool.prompt();
        let (run, died) = tokio::join!(codex.exec(&prompt), death);
        let answer = run.expect_answer();
        assert!(answer.contains("tool said: "), "{wire:?}: {answer}");
        assert_eq!(run.errors(), [""; 0], "{wire:?}");
        assert_ne!(cluster.owner().await, died, "{wire:?}");
        in_order(&cluster, wire, &["function_call_output"]).await;
    }
}

//! The real Codex CLI through a balancer over two replicas, while the one that serves it goes away.

use std::{collections::BTreeMap, path::Path};

use loadtest::upstream::{Fault, Kind, Stage};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{
    cluster::{Cluster, Plan},
    codex::{AppServer, Codex, WIRES, Wire},
    edge::Mode,
    wait::until,
};

/// How a replica goes away.
#[derive(Clone, Copy, Debug)]
enum End {
    Killed,
    Drained,
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
        }
        owner
    }
}

/// The conversation so far was told to upstream as a whole, by one account; what upstream did is in the ledger, once, and closed.
async fn in_order(cluster: &Cluster, said: &[&str]) {
    cluster.booked().await;
    let (turns, attempts) = (cluster.turns().await, cluster.home.upstream.attempts());
    let (mut booked, mut seen) = (BTreeMap::<_, usize>::new(), BTreeMap::<_, usize>::new());
    for turn in &turns {
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
        assert_eq!(turn["input_tokens"], usage.input, "{turn:#}");
        assert_eq!(turn["output_tokens"], usage.output, "{turn:#}");
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

async fn between_turns_of_one_process(end: End) {
    for wire in WIRES {
        let (mut cluster, codex) = meet(wire).await;
        let mut server = codex.app_server().await;
        let thread = server.thread(Path::new("/tmp")).await;
        answers(&mut server, &thread, "one").await;
        let first = end.comes(&mut cluster).await;
        answers(&mut server, &thread, "two").await;
        assert_ne!(cluster.owner().await, first, "{wire:?}");
        cluster.serve(first).await;
        answers(&mut server, &thread, "three").await;
        end.comes(&mut cluster).await;
        answers(&mut server, &thread, "four").await;
        assert_eq!(server.errors, [Value::Null; 0], "{wire:?} {end:?}");
        let said = ["echo: one..", "echo: two..", "echo: three..", "\"four\""];
        in_order(&cluster, &said).await;
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
        in_order(&cluster, &["echo: one..", "echo: two..", "please [tool]"]).await;
    }
}

#[tokio::test]
async fn the_clis_own_retry_completes_a_turn_whose_replica_is_killed_before_anything_visible() {
    in_mid_turn(Stage::AfterCreated).await;
}

#[tokio::test]
async fn the_clis_own_retry_completes_a_turn_whose_replica_is_killed_in_mid_answer() {
    in_mid_turn(Stage::Visible).await;
}

async fn in_mid_turn(stage: Stage) {
    for wire in WIRES {
        let (mut cluster, codex) = meet(wire).await;
        let mut server = codex.app_server().await;
        let thread = server.thread(Path::new("/tmp")).await;
        answers(&mut server, &thread, "one").await;
        let silence = Fault::once(Kind::Silence(stage));
        cluster.home.upstream.fault(silence);
        let death = async {
            let silent = |state: &loadtest::upstream::State| state.silent == 1;
            cluster.home.upstream.wait("a silence", silent).await;
            End::Killed.comes(&mut cluster).await
        };
        let ((), died) = tokio::join!(answers(&mut server, &thread, "two"), death);
        println!("{wire:?} {stage:?}: the user saw {:?}", server.errors);
        assert_ne!(cluster.owner().await, died, "{wire:?}");
        cluster.serve(died).await;
        answers(&mut server, &thread, "three").await;
        in_order(&cluster, &["echo: one..", "echo: two..", "\"three\""]).await;
        let turns = cluster.turns().await;
        let lost = turns.iter().filter(|turn| turn["outcome"] == "lost");
        assert_eq!(lost.count(), 1, "{wire:?}: {turns:#?}");
    }
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
            let clients = &cluster.replicas[owner].clients;
            clients.set(Mode::Refuse);
            clients.cut();
            tool.end();
            owner
        };
        let prompt = tool.prompt();
        let (run, owner) = tokio::join!(codex.exec(&prompt), away);
        let answer = run.expect_answer();
        assert!(answer.contains("tool said: "), "{wire:?}: {answer}");
        println!("{wire:?}: the user saw {:?}", run.errors());
        assert_eq!(cluster.owner().await, owner, "{wire:?}: it was forwarded");
        assert_eq!(cluster.home.upstream.state().sockets, 1, "{wire:?}");
        in_order(&cluster, &["function_call_output"]).await;
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
        println!("{wire:?}: the user saw {:?}", run.errors());
        assert_ne!(cluster.owner().await, died, "{wire:?}");
        in_order(&cluster, &["function_call_output"]).await;
    }
}

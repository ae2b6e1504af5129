//! The faults, as they are done to replicas, the network, the servers and the accounts.

use std::{
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use rustix::process::Signal;
use tokio::time::sleep;

use super::{Fleet, Replica, START};
use crate::{
    chaos::{
        history::Struck,
        plan::{Break, Fault, Misfortune, Side, What},
        servers,
    },
    clock,
    edge::{Edge, Mode},
    upstream::{self, Kind, Stage},
};

/// By how much an edge delays at most.
const DELAY: Duration = Duration::from_millis(800);
/// When a balancer has noticed that a replica leaves.
const NOTICE: Duration = Duration::from_secs(1);

impl Fleet {
    /// Does a fault, from its beginning to its end.
    pub(in crate::chaos) async fn strike(self: Arc<Self>, fault: Fault) -> anyhow::Result<()> {
        let _fate = match fault.what {
            What::Kill(number) | What::Pause(number) | What::Drain(number) => {
                Some(self.replicas[number].fate.lock().await)
            }
            _ => None,
        };
        let from = clock::epoch_millis();
        let index = {
            let mut struck = self.struck.lock().unwrap_or_else(PoisonError::into_inner);
            let to = from + 600_000;
            struck.push(Struck {
                what: fault.what,
                from,
                to,
            });
            struck.len() - 1
        };
        let done = self.happen(&fault).await;
        self.struck.lock().unwrap_or_else(PoisonError::into_inner)[index].to =
            clock::epoch_millis();
        done.with_context(|| format!("{fault:?}"))
    }

    /// The faults that were done.
    pub(in crate::chaos) fn struck(&self) -> Vec<Struck> {
        self.struck
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    async fn happen(&self, fault: &Fault) -> anyhow::Result<()> {
        let lasts = Duration::from_millis(fault.lasts);
        match fault.what {
            What::Kill(number) => {
                self.signal(number, Signal::KILL).await?;
                self.unreachable(number);
                sleep(lasts).await;
                self.up(number).await
            }
            What::Pause(number) => {
                self.signal(number, Signal::STOP).await?;
                sleep(lasts).await;
                self.signal(number, Signal::CONT).await
            }
            What::Drain(number) => {
                self.signal(number, Signal::TERM).await?;
                sleep(NOTICE).await;
                self.unreachable(number);
                sleep(lasts.saturating_sub(NOTICE)).await;
                self.gone(number).await?;
                self.up(number).await
            }
            What::Edge(number, side, how) => {
                for edge in self.replicas[number].edges(side) {
                    fail(edge, how);
                }
                sleep(lasts).await;
                for edge in self.replicas[number].edges(side) {
                    edge.set(Mode::Pass);
                }
                Ok(())
            }
            What::Postgres(how) => {
                let edges = || {
                    self.replicas
                        .iter()
                        .flat_map(|one| one.edges(Side::Postgres))
                };
                edges().for_each(|edge| fail(edge, how));
                sleep(lasts).await;
                edges().for_each(|edge| edge.set(Mode::Pass));
                Ok(())
            }
            What::Stop => {
                let mut postgres = self.postgres.lock().await;
                postgres.crash();
                sleep(lasts).await;
                postgres.start().await
            }
            What::Promote => {
                let (standby, line) = self.standby.as_ref().context("there is no standby")?;
                // What is committed from here on is lost.
                line.set(Mode::BlackHole);
                sleep(lasts).await;
                line.set(Mode::Refuse);
                line.cut();
                let mut postgres = self.postgres.lock().await;
                standby.lock().await.replace(&mut postgres).await
            }
            What::Redis => {
                let (port, server) = self.redis.as_ref().context("there is no Redis")?;
                *server.lock().await = None;
                sleep(lasts).await;
                *server.lock().await = Some(servers::redis(&self.dir, *port).await?);
                Ok(())
            }
            What::Slow(_) => Ok(()),
            What::Account(number, misfortune) => self.misfortune(number, misfortune, lasts).await,
        }
    }

    async fn misfortune(
        &self,
        number: usize,
        misfortune: Misfortune,
        lasts: Duration,
    ) -> anyhow::Result<()> {
        let name = self.accounts[number];
        let kinds = match misfortune {
            Misfortune::Paused => {
                self.operate(&["accounts", "pause", name]).await?;
                sleep(lasts).await;
                self.operate(&["accounts", "resume", name]).await?;
                return Ok(());
            }
            Misfortune::Expired => {
                self.upstream.account(name).expire();
                vec![]
            }
            Misfortune::Limited => vec![Kind::RateLimit {
                resets_in: lasts.as_secs(),
            }],
            Misfortune::Broken => vec![Kind::Status(500, "server_error".into()); 3],
            Misfortune::Cut => [
                Stage::BeforeCreated,
                Stage::AfterCreated,
                Stage::Visible,
                Stage::BeforeTerminal,
            ]
            .map(Kind::Cut)
            .into(),
            Misfortune::Closed => vec![
                Kind::Close(1011, Stage::BeforeCreated),
                Kind::Close(1001, Stage::ItemDone),
            ],
            Misfortune::Silent => vec![Kind::Silence(Stage::Visible)],
        };
        let faults = kinds.into_iter().map(upstream::Fault::once);
        let faults: Vec<_> = faults.map(|fault| fault.at(name)).collect();
        for fault in &faults {
            self.upstream.fault(fault.clone());
        }
        sleep(lasts).await;
        for fault in &faults {
            self.upstream.no_fault(fault);
        }
        if misfortune == Misfortune::Silent {
            self.upstream.release();
        }
        Ok(())
    }

    async fn signal(&self, number: usize, signal: Signal) -> anyhow::Result<()> {
        match &mut *self.replicas[number].process.lock().await {
            Some(daemon) => daemon.signal(signal),
            None => Ok(()),
        }
    }

    /// As the kernel, or a balancer, does for a process that is gone.
    fn unreachable(&self, number: usize) {
        self.replicas[number].clients.set(Mode::Refuse);
        self.replicas[number].peers.set(Mode::Refuse);
    }

    /// Returns when a replica has drained.
    async fn gone(&self, number: usize) -> anyhow::Result<()> {
        let mut process = self.replicas[number].process.lock().await;
        let deadline = Instant::now() + START;
        while let Some(daemon) = process.as_mut() {
            if let Some(status) = daemon.ended()? {
                // 1: not everything could be booked, which the sweep of a peer mends.
                let itself = matches!(status.code(), Some(0 | 1));
                ensure!(itself, "a drained replica ended with {status}");
                break;
            }
            ensure!(Instant::now() < deadline, "a replica does not drain");
            sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }
}

impl Replica {
    fn edges(&self, side: Side) -> impl Iterator<Item = &Edge> {
        let (one, other) = match side {
            Side::Clients => (Some(&self.clients), None),
            Side::Peers => (Some(&self.peers), None),
            Side::Postgres => (Some(&self.postgres), self.pooler.as_ref()),
            Side::Redis => (self.redis.as_ref(), None),
            Side::Upstream => (Some(&self.upstream), None),
        };
        one.into_iter().chain(other)
    }
}

fn fail(edge: &Edge, how: Break) {
    let mode = match how {
        Break::Cut => Mode::Pass,
        Break::Refuse => Mode::Refuse,
        Break::BlackHole => Mode::BlackHole,
        Break::Delay => Mode::Delay(DELAY),
        Break::HalfOpen => Mode::HalfOpen,
    };
    edge.set(mode);
    if matches!(how, Break::Cut | Break::Refuse) {
        edge.cut();
    }
}

//! A session: one task that owns the upstream socket of one conversation and runs its turns one after the other.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Ask, Inner, Item, Running, carrier::Carrier, relay, run};

/// Turns that may wait.
const MAILBOX: usize = 8;

/// A handle to a session; the session ends when it is dropped and the running turn has ended.
#[derive(Debug)]
pub struct Session(mpsc::Sender<Job>);

/// The mailbox is full.
#[derive(Debug)]
pub struct Busy;

#[derive(Debug)]
struct Job {
    ask: Ask,
    out: relay::Sender<Item>,
}

impl Session {
    pub(super) fn open(engine: &Arc<Inner>) -> Self {
        let (sender, receiver) = mpsc::channel(MAILBOX);
        let task = serve(Arc::clone(engine), receiver);
        drop(engine.tasks.spawn("session", task));
        Self(sender)
    }

    /// Starts a turn, or lets it wait for those before it.
    ///
    /// # Errors
    /// [`Busy`] when too many wait.
    pub fn start(&self, ask: Ask) -> Result<relay::Receiver<Item>, Busy> {
        let (out, receiver) = relay::channel();
        self.0.try_send(Job { ask, out }).map_err(|_| Busy)?;
        Ok(receiver)
    }
}

async fn serve(engine: Arc<Inner>, mut jobs: mpsc::Receiver<Job>) {
    let mut carrier = Carrier::for_session();
    loop {
        // An idle socket is polled too: it answers pings, and its end is noticed before the next turn needs it.
        let job = tokio::select! {
            biased;
            job = jobs.recv() => job,
            () = carrier.rest() => continue,
            () = engine.cancel.cancelled() => None,
        };
        let Some(Job { ask, out }) = job else { break };
        let running = Running::start(&engine);
        run::run(&engine, ask, &out, &mut carrier).await;
        drop(running);
    }
    carrier.close().await;
}

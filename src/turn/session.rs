//! A session: one task that owns the upstream socket of one conversation and runs its turns one after the other.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::{Ask, Inner, Item, Running, carrier::Carrier, relay, run};

/// Turns that may wait.
const MAILBOX: usize = 8;

/// A handle to a session; the session ends when it is dropped and the running turn has ended.
#[derive(Debug)]
pub struct Session(mpsc::Sender<Job>);

/// The session takes no turn any more: its mailbox is full, or its task is gone.
#[derive(Debug)]
pub struct Unavailable;

struct Job {
    ask: Ask,
    out: relay::Sender<Item>,
    /// A turn that waits counts as running: nobody may stop over its head.
    running: Running,
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
    /// [`Unavailable`]; the client should come back on another socket.
    pub(super) fn start(
        &self,
        running: Running,
        ask: Ask,
    ) -> Result<relay::Receiver<Item>, Unavailable> {
        let (out, receiver) = relay::channel();
        let job = Job { ask, out, running };
        self.0.try_send(job).map_err(|_| Unavailable)?;
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
        let Some(Job { ask, out, running }) = job else {
            break;
        };
        run::run(&engine, ask, &out, &mut carrier).await;
        drop(running);
    }
    carrier.close().await;
}

//! The only place that spawns. Every task has a name, is counted while it runs, and is waited for when the process drains; an
//! [`errand`] alone is not, since nobody needs its end.
//!
//! An *essential* task (heartbeat, bus, view) must not end before the process stops: if it does, the process is asked to drain and exits
//! with a failure instead of limping on.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{task::JoinHandle, time::timeout};
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};
use tracing::Instrument as _;

/// Spawns and tracks the tasks of one process. Clones share the same set.
#[derive(Clone, Default)]
pub struct Tasks {
    tracker: TaskTracker,
    /// Cancelled when the process should stop; tasks of periodic work end on it.
    stop: CancellationToken,
    /// Set when an essential task ended by itself.
    failed: Arc<AtomicBool>,
}

impl Tasks {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `future` as a task. A panic in it is logged and counted, and ends that task alone.
    pub fn spawn<F>(&self, name: &'static str, future: F) -> JoinHandle<F::Output>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let guard = Running::start(name);
        self.tracker.spawn(
            async move {
                let _guard = guard;
                future.await
            }
            .instrument(tracing::Span::none()),
        )
    }

    /// Runs a task that must live as long as the process. When it ends before [`Tasks::stop`], the process is stopped and
    /// [`Tasks::failed`] tells so.
    pub fn essential<F>(&self, name: &'static str, future: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let ended = Ended {
            name,
            stop: self.stop.clone(),
            failed: Arc::clone(&self.failed),
        };
        drop(self.spawn(name, async move {
            let _ended = ended;
            future.await;
        }));
    }

    /// Runs `work` every `period` (first after one period) until the process stops, which cuts a run that is under way. A run that fails is
    /// its own affair.
    pub fn periodic<F, W>(&self, name: &'static str, period: Duration, mut work: W)
    where
        W: FnMut() -> F + Send + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        let stop = self.stop.clone();
        drop(self.spawn(name, async move {
            let runs = async {
                loop {
                    tokio::time::sleep(period).await;
                    work().await;
                }
            };
            stop.run_until_cancelled(runs).await;
        }));
    }

    /// Counts as a running task until it is dropped: for what others spawn.
    pub fn token(&self) -> TaskTrackerToken {
        self.tracker.token()
    }

    /// Ends when the process should stop.
    #[must_use]
    pub fn stopping(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Asks periodic and essential tasks to end.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Whether an essential task ended by itself.
    #[must_use]
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Acquire)
    }

    /// How many tasks run now.
    #[must_use]
    pub fn running(&self) -> usize {
        self.tracker.len()
    }

    /// Waits until every task has ended, at most `grace`. True if all did.
    pub async fn drained(&self, grace: Duration) -> bool {
        self.tracker.close();
        timeout(grace, self.tracker.wait()).await.is_ok()
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasks")
            .field("running", &self.running())
            .finish_non_exhaustive()
    }
}

/// Runs a short errand that nobody waits for, not even the end of the process. Without a runtime it is left.
pub fn errand(errand: impl Future<Output = ()> + Send + 'static) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(errand);
    }
}

/// Runs `work` on the blocking pool: hashing and decompression of large bodies.
///
/// # Panics
/// If `work` panics.
#[expect(clippy::disallowed_methods, reason = "the one place that does")]
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Counts a task while it lives, and its panic.
struct Running(&'static str);

impl Running {
    fn start(name: &'static str) -> Self {
        crate::telemetry::task_started(name);
        Self(name)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        crate::telemetry::task_ended(self.0, std::thread::panicking());
    }
}

struct Ended {
    name: &'static str,
    stop: CancellationToken,
    failed: Arc<AtomicBool>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        if !self.stop.is_cancelled() {
            tracing::error!(
                task = self.name,
                "an essential task ended; the process stops"
            );
            self.failed.store(true, Ordering::Release);
            self.stop.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_periodic_run_that_never_ends_is_cut_when_the_process_stops() {
        let tasks = Tasks::new();
        let (began, mut begun) = tokio::sync::mpsc::unbounded_channel();
        tasks.periodic("endless", Duration::from_secs(1), move || {
            began.send(()).unwrap();
            std::future::pending()
        });
        begun.recv().await.unwrap();
        tasks.stop();
        assert!(tasks.drained(Duration::from_secs(1)).await);
    }
}

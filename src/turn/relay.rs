//! The channel between a turn's task and whoever encodes it for the client, bounded in bytes.
//!
//! The sender waits when the client lags by more than [`LAG`]; a client that takes nothing for [`PATIENCE`] is a slow consumer. One event
//! larger than the bound passes when the queue is empty. When the receiver is dropped, the sender learns that the client is gone.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

/// How many bytes a client may lag behind.
const LAG: usize = 1 << 20;
/// How long a lagging client may take nothing.
const PATIENCE: Duration = Duration::from_secs(60);

/// What counts towards the bound.
pub trait Weight {
    /// Bytes held while queued.
    fn weight(&self) -> usize;
}

/// Why an item could not be handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// The receiver was dropped: the client is gone.
    Gone,
    /// The client has taken nothing for a minute.
    Slow,
}

/// The turn's end.
#[derive(Debug)]
pub struct Sender<T> {
    items: mpsc::UnboundedSender<T>,
    flow: Arc<Flow>,
}

/// The client's end.
#[derive(Debug)]
pub struct Receiver<T> {
    items: mpsc::UnboundedReceiver<T>,
    watch: Watch<T>,
}

#[derive(Debug, Default)]
struct Flow {
    queued: AtomicUsize,
    /// Told by the receiver when the queue falls below the bound.
    drained: Notify,
    /// Told by whoever waits for the end of a turn whose client is gone.
    hurry: Notify,
}

/// Sees whether somebody still takes what a turn yields, without keeping the channel open.
#[derive(Debug)]
pub struct Watch<T> {
    items: mpsc::WeakUnboundedSender<T>,
    flow: Arc<Flow>,
}

impl<T> Clone for Watch<T> {
    fn clone(&self) -> Self {
        Self {
            items: self.items.clone(),
            flow: Arc::clone(&self.flow),
        }
    }
}

impl<T> Watch<T> {
    /// Whether the turn can still yield something.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.items.strong_count() > 0
    }

    /// Whether the receiver was dropped while the turn runs on.
    #[must_use]
    pub fn is_abandoned(&self) -> bool {
        self.items.upgrade().is_some_and(|items| items.is_closed())
    }

    /// Asks an abandoned turn to end at once.
    pub fn hurry(&self) {
        self.flow.hurry.notify_one();
    }
}

/// A new channel.
#[must_use]
pub fn channel<T: Weight>() -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let sender = Sender {
        items: sender,
        flow: Arc::default(),
    };
    let watch = sender.watch();
    let receiver = Receiver {
        items: receiver,
        watch,
    };
    (sender, receiver)
}

impl<T: Weight> Sender<T> {
    /// Hands an item over, waiting while the client lags. What weighs nothing does not wait: a slow client learns of its end.
    ///
    /// # Errors
    /// When there is nobody to take it.
    pub async fn send(&self, item: T) -> Result<(), Lost> {
        let weight = item.weight();
        if weight > 0 && self.flow.queued.load(Ordering::Acquire) >= LAG {
            self.room().await?;
        }
        self.flow.queued.fetch_add(weight, Ordering::AcqRel);
        self.items.send(item).map_err(|_| Lost::Gone)
    }

    /// Hands over what ends the turn, however far the client lags: it is the last, and nobody waits for a client at the end.
    pub fn last(&self, item: T) {
        self.flow.queued.fetch_add(item.weight(), Ordering::AcqRel);
        // The client may be gone; then nobody needs to know.
        drop(self.items.send(item));
    }

    /// Whether the receiver was dropped.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.items.is_closed()
    }

    /// Waits until the client has caught up; starts the clock anew whenever it takes something.
    async fn room(&self) -> Result<(), Lost> {
        loop {
            let before = self.flow.queued.load(Ordering::Acquire);
            if before < LAG {
                return Ok(());
            }
            tokio::select! {
                () = self.items.closed() => return Err(Lost::Gone),
                waited = timeout(PATIENCE, self.flow.drained.notified()) => {
                    if waited.is_err() && self.flow.queued.load(Ordering::Acquire) >= before {
                        return Err(Lost::Slow);
                    }
                }
            }
        }
    }

    /// Ends `patience` after the receiver was dropped, or when somebody is in a hurry then.
    pub async fn abandoned(&self, patience: Duration) {
        self.items.closed().await;
        drop(timeout(patience, self.flow.hurry.notified()).await);
    }

    /// A view of whether the client is gone.
    #[must_use]
    pub fn watch(&self) -> Watch<T> {
        Watch {
            items: self.items.downgrade(),
            flow: Arc::clone(&self.flow),
        }
    }
}

impl<T: Weight> Receiver<T> {
    /// The next item; `None` when the sender is gone.
    pub async fn recv(&mut self) -> Option<T> {
        std::future::poll_fn(|context| self.poll_recv(context)).await
    }

    /// A view of whether the turn runs.
    #[must_use]
    pub fn watch(&self) -> Watch<T> {
        self.watch.clone()
    }

    /// As [`Receiver::recv`].
    pub fn poll_recv(&mut self, context: &mut Context<'_>) -> Poll<Option<T>> {
        let item = std::task::ready!(self.items.poll_recv(context));
        if let Some(item) = &item {
            let weight = item.weight();
            let flow = &self.watch.flow;
            let before = flow.queued.fetch_sub(weight, Ordering::AcqRel);
            if before >= LAG && before - weight < LAG {
                flow.drained.notify_one();
            }
        }
        Poll::Ready(item)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Weight for usize {
        fn weight(&self) -> usize {
            *self
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_for_a_minute_is_slow() {
        let (sender, _receiver) = channel();
        sender
            .send(16 << 20)
            .await
            .expect("one event of any size passes an empty queue");
        assert_eq!(sender.send(1).await, Err(Lost::Slow));
        let end = tokio::time::timeout(Duration::ZERO, sender.send(0)).await;
        assert_eq!(end, Ok(Ok(())), "its end is told at once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_catches_up_is_waited_for() {
        let (sender, mut receiver) = channel();
        sender.send(LAG).await.unwrap();
        let (sent, taken) = tokio::join!(sender.send(1), receiver.recv());
        assert_eq!((sent, taken), (Ok(()), Some(LAG)));
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_noticed() {
        let (sender, receiver) = channel();
        sender.send(LAG).await.unwrap();
        let (sent, ()) = tokio::join!(sender.send(1), async { drop(receiver) });
        assert_eq!(sent, Err(Lost::Gone));
        sender.abandoned(Duration::ZERO).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_abandoned_turn_ends_at_once_when_somebody_waits_for_it() {
        let (sender, receiver) = channel::<usize>();
        let watch = sender.watch();
        assert!(!watch.is_abandoned());
        drop(receiver);
        assert!(watch.is_abandoned());
        watch.hurry();
        let before = tokio::time::Instant::now();
        sender.abandoned(PATIENCE).await;
        assert_eq!(before.elapsed(), Duration::ZERO);
        drop(sender);
        assert!(!watch.is_abandoned(), "it has ended");
    }
}

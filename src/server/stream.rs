//! A connection's stream as hyper gets it, which keeps what one client may cost.
//!
//! Who takes nothing for a minute loses the connection: an answer whose turn is over must not hold it for ever. While a turn runs, the
//! turn itself decides about a slow client; a socket does so all along. Reads are small, so that hyper's room for them is. And what
//! arrives of a socket's message is counted before it is whole, since only then the socket tells of it.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use http::Response;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf, Take},
    time::{Instant, Sleep, sleep},
};

use crate::turn::{Inbox, Item, relay::Watch};

/// How long a write may make no progress once nothing else watches it.
const PATIENCE: Duration = Duration::from_secs(60);

/// The most of one read: hyper makes room for twice what the last one filled, and keeps it for as long as the answer streams. A filled
/// one is of 8 KiB at least.
const READ: u64 = (8 << 10) - 1;

/// What a connection carries now.
#[derive(Clone, Default)]
pub(super) struct Load(Arc<Mutex<Carried>>);

#[derive(Default)]
enum Carried {
    #[default]
    Answer,
    Turn(Watch<Item>),
    Socket(Inbox),
}

impl Load {
    /// Notes what the next bytes belong to.
    pub(super) fn carries<B>(&self, response: &mut Response<B>) {
        let extensions = response.extensions_mut();
        let turn = extensions.remove().map(Carried::Turn);
        let socket = extensions.remove().map(Carried::Socket);
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) =
            turn.or(socket).unwrap_or_default();
    }

    /// Whether what has arrived may be kept.
    fn admits(&self, bytes: usize) -> bool {
        match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Carried::Socket(inbox) => inbox.arrived(bytes),
            // Bodies are counted by who reads them, piece by piece.
            Carried::Answer | Carried::Turn(_) => true,
        }
    }

    /// Whether somebody else decides how long the client is waited for.
    fn is_watched(&self) -> bool {
        match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            Carried::Answer => false,
            Carried::Turn(watch) => watch.is_running(),
            Carried::Socket(_) => true,
        }
    }
}

/// A stream whose writes fail when they stall, and whose reads when they are too much.
pub(super) struct Guarded<S> {
    stream: Take<S>,
    load: Load,
    stalled: Option<Stalled>,
}

struct Stalled {
    timer: Pin<Box<Sleep>>,
    /// Whether somebody else watched when the timer was set.
    watched: bool,
}

impl<S: AsyncRead + Unpin> Guarded<S> {
    pub(super) fn new(stream: S, load: Load) -> Self {
        Self {
            stream: stream.take(0),
            load,
            stalled: None,
        }
    }

    /// A write, unless it has stalled for too long. The minute begins anew when a turn ends in it: its end must be readable.
    fn unless_stalled<T>(
        &mut self,
        context: &mut Context<'_>,
        write: impl FnOnce(Pin<&mut S>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let written = write(Pin::new(self.stream.get_mut()), context);
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let load = &self.load;
        let stalled = self.stalled.get_or_insert_with(|| Stalled {
            timer: Box::pin(sleep(PATIENCE)),
            watched: load.is_watched(),
        });
        loop {
            ready!(stalled.timer.as_mut().poll(context));
            let watched = load.is_watched();
            if !std::mem::replace(&mut stalled.watched, watched) && !watched {
                return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
            }
            stalled.timer.as_mut().reset(Instant::now() + PATIENCE);
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        self.stream.set_limit(READ);
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        Poll::Ready(if self.load.admits(buffer.filled().len() - before) {
            Ok(())
        } else {
            Err(io::ErrorKind::OutOfMemory.into())
        })
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.unless_stalled(context, |stream, context| stream.poll_write(context, bytes))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.unless_stalled(context, |stream, context| {
            stream.poll_write_vectored(context, parts)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.get_ref().is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream.get_mut()).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.stream.get_mut()).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncWriteExt as _, duplex},
        time::timeout,
    };

    use super::*;
    use crate::turn::relay;

    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_for_a_minute_loses_its_connection() {
        let (ours, mut theirs) = duplex(1);
        let mut ours = Guarded::new(ours, Load::default());
        let reads = async {
            for _ in 0..9 {
                tokio::time::sleep(PATIENCE - Duration::from_secs(1)).await;
                theirs.read_u8().await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(ours.write_all(b"slow, but"), reads);
        written.unwrap();
        let before = Instant::now();
        let error = ours.write_all(b"over").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(before.elapsed().as_secs(), 60);
    }

    #[tokio::test]
    async fn a_read_stays_below_what_would_make_the_next_buffer_larger() {
        let (ours, mut theirs) = duplex(1 << 20);
        let mut ours = Guarded::new(ours, Load::default());
        theirs.write_all(&[7; 20_000]).await.unwrap();
        drop(theirs);
        let (mut all, mut buffer) = (Vec::new(), vec![0; 1 << 20]);
        loop {
            let read = ours.read(&mut buffer).await.unwrap();
            assert!(read < 8192);
            if read == 0 {
                break;
            }
            all.extend_from_slice(&buffer[..read]);
        }
        assert_eq!(all, [7; 20_000]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_and_a_socket_decide_for_themselves_and_the_end_of_a_turn_waits_for_a_minute() {
        let (ours, _theirs) = duplex(1);
        let load = Load::default();
        let mut ours = Guarded::new(ours, load.clone());
        let (sender, receiver) = relay::channel::<Item>();
        let mut response = Response::new(());
        response.extensions_mut().insert(receiver.watch());
        load.carries(&mut response);
        assert!(timeout(HOUR, ours.write_all(b"turn")).await.is_err());
        drop(sender);
        let before = Instant::now();
        ours.write_all(b"end").await.unwrap_err();
        assert!((60..=120).contains(&before.elapsed().as_secs()));

        response.extensions_mut().insert(Inbox::default());
        load.carries(&mut response);
        let (ours, _theirs) = duplex(1);
        let mut ours = Guarded::new(ours, load);
        assert!(timeout(HOUR, ours.write_all(b"socket")).await.is_err());
    }
}

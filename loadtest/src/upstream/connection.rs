//! The fake's end of a TCP connection, which a handler can break before it has answered.
//!
//! A broken response body is not that: its head has gone out by then.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker},
};

use axum::{
    extract::connect_info::Connected,
    serve::{self, IncomingStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
};

/// Breaks the connection it belongs to.
#[derive(Clone, Default)]
pub(super) struct Link(Arc<Mutex<Breaking>>);

#[derive(Default)]
struct Breaking {
    how: Option<Break>,
    reader: Option<Waker>,
}

/// How a connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Break {
    /// By a reset.
    Reset,
    /// By an ordinary end of the stream.
    End,
}

impl Link {
    fn with<T>(&self, with: impl FnOnce(&mut Breaking) -> T) -> T {
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Breaks the connection, and the caller with it: hyper drops what it was serving.
    pub(super) async fn sever(&self, how: Break) -> ! {
        let reader = self.with(|breaking| {
            breaking.how = Some(how);
            breaking.reader.take()
        });
        if let Some(reader) = reader {
            reader.wake();
        }
        std::future::pending().await
    }
}

impl Connected<IncomingStream<'_, Listener>> for Link {
    fn connect_info(stream: IncomingStream<'_, Listener>) -> Self {
        stream.io().link.clone()
    }
}

/// Accepts streams that send at once (events are small: they must not wait for each other) and can be broken.
pub(super) struct Listener(pub(super) TcpListener);

impl serve::Listener for Listener {
    type Io = Stream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            if let Ok((stream, address)) = self.0.accept().await
                && stream.set_nodelay(true).is_ok()
            {
                let link = Link::default();
                return (Stream { stream, link }, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.0.local_addr()
    }
}

/// A TCP stream that ends when, and as, its link says.
pub(super) struct Stream {
    stream: TcpStream,
    link: Link,
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.link.with(|breaking| breaking.how) == Some(Break::Reset) {
            // A socket that refuses the option is closed already.
            let _ = self.stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let broken = self.link.with(|breaking| {
            breaking.reader = Some(cx.waker().clone());
            breaking.how.is_some()
        });
        if broken {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

//! A network that stops to deliver: a TCP proxy whose connections hang on demand, without being closed.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

/// Connections are numbered; those below a number deliver nothing until that changes.
pub(crate) struct Chaos {
    pub(crate) address: SocketAddr,
    made: Arc<AtomicU64>,
    hung_below: watch::Sender<u64>,
    accepting: JoinHandle<()>,
}

impl Chaos {
    /// In front of `target`; delivers everything at first.
    pub(crate) async fn before(target: SocketAddr) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (made, hung_below) = (Arc::new(AtomicU64::new(0)), watch::Sender::new(0));
        let (count, hung) = (Arc::clone(&made), hung_below.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((here, _)) = listener.accept().await {
                let (number, hung) = (count.fetch_add(1, Ordering::SeqCst), hung.subscribe());
                tokio::spawn(async move {
                    let Ok(there) = TcpStream::connect(target).await else {
                        return;
                    };
                    let ((from, to), (back, forth)) = (here.into_split(), there.into_split());
                    // When one end closes, so does the other, unless the connection hangs.
                    tokio::select! {
                        () = deliver(from, forth, number, hung.clone()) => {}
                        () = deliver(back, to, number, hung) => {}
                    }
                });
            }
        });
        Self {
            address,
            made,
            hung_below,
            accepting,
        }
    }

    /// Every connection hangs, new ones too.
    pub(crate) fn hang(&self) {
        self.hung_below.send_replace(u64::MAX);
    }

    /// The connections that exist hang; new ones do not.
    pub(crate) fn hang_present(&self) {
        self.hung_below
            .send_replace(self.made.load(Ordering::SeqCst));
    }

    /// Everything is delivered again; what was sent meanwhile is lost, and its connection with it.
    pub(crate) fn heal(&self) {
        self.hung_below.send_replace(0);
    }
}

impl Drop for Chaos {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn deliver(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    number: u64,
    mut hung_below: watch::Receiver<u64>,
) {
    let mut buffer = [0; 8192];
    let passes = |below: &u64| number >= *below;
    while let Ok(read) = from.read(&mut buffer).await {
        if !passes(&hung_below.borrow_and_update()) {
            drop(hung_below.wait_for(passes).await);
            return;
        }
        if read == 0 || to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}

//! One edge of a network: a TCP proxy whose faults are switched while it runs, for the connections that exist and those to come.
//!
//! With several targets it is a balancer without affinity: connections go round, and one that a target refuses goes to the next.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use rustix::net::Shutdown;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
    time::sleep,
};

use crate::process::lasting_port;

/// What an edge does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It delivers.
    Pass,
    /// New connections are refused; those that exist go on.
    Refuse,
    /// Nothing is delivered, either way, and no end either; when healed, what was sent meanwhile arrives.
    BlackHole,
    /// What the target says is not delivered, nor that it hung up.
    HalfOpen,
    /// Whatever is sent arrives later, by up to so long.
    Delay(Duration),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    There,
    Back,
}

impl Mode {
    fn delivers(self, way: Way) -> bool {
        match self {
            Self::BlackHole => false,
            Self::HalfOpen => way == Way::There,
            Self::Pass | Self::Refuse | Self::Delay(_) => true,
        }
    }
}

/// A running edge; dropped, it accepts no more.
pub struct Edge {
    /// Where it listens.
    pub address: SocketAddr,
    mode: watch::Sender<Mode>,
    /// Connections of earlier rounds are gone.
    round: watch::Sender<u64>,
    accepting: JoinHandle<()>,
}

impl Edge {
    /// In front of one target, or round-robin in front of several; it delivers at first. Delays are drawn by the seed.
    ///
    /// # Panics
    /// If no port can be had.
    pub async fn before(targets: &[SocketAddr], seed: u64) -> Self {
        // One that nobody is given while new connections are refused.
        let port = lasting_port().expect("a free port");
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))
            .await
            .expect("a free port");
        let address = listener
            .local_addr()
            .expect("a bound listener has an address");
        let (mode, round) = (watch::Sender::new(Mode::Pass), watch::Sender::new(0));
        let line = Line {
            targets: targets.into(),
            next: Arc::default(),
            random: Arc::new(Mutex::new(StdRng::seed_from_u64(seed))),
            mode: mode.subscribe(),
            round: round.subscribe(),
        };
        Self {
            address,
            accepting: tokio::spawn(accept(listener, address, line)),
            mode,
            round,
        }
    }

    /// What it does from now on.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Delivers again, to new connections too when this returns.
    pub async fn open(&self) {
        self.set(Mode::Pass);
        while TcpStream::connect(self.address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Resets the connections that exist.
    pub fn cut(&self) {
        self.round.send_modify(|round| *round += 1);
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

/// What every connection of an edge knows.
#[derive(Clone)]
struct Line {
    targets: Arc<[SocketAddr]>,
    next: Arc<AtomicUsize>,
    random: Arc<Mutex<StdRng>>,
    mode: watch::Receiver<Mode>,
    round: watch::Receiver<u64>,
}

async fn accept(listener: TcpListener, address: SocketAddr, mut line: Line) {
    let mut listener = Some(listener);
    loop {
        // Without a listener the kernel refuses, as it would for a process that is gone.
        let refuses = *line.mode.borrow_and_update() == Mode::Refuse;
        if refuses {
            for here in listener.take().into_iter().flat_map(close) {
                tokio::spawn(line.clone().serve(here));
            }
        } else if listener.is_none() {
            listener = TcpListener::bind(address).await.ok();
        }
        let accepted = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None if refuses => std::future::pending().await,
                // Somebody else has the port at the moment.
                None => {
                    sleep(Duration::from_millis(10)).await;
                    Err(io::ErrorKind::AddrInUse.into())
                }
            }
        };
        tokio::select! {
            accepted = accepted => {
                if let Ok((here, _)) = accepted {
                    tokio::spawn(line.clone().serve(here));
                }
            }
            changed = line.mode.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// Stops listening, and yields the connections that exist for their clients already: the kernel would reset them.
fn close(listener: TcpListener) -> Vec<TcpStream> {
    let Ok(listener) = listener.into_std() else {
        return Vec::new();
    };
    let accepted = std::iter::from_fn(|| listener.accept().ok());
    let accepted = accepted.filter_map(|(here, _)| {
        here.set_nonblocking(true).ok()?;
        TcpStream::from_std(here).ok()
    });
    let accepted = accepted.collect();
    // Closed alone, it would live on in whatever process this one is just starting, and reset who connects when that execs.
    let _ = rustix::net::shutdown(&listener, Shutdown::Both);
    accepted
}

impl Line {
    async fn serve(mut self, here: TcpStream) {
        let round = *self.round.borrow_and_update();
        let Some(there) = self.connect().await else {
            // Not an end: a peer that looks would take that for an answer.
            drop(here.set_zero_linger());
            return;
        };
        drop((here.set_nodelay(true), there.set_nodelay(true)));
        let (from, mut to) = here.into_split();
        let (back, mut forth) = there.into_split();
        let mut rounds = self.round.clone();
        let both = async {
            tokio::try_join!(
                self.carry(from, &mut forth, Way::There),
                self.carry(back, &mut to, Way::Back)
            )
        };
        let broken = tokio::select! {
            both = both => both.is_err(),
            _ = rounds.wait_for(|now| *now != round) => true,
        };
        if broken {
            for half in [to, forth] {
                drop(half.as_ref().set_zero_linger());
                // Dropped, it would say goodbye first.
                half.forget();
            }
        }
    }

    /// To the target whose turn it is, or the next that does not refuse.
    async fn connect(&self) -> Option<TcpStream> {
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        for n in 0..self.targets.len() {
            let target = self.targets[(first + n) % self.targets.len()];
            if let Ok(there) = TcpStream::connect(target).await {
                return Some(there);
            }
        }
        None
    }

    async fn carry(
        &self,
        mut from: OwnedReadHalf,
        to: &mut OwnedWriteHalf,
        way: Way,
    ) -> io::Result<()> {
        let mut mode = self.mode.clone();
        let mut buffer = vec![0; 16 << 10];
        loop {
            let read = from.read(&mut buffer).await;
            let now = match mode.wait_for(|mode| mode.delivers(way)).await {
                Ok(now) => *now,
                Err(_) => return Err(io::ErrorKind::ConnectionReset.into()),
            };
            if let Mode::Delay(most) = now {
                let part = self
                    .random
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .random_range(0.0..1.0);
                sleep(most.mul_f64(part)).await;
            }
            let read = read?;
            if read == 0 {
                return to.shutdown().await;
            }
            to.write_all(&buffer[..read]).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use tokio::{net::TcpSocket, time::timeout};

    use super::*;

    const SOON: Duration = Duration::from_secs(5);
    const SILENCE: Duration = Duration::from_millis(100);

    /// A server that says its name first, then echoes.
    async fn echo(name: u8) -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    socket.write_all(&[name]).await.unwrap();
                    let (mut from, mut to) = socket.split();
                    drop(tokio::io::copy(&mut from, &mut to).await);
                });
            }
        });
        address
    }

    async fn byte(socket: &mut TcpStream) -> io::Result<u8> {
        timeout(SOON, socket.read_u8()).await.unwrap()
    }

    #[tokio::test]
    async fn connections_go_round_and_past_who_refuses() {
        // Bound, and nobody listens.
        let gone = TcpSocket::new_v4().unwrap();
        gone.bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let targets = [
            echo(b'a').await,
            echo(b'b').await,
            gone.local_addr().unwrap(),
        ];
        let edge = Edge::before(&targets, 0).await;
        let mut names = Vec::new();
        for _ in 0..6 {
            let mut socket = TcpStream::connect(edge.address).await.unwrap();
            names.push(byte(&mut socket).await.unwrap());
        }
        assert_eq!(names, *b"abaaba");
    }

    #[tokio::test]
    async fn a_connection_from_before_it_refused_is_served() {
        let edge = Edge::before(&[echo(b'a').await], 0).await;
        for _ in 0..20 {
            edge.open().await;
            // Nothing else runs on this thread until it is asked: the connections wait in the listener's queue.
            let early: Vec<_> = (0..5)
                .map(|_| std::net::TcpStream::connect(edge.address).unwrap())
                .collect();
            edge.set(Mode::Refuse);
            for early in early {
                early.set_nonblocking(true).unwrap();
                let mut early = TcpStream::from_std(early).unwrap();
                assert_eq!(byte(&mut early).await.unwrap(), b'a');
            }
        }
    }

    #[tokio::test]
    async fn who_refuses_does_so_while_a_process_is_started() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        // What a child has between its fork and its exec.
        let child = listener.as_fd().try_clone_to_owned().unwrap();
        assert!(close(listener).is_empty());
        let refused = TcpStream::connect(address).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        TcpListener::bind(address).await.unwrap();
        drop(child);
    }

    #[tokio::test]
    async fn each_fault_is_what_it_says_and_heals() {
        let edge = Edge::before(&[echo(b'a').await], 0).await;
        let mut socket = TcpStream::connect(edge.address).await.unwrap();
        assert_eq!(byte(&mut socket).await.unwrap(), b'a');
        for mode in [Mode::BlackHole, Mode::HalfOpen] {
            edge.set(mode);
            socket.write_all(b"x").await.unwrap();
            let silent = timeout(SILENCE, socket.read_u8()).await;
            assert!(silent.is_err(), "{mode:?}");
            edge.set(Mode::Pass);
            assert_eq!(byte(&mut socket).await.unwrap(), b'x', "late, not lost");
        }
        edge.set(Mode::Delay(SILENCE));
        socket.write_all(b"y").await.unwrap();
        assert_eq!(byte(&mut socket).await.unwrap(), b'y');

        edge.set(Mode::Refuse);
        let refused = async {
            while TcpStream::connect(edge.address).await.is_ok() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, refused).await.unwrap();
        socket.write_all(b"z").await.unwrap();
        assert_eq!(
            byte(&mut socket).await.unwrap(),
            b'z',
            "the old one goes on"
        );

        edge.cut();
        let error = byte(&mut socket).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        edge.set(Mode::Pass);
        let again = async {
            while TcpStream::connect(edge.address).await.is_err() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, again).await.unwrap();
    }
}

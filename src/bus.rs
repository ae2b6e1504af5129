//! Tells every replica that something it caches has changed. The bus carries versions, never meaning: a listener re-reads its own data.
//!
//! The truth is `bus_versions(topic, version)`, bumped by the last statement of the writing transaction ([`commit`]). `LISTEN` makes
//! listeners hear of it at once, and Redis where LISTEN does not work; a poll underneath makes them hear of it anyway. A lost, late,
//! repeated or forged hint changes nothing but the delay, which is at most 1 s with LISTEN or Redis and 2.5 s by poll alone. After a
//! failover that lost commits a version may stand for another change than before: any other version is news, and so is every topic then.

mod redis;
mod store;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tokio_postgres::AsyncMessage;

pub use self::{
    redis::Redis,
    store::{STATEMENTS, commit},
};
use crate::{
    db::{Db, Error},
    task::Tasks,
    telemetry,
};

/// What can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Topic {
    /// Accounts, their life cycle, credentials and sticky sessions.
    Accounts,
    /// Client keys.
    ApiKeys,
    /// Model catalogues.
    Models,
    /// Windows and blocks.
    Quota,
}

impl Topic {
    /// Every topic, in the order in which they are bumped.
    pub const ALL: [Self; 4] = [Self::Accounts, Self::ApiKeys, Self::Models, Self::Quota];

    /// The key in `bus_versions`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Accounts => "accounts",
            Self::ApiKeys => "api_keys",
            Self::Models => "models",
            Self::Quota => "quota",
        }
    }
}

/// Poll under a working LISTEN or Redis, and alone.
const POLL: Duration = Duration::from_secs(2);
const POLL_ALONE: Duration = Duration::from_millis(500);
/// Until LISTEN is tried again: where it does not work, and where its connection was lost.
const LISTEN_ANEW: Duration = Duration::from_secs(60);
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

/// For the connection that listens, and for the versions of one poll.
const CONNECT: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(5);

/// How an attempt to listen ended.
enum Listened {
    /// Our own probe did not come back.
    Unheard,
    /// The connection ended.
    Lost,
}

/// What was last read of a topic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    version: i64,
    /// How often it was another one than before.
    changes: u64,
}

/// What was seen of each topic. Clones share it.
#[derive(Clone, Debug)]
pub struct Bus {
    topics: watch::Sender<[Seen; Topic::ALL.len()]>,
    /// Redis is connected.
    hurried: Arc<AtomicBool>,
    /// Notifications of Postgres arrive.
    listening: Arc<AtomicBool>,
    /// When all versions were last read.
    read: Arc<Mutex<Instant>>,
    db: Db,
}

/// What makes a bus read before its poll is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hurry {
    /// Notifications of Postgres.
    pub listen: bool,
    /// Messages through Redis.
    pub redis: bool,
}

/// Hears when one topic has changed since it last did.
#[derive(Debug)]
pub struct Subscription {
    topics: watch::Receiver<[Seen; Topic::ALL.len()]>,
    topic: Topic,
    heard: u64,
}

impl Subscription {
    /// Waits for a change after the last one returned; yields its number. Read the data after this returns: a write in between only
    /// causes one more turn. `None` when the bus is gone.
    pub async fn changed(&mut self) -> Option<u64> {
        let (topic, heard) = (self.topic, self.heard);
        let newer = |topics: &[Seen; Topic::ALL.len()]| topics[topic as usize].changes > heard;
        self.heard = self.topics.wait_for(newer).await.ok()?[topic as usize].changes;
        Some(self.heard)
    }
}

impl Bus {
    /// A bus that has read every version once.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn connect(db: &Db) -> Result<Self, Error> {
        let bus = Self {
            topics: watch::Sender::new([Seen::default(); Topic::ALL.len()]),
            hurried: Arc::default(),
            listening: Arc::default(),
            read: Arc::new(Mutex::new(Instant::now())),
            db: db.clone(),
        };
        bus.refresh().await?;
        Ok(bus)
    }

    /// Follows one topic from now on; the caller reads its data after subscribing.
    #[must_use]
    pub fn subscribe(&self, topic: Topic) -> Subscription {
        let topics = self.topics.subscribe();
        let heard = topics.borrow()[topic as usize].changes;
        Subscription {
            topics,
            topic,
            heard,
        }
    }

    /// How many changes of a topic this process has seen.
    #[must_use]
    pub fn changes(&self, topic: Topic) -> u64 {
        self.topics.borrow()[topic as usize].changes
    }

    /// Counts every topic as changed: the database is not the one that was read, whatever its versions say.
    pub fn doubt(&self) {
        self.topics.send_modify(|topics| {
            for seen in topics {
                seen.changes += 1;
            }
        });
    }

    /// What hurries it now.
    #[must_use]
    pub fn hurry_now(&self) -> Hurry {
        Hurry {
            listen: self.listening.load(Ordering::Relaxed),
            redis: self.hurried.load(Ordering::Relaxed),
        }
    }

    /// How long ago all versions were last read.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.read().elapsed()
    }

    fn read(&self) -> MutexGuard<'_, Instant> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads all versions now.
    ///
    /// # Errors
    /// If the database cannot be asked.
    pub async fn refresh(&self) -> Result<(), Error> {
        let read = store::read(&self.db).await?;
        *self.read() = Instant::now();
        self.topics.send_if_modified(|topics| {
            let before = *topics;
            for (topic, version, age) in read {
                let seen = &mut topics[topic as usize];
                // The first version is read, not heard of.
                if (1..version).contains(&seen.version) {
                    telemetry::bus_lag(age);
                }
                if seen.version != version {
                    seen.version = version;
                    seen.changes += 1;
                }
            }
            before != *topics
        });
        Ok(())
    }

    /// Listens and polls until the process stops.
    pub async fn run(self, tasks: Tasks) {
        let stop = tasks.stopping();
        stop.run_until_cancelled(self.follow()).await;
    }

    async fn follow(&self) {
        let mut warned = false;
        loop {
            let again = match self.listen().await {
                Ok(Listened::Unheard) => {
                    if !warned {
                        warned = true;
                        tracing::warn!(
                            "the database delivers no notifications (DRAWBRIDGE_DATABASE_DIRECT_URL is a pooler?); versions are polled"
                        );
                    }
                    LISTEN_ANEW
                }
                Ok(Listened::Lost) => LISTEN_AGAIN,
                Err(error) => {
                    tracing::debug!(%error, "cannot listen");
                    LISTEN_AGAIN
                }
            };
            let again = Instant::now() + again;
            while Instant::now() < again {
                let hurried = self.hurried.load(Ordering::Relaxed);
                sleep(if hurried { POLL } else { POLL_ALONE }).await;
                self.poll().await;
            }
        }
    }

    /// Listens on a connection of its own until it is lost. Its own first notification must arrive within 1 s: behind a transaction
    /// pooler LISTEN is accepted and never delivers.
    async fn listen(&self) -> Result<Listened, Error> {
        // A server that takes the connection and says nothing is polled meanwhile, by the other way.
        let connecting = timeout(CONNECT, self.db.dedicated());
        tokio::pin!(connecting);
        let connected = loop {
            tokio::select! {
                connected = &mut connecting => break connected,
                () = sleep(POLL_ALONE) => self.poll().await,
            }
        };
        let Ok(connected) = connected else {
            return Ok(Listened::Lost);
        };
        let (client, mut driver) = connected?;
        let heard = async {
            let subscribe = store::listen(&client);
            tokio::pin!(subscribe);
            let mut subscribed = false;
            loop {
                tokio::select! {
                    result = &mut subscribe, if !subscribed => { result?; subscribed = true; }
                    message = driver.next() => match message {
                        Some(AsyncMessage::Notification(_)) => return Ok::<_, Error>(true),
                        Some(_) => {}
                        None => return Ok(false),
                    },
                }
            }
        };
        match timeout(Duration::from_secs(1), heard).await {
            Ok(Ok(true)) => {}
            Ok(Ok(false)) => return Ok(Listened::Lost),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Ok(Listened::Unheard),
        }
        self.listening.store(true, Ordering::Relaxed);
        loop {
            self.poll().await;
            if let Ok(None) = timeout(POLL, driver.next()).await {
                self.listening.store(false, Ordering::Relaxed);
                return Ok(Listened::Lost);
            }
        }
    }

    async fn poll(&self) {
        match timeout(ANSWER, self.refresh()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "cannot read versions"),
            Err(_) => tracing::debug!("the database does not tell the versions"),
        }
    }
}

//! Hints through Redis: what this process has committed is told to the others, and theirs make it read the versions.
//!
//! Redis is believed nothing but "there may be something new": absent, flapping or lying, it changes when versions are read, at most five
//! times a second, and never what is read.

use std::{
    convert::Infallible,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use redis::{
    AsyncConnectionConfig, Client, IntoConnectionInfo as _, ProtocolVersion, PushInfo, PushKind,
    RedisError, Value, aio::MultiplexedConnection,
};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::{
    sync::Notify,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{Bus, Topic};
use crate::{
    db::{Db, Error},
    task::Tasks,
};

/// Where the messages are. Each is a topic and its version.
const CHANNEL: &str = "drawbridge";
/// Between two reads that messages cause.
const REST: Duration = Duration::from_millis(200);
/// A silent connection is asked whether it lives, this often.
const PROBE: Duration = Duration::from_secs(5);
/// Between two tries to connect.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a command waits for its last words to be told.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A Redis to talk through; not connected yet.
#[derive(Clone, Debug)]
pub struct Redis(Client);

impl Redis {
    /// Reads a `redis://` or `rediss://` URL.
    ///
    /// # Errors
    /// If it is none.
    pub fn new(url: &SecretString) -> Result<Self, RedisError> {
        let info = url.expose_secret().into_connection_info()?;
        // Messages and commands on one connection need pushes, hence version 3.
        let settings = info
            .redis_settings()
            .clone()
            .set_protocol(ProtocolVersion::RESP3);
        Client::open(info.set_redis_settings(settings)).map(Self)
    }

    /// Tells others what has changed in `db`, once: for processes without a bus. Best effort.
    pub async fn tell(&self, db: &Db) {
        let told = async {
            let bus = Bus::connect(db).await?;
            let mut connection = self.0.get_multiplexed_async_connection().await?;
            publish(&mut connection, &bus, [0; Topic::ALL.len()]).await?;
            Ok::<_, Untold>(())
        };
        match timeout(LAST_WORDS, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "Redis was not told"),
            Err(_) => tracing::debug!("Redis was not told in time"),
        }
    }
}

impl Redis {
    /// Asks whether it lives and passes messages on: how long a message to ourselves took.
    ///
    /// # Errors
    /// If it cannot be reached, or the message does not arrive within a second.
    pub async fn probe(&self) -> Result<Duration, RedisError> {
        let arrived = Arc::new(Notify::new());
        let hint = Arc::clone(&arrived);
        let config = AsyncConnectionConfig::new().set_push_sender(move |push: PushInfo| {
            if push.kind == PushKind::Message {
                hint.notify_one();
            }
            Ok::<_, Infallible>(())
        });
        let channel = format!("{CHANNEL}-probe-{}", uuid::Uuid::new_v4());
        let asked = async {
            let client = &self.0;
            let connection = client.get_multiplexed_async_connection_with_config(&config);
            let mut connection = connection.await?;
            redis::cmd("PING").exec_async(&mut connection).await?;
            connection.subscribe(&channel).await?;
            let sent = Instant::now();
            let publish = redis::cmd("PUBLISH").arg(&channel).arg("").clone();
            publish.exec_async(&mut connection).await?;
            arrived.notified().await;
            Ok(sent.elapsed())
        };
        let late = || {
            (
                redis::ErrorKind::Io,
                "no answer, or no message, within a second",
            )
                .into()
        };
        timeout(LAST_WORDS, asked)
            .await
            .unwrap_or_else(|_| Err(late()))
    }
}

/// Why a process without a bus told nothing.
#[derive(Debug, thiserror::Error)]
enum Untold {
    #[error(transparent)]
    Db(#[from] Error),
    #[error(transparent)]
    Redis(#[from] RedisError),
}

impl Bus {
    /// Hurries the bus through Redis until the process stops.
    pub async fn over_redis(self, redis: Redis, tasks: Tasks) {
        let follow = async {
            let mut warned = false;
            loop {
                let Err(error) = self.session(&redis.0).await;
                self.hurry(false);
                if !warned {
                    warned = true;
                    tracing::warn!(%error, "Redis is away; changes are heard of without it, more slowly");
                }
                sleep(AGAIN).await;
            }
        };
        tasks.stopping().run_until_cancelled(follow).await;
    }

    /// One connection, until it fails.
    async fn session(&self, client: &Client) -> Result<Infallible, RedisError> {
        let (news, lost) = (Arc::new(Notify::new()), CancellationToken::new());
        let (hint, end, bus) = (Arc::clone(&news), lost.clone(), self.clone());
        // No queue: however many messages come, they leave at most one hint.
        let config = AsyncConnectionConfig::new().set_push_sender(move |push: PushInfo| {
            match push.kind {
                PushKind::Message if bus.is_news(&push.data) => hint.notify_one(),
                PushKind::Disconnection => end.cancel(),
                _ => {}
            }
            Ok::<_, std::convert::Infallible>(())
        });
        let mut announced = self.db.announced();
        let mut connection = client
            .get_multiplexed_async_connection_with_config(&config)
            .await?;
        connection.subscribe(CHANNEL).await?;
        // Whatever was told while nobody listened.
        self.poll().await;
        self.hurry(true);
        let mut told = self.versions();
        let mut rested = Instant::now();
        loop {
            let hinted = async {
                sleep_until(rested).await;
                news.notified().await;
            };
            tokio::select! {
                () = hinted => {
                    self.poll().await;
                    rested = Instant::now() + REST;
                }
                Ok(()) = announced.changed() => {
                    self.poll().await;
                    told = publish(&mut connection, self, told).await?;
                }
                () = sleep(PROBE) => redis::cmd("PING").exec_async(&mut connection).await?,
                () = lost.cancelled() => {
                    return Err((redis::ErrorKind::Io, "the connection was lost").into());
                }
            }
        }
    }

    /// Whether a message tells of another version than we have seen. What is not understood does not.
    fn is_news(&self, message: &[Value]) -> bool {
        let [_, Value::BulkString(text)] = message else {
            return false;
        };
        parse(text).is_some_and(|(topic, version)| version != self.versions()[topic as usize])
    }

    fn versions(&self) -> [i64; Topic::ALL.len()] {
        self.topics.borrow().map(|seen| seen.version)
    }

    fn hurry(&self, connected: bool) {
        self.hurried.store(connected, Ordering::Relaxed);
    }
}

/// Tells what is not as `told`; yields what is told now.
async fn publish(
    connection: &mut MultiplexedConnection,
    bus: &Bus,
    told: [i64; Topic::ALL.len()],
) -> Result<[i64; Topic::ALL.len()], RedisError> {
    let versions = bus.versions();
    let mut messages = redis::pipe();
    for topic in Topic::ALL {
        let version = versions[topic as usize];
        if version != told[topic as usize] {
            let message = format!("{} {version}", topic.name());
            messages.cmd("PUBLISH").arg(CHANNEL).arg(message).ignore();
        }
    }
    if !messages.is_empty() {
        messages.exec_async(connection).await?;
    }
    Ok(versions)
}

fn parse(message: &[u8]) -> Option<(Topic, i64)> {
    let (name, version) = std::str::from_utf8(message).ok()?.split_once(' ')?;
    let topic = Topic::ALL.into_iter().find(|topic| topic.name() == name)?;
    Some((topic, version.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_a_topic_and_a_version_and_all_else_is_nothing() {
        for (message, expected) in [
            (&b"quota 7"[..], Some((Topic::Quota, 7))),
            (b"api_keys -1", Some((Topic::ApiKeys, -1))),
            (b"quota", None),
            (b"quota seven", None),
            (b"quota 99999999999999999999", None),
            (b"leases 7", None),
            (b"\xff 7", None),
            (b"", None),
        ] {
            assert_eq!(parse(message), expected, "{message:?}");
        }
    }
}

//! Several replicas as an operator runs them: real processes, one Postgres, a balancer without affinity, and a faulty network between
//! all of them. At a tenth of the service's times. Whatever is dropped is stopped.
#![expect(clippy::print_stdout, reason = "a seed that failed is wanted again")]

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
};

use drawbridge::{
    db::{Endpoint, migrate},
    secret::KeyRing,
};
use loadtest::edge::{Edge, Mode};
use reqwest::{RequestBuilder, Response, Url, header::HeaderMap};
use rustix::process::Signal;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use tokio::process::Command;
use tokio_postgres::Client;

use super::{
    exposition::Page,
    pg::{self, TestDb},
    pgbouncer::PgBouncer,
    process::{Home, Service},
    redis::RedisServer,
    wait::until,
};

/// What a cluster is made of.
pub(crate) struct Plan {
    pub(crate) replicas: usize,
    pub(crate) accounts: &'static [&'static str],
    /// What they are called: `r0`, `r1` and so on where this does not say.
    pub(crate) names: &'static [&'static str],
    pub(crate) redis: bool,
    /// A Postgres of its own, which may fail over.
    pub(crate) own_postgres: bool,
    /// Reach Postgres through `PgBouncer`.
    pub(crate) pooled: bool,
    /// Further settings of every process.
    pub(crate) settings: &'static [(&'static str, &'static str)],
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            replicas: 2,
            accounts: &["alice"],
            names: &[],
            redis: false,
            own_postgres: false,
            pooled: false,
            settings: &[],
        }
    }
}

/// A running cluster.
pub(crate) struct Cluster {
    /// A key of its clients.
    pub(crate) key: String,
    pub(crate) replicas: Vec<Replica>,
    /// In front of all of them.
    pub(crate) balancer: Edge,
    pub(crate) redis: Option<RedisServer>,
    redis_port: u16,
    /// How to reach the database through `PgBouncer`.
    pub(crate) pooler_url: Option<String>,
    _pooler: Option<PgBouncer>,
    /// The upstream, and the commands.
    pub(crate) home: Home,
    /// For looking behind the replicas' back.
    pub(crate) client: Client,
    http: reqwest::Client,
    /// What its randomness is drawn from.
    pub(crate) seed: u64,
    test: TestDb,
}

/// One replica, and the edges of the network around it.
pub(crate) struct Replica {
    /// `None` while it is down.
    pub(crate) service: Option<Service>,
    /// Of its process alone.
    settings: Vec<(&'static str, String)>,
    /// From clients to it.
    pub(crate) clients: Edge,
    /// From its peers to it.
    pub(crate) peers: Edge,
    /// From it to Postgres.
    pub(crate) postgres: Edge,
    /// From it to `PgBouncer`.
    pub(crate) pooler: Option<Edge>,
    /// From it to Redis.
    pub(crate) redis: Option<Edge>,
    /// From it to upstream.
    pub(crate) upstream: Edge,
}

impl Cluster {
    /// Starts everything; returns when every replica is ready.
    pub(crate) async fn start(plan: Plan) -> Self {
        Self::start_with(plan, KeyRing::generate("k1").expose_secret()).await
    }

    /// The same with these master keys.
    pub(crate) async fn start_with(plan: Plan, keys: &str) -> Self {
        let seed = rand::random();
        println!("seed {seed}");
        let tables = async |url: String| {
            migrate(&Endpoint::parse(&url).unwrap()).await.unwrap();
        };
        let test = match plan.own_postgres {
            true => TestDb::alone(tables).await,
            false => TestDb::migrated(tables).await,
        };
        let mut home = Home::new()
            .await
            .set("DRAWBRIDGE_DATABASE_URL", &test.url)
            .set("DRAWBRIDGE_MASTER_KEYS", keys)
            .set("DRAWBRIDGE_TEST_TIME_SCALE", "0.1");
        for (name, value) in plan.settings {
            home = home.set(name, value);
        }
        let redis_port = pg::free_port();
        let redis = match plan.redis {
            true => Some(RedisServer::start(redis_port).await),
            false => None,
        };
        let pooler = match plan.pooled {
            true => Some(PgBouncer::start().await),
            false => None,
        };
        for name in plan.accounts {
            home.import(name).await;
        }
        let key = home.key("cluster").await;
        let pooler_url = pooler.as_ref().map(|pooler| pooler.url(&test));
        let mut replicas = Vec::new();
        for number in 0..plan.replicas {
            let redis = redis.as_ref().map(|_| local(redis_port));
            let name = plan.names.get(number).copied().map(str::to_owned);
            let name = name.unwrap_or_else(|| format!("r{number}"));
            let replica = Replica::new(name, seed, &home, &test.url, pooler_url.as_deref(), redis);
            replicas.push(replica.await);
        }
        let fronts: Vec<_> = replicas
            .iter()
            .map(|replica| replica.clients.address)
            .collect();
        let mut cluster = Self {
            key,
            replicas,
            balancer: Edge::before(&fronts, seed).await,
            redis,
            redis_port,
            pooler_url,
            _pooler: pooler,
            home,
            client: test.connect().await,
            http: reqwest::Client::builder()
                .no_proxy()
                .pool_max_idle_per_host(0)
                .build()
                .unwrap(),
            seed,
            test,
        };
        for number in 0..plan.replicas {
            cluster.serve(number).await;
        }
        cluster.acquainted().await;
        cluster
    }

    /// A setting of one replica, from its next start on.
    pub(crate) fn set(&mut self, number: usize, name: &'static str, value: String) {
        self.replicas[number].settings.push((name, value));
    }

    /// How to reach the database itself.
    pub(crate) fn url(&self) -> &str {
        &self.test.url
    }

    /// A standby takes the place of Postgres.
    pub(crate) async fn fail_over(&mut self) {
        self.test.fail_over().await;
        self.client = self.test.connect().await;
    }

    /// The program with the settings of a replica.
    pub(crate) fn command(&self, number: usize, arguments: &[&str]) -> Command {
        let mut command = self.home.command(arguments);
        let settings = self.replicas[number].settings.iter();
        command.envs(settings.map(|(name, value)| (*name, value)));
        command
    }

    /// Starts a replica that is down.
    pub(crate) async fn serve(&mut self, number: usize) {
        let service = Service::start(self.command(number, &["serve"])).await;
        let replica = &mut self.replicas[number];
        replica.service = Some(service);
        replica.clients.open().await;
        replica.peers.open().await;
    }

    /// Returns when every replica has met every other.
    async fn acquainted(&self) {
        let others = self.replicas.len() - 1;
        for number in 0..self.replicas.len() {
            let service = self.service(number);
            until("a replica knows its peers", async || {
                let page = Page::of(&service.http, &service.admin).await;
                page.sum("drawbridge_peers_alive", &[]) == others as f64
            })
            .await;
        }
    }

    /// `kill -9`.
    pub(crate) async fn kill(&mut self, number: usize) {
        let replica = &mut self.replicas[number];
        let service = replica.service.take().unwrap();
        service.signal(Signal::KILL);
        // As the kernel does for a process that is gone.
        replica.clients.set(Mode::Refuse);
        replica.peers.set(Mode::Refuse);
        service.kill().await;
    }

    /// SIGTERM, and wait for its end.
    pub(crate) async fn stop(&mut self, number: usize) {
        let service = self.replicas[number].service.take().unwrap();
        let (code, log) = service.stop().await;
        let replica = &self.replicas[number];
        replica.clients.set(Mode::Refuse);
        replica.peers.set(Mode::Refuse);
        assert_eq!(code, Some(0), "{log}");
    }

    /// Sends a signal to a replica.
    pub(crate) fn signal(&self, number: usize, signal: Signal) {
        self.service(number).signal(signal);
    }

    /// A replica that runs.
    pub(crate) fn service(&self, number: usize) -> &Service {
        self.replicas[number].service.as_ref().unwrap()
    }

    /// Starts Redis again.
    pub(crate) async fn restart_redis(&mut self) {
        self.redis = None;
        self.redis = Some(RedisServer::start(self.redis_port).await);
    }

    /// The edges of Postgres, of all replicas.
    pub(crate) fn postgres(&self) -> impl Iterator<Item = &Edge> {
        self.replicas
            .iter()
            .flat_map(|replica| std::iter::once(&replica.postgres).chain(&replica.pooler))
    }

    /// A request through the balancer, with the key.
    pub(crate) fn post(&self, path: &str) -> RequestBuilder {
        self.request(self.balancer.address, path, &self.key)
    }

    /// A request to a replica, with the key.
    pub(crate) fn post_at(&self, number: usize, path: &str) -> RequestBuilder {
        self.post_at_as(number, path, &self.key)
    }

    /// A request to a replica, with some key.
    pub(crate) fn post_at_as(&self, number: usize, path: &str, key: &str) -> RequestBuilder {
        self.request(self.replicas[number].clients.address, path, key)
    }

    fn request(&self, address: SocketAddr, path: &str, key: &str) -> RequestBuilder {
        self.http
            .post(format!("http://{address}{path}"))
            .bearer_auth(key)
            .header("connection", "close")
    }

    /// Which replica owns the lease of a conversation, by its newest turn.
    pub(crate) async fn owner(&self) -> usize {
        let query = "
            select r.replica_name from http_bridge_leases l join bridge_replicas r on r.boot_id = l.owner_boot
            order by l.last_turn_at desc limit 1";
        let row = self.client.query_one(query, &[]).await.unwrap();
        row.get::<_, String>(0)
            .trim_start_matches('r')
            .parse()
            .unwrap()
    }

    /// The ledger, oldest turn first, as JSON rows.
    pub(crate) async fn turns(&self) -> Vec<Value> {
        let query = "select to_jsonb(t) from turns t order by turn_id";
        let rows = self.client.query(query, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// The leases, as JSON rows.
    pub(crate) async fn leases(&self) -> Vec<Value> {
        let query = "select to_jsonb(l) from http_bridge_leases l order by lease_id";
        let rows = self.client.query(query, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Waits until no turn is open.
    pub(crate) async fn booked(&self) {
        super::wait::until("every turn is booked", async || {
            self.turns()
                .await
                .iter()
                .all(|turn| turn["state"] != "open")
        })
        .await;
    }

    /// Upstream sockets over which a conversation went, known by a word in its texts.
    pub(crate) fn sockets_of(&self, word: &str) -> BTreeSet<usize> {
        let attempts = self.home.upstream.attempts();
        let of_it = attempts
            .iter()
            .filter(|attempt| attempt.body.to_string().contains(word));
        of_it.filter_map(|attempt| attempt.socket).collect()
    }

    /// The logs of all replicas that run.
    pub(crate) fn logs(&self) -> String {
        let logs = self
            .replicas
            .iter()
            .enumerate()
            .filter_map(|(number, replica)| {
                let log = replica.service.as_ref()?.log();
                Some(format!("--- r{number}\n{log}"))
            });
        logs.collect()
    }
}

impl Replica {
    async fn new(
        name: String,
        seed: u64,
        home: &Home,
        direct: &str,
        pooled: Option<&str>,
        redis: Option<SocketAddr>,
    ) -> Self {
        let (client, internal) = (local(pg::free_port()), local(pg::free_port()));
        let edge = async |target| Edge::before(&[target], seed).await;
        let clients = edge(client).await;
        let peers = edge(internal).await;
        let postgres = edge(target(direct)).await;
        let upstream = edge(target(&home.upstream.auth_url())).await;
        let pooler = match pooled {
            Some(url) => Some(edge(target(url)).await),
            None => None,
        };
        let redis = match redis {
            Some(address) => Some(edge(address).await),
            None => None,
        };
        let mut settings = vec![
            ("DRAWBRIDGE_REPLICA_NAME", name),
            ("DRAWBRIDGE_LISTEN", client.to_string()),
            ("DRAWBRIDGE_INTERNAL_LISTEN", internal.to_string()),
            (
                "DRAWBRIDGE_INTERNAL_URL",
                format!("http://{}", peers.address),
            ),
            (
                "DRAWBRIDGE_UPSTREAM_URL",
                over(&upstream, &home.upstream.url()),
            ),
            (
                "DRAWBRIDGE_AUTH_URL",
                over(&upstream, &home.upstream.auth_url()),
            ),
            ("DRAWBRIDGE_DATABASE_URL", over(&postgres, direct)),
        ];
        if let (Some(edge), Some(url)) = (&pooler, pooled) {
            settings.push(("DRAWBRIDGE_DATABASE_URL", over(edge, url)));
            settings.push(("DRAWBRIDGE_DATABASE_DIRECT_URL", over(&postgres, direct)));
        }
        if let Some(edge) = &redis {
            settings.push(("DRAWBRIDGE_REDIS_URL", format!("redis://{}", edge.address)));
        }
        Self {
            service: None,
            settings,
            clients,
            peers,
            postgres,
            pooler,
            redis,
            upstream,
        }
    }
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Where a URL leads.
fn target(url: &str) -> SocketAddr {
    let url: Url = url.parse().unwrap();
    url.socket_addrs(|| Some(5432)).unwrap()[0]
}

/// A URL by way of an edge.
fn over(edge: &Edge, url: &str) -> String {
    let mut url: Url = url.parse().unwrap();
    url.set_host(Some("127.0.0.1")).unwrap();
    url.set_port(Some(edge.address.port())).unwrap();
    url.to_string().trim_end_matches('/').to_owned()
}

/// What a client read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    /// The response object, or the error document.
    pub(crate) body: Value,
    /// Whether the response was completed.
    pub(crate) complete: bool,
}

impl Answer {
    /// Reads an answer to its end, streamed or collected.
    pub(crate) async fn of(response: Response) -> Self {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        // A stream that breaks ends where it does.
        let text = response.text().await.unwrap_or_default();
        let streamed = headers
            .get("content-type")
            .is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream"));
        let body: Value = if streamed {
            let events = text.lines().filter_map(|line| line.strip_prefix("data: "));
            let mut events = events.filter_map(|data| serde_json::from_str::<Value>(data).ok());
            events.next_back().unwrap_or_default()
        } else {
            serde_json::from_str(&text).unwrap_or_default()
        };
        let (complete, body) = match body["type"].as_str() {
            Some("response.completed") => (true, body["response"].clone()),
            _ => (body["status"] == "completed", body),
        };
        Self {
            status,
            headers,
            body,
            complete,
        }
    }

    /// Its id, if it was completed.
    pub(crate) fn id(&self) -> &str {
        assert!(self.status == 200 && self.complete, "{self:#?}");
        self.body["id"].as_str().unwrap()
    }

    /// The turn-state token that came with it.
    pub(crate) fn token(&self) -> &str {
        let token = self.headers.get("x-codex-turn-state");
        token
            .unwrap_or_else(|| panic!("no token: {self:#?}"))
            .to_str()
            .unwrap()
    }

    /// The error's code.
    pub(crate) fn code(&self) -> &str {
        self.body["error"]["code"].as_str().unwrap_or_default()
    }
}

/// A request as a script makes it.
pub(crate) fn script(text: &str, stream: bool) -> Value {
    json!({ "model": "gpt-5.5", "stream": stream, "input": text })
}

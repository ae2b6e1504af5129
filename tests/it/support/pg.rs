//! A Postgres for tests: one throw-away server per checkout, and a database per test, cloned from a migrated template.
//!
//! Every test process that runs at the same time shares the server, on 127.0.0.1 so that poolers and faulty proxies fit between.
//! It is an embedded cluster without its care for disks; a shell that outlives the process sees to its end, however that comes.
//! `TEST_DATABASE_URL` names another server to use: a superuser's URL, any database.

use std::fs::Permissions;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use drawbridge::db::embedded::Cluster;
use tempfile::TempDir;
use tokio::sync::OnceCell;
use tokio_postgres::{Client, NoTls};
use uuid::Uuid;

/// The OS user for what refuses root.
pub(crate) const NOBODY: u32 = 65534;

/// Serialises the processes that want to make the template.
const TEMPLATE_LOCK: i64 = 0x0064_7261_7762;

/// Runs beside a process until its standard input closes: then the process has ended. The next one may be about to start, and the
/// last of them stops the server by its id and throws its data away. Only a postmaster has the data as its working directory.
const REAPER: &str = r#"
    read -r _
    sleep 1
    exec 9>>"$1/postgres.lock"
    flock --exclusive --wait 2 9 || exit 0
    data=$1/postgres
    pid=$(head -n 1 "$data/postmaster.pid") && [ "$(readlink "/proc/$pid/cwd")" = "$data" ] && kill -QUIT "$pid"
    while [ "$(readlink "/proc/$pid/cwd")" = "$data" ]; do sleep 0.02; done
    rm -rf "$data"
"#;

/// A database of one test, dropped with it.
pub(crate) struct TestDb {
    /// How to connect: `postgres://user@127.0.0.1:port/name`.
    pub(crate) url: String,
    /// Its name alone.
    pub(crate) name: String,
    /// Where it is alone on one.
    server: Option<Server>,
}

impl TestDb {
    /// A clone of the template, which `migrate` has made of the empty database whose URL it got; it leaves no connection open.
    pub(crate) async fn migrated(migrate: impl AsyncFnOnce(String)) -> Self {
        static TEMPLATE: OnceCell<String> = OnceCell::const_new();
        let template = TEMPLATE
            .get_or_init(|| template(format!("template_{:016x}", migrations()), migrate))
            .await;
        Self::create(template).await
    }

    /// A database without tables.
    pub(crate) async fn empty() -> Self {
        Self::create("template1").await
    }

    /// A database on a server of its own, which may fail over.
    pub(crate) async fn alone(migrate: impl AsyncFnOnce(String)) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("postgres-")
            .permissions(Permissions::from_mode(0o755))
            .tempdir()
            .unwrap();
        let server = Server::join(directory.path().canonicalize().unwrap()).await;
        let url = format!("{}/drawbridge", server.url());
        migrate(url.clone()).await;
        Self {
            url,
            name: "drawbridge".into(),
            server: Some(Server {
                directory: Some(directory),
                ..server
            }),
        }
    }

    /// Its server crashes, and a standby takes its place: the same address, what was there a moment ago, another timeline.
    pub(crate) async fn fail_over(&self) {
        let directory = self.server.as_ref().unwrap().directory.as_ref().unwrap();
        let data = directory.path().join("postgres");
        let owner = data.metadata().unwrap();
        let pid = std::fs::read_to_string(data.join("postmaster.pid")).unwrap();
        let program = format!("/proc/{}/exe", pid.lines().next().unwrap());
        let programs = std::fs::read_link(program).unwrap();
        std::fs::write(data.join("standby.signal"), "").unwrap();
        for step in ["restart --mode=immediate", "promote"] {
            let mut command = Command::new(programs.with_file_name("pg_ctl"));
            command
                .args(step.split(' '))
                .args(["--wait", "--silent", "--log=/dev/null", "--pgdata"])
                .arg(&data)
                .uid(owner.uid())
                .gid(owner.gid())
                .current_dir("/")
                .stdin(Stdio::null());
            let done = tokio::process::Command::from(command).status().await;
            assert!(done.unwrap().success(), "{step}");
        }
    }

    /// A connection of its own to this database.
    pub(crate) async fn connect(&self) -> Client {
        connect(&self.url).await
    }

    async fn create(template: &str) -> Self {
        let name = format!("test_{}", Uuid::new_v4().simple());
        admin()
            .await
            .batch_execute(&format!("create database {name} template {template}"))
            .await
            .unwrap();
        Self {
            url: url(&name).await,
            name,
            server: None,
        }
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        if self.server.is_some() {
            return;
        }
        let drop = format!("drop database {} with (force)", self.name);
        // The runtime of the test may be the one that drops us, and it cannot wait for itself.
        let done = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async { admin().await.batch_execute(&drop).await.unwrap() });
        });
        if done.join().is_err() && !std::thread::panicking() {
            panic!("the test database is still there");
        }
    }
}

/// The URL of `database` on the server of the tests, which is started when it is first asked for.
pub(crate) async fn url(database: &str) -> String {
    static SERVER: OnceCell<(String, Option<Server>)> = OnceCell::const_new();
    let (server, _) = SERVER
        .get_or_init(async || match std::env::var("TEST_DATABASE_URL") {
            Ok(url) => (url, None),
            Err(_) => {
                let server = Server::join(directory()).await;
                (server.url(), Some(server))
            }
        })
        .await;
    with_database(server, database)
}

/// A connection, driven in the background as long as the client lives.
pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// A free port of 127.0.0.1 that nobody else is given: whoever listens there finds it free again after a restart.
pub(crate) fn free_port() -> u16 {
    loadtest::process::lasting_port().unwrap()
}

/// Runs a script of the shell that goes on when this process has ended, in whatever way, and learns of that by the end of its
/// standard input. It keeps none of our files open and gets none of our signals.
pub(crate) fn outliving(command: &mut Command) -> Child {
    command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

struct Server {
    cluster: Cluster,
    /// Holds the other end of the reaper's standard input until this process ends.
    _reaper: Child,
    /// Goes with it.
    directory: Option<TempDir>,
}

impl Server {
    async fn join(directory: PathBuf) -> Self {
        let reaper = outliving(
            Command::new("sh")
                .args(["-c", REAPER, "reaper"])
                .arg(&directory),
        );
        let port = format!("port={}", free_port());
        let settings = [
            "listen_addresses=127.0.0.1",
            &port,
            "max_connections=300",
            "fsync=off",
            "synchronous_commit=off",
            "full_page_writes=off",
        ];
        let settings: Vec<_> = settings
            .iter()
            .flat_map(|setting| ["-c", setting])
            .collect();
        let cluster =
            Cluster::open_with(&directory, &["--no-sync", "--auth-host=trust"], &settings)
                .await
                .unwrap();
        Self {
            cluster,
            _reaper: reaper,
            directory: None,
        }
    }

    /// How to connect, but for the database.
    fn url(&self) -> String {
        let port = self.cluster.config().get_ports()[0];
        format!("postgres://drawbridge@127.0.0.1:{port}")
    }
}

/// One per user and checkout.
fn directory() -> PathBuf {
    let mut checkout = DefaultHasher::new();
    env!("CARGO_MANIFEST_DIR").hash(&mut checkout);
    let name = format!(
        "drawbridge-test-{}-{:016x}",
        rustix::process::geteuid().as_raw(),
        checkout.finish()
    );
    std::env::temp_dir().canonicalize().unwrap().join(name)
}

/// Makes the template `name` unless another process has.
async fn template(name: String, migrate: impl AsyncFnOnce(String)) -> String {
    let admin = admin().await;
    admin
        .execute("select pg_advisory_lock($1)", &[&TEMPLATE_LOCK])
        .await
        .unwrap();
    if admin
        .query_opt("select from pg_database where datname = $1", &[&name])
        .await
        .unwrap()
        .is_none()
    {
        // Renamed when complete: a process that dies on the way leaves none half migrated.
        admin
            .batch_execute("drop database if exists template_new with (force)")
            .await
            .unwrap();
        admin
            .batch_execute("create database template_new")
            .await
            .unwrap();
        migrate(url("template_new").await).await;
        admin
            .batch_execute(&format!("alter database template_new rename to {name}"))
            .await
            .unwrap();
        admin
            .batch_execute(&format!("alter database {name} allow_connections false"))
            .await
            .unwrap();
    }
    name
}

/// A fingerprint of the files in `migrations/`.
fn migrations() -> u64 {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
    let mut files: Vec<_> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .map(|file| file.unwrap().path())
        .collect();
    files.sort();
    let mut hash = DefaultHasher::new();
    for file in files {
        std::fs::read(&file).unwrap().hash(&mut hash);
    }
    hash.finish()
}

async fn admin() -> Client {
    connect(&url("postgres").await).await
}

/// `url` with another database.
fn with_database(url: &str, database: &str) -> String {
    let (server, query) = url
        .split_once('?')
        .map_or((url, String::new()), |(server, query)| {
            (server, format!("?{query}"))
        });
    let authority = server.find("://").map_or(0, |scheme| scheme + 3);
    let end = server[authority..]
        .find('/')
        .map_or(server.len(), |path| authority + path);
    format!("{}/{database}{query}", &server[..end])
}

#[test]
fn the_database_of_a_url_is_replaced_and_nothing_else() {
    for (given, expected) in [
        ("postgres://me@host:1", "postgres://me@host:1/x"),
        ("postgres://me@host:1/", "postgres://me@host:1/x"),
        ("postgres://me:s3c@host/db", "postgres://me:s3c@host/x"),
        (
            "postgres://host/db?sslmode=disable&a=b/c",
            "postgres://host/x?sslmode=disable&a=b/c",
        ),
    ] {
        assert_eq!(with_database(given, "x"), expected);
    }
}

#[tokio::test]
async fn every_test_has_a_database_of_its_own() {
    let (one, other) = tokio::join!(TestDb::empty(), TestDb::empty());
    one.connect()
        .await
        .batch_execute("create table only_here ()")
        .await
        .unwrap();
    let seen = other
        .connect()
        .await
        .query_one("select to_regclass('only_here')::text", &[])
        .await
        .unwrap();
    assert_eq!(seen.get::<_, Option<String>>(0), None);

    let name = one.name.clone();
    drop(one);
    let left = admin()
        .await
        .query_opt("select from pg_database where datname = $1", &[&name])
        .await
        .unwrap();
    assert!(left.is_none(), "a database goes with its test");
}

#[tokio::test]
async fn a_template_is_migrated_once_and_its_clones_have_its_tables() {
    let name = format!("template_{}", Uuid::new_v4().simple());
    let migrate = async |url: String| {
        connect(&url)
            .await
            .batch_execute("create table made (at int default 1)")
            .await
            .unwrap()
    };
    assert_eq!(template(name.clone(), migrate).await, name);
    template(name.clone(), async |url| panic!("{url} is migrated again")).await;
    for db in [TestDb::create(&name).await, TestDb::create(&name).await] {
        db.connect()
            .await
            .batch_execute("insert into made default values")
            .await
            .unwrap();
    }
    admin()
        .await
        .batch_execute(&format!("drop database {name}"))
        .await
        .unwrap();
}

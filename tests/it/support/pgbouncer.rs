//! A `PgBouncer` in transaction mode in front of the server of the tests, for all of its databases.

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};
use tokio_postgres::Config;
use tokio_postgres::config::Host;

use super::pg::{self, NOBODY, TestDb};

/// Debian keeps the program off the path of ordinary users.
const SCRIPT: &str =
    r#"PATH=$PATH:/usr/sbin; pgbouncer --quiet "$1" & read -r _; kill -KILL $!; wait"#;

/// The pooler lives until this is dropped, or until this process ends in any way.
pub(crate) struct PgBouncer {
    /// `postgres://user@127.0.0.1:port`.
    url: String,
    shell: Child,
    _directory: TempDir,
}

impl PgBouncer {
    /// Returns when it accepts connections.
    pub(crate) async fn start() -> Self {
        let directory = tempfile::Builder::new()
            .permissions(std::fs::Permissions::from_mode(0o755))
            .tempdir()
            .unwrap();
        let server: Config = pg::url("postgres").await.parse().unwrap();
        let port = pg::free_port();
        let (config, users) = (
            directory.path().join("pgbouncer.ini"),
            directory.path().join("users"),
        );
        let host = match &server.get_hosts()[0] {
            Host::Tcp(name) => name.clone(),
            Host::Unix(path) => path.display().to_string(),
        };
        let text = format!(
            "[databases]\n* = host={host} port={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             pool_mode = transaction\nauth_type = trust\nauth_file = {}\nmax_client_conn = 1000\n",
            server.get_ports().first().unwrap_or(&5432),
            users.display(),
        );
        std::fs::write(&config, text).unwrap();
        let user = server.get_user().unwrap();
        let password = String::from_utf8_lossy(server.get_password().unwrap_or_default());
        std::fs::write(&users, format!("\"{user}\" \"{password}\"\n")).unwrap();

        let mut shell = Command::new("sh");
        shell.args(["-c", SCRIPT, "pgbouncer"]).arg(&config);
        shell.current_dir("/");
        if rustix::process::geteuid().is_root() {
            shell.uid(NOBODY).gid(NOBODY);
        }
        let url = format!("postgres://{user}@127.0.0.1:{port}");
        let pooler = Self {
            url,
            shell: pg::outliving(&mut shell),
            _directory: directory,
        };
        let deadline = Instant::now() + Duration::from_secs(10);
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .is_err()
        {
            assert!(
                Instant::now() < deadline,
                "no PgBouncer after 10 s: is it installed?"
            );
            sleep(Duration::from_millis(10)).await;
        }
        pooler
    }

    /// How to reach the database of a test through the pooler.
    pub(crate) fn url(&self, db: &TestDb) -> String {
        format!("{}/{}", self.url, db.name)
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        self.shell.wait().unwrap();
    }
}

#[tokio::test]
async fn a_pooler_serves_the_database_of_a_test_and_keeps_no_session() {
    let db = TestDb::empty().await;
    let pooler = PgBouncer::start().await;
    let url = pooler.url(&db);
    let (one, other) = tokio::join!(pg::connect(&url), pg::connect(&url));
    let backend = "select pg_backend_pid()";
    let (before, after) = (
        one.query_typed(backend, &[]).await.unwrap(),
        other.query_typed(backend, &[]).await.unwrap(),
    );
    assert_eq!(
        before[0].get::<_, i32>(0),
        after[0].get::<_, i32>(0),
        "two clients take turns on one connection"
    );
}

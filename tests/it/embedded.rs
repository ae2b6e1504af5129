//! The embedded cluster: one server for any number of processes, whatever kills them, as root and as an ordinary user.

use std::fs::Permissions;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use drawbridge::db::embedded::{Cluster, Error};
use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;
use tokio_postgres::config::Host;
use tokio_postgres::{NoTls, SimpleQueryMessage};

use crate::support::pg::NOBODY;

/// Makes a run of this binary the other process of a test: it holds the cluster in that directory until it is killed.
const HOLD: &str = "DRAWBRIDGE_TEST_HOLD";

#[tokio::test]
async fn a_fresh_directory_becomes_a_cluster_that_keeps_its_data() {
    if let Some(directory) = std::env::var_os(HOLD) {
        let cluster = Cluster::open(Path::new(&directory)).await.unwrap();
        ask(&cluster, "create table if not exists kept (word text)").await;
        ask(&cluster, "insert into kept values ('survives')").await;
        writeln!(std::io::stdout(), "holding").unwrap();
        std::io::stdin().lines().for_each(drop);
        return;
    }
    let home = directory();
    let cluster = Cluster::open(home.path()).await.unwrap();
    assert_eq!(
        ask(
            &cluster,
            "select current_database() || ' ' || current_setting('server_encoding')"
        )
        .await,
        "drawbridge UTF8"
    );
    ask(&cluster, "create table kept (word text)").await;
    ask(&cluster, "insert into kept values ('survives')").await;
    cluster.close().await.unwrap();

    let cluster = Cluster::open(home.path()).await.unwrap();
    assert_eq!(ask(&cluster, "select word from kept").await, "survives");
    cluster.close().await.unwrap();
}

#[tokio::test]
async fn data_survives_kill_9_of_the_server_and_its_user() {
    let home = directory();
    let mut user = Other::holding(home.path());
    kill(postmaster(home.path()).unwrap());
    user.0.kill().unwrap();
    user.0.wait().unwrap();

    let cluster = Cluster::open(home.path()).await.unwrap();
    assert_eq!(ask(&cluster, "select word from kept").await, "survives");
    cluster.close().await.unwrap();
}

#[tokio::test]
async fn a_server_that_dies_under_its_user_is_started_again_by_the_next() {
    let home = directory();
    let first = Cluster::open(home.path()).await.unwrap();
    let before = postmaster(home.path()).unwrap();
    kill(before);
    let second = Cluster::open(home.path()).await.unwrap();
    assert_ne!(postmaster(home.path()), Some(before));
    assert_eq!(
        ask(&first, "select 'again'").await,
        "again",
        "the first user's address still holds"
    );
    first.close().await.unwrap();
    second.close().await.unwrap();
}

#[tokio::test]
async fn a_server_left_behind_is_adopted_and_then_stopped() {
    let home = directory();
    let mut user = Other::holding(home.path());
    user.0.kill().unwrap();
    user.0.wait().unwrap();
    let before = postmaster(home.path());
    assert!(before.is_some(), "kill -9 of a user leaves the server");

    let cluster = Cluster::open(home.path()).await.unwrap();
    assert_eq!(postmaster(home.path()), before);
    assert_eq!(ask(&cluster, "select word from kept").await, "survives");
    cluster.close().await.unwrap();
    assert_eq!(postmaster(home.path()), None);
}

#[tokio::test]
async fn users_that_come_at_once_share_one_server_and_the_last_to_leave_stops_it() {
    let home = directory();
    let (first, second, third) = tokio::join!(
        Cluster::open(home.path()),
        Cluster::open(home.path()),
        Cluster::open(home.path())
    );
    let (first, second, third) = (first.unwrap(), second.unwrap(), third.unwrap());
    let server = postmaster(home.path());
    first.close().await.unwrap();
    drop(second);
    assert_eq!(postmaster(home.path()), server);
    assert_eq!(ask(&third, "select 'served'").await, "served");
    third.close().await.unwrap();
    assert_eq!(postmaster(home.path()), None);
}

#[tokio::test]
async fn another_process_keeps_the_server_alive_and_a_dropped_last_user_stops_it() {
    let home = directory();
    let mut user = Other::holding(home.path());
    let cluster = Cluster::open(home.path()).await.unwrap();
    let server = postmaster(home.path());
    cluster.close().await.unwrap();
    assert_eq!(postmaster(home.path()), server);

    let cluster = Cluster::open(home.path()).await.unwrap();
    user.0.kill().unwrap();
    user.0.wait().unwrap();
    drop(cluster);
    assert_eq!(postmaster(home.path()), None);
}

#[tokio::test]
async fn data_of_a_version_that_is_not_installed_names_the_package() {
    let home = directory();
    std::fs::create_dir(home.path().join("postgres")).unwrap();
    std::fs::write(home.path().join("postgres/PG_VERSION"), "12\n").unwrap();
    let error = Cluster::open(home.path()).await.unwrap_err();
    let data = home.path().canonicalize().unwrap().join("postgres");
    assert_eq!(
        error.to_string(),
        format!(
            "the data in {} needs Postgres 12, which is not installed: run `apt-get install postgresql-12`",
            data.display()
        )
    );
}

#[tokio::test]
async fn a_cluster_half_made_is_made_anew() {
    let home = directory();
    std::fs::create_dir(home.path().join("postgres.new")).unwrap();
    std::fs::write(home.path().join("postgres.new/PG_VERSION"), "15\n").unwrap();
    let cluster = Cluster::open(home.path()).await.unwrap();
    assert_eq!(ask(&cluster, "select 'whole'").await, "whole");
    cluster.close().await.unwrap();
}

#[tokio::test]
async fn a_directory_too_deep_for_a_socket_is_served_from_a_short_private_one() {
    let home = directory();
    let deep = home
        .path()
        .join("deep".repeat(30))
        .join("it's \"here\", $HOME");
    let cluster = Cluster::open(&deep).await.unwrap();
    assert_eq!(ask(&cluster, "select 'reached'").await, "reached");
    let config = cluster.config();
    let [Host::Unix(socket)] = config.get_hosts() else {
        panic!("{config:?}")
    };
    assert_eq!(
        std::fs::metadata(socket).unwrap().permissions().mode() & 0o777,
        0o700
    );
    cluster.close().await.unwrap();
    std::fs::remove_dir(socket).unwrap();
}

#[tokio::test]
async fn only_its_owner_comes_near_the_socket_and_nobody_over_tcp() {
    let home = directory();
    let cluster = Cluster::open(home.path()).await.unwrap();
    assert_eq!(
        ask(&cluster, "select current_setting('listen_addresses')").await,
        ""
    );
    let data = std::fs::metadata(home.path().join("postgres")).unwrap();
    assert_eq!(data.permissions().mode() & 0o777, 0o700);
    assert_eq!(
        cluster.config().get_hosts(),
        [Host::Unix(
            home.path().canonicalize().unwrap().join("postgres")
        )]
    );
    cluster.close().await.unwrap();
}

#[tokio::test]
async fn a_server_that_does_not_start_says_why() {
    let home = directory();
    let error = Cluster::open_with(home.path(), &[], &["-c", "shared_buffers=plenty"])
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Program { program: "postgres", output } if output.contains("shared_buffers")),
        "{error}"
    );
}

#[tokio::test]
async fn a_failed_statement_and_its_values_stay_out_of_the_log() {
    let home = directory();
    let cluster = Cluster::open(home.path()).await.unwrap();
    ask(&cluster, "create table secrets (value text primary key)").await;
    ask(&cluster, "insert into secrets values ('hunter2')").await;
    let (client, connection) = cluster.config().connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    client
        .batch_execute("insert into secrets values ('hunter2')")
        .await
        .unwrap_err();
    cluster.close().await.unwrap();
    let log = std::fs::read_to_string(home.path().join("postgres.log")).unwrap();
    assert!(
        log.contains("database system is shut down")
            && !log.contains("secrets")
            && !log.contains("hunter2"),
        "{log}"
    );
}

#[tokio::test]
async fn as_root_a_directory_closed_to_the_server_is_named() {
    let home = directory();
    std::fs::set_permissions(home.path(), Permissions::from_mode(0o700)).unwrap();
    let opened = Cluster::open(&home.path().join("below")).await;
    if geteuid().is_root() {
        let closed = home.path().canonicalize().unwrap();
        assert!(matches!(opened, Err(Error::Unreachable { path }) if path == closed));
    } else {
        opened.unwrap().close().await.unwrap();
    }
}

#[test]
fn all_of_this_holds_for_an_ordinary_user() {
    if !geteuid().is_root() {
        return; // It has held just now.
    }
    let home = directory();
    let binary = home.path().join("it");
    std::fs::copy(std::env::current_exe().unwrap(), &binary).unwrap();
    std::os::unix::fs::chown(home.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let run = Command::new("setpriv")
        .args([
            format!("--reuid={NOBODY}"),
            format!("--regid={NOBODY}"),
            "--clear-groups".into(),
            "--".into(),
        ])
        .arg(&binary)
        .arg("embedded::")
        .env("TMPDIR", home.path())
        .env("HOME", home.path())
        .current_dir("/")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stdout);
    assert!(
        run.status.success()
            && said.contains("a_server_left_behind_is_adopted_and_then_stopped ... ok"),
        "{said}"
    );
}

/// Another process that uses a cluster, killed when this is dropped.
struct Other(Child);

impl Other {
    /// Returns when it has opened the cluster in `home` and written to it.
    fn holding(home: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "embedded::a_fresh_directory_becomes_a_cluster_that_keeps_its_data",
                "--nocapture",
            ])
            .env(HOLD, home)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(
            lines.any(|line| line.unwrap().contains("holding")),
            "the other process has given up"
        );
        Self(child)
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A temporary directory that the server's OS user may pass through.
fn directory() -> TempDir {
    tempfile::Builder::new()
        .prefix("embedded-")
        .permissions(Permissions::from_mode(0o755))
        .tempdir()
        .unwrap()
}

fn postmaster(home: &Path) -> Option<Pid> {
    let text = std::fs::read_to_string(home.join("postgres/postmaster.pid")).ok()?;
    Pid::from_raw(text.lines().next()?.parse().ok()?)
}

fn kill(process: Pid) {
    kill_process(process, Signal::KILL).unwrap();
}

/// The text in the first column of the first row, if there is one.
async fn ask(cluster: &Cluster, sql: &str) -> String {
    let (client, connection) = cluster.config().connect(NoTls).await.unwrap();
    tokio::spawn(connection);
    let messages = client.simple_query(sql).await.unwrap();
    let text = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0),
        _ => None,
    });
    text.unwrap_or_default().to_owned()
}

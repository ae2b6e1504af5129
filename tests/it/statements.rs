//! Every SQL statement of the program is accepted by the schema that its migrations make.

use std::path::{Path, PathBuf};

use drawbridge::{
    account, api_key, bus,
    db::{INSTALLATION_STATEMENTS, Stmt, dependents, probe, sealed::SEALED},
    lease, ledger, poll, quota, replica, snapshot,
};

use crate::support::{store::Store, wait::until};

/// The statements of each room that has a store.
const STORES: [(&str, &[&Stmt]); 11] = [
    ("account", account::STATEMENTS),
    ("account/flow", account::flow::STATEMENTS),
    ("api_key", api_key::STATEMENTS),
    ("bus", bus::STATEMENTS),
    ("lease", lease::STATEMENTS),
    ("ledger", ledger::STATEMENTS),
    ("ledger/history", ledger::HISTORY_STATEMENTS),
    ("poll", poll::STATEMENTS),
    ("quota", quota::STATEMENTS),
    ("replica", replica::STATEMENTS),
    ("snapshot", snapshot::STATEMENTS),
];

#[tokio::test]
async fn the_server_stops_what_nobody_waits_for_any_more() {
    static COUNT: Stmt = Stmt {
        name: "test.COUNT",
        sql: "select count(*) from accounts",
        types: &[],
    };
    let mut store = Store::direct().await;
    let db = store.db.clone();
    let lock = store.client.transaction().await.unwrap();
    lock.batch_execute("lock table accounts").await.unwrap();
    let waiting = async || {
        let waiting =
            "select count(*) from pg_locks where not granted and relation = 'accounts'::regclass";
        let row = lock.query_one(waiting, &[]).await.unwrap();
        row.get::<_, i64>(0)
    };
    let late = tokio::select! {
        _ = db.one(&COUNT, &[]) => false,
        () = until("it waits", async || waiting().await == 1) => true,
    };
    assert!(late, "the lock holds");
    until("it waits no more", async || waiting().await == 0).await;
}

#[tokio::test]
async fn the_schema_accepts_every_statement() {
    let store = Store::direct().await;
    let connection = store.db.connection().await.unwrap();
    let all = STORES
        .iter()
        .flat_map(|(_, statements)| statements.iter())
        .chain(INSTALLATION_STATEMENTS)
        .chain(dependents::STATEMENTS)
        .chain(probe::STATEMENTS)
        .copied()
        .chain(SEALED.iter().flat_map(|sealed| sealed.statements()));
    for statement in all {
        let checked = connection.check(statement).await;
        assert!(checked.is_ok(), "{}: {checked:?}", statement.name);
    }
}

#[test]
fn every_store_is_listed_and_every_name_says_whose_it_is() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut rooms: Vec<String> = stores(&src)
        .iter()
        .map(|store| room_of(&src, store))
        .collect();
    rooms.sort();
    let listed: Vec<&str> = STORES.iter().map(|(room, _)| *room).collect();
    assert_eq!(rooms, listed);
    for (room, statements) in STORES {
        assert!(!statements.is_empty(), "{room}");
        for statement in statements {
            assert_eq!(statement.name.split('.').next(), Some(room));
        }
    }
}

/// Every `store.rs` below a directory.
fn stores(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .flat_map(|path| match path.is_dir() {
            true => stores(&path),
            false if path.ends_with("store.rs") => vec![path],
            false => Vec::new(),
        })
        .collect()
}

fn room_of(src: &Path, store: &Path) -> String {
    let room = store.parent().unwrap().strip_prefix(src).unwrap();
    room.to_str().unwrap().to_owned()
}

//! The rules of the house that a machine can check: who may import whom, where SQL and tasks begin, how large a file may grow.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

/// The rooms by floor, with what each may import besides floor 0, `secret` and `telemetry`. Floor 0 may import only what is named.
const ROOMS: &[(&str, &[&str])] = &[
    ("ids", &[]),
    ("protocol", &["ids"]),
    ("routing", &["ids", "protocol"]),
    ("token", &["ids"]),
    ("telemetry", &[]),
    ("secret", &[]),
    ("task", &[]),
    ("config", &[]),
    ("db", &["task"]),
    ("bus", &["db", "task"]),
    ("replica", &["db", "bus", "task"]),
    ("account", &["db", "bus", "task"]),
    ("quota", &["db", "bus", "task"]),
    ("poll", &["db"]),
    ("api_key", &["db", "bus", "task"]),
    ("ledger", &["db", "bus", "task"]),
    ("lease", &["db", "bus"]),
    ("snapshot", &["config", "db", "bus", "task"]),
    (
        "upstream",
        &["config", "db", "bus", "task", "account", "poll", "quota"],
    ),
    ("forward", &["db", "task"]),
    (
        "turn",
        &[
            "config", "db", "bus", "task", "account", "quota", "api_key", "ledger", "replica",
            "lease", "snapshot", "upstream", "forward",
        ],
    ),
    ("error", &["turn"]),
    (
        "ingress",
        &[
            "config", "db", "error", "turn", "upstream", "account", "quota", "api_key", "ledger",
            "task",
        ],
    ),
    (
        "jobs",
        &[
            "task", "db", "account", "quota", "lease", "ledger", "replica", "snapshot", "upstream",
            "turn",
        ],
    ),
    ("server", ANY),
    ("cli", ANY),
    ("lib", ANY),
    ("main", ANY),
];
const ANY: &[&str] = &["*"];
const FLOOR_0: [&str; 4] = ["ids", "protocol", "routing", "token"];

/// Lines of a file that is not a test.
const CEILING: usize = 600;

#[test]
fn rooms_import_only_what_their_floor_allows() {
    let rooms: BTreeMap<_, _> = ROOMS.iter().copied().collect();
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let room = room(&path);
        let Some(allowed) = rooms.get(room.as_str()) else {
            wrong.push(format!("{}: no such room in the table", path.display()));
            continue;
        };
        for imported in imports(&text) {
            let everywhere = !FLOOR_0.contains(&room.as_str())
                && (FLOOR_0.contains(&imported.as_str())
                    || ["secret", "telemetry"].contains(&imported.as_str()));
            let fine = imported == room
                || everywhere
                || *allowed == ANY
                || allowed.contains(&imported.as_str());
            if rooms.contains_key(imported.as_str()) && !fine {
                wrong.push(format!(
                    "{}: {room} may not import {imported}",
                    path.display()
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn floor_0_is_pure() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if !["protocol", "routing"].contains(&room(&path).as_str()) {
            continue;
        }
        for forbidden in [
            "tokio::",
            "reqwest::",
            "std::time::Instant",
            "Timestamp::now",
            "std::net",
            "std::fs",
        ] {
            if without_tests(&text).contains(forbidden) {
                wrong.push(format!("{}: {forbidden}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn sql_stands_in_stores_and_in_db() {
    let verbs = [
        "select ",
        "insert into ",
        "update ",
        "delete from ",
        "with ",
    ];
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if path.ends_with("store.rs") || room(&path) == "db" {
            continue;
        }
        for (number, line) in without_tests(&text).lines().enumerate() {
            let quoted = line.trim_start().trim_start_matches(['r', '#']);
            let code = !line.trim_start().starts_with("//");
            if code
                && verbs.iter().any(|verb| {
                    quoted.starts_with(&format!("\"{verb}"))
                        || line.contains(&format!("= \"{verb}"))
                })
            {
                wrong.push(format!("{}:{}", path.display(), number + 1));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "SQL outside a store:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn only_task_spawns() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if room(&path) == "task" {
            continue;
        }
        for spawn in ["tokio::spawn", "spawn_blocking", "thread::spawn", "JoinSet"] {
            if without_tests(&text).contains(spawn) {
                wrong.push(format!("{}: {spawn}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_file_says_what_it_is_for_and_is_no_longer_than_it_should_be() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        if !text.starts_with("//!") {
            wrong.push(format!("{}: no module documentation", path.display()));
        }
        let lines = without_tests(&text).lines().count();
        if lines > CEILING {
            wrong.push(format!("{}: {lines} lines", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Every file under `src`, with its path below it.
pub(crate) fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                files.push((path.strip_prefix(&root).unwrap().to_owned(), text));
            }
        }
    }
    assert!(files.len() > 20, "the sources were not found");
    files
}

fn room(path: &Path) -> String {
    let first = path
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_string_lossy();
    first.trim_end_matches(".rs").to_owned()
}

/// The rooms named after `crate::`, in single and grouped imports and in paths.
fn imports(text: &str) -> Vec<String> {
    let text = without_tests(text);
    let mut rooms = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            Some(group) => {
                let mut depth = 0;
                let mut name = String::new();
                for c in group.chars() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth == 0 => break,
                        '}' => depth -= 1,
                        ',' if depth == 0 => rooms.push(std::mem::take(&mut name)),
                        _ if depth == 0 => name.push(c),
                        _ => {}
                    }
                }
                rooms.push(name);
            }
            None => rooms.push(rest.to_owned()),
        }
    }
    let head = |name: String| {
        name.trim()
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect::<String>()
    };
    rooms.into_iter().map(head).collect()
}

fn without_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap()
}

//! The demo shows traffic, and nothing of it outlives Ctrl-C.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use rustix::process::{Pid, Signal, kill_process};

/// Builds the service, which is another package's program.
fn drawbridge() -> PathBuf {
    let built = Command::new(env!("CARGO"))
        .args([
            "build",
            "--quiet",
            "--package",
            "drawbridge",
            "--bin",
            "drawbridge",
        ])
        .status()
        .expect("cargo runs");
    assert!(built.success());
    Path::new(env!("CARGO_BIN_EXE_loadtest")).with_file_name("drawbridge")
}

/// Ends with the test, also with one that fails.
struct Demo(Child);

impl Drop for Demo {
    fn drop(&mut self) {
        let _gone_already = kill_process(Pid::from_child(&self.0), Signal::TERM);
        drop(self.0.wait());
    }
}

#[test]
fn the_demo_shows_traffic_of_three_accounts_over_two_replicas_and_leaves_nothing_behind() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_loadtest"));
    // Against a demo that shows nothing: it ends by itself.
    command
        .args(["demo", "--seconds", "120", "--drawbridge"])
        .arg(drawbridge());
    let mut demo = Demo(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(demo.0.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);

    let (mut served, mut directory, mut seen) =
        (std::collections::BTreeMap::new(), None, String::new());
    let mut wandered = false;
    for line in lines.by_ref() {
        seen += &format!("{line}\n");
        if let Some((_, rest)) = line.split_once("DRAWBRIDGE_DATA_DIR=") {
            directory = rest.split(' ').next().map(PathBuf::from);
        }
        // account, status, used, turns, ..
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [account @ ("alice" | "bob" | "carol"), _, _, turns, ..] = words.as_slice() {
            served.insert((*account).to_owned(), turns.parse::<u64>().unwrap());
        }
        wandered |= line.contains("went on over both replicas");
        // Printed last of each picture.
        let counted = line.contains("how conversations went on: ");
        if counted && wandered && served.len() == 3 && served.values().sum::<u64>() > 5 {
            break;
        }
    }
    assert!(served.values().sum::<u64>() > 5, "{seen}");
    assert!(wandered, "{seen}");
    assert!(!seen.contains("client saw"), "{seen}");
    let directory = directory.unwrap();
    assert!(
        std::fs::read_dir(&directory).unwrap().next().is_some(),
        "the data is there"
    );

    kill_process(Pid::from_child(&demo.0), Signal::INT).unwrap();
    assert!(demo.0.wait().unwrap().success());
    assert!(
        !directory.exists(),
        "{} is still there",
        directory.display()
    );
    let orphans = Command::new("pgrep")
        .arg("-f")
        .arg(&directory)
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&orphans.stdout),
        "",
        "a server of the demo still runs"
    );
}

//! The Postgres programs of this machine: finding them, choosing a version, running them as the owner of the data.
//!
//! A major version reads only its own data, so an existing cluster decides; the newest is for new ones.

use std::io;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use super::Error;
use super::home::Home;

/// The oldest major version that our statements run on.
const OLDEST: u32 = 14;

/// Where systems keep the programs of one or several versions: in `parent/prefix*/below`.
const FAMILIES: [(&str, &str, &str); 8] = [
    ("/usr/lib/postgresql", "", "bin"),          // Debian
    ("/usr", "pgsql-", "bin"),                   // the PGDG packages of Red Hat's relatives
    ("/usr/local", "pgsql", "bin"),              // built from source
    ("/opt/homebrew/opt", "postgresql@", "bin"), // Homebrew on Apple silicon
    ("/usr/local/opt", "postgresql@", "bin"),    // Homebrew on Intel
    ("/Applications/Postgres.app/Contents/Versions", "", "bin"),
    ("/usr", "bin", ""),
    ("/usr/local", "bin", ""),
];

/// The programs of one installed version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Programs {
    pub(super) major: u32,
    pub(super) bin: PathBuf,
}

impl Programs {
    /// Those that fit the data of `home`, or the newest where there is none yet.
    pub(super) fn find(home: &Home) -> Result<Self, Error> {
        let installed = directories().into_iter().filter_map(Self::inspect);
        match home.major()? {
            None => newest(installed).ok_or(Error::NotInstalled),
            Some(major) => installed
                .into_iter()
                .find(|programs| programs.major == major)
                .ok_or_else(|| Error::MissingMajor {
                    data: home.data.clone(),
                    major,
                }),
        }
    }

    /// The version in `bin` by its own word; client packages leave a `pg_config` there but no server.
    fn inspect(bin: PathBuf) -> Option<Self> {
        let complete = ["initdb", "pg_ctl"]
            .iter()
            .all(|program| bin.join(program).is_file());
        let version = complete
            .then(|| Command::new(bin.join("postgres")).arg("--version").output())?
            .ok()?;
        let major = major(&String::from_utf8_lossy(&version.stdout))?;
        Some(Self { major, bin })
    }

    /// `program` as the owner of the data and with an environment of its own: our settings and secrets are not for it.
    pub(super) fn command(&self, program: &str, home: &Home) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command
            .env_clear()
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::null());
        if let Some(account) = home.account {
            // `uid` drops the supplementary groups of root as well.
            command.uid(account.uid).gid(account.gid);
        }
        command
    }
}

/// The end of what a program said, one line as far as it goes.
pub(super) fn tail(output: &[u8]) -> String {
    let text = String::from_utf8_lossy(output);
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// An error unless the program has run and succeeded.
pub(super) fn checked(program: &'static str, result: io::Result<Output>) -> Result<(), Error> {
    match result {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(Error::Program {
            program,
            output: tail(&[output.stdout, output.stderr].concat()),
        }),
        Err(error) => Err(Error::Program {
            program,
            output: error.to_string(),
        }),
    }
}

fn newest(installed: impl Iterator<Item = Programs>) -> Option<Programs> {
    installed
        .filter(|programs| programs.major >= OLDEST)
        .max_by_key(|programs| programs.major)
}

/// Every directory that may hold the programs; most do not exist.
fn directories() -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Ok(config) = Command::new("pg_config").arg("--bindir").output() {
        found.push(PathBuf::from(
            String::from_utf8_lossy(&config.stdout).trim(),
        ));
    }
    for (parent, prefix, below) in FAMILIES {
        let children = std::fs::read_dir(parent).into_iter().flatten().flatten();
        found.extend(
            children
                .filter(|child| child.file_name().to_string_lossy().starts_with(prefix))
                .map(|child| child.path().join(below)),
        );
    }
    found
}

/// The major version in the output of `postgres --version`.
fn major(version: &str) -> Option<u32> {
    let number = version.split_once("(PostgreSQL) ")?.1;
    let digits = number.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_version_is_read_from_what_postgres_says() {
        for (said, expected) in [
            (
                "postgres (PostgreSQL) 15.19 (Debian 15.19-0+deb12u1)\n",
                Some(15),
            ),
            ("postgres (PostgreSQL) 19beta2", Some(19)),
            ("postgres (PostgreSQL) 18devel", Some(18)),
            ("postgres (PostgreSQL) 9.6.24", Some(9)),
            ("", None),
            ("bash: postgres: not found", None),
        ] {
            assert_eq!(major(said), expected, "{said}");
        }
    }

    #[test]
    fn a_new_cluster_takes_the_newest_version_that_our_statements_run_on() {
        for (installed, expected) in [
            (&[15, 17, 14][..], Some(17)),
            (&[9, 13][..], None),
            (&[13, 14][..], Some(14)),
            (&[][..], None),
        ] {
            let programs = installed.iter().map(|&major| Programs {
                major,
                bin: PathBuf::new(),
            });
            assert_eq!(
                newest(programs).map(|programs| programs.major),
                expected,
                "{installed:?}"
            );
        }
    }

    #[test]
    fn the_tail_of_an_output_is_its_last_lines_without_blank_ones() {
        let output: String = (0..30).map(|line| format!("  line {line}\n\n")).collect();
        let tail = tail(output.as_bytes());
        assert!(
            tail.starts_with("line 18\nline 19\n") && tail.ends_with("\nline 29"),
            "{tail}"
        );
    }
}

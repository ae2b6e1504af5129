//! Follows a runbook as an operator would: every line that begins with `$` in a `console` block is run by a shell, and what it says must
//! be what stands below it.
//!
//! Of what differs between two installations only the form is compared: digits stand for digits, though nothing is not something, and the
//! status of an answer is exact. An id stands for another one that is the same throughout the page, in commands too. `...` stands for any
//! number of lines. A command that only looks is repeated until it says what it should, for a while.
#![expect(
    clippy::print_stdout,
    reason = "what was really said is wanted where a page is written"
)]

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    process::Command,
    time::{sleep, timeout},
};

/// For a command that does not end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Until a command that only looks says what it should; when one has not, the others get less.
const AGAIN: [Duration; 2] = [Duration::from_secs(40), Duration::from_secs(1)];
/// Commands that do something: run once.
const DOES: [&str; 14] = [
    " release ",
    " login ",
    " import ",
    " pause ",
    " resume ",
    " delete ",
    " create ",
    " revoke ",
    " rotate-master",
    " migrate",
    " -X POST",
    " -d ",
    "pg_",
    "psql ",
];

/// A page and how far it was followed.
pub(crate) struct Runbook {
    name: String,
    sections: Vec<Section>,
    ids: Ids,
    environment: BTreeMap<OsString, OsString>,
    directory: TempDir,
    wrong: Vec<String>,
}

/// What stands below one heading, up to the next.
struct Section {
    heading: String,
    steps: Vec<Step>,
    walked: bool,
}

/// A command, and what it says.
#[derive(Debug, PartialEq)]
struct Step {
    command: String,
    says: Vec<String>,
}

/// The ids of a page, and those that they stand for.
type Ids = BTreeMap<String, String>;

/// Where the pages are.
pub(crate) fn pages() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/runbooks")
}

impl Runbook {
    /// Opens a page of `deploy/runbooks`, to be followed with the program's settings of this command.
    pub(crate) fn open(name: &str, program: &Command) -> Self {
        let text = fs::read_to_string(pages().join(name).with_extension("md")).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let bin = directory.path().join("bin");
        fs::create_dir(&bin).unwrap();
        symlink(env!("CARGO_BIN_EXE_drawbridge"), bin.join("drawbridge")).unwrap();
        let mut book = Self {
            name: name.to_owned(),
            sections: sections(&text),
            ids: Ids::new(),
            environment: BTreeMap::new(),
            directory,
            wrong: Vec::new(),
        };
        book.at(program);
        book
    }

    /// From now on the commands are run with the settings of this one.
    pub(crate) fn at(&mut self, program: &Command) {
        for (name, value) in program.as_std().get_envs() {
            self.set(&name.to_string_lossy(), value.unwrap_or_default());
        }
        let paths = std::env::split_paths(&self.environment[OsStr::new("PATH")]);
        let paths: Vec<_> = [self.directory().join("bin")]
            .into_iter()
            .chain(paths)
            .collect();
        self.set("PATH", std::env::join_paths(paths).unwrap());
    }

    /// From now on a variable has this value.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<OsString>) {
        self.environment.insert(name.into(), value.into());
    }

    /// Where the commands are run.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Follows the commands below a heading.
    pub(crate) async fn walk(&mut self, heading: &str) {
        self.walk_typing(heading, async |_| None).await;
    }

    /// The same by somebody who does what a command asks for, seeing what it has said so far; what they yield is typed in.
    pub(crate) async fn walk_typing(
        &mut self,
        heading: &str,
        answer: impl AsyncFn(String) -> Option<String>,
    ) {
        let found = self
            .sections
            .iter()
            .position(|section| section.heading == heading);
        let at = found.unwrap_or_else(|| panic!("{}: no heading {heading}", self.name));
        assert!(
            !std::mem::replace(&mut self.sections[at].walked, true),
            "{heading} twice"
        );
        let steps = std::mem::take(&mut self.sections[at].steps);
        assert!(!steps.is_empty(), "{heading} has no commands");
        for step in &steps {
            self.follow(heading, step, &answer).await;
        }
    }

    async fn follow(
        &mut self,
        heading: &str,
        step: &Step,
        answer: impl AsyncFn(String) -> Option<String>,
    ) {
        let command = renamed(&step.command, &self.ids);
        let looks = !DOES.iter().any(|word| format!("{command} ").contains(word));
        let deadline = Instant::now() + AGAIN[usize::from(!self.wrong.is_empty())];
        let said = loop {
            let said = self.run(&command, &answer).await;
            let lines: Vec<_> = said.lines().map(str::trim_end).collect();
            if let Some(ids) = agree(&step.says, &lines, &self.ids) {
                self.ids = ids;
                println!("{} / {heading}\n$ {command}\n{said}", self.name);
                return;
            }
            if !looks || Instant::now() > deadline {
                break said;
            }
            sleep(Duration::from_millis(50)).await;
        };
        let written = step.says.join("\n");
        self.wrong.push(format!(
            "## {heading}\n$ {command}\n--- written\n{written}\n--- said\n{said}"
        ));
    }

    /// Runs a command to its end, as on a terminal.
    async fn run(&self, command: &str, answer: impl AsyncFn(String) -> Option<String>) -> String {
        let mut shell = Command::new("bash");
        shell
            .args(["-c", &format!("exec 2>&1\n{command}")])
            .env_clear()
            .envs(&self.environment)
            .current_dir(&self.directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true);
        let mut shell = shell.spawn().unwrap();
        let mut keyboard = shell.stdin.take();
        let mut out = shell.stdout.take().unwrap();
        let (mut said, mut part) = (Vec::new(), [0; 4096]);
        loop {
            let read = timeout(PATIENCE, out.read(&mut part)).await;
            let read = read
                .unwrap_or_else(|_| {
                    panic!(
                        "it does not end: {command}\n{}",
                        String::from_utf8_lossy(&said)
                    )
                })
                .unwrap();
            if read == 0 {
                break;
            }
            said.extend(&part[..read]);
            let line = answer(String::from_utf8_lossy(&said).into_owned()).await;
            if let Some(line) = line
                && let Some(mut keyboard) = keyboard.take()
            {
                keyboard.write_all(line.as_bytes()).await.unwrap();
            }
        }
        shell.wait().await.unwrap();
        String::from_utf8(said).unwrap()
    }

    /// Nothing was different, and nothing is left.
    pub(crate) fn done(self) {
        println!("{}: {:?}", self.name, self.ids);
        let left = self
            .sections
            .iter()
            .filter(|section| !section.walked && !section.steps.is_empty());
        let left: Vec<_> = left.map(|section| section.heading.as_str()).collect();
        assert!(
            self.wrong.is_empty() && left.is_empty(),
            "{}: not followed: {left:?}\n\n{}",
            self.name,
            self.wrong.join("\n\n")
        );
    }
}

/// The commands of a page by heading.
fn sections(text: &str) -> Vec<Section> {
    let mut sections: Vec<Section> = Vec::new();
    // Within a block: whether its commands are run.
    let mut block: Option<bool> = None;
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(language) = line.strip_prefix("```") {
            block = match block {
                None => Some(language == "console"),
                Some(_) => None,
            };
            continue;
        }
        if block.is_none() && line.starts_with('#') {
            sections.push(Section {
                heading: line.trim_start_matches('#').trim().to_owned(),
                steps: Vec::new(),
                walked: false,
            });
        }
        if block != Some(true) {
            continue;
        }
        let steps = &mut sections.last_mut().unwrap().steps;
        if let Some(command) = line.strip_prefix("$ ") {
            let mut command = command.to_owned();
            while command.ends_with('\\') {
                command = format!("{command}\n{}", lines.next().unwrap());
            }
            steps.push(Step {
                command,
                says: Vec::new(),
            });
        } else {
            let step = steps.last_mut().expect("a block begins with a command");
            step.says.push(line.trim_end().to_owned());
        }
    }
    for section in &mut sections {
        for step in &mut section.steps {
            let end = step.says.iter().rposition(|line| !line.is_empty());
            step.says.truncate(end.map_or(0, |end| end + 1));
        }
    }
    sections
}

/// The ids after these lines, if what was said is what is written.
fn agree(written: &[String], said: &[&str], ids: &Ids) -> Option<Ids> {
    let Some((first, rest)) = written.split_first() else {
        return said.iter().all(|line| line.is_empty()).then(|| ids.clone());
    };
    if first == "..." {
        return (0..=said.len()).find_map(|skipped| agree(rest, &said[skipped..], ids));
    }
    let (line, others) = said.split_first()?;
    agree(rest, others, &same(first, line, ids)?)
}

/// The ids after this line, if it is what is written.
fn same(written: &str, said: &str, ids: &Ids) -> Option<Ids> {
    let written: Vec<_> = written.split_whitespace().collect();
    let said: Vec<_> = said.split_whitespace().collect();
    if written.len() != said.len() {
        return None;
    }
    let mut ids = ids.clone();
    let word = |at: usize| written.get(at).copied().unwrap_or_default();
    for (at, said) in said.iter().enumerate() {
        let before = at.checked_sub(1).map_or("", word);
        let after = word(at + 1).trim_end_matches([',', ';', '.', ')']);
        let number = match (before, after) {
            ("with" | "status" | "HTTP", _) => Number::Exact,
            (_, "ms" | "s" | "us") => Number::Any,
            _ => Number::Amount,
        };
        let (mine, theirs) = (pieces(word(at)), pieces(said));
        let plain = |pieces: &[(bool, &str)]| -> String {
            let plain = pieces
                .iter()
                .map(|(id, text)| if *id { "ID" } else { text });
            number.form(&plain.collect::<String>())
        };
        if plain(&mine) != plain(&theirs) {
            return None;
        }
        let only = |pieces: Vec<(bool, &str)>| -> Vec<String> {
            let ids = pieces.into_iter().filter(|(id, _)| *id);
            ids.map(|(_, text)| text.to_owned()).collect()
        };
        for (mine, theirs) in only(mine).into_iter().zip(only(theirs)) {
            match ids.get(&mine) {
                Some(known) if *known == theirs => {}
                None if !ids.values().any(|known| *known == theirs) => {
                    drop(ids.insert(mine, theirs))
                }
                _ => return None,
            }
        }
    }
    Some(ids)
}

/// A text with what its ids stand for.
fn renamed(text: &str, ids: &Ids) -> String {
    let piece = |(id, text): (bool, &str)| match ids.get(text) {
        Some(real) if id => real.clone(),
        _ => text.to_owned(),
    };
    pieces(text).into_iter().map(piece).collect()
}

/// Cuts a text into ids, which are true, and what stands between them: UUIDs, responses, API keys.
fn pieces(text: &str) -> Vec<(bool, &str)> {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    let mut pieces = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let word = rest.find(|c| !part(c)).unwrap_or(rest.len());
        let end = if word == 0 {
            rest.find(part).unwrap_or(rest.len())
        } else {
            word
        };
        let (piece, after) = rest.split_at(end);
        pieces.push((word > 0 && is_id(piece), piece));
        rest = after;
    }
    pieces
}

fn is_id(word: &str) -> bool {
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let groups: Vec<_> = word.split('-').collect();
    let uuid = groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12])
        && groups.iter().all(|group| hex(group));
    uuid || word.starts_with("resp_") || word.starts_with("dbk_")
}

/// What of a number must be the same.
#[derive(Clone, Copy)]
enum Number {
    Exact,
    /// Whether it is nothing.
    Amount,
    Any,
}

impl Number {
    /// A token with its numbers as they are compared.
    fn form(self, token: &str) -> String {
        let bare = token.trim_matches(['(', ',', ';', ')', '.', '%']);
        let whole = !bare.is_empty() && bare.bytes().all(|byte| byte.is_ascii_digit());
        match self {
            Self::Exact => return token.to_owned(),
            Self::Amount if whole && bare.bytes().all(|byte| byte == b'0') => {
                return token.replace(bare, "none");
            }
            Self::Amount | Self::Any => {}
        }
        let mut form = String::new();
        let mut characters = token.chars().peekable();
        while let Some(character) = characters.next() {
            match character {
                '0'..='9' if form.ends_with('9') => {}
                '0'..='9' => form.push('9'),
                '+' if characters.peek().is_some_and(char::is_ascii_digit) => form.push('-'),
                character => form.push(character),
            }
        }
        form
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agrees(written: &str, said: &str) -> bool {
        let written: Vec<_> = written.lines().map(str::to_owned).collect();
        agree(&written, &said.lines().collect::<Vec<_>>(), &Ids::new()).is_some()
    }

    #[test]
    fn only_what_differs_between_installations_may_differ() {
        let (a, b) = (
            "019a0000-0000-7000-8000-00000000000a",
            "019a0000-0000-7000-8000-00000000000b",
        );
        for (written, said, expected) in [
            ("one  two", "one two", true),
            ("one two", "one three", false),
            ("one", "one\ntwo", false),
            ("one\n...", "one\ntwo\nthree", true),
            ("one\n...\nfour", "one\ntwo\nthree", false),
            ("12.5 s ago", "0.3 s ago", true),
            ("12 ms in all", "0 ms in all", true),
            (
                "drawbridge_database_up 0",
                "drawbridge_database_up 1",
                false,
            ),
            (
                "drawbridge_takes_total 3",
                "drawbridge_takes_total 12",
                true,
            ),
            ("refused with 503", "refused with 429", false),
            ("2026-11-21 19:00", "2027-01-02 03:04", true),
            ("2026-11-21 19:00", "2027-01-02", false),
            ("+0.004 s", "-1.104 s", true),
        ] {
            assert_eq!(agrees(written, said), expected, "{written} / {said}");
        }
        for (written, said, expected) in [
            (format!("({a}) {a}"), format!("({b}) {b}"), true),
            (format!("{a} {b}"), format!("{b} {b}"), false),
            (format!("{a}\n{b}\n{a}"), format!("{b}\n{a}\n{b}"), true),
            (format!("{a}\n{a}"), format!("{b}\n{a}"), false),
            ("resp_1 resp_2".into(), "resp_77 resp_78".into(), true),
            (format!("{a}."), a.to_owned(), false),
        ] {
            assert_eq!(agrees(&written, &said), expected, "{written} / {said}");
        }
    }

    #[test]
    fn commands_stand_in_console_blocks_and_go_on_behind_a_backslash() {
        let text =
            "# A\n```sh\n$ not run\n```\n## B\n```console\n$ one \\\n  two\nsays\n\n$ three\n```\n";
        let [a, b] = &sections(text)[..] else {
            panic!("two headings")
        };
        assert!(a.steps.is_empty());
        let expected = [
            ("one \\\n  two", vec!["says".to_owned()]),
            ("three", vec![]),
        ];
        let expected = expected.map(|(command, says)| Step {
            command: command.into(),
            says,
        });
        assert_eq!((b.heading.as_str(), &b.steps[..]), ("B", &expected[..]));
    }
}

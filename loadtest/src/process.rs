//! Other processes: started, measured from outside through `/proc`, and stopped whatever happens.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::{
    param::clock_ticks_per_second,
    process::{Pid, Signal, kill_process},
};

/// How long a process may take to end when asked.
const PATIENCE: Duration = Duration::from_secs(20);

/// A process that is stopped when this is dropped: politely, so that it stops its own, and then for certain.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts it with its output in `log`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut command: Command, log: PathBuf) -> anyhow::Result<Self> {
        let output = File::create(&log).context("the log")?;
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        let program = command.get_program().to_string_lossy().into_owned();
        let child = command
            .spawn()
            .with_context(|| format!("{program} does not start"))?;
        Ok(Self { child, log })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal, if it still runs.
    ///
    /// # Errors
    /// If that is refused.
    pub fn signal(&mut self, signal: Signal) -> anyhow::Result<()> {
        if self.ended()?.is_none() {
            kill_process(Pid::from_child(&self.child), signal)?;
        }
        Ok(())
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// With the end of its output, if it does not.
    pub fn alive(&mut self) -> anyhow::Result<()> {
        let Some(status) = self.child.try_wait()? else {
            return Ok(());
        };
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let tail: Vec<&str> = log.lines().rev().take(15).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        anyhow::bail!("it ended with {status}:\n{}", tail.join("\n"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let asked = pid.is_some_and(|pid| kill_process(pid, Signal::TERM).is_ok());
        let deadline = Instant::now() + PATIENCE;
        while asked && Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A directory for one run, which other users may enter (Postgres runs as its own user); removed when dropped.
pub struct RunDir(PathBuf);

impl RunDir {
    /// Makes it under the system's temporary directory.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn make(name: &str) -> io::Result<Self> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = std::env::temp_dir().join(format!("drawbridge-{name}-{}", std::process::id()));
        fs::create_dir_all(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        Ok(Self(path))
    }

    /// Leaves it there, for who wants to look.
    #[must_use]
    pub fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty() {
            drop(fs::remove_dir_all(&self.0));
        }
    }
}

/// A port of the loopback interface that was free just now.
///
/// # Errors
/// If there is none.
pub fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A free port that no system hands out by itself, nor this process twice: a server that comes back later finds it free again.
///
/// # Errors
/// If there is none.
pub fn lasting_port() -> io::Result<u16> {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    // Linux gives outgoing connections 32768 and more.
    let mut ports = std::iter::repeat_with(|| rand::random_range(10_000..32_000));
    let mut free =
        |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok() && given.insert(*port);
    ports
        .by_ref()
        .take(1_000)
        .find(&mut free)
        .ok_or_else(|| io::ErrorKind::AddrInUse.into())
}

/// Ends when this process is asked to: Ctrl-C or SIGTERM.
///
/// # Errors
/// If signals cannot be listened to.
pub async fn interrupted() -> io::Result<()> {
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        ended = tokio::signal::ctrl_c() => ended,
        _ = terminate.recv() => Ok(()),
    }
}

/// CPU time that processes have used themselves, in user and kernel mode, without their children.
///
/// # Errors
/// If one of them is gone.
pub fn cpu(pids: &[u32]) -> anyhow::Result<Duration> {
    let mut ticks = 0;
    for pid in pids {
        let fields = stat(*pid)?;
        // utime and stime are fields 14 and 15 of proc(5); the first two are cut off.
        for field in [11, 12] {
            ticks += fields
                .get(field)
                .and_then(|field| field.parse::<u64>().ok())
                .context("proc stat")?;
        }
    }
    Ok(Duration::from_secs(ticks) / u32::try_from(clock_ticks_per_second())?)
}

/// Resident memory of processes together, in KiB.
///
/// # Errors
/// If one of them is gone.
pub fn rss_kib(pids: &[u32]) -> anyhow::Result<u64> {
    let mut sum = 0;
    for pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .context("no VmRSS")?;
        sum += line.trim().trim_end_matches(" kB").parse::<u64>()?;
    }
    Ok(sum)
}

/// The processes that this one has started.
///
/// # Errors
/// If `/proc` cannot be read.
pub fn children(pid: u32) -> anyhow::Result<Vec<u32>> {
    let all = fs::read_dir("/proc")?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    // Those that end meanwhile are nobody's children.
    Ok(all
        .filter(|candidate| {
            stat(*candidate).is_ok_and(|fields| fields.get(1) == Some(&pid.to_string()))
        })
        .collect())
}

/// The fields of `/proc/PID/stat` after the name, which may contain anything.
fn stat(pid: u32) -> anyhow::Result<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("proc stat")?;
    Ok(fields.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemon_ends_with_its_guard_and_is_measured_while_it_runs() {
        let dir = RunDir::make("process-test").unwrap();
        let mut command = Command::new("sleep");
        command.arg("600");
        let mut daemon = Daemon::start(command, dir.path().join("log")).unwrap();
        let pid = daemon.pid();
        daemon.alive().unwrap();
        assert!(children(std::process::id()).unwrap().contains(&pid));
        assert!(rss_kib(&[pid]).unwrap() > 0);
        assert!(cpu(&[pid]).unwrap() < Duration::from_secs(5));
        drop(daemon);
        assert!(cpu(&[pid]).is_err(), "still there");
        let path = dir.path().to_owned();
        drop(dir);
        assert!(!path.exists());
    }
}

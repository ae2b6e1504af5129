//! The directory of an embedded cluster: what lies where, whose it is, and how the socket is reached.
//!
//! The server runs as the owner of its data. As root that is the user `postgres`, unless the data already belongs to someone else.
//! What root reads or writes itself (locks, log) lies beside the data, in a directory that only root writes to.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Error;

/// A socket's address has 108 bytes on Linux and 104 elsewhere, one of which ends it.
const ADDRESS: usize = 103;
/// A log longer than this is set aside, in place of the one set aside before, when a server starts.
const LOG_BYTES: u64 = 8 << 20;

/// The OS user that owns the data and runs the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// The places of one cluster, as absolute paths.
#[derive(Debug)]
pub(super) struct Home {
    directory: PathBuf,
    /// The cluster itself.
    pub(super) data: PathBuf,
    /// Locked shared by every user.
    pub(super) users: PathBuf,
    /// Locked exclusively while a server is started or stopped.
    pub(super) gate: PathBuf,
    /// Whom the programs run as, where that is not ourselves.
    pub(super) account: Option<Account>,
}

impl Home {
    /// Makes `directory` where it is missing.
    pub(super) fn open(directory: &Path) -> Result<Self, Error> {
        let root = rustix::process::geteuid().is_root();
        if !directory.exists() {
            let mode = if root { 0o755 } else { 0o700 };
            file(directory, fs::create_dir_all(directory))?;
            file(
                directory,
                fs::set_permissions(directory, Permissions::from_mode(mode)),
            )?;
        }
        let directory = file(directory, directory.canonicalize())?;
        let data = directory.join("postgres");
        let account = if root { Some(account(&data)?) } else { None };
        if let Some(account) = account {
            passable(&directory, account)?;
        }
        let (users, gate) = (
            directory.join("postgres.lock"),
            directory.join("postgres.start.lock"),
        );
        Ok(Self {
            directory,
            data,
            users,
            gate,
            account,
        })
    }

    /// The major version of the data; `None` where there is none.
    pub(super) fn major(&self) -> Result<Option<u32>, Error> {
        let path = self.data.join("PG_VERSION");
        match fs::read_to_string(&path) {
            Ok(text) => {
                let major = text.split('.').next().unwrap_or_default().trim().parse();
                file(&path, major.map(Some).map_err(io::Error::other))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::File { path, source }),
        }
    }

    /// An empty directory for a new cluster.
    pub(super) fn staging(&self) -> Result<PathBuf, Error> {
        let path = self.directory.join("postgres.new");
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => file(&path, Err(error))?,
            _ => self.private(&path)?,
        }
        Ok(path)
    }

    /// Puts a complete cluster into its place.
    pub(super) fn install(&self, staging: &Path) -> Result<(), Error> {
        file(&self.data, fs::rename(staging, &self.data))?;
        file(
            &self.directory,
            File::open(&self.directory).and_then(|directory| directory.sync_all()),
        )
    }

    /// Port and socket directory of the server that runs or has died here: the truth for an adopted one.
    pub(super) fn postmaster(&self) -> Option<(u16, PathBuf)> {
        parse_postmaster(&fs::read_to_string(self.data.join("postmaster.pid")).ok()?)
    }

    /// Where a server that we start shall listen, as a setting. The path must fit into an address, else it is a short one.
    pub(super) fn socket_setting(&self) -> Result<String, Error> {
        let temporary = [std::env::temp_dir(), PathBuf::from("/tmp")];
        let socket = socket_directory(&self.data, &temporary);
        if socket != self.data {
            self.ensure_private(&socket)?;
        }
        Ok(format!("unix_socket_directories=\"{}\"", socket.display()))
    }

    /// The server's log: to append to, and to read what is appended from now on.
    pub(super) fn log(&self) -> Result<(File, File), Error> {
        let path = self.directory.join("postgres.log");
        if fs::metadata(&path).is_ok_and(|log| log.len() > LOG_BYTES) {
            file(
                &path,
                fs::rename(&path, self.directory.join("postgres.log.old")),
            )?;
        }
        let writer = file(
            &path,
            OpenOptions::new()
                .append(true)
                .create(true)
                .mode(0o600)
                .open(&path),
        )?;
        let mut reader = file(&path, File::open(&path))?;
        file(&path, reader.seek(SeekFrom::End(0)))?;
        Ok((writer, reader))
    }

    fn private(&self, path: &Path) -> Result<(), Error> {
        file(path, DirBuilder::new().mode(0o700).create(path))?;
        match self.account {
            Some(account) => file(path, chown(path, Some(account.uid), Some(account.gid))),
            None => Ok(()),
        }
    }

    /// The temporary directory is everybody's: take only what is ours alone.
    fn ensure_private(&self, path: &Path) -> Result<(), Error> {
        if fs::symlink_metadata(path).is_err() {
            self.private(path)?;
        }
        let uid = self.account.map_or_else(
            || rustix::process::geteuid().as_raw(),
            |account| account.uid,
        );
        let found = file(path, fs::symlink_metadata(path))?;
        if found.is_dir() && found.uid() == uid && found.mode() & 0o077 == 0 {
            Ok(())
        } else {
            Err(Error::SocketDirectory { path: path.into() })
        }
    }
}

/// Opens a lock file, which stays for good: a lock on a deleted file excludes nobody.
pub(super) fn lock_file(path: &Path) -> Result<File, Error> {
    file(
        path,
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path),
    )
}

fn file<T>(path: &Path, result: io::Result<T>) -> Result<T, Error> {
    result.map_err(|source| Error::File {
        path: path.into(),
        source,
    })
}

/// Whom to run as when we are root: the owner of the data, else the user that the packages of Postgres make.
fn account(data: &Path) -> Result<Account, Error> {
    if let Ok(found) = fs::metadata(data)
        && found.uid() != 0
    {
        return Ok(Account {
            uid: found.uid(),
            gid: found.gid(),
        });
    }
    let id = |flag| {
        let output = Command::new("id").args([flag, "postgres"]).output().ok()?;
        String::from_utf8(output.stdout).ok()?.trim().parse().ok()
    };
    id("-u")
        .zip(id("-g"))
        .map(|(uid, gid)| Account { uid, gid })
        .ok_or(Error::NoAccount)
}

/// Fails where `account` may not pass through `directory` or one above it: the server's own words for that help nobody.
fn passable(directory: &Path, account: Account) -> Result<(), Error> {
    for path in directory.ancestors() {
        let found = file(path, fs::metadata(path))?;
        let search = match found {
            _ if found.uid() == account.uid => 0o100,
            _ if found.gid() == account.gid => 0o010,
            _ => 0o001,
        };
        if found.mode() & search == 0 {
            return Err(Error::Unreachable { path: path.into() });
        }
    }
    Ok(())
}

/// The data directory, if the address of a socket in it is short enough; else a directory named after it in a temporary one.
fn socket_directory(data: &Path, temporary: &[PathBuf]) -> PathBuf {
    let fits =
        |directory: &PathBuf| directory.as_os_str().len() + "/.s.PGSQL.65535".len() <= ADDRESS;
    let mut hash = DefaultHasher::new();
    data.hash(&mut hash);
    let name = format!("drawbridge-{:016x}", hash.finish());
    let mut directories = [data.to_owned()]
        .into_iter()
        .chain(temporary.iter().map(|directory| directory.join(&name)));
    directories.find(fits).unwrap_or_else(|| data.to_owned())
}

/// Lines 4 and 5 of `postmaster.pid`: port and socket directory. The server writes them one by one.
fn parse_postmaster(text: &str) -> Option<(u16, PathBuf)> {
    let mut lines = text.lines().skip(3);
    let port = lines.next()?.parse().ok()?;
    let socket = lines.next().filter(|path| !path.is_empty())?;
    Some((port, socket.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_lies_in_the_data_directory_or_in_the_first_temporary_one_that_is_short_enough() {
        let long = PathBuf::from(format!("/{}", "x".repeat(100)));
        let short = PathBuf::from("/var/lib/drawbridge/postgres");
        let tmp = PathBuf::from("/tmp");
        assert_eq!(socket_directory(&short, std::slice::from_ref(&tmp)), short);
        let fallback = socket_directory(&long, &[long.clone(), tmp.clone()]);
        assert_eq!(
            fallback.parent(),
            Some(tmp.as_path()),
            "{}",
            fallback.display()
        );
        assert_ne!(
            fallback,
            socket_directory(&long.join("y"), &[tmp]),
            "each cluster has its own"
        );
    }

    #[test]
    fn a_pid_file_tells_port_and_socket_once_both_are_written() {
        let complete = "4711\n/data\n1760000000\n5432\n/run/x\n\n  1234 5\nready   \n";
        assert_eq!(parse_postmaster(complete), Some((5432, "/run/x".into())));
        for partial in [
            "",
            "4711\n/data\n1760000000\n",
            "4711\n/data\n1760000000\n5432\n",
            "4711\n/data\n1760000000\n5432\n\n",
        ] {
            assert_eq!(parse_postmaster(partial), None, "{partial:?}");
        }
    }
}

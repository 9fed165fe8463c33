//! Where PostgreSQL's programs are, and as whom they run.
//!
//! The trap: PostgreSQL refuses to run as root, so root runs it as user `postgres`, and that user can enter neither
//! root's home nor most checkouts. The data lives under the temporary directory, every command starts there, and programs
//! unpacked where `postgres` cannot go are linked or copied next to the data.

use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::unistd::{User, geteuid};

use super::Error;

const DEBIAN_VERSIONS: &str = "/usr/lib/postgresql";
const USER: &str = "postgres";

#[derive(Debug)]
pub(super) struct Installation {
    bin: PathBuf,
    /// Whom to run as: only root has to become someone else.
    user: Option<User>,
}

impl Installation {
    pub(super) fn of(bin: &Path) -> Result<Self, Error> {
        let initdb = bin.join("initdb");
        if !initdb.is_file() {
            return Err(missing(initdb.display().to_string()));
        }
        // Its commands run in another directory.
        let bin = bin.canonicalize();
        let bin = bin.map_err(Error::io(format!("find {}", initdb.display())))?;
        let user = unprivileged_user()?;
        Ok(Self { bin, user })
    }

    /// The `bin` of the highest version among Debian's.
    pub(super) fn newest_bin() -> Result<PathBuf, Error> {
        let versions = std::fs::read_dir(DEBIAN_VERSIONS).into_iter().flatten();
        let bins = versions.flatten().filter_map(|entry| {
            let version: u32 = entry.file_name().to_str()?.parse().ok()?;
            let bin = entry.path().join("bin");
            // A package that was removed leaves its directory behind.
            bin.join("initdb").is_file().then_some((version, bin))
        });
        let newest = bins.max().map(|(_, bin)| bin);
        newest.ok_or_else(|| missing(format!("{DEBIAN_VERSIONS}/*/bin/initdb")))
    }

    /// Hands `directory` to the user who runs the server, and sees to it that this user can reach the programs.
    pub(super) fn move_into(&mut self, directory: &Path) -> Result<(), Error> {
        self.give(directory, 0o755)?;
        if !self.user_may("-w", directory)? {
            let why = "user postgres cannot enter it; set TMPDIR to a directory everyone can enter";
            return Err(Error::refused(format!("use {}", directory.display()), why));
        }
        if !self.user_may("-x", &self.bin.join("initdb"))? {
            let copy = directory.join("server");
            copy_tree(self.bin.parent().unwrap_or(Path::new("/")), &copy)?;
            self.bin = copy.join(self.bin.file_name().unwrap_or_default());
        }
        Ok(())
    }

    pub(super) fn give(&self, path: &Path, mode: u32) -> Result<(), Error> {
        let doing = || Error::io(format!("give {} to user postgres", path.display()));
        std::fs::set_permissions(path, Permissions::from_mode(mode)).map_err(doing())?;
        let Some(user) = &self.user else {
            return Ok(());
        };
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).map_err(doing())
    }

    /// A program of this installation, to be run by its user in `directory`.
    pub(super) fn command(&self, program: &str, directory: &Path) -> Command {
        let mut command = self.as_user("env");
        // Through env(1), so that these libraries are not given to runuser itself. Debian's own layout has a lib there
        // too, with nothing in it that the loader would look for.
        let libraries = self.bin.parent().map(|tree| tree.join("lib"));
        if let Some(libraries) = libraries.filter(|libraries| libraries.is_dir()) {
            command.arg(format!("LD_LIBRARY_PATH={}", libraries.display()));
        }
        // A PGDATA or PGPORT of the caller means another server.
        for (name, _) in std::env::vars_os() {
            if name.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(name);
            }
        }
        command.arg(self.bin.join(program)).env("LC_ALL", "C");
        // A group of its own: ctrl-C is for the caller, whose Drop then stops the server.
        command.current_dir(directory).process_group(0);
        command.stdin(Stdio::null());
        command
    }

    pub(super) fn bin(&self) -> &Path {
        &self.bin
    }

    fn user_may(&self, right: &str, path: &Path) -> Result<bool, Error> {
        let mut test = self.as_user("test");
        let answer = test.arg(right).arg(path).current_dir("/").status();
        Ok(answer.map_err(Error::io("run test"))?.success())
    }

    fn as_user(&self, program: &str) -> Command {
        let Some(user) = &self.user else {
            return Command::new(program);
        };
        let mut command = Command::new("runuser");
        command.args(["-u", &user.name, "--", program]);
        command
    }
}

fn missing(looked_for: String) -> Error {
    Error::Missing { server: "PostgreSQL", looked_for, remedy: "run `apt-get install postgresql`" }
}

fn unprivileged_user() -> Result<Option<User>, Error> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let user = User::from_name(USER).map_err(std::io::Error::from);
    let user = user.map_err(Error::io("look up user postgres"))?;
    user.map(Some).ok_or_else(|| missing(format!("user {USER}")))
}

/// Hard links where the file system is the same (nothing is copied, and a link needs no way through the old directory),
/// else a copy.
fn copy_tree(from: &Path, to: &Path) -> Result<(), Error> {
    let doing = || format!("copy {} to where postgres can read it", from.display());
    for how in [["-a", "--link"].as_slice(), ["-a"].as_slice()] {
        std::fs::create_dir_all(to).map_err(Error::io(doing()))?;
        let mut cp = Command::new("cp");
        cp.args(how).arg("--").arg(from.join(".")).arg(to);
        let copied = cp.stderr(Stdio::null()).status();
        if copied.map_err(Error::io(doing()))?.success() {
            // The top took the mode of the original, which may be closed.
            return std::fs::set_permissions(to, Permissions::from_mode(0o755)).map_err(Error::io(doing()));
        }
        std::fs::remove_dir_all(to).map_err(Error::io(doing()))?;
    }
    Err(Error::refused(doing(), "cp failed; is there 100 MB of room?"))
}

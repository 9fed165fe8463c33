//! A small file system in memory, for servers whose disk fills up.
//!
//! The trap: a mount that outlives its test. It is taken off lazily, so that no process that still looks into it can hold it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Mounted; dropped: taken off, with all that is in it.
pub(crate) struct Volume {
    path: PathBuf,
}

impl Volume {
    /// Puts what is in this directory, which nobody may be using, on a volume of its own, with so many bytes of room left.
    pub(crate) fn at(path: &Path, room: u64) -> Result<Self, String> {
        let before = path.with_extension("before");
        let owner = std::fs::metadata(path).map_err(|error| error.to_string())?;
        let bytes = room + used(path)?;
        std::fs::rename(path, &before).map_err(|error| error.to_string())?;
        std::fs::create_dir(path).map_err(|error| error.to_string())?;
        let options = format!("size={bytes},mode=700,uid={},gid={}", owner.uid(), owner.gid());
        let volume = Self { path: path.to_owned() };
        run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "pgoutbox-volume"]).arg(path))?;
        run(Command::new("cp").arg("-a").arg(before.join(".")).arg(path))?;
        std::fs::remove_dir_all(&before).map_err(|error| error.to_string())?;
        Ok(volume)
    }

    /// From now on it has so many bytes.
    pub(crate) fn resize(&self, bytes: u64) -> Result<(), String> {
        run(Command::new("mount").args(["-o", &format!("remount,size={bytes}")]).arg(&self.path))
    }

    /// Puts what is in it back where it was; nobody may be using it.
    pub(crate) fn put_back(self) -> Result<(), String> {
        let path = self.path.clone();
        let after = path.with_extension("after");
        run(Command::new("cp").arg("-a").arg(&path).arg(&after))?;
        drop(self);
        std::fs::remove_dir(&path).map_err(|error| error.to_string())?;
        std::fs::rename(&after, &path).map_err(|error| error.to_string())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // It may not have been mounted at all.
        let _ = run(Command::new("umount").arg("--lazy").arg(&self.path));
    }
}

fn used(path: &Path) -> Result<u64, String> {
    let output = Command::new("du").arg("-sb").arg(path).output().map_err(|error| error.to_string())?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let bytes = text.split_whitespace().next().and_then(|bytes| bytes.parse().ok());
    bytes.ok_or_else(|| format!("du {}: {text}", path.display()))
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

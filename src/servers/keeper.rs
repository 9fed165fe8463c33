//! Cleans up after a program that died without running its `Drop`s.
//!
//! The trap: ctrl-C on `cargo test`, an abort or a SIGKILL runs no destructor, and every such run left a broker and a
//! directory behind. The keeper is a small shell that reads a pipe only we hold; when the kernel closes our end, for
//! whatever reason, it ends what it was told about and removes the directory. A parent-death signal would be shorter, but
//! it follows the *thread* that started the child (prctl(2)), and a test's thread ends long before its program.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use super::Error;
use super::process::Process;

/// `$1` is the directory. Each line read is `PID START SIGNAL`; the start time keeps it from hitting a stranger.
const SCRIPT: &str = r#"
trap '' HUP INT TERM
directory=$1
told=
while read -r pid started signal; do told="$told $pid:$started:$signal"; done
runs() {
    pid=$1 started=$2
    set -- $(sed 's/.*) //' "/proc/$pid/stat" 2>/dev/null)
    [ "${20:-}" = "$started" ] && [ "$1" != Z ]
}
for each in $told; do
    pid=${each%%:*}; rest=${each#*:}; started=${rest%%:*}; signal=${rest#*:}
    tries=0
    while runs "$pid" "$started"; do
        [ $tries -eq 0 ] && kill -s "$signal" "$pid"
        [ $tries -ge 100 ] && kill -s KILL "$pid"
        [ $tries -ge 200 ] && break
        tries=$((tries + 1)); sleep 0.1
    done
done
tries=0
until rm -rf "$directory" || [ $tries -ge 50 ]; do tries=$((tries + 1)); sleep 0.1; done
"#;

#[derive(Debug)]
pub(crate) struct Keeper {
    shell: Child,
}

impl Keeper {
    pub(crate) fn of(directory: &Path) -> Result<Self, Error> {
        let shell = Command::new("/bin/sh")
            .args(["-c", SCRIPT, "pgoutbox-keeper"])
            .arg(directory)
            .current_dir("/")
            // A group of its own: the ctrl-C that ends us must not end it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(Error::io("start /bin/sh"))?;
        Ok(Self { shell })
    }

    /// `signal` is what ends this process in good order, by its name without SIG.
    pub(crate) fn tell(&mut self, process: Process, signal: &str) -> Result<(), Error> {
        let Some(pipe) = self.shell.stdin.as_mut() else {
            return Ok(());
        };
        writeln!(pipe, "{} {} {signal}", process.pid, process.started).map_err(Error::io("write to the keeper"))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // The server's own Drop came first: the keeper finds nothing to do, and leaves.
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

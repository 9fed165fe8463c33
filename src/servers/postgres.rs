//! A private PostgreSQL.
//!
//! The trap: what a killed server leaves behind. Its lock files name a process id, its System V segment outlives its data,
//! and where the first process of a container reaps nobody, the next start on the same data is refused.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::installation::Installation;
use super::keeper::Keeper;
use super::process::{Process, gone_within, true_within};
use super::{Error, Port, START_ATTEMPTS_MAX, read_lossy, tail};

/// Recovery after a kill included, which writes every file to disk; generous, because the machine may be building something
/// else.
const START_WITHIN: Duration = Duration::from_secs(120);
const STOP_WITHIN: Duration = Duration::from_secs(30);

const PID_FILE: &str = "postmaster.pid";

/// `fsync` stays as it is delivered: the tests kill this server and ask what it kept. Shared memory by `mmap` lies in the
/// data directory and goes with it; the delivered `posix` would leave megabytes in /dev/shm after every kill.
const DEFAULTS: [(&str, &str); 7] = [
    ("listen_addresses", "127.0.0.1"),
    ("wal_level", "logical"),
    ("max_wal_senders", "20"),
    ("max_replication_slots", "20"),
    ("wal_sender_timeout", "10s"),
    ("dynamic_shared_memory_type", "mmap"),
    ("log_line_prefix", "%m [%p] %a "),
];

/// The first rule that fits decides, so `append_hba` writes above this line.
const HBA_TRUST: &str = "\
# everyone else
local all         all              trust
host  all         all 127.0.0.1/32 trust
local replication all              trust
host  replication all 127.0.0.1/32 trust
";

/// A private PostgreSQL; dropping it stops it and removes its data.
#[derive(Debug)]
pub struct Postgres {
    installation: Installation,
    port: Port,
    postmaster: Option<Process>,
    data: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    // Dropped in this order, after our own Drop stopped the server.
    directory: TempDir,
    keeper: Keeper,
}

impl Postgres {
    /// Starts the newest version under `/usr/lib/postgresql`, where Debian puts them. `settings` override the defaults:
    /// `wal_level=logical`, 20 slots and walsenders, `wal_sender_timeout=10s`.
    pub fn start(settings: &[(&str, &str)]) -> Result<Self, Error> {
        Self::start_from(&Installation::newest_bin()?, settings)
    }

    /// Starts the server whose `initdb`, `pg_ctl` and `postgres` are in `bin`, with the libraries of `bin/../lib` if
    /// there are any: an unpacked npm package, a build from source.
    pub fn start_from(bin: &Path, settings: &[(&str, &str)]) -> Result<Self, Error> {
        let mut server = Self::prepare(bin)?;
        server.initialise(settings)?;
        let mut attempt = 0;
        loop {
            attempt += 1;
            match server.start_again() {
                Err(_) if attempt < START_ATTEMPTS_MAX && server.log().contains("Address already in use") => {
                    server.port = Port::pick()?;
                    let _ = std::fs::remove_file(&server.log);
                    server.append_conf(&format!("port = {}", server.port()))?;
                }
                result => return result.map(|()| server),
            }
        }
    }

    /// Starts a streaming standby of `primary`, of the same version; [`Self::promote`] makes it a primary.
    pub fn start_standby_of(primary: &Self) -> Result<Self, Error> {
        let mut server = Self::prepare(primary.installation.bin())?;
        let mut copy = server.installation.command("pg_basebackup", server.directory.path());
        copy.arg("-D").arg(&server.data).args(["-R", "-X", "stream", "-c", "fast", "-d", &primary.url()]);
        let Output { status, stderr, .. } = copy.output().map_err(Error::io("run pg_basebackup"))?;
        if !status.success() {
            return Err(Error::refused("copy PostgreSQL", tail(&String::from_utf8_lossy(&stderr))));
        }
        server.place()?;
        server.start_again().map(|()| server)
    }

    /// Makes a standby a primary, and returns when it is one.
    pub fn promote(&self) -> Result<(), Error> {
        let mut promote = self.installation.command("pg_ctl", self.directory.path());
        promote.arg("promote").arg("-D").arg(&self.data).args(["-w", "-s"]).stdout(Stdio::null());
        let promoted = promote.stderr(Stdio::null()).status().map_err(Error::io("run pg_ctl"))?;
        if promoted.success() { Ok(()) } else { Err(Error::refused("promote PostgreSQL", tail(&self.log()))) }
    }

    /// A standby of this server, with `settings` of its own on top of this one's; this one is restarted for it.
    ///
    /// A copy of a server that stopped in good order is a base backup. It needs no `pg_basebackup`, which unpacked packages
    /// may lack. Replication slots are not copied, as `pg_basebackup` would not.
    pub fn standby(&mut self, settings: &[(&str, &str)]) -> Result<Self, Error> {
        let mut standby = Self::prepare(self.installation.bin())?;
        self.stop("fast", STOP_WITHIN)?;
        let mut copy = Command::new("cp");
        copy.arg("-a").arg("--").arg(self.data.join(".")).arg(&standby.data);
        if !copy.status().map_err(Error::io("run cp"))?.success() {
            return Err(Error::refused("copy the data of PostgreSQL", "cp failed"));
        }
        let slots = standby.data.join("pg_replslot");
        std::fs::remove_dir_all(&slots).map_err(Error::io("remove the copied slots"))?;
        std::fs::create_dir(&slots).map_err(Error::io("make pg_replslot"))?;
        self.installation.give(&slots, 0o700)?;
        let signal = standby.data.join("standby.signal");
        std::fs::write(&signal, "").map_err(Error::io("write standby.signal"))?;
        self.installation.give(&signal, 0o600)?;
        standby.configure(settings)?;
        let primary = format!("host=127.0.0.1 port={} user=postgres dbname=postgres", self.port());
        standby.append_conf(&format!("primary_conninfo = {}", quoted(&primary)))?;
        self.start_again()?;
        standby.start_again().map(|()| standby)
    }

    /// `postgres://postgres@127.0.0.1:PORT/postgres`, a superuser.
    pub fn url(&self) -> String {
        self.url_for("postgres", None, "postgres")
    }

    /// The same for someone else; every part is escaped.
    pub fn url_for(&self, user: &str, password: Option<&str>, database: &str) -> String {
        let password = password.map(|password| format!(":{}", escaped(password))).unwrap_or_default();
        format!("postgres://{}{password}@127.0.0.1:{}/{}", escaped(user), self.port(), escaped(database))
    }

    /// The directory of the Unix socket, for `host=`.
    pub fn socket_dir(&self) -> &Path {
        &self.socket
    }

    /// The port on 127.0.0.1, and of the Unix socket's name. It stays the same for the life of this value.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// PGDATA. Only root and the user the server runs as can enter it.
    pub fn data_dir(&self) -> &Path {
        &self.data
    }

    /// All the server has logged.
    pub fn log(&self) -> String {
        read_lossy(&self.log)
    }

    /// The postmaster's process id while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.postmaster.filter(Process::is_running).map(|postmaster| postmaster.pid)
    }

    /// Stops the server as `pg_ctl stop -m MODE` does (`smart`, `fast` or `immediate`) and says how long it took.
    ///
    /// # Errors
    /// `Late` when it had not stopped in time. It goes on trying: a fast shutdown waits for walsenders whose client does
    /// not confirm what was sent.
    pub fn stop(&mut self, mode: &str, within: Duration) -> Result<Duration, Error> {
        let doing = format!("stop PostgreSQL ({mode})");
        // https://www.postgresql.org/docs/current/server-shutdown.html
        let signal = match mode {
            "smart" => Signal::SIGTERM,
            "fast" => Signal::SIGINT,
            "immediate" => Signal::SIGQUIT,
            _ => {
                return Err(Error::refused(doing, "the modes are smart, fast and immediate"));
            }
        };
        let begun = Instant::now();
        let Some(postmaster) = self.postmaster else {
            return Ok(Duration::ZERO);
        };
        postmaster.signal(signal).map_err(Error::io(doing.clone()))?;
        if !gone_within(&[postmaster], within) {
            return Err(Error::Late { doing, within, why: tail(&self.log()) });
        }
        self.postmaster = None;
        Ok(begun.elapsed())
    }

    /// Starts it on the same data and port, and returns when it accepts connections.
    pub fn start_again(&mut self) -> Result<(), Error> {
        if let Some(pid) = self.pid() {
            return Err(Error::refused("start PostgreSQL", format!("it runs already, as process {pid}")));
        }
        let seconds = START_WITHIN.as_secs().to_string();
        let mut start = self.installation.command("pg_ctl", self.directory.path());
        start.arg("start").arg("-D").arg(&self.data).arg("-l").arg(&self.log).args(["-w", "-s", "-t", &seconds]);
        // Not captured through a pipe: the postmaster would inherit it, and reading to its end would never end.
        let started = start.stdout(Stdio::null()).stderr(Stdio::null()).status();
        let started = started.map_err(Error::io("run pg_ctl"))?;
        // Looked up even after a failure: a server that was merely late is ours to stop.
        self.postmaster = self.running_postmaster();
        if let Some(postmaster) = self.postmaster {
            self.keeper.tell(postmaster, "QUIT")?;
        }
        if started.success() { Ok(()) } else { Err(Error::refused("start PostgreSQL", tail(&self.log()))) }
    }

    /// [`Self::stop`], then [`Self::start_again`].
    pub fn restart(&mut self, mode: &str) -> Result<(), Error> {
        self.stop(mode, STOP_WITHIN)?;
        self.start_again()
    }

    /// SIGKILL to the postmaster, as the out-of-memory killer does; returns when its children are gone too.
    pub fn kill(&mut self) -> Result<(), Error> {
        let Some(postmaster) = self.postmaster else {
            return Ok(());
        };
        if !postmaster.kill_with_descendants().map_err(Error::io("kill PostgreSQL"))? {
            return Err(Error::refused("kill PostgreSQL", "a child of it does not go away"));
        }
        self.postmaster = None;
        self.remove_what_a_kill_leaves();
        Ok(())
    }

    /// Adds a line to `postgresql.conf`, where the last one of a name wins; [`Self::reload`] or a restart applies it.
    pub fn append_conf(&self, line: &str) -> Result<(), Error> {
        let conf = OpenOptions::new().append(true).open(self.data.join("postgresql.conf"));
        conf.and_then(|mut conf| writeln!(conf, "{line}")).map_err(Error::io("write postgresql.conf"))
    }

    /// Adds a rule to `pg_hba.conf`, after earlier ones and above those that trust everyone, since the first that fits
    /// decides; [`Self::reload`] applies it.
    pub fn append_hba(&self, line: &str) -> Result<(), Error> {
        let path = self.data.join("pg_hba.conf");
        let own = read_lossy(&path).replace(HBA_TRUST, "");
        std::fs::write(&path, format!("{own}{line}\n{HBA_TRUST}")).map_err(Error::io("write pg_hba.conf"))
    }

    /// Makes the postmaster read its files again and returns when it says so. New sessions have the new settings; running
    /// ones follow when they next wait for their client.
    pub fn reload(&self) -> Result<(), Error> {
        let Some(postmaster) = self.postmaster.filter(Process::is_running) else {
            return Err(Error::refused("reload PostgreSQL", "it does not run"));
        };
        let reloads = || self.log().matches("received SIGHUP, reloading configuration files").count();
        let before = reloads();
        postmaster.signal(Signal::SIGHUP).map_err(Error::io("reload PostgreSQL"))?;
        if true_within(START_WITHIN, || reloads() > before) {
            return Ok(());
        }
        Err(Error::Late { doing: "reload PostgreSQL".to_owned(), within: START_WITHIN, why: tail(&self.log()) })
    }

    fn prepare(bin: &Path) -> Result<Self, Error> {
        let mut installation = Installation::of(bin)?;
        let directory = tempfile::Builder::new().prefix("pgoutbox-postgres-").tempdir();
        let directory = directory.map_err(Error::io("make a temporary directory"))?;
        let keeper = Keeper::of(directory.path())?;
        let path = directory.path();
        installation.move_into(path)?;
        for (name, mode) in [("data", 0o700), ("socket", 0o755)] {
            std::fs::create_dir(path.join(name)).map_err(Error::io(format!("make {name}")))?;
            installation.give(&path.join(name), mode)?;
        }
        Ok(Self {
            installation,
            port: Port::pick()?,
            postmaster: None,
            data: path.join("data"),
            socket: path.join("socket"),
            log: path.join("postgres.log"),
            directory,
            keeper,
        })
    }

    fn initialise(&self, settings: &[(&str, &str)]) -> Result<(), Error> {
        let mut initdb = self.installation.command("initdb", self.directory.path());
        initdb.arg("-D").arg(&self.data);
        initdb.args(["-U", "postgres", "-A", "trust", "-N", "--encoding=UTF8", "--locale=C"]);
        let Output { status, stdout, stderr } = initdb.output().map_err(Error::io("run initdb"))?;
        if !status.success() {
            let wrote = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
            return Err(Error::refused("initialise PostgreSQL", tail(&wrote)));
        }
        self.configure(&DEFAULTS)?;
        self.configure(settings)?;
        std::fs::write(self.data.join("pg_hba.conf"), HBA_TRUST).map_err(Error::io("write pg_hba.conf"))
    }

    fn configure(&self, settings: &[(&str, &str)]) -> Result<(), Error> {
        self.place()?;
        for (name, value) in settings {
            self.append_conf(&format!("{name} = {}", quoted(value)))?;
        }
        Ok(())
    }

    /// Writes down where it listens.
    fn place(&self) -> Result<(), Error> {
        self.append_conf(&format!("port = {}", self.port()))?;
        self.append_conf(&format!("unix_socket_directories = {}", quoted(&self.socket.display().to_string())))
    }

    fn running_postmaster(&self) -> Option<Process> {
        let process = Process::find(self.pid_file().lines().next()?.trim().parse().ok()?)?;
        // A file that a crash left behind may name a stranger; ours sits in its data directory.
        let sits_in = std::fs::read_link(format!("/proc/{}/cwd", process.pid)).ok()?;
        (sits_in == self.data.canonicalize().ok()?).then_some(process)
    }

    fn pid_file(&self) -> String {
        read_lossy(&self.data.join(PID_FILE))
    }

    /// Its lock files and its System V segment, which a next start would take over by itself, but for two things. The
    /// first process of a container may leave a killed postmaster a zombie, to PostgreSQL's test of the lock file
    /// (`kill(pid, 0)`) a zombie runs, and the start is refused. And without a next start the segment stays for good.
    fn remove_what_a_kill_leaves(&self) {
        // Line 7 of the file is the segment's key and id.
        let file = self.pid_file();
        let id = file.lines().nth(6).and_then(|line| line.split_whitespace().nth(1));
        if let Some(id) = id.filter(|id| id.parse::<u32>().is_ok()) {
            let _ = Command::new("ipcrm").args(["-m", id]).stdout(Stdio::null()).stderr(Stdio::null()).status();
        }
        let _ = std::fs::remove_file(self.data.join(PID_FILE));
        let _ = std::fs::remove_file(self.socket.join(format!(".s.PGSQL.{}.lock", self.port())));
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // The postmaster itself kills children that ignore an immediate shutdown, after five seconds.
        if self.stop("immediate", STOP_WITHIN).is_err() {
            let _ = self.kill();
        }
    }
}

/// A value in `postgresql.conf`.
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\'', "''"))
}

/// Percent-encodes all but RFC 3986's unreserved characters.
fn escaped(part: &str) -> String {
    let escape = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    part.bytes().map(escape).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_escaped_in_an_url() {
        assert_eq!(escaped("p@ss/ü"), "p%40ss%2F%C3%BC");
    }

    #[test]
    fn a_quote_in_a_setting_is_doubled() {
        assert_eq!(quoted("it's"), "'it''s'");
    }
}

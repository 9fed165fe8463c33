//! A private RabbitMQ node.
//!
//! The trap: `rabbitmq-server` is a shell script around a shell script around Erlang, Erlang starts a port mapper (epmd)
//! that outlives it and serves every node of the machine, and Debian's wrapper in `/usr/sbin` changes user and drops the
//! environment. So the script under `/usr/lib` runs with an environment of its own, told to `exec` (the child we hold *is*
//! the Erlang machine), and epmd is our child as well, on a port of its own.

mod cluster;

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::keeper::Keeper;
use super::process::{Process, gone_within, true_within};
use super::{Error, Port, START_ATTEMPTS_MAX, read_lossy, tail};

/// Where Debian, and RabbitMQ's own packages, put the scripts and Erlang, below the root.
const BIN: &str = "usr/lib/rabbitmq/bin";
const ERLANG: &str = "usr/lib/erlang/bin";
const SYSTEM_PATH: &str = "/usr/sbin:/usr/bin:/bin";
const REMEDY: &str = "run `apt-get install rabbitmq-server`";

/// It takes seconds on an idle machine; a machine that is building takes several times that.
const START_WITHIN: Duration = Duration::from_secs(90);
const STOP_WITHIN: Duration = Duration::from_secs(60);
const PROBE_WITHIN: Duration = Duration::from_secs(2);

/// AMQP 0-9-1 section 4.2.2; the broker answers with Connection.Start, a method frame (type 1).
const PROTOCOL_HEADER: &[u8] = b"AMQP\x00\x00\x09\x01";
const FRAME_METHOD: u8 = 1;

/// What a node has besides our defaults.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// Names of plugins that come with it.
    pub plugins: Vec<String>,
    /// More lines of `rabbitmq.conf`.
    pub configuration: String,
    /// With it, the node also listens for TLS, on a port of its own.
    pub tls: Option<Tls>,
}

/// What a node shows to clients that speak TLS, and whom of them it trusts; PEM.
#[derive(Clone)]
pub struct Tls {
    /// Certificates of those who sign those of clients.
    pub authorities: String,
    /// Its own, and what leads to its authority.
    pub certificate: String,
    /// The key of that.
    pub key: String,
    /// Whether clients must have one, too.
    pub demands_certificate: bool,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").field("demands_certificate", &self.demands_certificate).finish_non_exhaustive()
    }
}

/// A private RabbitMQ node, by default without plugins; dropping it kills it and removes its data.
#[derive(Debug)]
pub struct RabbitMq {
    root: PathBuf,
    node: String,
    port: Port,
    tls_port: Option<Port>,
    distribution_port: Port,
    /// The first node's, in a cluster.
    epmd_port: Arc<Port>,
    epmd: Option<Child>,
    beam: Option<Child>,
    // Dropped in this order, after our own Drop killed both children.
    directory: TempDir,
    keeper: Keeper,
}

impl RabbitMq {
    /// Starts a node of the RabbitMQ that is installed and returns when it answers on its AMQP port.
    pub fn start() -> Result<Self, Error> {
        Self::start_from(Path::new("/"))
    }

    /// The same with more than the defaults.
    pub fn start_with(extras: &Extras) -> Result<Self, Error> {
        Self::start_prepared(Path::new("/"), extras, None)
    }

    /// The same for what is unpacked below `root` as Debian would install it: the scripts in `usr/lib/rabbitmq/bin`, and in
    /// `usr/lib/erlang/bin` an `erl` and an `epmd` that run from there (see `scripts/install-rabbitmq-4`).
    pub fn start_from(root: &Path) -> Result<Self, Error> {
        Self::start_prepared(root, &Extras::default(), None)
    }

    /// Both: from there, with more than the defaults.
    pub fn start_from_with(root: &Path, extras: &Extras) -> Result<Self, Error> {
        Self::start_prepared(root, extras, None)
    }

    /// Of the cluster of `first`, if there is one.
    fn start_prepared(root: &Path, extras: &Extras, first: Option<&Self>) -> Result<Self, Error> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let mut server = Self::prepare(root, extras, first)?;
            match server.start_again() {
                Err(_) if attempt < START_ATTEMPTS_MAX && server.log().contains("eaddrinuse") => {}
                result => return result.map(|()| server),
            }
        }
    }

    /// `amqp://guest:guest@127.0.0.1:PORT/%2f`.
    pub fn url(&self) -> String {
        format!("amqp://guest:guest@127.0.0.1:{}/%2f", self.port())
    }

    /// The AMQP port on 127.0.0.1. It stays the same for the life of this value.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// The TLS port on 127.0.0.1, of a node that has one.
    pub fn tls_port(&self) -> Option<u16> {
        self.tls_port.as_ref().map(Port::number)
    }

    /// From now on it shows this certificate; the listener reads it anew once Erlang has forgotten what it has read.
    pub fn show(&self, certificate: &str, key: &str) -> Result<(), Error> {
        self.write(CERTIFICATE, certificate)?;
        self.write(KEY, key)?;
        self.ctl(&["eval", "ssl:clear_pem_cache()."]).map(|_| ())
    }

    /// The process id of the Erlang machine while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.process().map(|process| process.pid)
    }

    /// All the node has logged since it last started, and what it wrote to its console before it had a log.
    pub fn log(&self) -> String {
        read_lossy(&self.path("console.log")) + &read_lossy(&self.path("rabbit.log"))
    }

    /// Stops it in good order and waits.
    ///
    /// # Errors
    /// `Late` when it still ran after a minute.
    pub fn stop(&mut self) -> Result<(), Error> {
        let Some(process) = self.process() else {
            return self.reap();
        };
        let doing = "stop RabbitMQ";
        process.signal(Signal::SIGTERM).map_err(Error::io(doing))?;
        // A frozen node would not hear it.
        process.signal(Signal::SIGCONT).map_err(Error::io(doing))?;
        if !gone_within(&[process], STOP_WITHIN) {
            return Err(Error::Late { doing: doing.to_owned(), within: STOP_WITHIN, why: tail(&self.log()) });
        }
        self.reap()
    }

    /// SIGKILL; returns when it and its helpers are gone.
    pub fn kill(&mut self) -> Result<(), Error> {
        let killed = self.process().map(|beam| beam.kill_with_descendants()).transpose();
        if killed.map_err(Error::io("kill RabbitMQ"))? == Some(false) {
            return Err(Error::refused("kill RabbitMQ", "a child of it does not go away"));
        }
        self.reap()
    }

    /// Starts it on the same data and ports, and returns when it answers on its AMQP port.
    pub fn start_again(&mut self) -> Result<(), Error> {
        if let Some(pid) = self.pid() {
            return Err(Error::refused("start RabbitMQ", format!("it runs already, as process {pid}")));
        }
        self.reap()?;
        self.start_epmd()?;
        // A log of an earlier start says "started" as well.
        let _ = std::fs::rename(self.path("rabbit.log"), self.path("rabbit.log.before"));
        let console = File::create(self.path("console.log")).map_err(Error::io("make RabbitMQ's console log"))?;
        let errors = console.try_clone().map_err(Error::io("make RabbitMQ's console log"))?;
        let beam = self.command(&self.root.join(BIN).join("rabbitmq-server")).stdout(console).stderr(errors).spawn();
        self.beam = Some(beam.map_err(Error::io("run rabbitmq-server"))?);
        if let Some(process) = self.process() {
            self.keeper.tell(process, "KILL")?;
        }
        self.wait_until_it_answers()
    }

    /// SIGSTOP: connections stay open, and nothing answers.
    pub fn freeze(&self) -> Result<(), Error> {
        self.signal(Signal::SIGSTOP, "freeze RabbitMQ")
    }

    /// SIGCONT, after [`Self::freeze`].
    pub fn thaw(&self) -> Result<(), Error> {
        self.signal(Signal::SIGCONT, "thaw RabbitMQ")
    }

    /// What `rabbitmqctl --quiet ARGS` against this node prints. It takes about a second: it is an Erlang machine too.
    pub fn ctl(&self, args: &[&str]) -> Result<String, Error> {
        self.ctl_told(args, "")
    }

    /// The same, with an answer to what it asks for, such as a password.
    pub fn ctl_told(&self, args: &[&str], input: &str) -> Result<String, Error> {
        let mut ctl = self.command(&self.root.join(BIN).join("rabbitmqctl"));
        ctl.arg("--quiet").args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut ctl = ctl.spawn().map_err(Error::io("run rabbitmqctl"))?;
        // One that asks for nothing may be gone before it is told.
        let _ = ctl.stdin.take().map(|mut stdin| stdin.write_all(input.as_bytes()));
        let output = ctl.wait_with_output().map_err(Error::io("run rabbitmqctl"))?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(printed);
        }
        let why = printed + &String::from_utf8_lossy(&output.stderr);
        Err(Error::refused(format!("run rabbitmqctl {}", args.join(" ")), why.trim()))
    }

    fn prepare(root: &Path, extras: &Extras, first: Option<&Self>) -> Result<Self, Error> {
        let script = root.join(BIN).join("rabbitmq-server");
        if !script.is_file() {
            let looked_for = script.display().to_string();
            return Err(Error::Missing { server: "RabbitMQ", looked_for, remedy: REMEDY });
        }
        // Its commands run in another directory.
        let root = root.canonicalize().map_err(Error::io(format!("find {}", root.display())))?;
        // Mode 0700, as it comes: the Erlang cookie lives in it.
        let directory = tempfile::Builder::new().prefix("pgoutbox-rabbitmq-").tempdir();
        let directory = directory.map_err(Error::io("make a temporary directory"))?;
        let keeper = Keeper::of(directory.path())?;
        let (port, distribution_port) = (Port::pick()?, Port::pick()?);
        let tls_port = extras.tls.as_ref().map(|_| Port::pick()).transpose()?;
        let epmd_port = first.map_or_else(|| Port::pick().map(Arc::new), |first| Ok(first.epmd_port.clone()))?;
        let node = format!("pgoutbox-{}@localhost", port.number());
        let (epmd, beam) = (None, None);
        let server = Self { root, node, port, tls_port, distribution_port, epmd_port, epmd, beam, directory, keeper };
        server.write("enabled_plugins", &format!("[{}].\n", extras.plugins.join(",")))?;
        let mut configuration = CONFIGURATION.to_owned() + &extras.configuration;
        if let (Some(tls), Some(port)) = (&extras.tls, server.tls_port()) {
            configuration += &server.listen_for_tls(tls, port)?;
        }
        if let Some(first) = first {
            configuration += &first.admit(&server)?;
        }
        server.write("rabbitmq.conf", &configuration)?;
        Ok(server)
    }

    /// Writes its files and returns the lines of its configuration.
    fn listen_for_tls(&self, tls: &Tls, port: u16) -> Result<String, Error> {
        self.write(AUTHORITIES, &tls.authorities)?;
        self.write(CERTIFICATE, &tls.certificate)?;
        self.write(KEY, &tls.key)?;
        let [authorities, certificate, key] = [AUTHORITIES, CERTIFICATE, KEY].map(|file| self.path(file));
        Ok(format!(
            "\nlisteners.ssl.1 = 127.0.0.1:{port}\nssl_options.verify = verify_peer\n\
             ssl_options.fail_if_no_peer_cert = {}\nssl_options.cacertfile = {}\nssl_options.certfile = {}\n\
             ssl_options.keyfile = {}\n",
            tls.demands_certificate,
            authorities.display(),
            certificate.display(),
            key.display()
        ))
    }

    fn start_epmd(&mut self) -> Result<(), Error> {
        // Since an earlier start, or the first node's.
        if self.epmd_listens() {
            return Ok(());
        }
        let port = self.epmd_port.number().to_string();
        let mut epmd = self.command(Path::new("epmd"));
        epmd.args(["-port", &port, "-address", "127.0.0.1"]).stdout(Stdio::null()).stderr(Stdio::null());
        let epmd = self.epmd.insert(epmd.spawn().map_err(Error::io("run epmd, which comes with Erlang"))?);
        if let Some(process) = process_of(epmd) {
            self.keeper.tell(process, "KILL")?;
        }
        // Listening before the node looks for it, or the node would start another.
        if true_within(START_WITHIN, || self.epmd_listens()) {
            return Ok(());
        }
        Err(Error::refused("start RabbitMQ", "epmd, its port mapper, does not listen"))
    }

    fn epmd_listens(&self) -> bool {
        TcpStream::connect((Ipv4Addr::LOCALHOST, self.epmd_port.number())).is_ok()
    }

    fn wait_until_it_answers(&mut self) -> Result<(), Error> {
        let doing = "start RabbitMQ".to_owned();
        let log = self.path("rabbit.log");
        let (port, has_tls) = (self.port(), self.tls_port.is_some());
        let mut answers = false;
        let mut ended = false;
        let in_time = true_within(START_WITHIN, || {
            // Its own log as well: after a clash of ports, it is a stranger who answers.
            let text = read_lossy(&log);
            let listens =
                text.contains("started TCP listener") && (!has_tls || text.contains("started TLS (SSL) listener"));
            answers = listens && answers_amqp(port);
            ended = self.beam.as_ref().and_then(process_of).is_none();
            answers || ended
        });
        match (in_time, ended) {
            (true, false) => Ok(()),
            (true, true) => Err(Error::refused(doing, tail(&self.log()))),
            (false, _) => Err(Error::Late { doing, within: START_WITHIN, why: tail(&self.log()) }),
        }
    }

    /// With nothing of the caller's environment but PATH: a RABBITMQ_ or ERL_ variable of theirs means another node.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", self.search_path());
        command.envs([
            ("LANG", "C.UTF-8"),
            // The script then becomes Erlang by exec, instead of waiting for it as a child.
            ("RUNNING_UNDER_SYSTEMD", "true"),
            ("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1"),
            ("ERL_EPMD_ADDRESS", "127.0.0.1"),
            // Several nodes run side by side in tests; one scheduler per core would make each as wide as the machine.
            (
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                "+S 2:2 -start_epmd false -kernel inet_dist_use_interface {127,0,0,1}",
            ),
            ("RABBITMQ_CTL_ERL_ARGS", "+S 1:1 -start_epmd false -kernel inet_dist_use_interface {127,0,0,1}"),
        ]);
        command.env("RABBITMQ_NODENAME", &self.node);
        command.env("RABBITMQ_NODE_PORT", self.port().to_string());
        command.env("RABBITMQ_DIST_PORT", self.distribution_port.number().to_string());
        command.env("ERL_EPMD_PORT", self.epmd_port.number().to_string());
        for (variable, file) in FILES {
            command.env(variable, self.path(file));
        }
        command.current_dir(self.directory.path()).process_group(0).stdin(Stdio::null());
        command
    }

    /// The caller's, but an Erlang below the root of one's own comes first.
    fn search_path(&self) -> OsString {
        let callers = std::env::var_os("PATH").unwrap_or_else(|| SYSTEM_PATH.into());
        if self.root == Path::new("/") {
            return callers;
        }
        let mut path = self.root.join(ERLANG).into_os_string();
        path.push(":");
        path.push(callers);
        path
    }

    fn signal(&self, signal: Signal, doing: &str) -> Result<(), Error> {
        let Some(process) = self.process() else {
            return Err(Error::refused(doing, "it does not run"));
        };
        process.signal(signal).map_err(Error::io(doing))
    }

    fn process(&self) -> Option<Process> {
        self.beam.as_ref().and_then(process_of)
    }

    fn reap(&mut self) -> Result<(), Error> {
        let Some(mut beam) = self.beam.take() else {
            return Ok(());
        };
        beam.wait().map(|_| ()).map_err(Error::io("wait for RabbitMQ to end"))
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn write(&self, file: &str, text: &str) -> Result<(), Error> {
        std::fs::write(self.path(file), text).map_err(Error::io(format!("write {file}")))
    }
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        let _ = self.kill();
        if let Some(mut epmd) = self.epmd.take() {
            let _ = epmd.kill();
            let _ = epmd.wait();
        }
    }
}

/// The watermark is absolute because the default is a share of a memory that others use too. 50 MB is the lowest limit
/// Debian documents: a nearly full disk must not turn every test into one about the disk alarm.
const CONFIGURATION: &str = "\
disk_free_limit.absolute = 50MB
vm_memory_high_watermark.absolute = 1GB
log.file.level = info
";

const AUTHORITIES: &str = "authorities.pem";
const CERTIFICATE: &str = "certificate.pem";
const KEY: &str = "key.pem";

/// HOME holds the Erlang cookie. Without the rest, the node would read and write under /etc and /var.
const FILES: [(&str, &str); 13] = [
    ("HOME", ""),
    ("RABBITMQ_MNESIA_BASE", "data"),
    ("RABBITMQ_LOG_BASE", ""),
    ("RABBITMQ_LOGS", "rabbit.log"),
    ("RABBITMQ_SCHEMA_DIR", "schema"),
    ("RABBITMQ_GENERATED_CONFIG_DIR", "config"),
    ("RABBITMQ_CONFIG_FILE", "rabbitmq.conf"),
    ("RABBITMQ_ADVANCED_CONFIG_FILE", "advanced.config"),
    ("RABBITMQ_CONF_ENV_FILE", "rabbitmq-env.conf"),
    ("RABBITMQ_ENABLED_PLUGINS_FILE", "enabled_plugins"),
    ("RABBITMQ_PLUGINS_EXPAND_DIR", "plugins"),
    ("RABBITMQ_PID_FILE", "rabbit.pid"),
    ("ERL_CRASH_DUMP", "erl_crash.dump"),
];

fn process_of(child: &Child) -> Option<Process> {
    Process::find(i32::try_from(child.id()).ok()?)
}

fn answers_amqp(port: u16) -> bool {
    let answer = || -> std::io::Result<u8> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(PROBE_WITHIN))?;
        stream.write_all(PROTOCOL_HEADER)?;
        let mut first = [0];
        stream.read_exact(&mut first)?;
        Ok(u8::from_be_bytes(first))
    };
    answer().is_ok_and(|first| first == FRAME_METHOD)
}

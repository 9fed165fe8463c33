//! What is shipped beside the program: the example of settings, completions, man page, service, and the Debian package.
//!
//! The trap: files beside a program are written once and believed for ever. Each is compared here with the program that it
//! speaks of, and the package is installed, run as its service would run it, and purged.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, User, geteuid};
use pgoutbox::servers::{Port, Postgres, RabbitMq};

use crate::support::consumer::Consumer;
use crate::support::relay::pgoutbox;
use crate::support::{Outbox, PATIENCE, connect};

const UNIT: &str = include_str!("../../packaging/pgoutbox.service");

fn printed(arguments: &[&str]) -> String {
    let output = pgoutbox().args(arguments).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Standard output of a command that must succeed.
fn ran(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(status.success(), "{command:?}: {status}\n{}{}", text(&stdout), text(&stderr));
    text(&stdout)
}

fn has(program: &str) -> bool {
    Command::new("sh").args(["-c", &format!("command -v {program}")]).output().unwrap().status.success()
}

#[test]
fn the_settings_in_the_package_are_what_the_verb_prints() {
    assert!(
        printed(&["config", "example"]) == include_str!("../../packaging/pgoutbox.toml"),
        "packaging/pgoutbox.toml is of another time: pgoutbox config example >packaging/pgoutbox.toml"
    );
}

#[test]
fn what_is_printed_for_a_reader_who_has_gone_is_no_fault() {
    for verb in ["pgoutbox man", "pgoutbox completions bash", "pgoutbox config example"] {
        let script =
            format!("{} | :; exit ${{PIPESTATUS[0]}}", verb.replace("pgoutbox", env!("CARGO_BIN_EXE_pgoutbox")));
        ran(Command::new("bash").args(["-c", &script]));
    }
}

#[test]
fn bash_completes_verbs_and_flags_by_the_printed_script() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("pgoutbox");
    std::fs::write(&script, printed(&["completions", "bash"])).unwrap();
    let complete = |words: &[&str]| {
        // As bash would call it: the words so far, and which of them is being typed.
        let (last, count) = (words.last().unwrap(), words.len() - 1);
        let line = words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
        let call = format!(
            "set -e; . {}; COMP_WORDS=({line}); COMP_CWORD={count}; _pgoutbox pgoutbox '{last}' x || true; \
             echo \"${{COMPREPLY[@]}}\"",
            script.display()
        );
        ran(Command::new("bash").args(["-c", &call]))
    };
    assert_eq!(complete(&["pgoutbox", "sta"]), "status\n");
    assert_eq!(complete(&["pgoutbox", "init", "--print"]), "--print-sql\n");
    assert_eq!(complete(&["pgoutbox", "completions", "zs"]), "zsh\n");
    for shell in ["zsh", "fish"] {
        let script = printed(&["completions", shell]);
        assert!(script.contains("print-sql") && script.contains("completions"), "{shell}: {script}");
    }
}

#[test]
fn the_man_page_renders_without_a_warning() {
    if !has("groff") {
        println!("no groff on this machine: not rendered");
        return;
    }
    let page = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(page.path(), printed(&["man"])).unwrap();
    let output = Command::new("groff").args(["-ww", "-man", "-Tascii", "-P-c"]).arg(page.path()).output().unwrap();
    let warnings = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && warnings.is_empty(), "{warnings}");
    // What is bold is struck twice, over a backspace.
    let mut text = String::new();
    for letter in String::from_utf8_lossy(&output.stdout).chars() {
        match letter {
            '\u{8}' => _ = text.pop(),
            letter => text.push(letter),
        }
    }
    for part in ["EXIT STATUS", "rabbitmq.window_messages_min", "pgoutbox check", "--print-sql"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

/// A directive of the unit.
fn directive(name: &str) -> &'static str {
    let values: Vec<&str> =
        UNIT.lines().filter_map(|line| line.strip_prefix(name).and_then(|rest| rest.strip_prefix('='))).collect();
    assert_eq!(values.len(), 1, "{name} in the unit: {values:?}");
    values[0]
}

#[test]
fn the_service_leaves_a_stop_its_time_and_does_not_try_again_what_people_must_mend() {
    let seconds = |text: &str| text.strip_suffix('s').unwrap().parse::<u64>().unwrap();
    let drain = pgoutbox::config::KEYS.iter().find(|key| key.name == "run.drain_timeout").unwrap();
    assert!(seconds(directive("TimeoutStopSec")) >= seconds(drain.default) + 10);
    assert_eq!(directive("Restart"), "on-failure");
    use pgoutbox::error::ExitCode;
    let futile = [ExitCode::Usage, ExitCode::Row, ExitCode::World].map(|code| code.to_string()).join(" ");
    assert_eq!(directive("RestartPreventExitStatus"), futile);
}

#[test]
fn other_verbs_are_run_as_the_services_user_by_the_head_of_the_unit() {
    let command = UNIT.lines().find(|line| line.contains("systemd-run")).unwrap();
    for name in ["DynamicUser", "User", "EnvironmentFile"] {
        let property = format!(" -p {name}={} ", directive(name));
        assert!(command.contains(&property), "{property} is not in {command}");
    }
    // A verb that failed would keep the name of its unit, and the next one would not start.
    assert!(command.contains(" --collect "), "{command}");
    let arguments = directive("ExecStart").strip_prefix("/usr/bin/pgoutbox run").unwrap();
    assert!(command.ends_with(arguments), "{command}");
    // In a user namespace of its own, every other user is nobody, also the one whom requirepeer names.
    assert!(!UNIT.lines().any(|line| line.starts_with("PrivateUsers=")));
}

/// What has our name where packages put things.
fn traces() -> BTreeSet<String> {
    let places = ["/etc", "/usr", "/lib/systemd", "/var/lib", "/var/log", "/run"];
    let find = Command::new("find")
        .args(places)
        .args(["-xdev", "-name", "*pgoutbox*", "-not", "-path", "*/src/*", "-not", "-path", "*/.cargo/*"])
        .output()
        .unwrap();
    String::from_utf8_lossy(&find.stdout).lines().map(str::to_owned).collect()
}

/// Purges the package, also when an assertion fails between.
struct Installed;

impl Drop for Installed {
    fn drop(&mut self) {
        let _ = Command::new("dpkg").args(["--purge", "pgoutbox"]).output();
    }
}

/// The package that `make package` left.
fn package() -> PathBuf {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/debian");
    let mut packages: Vec<PathBuf> = std::fs::read_dir(&built)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .collect();
    assert_eq!(packages.len(), 1, "`make package` leaves one package in {}: {packages:?}", built.display());
    packages.remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "installs a package: make package-test"]
async fn the_package_installs_delivers_by_its_services_command_and_leaves_nothing() {
    if !geteuid().is_root() || !has("dpkg") {
        println!("SKIPPED: a package is installed by root, on Debian");
        return;
    }
    let package = package();
    let installed = Command::new("dpkg").args(["-s", "pgoutbox"]).output().unwrap();
    assert!(!installed.status.success(), "this machine has pgoutbox installed, which this test would take away");
    let before = traces();
    ran(Command::new("dpkg").arg("-i").arg(&package));
    let guard = Installed;
    look_at_what_was_installed();
    deliver_as_the_service_would().await;
    drop(guard);
    let state = Command::new("dpkg").args(["-s", "pgoutbox"]).output().unwrap();
    assert!(!state.status.success(), "{state:?}");
    assert_eq!(traces(), before, "left behind");
    assert!(!Path::new("/etc/pgoutbox").exists());
}

fn look_at_what_was_installed() {
    let unit = ["/lib/systemd/system", "/usr/lib/systemd/system"]
        .map(|place| Path::new(place).join("pgoutbox.service"))
        .into_iter()
        .find(|path| path.exists());
    assert_eq!(std::fs::read_to_string(unit.unwrap()).unwrap(), UNIT);
    let mode = |path: &str| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("/etc/pgoutbox/pgoutbox.toml"), mode("/etc/pgoutbox/pgoutbox.env")), (0o644, 0o600));
    let conffiles = ran(Command::new("dpkg-query").args(["-W", "-f", "${Conffiles}", "pgoutbox"]));
    for file in ["/etc/pgoutbox/pgoutbox.toml", "/etc/pgoutbox/pgoutbox.env"] {
        assert!(conffiles.contains(file), "{conffiles}");
    }
    let files = ran(Command::new("dpkg").args(["-L", "pgoutbox"]));
    for file in ["/man1/pgoutbox.1.gz", "/bash-completion/completions/pgoutbox", "/doc/pgoutbox/copyright"] {
        assert!(files.contains(file), "{file} is not among\n{files}");
    }
    let wants = Path::new("/etc/systemd/system/multi-user.target.wants/pgoutbox.service");
    assert!(!wants.exists(), "enabled before anybody has said where the servers are");
    if has("systemd-analyze") {
        // With the program where it says: it prints what is wrong, and nothing when nothing is.
        let verify = Command::new("systemd-analyze").args(["verify", "pgoutbox.service"]).output().unwrap();
        let said = String::from_utf8_lossy(&verify.stderr).into_owned();
        assert!(!said.contains("pgoutbox"), "{said}");
    }
}

/// The unit's command line with the settings of the package, as a user who may nothing, and the environment that
/// `EnvironmentFile=` would give.
async fn deliver_as_the_service_would() {
    let (postgres, rabbitmq) = (Postgres::start(&[]).unwrap(), RabbitMq::start().unwrap());
    connect(&postgres.url()).await.batch_execute("create database shop").await.unwrap();
    let url = postgres.url_for("postgres", None, "shop");
    // The defaults of the shipped file: the exchange is `outbox`.
    let (client, name) = (connect(&url).await, "outbox".to_owned());
    let outbox = Outbox { client, url: url.clone(), amqp: rabbitmq.url(), name };
    let port = Port::pick().unwrap();
    let environment = [
        ("DATABASE_URL", url),
        ("AMQP_URL", rabbitmq.url()),
        ("PGOUTBOX__HTTP__LISTEN", format!("127.0.0.1:{}", port.number())),
    ];
    let command = |line: &str| {
        let mut words = line.split(' ');
        let mut command = Command::new(words.next().unwrap());
        command.args(words).env_clear().envs(environment.clone()).current_dir("/").stdin(Stdio::null());
        let nobody = User::from_name("nobody").unwrap().unwrap();
        command.uid(nobody.uid.as_raw()).gid(nobody.gid.as_raw());
        command
    };
    let start = directive("ExecStart");
    ran(&mut command(&start.replace(" run ", " init ")));
    let consumer = Consumer::start(&outbox).await;
    let mut relay = command(start).spawn().unwrap();
    let id = outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    assert!(consumer.has(&id));
    kill(Pid::from_raw(i32::try_from(relay.id()).unwrap()), Signal::SIGTERM).unwrap();
    let began = Instant::now();
    let status = loop {
        if let Some(status) = relay.try_wait().unwrap() {
            break status;
        }
        assert!(began.elapsed() < PATIENCE, "it does not stop");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert_eq!(status.code(), Some(0));
}

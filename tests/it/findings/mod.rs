//! Ways to set the world up wrong: `check` finds each before `run` would, and its remedy, pasted, mends it.
//!
//! The traps. A `check` that is wrong beforehand proves nothing by being wrong afterwards, so each case begins with a sound
//! one. And a remedy that a test understands is not a remedy that can be pasted: psql, rabbitmqctl, `--set` and `pg_hba.conf`
//! get each step as it was printed.

mod database;
mod deep;
mod rabbitmq;
mod restarts;
mod versions;

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use pgoutbox::servers::{Postgres, RabbitMq};
use serde_json::Value as Json;

use crate::support::relay::{Relay, environment, pgoutbox};
use crate::support::{Outbox, connect, eventually};

const WORLD: i32 = 78;

/// Of the relay's role and user. It may come out nowhere.
const PASSWORD: &str = "canary-4711";

/// How the world is broken. `{name}` is that of database, slot and exchange, `{role}` the relay's.
#[derive(Clone, Copy)]
enum Break {
    /// As a superuser, in the outbox's database.
    Sql(&'static str),
    /// The same, in the database `postgres`.
    Elsewhere(&'static str),
    /// The topmost line of `pg_hba.conf`.
    Hba(&'static str),
    /// As an administrator.
    Ctl(&'static [&'static str]),
    /// Of the relay.
    Setting(&'static str, &'static str),
}

/// What `run` does in that world.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Run {
    /// Exit 78.
    Stops,
    /// It is not ready, and says why.
    Waits,
    /// It is ready, until there is a row.
    WaitsWithARow,
}

struct Case {
    breaks: &'static [Break],
    /// In the finding, and in what `run` says.
    says: &'static str,
    run: Run,
    /// A step of the remedy.
    step: &'static str,
}

/// The relay's surroundings, its own and nobody else's.
struct Surroundings<'a> {
    postgres: &'a Postgres,
    rabbitmq: &'a RabbitMq,
    /// Of the administrator.
    outbox: Outbox,
    /// Of the relay.
    role: String,
    url: String,
    amqp: String,
    settings: Vec<(String, String)>,
}

/// The file is one for all.
static HBA: Mutex<()> = Mutex::new(());

impl<'a> Surroundings<'a> {
    /// Sound ones: a role that may log in and replicate, and nothing more.
    async fn of(postgres: &'a Postgres, rabbitmq: &'a RabbitMq) -> Self {
        Self::around(postgres, rabbitmq, Outbox::create(postgres, rabbitmq).await).await
    }

    /// Those of before, after a restart.
    async fn again(postgres: &'a Postgres, rabbitmq: &'a RabbitMq, name: &str) -> Self {
        let (name, role) = (name.to_owned(), format!("{name}_relay"));
        let url = postgres.url_for("postgres", None, &name);
        let outbox = Outbox { client: connect(&url).await, url, amqp: rabbitmq.url(), name };
        let url = postgres.url_for(&role, Some(PASSWORD), &outbox.name);
        Self { postgres, rabbitmq, amqp: outbox.amqp.clone(), outbox, role, url, settings: Vec::new() }
    }

    async fn around(postgres: &'a Postgres, rabbitmq: &'a RabbitMq, outbox: Outbox) -> Self {
        let role = format!("{}_relay", outbox.name);
        outbox.sql(&format!("create role {role} login replication password '{PASSWORD}'")).await;
        let url = postgres.url_for(&role, Some(PASSWORD), &outbox.name);
        let amqp = outbox.amqp.clone();
        Self { postgres, rabbitmq, outbox, role, url, amqp, settings: Vec::new() }
    }

    fn filled(&self, text: &str) -> String {
        text.replace("{name}", &self.outbox.name).replace("{role}", &self.role)
    }

    async fn suffer(&mut self, breaks: &[Break]) {
        for broken in breaks {
            match *broken {
                Break::Sql(sql) => self.outbox.sql(&self.filled(sql)).await,
                Break::Elsewhere(sql) => {
                    connect(&self.postgres.url()).await.batch_execute(&self.filled(sql)).await.unwrap();
                }
                Break::Hba(line) => self.top_hba(&self.filled(line)),
                Break::Ctl(arguments) => self.ctl(arguments.iter().map(|argument| self.filled(argument)).collect()),
                Break::Setting(key, value) => self.settings.push((key.to_owned(), value.to_owned())),
            }
        }
    }

    fn top_hba(&self, line: &str) {
        let _alone = HBA.lock().unwrap();
        let path = self.postgres.data_dir().join("pg_hba.conf");
        let text = std::fs::read_to_string(&path).unwrap();
        // Aside first: the postmaster says that it reads before it does, and would go on with its old rules if it found the
        // file of another case empty.
        let aside = path.with_extension("new");
        std::fs::write(&aside, format!("{line}\n{text}")).unwrap();
        std::fs::set_permissions(&aside, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::rename(&aside, &path).unwrap();
        self.postgres.reload().unwrap();
    }

    fn ctl(&self, arguments: Vec<String>) {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.rabbitmq.ctl_told(&arguments, &format!("{PASSWORD}\n")).unwrap();
    }

    /// A verb, as the relay's role or as the administrator.
    fn verb(&self, arguments: &[&str], url: &str) -> (i32, String) {
        let mut command = pgoutbox();
        command.args(arguments).envs(environment(url, &self.amqp, &self.outbox.name));
        for (key, value) in &self.settings {
            command.arg("--set").arg(format!("{key}={value}"));
        }
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout).into_owned();
        let all = told.clone() + &String::from_utf8_lossy(&output.stderr);
        assert!(!all.contains(PASSWORD), "{all}");
        (output.status.code().unwrap(), if told.is_empty() { all } else { told })
    }

    /// Exit code, and all that was looked at.
    fn check(&self) -> (i32, Vec<Json>) {
        self.check_with(&[])
    }

    fn check_with(&self, more: &[&str]) -> (i32, Vec<Json>) {
        let (code, told) = self.verb(&[&["check", "--json"], more].concat(), &self.url);
        let looks: Json = serde_json::from_str(&told).unwrap_or_else(|error| panic!("{error} in {told}"));
        (code, looks.as_array().unwrap().clone())
    }

    fn is_sound(&self) {
        let (code, looks) = self.check();
        let wrong: Vec<&Json> = looks.iter().filter(|look| look["state"] == "wrong").collect();
        assert!(code == 0 && wrong.is_empty(), "{code}: {wrong:#?}");
    }

    /// What `check` finds.
    fn findings(&self) -> Vec<Json> {
        let (code, looks) = self.check();
        assert_eq!(code, WORLD, "{looks:#?}");
        looks.into_iter().filter(|look| look["state"] == "wrong").collect()
    }

    async fn run_says(&self, run: Run, says: &str) {
        let settings: Vec<(&str, &str)> =
            self.settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        let relay = Relay::start_at(&self.url, &self.amqp, &self.outbox.name, &settings);
        if run == Run::Stops {
            let (code, log) = relay.ended();
            assert!(code == WORLD && log.contains(says), "{code}: {says:?} is not in\n{log}");
            return;
        }
        if run == Run::WaitsWithARow {
            relay.ready().await;
            self.outbox.insert("placed").await;
        }
        eventually(says, || async {
            let (code, reasons) = relay.get("/readyz");
            // JSON writes quotes otherwise.
            code == 503 && reasons.replace('\\', "").contains(says)
        })
        .await;
        relay.kill();
    }

    /// Does what the remedy says, as it stands.
    fn paste(&mut self, findings: &[Json]) {
        self.paste_into(&["sql", "shell", "set", "pg_hba.conf", "do"], findings);
    }

    /// What goes to these places.
    fn paste_into(&mut self, places: &[&str], findings: &[Json]) {
        for step in findings.iter().flat_map(|finding| finding["steps"].as_array().unwrap()) {
            let (place, text) = (step["place"].as_str().unwrap(), step["text"].as_str().unwrap());
            match place {
                _ if !places.contains(&place) => {}
                "sql" => self.psql(text),
                "shell" => self.shell(text),
                "set" => {
                    let (key, value) = text.split_once('=').unwrap();
                    self.settings.push((key.to_owned(), value.to_owned()));
                }
                "pg_hba.conf" => self.top_hba(text),
                // A decision, or a restart: who tests those does them.
                "do" => {}
                place => panic!("an unknown place: {place}"),
            }
        }
    }

    /// As a superuser; in another database when nobody may enter the outbox's.
    fn psql(&self, sql: &str) {
        let told = |database: &str| {
            let url = self.postgres.url_for("postgres", None, database);
            // Without a terminal of its own, psql asks for a password on standard input.
            let mut psql = Command::new("setsid");
            psql.args(["-w", "psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", &url, "-c", sql]);
            let mut psql = psql.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            let mut stdin = psql.stdin.take().unwrap();
            let written = std::io::Write::write_all(&mut stdin, format!("{PASSWORD}\n{PASSWORD}\n").as_bytes());
            // One that asks for nothing may be done already.
            assert!(written.is_ok() || written.is_err_and(|error| error.kind() == ErrorKind::BrokenPipe));
            drop(stdin);
            let output = psql.wait_with_output().unwrap();
            (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
        };
        let (mut is_done, mut error) = told(&self.outbox.name);
        if error.contains("not currently accepting connections") {
            (is_done, error) = told("postgres");
        }
        assert!(is_done, "{sql}: {error}");
    }

    fn shell(&self, line: &str) {
        let words = words(line);
        let (program, arguments) = words.split_first().unwrap();
        match program.as_str() {
            "rabbitmqctl" => self.ctl(arguments.to_vec()),
            "psql" => {
                let mut psql = Command::new("psql");
                psql.env("PGHOST", "127.0.0.1").env("PGPORT", self.postgres.port().to_string());
                let output = psql.env("PGUSER", "postgres").arg("-X").args(arguments).output().unwrap();
                assert!(output.status.success(), "{line}: {output:?}");
            }
            "pgoutbox" => {
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                // `init` may find that there is more to do; the next `check` says so.
                let administrator = self.postgres.url_for("postgres", None, &self.outbox.name);
                self.verb(&arguments, &administrator);
            }
            other => panic!("no step of a test: {other}"),
        }
    }
}

impl Case {
    async fn is_found_and_mended(&self, mut surroundings: Surroundings<'_>) {
        self.is_found_and_mended_in(&mut surroundings).await;
    }

    async fn is_found_and_mended_in(&self, surroundings: &mut Surroundings<'_>) {
        surroundings.is_sound();
        surroundings.suffer(self.breaks).await;
        let says = surroundings.filled(self.says);
        let findings = surroundings.findings();
        let problem = |finding: &Json| finding["problem"].as_str().unwrap().to_owned();
        assert!(findings.iter().any(|finding| problem(finding).contains(&says)), "{says:?} is not in {findings:#?}");
        let step = surroundings.filled(self.step);
        let steps = findings.iter().flat_map(|finding| finding["steps"].as_array().unwrap());
        assert!(steps.into_iter().any(|found| found["text"] == step.as_str()), "{step:?} is not in {findings:#?}");
        surroundings.run_says(self.run, &says).await;
        surroundings.paste(&findings);
        surroundings.is_sound();
    }
}

/// The words of a command line, as a shell takes it apart.
pub(crate) fn words(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    let (mut word, mut is_word, mut is_quoted) = (String::new(), false, false);
    let mut letters = line.chars();
    while let Some(letter) = letters.next() {
        match letter {
            '\'' => (is_quoted, is_word) = (!is_quoted, true),
            '\\' if !is_quoted => word.extend(letters.next()),
            ' ' if !is_quoted => {
                if is_word {
                    words.push(std::mem::take(&mut word));
                }
                is_word = false;
            }
            letter => {
                word.push(letter);
                is_word = true;
            }
        }
    }
    if is_word {
        words.push(word);
    }
    words
}

#[test]
fn a_line_is_taken_apart_as_a_shell_does_it() {
    assert_eq!(words(r"a  -p / 'b c' '' 'it'\''s'"), ["a", "-p", "/", "b c", "", "it's"]);
}

//! The verbs, one file each, and the road from arguments to an exit code.

mod check;
mod completions;
mod config;
mod demo;
mod drop;
mod init;
mod log;
mod man;
mod run;
mod status;
mod tail;

use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::config::{Config, KEYS, Needs, Sources, shown};
use crate::error::{Error, ExitCode};
use crate::finding::{called_with, explain, word};

/// The transactional outbox for Postgres, straight from the write-ahead log to RabbitMQ.
#[derive(Debug, Parser)]
#[command(name = "pgoutbox", version, about, after_help = AFTER_HELP)]
struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    verb: Verb,
}

const AFTER_HELP: &str = "\
Settings come from flags, then PGOUTBOX__SECTION__KEY, then the file, then defaults; DATABASE_URL and AMQP_URL are \
understood. `pgoutbox run --print-config` shows them all.

Exit codes: 0 stopped cleanly, 64 usage or configuration, 65 a row that cannot be delivered, 69 a peer unreachable for too \
long, or an output or http.listen not to be had, 70 a bug in pgoutbox, 78 the world is set up wrong.";

/// clap's name of what [`command`] gives to every verb.
const SETTINGS: &str = "settings";

/// For every verb.
#[derive(Debug, clap::Args)]
struct Common {
    /// TOML file with settings; else PGOUTBOX_CONFIG names it
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting, such as rabbitmq.exchange=events; may be repeated
    #[arg(id = SETTINGS, short, long = "set", value_name = "KEY=VALUE")]
    given: Vec<String>,
    /// The same, apart.
    #[arg(skip)]
    settings: Vec<(String, String)>,
    /// How logs look
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    /// error, warn, info, debug or trace; else RUST_LOG says it, else it is info
    #[arg(long, global = true, value_name = "LEVEL")]
    log_level: Option<tracing::Level>,
}

impl Common {
    /// An empty variable is none: compose files pass on variables that nobody set.
    fn file(&self) -> Option<PathBuf> {
        let named = || std::env::var_os("PGOUTBOX_CONFIG").filter(|path| !path.is_empty()).map(PathBuf::from);
        self.config.clone().or_else(named)
    }

    /// What says which settings count, for a command line that does something to the same slot. A secret is left out: its
    /// owner has it, and logs shall not.
    fn repeated(&self) -> String {
        let is_secret = |key: &str| KEYS.iter().any(|known| known.is_secret && known.name == key);
        let file = self.config.iter().map(|path| ("--config", path.to_string_lossy().into_owned()));
        let set = self.settings.iter().filter(|(key, _)| !is_secret(key));
        let set = set.map(|(key, value)| ("--set", format!("{key}={value}")));
        file.chain(set).map(|(flag, value)| format!("{flag} {}", word(&value))).collect::<Vec<_>>().join(" ")
    }
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Create what is missing: table, publication, slot
    Init(init::Arguments),
    /// Look at every precondition of both peers; change nothing
    Check(check::Arguments),
    /// Run the relay
    Run(run::Arguments),
    /// Show slot, lag, who holds it, and how the relay is
    Status(status::Arguments),
    /// Print messages as they commit, through a temporary slot
    Tail(tail::Arguments),
    /// Watch it work: throw-away Postgres and RabbitMQ, services on both sides, a broker that goes away
    Demo(demo::Arguments),
    /// Remove slot and publication
    Drop(drop::Arguments),
    /// Show what there is to set
    Config(config::Arguments),
    /// Print completions for a shell
    Completions(completions::Arguments),
    /// Print the manual page
    Man(man::Arguments),
}

/// What clap is told. Each verb has a `--set` of its own: of a global one that stands before the verb and behind it, clap
/// forgets what stands before, and `-s postgres.slot=test drop -s ...` would drop the default's slot.
fn command() -> clap::Command {
    let command = Arguments::command();
    let set = command.get_arguments().find(|argument| argument.get_id() == SETTINGS).cloned();
    command.mut_subcommands(|verb| taking(verb, set.as_ref()))
}

fn taking(verb: clap::Command, set: Option<&clap::Arg>) -> clap::Command {
    verb.args(set).mut_subcommands(|verb| taking(verb, set))
}

fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Arguments, clap::Error> {
    let matches = command().try_get_matches_from(arguments)?;
    let mut arguments = Arguments::from_arg_matches(&matches)?;
    arguments.common.settings = given(&matches).into_iter().map(|text| key_value(text)).collect::<Result<_, _>>()?;
    Ok(arguments)
}

/// In the order in which they were given: a later one wins.
fn given(matches: &ArgMatches) -> Vec<&String> {
    let own = matches.get_many(SETTINGS).into_iter().flatten();
    own.chain(matches.subcommand().into_iter().flat_map(|(_, verb)| given(verb))).collect()
}

/// Not by clap, whose message would repeat the text.
fn key_value(text: &str) -> Result<(String, String), clap::Error> {
    let pair = text.split_once('=').map(|(key, value)| (key.trim().to_owned(), value.to_owned()));
    let wrong = || format!("--set {}: KEY=VALUE is needed", shown(text.trim()));
    pair.ok_or_else(|| command().error(ErrorKind::ValueValidation, wrong()))
}

/// Parses, runs and says how it ended.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match parse(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // clap writes help and version to stdout, faults to stderr.
            let _ = error.print();
            return if error.use_stderr() { ExitCode::Usage } else { ExitCode::Stopped };
        }
    };
    exit_70_on_panic();
    start_logs(&arguments.common);
    called_with(arguments.common.repeated());
    let runtime = match runtime(&arguments.verb).enable_all().build() {
        Ok(runtime) => runtime,
        Err(source) => return report(&Error::System { doing: "cannot start threads".to_owned(), source }),
    };
    let code = match runtime.block_on(async {
        end_as_process_1(&arguments.verb);
        dispatch(&arguments).await
    }) {
        Ok(()) => ExitCode::Stopped,
        Err(error) => report(&error),
    };
    // Not dropped, which would wait for its threads: one may be asking a name server that never answers, or writing to a
    // standard output that nobody reads. What they would still bring is nobody's any more. Last: who finds the probes gone
    // finds the reason in the log.
    runtime.shutdown_background();
    code
}

/// One thread for the relay: a message passes three stations, and to wake another thread at each costs more than they do.
/// `demo` is many programs in one.
fn runtime(verb: &Verb) -> tokio::runtime::Builder {
    match verb {
        Verb::Demo(_) => tokio::runtime::Builder::new_multi_thread(),
        _ => tokio::runtime::Builder::new_current_thread(),
    }
}

/// A container's first process has no default for signals: what does not listen for them cannot be stopped by any but the
/// last. `run` and `demo` listen.
fn end_as_process_1(verb: &Verb) {
    if std::process::id() != 1 || matches!(verb, Verb::Run(_) | Verb::Demo(_)) {
        return;
    }
    for (kind, number) in [(SignalKind::terminate(), 15), (SignalKind::interrupt(), 2)] {
        // Without a listener it is as it was.
        let Ok(mut listener) = signal(kind) else { continue };
        tokio::spawn(async move {
            listener.recv().await;
            std::process::exit(128 + number);
        });
    }
}

async fn dispatch(arguments: &Arguments) -> Result<(), Error> {
    let common = &arguments.common;
    match &arguments.verb {
        Verb::Init(arguments) => init::run(arguments, &load(common, &[], Needs::Postgres)?).await,
        Verb::Check(arguments) => check::run(arguments, &load(common, &[], Needs::Both)?).await,
        Verb::Run(arguments) => run::run(arguments, load(common, &arguments.flags(), Needs::Both)?).await,
        Verb::Status(arguments) => status::run(arguments, &load(common, &[], Needs::Postgres)?).await,
        Verb::Tail(arguments) => tail::run(arguments, &load(common, &[], Needs::Postgres)?).await,
        Verb::Demo(arguments) => demo::run(arguments).await,
        Verb::Drop(arguments) => drop::run(arguments, &load(common, &[], Needs::Postgres)?).await,
        Verb::Config(arguments) => config::run(arguments),
        Verb::Completions(arguments) => completions::run(arguments),
        Verb::Man(arguments) => man::run(arguments),
    }
}

fn load(common: &Common, flags: &[(String, String)], needs: Needs) -> Result<Config, Error> {
    // A variable that is not UTF-8 cannot be one of ours.
    let environment =
        std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let mut settings = common.settings.clone();
    settings.extend(flags.iter().cloned());
    let file = common.file();
    let sources = Sources { flags: settings, environment: environment.collect(), file: file.as_deref() };
    Config::load(&sources, needs).map_err(Error::Config)
}

/// To standard output; `false` when nobody reads it any more, which is no fault (`| head`).
fn write_out(text: &str) -> Result<bool, Error> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(source) => Err(Error::System { doing: "cannot print".to_owned(), source }),
    }
}

/// A line of what was done. That nobody reads it any more keeps nothing from being done.
fn say(line: &str) -> Result<(), Error> {
    write_out(&format!("{line}\n")).map(drop)
}

/// To standard error. `eprintln!` panics where that is a full disk or a pipe without a reader, and what is said there is
/// never worth that.
fn complain(line: &str) {
    let _ = log::Lines.write_all(format!("pgoutbox: {line}\n").as_bytes());
}

fn report(error: &Error) -> ExitCode {
    let code = error.exit_code();
    if matches!(error, Error::Config(_) | Error::Usage(_) | Error::Found(_) | Error::Servers(_) | Error::Demo(_)) {
        complain(&error.to_string());
    } else {
        // The code first: a remedy at the end of the line can be pasted.
        tracing::error!("exit {code}: {}", explain(error));
    }
    code
}

fn start_logs(common: &Common) {
    let by_variable = || std::env::var("RUST_LOG").ok().filter(|level| !level.is_empty());
    let level = common.log_level.map(|level| level.to_string()).or_else(by_variable).unwrap_or("info".to_owned());
    // The consumers of `demo` meet a broker that restarts: lapin would log what is part of the show.
    let filter = EnvFilter::try_new(format!("{level},lapin=off")).unwrap_or_else(|error| {
        complain(&format!("RUST_LOG: {error}; info is taken"));
        EnvFilter::new("info,lapin=off")
    });
    // Its way to say that a line could not be written is `eprintln!`.
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| log::Lines).log_internal_errors(false);
    let logs = logs.with_target(false);
    log::be_json(matches!(common.log_format, LogFormat::Json));
    match common.log_format {
        LogFormat::Text => logs.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
}

/// A panic is a bug, and has its own exit code; the message goes to stderr as usual.
fn exit_70_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        print(panic);
        complain("this is a bug in pgoutbox; nothing is lost, the slot stands where it was");
        std::process::exit(ExitCode::Bug as i32);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Arguments, clap::Error> {
        parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn what_is_set_before_the_verb_counts_together_with_what_is_set_behind_it() {
        let line =
            "pgoutbox -s postgres.slot=a --set run.drain_timeout=1s drop --yes -s postgres.slot=b --set http.listen=";
        let common = parsed(line).unwrap().common;
        let set = [("postgres.slot", "a"), ("run.drain_timeout", "1s"), ("postgres.slot", "b"), ("http.listen", "")];
        assert_eq!(common.settings, set.map(|(key, value)| (key.to_owned(), value.to_owned())));
        let repeated = set.map(|(key, value)| format!("--set '{key}={value}'")).join(" ");
        assert_eq!(common.repeated(), repeated);
        for line in ["pgoutbox --set a=b config example", "pgoutbox config --set a=b example -c x"] {
            assert_eq!(parsed(line).unwrap().common.settings, [("a".to_owned(), "b".to_owned())], "{line}");
        }
    }

    #[test]
    fn a_setting_without_its_sign_is_not_repeated_further_than_its_key() {
        for text in
            ["postgres.url:postgres://u:s3cret@h/d", "postgres.url postgres://u:s3cret@h/d", "postgres://u:s3cret@h"]
        {
            let arguments = ["pgoutbox", "run", "--set", text].map(OsString::from);
            let error = parse(arguments).unwrap_err();
            let message = error.to_string();
            assert!(
                error.use_stderr() && message.contains("--set postgres") && message.contains("KEY=VALUE is needed")
            );
            assert!(!message.contains("s3cret"), "{message}");
        }
    }
}

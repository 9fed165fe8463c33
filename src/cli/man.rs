//! `pgoutbox man`: the page in section 1, from what clap, the settings and the exit codes say of themselves.
//!
//! The trap: clap's own page sends its reader to a page for each verb. Whoever looks something up at night wants one to
//! search in, so the verbs stand in it.

use clap::{Arg, Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Inline, Roff, bold, italic, roman};

use crate::config::KEYS;
use crate::error::{Error, ExitCode};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {}

/// What is read besides `PGOUTBOX__SECTION__KEY`.
const ENVIRONMENT: [(&str, &str); 7] = [
    ("PGOUTBOX__SECTION__KEY", "the setting `section.key`, such as `PGOUTBOX__RABBITMQ__EXCHANGE`"),
    ("DATABASE_URL", "`postgres.url`, when that is not set"),
    ("AMQP_URL", "`rabbitmq.url`, when that is not set"),
    (
        "DATABASE_URL_FILE, AMQP_URL_FILE, PGOUTBOX__POSTGRES__URL_FILE, PGOUTBOX__RABBITMQ__URL_FILE",
        "a file that holds the URL, for secrets that are mounted; read once, at start",
    ),
    ("PGOUTBOX_CONFIG", "`--config`"),
    ("RUST_LOG", "`--log-level`, also by module"),
    ("PGHOST, PGPASSWORD, PGSSLMODE, ...", "libpq's variables, for what the URL to Postgres leaves open"),
];

const SIGNALS: &str = "`SIGTERM` or `SIGINT`: `run` reads to the end of the open transaction, settles what is in flight \
    (for at most `run.drain_timeout`), tells Postgres, sees it arrive, and exits with 0.";

const FILES: [(&str, &str); 2] = [
    ("/etc/pgoutbox/pgoutbox.toml", "settings of the Debian package's service; elsewhere `--config` names the file"),
    ("/etc/pgoutbox/pgoutbox.env", "its environment, which holds the two URLs; readable by root alone"),
];

pub(super) fn run(_: &Arguments) -> Result<(), Error> {
    super::write_out(&page()).map(drop)
}

fn page() -> String {
    let command = super::Arguments::command();
    let mut roff = Roff::new();
    section(&mut roff, "VERBS");
    for verb in command.get_subcommands() {
        describe_verb(&mut roff, "pgoutbox", verb);
    }
    section(&mut roff, "SETTINGS");
    roff.text(inlines(
        "Flags (`--set` section.key=value) go before the environment, that before the file of `--config` (TOML), and that \
         before the default. `pgoutbox config example` prints such a file.",
    ));
    for key in &KEYS {
        let default = if key.default.is_empty() { String::new() } else { format!(" (default: `{}`)", key.default) };
        entry(&mut roff, vec![bold(key.name)], &format!("{}{default}", key.help));
    }
    section(&mut roff, "ENVIRONMENT");
    ENVIRONMENT.iter().for_each(|(names, meaning)| entry(&mut roff, vec![bold(*names)], meaning));
    section(&mut roff, "FILES");
    FILES.iter().for_each(|(name, meaning)| entry(&mut roff, vec![italic(*name)], meaning));
    section(&mut roff, "SIGNALS");
    roff.text(inlines(SIGNALS));
    section(&mut roff, "EXIT STATUS");
    for (code, meaning) in &ExitCode::MEANINGS {
        entry(&mut roff, vec![bold(code.to_string())], meaning);
    }
    format!("{}{}", head(command), roff.render())
}

/// Title, name, synopsis, description and the options of every verb, as clap says them.
fn head(command: Command) -> String {
    // A date would make two builds of one source differ.
    let man = Man::new(command).date("").manual("pgoutbox");
    let mut head = Vec::new();
    let rendered = man
        .render_title(&mut head)
        .and_then(|()| man.render_name_section(&mut head))
        .and_then(|()| man.render_synopsis_section(&mut head))
        .and_then(|()| man.render_description_section(&mut head))
        .and_then(|()| man.render_options_section(&mut head));
    rendered.expect("writing to memory does not fail");
    String::from_utf8_lossy(&head).into_owned()
}

fn section(roff: &mut Roff, name: &str) {
    roff.control("SH", [name]);
}

fn entry(roff: &mut Roff, term: Vec<Inline>, text: &str) {
    roff.control("TP", []);
    roff.text(term);
    roff.text(inlines(text));
}

fn describe_verb(roff: &mut Roff, path: &str, verb: &Command) {
    let path = format!("{path} {}", verb.get_name());
    if verb.has_subcommands() {
        verb.get_subcommands().for_each(|verb| describe_verb(roff, &path, verb));
        return;
    }
    let mut usage = vec![bold(path)];
    for argument in verb.get_positionals() {
        usage.extend([roman(" "), italic(value_name(argument))]);
    }
    entry(roff, usage, &text_of(verb.get_about()));
    roff.control("RS", []);
    for argument in verb.get_arguments() {
        describe_argument(roff, argument);
    }
    roff.control("RE", []);
}

fn describe_argument(roff: &mut Roff, argument: &Arg) {
    let mut term = Vec::new();
    if let Some(long) = argument.get_long() {
        term.push(bold(format!("--{long}")));
    }
    if argument.get_action().takes_values() {
        term.extend([roman(" "), italic(value_name(argument))]);
    }
    let choices: Vec<String> =
        argument.get_possible_values().iter().map(|value| format!("`{}`", value.get_name())).collect();
    let choices = match choices.as_slice() {
        [] => String::new(),
        choices if argument.get_action().takes_values() => format!(": {}", choices.join(", ")),
        _ => String::new(),
    };
    entry(roff, term, &format!("{}{choices}", text_of(argument.get_help())));
}

fn value_name(argument: &Arg) -> String {
    let names = argument.get_value_names().map(|names| names.iter().map(ToString::to_string).collect::<Vec<_>>());
    names.map_or_else(|| argument.get_id().to_string().to_uppercase(), |names| names.join(" "))
}

fn text_of(text: Option<&clap::builder::StyledStr>) -> String {
    text.map(ToString::to_string).unwrap_or_default()
}

/// What stands between backticks is bold.
fn inlines(text: &str) -> Vec<Inline> {
    let part = |(number, part): (usize, &str)| if number % 2 == 1 { bold(part) } else { roman(part) };
    text.split('`').enumerate().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_holds_every_verb_setting_variable_and_exit_code() {
        // Hyphens are escaped in it.
        let page = page().replace('\\', "");
        let verbs = ["init", "check", "run", "status", "tail", "drop", "demo", "config example", "completions", "man"];
        let verbs = verbs.map(|verb| format!("pgoutbox {verb}"));
        let codes = ExitCode::MEANINGS.map(|(code, _)| code.to_string());
        // A line of its own: the variables' texts name some of them, too.
        let terms = KEYS.iter().map(|key| key.name.to_owned()).chain(codes);
        let terms = terms.chain(ENVIRONMENT.map(|(names, _)| names.to_owned()));
        for term in terms.map(|term| format!("fB{term}fR")) {
            assert!(page.lines().any(|line| line == term), "{term} is not in\n{page}");
        }
        for verb in verbs {
            assert!(page.contains(&verb), "{verb} is not in\n{page}");
        }
        assert!(page.contains("--print-sql") && !page.contains("pgoutbox-init(1)"), "{page}");
    }

    #[test]
    fn help_gives_every_exit_code() {
        for (code, _) in ExitCode::MEANINGS {
            assert!(super::super::AFTER_HELP.contains(&format!("{code} ")), "{code}");
        }
    }
}

//! What was looked at, what is wrong with it, and what mends it, in pieces that can be pasted as they stand.
//!
//! The trap: a remedy that is a sentence is read, half understood and typed wrongly. So what can be pasted is a step of its
//! own, whole, quoted, and with the place where it goes; what only people can decide is an act and says so. A step never
//! holds a secret: where one is needed, the step asks for it.

use std::fmt;
use std::sync::OnceLock;

/// How this process was called: what each step that calls it again needs as well, or it works on another slot.
static CALLED_WITH: OnceLock<String> = OnceLock::new();

/// Remembers the arguments that say which settings count, quoted for a shell. Once, at start.
pub fn called_with(arguments: String) {
    // Only the first call counts, and there is no second one.
    let _ = CALLED_WITH.set(arguments);
}

/// `pgoutbox VERB ...` with them behind the verb: what a step sets itself comes later, and wins.
pub fn as_called(command: &str) -> String {
    with_arguments(command, CALLED_WITH.get().map_or("", String::as_str))
}

fn with_arguments(command: &str, arguments: &str) -> String {
    let mut words = command.splitn(3, ' ');
    match (words.next(), words.next(), words.next()) {
        (Some("pgoutbox"), Some(verb), rest) if !arguments.is_empty() => {
            [&["pgoutbox", verb, arguments][..], rest.as_slice()].concat().join(" ")
        }
        _ => command.to_owned(),
    }
}

/// A precondition that does not hold, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What is wrong, naming the thing.
    pub problem: String,
    /// What to do about it.
    pub remedy: Remedy,
}

impl Finding {
    /// A problem with its remedy.
    pub fn new(problem: impl Into<String>, remedy: Remedy) -> Self {
        Self { problem: problem.into(), remedy }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, ". Remedy: {}", self.remedy) }
    }
}

/// Steps, one after the other, and what to know before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remedy {
    steps: Vec<Step>,
    mind: Option<String>,
}

/// One step, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Statements for psql, as whoever may run them, in the database of `postgres.url`.
    Sql(String),
    /// A command line.
    Shell(String),
    /// A setting and its value.
    Setting(&'static str, String),
    /// A line for the server's `pg_hba.conf`.
    Hba(String),
    /// What cannot be pasted.
    Act(String),
}

impl Remedy {
    /// Begins with a statement.
    pub fn sql(statement: impl Into<String>) -> Self {
        Self::default().then_sql(statement)
    }

    /// Begins with a command line.
    pub fn shell(command: impl Into<String>) -> Self {
        Self::default().then_shell(command)
    }

    /// Begins with a setting.
    pub fn setting(key: &'static str, value: impl Into<String>) -> Self {
        Self::default().then(Step::Setting(key, value.into()))
    }

    /// Begins with what only people can do.
    pub fn act(act: impl Into<String>) -> Self {
        Self::default().then_act(act)
    }

    /// Goes on with a statement; its semicolon is added.
    #[must_use]
    pub fn then_sql(self, statement: impl Into<String>) -> Self {
        let statement: String = statement.into();
        // psql's own commands end with the line.
        let end = if statement.ends_with(';') || statement.starts_with('\\') { "" } else { ";" };
        self.then(Step::Sql(format!("{statement}{end}")))
    }

    /// Goes on with a command line.
    #[must_use]
    pub fn then_shell(self, command: impl Into<String>) -> Self {
        self.then(Step::Shell(command.into()))
    }

    /// Goes on with what only people can do.
    #[must_use]
    pub fn then_act(self, act: impl Into<String>) -> Self {
        self.then(Step::Act(act.into()))
    }

    /// Goes on with any step.
    #[must_use]
    pub fn then(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// What to know before: a sentence, without a full stop.
    #[must_use]
    pub fn mind(mut self, mind: impl Into<String>) -> Self {
        self.mind = Some(mind.into());
        self
    }

    /// The steps, in order.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// What to know before.
    pub fn to_mind(&self) -> Option<&str> {
        self.mind.as_deref()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.mind.is_none()
    }
}

impl Step {
    /// Where it goes.
    pub fn place(&self) -> &'static str {
        match self {
            Step::Sql(_) => "sql",
            Step::Shell(_) => "shell",
            Step::Setting(..) => "set",
            Step::Hba(_) => "pg_hba.conf",
            Step::Act(_) => "do",
        }
    }

    /// What goes there: for a setting `key=value`, as `--set` takes it.
    pub fn text(&self) -> String {
        match self {
            Step::Sql(text) | Step::Hba(text) | Step::Act(text) => text.clone(),
            Step::Shell(command) => as_called(command),
            Step::Setting(key, value) => format!("{key}={value}"),
        }
    }
}

/// In one line, for logs.
impl fmt::Display for Remedy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        for step in &self.steps {
            text.push_str(match text.chars().last() {
                None => "",
                Some(';') => " then ",
                Some(_) => ", then ",
            });
            text.push_str(&match step {
                Step::Sql(statement) => statement.clone(),
                Step::Shell(command) => format!("run `{}`", as_called(command)),
                Step::Setting(key, value) => format!("set {key} = {value}"),
                Step::Hba(line) => format!("put this line into the server's pg_hba.conf: {line}"),
                Step::Act(act) => act.clone(),
            });
        }
        if let Some(mind) = &self.mind {
            text.push_str(match text.chars().last() {
                None => "",
                Some(';') => " ",
                Some(_) => ". ",
            });
            text.push_str(mind);
        }
        f.write_str(&text)
    }
}

/// A word of a command line, quoted where a shell would take it apart.
pub fn word(text: &str) -> String {
    let bare = |letter: char| letter.is_ascii_alphanumeric() || "-_./:@%+,".contains(letter);
    if !text.is_empty() && text.chars().all(bare) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Something that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Look {
    /// What it is.
    pub what: String,
    /// How it is.
    pub verdict: Verdict,
}

/// How something is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// As it must be.
    Sound,
    /// Nothing keeps a relay from running, but someone should know.
    Note(Finding),
    /// A relay would not work.
    Wrong(Finding),
}

impl Look {
    /// As it must be.
    pub fn sound(what: impl Into<String>) -> Self {
        Self { what: what.into(), verdict: Verdict::Sound }
    }

    /// Worth knowing.
    pub fn note(what: impl Into<String>, problem: impl Into<String>, remedy: Remedy) -> Self {
        Self { what: what.into(), verdict: Verdict::Note(Finding::new(problem, remedy)) }
    }

    /// Not as it must be.
    pub fn wrong(what: impl Into<String>, finding: Finding) -> Self {
        Self { what: what.into(), verdict: Verdict::Wrong(finding) }
    }

    /// Whether a relay would not work.
    pub fn is_wrong(&self) -> bool {
        matches!(self.verdict, Verdict::Wrong(_))
    }

    /// The same, where it turned out that a relay does work.
    #[must_use]
    pub fn demoted(self) -> Self {
        match self.verdict {
            Verdict::Wrong(finding) => Self { what: self.what, verdict: Verdict::Note(finding) },
            _ => self,
        }
    }

    /// One look for each finding; a sound one where there is none.
    pub fn each(what: &str, findings: Vec<Finding>) -> Vec<Self> {
        if findings.is_empty() {
            return vec![Self::sound(what)];
        }
        findings.into_iter().map(|finding| Self::wrong(what, finding)).collect()
    }
}

/// An error with its sources, in one line.
pub fn explain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        // A transparent error repeats its source.
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_calls_pgoutbox_again_says_which_settings_count() {
        for (command, called) in [
            ("pgoutbox init", "pgoutbox init --config prod.toml"),
            ("pgoutbox init --set a=b c", "pgoutbox init --config prod.toml --set a=b c"),
            ("rabbitmqctl status", "rabbitmqctl status"),
        ] {
            assert_eq!(with_arguments(command, "--config prod.toml"), called);
            assert_eq!(with_arguments(command, ""), command);
        }
    }

    #[test]
    fn a_remedy_reads_as_one_line_with_its_steps_in_order() {
        let remedy = Remedy::sql("ALTER SYSTEM SET wal_level = logical").then_act("restart the server");
        assert_eq!(remedy.to_string(), "ALTER SYSTEM SET wal_level = logical; then restart the server");
        let remedy = Remedy::shell("pgoutbox init").then_sql("SELECT 1;").mind("rows before that are gone");
        assert_eq!(remedy.to_string(), "run `pgoutbox init`, then SELECT 1; rows before that are gone");
        let remedy = Remedy::setting("rabbitmq.declare", "false").mind("it is used as it is");
        assert_eq!(remedy.to_string(), "set rabbitmq.declare = false. it is used as it is");
        assert_eq!(Finding::new("odd", Remedy::default()).to_string(), "odd");
    }

    #[test]
    fn a_step_is_what_its_place_takes() {
        assert_eq!(Remedy::sql(r"\password relay").steps()[0].text(), r"\password relay");
        assert_eq!(Remedy::setting("a.b", "c d").steps()[0].text(), "a.b=c d");
        assert_eq!(Remedy::sql("SELECT 1").steps()[0], Step::Sql("SELECT 1;".to_owned()));
    }

    #[test]
    fn a_word_is_quoted_where_a_shell_would_take_it_apart() {
        assert_eq!(word("pgoutbox_relay"), "pgoutbox_relay");
        assert_eq!(word("^outbox$"), "'^outbox$'");
        assert_eq!(word("it's"), r"'it'\''s'");
        assert_eq!(word(""), "''");
    }
}

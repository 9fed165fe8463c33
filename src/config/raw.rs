//! Where values come from: flags, environment, file; by key, before they are understood.
//!
//! The traps: TOML's own error message shows the line, which may hold a secret. And a secret may stand where a key, a
//! variable or a file's name was asked for, so each of these is repeated only as far as it can be one.

use std::collections::BTreeMap;
use std::path::Path;

use super::KEYS;
use super::values::distance;

/// Values by key, before they are understood, and what is wrong with them.
pub(super) struct Raw<'a> {
    values: BTreeMap<&'static str, String>,
    /// The secrets that the source at hand has set, and whether by a file.
    secrets: BTreeMap<&'static str, bool>,
    pub(super) faults: Vec<String>,
    pub(super) environment: &'a BTreeMap<String, String>,
}

impl<'a> Raw<'a> {
    pub(super) fn new(environment: &'a BTreeMap<String, String>) -> Self {
        Self { values: BTreeMap::new(), secrets: BTreeMap::new(), faults: Vec::new(), environment }
    }

    pub(super) fn read_file(&mut self, path: Option<&Path>) {
        let Some(path) = path else { return };
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => return self.fault(format!("file {}: {error}", path.display())),
        };
        match text.parse::<toml::Table>() {
            Ok(table) => self.read_table("", &table),
            // toml's own message would show the line, which may hold a secret.
            Err(error) => {
                let line =
                    error.span().map_or(0, |span| text.get(..span.start).map_or(0, |t| t.lines().count().max(1)));
                self.fault(format!("file {}, line {line}: {}", path.display(), error.message()));
            }
        }
    }

    fn read_table(&mut self, section: &str, table: &toml::Table) {
        for (name, value) in table {
            let name = if section.is_empty() { name.clone() } else { format!("{section}.{name}") };
            let text = match value {
                toml::Value::Table(table) => {
                    self.read_table(&name, table);
                    continue;
                }
                toml::Value::String(text) => self.interpolate(&name, text),
                toml::Value::Integer(number) => number.to_string(),
                toml::Value::Boolean(value) => value.to_string(),
                _ => {
                    self.fault(format!("{}: a text, a whole number or true/false is needed", shown(&name)));
                    continue;
                }
            };
            self.set(&name, text, "file");
        }
    }

    /// Replaces `${VAR}`.
    fn interpolate(&mut self, name: &str, text: &str) -> String {
        let mut result = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            let Some((variable, tail)) = after.split_once('}') else {
                self.fault(format!("{}: `${{` without `}}`", shown(name)));
                return result;
            };
            result.push_str(before);
            match self.environment.get(variable) {
                Some(value) => result.push_str(value),
                None if is_open(name) => self.fault(format!("{name}: environment variable {variable} is not set")),
                None => self.fault(format!(
                    "{}: a variable that it names by `${{...}}` is not set. Where `${{` is a part of a password in a URL, \
                     write %24{{",
                    shown(name)
                )),
            }
            rest = tail;
        }
        result.push_str(rest);
        result
    }

    pub(super) fn read_environment(&mut self) {
        const PREFIX: &str = "PGOUTBOX__";
        self.secrets.clear();
        for (variable, value) in self.environment {
            if let Some(name) = variable.strip_prefix(PREFIX) {
                let name = name.to_ascii_lowercase().replace("__", ".");
                self.set(&name, value.clone(), variable);
            }
        }
    }

    pub(super) fn read_flags(&mut self, flags: &[(String, String)]) {
        self.secrets.clear();
        for (name, value) in flags {
            self.set(name, value.clone(), "flag");
        }
    }

    fn set(&mut self, name: &str, value: String, origin: &str) {
        let named = |name: &str| KEYS.iter().find(|key| key.name == name);
        let file_of = name.strip_suffix("_file").and_then(named).filter(|key| key.is_secret);
        match named(name).or(file_of) {
            // Compose files pass on variables that nobody set as empty ones: they may not hide another server's URL.
            Some(key) if key.is_secret && value.is_empty() => {}
            Some(key) => {
                let by_file = file_of.is_some();
                if key.is_secret && self.secrets.insert(key.name, by_file).is_some_and(|before| before != by_file) {
                    self.fault(format!("{0} and {0}_file: set one of the two (from {origin})", key.name));
                } else if by_file {
                    self.set_by_file(key.name, name, &value);
                } else {
                    self.values.insert(key.name, value);
                }
            }
            None => {
                let name = shown(name);
                let near = KEYS.iter().map(|key| key.name).min_by_key(|key| distance(key, &name));
                let hint = near.map(|near| format!("; did you mean {near}?")).unwrap_or_default();
                self.fault(format!("{name}: unknown key (from {origin}){hint}"));
            }
        }
    }

    fn set_by_file(&mut self, key: &'static str, name: &str, path: &str) {
        match std::fs::read_to_string(path) {
            // Not as if nobody had set it: libpq's defaults are some other database.
            Ok(secret) if secret.trim_end().is_empty() => {
                self.fault(format!("{name}: {path}: it is empty, and should hold the URL"));
            }
            Ok(secret) => {
                self.values.insert(key, secret.trim_end().to_owned());
            }
            Err(error) if is_path(path) => self.fault(format!("{name}: {path}: {error}")),
            Err(error) => self
                .fault(format!("{name}: the name of a file is needed, which holds the URL, and not the URL ({error})")),
        }
    }

    /// Whether anybody has set it.
    pub(super) fn is_set(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    pub(super) fn fault(&mut self, fault: String) {
        self.faults.push(fault);
    }

    pub(super) fn text(&self, name: &str) -> String {
        let default = || KEYS.iter().find(|key| key.name == name).map(|key| key.default.to_owned());
        self.values.get(name).cloned().or_else(default).unwrap_or_default()
    }

    pub(super) fn optional(&self, name: &str) -> Option<String> {
        Some(self.text(name)).filter(|text| !text.is_empty())
    }

    pub(super) fn parsed<T>(&mut self, name: &str, fallback: T, parse: impl Fn(&str) -> Result<T, String>) -> T {
        parse(&self.text(name)).unwrap_or_else(|problem| {
            self.fault(format!("{name}: {problem}"));
            fallback
        })
    }

    /// A secret's ambient variable, `DATABASE_URL` or `AMQP_URL`, or the file it names.
    pub(super) fn ambient(&mut self, name: &'static str, variable: &str) {
        if self.optional(name).is_some() {
            return;
        }
        self.secrets.clear();
        for (name, variable) in
            [(name.to_owned(), variable.to_owned()), (format!("{name}_file"), format!("{variable}_FILE"))]
        {
            if let Some(value) = self.environment.get(&variable).cloned() {
                self.set(&name, value, &variable);
            }
        }
    }
}

/// A key that holds no secret. What is unknown may be a secret's, misspelt.
fn is_open(name: &str) -> bool {
    KEYS.iter().any(|key| !key.is_secret && key.name == name)
}

/// As far as it can be a key: `--set postgres.url:postgres://...` has its first `=` behind the password.
pub(crate) fn shown(name: &str) -> String {
    let is_of_a_key = |letter: char| letter.is_ascii_alphanumeric() || "_-.".contains(letter);
    match name.find(|letter| !is_of_a_key(letter)) {
        Some(end) => format!("{}...", name.get(..end).unwrap_or_default()),
        None => name.to_owned(),
    }
}

/// Whether a text where a file is asked for is a path, and no URL or key/value string.
fn is_path(text: &str) -> bool {
    !text.contains("://") && !text.contains(|letter: char| letter == '=' || letter.is_whitespace())
}

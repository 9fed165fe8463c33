//! `pgoutbox.toml` as people get it: every key with its help and its default, commented out, so that it changes nothing.
//!
//! The trap: an example written by hand describes an older program. This one is made from [`KEYS`], and the tests load it,
//! as it is and with the comment signs taken off.

use super::{KEYS, Key};

/// Prose begins with `# `, a setting with `#` alone: taking that off is all it needs.
const INTRODUCTION: &str = "\
# Settings of pgoutbox. Every line is a default and commented out: take off the # of what you change.
#
# Flags (--set section.key=value) and the environment (PGOUTBOX__SECTION__KEY) go before this file. ${VAR} in a text
# becomes that variable of the environment. `pgoutbox run --print-config` shows what comes out of it all.

";

const SECRET: &str = "Holds a password: rather than here, put it into the environment, or into a file of its own and that \
    file's name into";

/// Comments are wrapped at this column, names and values stand as they are.
const WIDTH: usize = 100;

/// The file.
pub fn example() -> String {
    let mut text = INTRODUCTION.to_owned();
    let mut section = "";
    // A key without a section stands before them all: behind the head of one it would belong to it.
    let bare = KEYS.iter().filter(|key| section_of(key).is_none());
    for key in bare.chain(KEYS.iter().filter(|key| section_of(key).is_some())) {
        let (of, name) = key.name.rsplit_once('.').unwrap_or(("", key.name));
        if of != section {
            section = of;
            text.push_str(&format!("\n[{section}]\n"));
        }
        comment(&mut text, key.help);
        if key.is_secret {
            comment(&mut text, &format!("{SECRET} {name}_file."));
        }
        text.push_str(&format!("#{name} = {}\n", literal(key.default)));
    }
    text
}

fn section_of(key: &Key) -> Option<&'static str> {
    key.name.rsplit_once('.').map(|(section, _)| section)
}

fn comment(text: &mut String, prose: &str) {
    let mut line = "#".to_owned();
    for word in prose.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            text.push_str(&line);
            text.push('\n');
            line = "#".to_owned();
        }
        line.push(' ');
        line.push_str(word);
    }
    text.push_str(&line);
    text.push('\n');
}

/// As people write it: numbers and true or false without quotes.
fn literal(default: &str) -> toml::Value {
    let number = default.parse().map(toml::Value::Integer);
    let known = number.or_else(|_| default.parse().map(toml::Value::Boolean));
    known.unwrap_or_else(|_| toml::Value::from(default))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{Config, Needs, Sources};
    use super::*;

    /// With these two set where people have them.
    fn printed(file: Option<&str>) -> String {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), file.unwrap_or_default()).unwrap();
        let pairs = [("DATABASE_URL", "postgres://u@h/d"), ("AMQP_URL", "amqp://h")];
        let environment: BTreeMap<_, _> = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let sources = Sources { flags: Vec::new(), environment, file: file.map(|_| path.path()) };
        Config::load(&sources, Needs::Both).unwrap().printed().to_owned()
    }

    fn uncommented() -> String {
        let line = |line: &str| match line.strip_prefix('#') {
            Some(setting) if !setting.is_empty() && !setting.starts_with(' ') => setting.to_owned(),
            _ => line.to_owned(),
        };
        example().lines().map(line).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_example_changes_nothing() {
        assert_eq!(printed(Some(&example())), printed(None));
        assert!(example().lines().all(|line| line.is_empty() || line.starts_with(['#', '['])), "{}", example());
    }

    #[test]
    fn the_example_without_its_comment_signs_sets_every_key_to_its_default() {
        assert_eq!(printed(Some(&uncommented())), printed(None));
        let table: toml::Table = uncommented().parse().unwrap();
        for key in &KEYS {
            let value = key
                .name
                .split('.')
                .try_fold(&toml::Value::Table(table.clone()), |table, part| table.get(part))
                .map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned));
            assert_eq!(value.as_deref(), Some(key.default), "{}", key.name);
        }
    }

    #[test]
    fn the_example_is_no_wider_than_a_terminal() {
        for line in example().lines() {
            assert!(line.chars().count() <= 120, "{line}");
        }
    }
}

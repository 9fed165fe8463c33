//! The house stays the house: which room may name which, how long files and functions may grow, what every file says first.
//!
//! The trap: a rule that only people hold is a rule for Mondays.

use std::path::{Path, PathBuf};

/// What a room (files whose path below `src/` starts so) never names.
const NEVER: [(&str, &[&str]); 18] = [
    ("lsn", &["crate::"]),
    ("retry", &["crate::"]),
    ("finding", &["crate::"]),
    ("lookup", &["crate::"]),
    // What both doors share may know neither.
    ("tls/", &["crate::", "tokio::"]),
    ("pg/pgoutput", &["tokio", "std::net", "crate::outbox", "crate::relay", "crate::sink", "crate::config"]),
    ("pg/", &["crate::outbox", "crate::relay", "crate::sink", "crate::config", "crate::metrics", "crate::cli"]),
    ("outbox/", &["tokio", "std::net", "crate::sink", "crate::relay", "crate::config", "crate::metrics", "crate::cli"]),
    ("sink/", &["crate::lsn", "crate::pg", "crate::relay", "crate::config", "crate::cli"]),
    ("sink/stdout", &["rabbitmq", "lapin", "amq_protocol"]),
    // One path for publishing, and it is our own.
    ("sink/rabbitmq", &["stdout", "lapin", "amq_protocol"]),
    ("sink/rabbitmq/address", &["tokio", "std::fs", "super::connect", "super::link", "super::session"]),
    ("sink/rabbitmq/ledger", &["tokio", "super::link", "super::session"]),
    ("sink/rabbitmq/frames", &["tokio", "super::link", "super::session"]),
    ("relay/", &["lapin", "amq_protocol", "rabbitmq", "stdout", "clap", "serde", "crate::config", "crate::cli"]),
    ("http", &["crate::pg", "crate::sink", "crate::relay"]),
    ("metrics", &["crate::pg", "crate::sink", "crate::relay"]),
    ("servers/", &["crate::pg", "crate::outbox", "crate::relay", "crate::sink", "crate::config", "crate::cli"]),
];

/// Rooms that gather: nothing but `cli` may import them.
const GATHERERS: [&str; 3] = ["crate::config", "crate::error", "crate::cli"];

const FUNCTION_LINES_MAX: usize = 70;
const FILE_LINES_MAX: usize = 450;
const LINE_LENGTH_MAX: usize = 125;

fn sources(below: &str) -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(below);
    let mut files = Vec::new();
    let mut open: Vec<PathBuf> = vec![root.clone()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(&root).unwrap().display().to_string();
                files.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    assert!(!files.is_empty(), "no sources below {below}");
    files
}

/// The code of a file: without its unit tests and without comments.
fn code(text: &str) -> Vec<(usize, &str)> {
    let before_tests = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]"));
    before_tests.enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")).collect()
}

#[test]
fn tidy_no_room_names_what_it_must_not_know() {
    let mut faults = Vec::new();
    for (name, text) in sources("src") {
        for (number, line) in code(&text) {
            // What a room prints is not what it knows: texts for people may name anything.
            let line = without_texts(line);
            let never = NEVER.iter().filter(|(room, _)| name.starts_with(room)).flat_map(|(_, words)| *words);
            faults.extend(
                never
                    .filter(|word| line.contains(**word))
                    .map(|word| format!("src/{name}:{} names {word}", number + 1)),
            );
            let may_gather = name.starts_with("cli") || name == "main.rs" || name == "lib.rs" || name == "error.rs";
            if !may_gather {
                let gathered = GATHERERS.iter().filter(|word| line.contains(**word));
                faults.extend(gathered.map(|word| format!("src/{name}:{} imports {word}", number + 1)));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

fn without_texts(line: &str) -> String {
    line.split('"').step_by(2).collect()
}

/// `eprintln!` and its like panic where nobody reads, or where a disk is full.
#[test]
fn tidy_nothing_is_printed_by_what_panics_when_it_cannot_be() {
    let mut faults = Vec::new();
    for (name, text) in sources("src") {
        let prints = |line: &str| ["print!(", "println!("].iter().any(|word| without_texts(line).contains(word));
        let found = code(&text).into_iter().filter(|(_, line)| prints(line));
        faults.extend(found.map(|(number, _)| format!("src/{name}:{}", number + 1)));
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn tidy_every_file_says_what_it_is_for() {
    for below in ["src", "tests", "benches"] {
        for (name, text) in sources(below) {
            assert!(text.starts_with("//! "), "{below}/{name} does not open with its job");
        }
    }
}

#[test]
fn tidy_files_and_functions_stay_small() {
    let mut faults = Vec::new();
    let files = ["src", "benches"]
        .into_iter()
        .flat_map(|below| sources(below).into_iter().map(move |(name, text)| (format!("{below}/{name}"), text)));
    for (name, text) in files {
        let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]"));
        let count = lines.clone().count();
        if count > FILE_LINES_MAX {
            faults.push(format!("{name} has {count} lines before its tests"));
        }
        let mut function: Option<(usize, usize, &str)> = None;
        for (number, line) in lines.enumerate() {
            let indent = line.len() - line.trim_start().len();
            if line.chars().count() > LINE_LENGTH_MAX {
                faults.push(format!("{name}:{} is {} characters long", number + 1, line.chars().count()));
            }
            let begins = ["fn ", "async fn "].iter().any(|word| {
                let bare = line.trim_start().trim_start_matches("pub(super) ").trim_start_matches("pub(crate) ");
                bare.trim_start_matches("pub ").trim_start_matches("const ").starts_with(word)
            });
            if begins && function.is_none() && !line.trim_end().ends_with(';') {
                function = Some((number, indent, line.trim()));
            } else if let Some((start, outer, signature)) = function
                && indent == outer
                && line.trim_start().starts_with('}')
            {
                if number - start + 1 > FUNCTION_LINES_MAX {
                    faults.push(format!("{name}:{}: {} lines: {signature}", start + 1, number - start + 1));
                }
                function = None;
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn tidy_nothing_is_left_open_without_a_reason() {
    for (name, text) in sources("src") {
        for word in [["TO", "DO"], ["FIX", "ME"], ["XX", "X"], ["unimplemented", "!"], ["todo", "!"]]
            .map(|halves| halves.concat())
        {
            assert!(!text.contains(&word), "src/{name} holds {word}");
        }
    }
}

#[test]
fn tidy_the_readme_lists_every_setting_as_it_is() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    for key in &pgoutbox::config::KEYS {
        let default = if key.default.is_empty() { String::new() } else { format!("`{}`", key.default) };
        let row = format!("| `{}` | {default} | {} |", key.name, key.help);
        assert!(readme.contains(&row), "README.md lacks this row:\n{row}");
    }
}

#[test]
fn tidy_the_readme_lists_every_exit_code_as_it_is() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    for (code, meaning) in &pgoutbox::error::ExitCode::MEANINGS {
        let row = format!("| {code} | {meaning} |");
        assert!(readme.contains(&row), "README.md lacks this row:\n{row}");
    }
}

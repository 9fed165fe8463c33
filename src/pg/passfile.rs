//! `.pgpass`: passwords by host, port, database and role; the first line that fits decides.
//!
//! The traps. A file that others may read is not used, as libpq does not. And a colon or backslash inside a field is
//! escaped by a backslash, in the password too.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// What was looked for.
pub(super) struct Wanted<'a> {
    pub(super) host: &'a str,
    pub(super) port: u16,
    pub(super) database: &'a str,
    pub(super) user: &'a str,
}

/// What the file says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// The password.
    Password(String),
    /// No line fits, or there is no file.
    Nothing,
    /// The file is not used, and why.
    Unused(String),
}

/// Looks into the file.
pub(super) fn look(path: &Path, wanted: &Wanted<'_>) -> Found {
    let Ok(metadata) = std::fs::metadata(path) else { return Found::Nothing };
    if !metadata.is_file() {
        return Found::Unused(format!("{} is not a plain file and was not used", path.display()));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        let path = path.display();
        return Found::Unused(format!("{path} was not used, since group or world may read it: chmod 600 {path}"));
    }
    match std::fs::read_to_string(path) {
        Ok(text) => find(&text, wanted).map_or(Found::Nothing, Found::Password),
        Err(error) => Found::Unused(format!("{} was not used: {error}", path.display())),
    }
}

fn find(text: &str, wanted: &Wanted<'_>) -> Option<String> {
    let port = wanted.port.to_string();
    text.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let mut rest = line;
        for field in [wanted.host, &port, wanted.database, wanted.user] {
            let (pattern, after) = field_of(rest)?;
            // An escaped star is a star and no wildcard.
            let is_any = rest.starts_with("*:");
            if !is_any && pattern != field {
                return None;
            }
            rest = after;
        }
        let password = unescaped(rest);
        (!password.is_empty()).then_some(password)
    })
}

/// One field, without its escapes, and what follows its colon.
fn field_of(text: &str) -> Option<(String, &str)> {
    let mut is_escaped = false;
    for (index, letter) in text.char_indices() {
        match letter {
            ':' if !is_escaped => return Some((unescaped(text.get(..index)?), text.get(index + 1..)?)),
            '\\' if !is_escaped => is_escaped = true,
            _ => is_escaped = false,
        }
    }
    None
}

fn unescaped(text: &str) -> String {
    let mut plain = String::new();
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        plain.extend(if letter == '\\' { letters.next() } else { Some(letter) });
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const WANTED: Wanted<'_> = Wanted { host: "db", port: 5432, database: "shop", user: "relay" };

    #[test]
    fn the_first_line_that_fits_decides() {
        let text = "# db:5432:shop:relay:comment\nother:*:*:*:no\ndb:5433:*:*:no\ndb:5432:*:relay:yes\n*:*:*:*:late";
        assert_eq!(find(text, &WANTED).as_deref(), Some("yes"));
        assert_eq!(find("db:5432:shop:other:no", &WANTED), None);
        assert_eq!(find("db:5432:shop", &WANTED), None);
    }

    #[test]
    fn colons_backslashes_and_stars_can_be_escaped() {
        let wanted = Wanted { host: "::1", port: 5432, database: "*", user: r"a\b" };
        assert_eq!(find(r"\:\:1:*:\*:a\\b:p\:w\\d", &wanted).as_deref(), Some(r"p:w\d"));
        assert_eq!(find(r"db:*:\*:relay:no", &WANTED), None);
    }

    #[test]
    fn a_file_that_others_may_read_is_not_used() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "*:*:*:*:s3cret\n").unwrap();
        for (mode, is_used) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false)] {
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            let found = look(file.path(), &WANTED);
            assert_eq!(found == Found::Password("s3cret".to_owned()), is_used, "{mode:o}");
            if !is_used {
                assert!(matches!(found, Found::Unused(why) if why.contains("chmod 600")), "{mode:o}");
            }
        }
        assert_eq!(look(Path::new("/does/not/exist"), &WANTED), Found::Nothing);
        assert!(matches!(look(Path::new("/tmp"), &WANTED), Found::Unused(_)));
    }
}

//! `pg_service.conf`: connection parameters under a name.
//!
//! The trap: the user's file hides nothing. A service that it does not hold is looked for in the system's file, but one
//! that it does hold is taken from there alone. And of a keyword that stands there twice the first value counts; in a
//! connection string it is the last.

use std::path::{Path, PathBuf};

use super::conninfo::Values;
use super::settings::home;

/// Where Debian's libpq and the source distribution's keep the system's file, when PGSYSCONFDIR does not say.
const SYSTEM_DIRECTORIES: [&str; 2] = ["/etc/postgresql-common", "/usr/local/pgsql/etc"];

/// The parameters of the service.
pub(super) fn find(
    name: &str,
    file: Option<&str>,
    variable: &impl Fn(&str) -> Option<String>,
) -> Result<Values, String> {
    let named = file.map(PathBuf::from).or_else(|| variable("PGSERVICEFILE").map(PathBuf::from));
    let is_named = named.is_some();
    let user_file = named.or_else(|| home(variable).map(|home| home.join(".pg_service.conf")));
    let system = match variable("PGSYSCONFDIR") {
        Some(directory) => vec![PathBuf::from(directory)],
        None => SYSTEM_DIRECTORIES.map(PathBuf::from).into(),
    };
    let system = system.into_iter().map(|directory| directory.join("pg_service.conf"));
    for (index, path) in user_file.into_iter().chain(system).enumerate() {
        match std::fs::read_to_string(&path) {
            Ok(text) => {
                if let Some(values) = parse(&text, name, &path)? {
                    return Ok(values);
                }
            }
            Err(error) if index == 0 && is_named => {
                return Err(format!("the service file {} cannot be read: {error}", path.display()));
            }
            Err(_) => {}
        }
    }
    Err("service: no service file defines it (PGSERVICEFILE, ~/.pg_service.conf, pg_service.conf in PGSYSCONFDIR)"
        .to_owned())
}

fn parse(text: &str, name: &str, path: &Path) -> Result<Option<Values>, String> {
    let mut found: Option<Values> = None;
    let mut inside = false;
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(group) = line.strip_prefix('[') {
            if found.is_some() {
                break;
            }
            inside = group.strip_suffix(']') == Some(name);
            found = inside.then(Values::default);
            continue;
        }
        let Some(values) = found.as_mut().filter(|_| inside) else { continue };
        let wrong = |what: &str| format!("the service file {}, line {}: {what}", path.display(), index + 1);
        if line.starts_with("ldap") {
            return Err(wrong("services from LDAP are not supported"));
        }
        let (keyword, value) = line.split_once('=').ok_or_else(|| wrong("`keyword=value` is needed"))?;
        if matches!(keyword, "service" | "servicefile") {
            return Err(wrong("a service cannot name another one"));
        }
        if !values.set_first(keyword, value.to_owned()) {
            return Err(wrong("not a keyword of libpq"));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str =
        "# comment\n[other]\nhost=wrong\n\n[shop]\nhost=db\nport=5433\nport=1\npassword=a=b \n[shop2]\nhost=wrong\n";

    #[test]
    fn a_service_is_its_own_group_and_no_other() {
        let values = parse(FILE, "shop", Path::new("f")).unwrap().unwrap();
        assert_eq!(
            (values.get("host"), values.get("port"), values.get("password")),
            (Some("db"), Some("5433"), Some("a=b"))
        );
        assert!(parse(FILE, "sho", Path::new("f")).unwrap().is_none());
    }

    #[test]
    fn a_wrong_line_is_told_by_its_number_and_not_by_its_text() {
        for text in ["[s]\ns3cret", "[s]\ns3cret=1", "[s]\nservice=s3cret", "[s]\nldap://s3cret"] {
            let error = parse(text, "s", Path::new("f")).err().unwrap();
            assert!(error.contains("f, line 2") && !error.contains("s3cret"), "{error}");
        }
    }
}

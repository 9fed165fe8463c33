//! What a refusal of Postgres means, and what mends it. Pure.
//!
//! The traps. A server may speak another language than ours: the SQLSTATE decides, then the name of the routine that
//! refused, then names in the message, and its words last. And a password that is asked for is never answered here: psql's
//! `\password` asks whoever pastes it.

use std::net::IpAddr;

use super::error::{Attempt, ServerError};
use super::world::identifier;
use crate::finding::{Remedy, Step};

/// By this many a limit is raised.
const MORE: u32 = 10;

/// What to do about a refused login, as exactly as the server's words allow.
pub(super) fn login(attempt: &Attempt, error: &ServerError) -> Remedy {
    let Attempt { user, database, password_from, .. } = attempt;
    let (role, shop) = (identifier(user), identifier(database));
    let by_database = error.field(b'R') == Some("CheckMyDatabase");
    match error.code() {
        "28P01" => {
            let from = match password_from.as_deref() {
                Some("postgres.url") => " (a change of it needs a restart)".to_owned(),
                Some(path) => format!(" (the password is from {path})"),
                None => String::new(),
            };
            Remedy::sql(format!(r"\password {role}")).mind(format!(
                "Or check user and password in postgres.url{from}; a role that does not exist looks the same"
            ))
        }
        "28000" if error.message().contains("pg_hba") => hba(attempt, error),
        "28000" if error.message().contains("does not exist") => {
            Remedy::sql(format!("CREATE ROLE {role} LOGIN REPLICATION")).mind("Or check the user in postgres.url")
        }
        "28000" if error.field(b'R') == Some("InitializeSessionUserId") || error.message().contains("to log in") => {
            Remedy::sql(format!("ALTER ROLE {role} LOGIN"))
        }
        "28000" if error.message().starts_with("Peer") => Remedy::act(format!(
            "run as the system user {user}, map yours to it in pg_ident.conf, or connect by host name and with a password"
        )),
        "28000" if error.message().contains("certificate") => {
            Remedy::act("give a certificate of this role's: sslcert and sslkey in postgres.url")
        }
        "28000" => {
            Remedy::act("see the server's log and pg_hba.conf: another way to log in is asked for than this one")
        }
        "42501" if by_database || error.message().contains("for database") => {
            Remedy::sql(format!("GRANT CONNECT ON DATABASE {shop} TO {role}"))
        }
        "42501" => Remedy::sql(format!("ALTER ROLE {role} REPLICATION")),
        "3D000" => Remedy::act(format!(
            "check the database in postgres.url; {database} would be made by CREATE DATABASE {shop}"
        )),
        "55000" if by_database => Remedy::sql(format!("ALTER DATABASE {shop} ALLOW_CONNECTIONS true")),
        "53300" => too_many(error, Some(attempt)),
        // PgBouncer's words, and SQLSTATE, for what it does not pass on.
        "08P01" if error.message().contains("startup parameter") => Remedy::act(
            "name Postgres itself in postgres.url: a pooler such as PgBouncer passes on neither these settings nor \
             replication",
        ),
        "57P03" => Remedy::act("wait: the server is starting, stopping or not yet consistent"),
        _ => session(error).unwrap_or_else(|| Remedy::act("see the server's log, which says more")),
    }
}

fn hba(attempt: &Attempt, error: &ServerError) -> Remedy {
    let (user, database) = (hba_name(&attempt.user), hba_name(&attempt.database));
    // Between quotation marks of its language, and in all of them before the names of role and database.
    let no_address = |letter: char| !letter.is_ascii_hexdigit() && letter != ':' && letter != '.';
    let address = error.message().split(no_address).find_map(|word| word.parse::<IpAddr>().ok());
    let (kind, address) = match address {
        Some(address) => {
            let bits = if address.is_ipv6() { 128 } else { 32 };
            (if attempt.is_encrypted { "hostssl" } else { "host" }, format!(" {address}/{bits}"))
        }
        None => ("local", String::new()),
    };
    let line = format!("{kind} {database} {user}{address} scram-sha-256");
    let encrypt = if attempt.is_encrypted || kind == "local" {
        ""
    } else {
        "; or, where a hostssl line has it, set sslmode=require"
    };
    Remedy::default()
        .then(Step::Hba(line))
        .then_sql("SELECT pg_reload_conf()")
        .mind(format!("Above any line that rejects. A relay's replication connection matches the same line{encrypt}"))
}

/// A name that `pg_hba.conf` would not take for a keyword or several.
pub fn hba_name(name: &str) -> String {
    let is_keyword = ["all", "sameuser", "samerole", "samegroup", "replication"].contains(&name);
    let is_bare = name.chars().all(|letter| letter.is_ascii_alphanumeric() || "_-.".contains(letter));
    if is_bare && !is_keyword { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

fn too_many(error: &ServerError, attempt: Option<&Attempt>) -> Remedy {
    let message = error.message();
    if message.contains("max_wal_senders") {
        // "... exceeds max_wal_senders (currently 10)".
        let now: String = message.chars().filter(char::is_ascii_digit).collect();
        return raise("max_wal_senders", now.parse().unwrap_or(MORE));
    }
    match (error.field(b'R'), attempt) {
        (Some("InitializeSessionUserId"), Some(attempt)) => {
            Remedy::sql(format!("ALTER ROLE {} CONNECTION LIMIT -1", identifier(&attempt.user)))
        }
        (Some("CheckMyDatabase"), Some(attempt)) => {
            Remedy::sql(format!("ALTER DATABASE {} CONNECTION LIMIT -1", identifier(&attempt.database)))
        }
        _ => Remedy::act("end connections that nobody needs, or raise max_connections, which needs a restart"),
    }
}

/// Raises one of the limits that only a restart changes.
pub fn raise(setting: &str, now: u32) -> Remedy {
    Remedy::sql(format!("ALTER SYSTEM SET {setting} = {}", now.saturating_add(MORE)))
        .then_act("restart PostgreSQL")
        .mind("Standbys first: theirs must not be lower")
}

/// Lets a role write whose transactions only read by default.
pub fn writing(role: &str, database: &str) -> Remedy {
    let (role, database) = (identifier(role), identifier(database));
    Remedy::sql(format!("ALTER ROLE {role} IN DATABASE {database} SET default_transaction_read_only = off"))
        .mind("What `options` of postgres.url or PGOPTIONS say goes before it")
}

/// What an operator can do about a refusal in a session, where the SQLSTATE alone tells.
pub(super) fn session(error: &ServerError) -> Option<Remedy> {
    Some(match error.code() {
        "42501" => Remedy::act("give the role what is missing, usually: ALTER ROLE <role> REPLICATION"),
        "3D000" => Remedy::act("check the database in postgres.url"),
        "55006" => Remedy::act("another relay or a dead connection holds the slot; this one waits for it"),
        "53300" => too_many(error, None),
        // The server does not say how many there are. With a number below that it would not start again.
        "53400" => Remedy::act(
            "raise max_replication_slots above what SHOW max_replication_slots says, standbys first, and restart \
             PostgreSQL",
        ),
        "58P01" => begin_anew("the slot's WAL is gone"),
        "42704" if error.message().contains("publication") => begin_anew(
            "the publication did not exist for a part of the write-ahead log that is still to be read (creating it now \
             does not help)",
        ),
        _ => return None,
    })
}

/// Reconciling comes last: what is committed between the old slot and the new one is in neither.
fn begin_anew(why: &str) -> Remedy {
    Remedy::act(format!("{why}: drop the slot"))
        .then_shell("pgoutbox init")
        .then_act("reconcile from the table what was committed before that and not delivered")
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn refused(code: &str, message: &str, routine: &str) -> ServerError {
        ServerError::parse(Bytes::from(format!("SFATAL\0C{code}\0M{message}\0R{routine}\0\0")))
    }

    fn mends(code: &str, message: &str, routine: &str) -> String {
        let attempt = Attempt {
            host: "db:5432".to_owned(),
            user: "Relay".to_owned(),
            database: "shop".to_owned(),
            is_encrypted: false,
            password_from: None,
        };
        login(&attempt, &refused(code, message, routine)).steps()[0].text()
    }

    #[test]
    fn each_refused_login_has_a_step_that_can_be_pasted() {
        for (code, message, routine, step) in [
            ("28P01", "password authentication failed", "auth_failed", r#"\password "Relay""#),
            ("28000", "role \"Relay\" does not exist", "", "CREATE ROLE \"Relay\" LOGIN REPLICATION;"),
            ("28000", "role \"Relay\" is not permitted to log in", "", "ALTER ROLE \"Relay\" LOGIN;"),
            ("28000", "le rôle ne peut pas se connecter", "InitializeSessionUserId", "ALTER ROLE \"Relay\" LOGIN;"),
            ("42501", "permission denied for database \"shop\"", "", "GRANT CONNECT ON DATABASE shop TO \"Relay\";"),
            ("42501", "droit refusé", "CheckMyDatabase", "GRANT CONNECT ON DATABASE shop TO \"Relay\";"),
            ("42501", "permission denied to start WAL sender", "", "ALTER ROLE \"Relay\" REPLICATION;"),
            ("55000", "not accepting", "CheckMyDatabase", "ALTER DATABASE shop ALLOW_CONNECTIONS true;"),
            ("53300", "x", "InitializeSessionUserId", "ALTER ROLE \"Relay\" CONNECTION LIMIT -1;"),
            ("53300", "x", "CheckMyDatabase", "ALTER DATABASE shop CONNECTION LIMIT -1;"),
            ("53300", "exceeds max_wal_senders (currently 5)", "", "ALTER SYSTEM SET max_wal_senders = 15;"),
        ] {
            assert_eq!(mends(code, message, routine), step);
        }
    }

    #[test]
    fn a_login_that_another_way_would_pass_is_not_answered_by_rights() {
        for (message, routine, mends_it) in [
            ("Peer authentication failed for user \"Relay\"", "auth_failed", "run as the system user Relay"),
            ("connection requires a valid client certificate", "ClientAuthentication", "sslcert and sslkey"),
            ("Ident authentication failed for user \"Relay\"", "auth_failed", "another way to log in"),
        ] {
            let step = mends("28000", message, routine);
            assert!(step.contains(mends_it) && !step.contains("ALTER"), "{step}");
        }
    }

    #[test]
    fn a_pooler_is_told_from_postgres() {
        for parameter in ["options", "replication"] {
            let remedy = mends("08P01", &format!("unsupported startup parameter: {parameter}"), "");
            assert!(remedy.starts_with("name Postgres itself in postgres.url"), "{remedy}");
        }
    }

    #[test]
    fn the_line_for_pg_hba_is_the_same_in_every_language() {
        for (message, line) in [
            ("no pg_hba.conf entry for host \"10.0.0.7\", user \"a\"", "host shop Relay 10.0.0.7/32 scram-sha-256"),
            ("kein pg_hba.conf-Eintrag für Host »::1«, Benutzer »a«", "host shop Relay ::1/128 scram-sha-256"),
            ("aucune entrée dans pg_hba.conf pour l'hôte « 10.0.0.7 »", "host shop Relay 10.0.0.7/32 scram-sha-256"),
            ("kein pg_hba.conf-Eintrag für Host »[local]«, Benutzer »a«", "local shop Relay scram-sha-256"),
        ] {
            assert_eq!(mends("28000", message, ""), line, "{message}");
        }
    }

    #[test]
    fn names_in_pg_hba_are_quoted_where_they_mean_something_else() {
        assert_eq!(hba_name("pgoutbox_relay"), "pgoutbox_relay");
        assert_eq!(hba_name("replication"), "\"replication\"");
        assert_eq!(hba_name("two words"), "\"two words\"");
    }
}

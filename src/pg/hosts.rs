//! Which of several hosts to take: in order, by `target_session_attrs`, with libpq's rules for going on to the next.
//!
//! The traps. libpq's default, `any`, takes a standby that happens to stand first, and no relay can work there; so where
//! nobody says, the primary is looked for on every host, and a standby serves only to say that there is no primary. And a
//! host that answers "no" is an answer: a wrong password is not tried on the next host.

use tokio::time::timeout;

use super::connection::{Connection, Purpose};
use super::dial::{Place, places};
use super::error::Error;
use super::settings::{Settings, Target};

/// What a server says about itself.
struct Session {
    in_recovery: bool,
    read_only: bool,
}

impl Target {
    fn accepts(self, session: &Session) -> bool {
        match self {
            Target::Any => true,
            Target::ReadWrite => !session.read_only,
            Target::ReadOnly => session.read_only,
            Target::Primary => !session.in_recovery,
            Target::Standby | Target::PreferStandby => session.in_recovery,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Target::Any => "any",
            Target::ReadWrite => "read-write",
            Target::ReadOnly => "read-only",
            Target::Primary => "primary",
            Target::Standby => "standby",
            Target::PreferStandby => "prefer-standby",
        }
    }
}

/// Opens an SQL connection to the first host that will do.
///
/// # Errors
/// Of the only host; `Hosts` with every host's; or that of the first that answered "no".
pub(super) async fn open(settings: &Settings) -> Result<(Connection, Place), Error> {
    let wanted = settings.target.unwrap_or(Target::Primary);
    let has_second_best = matches!(settings.target, None | Some(Target::PreferStandby));
    let mut second_best = None;
    let mut failures = Vec::new();
    for place in all(settings, &mut failures).await {
        match at(&place, settings).await {
            Ok((connection, session)) if wanted.accepts(&session) => return Ok((connection, place)),
            Ok((connection, _)) if has_second_best => second_best = second_best.or(Some((connection, place))),
            Ok((_, session)) => {
                let kind = if session.in_recovery { "a standby" } else { "a primary" };
                let kind = if session.read_only && !session.in_recovery { "read-only" } else { kind };
                let problem = format!("{place} is {kind}, and target_session_attrs={} wants another", wanted.name());
                failures.push(Error::NotNow(problem));
            }
            Err(error) if is_answer(&error, settings.target) => return Err(error),
            Err(error) => failures.push(error),
        }
    }
    if let Some(found) = second_best {
        return Ok(found);
    }
    match failures.pop() {
        Some(only) if failures.is_empty() => Err(only),
        last => {
            failures.extend(last);
            Err(Error::Hosts(failures))
        }
    }
}

/// Every address of every host, in order or shuffled; names that cannot be resolved go to the failures.
async fn all(settings: &Settings, failures: &mut Vec<Error>) -> Vec<Place> {
    let mut found = Vec::new();
    let mut hosts = settings.hosts.clone();
    if settings.shuffles {
        fastrand::shuffle(&mut hosts);
    }
    for host in &hosts {
        let late = || std::io::Error::new(std::io::ErrorKind::TimedOut, "looking up the name takes too long");
        let mut places = match timeout(settings.connect_timeout, places(host)).await.unwrap_or_else(|_| Err(late())) {
            Ok(places) => places,
            Err(source) => {
                failures.push(Error::Unreachable { host: host.to_string(), source });
                continue;
            }
        };
        if settings.shuffles {
            fastrand::shuffle(&mut places);
        }
        found.append(&mut places);
    }
    found
}

async fn at(place: &Place, settings: &Settings) -> Result<(Connection, Session), Error> {
    let mut connection = Connection::open(place, settings, Purpose::Sql).await?;
    let question = "select pg_catalog.pg_is_in_recovery(), pg_catalog.current_setting('transaction_read_only')";
    let late = |_| Error::Timeout { during: "asking whether it is a primary", after: settings.connect_timeout };
    let rows = timeout(settings.connect_timeout, connection.query(question)).await.map_err(late)??;
    let mut columns = rows.into_iter().flatten().map(Option::unwrap_or_default);
    let in_recovery = columns.next().as_deref() == Some("t");
    let read_only = columns.next().as_deref() == Some("on");
    Ok((connection, Session { in_recovery, read_only }))
}

/// Whether the host said no, as opposed to nothing or "not now": then no other host is asked, as with libpq.
///
/// Where the primary is looked for, a standby that lags behind may not have the database yet, or no room: that is no answer.
fn is_answer(error: &Error, target: Option<Target>) -> bool {
    match error {
        Error::Refused { error, .. } if target.is_none() => error.code().starts_with("28"),
        Error::Refused { error, .. } => !error.code().starts_with("57P"),
        Error::Login { .. } | Error::Tls { .. } | Error::Server(_) | Error::Protocol(_) => true,
        _ => false,
    }
}

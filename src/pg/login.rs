//! Logging in: passwords, SCRAM with and without channel binding, and what an operator lets a server ask for.
//!
//! The traps. `require` of channel binding must also refuse a server that asks for nothing at all (CVE-2025-49146 of
//! pgjdbc). A password in clear text is for a server that is proven or at least encrypted, or on this machine. A server,
//! or someone in its place, can ask for so many hash rounds that we do nothing else (CVE-2026-42198 of pgjdbc).

use fallible_iterator::FallibleIterator;
use postgres_protocol::authentication::{md5_hash, sasl};
use postgres_protocol::message::backend::{self, AuthenticationSaslBody};
use postgres_protocol::message::frontend;

use bytes::{BufMut, BytesMut};

use super::connection::{Connection, Frame, unexpected};
use super::conninfo::Values;
use super::dial::{Place, Socket};
use super::error::{Attempt, Error, ServerError};
use super::settings::{Password, Settings};
use super::tls;
use crate::retry::Retry;

/// PostgreSQL's default is 4096; more than this is more than postgres-protocol computes.
const ITERATIONS_MAX: u64 = 100_000;

/// What a server may ask for.
#[derive(Clone, Debug)]
pub(super) struct Rules {
    channel_binding: Binding,
    /// `None`: anything that is safe.
    allowed: Option<Vec<Method>>,
    /// Who must run the server at the other end of a Unix socket.
    requirepeer: Option<String>,
}

/// libpq's `channel_binding`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Binding {
    Disable,
    Prefer,
    Require,
}

/// libpq's words in `require_auth`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    None,
    Password,
    Md5,
    Gss,
    Sspi,
    Scram,
    OAuth,
}

const METHODS: [(&str, Method); 7] = [
    ("none", Method::None),
    ("password", Method::Password),
    ("md5", Method::Md5),
    ("gss", Method::Gss),
    ("sspi", Method::Sspi),
    ("scram-sha-256", Method::Scram),
    ("oauth", Method::OAuth),
];

impl Rules {
    pub(super) fn read(values: &Values) -> Result<Self, String> {
        let words = [("disable", Binding::Disable), ("prefer", Binding::Prefer), ("require", Binding::Require)];
        Ok(Self {
            channel_binding: values.one_of("channel_binding", &words)?.unwrap_or(Binding::Prefer),
            allowed: values.get("require_auth").map(methods).transpose()?,
            requirepeer: values.get("requirepeer").map(str::to_owned),
        })
    }
}

/// A list of methods, or of methods with `!` that are not allowed; not both.
fn methods(text: &str) -> Result<Vec<Method>, String> {
    let wrong = || {
        let names: Vec<&str> = METHODS.iter().map(|(name, _)| *name).collect();
        format!("require_auth: a list of {} is needed, all of them with a `!` in front or none", names.join(", "))
    };
    let words: Vec<&str> = text.split(',').map(str::trim).collect();
    let negated = words.iter().filter(|word| word.starts_with('!')).count();
    if negated != 0 && negated != words.len() {
        return Err(wrong());
    }
    let find =
        |word: &&str| METHODS.iter().find(|(name, _)| *name == word.trim_start_matches('!')).map(|(_, method)| *method);
    let named: Vec<Method> = words.iter().map(find).collect::<Option<_>>().ok_or_else(wrong)?;
    let is_allowed = |method: &Method| named.contains(method) == (negated == 0);
    Ok(METHODS.into_iter().map(|(_, method)| method).filter(is_allowed).collect())
}

/// One login on a new connection.
struct Login<'a> {
    connection: &'a mut Connection,
    settings: &'a Settings,
    place: &'a Place,
    attempt: &'a mut Attempt,
    /// What the server has asked for.
    method: Method,
    /// Whether the password was proven together with the server's certificate.
    is_bound: bool,
}

/// Logs in, and stops where the server says that we are in.
///
/// # Errors
/// `Refused` by the server, `Login` by us.
pub(super) async fn log_in(
    connection: &mut Connection,
    settings: &Settings,
    place: &Place,
    attempt: &mut Attempt,
) -> Result<(), Error> {
    let mut login = Login { connection, settings, place, attempt, method: Method::None, is_bound: false };
    login.check_peer()?;
    loop {
        login.connection.flush().await?;
        if login.answer().await? {
            return Ok(());
        }
    }
}

impl Login<'_> {
    fn refuse(&self, problem: impl Into<String>) -> Error {
        Error::Login { attempt: Box::new(self.attempt.clone()), problem: problem.into(), retry: Retry::Never }
    }

    fn check_peer(&self) -> Result<(), Error> {
        let (Some(wanted), Socket::Unix(stream)) = (&self.settings.login.requirepeer, self.connection.socket()) else {
            return Ok(());
        };
        let uid = stream.peer_cred().map_err(Error::Broken)?.uid();
        let user = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(uid)).ok().flatten();
        match user {
            Some(user) if user.name == *wanted => Ok(()),
            _ => {
                Err(self
                    .refuse(format!("requirepeer wants a server run by {wanted}, and this one is run by another user")))
            }
        }
    }

    /// Reads one message and answers it; whether it says that we are in.
    async fn answer(&mut self) -> Result<bool, Error> {
        match self.authentication().await? {
            backend::Message::AuthenticationOk => self.check_ok().map(|()| true),
            backend::Message::AuthenticationCleartextPassword => {
                self.begin(Method::Password)?;
                if matches!(self.connection.socket(), Socket::Tcp(_)) {
                    return Err(self.refuse(
                        "the server asks for the password in clear text, over a connection that is not encrypted. Remedy: \
                         sslmode=require (or stricter), or scram-sha-256 in the server's pg_hba.conf",
                    ));
                }
                let password = self.password()?;
                self.put(|out| frontend::password_message(password.text.as_bytes(), out))?;
                Ok(false)
            }
            backend::Message::AuthenticationMd5Password(body) => {
                self.begin(Method::Md5)?;
                let password = self.password()?;
                let hash = md5_hash(self.settings.user.as_bytes(), password.text.as_bytes(), body.salt());
                self.put(|out| frontend::password_message(hash.as_bytes(), out))?;
                Ok(false)
            }
            backend::Message::AuthenticationSasl(body) => {
                self.begin(Method::Scram)?;
                self.scram(&body).await?;
                Ok(false)
            }
            backend::Message::AuthenticationGss | backend::Message::AuthenticationSspi => Err(self.refuse(
                "the server asks for GSSAPI or SSPI, which is not supported. Remedy: scram-sha-256 in pg_hba.conf",
            )),
            _ => {
                Err(self
                    .refuse("the server asks for a method that is not supported. Remedy: scram-sha-256 in pg_hba.conf"))
            }
        }
    }

    /// Before anything is answered: whether this may be asked at all, and once.
    fn begin(&mut self, method: Method) -> Result<(), Error> {
        if self.method != Method::None {
            return Err(self.refuse("the server asks twice"));
        }
        self.method = method;
        self.check_allowed()?;
        if self.settings.login.channel_binding == Binding::Require && method != Method::Scram {
            return Err(self.refuse(NOT_BOUND));
        }
        Ok(())
    }

    fn check_allowed(&self) -> Result<(), Error> {
        let is_allowed = self.settings.login.allowed.as_ref().is_none_or(|allowed| allowed.contains(&self.method));
        let name = METHODS.iter().find(|(_, method)| *method == self.method).map_or("", |(name, _)| name);
        match (is_allowed, self.method) {
            (true, _) => Ok(()),
            (false, Method::None) => {
                Err(self.refuse("the server let us in without asking for anything, and require_auth forbids that"))
            }
            (false, _) => Err(self.refuse(format!("the server asks for {name}, and require_auth forbids that"))),
        }
    }

    fn check_ok(&self) -> Result<(), Error> {
        self.check_allowed()?;
        if self.settings.login.channel_binding == Binding::Require && !self.is_bound {
            return Err(self.refuse(NOT_BOUND));
        }
        Ok(())
    }

    async fn scram(&mut self, body: &AuthenticationSaslBody) -> Result<(), Error> {
        let offered: Vec<String> =
            body.mechanisms().map(|name| Ok(name.to_owned())).collect().map_err(Error::Broken)?;
        let (mechanism, binding) = self.mechanism(&offered)?;
        self.is_bound = mechanism == sasl::SCRAM_SHA_256_PLUS;
        let password = self.password()?;
        let mut scram = sasl::ScramSha256::new(password.text.as_bytes(), binding);
        self.put(|out| frontend::sasl_initial_response(mechanism, scram.message(), out))?;
        self.connection.flush().await?;
        let step = "SCRAM went out of step";
        let backend::Message::AuthenticationSaslContinue(challenge) = self.authentication().await? else {
            return Err(self.refuse(step));
        };
        bound_iterations(challenge.data()).map_err(|problem| self.refuse(problem))?;
        scram.update(challenge.data()).map_err(|error| self.refuse(error.to_string()))?;
        self.put(|out| frontend::sasl_response(scram.message(), out))?;
        self.connection.flush().await?;
        // The server must prove that it knows the password too, before it may say that we are in.
        let backend::Message::AuthenticationSaslFinal(proof) = self.authentication().await? else {
            return Err(self.refuse(step));
        };
        scram
            .finish(proof.data())
            .map_err(|error| self.refuse(format!("the server does not know the password: {error}")))
    }

    /// The best of what the server offers and the settings allow.
    fn mechanism(&self, offered: &[String]) -> Result<(&'static str, sasl::ChannelBinding), Error> {
        let offers = |name: &str| offered.iter().any(|offer| offer == name);
        let wish = self.settings.login.channel_binding;
        let end_point = match self.connection.socket() {
            Socket::Tls(stream) if wish != Binding::Disable => tls::end_point(stream),
            _ => None,
        };
        match end_point {
            Some(hash) if offers(sasl::SCRAM_SHA_256_PLUS) => {
                Ok((sasl::SCRAM_SHA_256_PLUS, sasl::ChannelBinding::tls_server_end_point(hash)))
            }
            _ if wish == Binding::Require => Err(self.refuse(NOT_BOUND)),
            _ if !offers(sasl::SCRAM_SHA_256) => {
                Err(self.refuse(format!("the server offers only {}", offered.join(", "))))
            }
            // Tells the server that we could: if it had offered it and somebody took the offer away, it notices.
            Some(_) => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unrequested())),
            None => Ok((sasl::SCRAM_SHA_256, sasl::ChannelBinding::unsupported())),
        }
    }

    fn password(&mut self) -> Result<Password, Error> {
        match self.settings.password(&self.place.host) {
            Ok(password) => {
                self.attempt.password_from = Some(password.origin.clone());
                Ok(password)
            }
            // Its file may be changed right now: empty for a moment, or not yet for its owner alone.
            Err(remedy) => Err(Error::Login {
                attempt: Box::new(self.attempt.clone()),
                problem: format!("the server asks for a password and none is set. Remedy: {remedy}"),
                retry: Retry::Later,
            }),
        }
    }

    fn put(&mut self, write: impl FnOnce(&mut BytesMut) -> std::io::Result<()>) -> Result<(), Error> {
        write(self.connection.outgoing()).map_err(Error::Broken)
    }

    /// The next message about the login.
    async fn authentication(&mut self) -> Result<backend::Message, Error> {
        loop {
            let frame = self.connection.read().await?;
            match frame.tag {
                b'R' => return authentication(&frame),
                b'N' => {}
                b'E' => {
                    let error = ServerError::parse(frame.body);
                    return Err(Error::Refused { attempt: Box::new(self.attempt.clone()), error });
                }
                tag => return Err(unexpected(tag, "the login")),
            }
        }
    }
}

const NOT_BOUND: &str = "channel_binding=require needs SCRAM bound to the server's certificate, and the server does not \
    offer that here. Remedy: TLS (sslmode=require or stricter) with an RSA or ECDSA certificate, scram-sha-256 in \
    pg_hba.conf, and a password stored as scram-sha-256";

/// Re-frames an `R` message for postgres-protocol, which owns the parsing of logins.
fn authentication(frame: &Frame) -> Result<backend::Message, Error> {
    let mut bytes = BytesMut::with_capacity(5 + frame.body.len());
    bytes.put_u8(frame.tag);
    bytes.put_u32(u32::try_from(frame.body.len() + 4).map_err(|_| unexpected(frame.tag, "the login"))?);
    bytes.put_slice(&frame.body);
    let message = backend::Message::parse(&mut bytes).map_err(|error| Error::Protocol(error.to_string()))?;
    message.ok_or_else(|| unexpected(frame.tag, "the login"))
}

fn bound_iterations(challenge: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(challenge);
    let rounds = text.split(',').find_map(|part| part.strip_prefix("i=")).and_then(|digits| digits.parse::<u64>().ok());
    match rounds {
        Some(rounds) if rounds <= ITERATIONS_MAX => Ok(()),
        _ => Err(format!(
            "the server asks for more than {ITERATIONS_MAX} SCRAM iterations. Remedy: if the password was set so, \
             SET scram_iterations = {ITERATIONS_MAX} and set it again"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_scram_rounds_are_refused() {
        assert!(bound_iterations(b"r=x,s=y,i=4096").is_ok());
        // What we let through, the library computes.
        let client = || sasl::ScramSha256::new(b"secret", sasl::ChannelBinding::unsupported());
        for (rounds, is_taken) in [(ITERATIONS_MAX, true), (ITERATIONS_MAX + 1, false)] {
            let mut scram = client();
            let nonce = String::from_utf8_lossy(scram.message()).rsplit("r=").next().unwrap_or_default().to_owned();
            let challenge = format!("r={nonce}x,s=c2FsdA==,i={rounds}");
            assert_eq!(bound_iterations(challenge.as_bytes()).is_ok(), is_taken, "{rounds}");
            assert_eq!(scram.update(challenge.as_bytes()).is_ok(), is_taken, "{rounds}");
        }
        assert!(bound_iterations(b"r=x,s=y,i=2000000000").is_err());
        assert!(bound_iterations(b"r=x,s=y").is_err());
    }

    #[test]
    fn require_auth_is_a_list_or_its_opposite() {
        assert_eq!(methods("scram-sha-256, none"), Ok(vec![Method::None, Method::Scram]));
        let all_but = methods("!password,!none").unwrap();
        assert!(
            all_but.contains(&Method::Md5) && !all_but.contains(&Method::None) && !all_but.contains(&Method::Password)
        );
        for text in ["scram", "!md5,none", "", "none,"] {
            assert!(methods(text).is_err(), "{text}");
        }
    }
}

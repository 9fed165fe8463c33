//! What it means when the broker says no, and what mends it. Pure.
//!
//! The traps. A broker answers a wrong password, a user that does not exist and `guest` from elsewhere with the same words.
//! `set_permissions` replaces what the user had, so every line of it holds all three patterns. And 403 on an exchange may be
//! about the exchange, or about the routing key where topic permissions are set.

use super::Settings;
use super::address::Address;
use super::frames::{Close, Fault};
use crate::finding::{Finding, Remedy, word};
use crate::sink::Error;

/// `exchange.declare`.
const DECLARE: (u16, u16) = (40, 10);

/// `queue.declare`.
const LOOK_AT_QUEUE: (u16, u16) = (50, 10);

/// `basic.publish`.
const PUBLISH: (u16, u16) = (60, 40);

/// A name that nobody is likely to have, for where `guest` will not do.
const USER: &str = "pgoutbox_relay";

/// Who we are to the broker, and what we use there.
#[derive(Clone, Debug)]
pub(super) struct Account {
    pub(super) host: String,
    pub(super) user: String,
    pub(super) vhost: String,
    pub(super) exchange: String,
    /// Whether the exchange is declared by us.
    pub(super) declare: bool,
    /// Those that must be there.
    pub(super) queues: Vec<String>,
    /// RabbitMQ lets that user in from its own machine only.
    pub(super) is_guest_from_afar: bool,
    /// The broker makes a user's name of our certificate, and only its words tell which.
    pub(super) is_by_certificate: bool,
}

/// What stands where a user's name would.
const OF_CERTIFICATE: &str = "of the client certificate";

/// The patterns that a relay's user needs: configure, write, read. To look at a queue, RabbitMQ asks for any of the three
/// (since 4.3.1), and writing without reading binds and takes nothing.
fn permissions(exchange: &str, queues: &[String], declare: bool) -> [String; 3] {
    let exchange = literally(exchange);
    let nothing = "^$".to_owned();
    let configure = if declare { format!("^{exchange}$") } else { nothing.clone() };
    let write = if queues.is_empty() {
        format!("^{exchange}$")
    } else {
        let queues: Vec<String> = queues.iter().map(|queue| literally(queue)).collect();
        format!("^({exchange}|{})$", queues.join("|"))
    };
    [configure, write, nothing]
}

/// A pattern that matches this text alone.
fn literally(text: &str) -> String {
    let mut pattern = String::new();
    for letter in text.chars() {
        if !letter.is_alphanumeric() && !"_-:/ ".contains(letter) {
            pattern.push('\\');
        }
        pattern.push(letter);
    }
    pattern
}

/// The line that gives a user just these.
pub fn set_permissions(vhost: &str, user: &str, exchange: &str, queues: &[String], declare: bool) -> String {
    let patterns = permissions(exchange, queues, declare).map(|pattern| word(&pattern));
    format!("rabbitmqctl set_permissions -p {} {} {}", word(vhost), word(user), patterns.join(" "))
}

impl Account {
    pub(super) fn of(address: &Address, settings: &Settings) -> Self {
        let is_by_certificate = address.is_by_certificate();
        Self {
            host: address.to_string(),
            user: if is_by_certificate { OF_CERTIFICATE.to_owned() } else { address.user.clone() },
            is_by_certificate,
            vhost: address.vhost.clone(),
            exchange: settings.exchange.clone(),
            declare: settings.declare,
            queues: settings.queues.clone(),
            is_guest_from_afar: address.is_guest() && !address.is_loopback(),
        }
    }

    /// Why there is no session.
    pub(super) fn outside(&self, fault: &Fault) -> Error {
        match fault {
            Fault::Closed(close) => Error::Lacking(self.refused_entry(close)),
            fault => Error::Unreachable { host: self.host.clone(), problem: explain(fault) },
        }
    }

    /// What a fault behind the login means.
    pub(super) fn failure(&self, fault: &Fault) -> Error {
        let Fault::Closed(close) = fault else { return Error::Broken(explain(fault)) };
        match (close.code, close.method) {
            // As it is, neither can be mended by waiting.
            (406, DECLARE) if close.text.contains("inequivalent arg") => Error::Setup(self.other_exchange(&close.text)),
            (406, PUBLISH) if close.text.contains("larger than") => Error::Setup(Finding::new(
                sentence(&close.text),
                Remedy::act(
                    "set rabbitmq.message_bytes_max to the broker's max_message_size, so that the row is named",
                ),
            )),
            _ => self.refused(close).map_or_else(|| Error::Broken(explain(fault)), Error::Lacking),
        }
    }

    fn refused_entry(&self, close: &Close) -> Finding {
        let Self { host, user, vhost, .. } = self;
        let text = sentence(&close.text);
        let problem = format!("the broker at {host} refuses user {user}, vhost {vhost}: {text}");
        let remedy = match close.code {
            530 if vhost.is_empty() => Remedy::act(
                "leave out the `/` at the end of rabbitmq.url, which names the vhost of the empty name; the vhost / is /%2F \
                 or nothing at all",
            ),
            530 if text.contains("frame_max") => {
                Remedy::act("leave frame_max out of rabbitmq.url, or set it to 8192 at least")
            }
            530 if text.contains("not found") => {
                let permitted = self.permit(text);
                let made = Remedy::shell(format!("rabbitmqctl add_vhost {}", word(vhost)));
                permitted.steps().iter().cloned().fold(made, Remedy::then).mind("Or check the vhost of rabbitmq.url")
            }
            530 if text.contains("user connection limit") => match self.who(text) {
                Some(user) => Remedy::shell(format!("rabbitmqctl clear_user_limits {} max-connections", word(user))),
                None => Remedy::act("raise that limit, or close connections"),
            },
            530 if text.contains("node connection limit") => {
                Remedy::act("raise connection_max in the broker's configuration, or close connections")
            }
            530 if text.contains("connection limit") => {
                Remedy::shell(format!("rabbitmqctl clear_vhost_limits -p {}", word(vhost)))
            }
            530 if text.contains("refused") => self.permit(text),
            403 if self.is_guest_from_afar => Remedy::shell(format!("rabbitmqctl add_user {USER}"))
                .then_shell(set_permissions(vhost, USER, &self.exchange, &self.queues, self.declare))
                .then_act(format!("put {USER} and its password into rabbitmq.url"))
                .mind("RabbitMQ lets guest in from its own machine only"),
            403 if self.is_by_certificate => Remedy::act(
                "see in the broker's log which user it takes the certificate for, and add that one: rabbitmqctl add_user; \
                 ssl_cert_login_from says which part of the certificate it is",
            ),
            403 => Remedy::shell(format!("rabbitmqctl change_password {}", word(user))).mind(format!(
                "Or check user, password, vhost and permissions of rabbitmq.url; a user that does not exist looks the \
                 same: rabbitmqctl add_user {}. rabbitmq.url is read at the start: a change of it needs a restart",
                word(user)
            )),
            _ => Remedy::default(),
        };
        Finding::new(problem, remedy)
    }

    fn refused(&self, close: &Close) -> Option<Finding> {
        let Self { user, exchange, .. } = self;
        let text = sentence(&close.text);
        Some(match (close.code, close.method) {
            (403, DECLARE) if text.contains("reserved prefix") => Finding::new(
                format!("exchange {exchange} has a name that is the broker's own: {text}"),
                Remedy::act("set rabbitmq.exchange to a name that does not begin with amq."),
            ),
            (406, DECLARE) => Finding::new(
                format!("the broker does not declare exchange {exchange}: {text}"),
                Remedy::act("raise that limit, or delete exchanges that nobody needs"),
            ),
            (404, DECLARE | PUBLISH) if self.declare => Finding::new(
                format!("exchange {exchange} is gone: somebody deleted it, and its bindings with it"),
                Remedy::act("bind its queues again; the next session declares it"),
            ),
            (404, DECLARE | PUBLISH) => Finding::new(
                format!("exchange {exchange} does not exist"),
                Remedy::setting("rabbitmq.declare", "true")
                    .mind("Or let whoever owns it create it; this user then needs the permission to configure it"),
            ),
            (403, PUBLISH) if text.contains("internal exchange") => Finding::new(
                format!("exchange {exchange} is internal, and nobody may publish to it"),
                Remedy::act("set rabbitmq.exchange to another"),
            ),
            (403, PUBLISH) if is_about_topic(close) => Finding::new(
                format!("the broker lets user {user} publish to exchange {exchange} with some routing keys only: {text}"),
                match self.who(text) {
                    Some(user) => Remedy::shell(format!(
                        "rabbitmqctl clear_topic_permissions -p {} {} {}",
                        word(&self.vhost),
                        word(user),
                        word(exchange)
                    )),
                    None => Remedy::act("clear that user's topic permissions"),
                }
                .mind("Or set_topic_permissions with a pattern that has every key of rabbitmq.routing_key"),
            ),
            (403, LOOK_AT_QUEUE) => Finding::new(
                format!("the broker does not let user {user} look at a queue of rabbitmq.queues: {text}"),
                self.permit(text),
            ),
            (_, LOOK_AT_QUEUE) => absent(text),
            (403, DECLARE) if self.declare => Finding::new(
                format!("the broker does not let user {user} declare exchange {exchange}"),
                self.permit(text).mind(
                    "Or, where the exchange exists, set rabbitmq.declare=false. The line replaces what the user may do in \
                     this vhost",
                ),
            ),
            (403, DECLARE) => Finding::new(
                format!("the broker does not let user {user} look at exchange {exchange}"),
                self.permit(text).mind(
                    "RabbitMQ 4.2.6 and 4.3.0 ask for the permission to configure it, the first pattern, where others ask \
                     for none or any: update it. The line replaces what the user may do in this vhost",
                ),
            ),
            (403, PUBLISH) => Finding::new(
                format!("the broker does not let user {user} publish to exchange {exchange}"),
                self.permit(text),
            ),
            _ => return None,
        })
    }

    /// An exchange of the name that is not what would be declared.
    fn other_exchange(&self, text: &str) -> Finding {
        Finding::new(
            format!("exchange {} exists and is not a durable topic exchange: {}", self.exchange, sentence(text)),
            Remedy::setting("rabbitmq.declare", "false")
                .mind("It is then used as it is; or choose another rabbitmq.exchange"),
        )
    }

    /// Whom the broker refuses: by its own words, or by ours.
    fn who<'a>(&'a self, text: &'a str) -> Option<&'a str> {
        let named = text.split_once("for user '").and_then(|(_, rest)| rest.rsplit_once('\'')).map(|(user, _)| user);
        named.or((!self.is_by_certificate).then_some(self.user.as_str()))
    }

    fn permit(&self, text: &str) -> Remedy {
        let permit = |user: &str| set_permissions(&self.vhost, user, &self.exchange, &self.queues, self.declare);
        let remedy = match self.who(text) {
            Some(user) => Remedy::shell(permit(user)),
            None => Remedy::act(format!("as that user, whom the broker's log names: {}", permit("USER"))),
        };
        remedy.mind("The line replaces what the user may do in this vhost")
    }
}

/// A queue that cannot take messages now. RabbitMQ would confirm what another queue took, and this one would never have it.
fn absent(text: &str) -> Finding {
    let remedy = if text.contains("home node") {
        Remedy::act("see that the node runs that holds it; a stream may need seconds more after its node has started")
    } else {
        Remedy::act("declare it and bind it to the exchange")
    };
    let mind = "Or take it out of rabbitmq.queues; nothing is published before all of them are there";
    Finding::new(format!("a queue of rabbitmq.queues cannot take messages: {text}"), remedy.mind(mind))
}

/// Whether it is the routing key that is refused.
pub(super) fn is_about_topic(close: &Close) -> bool {
    close.code == 403 && close.method == PUBLISH && close.text.contains("to topic")
}

/// What happened. Never a URI, never a body.
pub(super) fn explain(fault: &Fault) -> String {
    match fault {
        Fault::Lost(problem) => problem.clone(),
        Fault::Protocol(problem) => format!("the broker broke the protocol: {problem}"),
        Fault::Closed(close) => format!("the broker closed the connection: {}", sentence(&close.text)),
    }
}

/// RabbitMQ ends its sentences, ours go on.
fn sentence(text: &str) -> &str {
    text.trim_end_matches('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(is_guest_from_afar: bool) -> Account {
        let text = |text: &str| text.to_owned();
        let (host, user, vhost, exchange) = (text("rabbit:5672"), text("relay"), text("/"), text("out.box"));
        let (queues, is_by_certificate) = (Vec::new(), false);
        Account { host, user, vhost, exchange, declare: true, queues, is_guest_from_afar, is_by_certificate }
    }

    #[test]
    fn a_certificates_user_is_the_one_whom_the_broker_names() {
        let account = Account { user: OF_CERTIFICATE.to_owned(), is_by_certificate: true, ..account(false) };
        let close = |code, text: &str, method| Close { code, text: text.to_owned(), method };
        let named =
            "ACCESS_REFUSED - configure access to exchange 'out.box' in vhost '/' refused for user 'CN=it's,O=x'";
        let found = account.refused(&close(403, named, DECLARE)).unwrap();
        let step = found.remedy.steps()[0].text();
        assert!(step.starts_with(r"rabbitmqctl set_permissions -p / 'CN=it'\''s,O=x' "), "{step}");
        for text in ["ACCESS_REFUSED - Login was refused using authentication mechanism EXTERNAL", "x refused"] {
            for code in [403, 530] {
                let steps = account.refused_entry(&close(code, text, (0, 0))).remedy.steps().to_vec();
                assert!(!steps.is_empty() && steps.iter().all(|step| step.place() == "do"), "{code} {text}: {steps:?}");
            }
        }
    }

    #[test]
    fn limits_are_told_apart_from_rights_and_from_what_is_there() {
        let account = account(false);
        let close = |code, text: &str, method| Close { code, text: text.to_owned(), method };
        let entry = |text: &str| account.refused_entry(&close(530, text, (0, 0))).remedy.steps()[0].text();
        let node = entry("NOT_ALLOWED - connection refused: node connection limit (5000) is reached");
        assert!(node.contains("connection_max"), "{node}");
        let vhost =
            entry("NOT_ALLOWED - access to vhost '/' refused for user 'relay': connection limit (5) is reached");
        assert_eq!(vhost, "rabbitmqctl clear_vhost_limits -p /");
        let frame = entry("NOT_ALLOWED - negotiated frame_max = 4096 is lower than the minimum allowed value (8192)");
        assert!(frame.contains("8192"), "{frame}");
        let declared = |code, text: &str| account.failure(&Fault::Closed(close(code, text, DECLARE)));
        let limit = "PRECONDITION_FAILED - cannot declare exchange 'x' in vhost '/': exchange limit of 10 is reached";
        let other = "PRECONDITION_FAILED - inequivalent arg 'type' for exchange 'x' in vhost '/'";
        assert!(matches!(declared(406, limit), Error::Lacking(found) if found.problem.contains("limit of 10")));
        assert!(matches!(declared(406, other), Error::Setup(found) if found.problem.contains("inequivalent arg")));
        let reserved = "ACCESS_REFUSED - exchange name 'amq.x' contains reserved prefix 'amq.*'";
        assert!(matches!(declared(403, reserved), Error::Lacking(found) if found.problem.contains("broker's own")));
    }

    #[test]
    fn an_exchange_that_went_is_no_reason_to_set_what_is_set() {
        let gone = Close { code: 404, text: "NOT_FOUND - no exchange 'out.box'".to_owned(), method: PUBLISH };
        let remedy = |declare: bool| {
            let account = Account { declare, ..account(false) };
            account.refused(&gone).unwrap().to_string()
        };
        assert!(remedy(false).contains("set rabbitmq.declare = true"), "{}", remedy(false));
        assert!(!remedy(true).contains("rabbitmq.declare"), "{}", remedy(true));
        assert!(remedy(true).contains("bind"), "{}", remedy(true));
    }

    #[test]
    fn patterns_match_one_exchange_and_no_other() {
        assert_eq!(permissions("out.box", &[], true), ["^out\\.box$", "^out\\.box$", "^$"]);
        assert_eq!(permissions("outbox", &[], false), ["^$", "^outbox$", "^$"]);
        let queues = ["a.b".to_owned(), "c".to_owned()];
        assert_eq!(permissions("outbox", &queues, true), ["^outbox$", "^(outbox|a\\.b|c)$", "^$"]);
        let line = set_permissions("my shop", "relay", "out.box", &[], true);
        assert_eq!(line, r"rabbitmqctl set_permissions -p 'my shop' relay '^out\.box$' '^out\.box$' '^$'");
    }

    #[test]
    fn guest_from_elsewhere_is_told_apart_from_a_wrong_password() {
        let close = Close { code: 403, text: "ACCESS_REFUSED - Login was refused".to_owned(), method: (0, 0) };
        let first = |afar: bool| account(afar).refused_entry(&close).remedy.steps()[0].text();
        assert_eq!(first(true), "rabbitmqctl add_user pgoutbox_relay");
        assert_eq!(first(false), "rabbitmqctl change_password relay");
    }
}

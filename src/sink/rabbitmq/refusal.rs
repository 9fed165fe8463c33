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
}

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
        Self {
            host: address.to_string(),
            user: address.user.clone(),
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
            (406, DECLARE) => Error::Setup(self.other_exchange()),
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
            530 if text.contains("not found") => Remedy::shell(format!("rabbitmqctl add_vhost {}", word(vhost)))
                .then_shell(self.set_permissions())
                .mind("Or check the vhost of rabbitmq.url"),
            530 if text.contains("user connection limit") => {
                Remedy::shell(format!("rabbitmqctl clear_user_limits {} max-connections", word(user)))
            }
            530 if text.contains("connection limit") => {
                Remedy::shell(format!("rabbitmqctl clear_vhost_limits -p {}", word(vhost)))
            }
            530 if text.contains("refused") => self.permit(),
            403 if self.is_guest_from_afar => Remedy::shell(format!("rabbitmqctl add_user {USER}"))
                .then_shell(set_permissions(vhost, USER, &self.exchange, &self.queues, self.declare))
                .then_act(format!("put {USER} and its password into rabbitmq.url"))
                .mind("RabbitMQ lets guest in from its own machine only"),
            403 => Remedy::shell(format!("rabbitmqctl change_password {}", word(user))).mind(format!(
                "Or check user, password, vhost and permissions of rabbitmq.url; a user that does not exist looks the \
                 same: rabbitmqctl add_user {}",
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
                Remedy::shell(format!(
                    "rabbitmqctl clear_topic_permissions -p {} {} {}",
                    word(&self.vhost),
                    word(user),
                    word(exchange)
                ))
                .mind("Or set_topic_permissions with a pattern that has every key of rabbitmq.routing_key"),
            ),
            (403, LOOK_AT_QUEUE) => Finding::new(
                format!("the broker does not let user {user} look at a queue of rabbitmq.queues: {text}"),
                self.permit(),
            ),
            (_, LOOK_AT_QUEUE) => absent(text),
            (403, DECLARE) if self.declare => Finding::new(
                format!("the broker does not let user {user} declare exchange {exchange}"),
                self.permit().mind(
                    "Or, where the exchange exists, set rabbitmq.declare=false. The line replaces what the user may do in \
                     this vhost",
                ),
            ),
            (403, DECLARE) => Finding::new(
                format!("the broker does not let user {user} look at exchange {exchange}"),
                self.permit().mind(
                    "RabbitMQ 4.2.6 and 4.3.0 ask for the permission to configure it, the first pattern, where others ask \
                     for none or any: update it. The line replaces what the user may do in this vhost",
                ),
            ),
            (403, PUBLISH) => Finding::new(
                format!("the broker does not let user {user} publish to exchange {exchange}"),
                self.permit(),
            ),
            _ => return None,
        })
    }

    /// An exchange of the name that is not what would be declared.
    pub(super) fn other_exchange(&self) -> Finding {
        Finding::new(
            format!("exchange {} exists and is not a durable topic exchange", self.exchange),
            Remedy::setting("rabbitmq.declare", "false")
                .mind("It is then used as it is; or choose another rabbitmq.exchange"),
        )
    }

    fn set_permissions(&self) -> String {
        set_permissions(&self.vhost, &self.user, &self.exchange, &self.queues, self.declare)
    }

    fn permit(&self) -> Remedy {
        Remedy::shell(self.set_permissions()).mind("The line replaces what the user may do in this vhost")
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
        Account { host, user, vhost, exchange, declare: true, queues: Vec::new(), is_guest_from_afar }
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

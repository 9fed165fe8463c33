//! What a publisher needs of the broker, looked at one by one, for `check`: nothing is published, nothing is changed.
//!
//! The traps. A passive declare says that an exchange exists, and neither of what type nor whether we may use it. And the
//! permission to write shows only when something is published: so something is, in a transaction that is rolled back. Some
//! types of exchange keep what passes through them even so; where the exchange is not ours, and may be such a one, the
//! message claims to be another user's, which the broker refuses before it routes.

use std::collections::BTreeSet;

use bytes::BytesMut;

use super::connect::{ask, enter, leave};
use super::frames::{Close, FRAME_OVERHEAD, Fault, Word};
use super::link::Link;
use super::refusal::{Account, is_about_topic};
use super::{Limits, Settings, management, message_bytes_max, wire};
use crate::finding::{Finding, Look, Remedy, explain};
use crate::metrics::Metrics;
use crate::outbox::Message;
use crate::sink::Error;

/// As it calls itself.
const RABBITMQ: &str = "RabbitMQ";

const ACCESS_REFUSED: u16 = 403;
const NOT_FOUND: u16 = 404;
const RESOURCE_LOCKED: u16 = 405;
const PRECONDITION_FAILED: u16 = 406;

/// A look at each costs a round trip.
const KEYS_MAX: usize = 20;

/// What ends a channel and not its connection.
const CHANNEL_FAULTS: [u16; 4] = [ACCESS_REFUSED, NOT_FOUND, RESOURCE_LOCKED, PRECONDITION_FAILED];

/// Nobody's: RabbitMQ refuses a message whose `user_id` is not its publisher.
const SOMEBODY_ELSE: &str = "somebody else, for pgoutbox check";

/// A message that may have to be published, without its body.
#[derive(Clone, Debug)]
pub struct Sample {
    /// All but the body.
    pub message: Message,
    /// Of the body.
    pub body_bytes: u64,
}

/// How closely to look.
#[derive(Clone, Debug, Default)]
pub struct Deep {
    /// Messages such as will be published, as far as they are known.
    pub samples: Vec<Sample>,
    /// Where the management API is; none: where it usually is.
    pub management_url: Option<String>,
}

/// Looks at the first host that lets us in.
pub async fn look(settings: &Settings, deep: Option<&Deep>) -> Vec<Look> {
    let mut looks = Vec::new();
    for address in &settings.addresses {
        let account = Account::of(address, settings);
        let metrics = Metrics::new();
        let place = format!("{} as {}, vhost {}", account.host, account.user, account.vhost);
        match enter(address, &account, &metrics).await {
            Ok(opened) => {
                let server = (opened.product.clone(), opened.version.clone());
                let keys = deep.map(keys).unwrap_or_default();
                let mut probe = Probe { account, metrics, link: opened.link, keys };
                // One host is enough: the others are worth a note.
                let mut looks: Vec<Look> = looks.into_iter().map(Look::demoted).collect();
                looks.push(Look::sound(format!("{} {} at {place}", server.0, server.1)));
                looks.extend(probe.looks(&server.0).await);
                if let Some(deep) = deep {
                    looks.extend(probe.deep_looks(settings, deep, &server.0, &server.1));
                    looks.extend(management::look(address, &probe.account, deep, &probe.keys).await);
                }
                probe.leave().await;
                return looks;
            }
            Err(error) => looks.push(Look::wrong(format!("RabbitMQ at {place}"), finding(&error))),
        }
    }
    looks
}

/// The routing keys of the samples, each once.
fn keys(deep: &Deep) -> Vec<String> {
    let keys: BTreeSet<&str> = deep.samples.iter().map(|sample| &*sample.message.destination).collect();
    keys.into_iter().take(KEYS_MAX).map(str::to_owned).collect()
}

fn finding(error: &Error) -> Finding {
    match error {
        Error::Setup(finding) | Error::Lacking(finding) => finding.clone(),
        error => Finding::new(
            explain(error),
            Remedy::act("see that the broker runs and that host and port in rabbitmq.url are right"),
        ),
    }
}

/// Bugs of confirms, by RabbitMQ's release notes: the first version that has each, the first without it, and what it is.
const BUGS: [([u32; 3], [u32; 3], &str); 4] = [
    ([0, 0, 0], [3, 7, 15], "acks and nacks that come together can be mixed up (rabbitmq-server#1719)"),
    ([0, 0, 0], [3, 10, 0], "of mandatory messages only some may be confirmed (rabbitmq-server#3870)"),
    (
        [3, 9, 0],
        [4, 0, 0],
        "a stream that takes some of the messages and not all may miss confirmed ones after a change of its leader",
    ),
    ([3, 10, 0], [3, 10, 10], "behind mirrored classic queues confirms may stop (rabbitmq-server#6115)"),
];

/// What is known to be wrong with this version.
fn faults(version: &str) -> impl Iterator<Item = &'static str> {
    let mut parts = version.split(['.', '-', '+']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = [(); 3].map(|()| parts.next().unwrap_or(0));
    BUGS.into_iter().filter(move |(first, sound, _)| (*first..*sound).contains(&version)).map(|(_, _, what)| what)
}

/// A connection, for as long as it is looked at.
struct Probe {
    account: Account,
    metrics: Metrics,
    link: Link,
    keys: Vec<String>,
}

/// How the broker took a method.
enum Taken {
    Well,
    /// The channel was closed for it, and is open again.
    Refused(Close),
}

impl Probe {
    async fn looks(&mut self, product: &str) -> Vec<Look> {
        let (exchange, publishing) = (self.exchange_name(), self.publishing_name());
        if product != RABBITMQ {
            // Another broker may obey what RabbitMQ refuses.
            let problem = format!("not looked at: {product} is not {RABBITMQ}");
            return vec![Look::note(exchange, problem, Remedy::default())];
        }
        let found = match self.exchange().await {
            Ok(look) => look,
            Err(error) => Look::wrong(exchange, finding(&error)),
        };
        if found.is_wrong() {
            return vec![found];
        }
        let mut looks = vec![found];
        // Before anything is published: a broker that blocks publishers answers nothing from then on.
        for name in self.account.queues.clone() {
            let look = self.queue(&name).await;
            looks.push(look.unwrap_or_else(|error| Look::wrong(format!("queue {name}"), finding(&error))));
        }
        looks.push(match self.publishing().await {
            Ok(look) => look,
            Err(_) if self.metrics.is_blocked() => Look::note(
                publishing,
                "the broker blocks publishers, and a relay would wait for it",
                Remedy::shell("rabbitmq-diagnostics alarms"),
            ),
            Err(error) => Look::wrong(publishing, finding(&error)),
        });
        looks
    }

    async fn queue(&mut self, name: &str) -> Result<Look, Error> {
        let what = format!("queue {name}");
        let is_there = |word: &Word| *word == Word::QueueDeclareOk;
        let looking = |out: &mut BytesMut| wire::queue_declare_passive(out, name);
        Ok(match self.take("looking at a queue", looking, is_there).await? {
            Taken::Well => Look::sound(what),
            Taken::Refused(close) => Look::wrong(what, finding(&self.account.failure(&Fault::Closed(close)))),
        })
    }

    fn exchange_name(&self) -> String {
        format!("exchange {}", self.account.exchange)
    }

    fn publishing_name(&self) -> String {
        format!("permission to publish to exchange {}", self.account.exchange)
    }

    async fn exchange(&mut self) -> Result<Look, Error> {
        self.open_channel().await?;
        let (name, what) = (self.account.exchange.clone(), self.exchange_name());
        let declared = |word: &Word| *word == Word::ExchangeDeclareOk;
        let looking = |out: &mut BytesMut| wire::exchange_declare(out, &name, false);
        let seen = self.take("looking at the exchange", looking, declared).await?;
        let close = match seen {
            Taken::Well if !self.account.declare => return Ok(Look::sound(what)),
            // It exists: declaring it again asserts what it is, and changes nothing. `run` says the same.
            Taken::Well => {
                let declare = |out: &mut BytesMut| wire::exchange_declare(out, &name, true);
                match self.take("declaring the exchange again", declare, declared).await? {
                    Taken::Well => return Ok(Look::sound(format!("{what}, durable, of type topic"))),
                    Taken::Refused(close) => close,
                }
            }
            Taken::Refused(close) if close.code == NOT_FOUND && self.account.declare => {
                let in_vain = |out: &mut BytesMut| wire::exchange_declare_in_vain(out, &name);
                match self.take("declaring the exchange in vain", in_vain, declared).await? {
                    // The type is refused with the same code as one exchange too many.
                    Taken::Refused(close) if close.code != PRECONDITION_FAILED || close.text.contains("limit") => close,
                    _ => return Ok(Look::sound(format!("{what}, which may be declared"))),
                }
            }
            Taken::Refused(close) => close,
        };
        Ok(Look::wrong(what, finding(&self.account.failure(&Fault::Closed(close)))))
    }

    async fn publishing(&mut self) -> Result<Look, Error> {
        let what = self.publishing_name();
        let selected = |word: &Word| *word == Word::TxSelectOk;
        let rolled_back = |word: &Word| *word == Word::TxRollbackOk;
        // What we declare routes and keeps nothing. What is there already may be of any type.
        let user = (!self.account.declare).then_some(SOMEBODY_ELSE);
        let keys = if self.keys.is_empty() { vec![String::new()] } else { self.keys.clone() };
        for key in &keys {
            self.take("beginning a transaction", wire::tx_select, selected).await?;
            let name = self.account.exchange.clone();
            let publish = |out: &mut BytesMut| {
                wire::publish_in_vain(out, &name, key, user);
                wire::tx_rollback(out);
            };
            match self.take("rolling back a transaction", publish, rolled_back).await? {
                Taken::Well => {}
                // Permissions come first: all is well with them. An exchange that is still to be declared is not there.
                Taken::Refused(close) if close.code == PRECONDITION_FAILED => {}
                Taken::Refused(close) if close.code == NOT_FOUND && self.account.declare => {}
                // Which keys there will be is not known, but some would do.
                Taken::Refused(close) if self.keys.is_empty() && is_about_topic(&close) => {}
                Taken::Refused(close) => {
                    let failure = self.account.failure(&Fault::Closed(close));
                    return Ok(Look::wrong(what, finding(&failure)));
                }
            }
        }
        if self.keys.is_empty() {
            return Ok(Look::sound(what));
        }
        Ok(Look::sound(format!("{what} with routing key {}", keys.join(", "))))
    }

    /// What needs no further word of the broker.
    fn deep_looks(&self, settings: &Settings, deep: &Deep, product: &str, version: &str) -> Vec<Look> {
        let server = format!("{product} {version}");
        let faults: Vec<&str> = faults(version).collect();
        let mut looks = vec![if faults.is_empty() || product != RABBITMQ {
            Look::sound(format!("{server}: no bug of its confirms is known that matters here"))
        } else {
            let remedy = Remedy::act("update RabbitMQ");
            Look::note(server.clone(), format!("known bugs of its confirms: {}", faults.join("; ")), remedy)
        }];
        let usual = message_bytes_max(product, version);
        let set = settings.message_bytes_max;
        if set > usual {
            let problem = format!("more than the {usual} bytes that {server} takes unless its max_message_size is set");
            let remedy = Remedy::shell("rabbitmqctl eval 'application:get_env(rabbit, max_message_size).'")
                .mind("The setting must not be larger; a body in between stops the relay without naming its row");
            looks.push(Look::note(format!("rabbitmq.message_bytes_max = {set}"), problem, remedy));
        }
        let limits = Limits {
            body_bytes: if set == 0 { usual } else { set },
            header_bytes: self.link.frame_max.saturating_sub(FRAME_OVERHEAD),
        };
        let forbidden = deep.samples.iter().find_map(|sample| {
            let problem = limits.forbid(&sample.message, sample.body_bytes)?;
            Some((sample.message.id.escape_debug().to_string(), problem))
        });
        if let Some((id, problem)) = forbidden {
            let problem = format!("row {id} could not be published: {problem}");
            looks.push(Look::note("the last rows", problem, Remedy::act("mend what writes such rows")));
        }
        looks
    }

    async fn open_channel(&mut self) -> Result<(), Error> {
        let opened = |word: &Word| *word == Word::ChannelOpenOk;
        let opening = ask(&mut self.link, &self.metrics, "opening a channel", wire::channel_open, opened);
        opening.await?.map(|_| ()).map_err(|fault| self.account.failure(&fault))
    }

    async fn take(
        &mut self,
        during: &'static str,
        say: impl FnOnce(&mut BytesMut),
        wanted: impl Fn(&Word) -> bool,
    ) -> Result<Taken, Error> {
        match ask(&mut self.link, &self.metrics, during, say, wanted).await? {
            Ok(_) => Ok(Taken::Well),
            Err(Fault::Closed(close)) if CHANNEL_FAULTS.contains(&close.code) => {
                wire::channel_close_ok(self.link.output.tail());
                self.open_channel().await?;
                Ok(Taken::Refused(close))
            }
            Err(fault) => Err(self.account.failure(&fault)),
        }
    }

    async fn leave(mut self) {
        leave(&mut self.link, &self.metrics, "checked").await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bugs_are_known_by_version() {
        for (version, count) in
            [("3.7.14", 2), ("3.9.0", 2), ("3.10.8", 2), ("3.10.10", 1), ("3.13.7", 1), ("4.0.0", 0), ("odd", 2)]
        {
            assert_eq!(faults(version).count(), count, "{version}");
        }
    }
}

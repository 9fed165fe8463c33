//! What stands behind the exchange, by RabbitMQ's management API, for `check --deep`: bindings, and how each queue keeps
//! what it confirms. It is asked where it answers; a relay never needs it.
//!
//! The trap: the API shows queues that a user may not use, and hides what its user may not see. What it says is worth a
//! note, never a verdict.

use std::net::IpAddr;

use serde_json::Value as Json;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::address::{Address, ServerName, Tls};
use super::connect::ANSWER_TIMEOUT;
use super::probe::Deep;
use super::refusal::Account;
use super::tls;
use crate::finding::{Look, Remedy, word};
use crate::http::ask;

/// A look at each costs a question.
const QUEUES_MAX: usize = 50;

/// Where the API is, and who asks.
struct Api {
    /// Of the broker.
    address: Address,
    tls: Option<Tls>,
    host: String,
    port: u16,
    prefix: String,
    authorization: String,
}

/// A binding of the exchange.
struct Binding {
    key: String,
    queue: Option<String>,
}

/// What there is to say.
pub(super) async fn look(address: &Address, account: &Account, deep: &Deep, keys: &[String]) -> Vec<Look> {
    let api = match Api::of(address, deep.management_url.as_deref()) {
        Ok(api) => api,
        Err(problem) => return vec![not_looked(problem)],
    };
    let mut looks: Vec<Look> = api.exposed().into_iter().collect();
    match api.looks(account, keys).await {
        Ok(found) => looks.extend(found),
        Err(problem) => looks.push(not_looked(problem)),
    }
    looks
}

fn not_looked(problem: String) -> Look {
    let remedy = Remedy::default().mind("Give its address with --management-url, and the user the tag `monitoring`");
    Look::note("queues behind the exchange", format!("not looked at: {problem}"), remedy)
}

impl Api {
    fn of(address: &Address, url: Option<&str>) -> Result<Self, String> {
        let authorization = format!("Basic {}", base64(format!("{}:{}", address.user, address.password).as_bytes()));
        let api = |tls: Option<Tls>, host: &str, port: u16, prefix: &str| {
            let (host, prefix) = (host.to_owned(), prefix.to_owned());
            Self { address: address.clone(), tls, host, port, prefix, authorization: authorization.clone() }
        };
        let Some(url) = url else {
            // As safe as the broker itself, which hears the password as well.
            let port = if address.is_tls() { 15_671 } else { 15_672 };
            return Ok(api(address.tls.clone(), &address.host, port, ""));
        };
        // A password in it would come out again in every message.
        if url.contains('@') {
            return Err("--management-url: leave out user and password, they are rabbitmq.url's".to_owned());
        }
        let wrong = || format!("{url:?} is no address such as http://host:15672");
        let (scheme, rest) = url.split_once("://").ok_or_else(wrong)?;
        let is_tls = match scheme {
            "http" => false,
            "https" => true,
            _ => return Err(wrong()),
        };
        let (authority, prefix) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) if !port.ends_with(']') => (host, port.parse().map_err(|_| wrong())?),
            _ => (authority, if is_tls { 443 } else { 80 }),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let system = Tls { roots: None, identity: None, verifies: true, server_name: ServerName::Host };
        let named = |tls: Tls| Tls { server_name: ServerName::Other(host.to_owned()), ..tls };
        let tls = is_tls.then(|| named(address.tls.clone().unwrap_or(system)));
        Ok(api(tls, host, port, prefix.trim_end_matches('/')))
    }

    /// Whether the password goes in clear where the broker itself is not told it so.
    fn exposed(&self) -> Option<Look> {
        let is_here = self.host == "localhost" || self.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        (self.address.is_tls() && self.tls.is_none() && !is_here).then(|| {
            let problem = "http:// carries the password of rabbitmq.url in clear, which amqps:// does not";
            let remedy = Remedy::act("give --management-url as https://").mind("Who listened has the password by now");
            Look::note(format!("management API at {}", self.host), problem, remedy)
        })
    }

    async fn get(&self, path: &str) -> Result<Json, String> {
        let Self { host, port, prefix, .. } = self;
        let place = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        let reached = timeout(ANSWER_TIMEOUT, TcpStream::connect((host.as_str(), *port))).await;
        let socket = reached.map_err(|_| "no answer".to_owned()).and_then(|socket| socket.map_err(|e| e.to_string()));
        let socket = socket.map_err(|problem| format!("no management API at {place}: {problem}"))?;
        let (path, authorization) = (format!("{prefix}/api{path}"), Some(self.authorization.as_str()));
        let answer = match &self.tls {
            Some(wanted) => {
                let securing = timeout(ANSWER_TIMEOUT, tls::secure(socket, &self.address, wanted)).await;
                let stream =
                    securing.map_err(|_| format!("no TLS with the management API at {place}: no answer"))??;
                ask(stream, &place, &path, authorization).await
            }
            None => ask(socket, &place, &path, authorization).await,
        };
        match answer.map_err(|problem| format!("no management API at {place}: {problem}"))? {
            (200, body) => serde_json::from_slice(&body).map_err(|_| format!("no JSON from {place}")),
            (401 | 403, _) => Err(format!("the management API at {place} refuses the user of rabbitmq.url")),
            (404, _) => Ok(Json::Null),
            (code, _) => Err(format!("the management API at {place} answers {code}")),
        }
    }

    async fn looks(&self, account: &Account, keys: &[String]) -> Result<Vec<Look>, String> {
        let (vhost, name) = (escaped(&account.vhost), escaped(&account.exchange));
        let exchange = self.get(&format!("/exchanges/{vhost}/{name}")).await?;
        if exchange.is_null() {
            // Where it is not ours to declare, its absence was told already.
            let still = format!("queues behind exchange {}: it is still to be declared", account.exchange);
            return Ok(account.declare.then(|| Look::sound(still)).into_iter().collect());
        }
        let bindings = self.get(&format!("/exchanges/{vhost}/{name}/bindings/source")).await?;
        let bindings: Vec<Binding> = bindings.as_array().into_iter().flatten().map(binding).collect();
        let mut looks = routing(account, text(&exchange, "type"), &bindings, keys);
        if !argument(&exchange, ["alternate-exchange", "alternate-exchange"]).is_null() {
            let problem = "it has an alternate exchange: what no queue of its own takes goes there, and counts as held";
            looks.push(Look::note(format!("exchange {}", account.exchange), problem, Remedy::default()));
        }
        let (queues, is_alone, unseen) = behind(&account.exchange, &bindings);
        for name in queues {
            let queue = self.get(&format!("/queues/{vhost}/{}", escaped(name))).await?;
            let is_awaited = is_alone || account.queues.iter().any(|queue| queue == name);
            looks.push(if queue.is_null() {
                Look::note(format!("queue {name}"), "not looked at: it is not there any more", Remedy::default())
            } else {
                keeping(name, &queue, is_awaited)
            });
        }
        looks.extend(unseen);
        Ok(looks)
    }
}

fn binding(json: &Json) -> Binding {
    let queue = (json["destination_type"] == "queue").then(|| text(json, "destination").to_owned());
    Binding { key: text(json, "routing_key").to_owned(), queue }
}

fn text<'a>(json: &'a Json, name: &str) -> &'a str {
    json.get(name).and_then(Json::as_str).unwrap_or_default()
}

/// Of an exchange or a queue: its own, or else its policy's.
fn argument<'a>(json: &'a Json, [own, of_policy]: [&str; 2]) -> &'a Json {
    let found = |place: &str, name: &str| json.get(place).and_then(|arguments| arguments.get(name));
    let set = found("arguments", own).filter(|value| !value.is_null());
    set.or_else(|| found("effective_policy_definition", of_policy)).unwrap_or(&Json::Null)
}

/// The queues to look at; whether it is only one, with nothing beside it; and what is not looked at.
fn behind<'a>(exchange: &str, bindings: &'a [Binding]) -> (Vec<&'a str>, bool, Option<Look>) {
    let mut queues: Vec<&str> = bindings.iter().filter_map(|binding| binding.queue.as_deref()).collect();
    queues.sort_unstable();
    queues.dedup();
    let leads_on = bindings.iter().any(|binding| binding.queue.is_none());
    let is_alone = queues.len() == 1 && !leads_on;
    let mut unseen = Vec::new();
    if leads_on {
        unseen.push("the queues behind exchanges that are bound to it".to_owned());
    }
    if queues.len() > QUEUES_MAX {
        unseen.push(format!("{} more queues", queues.len() - QUEUES_MAX));
    }
    queues.truncate(QUEUES_MAX);
    let what = format!("queues behind exchange {exchange}");
    let told = format!("not looked at: {}", unseen.join(" and "));
    (queues, is_alone, (!unseen.is_empty()).then(|| Look::note(what, told, Remedy::default())))
}

/// Whether every key finds a binding.
fn routing(account: &Account, kind: &str, bindings: &[Binding], keys: &[String]) -> Vec<Look> {
    let what = format!("bindings of exchange {}", account.exchange);
    let remedy = Remedy::act("bind a queue; the relay holds what nobody takes, and Postgres its WAL");
    if bindings.is_empty() {
        return vec![Look::note(what, "there is none: every message would be held back", remedy)];
    }
    let takes = |key: &str, binding: &Binding| match kind {
        "topic" => matches(&binding.key, key),
        "direct" => binding.key == key,
        // A fanout takes all; of others only they know.
        _ => true,
    };
    let lonely: Vec<&str> =
        keys.iter().map(String::as_str).filter(|key| !bindings.iter().any(|binding| takes(key, binding))).collect();
    if lonely.is_empty() {
        return vec![Look::sound(what)];
    }
    let problem =
        format!("none takes routing key {}, which is that of a row: such messages are held back", lonely.join(", "));
    vec![Look::note(what, problem, remedy)]
}

/// Whether a topic's pattern takes a key: `*` is one word, `#` any number of words.
fn matches(pattern: &str, key: &str) -> bool {
    let (pattern, key) = (words(pattern), words(key));
    // By how many words of the key are taken, after each word of the pattern; a key of 255 bytes has few.
    let mut taken = vec![false; key.len() + 1];
    if let Some(first) = taken.first_mut() {
        *first = true;
    }
    for word in pattern {
        let mut next = vec![false; key.len() + 1];
        for (index, slot) in next.iter_mut().enumerate() {
            let before = |index: usize| taken.get(index).copied().unwrap_or(false);
            *slot = match word {
                "#" => (0..=index).any(before),
                _ if index == 0 => false,
                "*" => before(index - 1),
                word => before(index - 1) && key.get(index - 1) == Some(&word),
            };
        }
        taken = next;
    }
    taken.last().copied().unwrap_or(false)
}

/// To RabbitMQ an empty text has no word, and not an empty one.
fn words(text: &str) -> Vec<&str> {
    if text.is_empty() { Vec::new() } else { text.split('.').collect() }
}

/// What a confirm of this queue is worth. One that is awaited is the only one, or is looked for before a session begins.
fn keeping(name: &str, queue: &Json, is_awaited: bool) -> Look {
    let kind = match text(queue, "type") {
        "" => "unknown",
        kind => kind,
    };
    let what = format!("queue {name} ({kind})");
    let mut problems = Vec::new();
    if queue["durable"] == false {
        problems.push("it does not survive a restart of the broker");
    } else if kind == "classic" {
        problems.push("it confirms what the operating system has: a loss of power can lose it");
    }
    let is_late = kind == "stream" && !is_awaited;
    if is_late {
        problems.push("right after a start of the broker it misses what the queues beside it take, which is confirmed");
    }
    let is_short = ["max-length", "max-length-bytes"].iter().any(|limit| {
        let argument_name = format!("x-{limit}");
        !argument(queue, [argument_name.as_str(), limit]).is_null()
    });
    let overflow = argument(queue, ["x-overflow", "overflow"]);
    if is_short && kind != "stream" && overflow.as_str().is_none_or(|overflow| overflow == "drop-head") {
        problems.push("when it is full it throws away its oldest messages, which were confirmed");
    }
    if !argument(queue, ["x-message-ttl", "message-ttl"]).is_null() {
        problems.push("it throws away what is too old, which was confirmed");
    }
    let expires = !argument(queue, ["x-expires", "expires"]).is_null();
    if expires || queue["auto_delete"] == true || queue["exclusive"] == true {
        problems.push("it is deleted, with all that it confirmed, when nobody uses it");
    }
    if problems.is_empty() {
        return Look::sound(what);
    }
    let remedy = if kind == "classic" {
        Remedy::act("declare it as a quorum queue: x-queue-type = quorum")
    } else if is_late {
        Remedy::act(format!("add {name} to rabbitmq.queues"))
    } else {
        let vhost = queue.get("vhost").and_then(Json::as_str).unwrap_or("/");
        let list = format!("rabbitmqctl list_queues -p {} name type arguments policy", word(vhost));
        Remedy::shell(format!("{list} | grep {}", word(name)))
    };
    Look::note(what, problems.join("; "), remedy)
}

/// Percent-encodes all but RFC 3986's unreserved characters.
fn escaped(part: &str) -> String {
    let escape = |byte: u8| match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    part.bytes().map(escape).collect()
}

/// RFC 4648.
fn base64(bytes: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let byte = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let letter = LETTERS.get((bits >> (18 - 6 * place) & 63) as usize).copied().unwrap_or(b'=');
            text.push(if place <= chunk.len() { char::from(letter) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::address::Files;
    use super::*;

    #[test]
    fn a_pattern_takes_the_keys_that_rabbitmq_lets_it_take() {
        for (pattern, key, takes) in [
            ("#", "order.placed", true),
            ("#", "", true),
            ("*", "", false),
            ("", "", true),
            ("", "order", false),
            ("*", "order", true),
            ("*.*", ".", true),
            ("order.*", "order.placed", true),
            ("order.*", "order", false),
            ("order.*", "order.placed.now", false),
            ("order.#", "order", true),
            ("order.#.now", "order.placed.now", true),
            ("order.#.now", "order.now", true),
            ("*.placed", "order.placed", true),
            ("order.placed", "order.paid", false),
        ] {
            assert_eq!(matches(pattern, key), takes, "{pattern} {key}");
        }
    }

    #[test]
    fn base64_is_that_of_the_rfc() {
        for (text, coded) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("foobar", "Zm9vYmFy")] {
            assert_eq!(base64(text.as_bytes()), coded);
        }
    }

    #[test]
    fn the_api_is_looked_for_beside_the_broker_or_where_it_is_said_to_be() {
        let place = |uri: &str, url: Option<&str>| {
            let address = Address::parse(uri, &Files::default()).unwrap();
            Api::of(&address, url).map(|api| (api.tls.is_some(), api.host, api.port, api.prefix))
        };
        let at = |is_tls, host: &str, port, prefix: &str| Ok((is_tls, host.to_owned(), port, prefix.to_owned()));
        assert_eq!(place("amqp://u:p@rabbit", None), at(false, "rabbit", 15_672, ""));
        assert_eq!(place("amqps://u:p@rabbit", None), at(true, "rabbit", 15_671, ""));
        assert_eq!(place("amqp://rabbit", Some("https://other/mq/")), at(true, "other", 443, "/mq"));
        assert_eq!(place("amqp://rabbit", Some("http://[::1]:8080")), at(false, "::1", 8080, ""));
        for wrong in ["rabbit:15672", "ftp://rabbit", "http://rabbit:x"] {
            assert!(place("amqp://rabbit", Some(wrong)).is_err());
        }
    }

    #[test]
    fn a_password_that_goes_in_clear_although_the_broker_is_told_it_in_secret_is_worth_a_note() {
        let is_exposed = |uri: &str, url: Option<&str>| {
            let address = Address::parse(uri, &Files::default()).unwrap();
            Api::of(&address, url).unwrap().exposed().is_some()
        };
        assert!(is_exposed("amqps://u:p@rabbit", Some("http://elsewhere:15672")));
        assert!(is_exposed("amqps://u:p@rabbit", Some("http://192.0.2.1")));
        for (uri, url) in [
            ("amqps://u:p@rabbit", None),
            ("amqps://u:p@rabbit", Some("https://elsewhere")),
            ("amqps://u:p@rabbit", Some("http://localhost:15672")),
            ("amqps://u:p@rabbit", Some("http://[::1]:15672")),
            ("amqps://u:p@rabbit", Some("http://127.0.0.2")),
            ("amqp://u:p@rabbit", Some("http://elsewhere")),
        ] {
            assert!(!is_exposed(uri, url), "{uri} {url:?}");
        }
    }

    #[test]
    fn what_is_not_looked_at_is_told_and_a_queue_beside_an_exchange_is_not_alone() {
        let to = |queue: &str| Binding { key: "#".to_owned(), queue: Some(queue.to_owned()) };
        let on = || Binding { key: "#".to_owned(), queue: None };
        assert_eq!(behind("ex", &[to("a"), to("a")]), (vec!["a"], true, None));
        let bindings = [to("a"), on()];
        let (queues, is_alone, unseen) = behind("ex", &bindings);
        assert!(queues == ["a"] && !is_alone);
        assert!(format!("{unseen:?}").contains("behind exchanges that are bound to it"), "{unseen:?}");
        let many: Vec<Binding> = (0..QUEUES_MAX + 7).map(|number| to(&number.to_string())).collect();
        let (queues, is_alone, unseen) = behind("ex", &many);
        assert!(queues.len() == QUEUES_MAX && !is_alone);
        assert!(format!("{unseen:?}").contains("not looked at: 7 more queues"), "{unseen:?}");
    }

    #[test]
    fn a_queue_that_throws_away_what_it_confirmed_is_named() {
        let queue = |text: &str| keeping("q", &serde_json::from_str(text).unwrap(), false);
        let sound = queue(r#"{"type": "quorum", "durable": true, "arguments": {}}"#);
        assert_eq!(sound, Look::sound("queue q (quorum)"));
        for (text, part) in [
            (r#"{"type": "classic", "durable": true, "arguments": {}}"#, "loss of power"),
            (r#"{"type": "classic", "durable": false, "arguments": {}}"#, "restart"),
            (r#"{"type": "quorum", "durable": true, "arguments": {"x-max-length": 5}}"#, "oldest"),
            (r#"{"type": "quorum", "durable": true, "effective_policy_definition": {"message-ttl": 5}}"#, "too old"),
            (r#"{"type": "quorum", "durable": true, "arguments": {"x-expires": 5}}"#, "deleted"),
            (r#"{"type": "quorum", "durable": true, "effective_policy_definition": {"expires": 5}}"#, "deleted"),
            (r#"{"type": "classic", "durable": true, "auto_delete": true}"#, "deleted"),
            (r#"{"type": "classic", "durable": true, "exclusive": true}"#, "deleted"),
        ] {
            let look = format!("{:?}", queue(text));
            assert!(look.contains(part), "{look}");
        }
        let stream = |is_awaited: bool| {
            keeping("s", &serde_json::from_str(r#"{"type": "stream", "durable": true}"#).unwrap(), is_awaited)
        };
        assert_eq!(stream(true), Look::sound("queue s (stream)"));
        assert!(format!("{:?}", stream(false)).contains("add s to rabbitmq.queues"));
        let rejecting = r#"{"type": "quorum", "durable": true,
            "arguments": {"x-max-length": 5, "x-overflow": "reject-publish"}}"#;
        assert_eq!(queue(rejecting), Look::sound("queue q (quorum)"));
    }
}

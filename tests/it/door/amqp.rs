//! `amqp://`: to the host that the URL names and to no other, as the user that it names, with what it asks for.
//!
//! The trap: RabbitMQ takes `guest` from its own machine, so a URL that is misread still opens a session there. So each case
//! has a user, a vhost or a port of its own, and the broker is asked who came.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lapin::ExchangeKind;
use lapin::options::ExchangeDeclareOptions;
use lapin::types::FieldTable;
use pgoutbox::metrics::Metrics;
use pgoutbox::sink::rabbitmq::{Address, Files, Hosts, Settings};
use pgoutbox::sink::{RabbitMq, Sink};

use super::{CANARY, opens, session};
use crate::scripted::amqp::Broker;
use crate::support::consumer::{Consumer, channel};
use crate::support::relay::{Relay, environment, pgoutbox};
use crate::support::{Outbox, eventually, shared_postgres, shared_rabbitmq, unique};

async fn refused(urls: &str) -> String {
    opens(urls, &Files::default()).await.expect_err(urls)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ipv6_address_is_connected_to_and_no_other() {
    let right = TcpListener::bind("[::1]:0").unwrap();
    let port = right.local_addr().unwrap().port();
    let wrong = TcpListener::bind(("127.0.0.1", port)).unwrap();
    wrong.set_nonblocking(true).unwrap();
    let url = format!("amqp://user:{CANARY}@[::1]:{port}/");
    // It is let in, and then nobody says anything.
    let reached = std::thread::spawn(move || right.accept().map(drop));
    let error = refused(&url).await;
    assert!(wrong.accept().is_err(), "somebody else was reached: {error}");
    assert!(error.contains(&format!("[::1]:{port}")), "{error}");
    reached.join().unwrap().unwrap();
}

/// What the broker knows of the connections of a user: vhost, mechanism, frame_max and heartbeat.
fn connections(user: &str) -> Vec<Vec<String>> {
    let columns = ["user", "vhost", "auth_mechanism", "frame_max", "timeout"];
    let listed = shared_rabbitmq().ctl(&[&["list_connections"], &columns[..]].concat()).unwrap();
    let rows = listed.lines().map(|line| line.split('\t').map(str::to_owned).collect::<Vec<_>>());
    rows.filter(|row| row[0] == user).map(|row| row[1..].to_vec()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_broker_sees_who_the_url_names_and_what_it_asks_for() {
    let rabbitmq = shared_rabbitmq();
    let (user, vhost, password) = (unique("re/l@y"), unique("a/b ü"), format!("{CANARY}/?#@:%,&"));
    rabbitmq.ctl(&["add_user", &user, &password]).unwrap();
    rabbitmq.ctl(&["add_vhost", &vhost]).unwrap();
    rabbitmq.ctl(&["set_permissions", "-p", &vhost, &user, ".*", ".*", ".*"]).unwrap();
    let encoded = |text: &str| -> String {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        let one = |byte: u8| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02x}") };
        text.bytes().map(one).collect()
    };
    let base = format!("amqp://{}:{}@127.0.0.1:{}", encoded(&user), encoded(&password), rabbitmq.port());
    let url = format!("{base}/{}", encoded(&vhost));
    for (query, expected) in [
        ("", [vhost.as_str(), "PLAIN", "131072", "10"]),
        ("?auth_mechanism=amqplain&frame_max=8192&heartbeat=7", [&vhost, "AMQPLAIN", "8192", "7"]),
        (
            "?auth_mechanism=AMQPLAIN&auth_mechanism=plain&frame_max=0&channel_max=9",
            [&vhost, "AMQPLAIN", "131072", "10"],
        ),
    ] {
        let session = session(&format!("{url}{query}"), &Files::default()).await.unwrap();
        assert_eq!(connections(&user), [expected], "{query}");
        session.close().await;
    }
    // The empty vhost is none, and who wrote a `/` too many is told so.
    let error = refused(&format!("{base}/")).await;
    assert!(error.contains("Remedy: leave out the `/` at the end"), "{error}");
    let error = refused(&format!("{base}/nowhere")).await;
    assert!(error.contains("check the vhost of rabbitmq.url"), "{error}");
    let error = refused(&format!("{base}/%2f?auth_mechanism=plain")).await;
    assert!(error.contains("access to vhost '/' refused"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn guest_is_explained_where_the_broker_is_not_this_machine() {
    let port = shared_rabbitmq().port();
    // An address that leads here, and says it to nobody; a wrong password is refused with the same words as a guest from afar.
    let error = refused(&format!("amqp://guest:{CANARY}@0.0.0.0:{port}")).await;
    assert!(error.contains("ACCESS_REFUSED") && error.contains("from its own machine only"), "{error}");
    let error = refused(&format!("amqp://guest:{CANARY}@127.0.0.1:{port}")).await;
    assert!(error.contains("check user, password") && !error.contains("own machine"), "{error}");
    let error = refused(&format!("amqp://somebody:{CANARY}@0.0.0.0:{port}")).await;
    assert!(error.contains("check user, password") && !error.contains("own machine"), "{error}");
}

/// A port on which every new connection waits for ever: somebody listens, and his queue is full.
fn black_hole() -> (u16, Vec<socket2::Socket>) {
    let socket = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let listener = socket();
    listener.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut sockets = vec![listener];
    loop {
        let client = socket();
        let connected = client.connect_timeout(&address, Duration::from_millis(300));
        sockets.push(client);
        if connected.is_err() {
            return (address.as_socket().unwrap().port(), sockets);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_host_is_asked_where_one_is_dead_or_says_nothing() {
    let claim = pgoutbox::servers::Port::pick().unwrap();
    let dead = claim.number();
    let (hole, _sockets) = black_hole();
    let good = shared_rabbitmq().port();
    let url = |port: u16, query: &str| format!("amqp://guest:guest@127.0.0.1:{port}{query}");
    opens(&format!("{},{}", url(dead, ""), url(good, "")), &Files::default()).await.unwrap();
    let began = Instant::now();
    let urls = [url(hole, "?connection_timeout=200"), url(dead, ""), url(good, "")].join(", ");
    opens(&urls, &Files::default()).await.unwrap();
    assert!((Duration::from_millis(200)..Duration::from_secs(8)).contains(&began.elapsed()), "{:?}", began.elapsed());
    // Each says why it would not do.
    let error = refused(&[url(dead, ""), url(hole, "?connection_timeout=200"), url(good, "/nowhere")].join(",")).await;
    for part in [
        "no host of 3 will do: ",
        &format!("127.0.0.1:{dead}: Connection refused"),
        &format!("127.0.0.1:{hole}: it did not answer within 200ms"),
        &format!("the broker at 127.0.0.1:{good} refuses user guest, vhost nowhere: "),
    ] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    // What answered and needs a human tells more than what did not answer.
    let (_connection, channel) = channel(&shared_rabbitmq().url()).await;
    let (name, options) = (unique("door"), ExchangeDeclareOptions::default());
    channel.exchange_declare(name.as_str().into(), ExchangeKind::Fanout, options, FieldTable::default()).await.unwrap();
    let addresses = Address::parse_all(&[url(good, ""), url(dead, "")].join(","), &Files::default()).unwrap();
    let settings = Settings { addresses, exchange: name, declare: true, queues: Vec::new(), message_bytes_max: 0 };
    let error = RabbitMq::open(&settings, Arc::new(Metrics::new())).await.err().unwrap().to_string();
    assert!(error.contains("is not a durable topic exchange"), "{error}");
}

/// One that lacks the exchange, for instance: its alarm says nothing about the next one, which would never say that it is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_alarm_of_a_host_that_will_not_do_does_not_block_the_next_one() {
    let blocking = Broker::start(usize::MAX, |wire| {
        wire.handshake_until(40)?;
        wire.blocked("low on disk")?;
        wire.end(1, 404, "NOT_FOUND - no exchange 'outbox' in vhost '/'")?;
        wire.listen()
    });
    let urls = format!("{},{}", blocking.url(), Broker::honest().url());
    let addresses = Address::parse_all(&urls, &Files::default()).unwrap();
    let (exchange, queues) = ("outbox".to_owned(), Vec::new());
    let settings = Settings { addresses, exchange, declare: true, queues, message_bytes_max: 0 };
    let metrics = Arc::new(Metrics::new());
    let session = RabbitMq::open(&settings, metrics.clone()).await.unwrap();
    assert_eq!(blocking.connections(), 1);
    assert!(!metrics.is_blocked(), "{:?}", metrics.reasons());
    session.close().await;
}

/// It lets publishers in before its streams have leaders.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_was_away_is_given_time_unless_what_it_needs_is_looked_at() {
    const STREAMS_NEED: Duration = Duration::from_secs(3);
    for (queues, is_given_time) in [(vec![], true), (vec!["orders".to_owned()], false)] {
        // It closes its first connection without a word.
        let broker = Broker::start(1, |_| Ok(()));
        let addresses = Address::parse_all(&broker.url(), &Files::default()).unwrap();
        let settings =
            Settings { addresses, exchange: "outbox".to_owned(), declare: true, queues, message_bytes_max: 0 };
        let mut hosts = Hosts::new(settings, Arc::new(Metrics::new()));
        assert!(hosts.open().await.is_err());
        let began = Instant::now();
        hosts.open().await.unwrap();
        let then = Instant::now();
        assert_eq!(then - began >= STREAMS_NEED, is_given_time, "{:?}", then - began);
        hosts.open().await.unwrap();
        assert!(then.elapsed() < STREAMS_NEED, "it was not away");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_way_that_others_can_listen_to_is_warned_of_once() {
    let mut outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
    let consumer = Consumer::start(&outbox).await;
    let warned = |log: &str| log.matches("amqp:// is not encrypted").count();
    let rabbitmq = shared_rabbitmq();
    let user = unique("warned");
    rabbitmq.ctl(&["add_user", &user, CANARY]).unwrap();
    rabbitmq.ctl(&["set_permissions", &user, ".*", ".*", ".*"]).unwrap();
    for (host, count) in [("0.0.0.0", 1), ("localhost", 0)] {
        outbox.amqp = format!("amqp://{user}:{CANARY}@{host}:{}/%2f", rabbitmq.port());
        let relay = Relay::start(&outbox);
        relay.ready().await;
        outbox.insert("placed").await;
        consumer.wait_distinct(2 - count).await;
        // Another session warns of nothing new.
        let sessions = || relay.metric("pgoutbox_sessions_total{end=\"broker\"}");
        rabbitmq.ctl(&["close_all_user_connections", &user, "maintenance"]).unwrap();
        eventually("the session ends", || async { sessions() >= 1.0 }).await;
        relay.ready().await;
        let log = relay.log();
        assert!(!log.contains(CANARY), "{log}");
        assert_eq!(warned(&log), count, "{log}");
        assert_eq!(relay.stop(), 0);
    }
    let output = pgoutbox()
        .arg("check")
        .envs(environment(&outbox.url, &outbox.amqp.replace("localhost", "0.0.0.0"), &outbox.name))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let note = |line: &&str| line.starts_with("note   RabbitMQ at 0.0.0.0:") && line.contains("not encrypted");
    assert_eq!(told.lines().filter(note).count(), 1, "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_that_cannot_be_is_refused_before_any_network() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let base = format!("amqp://user:{CANARY}@127.0.0.1:{port}/%2f");
    for (url, settings, part) in [
        (format!("{base}?hartbeat=5"), &[][..], "rabbitmq.url: hartbeat is unknown. Remedy: leave it out; known are"),
        (format!("{base}?verify=verify_peer"), &[], "rabbitmq.url: verify is of TLS"),
        (format!("{base},{base}/x"), &[], "rabbitmq.url: URL 2: a vhost with a `/` in it"),
        (format!("amqp://user:{CANARY}?@127.0.0.1:{port}"), &[], "write %40 for @"),
        (base.clone(), &["rabbitmq.tls_ca=/ca.pem"], "which is without TLS; say amqps://"),
        (base.replace("amqp", "amqps"), &["rabbitmq.tls_key=/key.pem"], "it goes together with rabbitmq.tls_key"),
    ] {
        let mut command = pgoutbox();
        command.arg("check").envs(environment("postgres://u@127.0.0.1:1/d", &url, "x"));
        settings.iter().for_each(|setting| _ = command.args(["--set", setting]));
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{text}");
        assert!(text.contains(part) && !text.contains(CANARY), "{text}");
    }
    assert!(listener.accept().is_err(), "somebody was asked");
}

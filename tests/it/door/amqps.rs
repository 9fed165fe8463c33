//! `amqps://`: the certificates that OpenSSL takes and no others, client certificates, logins by them, and ports mixed up.
//!
//! The trap: in TLS 1.3 a client is through with its handshake before the broker has looked at its certificate. So "it
//! connected" is no proof; what counts is a session on which AMQP is spoken.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pgoutbox::servers::{Extras, Port, RabbitMq, Tls};
use pgoutbox::sink::Sink;
use pgoutbox::sink::rabbitmq::{Address, Files, Settings};
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, date_time_ymd};

use super::tls::kinds;
use super::{Authority, CANARY, Home, Issued, mode, named, opens, session};
use crate::support::consumer::Consumer;
use crate::support::relay::{Relay, environment, pgoutbox};
use crate::support::{Outbox, rabbitmq_4, shared_postgres};

/// Lets in by certificate, too; the user is the Common Name.
const LOGIN: &str = "auth_mechanisms.1 = PLAIN\nauth_mechanisms.2 = AMQPLAIN\nauth_mechanisms.3 = EXTERNAL\n\
                     ssl_cert_login_from = common_name\n";

/// A broker with a right certificate that trusts what this authority signs.
fn broker(authority: &Authority, demands_certificate: bool) -> RabbitMq {
    broker_from(Path::new("/"), authority, demands_certificate)
}

fn broker_from(root: &Path, authority: &Authority, demands_certificate: bool) -> RabbitMq {
    let issued = authority.issue(named(&["localhost", "127.0.0.1"], "x"));
    let tls = Tls {
        authorities: authority.pem.clone(),
        certificate: issued.certificate,
        key: issued.key,
        demands_certificate,
    };
    let plugins = vec!["rabbitmq_auth_mechanism_ssl".to_owned()];
    let extras = Extras { plugins, configuration: LOGIN.to_owned(), tls: Some(tls) };
    RabbitMq::start_from_with(root, &extras).unwrap()
}

fn url(broker: &RabbitMq, host: &str, query: &str) -> String {
    format!("amqps://guest:guest@{host}:{}/%2f{query}", broker.tls_port().unwrap())
}

fn trusting(path: &Path) -> Files {
    Files { roots: Some(path.to_owned()), ..Files::default() }
}

async fn refused(urls: &str, files: &Files) -> String {
    opens(urls, files).await.expect_err(urls)
}

/// Whether OpenSSL takes the certificate that is shown there, for this name.
fn openssl_takes(port: u16, name: &str, roots: &Path) -> bool {
    let check = if name.parse::<std::net::IpAddr>().is_ok() { "-verify_ip" } else { "-verify_hostname" };
    let mut command = Command::new("openssl");
    command.args(["s_client", "-brief", "-verify_return_error", "-connect"]).arg(format!("127.0.0.1:{port}"));
    command.args([check, name, "-CAfile"]).arg(roots);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success()
}

/// Certificates that only names tell apart, and one that OpenSSL takes and we do not.
fn more_kinds(authority: &Authority) -> Vec<(&'static str, Issued, String)> {
    let of = |names: &[&str], common_name| authority.issue(named(names, common_name));
    let mut authority_itself = named(&["localhost", "127.0.0.1"], "x");
    authority_itself.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let two_names = |mut params: CertificateParams| {
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "o");
        params
    };
    let all = [
        ("with a star", of(&["*.example.com"], "x")),
        ("with a star in its Common Name", of(&[], "*.example.com")),
        ("with a star below the top", of(&["*.com"], "x")),
        ("with a star in a label", of(&["rab*.example.com"], "x")),
        ("with an underscore", of(&["rab_bit.example.com"], "x")),
        ("with an address as Common Name", of(&[], "127.0.0.1")),
        ("with a Common Name beside another name", of(&["other.example"], "rabbit.example.com")),
        ("with a Common Name beside an address", authority.issue(two_names(named(&["127.0.0.1"], "localhost")))),
        ("an authority, of an authority", authority.issue(authority_itself)),
    ];
    all.into_iter().map(|(kind, issued)| (kind, issued, authority.pem.clone())).collect()
}

/// Where we are stricter than OpenSSL on purpose: a star is a whole label (RFC 6125), and an authority is no server.
const STRICTER: [(&str, &[&str]); 2] = [
    ("with a star in a label", &["rabbit.example.com"]),
    ("an authority, of an authority", &["localhost", "127.0.0.1"]),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_openssl_takes_is_taken_and_what_it_refuses_is_refused() {
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let broker = broker(&authority, false);
    let home = Home::new();
    let (mut taken, mut refused) = (Vec::new(), 0);
    for (kind, issued, root) in kinds(&authority, &other).into_iter().chain(more_kinds(&authority)) {
        broker.show(&issued.certificate, &issued.key).unwrap();
        let roots = home.write("roots.pem", &root);
        for name in ["localhost", "127.0.0.1", "rabbit.example.com", "rab_bit.example.com", "example.com"] {
            let query = format!("?server_name_indication={name}");
            let (host, query) = if name.contains("example") { ("localhost", &*query) } else { (name, "") };
            let ours = opens(&url(&broker, host, query), &trusting(&roots)).await;
            let theirs = openssl_takes(broker.tls_port().unwrap(), name, &roots);
            let is_stricter = STRICTER.iter().any(|(strict, names)| *strict == kind && names.contains(&name));
            assert_eq!(ours.is_ok(), theirs && !is_stricter, "{kind} for {name}: {ours:?}, OpenSSL: {theirs}");
            assert!(theirs || !is_stricter, "{kind} for {name}: OpenSSL is as strict");
            match ours {
                Ok(()) => taken.push((kind, name)),
                Err(_) => refused += 1,
            }
        }
    }
    for expected in [
        ("right", "localhost"),
        ("right", "127.0.0.1"),
        ("by the manual", "localhost"),
        ("its own authority", "localhost"),
        ("signed by itself", "127.0.0.1"),
        ("with a star", "rabbit.example.com"),
        ("with a star in its Common Name", "rabbit.example.com"),
        ("with a Common Name beside an address", "localhost"),
        ("with an underscore", "rab_bit.example.com"),
    ] {
        assert!(taken.contains(&expected), "{expected:?} is not in {taken:?}");
    }
    assert!(taken.len() >= 14 && refused >= 100, "{} taken, {refused} refused", taken.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_says_what_mends_it() {
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let broker = broker(&authority, false);
    let home = Home::new();
    let (roots, others) = (home.write("roots.pem", &authority.pem), home.write("others.pem", &other.pem));
    let own = super::self_signed_authority();
    let (empty, broken) =
        (home.write("empty.pem", "nothing"), home.write("gone.pem", &Authority::valid("gone", 2020, 2021).pem));
    let localhost = url(&broker, "localhost", "");
    let by_name = url(&broker, "localhost", "?server_name_indication=elsewhere");
    let plain = |url: &str| url.replace("amqps://", "amqp://");
    let to_plain_port =
        localhost.replace(&format!(":{}/", broker.tls_port().unwrap()), &format!(":{}/", broker.port()));
    for (url, files, part) in [
        (
            &by_name,
            trusting(&roots),
            "the broker's certificate is not for elsewhere. Remedy: connect by a name that is in it",
        ),
        (
            &localhost,
            trusting(&others),
            "others.pem. Remedy: name the file with that authority's certificate in rabbitmq.tls_ca",
        ),
        (&localhost, Files::default(), "an authority that is not in the system's certificates. Remedy: "),
        (&localhost, trusting(Path::new("/does/not/exist")), "rabbitmq.tls_ca: /does/not/exist: "),
        (&localhost, trusting(&empty), "no certificate in it (PEM is needed)"),
        (&localhost, trusting(&broken), "gone.pem: no certificate in it can be used, or all have expired"),
        (&plain(&localhost), Files::default(), "say amqps:// in rabbitmq.url"),
        (
            &to_plain_port,
            trusting(&roots),
            "the peer does not speak TLS. Remedy: name the broker's TLS port (by default 5671)",
        ),
    ] {
        let error = refused(&url.replace(":guest@", &format!(":{CANARY}@")), &files).await;
        assert!(error.contains(part) && error.contains("localhost:"), "{part} is not in {error}");
    }
    let mut expired = named(&["localhost"], "x");
    (expired.not_before, expired.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    let expired = authority.issue(expired);
    broker.show(&expired.certificate, &expired.key).unwrap();
    let error = refused(&localhost, &trusting(&roots)).await;
    assert!(error.contains("the broker's certificate has expired. Remedy: "), "{error}");
    broker.show(&own.certificate, &own.key).unwrap();
    let error = refused(&localhost, &trusting(&roots)).await;
    assert!(error.contains("Remedy: put it into rabbitmq.tls_ca, if it is signed by itself"), "{error}");
    opens(&localhost, &trusting(&home.write("own.pem", &own.certificate))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verification_and_names_can_be_given_up_and_that_is_warned_of() {
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let broker = broker(&authority, false);
    let elsewhere = authority.issue(named(&["elsewhere.example"], "x"));
    broker.show(&elsewhere.certificate, &elsewhere.key).unwrap();
    let home = Home::new();
    let (roots, others) = (home.write("roots.pem", &authority.pem), home.write("others.pem", &other.pem));
    for (query, files, is_taken) in [
        ("", trusting(&roots), false),
        ("?verify=verify_peer", trusting(&roots), false),
        ("?verify=verify_none", trusting(&others), true),
        ("?verify=verify_none", Files::default(), true),
        ("?server_name_indication=elsewhere.example", trusting(&roots), true),
        ("?server_name_indication=disable", trusting(&roots), true),
        ("?server_name_indication=disable", trusting(&others), false),
        ("?server_name_indication=disable", Files::default(), false),
    ] {
        let found = opens(&url(&broker, "localhost", query), &files).await;
        assert_eq!(found.is_ok(), is_taken, "{query} {files:?}: {found:?}");
    }
    let outbox = Outbox::create(shared_postgres(), &broker).await;
    let authorities = format!("rabbitmq.tls_ca={}", roots.display());
    for (query, part) in [
        ("?verify=verify_none", "verify=verify_none: whoever is in between can pose as the broker"),
        ("?server_name_indication=disable", "server_name_indication=disable: whoever has a certificate"),
        ("?server_name_indication=elsewhere.example", ""),
    ] {
        let url = url(&broker, "localhost", query);
        let output = pgoutbox()
            .args(["check", "--set", &authorities])
            .envs(environment(&outbox.url, &url, &outbox.name))
            .output()
            .unwrap();
        let lines = String::from_utf8_lossy(&output.stdout);
        let notes: Vec<&str> = lines.lines().filter(|line| line.starts_with("note   RabbitMQ at localhost:")).collect();
        assert_eq!(notes.len(), usize::from(!part.is_empty()), "{lines}");
        assert!(notes.iter().all(|note| note.contains(part)), "{lines}");
        let is_ok = |line: &str| line.starts_with("ok     RabbitMQ ") && line.contains(" at localhost:");
        assert!(lines.lines().any(is_ok), "{lines}");
    }
}

/// Files with a certificate and its key.
fn written(home: &Home, name: &str, issued: &Issued) -> (PathBuf, PathBuf) {
    (home.write(&format!("{name}.crt"), &issued.certificate), home.write(&format!("{name}.key"), &issued.key))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_certificate_is_shown_where_it_is_demanded_and_can_be_the_login() {
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let broker = broker(&authority, true);
    broker.ctl(&["add_user", "relay", CANARY]).unwrap();
    broker.ctl(&["clear_password", "relay"]).unwrap();
    broker.ctl(&["set_permissions", "relay", ".*", ".*", ".*"]).unwrap();
    let home = Home::new();
    let roots = home.write("roots.pem", &authority.pem);
    let (certificate, key) = written(&home, "relay", &authority.issue(named(&[], "relay")));
    let files = |certificate: &Path, key: &Path| Files {
        roots: Some(roots.clone()),
        certificate: Some(certificate.to_owned()),
        key: Some(key.to_owned()),
    };
    let ours = files(&certificate, &key);
    let plain = url(&broker, "localhost", "");
    let external = plain.replace("guest:guest@", "") + "?auth_mechanism=external";
    // By settings, and by the URL.
    opens(&plain, &ours).await.unwrap();
    let shown = (certificate.display(), key.display());
    let (in_url, with_roots) = (format!("certfile={}&keyfile={}", shown.0, shown.1), trusting(&roots));
    opens(&format!("{plain}?{in_url}"), &with_roots).await.unwrap();
    opens(&format!("{external}&{in_url}&auth_mechanism=plain"), &with_roots).await.unwrap();
    let session = session(&external, &ours).await.unwrap();
    let listed = broker.ctl(&["list_connections", "user", "auth_mechanism", "ssl"]).unwrap();
    assert!(listed.lines().any(|line| line == "relay\tEXTERNAL\ttrue"), "{listed}");
    session.close().await;
    // Without, of somebody else, or of nobody that the broker knows.
    let error = refused(&plain, &with_roots).await;
    // Whichever comes first, the broker's word or its reset.
    let told = ["the broker demands a client certificate. Remedy: ", "it may demand a client certificate"];
    assert!(told.iter().any(|told| error.contains(told)), "{error}");
    let (foreign, foreign_key) = written(&home, "foreign", &other.issue(named(&[], "relay")));
    let error = refused(&plain, &files(&foreign, &foreign_key)).await;
    assert!(error.contains("Remedy: its log says why"), "{error}");
    let (unknown, unknown_key) = written(&home, "unknown", &authority.issue(named(&[], "nobody")));
    let error = refused(&external, &files(&unknown, &unknown_key)).await;
    assert!(error.contains("ACCESS_REFUSED"), "{error}");
    // Files that cannot be.
    let error = refused(&plain, &files(&certificate, &foreign_key)).await;
    assert!(error.contains("does not belong to rabbitmq.tls_key"), "{error}");
    let error = refused(&plain, &files(&certificate, Path::new("/does/not/exist"))).await;
    assert!(error.contains("rabbitmq.tls_key: /does/not/exist: "), "{error}");
    let error = refused(&plain, &files(&certificate, &roots)).await;
    assert!(error.contains("roots.pem holds no private key that can be read"), "{error}");
    // A key of which others may know is used, since secrets are mounted so, and warned of.
    mode(&key, 0o644);
    opens(&plain, &ours).await.unwrap();
    let addresses = Address::parse_all(&plain, &ours).unwrap();
    let settings = Settings {
        addresses,
        exchange: "amq.topic".to_owned(),
        declare: false,
        queues: Vec::new(),
        message_bytes_max: 0,
    };
    let warnings = settings.warnings().join("");
    assert!(warnings.contains("rabbitmq.tls_key: ") && warnings.contains("Remedy: chmod 600"), "{warnings}");
    mode(&key, 0o600);
    assert!(settings.warnings().is_empty());
    // Read for every session: a certificate can be renewed under a running relay.
    let renewed = authority.issue_with(named(&[], "relay"), &KeyPair::generate().unwrap());
    written(&home, "relay", &renewed);
    opens(&plain, &ours).await.unwrap();
    // A broker that knows no login by certificate says what it knows.
    broker.ctl(&["eval", "application:set_env(rabbit, auth_mechanisms, ['PLAIN'])."]).unwrap();
    let error = refused(&external, &ours).await;
    assert!(error.contains("no login by EXTERNAL, only by PLAIN. Remedy: enable its plugin"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_delivers_over_tls_to_the_first_host_that_lives() {
    let authority = Authority::new("one");
    let broker = broker(&authority, false);
    broker.ctl(&["add_user", "relay", CANARY]).unwrap();
    broker.ctl(&["set_permissions", "relay", ".*", ".*", ".*"]).unwrap();
    let home = Home::new();
    let roots = home.write("roots.pem", &authority.pem);
    let outbox = Outbox::create(shared_postgres(), &broker).await;
    let consumer = Consumer::start(&outbox).await;
    let dead = Port::pick().unwrap();
    let urls =
        [dead.number(), broker.tls_port().unwrap()].map(|port| format!("amqps://relay:{CANARY}@localhost:{port}/%2f"));
    let authorities = roots.display().to_string();
    let relay =
        Relay::start_at(&outbox.url, &urls.join(","), &outbox.name, &[("rabbitmq.tls_ca", authorities.as_str())]);
    relay.ready().await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(outbox.insert("placed").await);
    }
    let large = "insert into outbox (aggregatetype, aggregateid, type, payload) \
                 values ('order', '1', 'placed', to_jsonb(repeat('x', 1000000))) returning id";
    ids.push(outbox.text(large).await.unwrap());
    let received = consumer.wait_distinct(ids.len()).await;
    assert_eq!(received.iter().map(|received| &received.id).collect::<Vec<_>>(), ids.iter().collect::<Vec<_>>());
    let listed = broker.ctl(&["list_connections", "user", "ssl"]).unwrap();
    assert!(listed.lines().any(|line| line == "relay\ttrue") && !listed.contains("relay\tfalse"), "{listed}");
    outbox.wait_confirmed(outbox.current().await).await;
    let told = relay.log() + &relay.get("/readyz").1 + &relay.get("/").1 + &relay.get("/metrics").1;
    assert!(!told.contains(CANARY) && !told.contains("WARN"), "{told}");
    assert_eq!(relay.stop(), 0);
    // The system's certificates are trusted by default; here the system is told which those are.
    for (bundle, is_trusted) in [(&authority.pem, true), (&Authority::new("other").pem, false)] {
        let bundle = home.write("bundle.pem", bundle);
        let output = pgoutbox()
            .arg("check")
            .envs(environment(&outbox.url, &urls.join(","), &outbox.name))
            .env("SSL_CERT_FILE", &bundle)
            .env_remove("SSL_CERT_DIR")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        let is_ok = |line: &str| line.starts_with("ok     RabbitMQ ") && line.contains(" at localhost:");
        assert_eq!(text.lines().any(is_ok), is_trusted, "{text}");
        assert!(!text.contains(CANARY), "{text}");
    }
}

/// Its Erlang is another, and so is its TLS.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_delivers_over_tls_to_rabbitmq_4_and_logs_in_by_certificate() {
    let authority = Authority::new("one");
    let broker = broker_from(&rabbitmq_4(), &authority, true);
    broker.ctl(&["add_user", "relay", CANARY]).unwrap();
    broker.ctl(&["set_permissions", "relay", ".*", ".*", ".*"]).unwrap();
    let home = Home::new();
    let roots = home.write("roots.pem", &authority.pem);
    let (certificate, key) = written(&home, "relay", &authority.issue(named(&[], "relay")));
    let outbox = Outbox::create(shared_postgres(), &broker).await;
    let consumer = Consumer::start(&outbox).await;
    let url = format!("amqps://localhost:{}/%2f?auth_mechanism=external", broker.tls_port().unwrap());
    let settings = [("rabbitmq.tls_ca", roots), ("rabbitmq.tls_certificate", certificate), ("rabbitmq.tls_key", key)];
    let settings = settings.map(|(key, path)| (key, path.display().to_string()));
    let settings: Vec<_> = settings.iter().map(|(key, path)| (*key, path.as_str())).collect();
    let relay = Relay::start_at(&outbox.url, &url, &outbox.name, &settings);
    relay.ready().await;
    let id = outbox.insert("placed").await;
    assert_eq!(consumer.wait_distinct(1).await[0].id, id);
    outbox.wait_confirmed(outbox.current().await).await;
    let listed = broker.ctl(&["list_connections", "user", "ssl"]).unwrap();
    assert!(listed.lines().any(|line| line == "relay\ttrue") && !listed.contains("relay\tfalse"), "{listed}");
    assert_eq!(relay.stop(), 0);
}

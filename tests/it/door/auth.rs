//! Logging in: SCRAM with and without channel binding, what an operator allows a server to ask for, and every refusal's
//! remedy.
//!
//! The trap: a client that asks for channel binding and is content with less is worse than one that never asked.

use pgoutbox::servers::Postgres;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384};

use super::{Authority, CANARY, Home, Issued, agreed, named, openssl, ours, self_signed, show};
use crate::support::{connect, postgres_18, shared_rabbitmq};

/// A server with a role for each way to log in, whose name says it.
async fn server(postgres: Postgres) -> Postgres {
    let client = connect(&postgres.url()).await;
    for (role, method, encryption) in [
        ("by_scram", "scram-sha-256", "scram-sha-256"),
        ("by_md5", "md5", "md5"),
        ("by_password", "password", "scram-sha-256"),
        ("by_trust", "trust", "scram-sha-256"),
    ] {
        let create = format!("create role {role} login superuser password '{CANARY}'");
        client.batch_execute(&format!("set password_encryption = '{encryption}'; {create}")).await.unwrap();
        postgres.append_hba(&format!("host all {role} 127.0.0.1/32 {method}")).unwrap();
        postgres.append_hba(&format!("local all {role} {method}")).unwrap();
    }
    postgres.reload().unwrap();
    postgres
}

fn by_openssl(key: &str, signature: &[&str]) -> Issued {
    let home = Home::new();
    let make = ["req", "-x509", "-nodes", "-newkey", key, "-subj", "/CN=localhost", "-days", "30"];
    openssl(&[&make[..], &["-keyout", "key", "-out", "crt"], signature].concat(), home.path());
    let read = |name: &str| std::fs::read_to_string(home.path().join(name)).unwrap();
    Issued { certificate: read("crt"), key: read("key") }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scram_is_bound_to_every_certificate_that_has_a_hash() {
    let postgres = server(Postgres::start(&[]).unwrap()).await;
    let home = Home::new();
    let by_scram = |binding: &str| {
        let url = postgres.url_for("by_scram", Some(CANARY), "postgres");
        format!("{url}?sslmode=require&channel_binding={binding}")
    };
    let rsa = |signature: &[&str]| by_openssl("rsa:2048", signature);
    let shown = [
        ("RSA with SHA-256", rsa(&["-sha256"])),
        ("RSA with SHA-384", rsa(&["-sha384"])),
        ("RSA with SHA-512", rsa(&["-sha512"])),
        ("RSA-PSS with SHA-512", rsa(&["-sha512", "-sigopt", "rsa_padding_mode:pss"])),
        ("ECDSA with SHA-256", self_signed(&PKCS_ECDSA_P256_SHA256)),
        ("ECDSA with SHA-384", self_signed(&PKCS_ECDSA_P384_SHA384)),
    ];
    for (kind, issued) in shown {
        show(&postgres, &issued);
        for binding in ["disable", "prefer", "require"] {
            assert!(agreed(&by_scram(binding), &home, &[]).await.is_ok_and(|found| found.tls), "{kind}, {binding}");
        }
    }
    // Postgres has no hash for these either, and libpq gives up even where it need not bind.
    show(&postgres, &by_openssl("ed25519", &[]));
    assert!(ours(&by_scram("prefer"), &home, &[]).await.is_ok());
    assert!(agreed(&by_scram("require"), &home, &[]).await.unwrap_err().contains("channel_binding=require needs"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn channel_binding_that_is_required_is_never_done_without() {
    let postgres = server(Postgres::start(&[]).unwrap()).await;
    let home = Home::new();
    for with_tls in [false, true] {
        if with_tls {
            show(&postgres, &Authority::new("one").issue(named(&["127.0.0.1"], "x")));
        }
        for role in ["by_scram", "by_md5", "by_password", "by_trust"] {
            for sslmode in ["disable", "allow", "prefer"] {
                let url = postgres.url_for(role, Some(CANARY), "postgres");
                let url = format!("{url}?channel_binding=require&sslmode={sslmode}");
                let found = agreed(&url, &home, &[]).await;
                let is_bound = with_tls && role == "by_scram" && sslmode != "disable";
                // `allow` begins in the clear, and what we refuse ourselves is not tried again: libpq does the same.
                assert_eq!(found.is_ok(), is_bound && sslmode == "prefer", "{role} {sslmode} {with_tls}: {found:?}");
                if let Err(error) = found {
                    assert!(error.contains("channel_binding=require needs SCRAM bound"), "{error}");
                }
            }
        }
        let socket = format!("host={} port={}", postgres.socket_dir().display(), postgres.port());
        let conninfo = format!("{socket} user=by_scram dbname=postgres password={CANARY} channel_binding=require");
        assert!(agreed(&conninfo, &home, &[]).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_goes_out_in_clear_text_only_where_nobody_can_listen() {
    let postgres = server(Postgres::start(&[]).unwrap()).await;
    let home = Home::new();
    let url = postgres.url_for("by_password", Some(CANARY), "postgres");
    let error = ours(&url, &home, &[]).await.unwrap_err();
    assert!(error.contains("password in clear text") && error.contains("Remedy: sslmode=require"), "{error}");
    for part in ["role by_password", "database postgres", &format!("127.0.0.1:{}", postgres.port())] {
        assert!(error.contains(part), "{error}");
    }
    let socket = format!("host={} port={}", postgres.socket_dir().display(), postgres.port());
    let local = format!("{socket} user=by_password dbname=postgres password={CANARY}");
    assert!(agreed(&local, &home, &[]).await.is_ok());
    show(&postgres, &Authority::new("one").issue(named(&["127.0.0.1"], "x")));
    assert!(agreed(&format!("{url}?sslmode=require"), &home, &[]).await.is_ok_and(|found| found.tls));
    assert!(ours(&format!("{url}?sslmode=disable"), &home, &[]).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_may_ask_only_for_what_require_auth_allows() {
    let postgres = server(Postgres::start(&[]).unwrap()).await;
    show(&postgres, &Authority::new("one").issue(named(&["127.0.0.1"], "x")));
    let home = Home::new();
    let roles = [("by_scram", "scram-sha-256"), ("by_md5", "md5"), ("by_password", "password"), ("by_trust", "none")];
    for (role, method) in roles {
        for (_, word) in roles {
            for (list, is_allowed) in [
                (word.to_owned(), word == method),
                (format!("!{word}"), word != method),
                (format!("gss,{word},none"), word == method || method == "none"),
            ] {
                let url = postgres.url_for(role, Some(CANARY), "postgres");
                let found = ours(&format!("{url}?sslmode=require&require_auth={list}"), &home, &[]).await;
                assert_eq!(found.is_ok(), is_allowed, "{role} with {list}: {found:?}");
                if let Err(error) = found {
                    assert!(error.contains("require_auth forbids that"), "{error}");
                }
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_asks_for_endless_hash_rounds_is_refused() {
    let postgres = Postgres::start_from(&postgres_18(), &[]).unwrap();
    let client = connect(&postgres.url()).await;
    for (role, rounds) in [("few", 100_000), ("endless", 100_001)] {
        let create = format!("create role {role} login superuser password '{CANARY}'");
        client.batch_execute(&format!("set scram_iterations = {rounds}; {create}")).await.unwrap();
    }
    postgres.append_hba("host all few,endless 127.0.0.1/32 scram-sha-256").unwrap();
    postgres.reload().unwrap();
    let home = Home::new();
    assert!(ours(&postgres.url_for("few", Some(CANARY), "postgres"), &home, &[]).await.is_ok());
    let error = ours(&postgres.url_for("endless", Some(CANARY), "postgres"), &home, &[]).await.unwrap_err();
    assert!(error.contains("more than 100000 SCRAM iterations"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refused_login_names_host_role_database_and_what_mends_it() {
    let postgres = server(Postgres::start(&[]).unwrap()).await;
    let client = connect(&postgres.url()).await;
    client
        .batch_execute("create role unlisted login superuser; create role plain login; create role nologin")
        .await
        .unwrap();
    postgres.append_hba("host all unlisted 127.0.0.1/32 reject").unwrap();
    postgres.reload().unwrap();
    let home = Home::new();
    let port = postgres.port();
    let place = format!("127.0.0.1:{port}");
    let line = format!("a .pgpass line 127.0.0.1:{port}:postgres:by_scram:");
    let url = |role: &str| postgres.url_for(role, None, "postgres");
    for (url, part) in [
        (postgres.url_for("by_scram", Some("wrong"), "postgres"), "check user and password in postgres.url"),
        (url("by_scram"), line.as_str()),
        (url("unlisted"), "pg_hba.conf: host postgres unlisted 127.0.0.1/32 scram-sha-256, then"),
        (url("nobody"), "CREATE ROLE nobody LOGIN REPLICATION;"),
        (url("nologin"), "ALTER ROLE nologin LOGIN"),
        (url("plain"), "ALTER ROLE plain REPLICATION"),
        (postgres.url_for("by_trust", None, "nowhere"), "check the database in postgres.url"),
    ] {
        let error = ours(&url, &home, &[]).await.unwrap_err();
        for part in [part, "Remedy: ", place.as_str(), "role ", "database "] {
            assert!(error.contains(part), "{part} in {error}");
        }
    }
    // The remedies are true.
    client.batch_execute("alter role nologin login replication; alter role plain replication").await.unwrap();
    postgres.append_hba("host postgres plain 127.0.0.1/32 scram-sha-256").unwrap();
    assert!(ours(&url("nologin"), &home, &[]).await.is_ok());
    assert!(ours(&url("plain"), &home, &[]).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_of_pg_hba_for_tls_alone_lets_a_relay_in_that_speaks_it() {
    let postgres = Postgres::start(&[]).unwrap();
    let outbox = crate::support::Outbox::create(&postgres, shared_rabbitmq()).await;
    outbox.sql(&format!("create role relay login superuser password '{CANARY}'")).await;
    postgres.append_hba("hostssl all relay 127.0.0.1/32 scram-sha-256").unwrap();
    postgres.append_hba("host all relay 127.0.0.1/32 reject").unwrap();
    let authority = Authority::new("one");
    let key = KeyPair::generate().unwrap();
    show(&postgres, &authority.issue_with(named(&["localhost"], "x"), &key));
    let home = Home::new();
    let root = home.write("root.crt", &authority.pem);
    let mut outbox = outbox;
    let password =
        format!("password={CANARY} channel_binding=require sslmode=verify-full sslrootcert={}", root.display());
    outbox.url = format!("host=localhost port={} user=relay dbname={} {password}", postgres.port(), outbox.name);
    let consumer = crate::support::consumer::Consumer::start(&outbox).await;
    let relay = crate::support::relay::Relay::start(&outbox);
    outbox.insert("placed").await;
    consumer.wait_distinct(1).await;
    let ssl = "select count(*) from pg_stat_ssl join pg_stat_activity using (pid) where usename = 'relay' and ssl";
    assert_eq!(outbox.text(ssl).await.as_deref(), Some("2"));
    let told = relay.log() + &relay.get("/readyz").1 + &relay.get("/metrics").1 + &relay.get("/").1;
    assert!(!told.contains(CANARY));
    assert_eq!(relay.stop(), 0);
}

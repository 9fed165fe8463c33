//! TLS: every `sslmode` against right and wrong certificates, client certificates, direct negotiation, revocation.
//!
//! The trap: `require` alone trusts everybody, and beside a root certificate file it does not; only libpq knows all of
//! these.

use pgoutbox::servers::Postgres;
use rcgen::{
    BasicConstraints, CertificateRevocationListParams, IsCa, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber,
    date_time_ymd,
};

use super::{Authority, CANARY, Home, Issued, agreed, install, mode, named, openssl, ours, self_signed, show};
use crate::support::postgres_18;
use crate::support::relay::pgoutbox;

const MODES: [&str; 6] = ["disable", "allow", "prefer", "require", "verify-ca", "verify-full"];

/// What Postgres' manual makes: an RSA key, only a Common Name, and version 1.
fn by_the_manual(authority: &Authority) -> Issued {
    let home = Home::new();
    home.write("ca.crt", &authority.pem);
    home.write("ca.key", &authority.key_pem);
    let subject = ["req", "-new", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=localhost"];
    openssl(&[&subject[..], &["-keyout", "server.key", "-out", "server.csr"]].concat(), home.path());
    let sign = ["x509", "-req", "-in", "server.csr", "-days", "30", "-CA", "ca.crt", "-CAkey", "ca.key"];
    openssl(&[&sign[..], &["-CAcreateserial", "-out", "server.crt"]].concat(), home.path());
    let read = |name: &str| std::fs::read_to_string(home.path().join(name)).unwrap();
    Issued { certificate: read("server.crt"), key: read("server.key") }
}

/// Every kind of certificate that a server may show, and whether root files are to hold it itself.
pub(super) fn kinds(authority: &Authority, other: &Authority) -> Vec<(&'static str, Issued, String)> {
    let root = || authority.pem.clone();
    let gone = Authority::valid("gone", 2020, 2021);
    let of_another = other.issue(named(&["localhost", "127.0.0.1"], "localhost"));
    let mut expired = named(&["localhost", "127.0.0.1"], "localhost");
    (expired.not_before, expired.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    let mut early = named(&["localhost"], "localhost");
    (early.not_before, early.not_after) = (date_time_ymd(2090, 1, 1), date_time_ymd(2091, 1, 1));
    let mut authority_itself = named(&["localhost", "127.0.0.1"], "localhost");
    authority_itself.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let own = Issued { certificate: authority_itself.self_signed(&key).unwrap().pem(), key: key.serialize_pem() };
    let mut own_expired = authority_itself.clone();
    (own_expired.not_before, own_expired.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    let own_expired = Issued { certificate: own_expired.self_signed(&key).unwrap().pem(), key: key.serialize_pem() };
    let (leaf, manual) = (self_signed(&rcgen::PKCS_ECDSA_P256_SHA256), by_the_manual(authority));
    vec![
        ("right", authority.issue(named(&["localhost", "127.0.0.1"], "other")), root()),
        ("with a wrong name", authority.issue(named(&["other.example"], "localhost")), root()),
        ("of a wrong authority", of_another.clone(), root()),
        ("expired", authority.issue(expired), root()),
        ("of an authority that has expired", gone.issue(named(&["localhost", "127.0.0.1"], "x")), gone.pem.clone()),
        ("not valid yet", authority.issue(early), root()),
        ("for an address only", authority.issue(named(&["127.0.0.1"], "127.0.0.1")), root()),
        ("for another address", authority.issue(named(&["127.0.0.2"], "127.0.0.1")), root()),
        ("with a Common Name only", authority.issue(named(&[], "localhost")), root()),
        ("with a star", authority.issue(named(&["*.localhost"], "x")), root()),
        ("by the manual", manual.clone(), root()),
        ("by the manual, of a wrong authority", manual, other.pem.clone()),
        ("its own authority", own.clone(), own.certificate.clone()),
        ("its own authority, expired", own_expired.clone(), own_expired.certificate.clone()),
        ("its own authority, unknown", own, root()),
        ("signed by itself", leaf.clone(), leaf.certificate.clone()),
        ("in the root file without its authority", of_another.clone(), of_another.certificate),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_libpq_takes_is_taken_and_what_it_refuses_is_refused() {
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let postgres = Postgres::start(&[]).unwrap();
    let (mut taken, mut refused) = (0, 0);
    for (kind, issued, root) in kinds(&authority, &other) {
        show(&postgres, &issued);
        let (bare, with_root) = (Home::new(), Home::new());
        let path = with_root.write(".postgresql/root.crt", &root);
        for host in ["localhost", "127.0.0.1"] {
            for sslmode in MODES {
                // What does not look at the certificate need not see every one.
                if kind != "right" && matches!(sslmode, "disable" | "allow") {
                    continue;
                }
                let base =
                    format!("host={host} port={} user=postgres dbname=postgres sslmode={sslmode}", postgres.port());
                let named = format!("{base} sslrootcert={}", path.display());
                let missing = format!("{base} sslrootcert=/does/not/exist");
                let cases = [(&base, &with_root), (&named, &bare), (&base, &bare), (&missing, &with_root)];
                for (conninfo, home) in cases.into_iter().take(if kind == "right" { 4 } else { 2 }) {
                    let found = agreed(conninfo, home, &[]).await;
                    if found.is_ok() {
                        taken += 1
                    } else {
                        refused += 1
                    }
                    if kind == "right" && sslmode == "verify-full" && conninfo == &named {
                        assert!(found.is_ok_and(|found| found.tls), "{conninfo}");
                    }
                }
            }
        }
    }
    assert!(taken > 100 && refused > 100, "{taken} taken, {refused} refused");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_without_tls_is_left_where_tls_is_demanded() {
    let postgres = Postgres::start(&[]).unwrap();
    let home = Home::new();
    home.write(".postgresql/root.crt", &Authority::new("one").pem);
    for sslmode in MODES {
        let conninfo = format!("{}?sslmode={sslmode}", postgres.url());
        let found = agreed(&conninfo, &home, &[]).await;
        match sslmode {
            "disable" | "allow" | "prefer" => assert_eq!(found.map(|found| found.tls), Ok(false), "{sslmode}"),
            _ => assert!(
                found.unwrap_err().contains("does not speak TLS, and sslmode needs it. Remedy: ssl = on"),
                "{sslmode}"
            ),
        }
        // A Unix socket goes nowhere, and is as it is with libpq.
        let socket = format!(
            "host={} port={} user=postgres sslmode={sslmode}",
            postgres.socket_dir().display(),
            postgres.port()
        );
        assert_eq!(agreed(&socket, &home, &[]).await.map(|found| found.tls), Ok(false), "{sslmode}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_refusal_of_a_certificate_says_what_mends_it() {
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let postgres = Postgres::start(&[]).unwrap();
    let home = Home::new();
    home.write(".postgresql/root.crt", &authority.pem);
    let mut expired = named(&["localhost"], "localhost");
    (expired.not_before, expired.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2021, 1, 1));
    for (issued, part) in [
        (authority.issue(named(&["other.example"], "x")), "the server's certificate is not for localhost. Remedy: "),
        (authority.issue(expired), "the server's certificate has expired. Remedy: "),
        (other.issue(named(&["localhost"], "x")), "comes from an authority that is not in"),
    ] {
        show(&postgres, &issued);
        let conninfo =
            format!("host=localhost port={} user=postgres sslmode=verify-full password={CANARY}", postgres.port());
        let error = ours(&conninfo, &home, &[]).await.unwrap_err();
        assert!(error.contains(part) && error.contains(&format!("localhost:{}", postgres.port())), "{error}");
    }
    let error = ours(&format!("{}?sslmode=verify-ca", postgres.url()), &Home::new(), &[]).await.unwrap_err();
    assert!(error.contains(".postgresql/root.crt does not exist. Remedy: "), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_certificate_is_shown_when_the_server_asks_and_its_key_is_private() {
    let (authority, other) = (Authority::new("one"), Authority::new("other"));
    let postgres = Postgres::start(&[]).unwrap();
    install(&postgres, "clients.crt", &authority.pem);
    postgres.append_conf("ssl_ca_file = 'clients.crt'").unwrap();
    postgres.append_hba("hostssl all relay 127.0.0.1/32 cert").unwrap();
    postgres.append_hba("hostnossl all relay 127.0.0.1/32 reject").unwrap();
    show(&postgres, &authority.issue(named(&["127.0.0.1"], "x")));
    let client = crate::support::connect(&postgres.url()).await;
    client.batch_execute("create role relay login superuser").await.unwrap();
    let base = format!("host=127.0.0.1 port={} user=relay dbname=postgres sslmode=require", postgres.port());
    for (issued, is_right) in [
        (authority.issue(named(&[], "relay")), true),
        (authority.issue(named(&[], "someone")), false),
        (other.issue(named(&[], "relay")), false),
    ] {
        let home = Home::new();
        let (certificate, key) = (home.write("me.crt", &issued.certificate), home.write("me.key", &issued.key));
        let named = format!("{base} sslcert={} sslkey={}", certificate.display(), key.display());
        let found = agreed(&named, &home, &[]).await;
        assert_eq!(found.as_ref().map(|found| found.user.as_str()).ok(), is_right.then_some("relay"), "{found:?}");
        if !is_right {
            continue;
        }
        // Where libpq looks by default.
        let default = Home::new();
        default.write(".postgresql/postgresql.crt", &issued.certificate);
        default.write(".postgresql/postgresql.key", &issued.key);
        assert!(agreed(&base, &default, &[]).await.is_ok());
        assert!(ours(&format!("{base} sslcertmode=disable"), &default, &[]).await.is_err());
        // Who else may read the key decides; these files are root's where root runs the tests.
        for bits in [0o644, 0o660, 0o604] {
            mode(&key, bits);
            let error = agreed(&named, &home, &[]).await.unwrap_err();
            assert!(error.contains("can be read by group or world. Remedy: chmod 600"), "{bits:o}: {error}");
        }
        mode(&key, 0o600);
        let lonely = format!("{base} sslcert={} sslkey=/does/not/exist", certificate.display());
        assert!(agreed(&lonely, &home, &[]).await.unwrap_err().contains("/does/not/exist"));
        let strange = home.write("other.key", &KeyPair::generate().unwrap().serialize_pem());
        let mixed = format!("{base} sslcert={} sslkey={}", certificate.display(), strange.display());
        assert!(agreed(&mixed, &home, &[]).await.unwrap_err().contains("does not belong to sslkey"));
    }
    assert!(agreed(&base, &Home::new(), &[]).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_certificate_is_refused() {
    let authority = Authority::new("one");
    let postgres = Postgres::start(&[]).unwrap();
    let (mut good, mut revoked) = (named(&["localhost"], "x"), named(&["localhost"], "x"));
    good.serial_number = Some(SerialNumber::from(1));
    revoked.serial_number = Some(SerialNumber::from(2));
    let day = |year| date_time_ymd(year, 1, 1);
    let list = |next_update| {
        let entry = RevokedCertParams {
            serial_number: SerialNumber::from(2),
            revocation_time: day(2024),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: day(2024),
            next_update,
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![entry],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&authority.issuer).unwrap().pem().unwrap()
    };
    for (issued, next_update, is_good) in
        [(good.clone(), day(2090), true), (revoked, day(2090), false), (good, day(2025), false)]
    {
        show(&postgres, &authority.issue(issued));
        let home = Home::new();
        home.write(".postgresql/root.crt", &authority.pem);
        let path = home.write("some.crl", &list(next_update));
        let base = format!("host=localhost port={} user=postgres sslmode=verify-full", postgres.port());
        let named = agreed(&format!("{base} sslcrl={}", path.display()), &home, &[]).await;
        assert_eq!(named.is_ok(), is_good, "{named:?}");
        home.write(".postgresql/root.crl", &list(next_update));
        let default = agreed(&base, &home, &[]).await;
        assert_eq!(default.is_ok(), is_good, "{default:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_from_the_first_byte_is_spoken_with_servers_that_know_it() {
    let authority = Authority::new("one");
    let home = Home::new();
    home.write(".postgresql/root.crt", &authority.pem);
    let new = Postgres::start_from(&postgres_18(), &[]).unwrap();
    let old = Postgres::start(&[]).unwrap();
    for (postgres, knows) in [(&new, true), (&old, false)] {
        show(postgres, &authority.issue(named(&["localhost"], "x")));
        let base = format!("host=localhost port={} user=postgres sslmode=verify-full", postgres.port());
        assert_eq!(ours(&base, &home, &[]).await.map(|found| found.tls), Ok(true));
        let direct = ours(&format!("{base} sslnegotiation=direct"), &home, &[]).await;
        match direct {
            Ok(found) => assert!(found.tls && knows),
            Err(error) => assert!(!knows && error.contains("needs PostgreSQL 17 or later"), "{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_systems_certificates_are_trusted_on_demand_and_only_with_the_name() {
    let authority = Authority::new("one");
    let postgres = Postgres::start(&[]).unwrap();
    let home = Home::new();
    let bundle = home.write("bundle.pem", &authority.pem);
    let status = |sslmode: &str| {
        let url = format!("postgres://postgres@localhost:{}/postgres?sslrootcert=system{sslmode}", postgres.port());
        let mut command = pgoutbox();
        command.arg("status").env("DATABASE_URL", url).env("SSL_CERT_FILE", &bundle).env_remove("SSL_CERT_DIR");
        let output = command.output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    show(&postgres, &authority.issue(named(&["localhost"], "x")));
    let (_, log) = status("");
    assert!(!log.contains("TLS"), "{log}");
    assert_eq!(status("&sslmode=require").0, 64);
    show(&postgres, &authority.issue(named(&["other.example"], "x")));
    let (_, log) = status("");
    assert!(log.contains("not for localhost"), "{log}");
    show(&postgres, &Authority::new("other").issue(named(&["localhost"], "x")));
    let (_, log) = status("");
    assert!(log.contains("an authority that is not in the system's certificates"), "{log}");
}

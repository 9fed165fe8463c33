//! Peers that are not what they should be: silent ones, one in the middle, and two servers behind one address.
//!
//! The trap: such a peer answers nothing, so what notices it is a deadline, and a test without one hangs instead of failing.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pgoutbox::servers::Postgres;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, rustls};

use super::{Authority, CANARY, Home, Issued, agreed, named, ours, show};
use crate::support::connect;

/// Listens, and does this with every connection.
async fn peer<F: Future<Output = Option<()>> + Send + 'static>(each: impl Fn(TcpStream) -> F + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(each(stream));
        }
    });
    port
}

/// Answers the first message with these bytes, and then says nothing for ever.
async fn says(answer: &'static [u8]) -> u16 {
    peer(move |mut stream| async move {
        stream.read_exact(&mut [0; 8]).await.ok()?;
        stream.write_all(answer).await.ok()?;
        std::future::pending().await
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_falls_silent_is_noticed_within_connect_timeout() {
    let home = Home::new();
    for (answer, sslmode, doing) in [
        (&b""[..], "prefer", "the TLS handshake took longer than connect_timeout"),
        (b"", "disable", "logging in took longer than connect_timeout"),
        (b"S", "require", "the TLS handshake took longer"),
        (b"N", "prefer", "logging in took longer"),
        (b"R\0\0\0\x08\0\0", "disable", "logging in took longer"),
        (b"R\0\0\0\x08\0\0\0\0", "disable", "logging in took longer"),
    ] {
        let port = says(answer).await;
        let begun = Instant::now();
        let conninfo =
            format!("host=127.0.0.1 port={port} user=u sslmode={sslmode} password={CANARY} connect_timeout=1");
        let error = ours(&conninfo, &home, &[]).await.unwrap_err();
        assert!(error.contains(doing) && error.contains(&format!("127.0.0.1:{port}")), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_in_the_clear_with_the_answer_to_sslrequest_is_an_error() {
    let home = Home::new();
    for (answer, part) in [
        (&b"SR\0\0\0\x08\0\0\0\0"[..], "bytes in the clear came with the answer to SSLRequest"),
        (b"NR\0\0\0\x08\0\0\0\0", "bytes in the clear came"),
        (b"E\0\0\0\x08oops\0\0", "answered SSLRequest with an error"),
        (b"HTTP/1.1 400", "is this a PostgreSQL server?"),
    ] {
        for sslmode in ["prefer", "require"] {
            let conninfo =
                format!("host=127.0.0.1 port={} user=u sslmode={sslmode} connect_timeout=2", says(answer).await);
            let error = ours(&conninfo, &home, &[]).await.unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_login_of_a_gigabyte_is_refused_before_it_arrives() {
    let port = says(b"E\x3f\xff\xff\xff").await;
    let conninfo = format!("host=127.0.0.1 port={port} user=u sslmode=disable connect_timeout=60");
    let error = ours(&conninfo, &Home::new(), &[]).await.unwrap_err();
    assert!(error.contains("a message of 1073741823 bytes"), "{error}");
}

/// Speaks TLS with its own certificate to the client, and with the server as its client.
async fn in_the_middle(mut client: TcpStream, own: Issued, server: u16, root: String) -> Option<()> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let certificate = CertificateDer::from_pem_slice(own.certificate.as_bytes()).ok()?;
    let key = PrivateKeyDer::from_pem_slice(own.key.as_bytes()).ok()?;
    let config = ServerConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().ok()?;
    let config = config.with_no_client_auth().with_single_cert(vec![certificate], key).ok()?;
    client.read_exact(&mut [0; 8]).await.ok()?;
    client.write_all(b"S").await.ok()?;
    let mut client = TlsAcceptor::from(Arc::new(config)).accept(client).await.ok()?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(root.as_bytes()).ok()?).ok()?;
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().ok()?;
    let config = config.with_root_certificates(roots).with_no_client_auth();
    let mut server = TcpStream::connect(("127.0.0.1", server)).await.ok()?;
    server.write_all(&[0, 0, 0, 8, 4, 210, 22, 47]).await.ok()?;
    server.read_exact(&mut [0; 1]).await.ok()?;
    let name = ServerName::try_from("localhost").ok()?;
    let mut server = TlsConnector::from(Arc::new(config)).connect(name, server).await.ok()?;
    copy_bidirectional(&mut client, &mut server).await.ok().map(|_| ())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn somebody_in_the_middle_is_found_by_channel_binding() {
    let authority = Authority::new("one");
    let postgres = Postgres::start(&[]).unwrap();
    show(&postgres, &authority.issue(named(&["localhost"], "x")));
    let client = connect(&postgres.url()).await;
    client.batch_execute(&format!("create role relay login superuser password '{CANARY}'")).await.unwrap();
    postgres.append_hba("hostssl all relay 127.0.0.1/32 scram-sha-256").unwrap();
    postgres.reload().unwrap();
    let own = Authority::new("middle").issue(named(&["localhost"], "x"));
    let (server, root) = (postgres.port(), authority.pem.clone());
    let port = peer(move |stream| in_the_middle(stream, own.clone(), server, root.clone())).await;
    let home = Home::new();
    for (binding, gets_in) in [("disable", true), ("prefer", false), ("require", false)] {
        let conninfo = format!(
            "host=localhost port={port} user=relay dbname=postgres password={CANARY} sslmode=require \
             channel_binding={binding}"
        );
        let found = agreed(&conninfo, &home, &[]).await;
        assert_eq!(found.is_ok(), gets_in, "{binding}: {found:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_behind_one_address_are_found_out() {
    let (one, other) = (Postgres::start(&[]).unwrap(), Postgres::start(&[]).unwrap());
    let ports = [one.port(), other.port()];
    let count = Arc::new(AtomicUsize::new(0));
    let port = peer(move |mut client| {
        let port = ports[count.fetch_add(1, Ordering::SeqCst) % 2];
        async move {
            let mut server = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
            copy_bidirectional(&mut client, &mut server).await.ok().map(|_| ())
        }
    })
    .await;
    let error = ours(&format!("host=127.0.0.1 port={port} user=postgres"), &Home::new(), &[]).await.unwrap_err();
    assert!(
        error.contains(&format!("two servers answer at 127.0.0.1:{port}")) && error.contains("Remedy: "),
        "{error}"
    );
}

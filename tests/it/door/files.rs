//! Where settings come from besides the string: `PG*` variables, password files, service files.
//!
//! The trap: a password file that others may read is not used, and without a word about it the operator looks everywhere
//! else.

use pgoutbox::servers::Postgres;

use super::{CANARY, Home, agreed, mode, ours};
use crate::support::connect;

async fn server() -> Postgres {
    let postgres = Postgres::start(&[]).unwrap();
    let client = connect(&postgres.url()).await;
    client.batch_execute(&format!("create role relay login superuser password '{CANARY}'")).await.unwrap();
    client.batch_execute("create database shop").await.unwrap();
    postgres.append_hba("host all relay 127.0.0.1/32 scram-sha-256").unwrap();
    postgres.append_hba("local all relay scram-sha-256").unwrap();
    postgres.reload().unwrap();
    postgres
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_file_is_read_as_libpq_reads_it() {
    let postgres = server().await;
    let port = postgres.port();
    let base = format!("host=127.0.0.1 port={port} user=relay dbname=shop");
    let local = format!("host={} port={port} user=relay dbname=shop", postgres.socket_dir().display());
    let by_name = format!("host=localhost hostaddr=127.0.0.1 port={port} user=relay dbname=shop");
    let by_address = format!("hostaddr=127.0.0.1 port={port} user=relay dbname=shop");
    let socket = postgres.socket_dir().display();
    for (line, conninfo, fits) in [
        (format!("127.0.0.1:{port}:shop:relay:{CANARY}"), &base, true),
        (format!("*:*:*:*:{CANARY}"), &base, true),
        (format!("# first\n\n127.0.0.1:{port}:shop:other:no\n127.0.0.1:*:shop:relay:{CANARY}"), &base, true),
        (format!("127.0.0.1:*:shop:relay:wrong\n*:*:*:*:{CANARY}"), &base, false),
        (format!("127.0.0.1:{port}:postgres:relay:{CANARY}"), &base, false),
        (format!("localhost:{port}:shop:relay:{CANARY}"), &base, false),
        (format!("{socket}:{port}:shop:relay:{CANARY}"), &local, true),
        (format!("localhost:{port}:shop:relay:{CANARY}"), &local, false),
        (format!("localhost:{port}:shop:relay:{CANARY}"), &by_name, true),
        (format!("127.0.0.1:{port}:shop:relay:{CANARY}"), &by_name, false),
        (format!("localhost:{port}:shop:relay:{CANARY}"), &by_address, true),
        (r"127.0.0.1:*:sh\op:relay:".to_owned() + CANARY, &base, true),
    ] {
        let home = Home::new();
        let path = home.write(".pgpass", &line);
        assert_eq!(agreed(conninfo, &home, &[]).await.is_ok(), fits, "{line} for {conninfo}");
        if !fits {
            continue;
        }
        let named = path.display().to_string();
        let elsewhere = Home::new();
        assert!(agreed(conninfo, &elsewhere, &[("PGPASSFILE", &named)]).await.is_ok());
        assert!(agreed(&format!("{conninfo} passfile={named}"), &elsewhere, &[]).await.is_ok());
        mode(&path, 0o640);
        let error = agreed(conninfo, &home, &[]).await.unwrap_err();
        assert!(error.contains("chmod 600") && error.contains(".pgpass"), "{error}");
    }
    // The manual's words, which libpq 15 itself does not keep.
    let home = Home::new();
    home.write(".pgpass", &format!("127.0.0.1:{port}:shop:relay:{CANARY}"));
    assert!(ours(&by_address, &home, &[]).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_changes_in_its_file_is_the_next_logins() {
    let postgres = server().await;
    let home = Home::new();
    let conninfo = format!("host=127.0.0.1 port={} user=relay dbname=shop", postgres.port());
    home.write(".pgpass", "*:*:*:*:wrong");
    let variable = |name: &str| (name == "HOME").then(|| home.path().display().to_string());
    let settings = pgoutbox::pg::Settings::parse(&conninfo, variable).unwrap();
    let error = pgoutbox::pg::catalog::Control::open(&settings).await.unwrap_err().to_string();
    assert!(error.contains("the password is from") && error.contains(".pgpass"), "{error}");
    home.write(".pgpass", &format!("*:*:*:*:{CANARY}"));
    assert!(pgoutbox::pg::catalog::Control::open(&settings).await.is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn variables_and_services_fill_what_the_string_leaves_open() {
    let postgres = server().await;
    let home = Home::new();
    let port = postgres.port().to_string();
    let socket = postgres.socket_dir().display().to_string();
    let variables = [
        ("PGHOST", socket.as_str()),
        ("PGPORT", &port),
        ("PGUSER", "relay"),
        ("PGDATABASE", "shop"),
        ("PGPASSWORD", CANARY),
    ];
    for conninfo in ["postgres://", "dbname=postgres", "host=127.0.0.1", "postgres://127.0.0.1/shop"] {
        assert!(agreed(conninfo, &home, &variables).await.is_ok(), "{conninfo}");
    }
    assert!(agreed("user=nobody", &home, &variables).await.is_err());

    let text = format!("[shop]\nhost=127.0.0.1\nport={port}\nuser=relay\ndbname=shop\npassword={CANARY}\n");
    home.write(".pg_service.conf", &text);
    let elsewhere = Home::new();
    let file = elsewhere.write("services", &text.replace("[shop]", "[other]")).display().to_string();
    let broken = elsewhere.write("broken", &format!("[shop]\nnonsense={CANARY}\n")).display().to_string();
    for (conninfo, home, variables, is_found) in [
        ("service=shop", &home, &[][..], true),
        ("postgres:///?service=shop", &home, &[], true),
        ("postgres://", &home, &[("PGSERVICE", "shop")], true),
        ("service=shop", &elsewhere, &[], false),
        ("service=nothing", &home, &[], false),
        ("service=other", &elsewhere, &[("PGSERVICEFILE", file.as_str())], true),
        ("service=shop", &home, &[("PGSERVICEFILE", file.as_str())], false),
        ("service=shop", &home, &[("PGSERVICEFILE", broken.as_str())], false),
        ("service=shop", &home, &[("PGSERVICEFILE", "/does/not/exist")], false),
        // The string beats the service, the service beats the environment.
        ("service=shop user=nobody", &home, &[], false),
        ("service=shop", &home, &[("PGUSER", "nobody"), ("PGHOST", "/does/not/exist")], true),
    ] {
        let found = agreed(conninfo, home, variables).await;
        assert_eq!(found.is_ok(), is_found, "{conninfo} {variables:?}: {found:?}");
        assert!(found.is_ok() || !found.unwrap_err().contains(CANARY), "{conninfo}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strings_are_taken_and_refused_as_libpq_does() {
    let postgres = server().await;
    let home = Home::new();
    let (port, socket) = (postgres.port(), postgres.socket_dir().display().to_string());
    let encoded = socket.replace('/', "%2F");
    for (conninfo, is_right) in [
        (format!("postgresql://relay:{CANARY}@127.0.0.1:{port}/shop"), true),
        (format!("postgres://relay:{CANARY}@{encoded}:{port}/shop"), true),
        (format!("postgres:///shop?host={socket}&port={port}&user=relay&password={CANARY}"), true),
        (format!("postgres://relay:{CANARY}@:{port}/shop?host=127.0.0.1"), true),
        (format!("host = '127.0.0.1'  port= {port} user ='relay' dbname=shop password='{CANARY}'"), true),
        (format!("postgres://relay:{CANARY}@127.0.0.1:{port}/sh%6Fp?connect_timeout=7&keepalives=0"), true),
        (format!("postgres://relay:{CANARY}@127.0.0.1:{port}/shop?sslmode=sometimes"), false),
        (format!("postgres://relay:{CANARY}@127.0.0.1:{port}/shop?ssl=true"), false),
        (format!("postgres://relay:{CANARY}@127.0.0.1:{port}/shop?unknown=1"), false),
        (format!("postgres://relay:{CANARY}@127.0.0.1:{port}/shop?sslmode"), false),
        (format!("postgres://relay:{CANARY}@127.0.0.1:{port}/%zz"), false),
        (format!("host=127.0.0.1,127.0.0.1,127.0.0.1 port={port},{port} user=relay password={CANARY}"), false),
        (format!("host=127.0.0.1 port={port} user=relay dbname=shop password='{CANARY}"), false),
        (format!("host=127.0.0.1 port={port} user=relay dbname=shop {CANARY}"), false),
        (format!("host=127.0.0.1 port={port} user=relay dbname=shop password={CANARY} sslrootcert"), false),
        (format!("host=127.0.0.1 port={port} user=relay dbname=shop password={CANARY} gssencmode=require"), false),
    ] {
        let found = agreed(&conninfo, &home, &[]).await;
        assert_eq!(found.is_ok(), is_right, "{conninfo}: {found:?}");
        assert!(found.is_ok() || !found.unwrap_err().contains(CANARY), "{conninfo}");
    }
    for refused in [
        "sslpassword=x",
        "sslcrldir=/x",
        "replication=database",
        "sslnegotiation=direct",
        "sslrootcert=system sslmode=require",
    ] {
        let error = ours(&format!("host=127.0.0.1 user=relay {refused}"), &home, &[]).await.unwrap_err();
        assert!(error.contains(refused.split('=').next().unwrap()), "{error}");
    }
}

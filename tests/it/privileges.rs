//! Least privilege: what `init --print-sql` prints is enough, nothing of it is too much, and what is missing is named.
//!
//! The trap: a grant that is printed "to be safe" is never found out, and one that is missing is found out by operators. So
//! everything runs with exactly what is printed, over TLS as the printed lines want it, and then each grant is taken away.

use std::os::unix::fs::PermissionsExt;

use lapin::options::ExchangeDeclareOptions;
use lapin::types::FieldTable;
use pgoutbox::servers::{Postgres, RabbitMq};
use rcgen::PKCS_ECDSA_P256_SHA256;
use tokio::sync::Mutex;

use crate::door::{self_signed, show};
use crate::findings::words;
use crate::support::consumer::{Consumer, channel};
use crate::support::relay::{Relay, environment, pgoutbox};
use crate::support::{Outbox, connect, shared_rabbitmq, unique};

const WORLD: i32 = 78;
const PASSWORD: &str = "canary-4711";
const SETUP: &str = "pgoutbox_setup";
const RELAY: &str = "pgoutbox_relay";

/// The broker's user has one name in every shop, and its permissions are of one.
static USER: Mutex<()> = Mutex::const_new(());

/// A database in which nobody may do anything that is not printed.
struct Shop<'a> {
    postgres: &'a Postgres,
    name: String,
    printed: String,
    admin: tokio_postgres::Client,
}

impl<'a> Shop<'a> {
    /// With the printed roles and grants, lines of `pg_hba.conf` and passwords.
    async fn open(postgres: &'a Postgres) -> Self {
        let name = unique("shop");
        let admin = connect(&postgres.url()).await;
        admin.batch_execute(&format!("create database {name}")).await.unwrap();
        admin.batch_execute(&format!("revoke all on database {name} from public")).await.unwrap();
        let admin = connect(&postgres.url_for("postgres", None, &name)).await;
        admin.batch_execute("revoke all on schema public from public").await.unwrap();
        let url = postgres.url_for("postgres", None, &name);
        let (code, printed) = verb(&["init", "--print-sql"], &url, "", &name);
        assert_eq!(code, 0, "{printed}");
        let shop = Self { postgres, name, printed, admin };
        shop.admit();
        shop.grant().await;
        shop
    }

    /// The printed part before, or from, where the set-up role begins.
    fn part(&self, of_superuser: bool) -> &str {
        let begin = self.printed.find("-- As pgoutbox_setup").unwrap();
        let (superuser, setup) = self.printed.split_at(begin);
        if of_superuser { superuser } else { setup }
    }

    /// `pg_hba.conf` has the printed lines and one for the administrator.
    fn admit(&self) {
        let lines = self.printed.lines().filter_map(|line| line.strip_prefix("--   hostssl"));
        let lines: Vec<String> =
            lines.map(|line| format!("hostssl{}", line.replace("10.0.0.0/8", "127.0.0.1/32"))).collect();
        assert_eq!(lines.len(), 2, "{}", self.printed);
        self.admit_only(&lines);
    }

    fn admit_only(&self, lines: &[String]) {
        let path = self.postgres.data_dir().join("pg_hba.conf");
        let local = format!("local all postgres trust\nhost all postgres 127.0.0.1/32 trust\n{}\n", lines.join("\n"));
        std::fs::write(&path, local).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        self.postgres.reload().unwrap();
    }

    /// Roles are the cluster's: only the first shop makes them, and what is printed for the others can be pasted as well.
    async fn grant(&self) {
        for statement in self.part(true).lines().filter(|line| !line.starts_with("--")) {
            self.sql(statement).await;
        }
        for role in [SETUP, RELAY] {
            self.admin
                .batch_execute(&format!("alter role {role} login replication password '{PASSWORD}'"))
                .await
                .unwrap();
        }
    }

    fn url(&self, role: &str) -> String {
        format!("{}?sslmode=require", self.postgres.url_for(role, Some(PASSWORD), &self.name))
    }

    fn init(&self) -> (i32, String) {
        verb(&["init"], &self.url(SETUP), "", &self.name)
    }

    fn check(&self, amqp: &str) -> (i32, String) {
        verb(&["check"], &self.url(RELAY), amqp, &self.name)
    }

    /// As the administrator.
    async fn sql(&self, sql: &str) {
        self.admin.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// An outbox for the tests' own tools.
    async fn outbox(&self, amqp: &str) -> Outbox {
        let url = self.postgres.url_for("postgres", None, &self.name);
        Outbox { client: connect(&url).await, url, amqp: amqp.to_owned(), name: self.name.clone() }
    }
}

/// Exit code and everything that was said, which is never the password.
fn verb(arguments: &[&str], url: &str, amqp: &str, name: &str) -> (i32, String) {
    let mut command = pgoutbox();
    command.args(arguments).envs(environment(url, amqp, name));
    if amqp.is_empty() {
        command.env_remove("AMQP_URL");
    }
    let output = command.output().unwrap();
    let told = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!told.contains(PASSWORD), "{told}");
    (output.status.code().unwrap(), told)
}

fn server() -> Postgres {
    let postgres = Postgres::start(&[("max_wal_senders", "20"), ("max_replication_slots", "40")]).unwrap();
    show(&postgres, &self_signed(&PKCS_ECDSA_P256_SHA256));
    postgres
}

/// The user of RabbitMQ, made by the printed lines. Returns the line of its permissions and its address.
fn user(rabbitmq: &RabbitMq, printed: &str, declare: bool) -> (String, String) {
    let lines: Vec<&str> = printed.lines().filter_map(|line| line.strip_prefix("--   rabbitmqctl ")).collect();
    let [add, permissions, undeclared] = lines[..] else { panic!("{printed}") };
    let ctl = |line: &str| {
        let words = words(line);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        rabbitmq.ctl_told(&words, &format!("{PASSWORD}\n"))
    };
    // It may be there already.
    let _ = ctl(add);
    let permissions = if declare { permissions } else { undeclared };
    ctl(permissions).unwrap();
    (permissions.to_owned(), rabbitmq.url().replace("guest:guest", &format!("{RELAY}:{PASSWORD}")))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_printed_is_enough_for_both_roles_and_the_user_of_the_broker() {
    let _alone = USER.lock().await;
    let (postgres, rabbitmq) = (server(), shared_rabbitmq());
    for (by_hand, declare) in [(true, true), (false, false)] {
        let shop = Shop::open(&postgres).await;
        if by_hand {
            let url = shop.url(SETUP);
            let output = std::process::Command::new("psql")
                .args(["-X", "-v", "ON_ERROR_STOP=1", "-d", &url, "-c", shop.part(false)])
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
        }
        let (code, told) = shop.init();
        assert_eq!(code, 0, "{told}");
        assert_eq!(told.contains("created"), !by_hand, "{told}");
        let (_, amqp) = user(rabbitmq, &shop.printed, declare);
        let declaring = format!("rabbitmq.declare={declare}");
        if !declare {
            let (_connection, channel) = channel(&rabbitmq.url()).await;
            let durable = ExchangeDeclareOptions { durable: true, ..Default::default() };
            let name = shop.name.as_str().into();
            channel.exchange_declare(name, lapin::ExchangeKind::Topic, durable, FieldTable::default()).await.unwrap();
        }
        let (code, told) = verb(&["check", "--set", &declaring], &shop.url(RELAY), &amqp, &shop.name);
        assert_eq!(code, 0, "{told}");
        let outbox = shop.outbox(&rabbitmq.url()).await;
        let consumer = Consumer::start(&outbox).await;
        let relay = Relay::start_at(
            &shop.url(RELAY),
            &amqp,
            &shop.name,
            &[("rabbitmq.declare", if declare { "true" } else { "false" })],
        );
        outbox.insert("placed").await;
        consumer.wait_distinct(1).await;
        relay.ready().await;
        assert_eq!(verb(&["status"], &shop.url(RELAY), "", &shop.name).0, 0);
        assert_eq!(relay.stop(), 0);
        // The relay's role can do no more than relay: it reads no row and makes nothing.
        let role = connect_over_tls(&shop, RELAY);
        for forbidden in
            ["select * from outbox", "create table x ()", "drop publication pgoutbox", "create publication x"]
        {
            assert!(!role(forbidden), "{forbidden}");
        }
        // The other one takes down what it set up.
        let (code, told) = verb(&["drop", "--yes"], &shop.url(SETUP), "", &shop.name);
        assert!(code == 0 && told.contains("publication pgoutbox dropped"), "{told}");
    }
}

/// Whether psql, as this role, could run it.
fn connect_over_tls<'a>(shop: &'a Shop<'a>, role: &'a str) -> impl Fn(&str) -> bool + 'a {
    move |sql| {
        let url = shop.url(role);
        let output = std::process::Command::new("psql").args(["-X", "-q", "-d", &url, "-c", sql]).output().unwrap();
        output.status.success()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_grant_of_the_set_up_role_is_needed_and_named_when_it_is_missing() {
    let postgres = server();
    for (taken, named) in [
        ("alter role pgoutbox_setup nologin", "ALTER ROLE pgoutbox_setup LOGIN;"),
        ("alter role pgoutbox_setup noreplication", "ALTER ROLE pgoutbox_setup REPLICATION;"),
        (
            "revoke connect on database {name} from pgoutbox_setup",
            "GRANT CONNECT ON DATABASE {name} TO pgoutbox_setup;",
        ),
        ("revoke create on database {name} from pgoutbox_setup", "GRANT CREATE ON DATABASE {name} TO pgoutbox_setup;"),
        (
            "revoke create on schema public from pgoutbox_setup",
            "GRANT USAGE, CREATE ON SCHEMA public TO pgoutbox_setup;",
        ),
        (
            "revoke usage on schema public from pgoutbox_setup",
            "GRANT USAGE, CREATE ON SCHEMA public TO pgoutbox_setup;",
        ),
        // The table is somebody else's, and was there before.
        (
            "create role keeper; create table outbox (id int, aggregatetype text, aggregateid text, type text, \
             payload text); alter table outbox owner to keeper",
            "GRANT keeper TO pgoutbox_setup;",
        ),
        // Who is in a superuser's role is one.
        (
            "create table outbox (id int, aggregatetype text, aggregateid text, type text, payload text)",
            "CREATE PUBLICATION pgoutbox FOR TABLE public.outbox \
             WITH (publish = 'insert', publish_via_partition_root = true);",
        ),
    ] {
        let shop = Shop::open(&postgres).await;
        shop.sql(&taken.replace("{name}", &shop.name)).await;
        let (code, told) = shop.init();
        let named = named.replace("{name}", &shop.name);
        assert!(code != 0 && told.contains(&format!("Remedy: {named}")), "{taken}: {code} {told}");
        shop.sql(&named).await;
        let (code, told) = shop.init();
        assert_eq!(code, 0, "{taken}: {told}");
    }
    let shop = Shop::open(&postgres).await;
    shop.admit_only(&[]);
    let (code, told) = shop.init();
    let line = format!("pg_hba.conf: hostssl {} pgoutbox_setup 127.0.0.1/32 scram-sha-256, then SELECT", shop.name);
    assert!(code != 0 && told.contains(&line), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_whose_name_speaks_of_a_schema_and_a_database_is_told_from_both() {
    let (postgres, amqp) = (server(), shared_rabbitmq().url());
    let shop = Shop::open(&postgres).await;
    let table = "outbox.table=database_schema_events";
    shop.sql(
        "create table database_schema_events (id int, aggregatetype text, aggregateid text, type text, payload text); \
         insert into database_schema_events values (1, 'order', '1', 'placed', ''); \
         create role keeper; alter table database_schema_events owner to keeper",
    )
    .await;
    let init = || verb(&["init", "--set", table], &shop.url(SETUP), "", &shop.name);
    let (code, told) = init();
    assert!(code == WORLD && told.contains("Remedy: GRANT keeper TO pgoutbox_setup;"), "{told}");
    shop.sql("grant keeper to pgoutbox_setup").await;
    let (code, told) = init();
    assert_eq!(code, 0, "{told}");
    let check = || verb(&["check", "--deep", "--set", table], &shop.url(RELAY), &amqp, &shop.name);
    for grant in [
        "GRANT USAGE ON SCHEMA public TO pgoutbox_relay;",
        "GRANT SELECT ON public.database_schema_events TO pgoutbox_relay;",
    ] {
        let (code, told) = check();
        assert!(code == 0 && told.contains(&format!("sql: {grant}\n")), "{told}");
        shop.sql(grant).await;
    }
    let (code, told) = check();
    assert!(code == 0 && told.contains("each of 1 makes a message"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_grant_of_the_relays_role_is_needed_and_named_when_it_is_missing() {
    let (postgres, rabbitmq) = (server(), shared_rabbitmq());
    let shop = Shop::open(&postgres).await;
    assert_eq!(shop.init().0, 0);
    let amqp = rabbitmq.url();
    for (taken, named) in [
        ("alter role pgoutbox_relay nologin", "sql: ALTER ROLE pgoutbox_relay LOGIN;"),
        ("alter role pgoutbox_relay noreplication", "sql: ALTER ROLE pgoutbox_relay REPLICATION;"),
        (
            "revoke connect on database {name} from pgoutbox_relay",
            "sql: GRANT CONNECT ON DATABASE {name} TO pgoutbox_relay;",
        ),
        ("alter role pgoutbox_relay password 'another'", r"sql: \password pgoutbox_relay"),
    ] {
        assert_eq!(shop.check(&amqp).0, 0);
        shop.sql(&taken.replace("{name}", &shop.name)).await;
        let (code, told) = shop.check(&amqp);
        let named = named.replace("{name}", &shop.name);
        assert!(code == WORLD && told.contains(&named), "{taken}: {told}");
        // Again as printed.
        shop.grant().await;
    }
    assert_eq!(shop.check(&amqp).0, 0);
    shop.admit_only(&[]);
    let (code, told) = shop.check(&amqp);
    let line = format!("pg_hba.conf: hostssl {} pgoutbox_relay 127.0.0.1/32 scram-sha-256\n", shop.name);
    assert!(code == WORLD && told.contains(&line), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_permission_of_the_brokers_user_is_needed_and_named_when_it_is_missing() {
    let _alone = USER.lock().await;
    let (postgres, rabbitmq) = (server(), shared_rabbitmq());
    let shop = Shop::open(&postgres).await;
    assert_eq!(shop.init().0, 0);
    let name = &shop.name;
    let (permissions, amqp) = user(rabbitmq, &shop.printed, true);
    assert_eq!(permissions, format!("set_permissions -p / {RELAY} '^{name}$' '^{name}$' '^$'"));
    assert_eq!(shop.check(&amqp).0, 0);
    let pattern = format!("^{name}$");
    for (configure, write) in [("^$", pattern.as_str()), (&pattern, "^$")] {
        rabbitmq.ctl(&["set_permissions", "-p", "/", RELAY, configure, write, "^$"]).unwrap();
        let (code, told) = shop.check(&amqp);
        assert!(code == WORLD && told.contains(&format!("shell: rabbitmqctl {permissions}\n")), "{told}");
    }
    rabbitmq.ctl(&["set_permissions", "-p", "/", RELAY, &pattern, &pattern, "^$"]).unwrap();
    assert_eq!(shop.check(&amqp).0, 0);
}

//! `check` and its remedies once on every PostgreSQL that is supported, and on RabbitMQ 4.
//!
//! The trap: catalogs gain columns and servers change their words, so a finding of one version may be silence in another.

use pgoutbox::servers::{Postgres, RabbitMq};

use super::Break::{Ctl, Setting, Sql};
use super::Run::{Stops, Waits};
use super::{Case, Surroundings};
use crate::support::consumer::Consumer;
use crate::support::relay::Relay;
use crate::support::{postgres_bin, rabbitmq_4, shared_postgres, shared_rabbitmq};

/// It is in the table, and not in every stream: `check` says so before a relay stops at the first row.
async fn a_generated_column(surroundings: &mut Surroundings<'_>, version: u32) {
    surroundings
        .suffer(&[
            Sql("alter table outbox add column tenant text generated always as ('t' || aggregateid) stored"),
            Setting("rabbitmq.routing_key", "{tenant}.{type}"),
        ])
        .await;
    let findings = surroundings.findings();
    let text = format!("{findings:?}");
    assert!(findings.len() == 1 && text.contains("column tenant of rabbitmq.routing_key is missing"), "{text}");
    surroundings.run_says(Stops, "column tenant of rabbitmq.routing_key is missing").await;
    surroundings.paste(&findings);
    if version < 18 {
        assert!(text.contains("Generated columns are not in the stream before PostgreSQL 18"), "{text}");
        surroundings.settings.clear();
    }
    surroundings.is_sound();
    let relay = Relay::start_at(
        &surroundings.url,
        &surroundings.amqp,
        &surroundings.outbox.name,
        &[("rabbitmq.routing_key", if version < 18 { "{type}" } else { "{tenant}.{type}" })],
    );
    let consumer = Consumer::start(&surroundings.outbox).await;
    surroundings
        .outbox
        .sql("insert into outbox (id, aggregatetype, aggregateid, type) values (7, 'order', '1', 'placed')")
        .await;
    let key = if version < 18 { "placed" } else { "t1.placed" };
    assert_eq!(consumer.wait_distinct(1).await[0].routing_key, key);
    assert_eq!(relay.stop(), 0);
}

async fn on(version: u32) {
    let postgres = Postgres::start_from(&postgres_bin(version), &[]).unwrap();
    let mut surroundings = Surroundings::of(&postgres, shared_rabbitmq()).await;
    let slot = Case {
        breaks: &[Sql("select pg_drop_replication_slot('{name}')")],
        says: "replication slot {name} does not exist",
        run: Stops,
        step: "pgoutbox init",
    };
    let publication = Case {
        breaks: &[Sql("alter publication pgoutbox drop table outbox")],
        says: "does not cover table public.outbox",
        run: Stops,
        step: "ALTER PUBLICATION pgoutbox ADD TABLE public.outbox;",
    };
    let partition = Case {
        breaks: &[
            Sql("drop publication pgoutbox; drop table outbox; create table outbox (id int, aggregatetype text, \
                 aggregateid text, type text, payload jsonb) partition by list (id)"),
            Sql("create table outbox_1 partition of outbox default"),
            Sql("create publication pgoutbox"),
        ],
        says: "does not cover table public.outbox",
        run: Stops,
        step: "ALTER PUBLICATION pgoutbox ADD TABLE public.outbox;",
    };
    let replication = Case {
        breaks: &[Sql("alter role {role} noreplication")],
        says: "role {role} may not replicate",
        run: Stops,
        step: "ALTER ROLE {role} REPLICATION;",
    };
    let connect = Case {
        breaks: &[Sql("revoke connect on database {name} from public")],
        says: "permission denied for database \"{name}\"",
        run: Stops,
        step: "GRANT CONNECT ON DATABASE {name} TO {role};",
    };
    for case in [slot, publication, partition, replication, connect] {
        case.is_found_and_mended_in(&mut surroundings).await;
    }
    a_generated_column(&mut surroundings, version).await;
    let (code, looks) = surroundings.check_with(&["--deep"]);
    let told: Vec<String> =
        looks.iter().map(|look| format!("{} {} {}", look["state"], look["what"], look["problem"])).collect();
    assert!(code == 0 && told.iter().any(|line| line.contains("what is next can be decoded")), "{told:#?}");
    assert!(told.iter().any(|line| line.contains("\"ok\" \"PostgreSQL ")), "{told:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn findings_are_found_and_mended_on_14() {
    on(14).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn findings_are_found_and_mended_on_16() {
    on(16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn findings_are_found_and_mended_on_17() {
    on(17).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn findings_are_found_and_mended_on_18() {
    on(18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions_are_found_and_mended_on_rabbitmq_4() {
    let rabbitmq = RabbitMq::start_from(&rabbitmq_4()).unwrap();
    let mut surroundings = Surroundings::of(shared_postgres(), &rabbitmq).await;
    let name = surroundings.outbox.name.clone();
    let configured: &str = format!("rabbitmqctl set_permissions -p / guest '^{name}$' '^{name}$' '^$'").leak();
    let case = |breaks, says| Case { breaks, says, run: Waits, step: configured };
    for case in [
        case(&[Ctl(&["clear_permissions", "-p", "/", "guest"])], "refused for user 'guest'"),
        case(
            &[Ctl(&["set_permissions", "-p", "/", "guest", "^$", ".*", ".*"])],
            "does not let user guest declare exchange {name}",
        ),
    ] {
        case.is_found_and_mended_in(&mut surroundings).await;
    }
    surroundings.ctl(["set_permissions", "-p", "/", "guest", ".*", "^$", ".*"].map(str::to_owned).into());
    let findings = surroundings.findings();
    let problem = findings[0]["problem"].as_str().unwrap();
    assert!(problem.contains(&format!("does not let user guest publish to exchange {name}")), "{findings:#?}");
    surroundings.paste(&findings);
    surroundings.is_sound();
}

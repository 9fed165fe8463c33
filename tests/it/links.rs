//! The proxies of the fault bench: a real relay passes through them, each toxic does what it says, and each assertion can
//! fail.
//!
//! The trap: an oracle that sees nothing finds nothing wrong, so the counts are compared with the load.

use pgoutbox::lsn::Lsn;

use crate::support::consumer::Consumer;
use crate::support::links::{Ledger, Link};
use crate::support::load::{Oracle, Writers, judge};
use crate::support::relay::Relay;
use crate::support::{Outbox, eventually, shared_postgres, shared_rabbitmq};

/// An outbox, and a relay's way to it through two links.
struct Bench {
    outbox: Outbox,
    /// The same with the links' ports.
    through: Outbox,
    consumer: Consumer,
    ledger: Ledger,
    postgres: Link,
    rabbitmq: Link,
}

impl Bench {
    async fn start() -> Self {
        let outbox = Outbox::create(shared_postgres(), shared_rabbitmq()).await;
        let consumer = Consumer::start(&outbox).await;
        let ledger = Ledger::new(outbox.confirmed().await);
        let postgres = Link::to_postgres(shared_postgres().port(), &ledger).await;
        let rabbitmq = Link::to_rabbitmq(shared_rabbitmq().port(), &ledger).await;
        let to = |url: &str, from: u16, to: u16| url.replace(&format!(":{from}/"), &format!(":{to}/"));
        let through = Outbox {
            url: to(&outbox.url, shared_postgres().port(), postgres.port()),
            amqp: to(&outbox.amqp, shared_rabbitmq().port(), rabbitmq.port()),
            name: outbox.name.clone(),
            client: crate::support::connect(&outbox.url).await,
        };
        assert!(through.url != outbox.url && through.amqp != outbox.amqp);
        Self { outbox, through, consumer, ledger, postgres, rabbitmq }
    }

    fn assert_good(&self) {
        assert!(self.ledger.violations().is_empty(), "{:#?}", self.ledger.violations());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_under_load_passes_both_links_and_breaks_no_assertion() {
    let bench = Bench::start().await;
    let oracle = Oracle::start(&bench.outbox).await;
    let relay = Relay::start(&bench.through);
    relay.ready().await;
    let written = Writers::start(&bench.outbox, 4, 10_000, 500, fastrand::u64(..)).done().await;
    let received = bench.consumer.wait_distinct(written).await;
    assert_eq!(judge(&received, &oracle.ids(&bench.outbox).await), 0, "duplicates");
    bench.outbox.wait_confirmed(bench.outbox.current().await).await;
    assert_eq!(relay.stop(), 0);
    bench.assert_good();
    let counts = bench.ledger.counts();
    assert_eq!((counts.publishes, counts.confirms), (received.len() as u64, received.len() as u64));
    assert_eq!((counts.returns, counts.nacks), (0, 0));
    assert_eq!((counts.postgres_connections, counts.amqp_connections), (1, 1));
    assert!(counts.statuses > 1 && counts.keepalives > 0, "{counts:?}");
    assert!(bench.postgres.connections() >= 2 && bench.rabbitmq.connections() == 1);
    eventually("the slot stands where it was told", || async { bench.outbox.confirmed().await == bench.ledger.told() })
        .await;
    bench.ledger.reset(Lsn::ZERO);
    assert_eq!(bench.ledger.told(), Lsn::ZERO);
}

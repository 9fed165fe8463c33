//! `pgoutbox tail`: messages as they commit, as JSON lines, through a temporary slot that moves nobody's position.

use std::collections::HashSet;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::time::interval;

use crate::config::Config;
use crate::error::Error;
use crate::lsn::Lsn;
use crate::outbox::{Assembler, Item, Tables};
use crate::pg::catalog::Control;
use crate::pg::replication::{Event, Replication, Status};
use crate::relay;
use crate::sink::stdout::line;

/// Well below the smallest sensible `wal_sender_timeout`.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

pub(super) async fn run(config: &Config) -> Result<(), Error> {
    let names = &config.names;
    let control = Control::open(&config.postgres).await?;
    let world = control.inspect(names).await?;
    // A slot of its own: the relay's may be missing or in use.
    let findings = [world.server_findings(), world.table_findings(names)].concat();
    if !findings.is_empty() {
        return Err(crate::pg::Error::World(findings).into());
    }
    let outbox: HashSet<u32> = world.table.iter().flat_map(|table| table.family.iter().copied()).collect();
    let name = (names.schema.clone(), names.table.clone());
    let tables = Tables { outbox, others: world.others().into_iter().collect(), name };
    let mut assembler = Assembler::new(config.mapping.clone(), tables);

    let mut replication = Replication::open(&control, &config.postgres).await?;
    let slot = format!("pgoutbox_tail_{}", std::process::id());
    replication.create_temporary_slot(&slot).await?;
    let mut stream = replication.start(&slot, &names.publication, Lsn::ZERO).await?;
    let mut position = Lsn::ZERO;
    let mut ticks = interval(STATUS_INTERVAL);
    let mut out = tokio::io::stdout();
    loop {
        let event = tokio::select! {
            biased;
            _ = ticks.tick() => {
                let status = Status { received: position, settled: position, reply_requested: false };
                stream.tell(status).await?;
                continue;
            }
            event = stream.next() => event?,
        };
        let item = match event {
            Event::Data(bytes) => assembler.change(bytes).map_err(relay::Error::from)?,
            Event::Keepalive { wal_end, .. } => assembler.keepalive(wal_end).map_err(relay::Error::from)?,
        };
        match item {
            Some(Item::Checkpoint(lsn)) => position = lsn,
            Some(Item::Message(_, message)) => {
                let mut text = Vec::new();
                line(&message, &mut text);
                let written = async {
                    out.write_all(&text).await?;
                    out.flush().await
                };
                match written.await {
                    Ok(()) => {}
                    // `pgoutbox tail | head` ends so.
                    Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                    Err(source) => return Err(Error::System { doing: "cannot print".to_owned(), source }),
                }
            }
            None => {}
        }
    }
}

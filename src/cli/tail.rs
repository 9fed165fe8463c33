//! `pgoutbox tail`: messages as they commit, as JSON lines, through a temporary slot that moves nobody's position.
//!
//! The trap: what stops a relay is told with what mends a relay's slot, and who only looks on must not be told to drop it.

use std::collections::HashSet;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, Stdout};
use tokio::time::{interval, sleep};

use super::complain;
use crate::config::Config;
use crate::error::Error;
use crate::lsn::Lsn;
use crate::outbox::{self, Assembler, Item, Message};
use crate::pg;
use crate::pg::catalog::Control;
use crate::pg::replication::{Event, Replication, Status};
use crate::pg::world::Names;
use crate::relay::{self, postgres::tables};
use crate::sink::stdout::line;

/// Well below the smallest sensible `wal_sender_timeout`.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// The catalog is asked for a new table so often: a commit that waits for a synchronous standby is in the stream first.
const LOOKS: u32 = 4;
const BETWEEN_LOOKS: Duration = Duration::from_millis(250);

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Only rows of this type; may be repeated
    #[arg(long = "type", value_name = "TYPE")]
    kinds: Vec<String>,
    /// Only rows of this aggregate: its type, or its type and id as in order:42; may be repeated
    #[arg(long = "aggregate", value_name = "TYPE[:ID]")]
    aggregates: Vec<String>,
}

impl Arguments {
    /// Whether the row is asked for.
    fn wants(&self, message: &Message) -> bool {
        let is_kind = self.kinds.is_empty() || self.kinds.iter().any(|kind| **kind == *message.kind);
        if !is_kind || self.aggregates.is_empty() {
            return is_kind;
        }
        let one = format!("{}:{}", message.aggregatetype, message.aggregateid);
        self.aggregates.iter().any(|wanted| **wanted == *message.aggregatetype || *wanted == one)
    }
}

pub(super) async fn run(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    let names = &config.names;
    let control = Control::open(&config.postgres).await?;
    let world = control.inspect(names).await?;
    // A slot of its own: the relay's may be missing or in use.
    let outbox = [world.table_findings(names), world.publication_findings(names)].concat();
    let findings = [world.server_findings(), outbox].concat();
    if !findings.is_empty() {
        return Err(pg::Error::World(findings).into());
    }
    let assembler = Assembler::new(config.mapping.clone(), tables(names, &world));
    let mut replication = Replication::open(&control, &config.postgres).await?;
    // In containers every process is number 1.
    let slot = format!("pgoutbox_tail_{:08x}", fastrand::u32(..));
    replication.create_temporary_slot(&slot).await?;
    let mut stream = replication.start(&slot, &names.publication, Lsn::ZERO).await.map_err(of_stream)?;
    let mut reader = Reader { assembler, control, names, passing: HashSet::new() };
    let mut position = Lsn::ZERO;
    let mut ticks = interval(STATUS_INTERVAL);
    let mut out = tokio::io::stdout();
    let status = |position| Status { received: position, settled: position, reply_requested: false };
    loop {
        let event = tokio::select! {
            biased;
            _ = ticks.tick() => {
                stream.tell(status(position)).await?;
                continue;
            }
            event = stream.next() => event.map_err(of_stream)?,
        };
        let item = match event {
            Event::Data(bytes) => reader.change(&bytes).await?,
            Event::Keepalive { wal_end, .. } => reader.assembler.keepalive(wal_end).map_err(relay::Error::from)?,
            Event::Part => None,
        };
        match item {
            Some(Item::Checkpoint(lsn)) => position = lsn,
            Some(Item::Message(_, message)) if arguments.wants(&message) => {
                let mut printing = pin!(print(&message, &mut out));
                // A pager waits for as long as its reader likes: to the server we are not dead meanwhile.
                let is_read = loop {
                    tokio::select! {
                        biased;
                        printed = &mut printing => break printed?,
                        _ = ticks.tick() => stream.tell(status(position)).await?,
                    }
                };
                if !is_read {
                    return Ok(());
                }
            }
            Some(Item::Message(..)) | None => {}
        }
    }
}

/// Why the stream ended, without what mends a relay's slot: this one's goes by itself.
fn of_stream(error: pg::Error) -> Error {
    const UNDEFINED_OBJECT: &str = "42704";
    match error {
        pg::Error::PublicationSkipped(server) => begin_anew(&server),
        pg::Error::Server(server) if server.code() == UNDEFINED_OBJECT => begin_anew(&server),
        error => error.into(),
    }
}

fn begin_anew(server: &pg::ServerError) -> Error {
    let problem = format!("Postgres refused: {}", server.plain());
    Error::Found(format!("{problem}. Remedy: see that the publication is there, and begin `pgoutbox tail` anew"))
}

/// Makes messages of the stream, with a catalog to ask.
struct Reader<'a> {
    assembler: Assembler,
    control: Control,
    names: &'a Names,
    /// Tables that are in no catalog any more, and whose rows pass by.
    passing: HashSet<u32>,
}

impl Reader<'_> {
    async fn change(&mut self, bytes: &Bytes) -> Result<Option<Item>, Error> {
        for look in 0..=LOOKS {
            match self.assembler.change(bytes) {
                Err(outbox::Error::UnknownTable { .. }) if look < LOOKS => self.look(look).await?,
                Err(outbox::Error::UnknownTable { oid, name, .. }) => {
                    let unknown = "the catalog knows it neither as the outbox nor as a table of the publication";
                    complain(&format!("rows of table {name} (OID {oid}) pass by: {unknown}"));
                    self.passing.insert(oid);
                    self.look(0).await?;
                }
                Err(outbox::Error::Recreated { name, .. }) => {
                    let problem =
                        format!("table {name} was dropped and re-created. Remedy: begin `pgoutbox tail` anew");
                    return Err(Error::Found(problem));
                }
                item => return Ok(item.map_err(relay::Error::from)?),
            }
        }
        Ok(None)
    }

    /// Asks the catalog again, the first time at once.
    async fn look(&mut self, before: u32) -> Result<(), Error> {
        if before > 0 {
            sleep(BETWEEN_LOOKS).await;
        }
        let mut tables = tables(self.names, &self.control.inspect(self.names).await?);
        tables.others.extend(&self.passing);
        self.assembler.set_tables(tables);
        Ok(())
    }
}

/// `false`: nobody reads any more, which is how `pgoutbox tail | head` ends.
async fn print(message: &Message, out: &mut Stdout) -> Result<bool, Error> {
    let mut text = Vec::new();
    line(message, &mut text);
    let written = async {
        out.write_all(&text).await?;
        out.flush().await
    };
    match written.await {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(source) => Err(Error::System { doing: "cannot print".to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;

    #[test]
    fn who_only_looks_on_is_not_told_to_drop_a_slot() {
        let server = |code: &str| {
            let text = format!("SERROR\0C{code}\0Mpublication \"pgoutbox\" does not exist\0\0");
            pg::ServerError::parse(bytes::Bytes::from(text))
        };
        for error in [pg::Error::Server(server("42704")), pg::Error::PublicationSkipped(server("55000"))] {
            assert!(error.to_string().contains("drop the slot"));
            let error = of_stream(error);
            let text = error.to_string();
            assert!(text.contains("publication \"pgoutbox\"") && !text.contains("drop the slot"), "{text}");
            assert_eq!(error.exit_code(), ExitCode::World);
        }
    }

    #[test]
    fn rows_are_picked_by_type_and_aggregate() {
        let message = Message {
            kind: "placed".into(),
            aggregatetype: "order".into(),
            aggregateid: "42:a".into(),
            ..Message::default()
        };
        let picked = |kinds: &[&str], aggregates: &[&str]| {
            let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
            Arguments { kinds: owned(kinds), aggregates: owned(aggregates) }.wants(&message)
        };
        assert!(picked(&[], &[]) && picked(&["paid", "placed"], &[]) && picked(&[], &["user", "order"]));
        assert!(picked(&["placed"], &["order:42:a"]));
        assert!(!picked(&["paid"], &["order"]) && !picked(&["placed"], &["order:42"]) && !picked(&[], &["42:a"]));
    }
}

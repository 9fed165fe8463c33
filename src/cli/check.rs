//! `pgoutbox check`: every precondition of both peers, found before `run` would, by the same code.

use std::sync::Arc;

use crate::config::{Config, SinkSettings};
use crate::error::Error;
use crate::metrics::Metrics;
use crate::pg::Finding;
use crate::pg::catalog::Control;
use crate::pg::replication::Replication;
use crate::relay::{Broker, explain, postgres};
use crate::sink::Sink;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Findings as JSON
    #[arg(long)]
    json: bool,
}

/// One precondition.
struct Line {
    what: String,
    finding: Option<Finding>,
}

pub(super) async fn run(arguments: &Arguments, config: &Config) -> Result<(), Error> {
    let mut lines = postgres_lines(config).await;
    lines.push(broker_line(config).await);
    if arguments.json {
        let entry = |line: &Line| {
            let finding = line.finding.as_ref();
            serde_json::json!({
                "what": line.what,
                "ok": finding.is_none(),
                "problem": finding.map(|finding| &finding.problem),
                "remedy": finding.map(|finding| &finding.remedy),
            })
        };
        println!("{:#}", lines.iter().map(entry).collect::<serde_json::Value>());
    } else {
        for line in &lines {
            match &line.finding {
                None => println!("ok    {}", line.what),
                Some(finding) => {
                    println!("WRONG {}: {}\n      remedy: {}", line.what, finding.problem, finding.remedy);
                }
            }
        }
    }
    match lines.iter().filter(|line| line.finding.is_some()).count() {
        0 => Ok(()),
        count => Err(Error::Found(format!("{count} found; `pgoutbox run` would not work"))),
    }
}

/// What keeps `run` from running, as `run` itself would find it.
pub(super) async fn findings(config: &Config, control: &Control) -> Result<Vec<Finding>, Error> {
    let database = postgres::Postgres {
        settings: config.postgres.clone(),
        names: config.names.clone(),
        mapping: config.mapping.clone(),
        metrics: Arc::new(Metrics::new()),
    };
    let world = control.inspect(&config.names).await?;
    let mut findings = database.findings(&world);
    if world.in_recovery {
        let remedy = "connect to the primary; the relay waits for it".to_owned();
        findings.push(Finding { problem: format!("{} is a standby", control.place()), remedy });
    }
    Ok(findings)
}

async fn postgres_lines(config: &Config) -> Vec<Line> {
    let names = &config.names;
    let (user, database) = (&config.postgres.user, &config.postgres.database);
    let connection = format!("connection to Postgres as {user}, database {database}");
    let control = match Control::open(&config.postgres).await {
        Ok(control) => control,
        Err(error) => return vec![wrong(connection, &error)],
    };
    let replication = format!("replication connection to {} as {user}", control.place());
    let mut lines = vec![Line { what: connection, finding: None }];
    lines.push(match Replication::open(&control, &config.postgres).await {
        Ok(_) => Line { what: replication, finding: None },
        Err(error) => wrong(replication, &error),
    });
    let world = format!("slot {}, publication {}, table {}", names.slot, names.publication, names.qualified());
    match findings(config, &control).await {
        Ok(findings) if findings.is_empty() => lines.push(Line { what: world, finding: None }),
        Ok(findings) => lines
            .extend(findings.into_iter().map(|finding| Line { what: "Postgres".to_owned(), finding: Some(finding) })),
        Err(error) => lines.push(wrong(world, &error)),
    }
    lines
}

async fn broker_line(config: &Config) -> Line {
    let Some(sink) = config.sink.clone() else {
        return Line { what: "broker".to_owned(), finding: None };
    };
    super::run::warn(&sink);
    let (what, sink) = match sink {
        SinkSettings::Stdout => ("standard output".to_owned(), SinkSettings::Stdout),
        SinkSettings::RabbitMq(mut settings) => {
            let hosts: Vec<String> = settings.addresses.iter().map(ToString::to_string).collect();
            let what = format!("RabbitMQ at {}, exchange {}", hosts.join(", "), settings.exchange);
            // Changes nothing: `run` may declare the exchange, `check` may not, so it only opens the session.
            if settings.declare {
                settings.exchange = "amq.topic".to_owned();
                settings.declare = false;
            }
            (what, SinkSettings::RabbitMq(settings))
        }
    };
    let mut broker = super::run::Configured { sink, metrics: Arc::new(Metrics::new()) };
    let checked = async {
        let mut session = broker.open().await?;
        session.check().await
    };
    match checked.await {
        Ok(()) => Line { what, finding: None },
        Err(error) => wrong(what, &error),
    }
}

fn wrong(what: String, error: &(dyn std::error::Error + 'static)) -> Line {
    let text = explain(error);
    let (problem, remedy) = match text.split_once(". Remedy: ") {
        Some((problem, remedy)) => (problem.to_owned(), remedy.to_owned()),
        None => (text, "see that the server runs and that host and port are right".to_owned()),
    };
    Line { what, finding: Some(Finding { problem, remedy }) }
}

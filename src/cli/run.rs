//! `pgoutbox run`: the daemon.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::config::{Config, SinkSettings};
use crate::error::Error;
use crate::http;
use crate::metrics::Metrics;
use crate::relay::{self, Broker};
use crate::sink::{self, AnySink, Stdout, rabbitmq};

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// Print the settings, with secrets as ***, and exit
    #[arg(long)]
    print_config: bool,
    /// `rabbitmq` or `stdout`
    #[arg(long)]
    sink: Option<String>,
    /// How long a stop may wait for confirms, such as 25s
    #[arg(long, value_name = "DURATION")]
    drain_timeout: Option<String>,
    /// How long a peer may stay away before exit 69, such as 10min; never by default
    #[arg(long, value_name = "DURATION")]
    give_up_after: Option<String>,
}

impl Arguments {
    pub(super) fn flags(&self) -> Vec<(String, String)> {
        let flags = [
            ("sink", &self.sink),
            ("run.drain_timeout", &self.drain_timeout),
            ("run.give_up_after", &self.give_up_after),
        ];
        flags.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value.clone()?))).collect()
    }
}

/// Opens sessions with the configured broker.
enum Configured {
    RabbitMq(rabbitmq::Hosts),
    Stdout,
}

impl Configured {
    fn of(sink: SinkSettings, metrics: &Arc<Metrics>) -> Self {
        match sink {
            SinkSettings::RabbitMq(settings) => Configured::RabbitMq(rabbitmq::Hosts::new(settings, metrics.clone())),
            SinkSettings::Stdout => Configured::Stdout,
        }
    }
}

impl Broker for Configured {
    type Sink = AnySink;

    async fn open(&mut self) -> Result<AnySink, sink::Error> {
        Ok(match self {
            Configured::RabbitMq(hosts) => AnySink::RabbitMq(Box::new(hosts.open().await?)),
            Configured::Stdout => AnySink::Stdout(Stdout::open()),
        })
    }

    fn pass_on(&mut self) {
        if let Configured::RabbitMq(hosts) = self {
            hosts.put_last();
        }
    }
}

pub(super) async fn run(arguments: &Arguments, config: Config) -> Result<(), Error> {
    if arguments.print_config {
        return super::write_out(config.printed()).map(drop);
    }
    let metrics = Arc::new(Metrics::new());
    let stop = stop_on_signal(&metrics)?;
    serve(&config, &metrics).await?;
    warn(&config.sink);
    let broker = Configured::of(config.sink, &metrics);
    let slot = config.names.slot.clone();
    let database = relay::postgres::Postgres {
        settings: config.postgres,
        names: config.names,
        mapping: config.mapping.clone(),
        metrics: metrics.clone(),
        said: HashSet::new(),
    };
    let ended = relay::run(database, broker, &config.mapping, &config.relay, &metrics, stop).await;
    ended.map_err(|error| Error::of_relay(error, &slot))?;
    tracing::info!("stopped");
    Ok(())
}

/// Says once what is unsafe on the way to the broker.
fn warn(sink: &SinkSettings) {
    match sink {
        SinkSettings::RabbitMq(settings) => settings.warnings().iter().for_each(|warning| tracing::warn!("{warning}")),
        SinkSettings::Stdout => Stdout::warning().iter().for_each(|warning| tracing::warn!("{warning}")),
    }
}

async fn serve(config: &Config, metrics: &Arc<Metrics>) -> Result<(), Error> {
    let Some(address) = config.http else { return Ok(()) };
    let listener = http::listen(address).await.map_err(|source| cannot_listen(address, source))?;
    tracing::info!(%address, "probes and metrics");
    tokio::spawn(http::serve(listener, metrics.clone()));
    Ok(())
}

/// A port that this user may never have is a wrong setting. One that is taken may be a predecessor's, who is about to end,
/// and an address that is not there may come up with its network: a supervisor tries these again.
fn cannot_listen(address: SocketAddr, source: std::io::Error) -> Error {
    match source.kind() {
        ErrorKind::PermissionDenied => Error::Config(vec![format!(
            "http.listen: this user may not listen on {address}: {source}; name a port from 1024, or none with an empty text"
        )]),
        _ => Error::System {
            doing: format!("cannot listen on http.listen = {address} (set another, or none with an empty text)"),
            source,
        },
    }
}

/// True once SIGTERM or SIGINT came.
fn stop_on_signal(metrics: &Arc<Metrics>) -> Result<watch::Receiver<bool>, Error> {
    let listen =
        |kind| signal(kind).map_err(|source| Error::System { doing: "cannot listen for signals".to_owned(), source });
    let (mut terminate, mut interrupt) = (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    let (sender, receiver) = watch::channel(false);
    let metrics = metrics.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: settling what is in flight");
        metrics.stopping();
        sender.send_replace(true);
        // Kept: a receiver must never see the sender go.
        std::future::pending::<()>().await;
    });
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ExitCode;

    #[test]
    fn a_port_that_may_be_free_later_is_another_fault_than_one_that_never_is_given() {
        for (kind, code) in [
            (ErrorKind::PermissionDenied, ExitCode::Usage),
            (ErrorKind::AddrInUse, ExitCode::Unavailable),
            (ErrorKind::AddrNotAvailable, ExitCode::Unavailable),
        ] {
            let error = cannot_listen(SocketAddr::from(([127, 0, 0, 1], 80)), kind.into());
            assert_eq!(error.exit_code(), code, "{kind}");
            assert!(error.to_string().contains("http.listen") && error.to_string().contains("127.0.0.1:80"), "{error}");
        }
    }
}

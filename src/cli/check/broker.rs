//! The broker, as far as a publisher depends on it.

use crate::config::{Config, SinkSettings};
use crate::finding::{Look, Remedy};
use crate::sink::rabbitmq::probe::{self, Deep};

pub(super) async fn look(config: &Config, deep: Option<&Deep>) -> Vec<Look> {
    match &config.sink {
        SinkSettings::RabbitMq(settings) => {
            let mut looks: Vec<Look> = settings.warnings().iter().map(|warning| note(warning)).collect();
            looks.extend(probe::look(settings, deep).await);
            looks
        }
        SinkSettings::Stdout => vec![Look::sound("standard output")],
    }
}

/// What `run` warns of at its start.
fn note(warning: &str) -> Look {
    let (what, rest) = warning.split_once(": ").unwrap_or(("RabbitMQ", warning));
    let (problem, remedy) = rest.split_once(". Remedy: ").unwrap_or((rest, ""));
    Look::note(what, problem, if remedy.is_empty() { Remedy::default() } else { Remedy::act(remedy) })
}

//! The broker, as far as a publisher depends on it.

use crate::config::{Config, SinkSettings};
use crate::finding::Look;
use crate::sink::rabbitmq::probe::{self, Deep};

pub(super) async fn look(config: &Config, deep: Option<&Deep>) -> Vec<Look> {
    match &config.sink {
        SinkSettings::RabbitMq(settings) => probe::look(settings, deep).await,
        SinkSettings::Stdout => vec![Look::sound("standard output")],
    }
}

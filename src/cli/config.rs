//! `pgoutbox config`: what there is to set.
//!
//! The trap: nobody reads a reference to find the one key that matters, so it is given as the file in which to set it.

use crate::config::example;
use crate::error::Error;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Print a pgoutbox.toml with every setting, its meaning and its default, all commented out
    Example,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    match arguments.what {
        What::Example => super::write_out(&example()).map(drop),
    }
}

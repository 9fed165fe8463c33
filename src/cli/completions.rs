//! `pgoutbox completions`: a script for a shell, made from the same definitions that parse the arguments.
//!
//! The trap: clap writes to its output directly and panics when the reader has gone (`pgoutbox completions bash | head`).

use clap_complete::Shell;

use crate::error::Error;

#[derive(Debug, clap::Args)]
pub(super) struct Arguments {
    /// For which shell
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(arguments: &Arguments) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut super::command(), "pgoutbox", &mut script);
    super::write_out(&String::from_utf8_lossy(&script)).map(drop)
}

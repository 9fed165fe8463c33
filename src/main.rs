//! Parse, run, exit code; nothing else.

fn main() -> std::process::ExitCode {
    pgoutbox::cli::main(std::env::args_os()).into()
}

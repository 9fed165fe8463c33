//! What several integration tests need.
//!
//! The trap: a test that skips itself when a server is missing passes for ever. A missing server fails here, with the remedy.

use std::path::{Path, PathBuf};

/// The directory of PostgreSQL 18's programs, for `Postgres::start_from`.
pub(crate) fn postgres_18() -> PathBuf {
    let bin = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/servers/postgresql-18/native/bin");
    assert!(
        bin.join("postgres").is_file(),
        "{} is missing: run `make test`, or scripts/install-postgres-18 once",
        bin.display()
    );
    bin
}

//! Decoders on random bytes, in one process and a few seconds: the corpus as it is, and mutations of it.
//!
//! The trap: purely random bytes never get past the first length. Mutations of what is nearly right do. The seed is the same
//! every time, so that a red run is the fault of the change it is about; `PGOUTBOX_FUZZ_SEED` and `PGOUTBOX_FUZZ_ROUNDS` go
//! elsewhere, `make fuzz` goes on from here with coverage as its guide, and what they find belongs into `fuzz/corpus`.

mod targets;

use std::path::Path;

use targets::{ALL, Target};

const SEED: u64 = 0;

/// Mutations a target.
const ROUNDS: usize = 20_000;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    // One seed, one run: whatever order the file system has.
    files.sort();
    assert!(!files.is_empty(), "{} is empty", directory.display());
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

fn mutated(corpus: &[Vec<u8>], random: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = random.choice(corpus).unwrap().clone();
    for _ in 0..random.usize(1..6) {
        let at = random.usize(0..=bytes.len());
        let end = (at + random.usize(0..9)).min(bytes.len());
        match random.u8(0..7) {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, random.u8(..)),
            2 => drop(bytes.drain(at..end)),
            // Lengths and counts at their edges.
            3 => bytes[at..end].fill(*random.choice([0, 1, 0x7f, 0x80, 0xff]).as_ref().unwrap()),
            4 => {
                let other = random.choice(corpus).unwrap();
                let from = random.usize(0..=other.len());
                bytes.splice(at..end, other[from..].iter().copied());
            }
            5 => {
                let piece = bytes[at..end].to_vec();
                bytes.splice(at..at, piece);
            }
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.u8(0..8);
                }
            }
        }
        bytes.truncate(64 * 1024);
    }
    bytes
}

fn survives(name: &str) {
    let (_, target): (&str, Target) = *ALL.iter().find(|(known, _)| *known == name).unwrap();
    let corpus = corpus(name);
    corpus.iter().for_each(|bytes| target(bytes));
    let number = |variable: &str| std::env::var(variable).ok().map(|text| text.parse::<u64>().unwrap());
    let seed = number("PGOUTBOX_FUZZ_SEED").unwrap_or(SEED);
    println!("{name}: PGOUTBOX_FUZZ_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..number("PGOUTBOX_FUZZ_ROUNDS").map_or(ROUNDS, |rounds| usize::try_from(rounds).unwrap()) {
        let bytes = mutated(&corpus, &mut random);
        if std::panic::catch_unwind(|| target(&bytes)).is_err() {
            panic!("{name}, seed {seed}: {}", bytes.escape_ascii());
        }
    }
}

#[test]
fn no_bytes_break_the_pgoutput_decoder() {
    survives("pgoutput");
}

#[test]
fn no_bytes_break_the_framing_of_a_connection() {
    survives("frames");
}

#[test]
fn no_sequence_of_changes_breaks_the_assembler() {
    survives("assembler");
}

#[test]
fn no_file_and_no_environment_break_the_configuration() {
    survives("config");
}

#[test]
fn no_text_breaks_a_template() {
    survives("template");
}

#[test]
fn no_headers_break_their_mapping() {
    survives("headers");
}

#[test]
fn no_text_breaks_the_settings_of_a_connection() {
    survives("settings");
}

#[test]
fn no_text_breaks_the_address_of_a_broker() {
    survives("address");
}

#[test]
fn every_target_has_a_corpus_and_a_program_of_its_own() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let manifest = std::fs::read_to_string(root.join("Cargo.toml")).unwrap();
    for (name, _) in ALL {
        assert!(!corpus(name).is_empty());
        let program = std::fs::read_to_string(root.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(program.contains(&format!("targets::{name}(data)")), "{program}");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/Cargo.toml");
    }
}

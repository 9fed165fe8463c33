//! See `targets::address`, which the tests run as well.
#![no_main]

#[allow(dead_code)]
#[path = "../../tests/it/fuzz/targets.rs"]
mod targets;

libfuzzer_sys::fuzz_target!(|data: &[u8]| targets::address(data));

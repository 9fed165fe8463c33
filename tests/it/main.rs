//! The one integration binary.
// clippy.toml lifts these inside tests; their helper functions are tests as well.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod demo;
mod servers;
mod support;

//! The one integration binary.
// clippy.toml lifts these inside tests; their helper functions are tests as well.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod delivery;
mod rows;
mod servers;
mod stops;
mod support;
mod verbs;

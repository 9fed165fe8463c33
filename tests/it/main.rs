//! The one integration binary.
// clippy.toml lifts these inside tests; their helper functions are tests as well.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]

mod crashes;
mod delivery;
mod demo;
mod door;
mod failover;
mod faults;
mod feedback;
mod findings;
mod fuzz;
mod golden;
mod links;
mod memory;
mod newcomer;
mod outages;
mod output;
mod package;
mod privileges;
mod probes;
mod rows;
mod scripted;
mod servers;
mod simulation;
mod sink;
mod stops;
mod streams;
mod support;
mod tidy;
mod verbs;
mod versions;

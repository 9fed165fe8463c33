//! The one integration binary.

mod servers;
mod support;

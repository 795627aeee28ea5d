//! Tests of whole paths through the crate, against servers.
#![allow(clippy::unwrap_used)]

mod places;
mod registry;

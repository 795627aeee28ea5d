//! Tests of whole paths through the crate, against servers.

mod places;
mod registry;

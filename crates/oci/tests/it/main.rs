//! Tests of whole paths through the crate, against servers.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod places;
mod registry;

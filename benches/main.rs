//! What can be measured in one process: `cargo bench -p loris-benches [-- FILTER]`.
//!
//! Figures of one run can be compared with each other, and with nothing else: that is why flate2 runs beside us. What
//! needs registries, links and peers is measured by `loris bench`.
#![allow(missing_docs, reason = "the names of measurements say what they are")]
#![allow(clippy::unwrap_used, reason = "what is made up here is known to be sound")]

mod compression;
mod convert;
mod ensure;
mod table;
mod tar;

fn main() {
    divan::main();
}

//! The project's own chores: `cargo xtask demo | test | lint | peers | protos | fuzz`.
//!
//! Each command installs what it needs, from Debian's packages and crates.io alone, and says what it does. Nothing here is
//! part of the product.
#![forbid(unsafe_code)]

mod edges;
mod fuzz;
mod lint;
mod peers;
mod protos;
mod run;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the Loris project.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Build Loris and let it show its main job: one image, pulled whole and lazily, over an everyday link
    Demo {
        /// Given on to `loris demo`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Install the real peers and run every test
    Test {
        /// Do not install anything; tests whose peers are missing are skipped, and counted
        #[arg(long)]
        no_install: bool,
        /// Given on to `cargo test`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Check format, clippy, documentation, crate edges and dependencies' licences
    Lint,
    /// Install the real peers that tests and benchmarks run against (Debian packages; needs root)
    Peers,
    /// Generate the code of containerd's and Kubernetes' protocols
    Protos {
        /// Change nothing; fail where the code would be another
        #[arg(long)]
        check: bool,
    },
    /// Run fuzz targets, each for a while (installs cargo-fuzz)
    Fuzz {
        /// Seconds for each target
        #[arg(long, default_value_t = 600)]
        seconds: u64,
        /// Targets; all of them where none is given
        targets: Vec<String>,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().chore {
        Chore::Demo { arguments } => run::demo(&arguments),
        Chore::Test { no_install, arguments } => test::test(no_install, &arguments),
        Chore::Lint => lint::lint(),
        Chore::Peers => peers::install(),
        Chore::Protos { check } => protos::protos(check),
        Chore::Fuzz { seconds, targets } => fuzz::fuzz(seconds, &targets),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

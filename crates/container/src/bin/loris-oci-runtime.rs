//! The embedded runtime as a program of its own: what `loris oci-runtime` is, for tests and for other engines.

use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    ExitCode::from(loris_container::embedded::main(&args))
}

//! The keeper of mounts as a program of its own, for the tests of this crate; `loris` is its own keeper.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_none_or(|verb| verb != loris_mount::keeper::VERB) {
        eprintln!("usage: mount-keeper {} MODE PATIENCE -- COMMAND...", loris_mount::keeper::VERB);
        return ExitCode::from(2);
    }
    loris_mount::keeper::main(&arguments.collect::<Vec<_>>())
}

//! `loris`: starts containers before their images are pulled.
//!
//! This crate is the door: it turns a command line into calls of the libraries, shows progress and results, and maps
//! errors to exit statuses ([`failure`]). What a verb does is not decided here.
//!
//! Results go to standard output (one line `REF@sha256:...` from verbs that write an image, or a report with `--json`),
//! everything else to standard error.
#![forbid(unsafe_code)]

mod access;
mod activity;
mod bench;
mod cache;
mod convert;
mod copy;
mod daemon;
mod demo;
mod doctor;
mod engine;
mod explain;
mod failure;
mod fs;
mod index;
mod inspect;
mod logging;
mod measure;
mod mount;
mod opened;
mod progress;
mod run;
mod signals;
mod stage;
mod status;
mod table;
mod verify;
mod warm;

use std::{io::Write as _, process::ExitCode, time::Duration};

use anyhow::Context as _;
use clap::{CommandFactory, FromArgMatches as _, Parser, Subcommand, error::ErrorKind};

use crate::{access::Access, failure::Outcome, signals::unless_signalled};

/// How long threads get to see that what they work for was given up. They look every few milliseconds.
const STOPPING: Duration = Duration::from_secs(5);

/// Starts containers before their images are pulled.
#[derive(Parser)]
#[command(name = "loris", version, max_term_width = 100, propagate_version = true)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

/// Options of every verb.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct Global {
    /// Print a full report as JSON on standard output
    #[arg(long, global = true)]
    json: bool,
    /// Show no progress
    #[arg(long, short, global = true)]
    quiet: bool,
    /// What to log on standard error: error, warn, info, debug, trace, or a filter such as `loris_lazy=debug`
    #[arg(long, global = true, env = "LORIS_LOG", default_value = "warn", value_name = "FILTER", value_parser = logging::filter)]
    log: String,
    #[command(flatten)]
    access: Access,
}

#[derive(Subcommand)]
enum Verb {
    /// Copy an image between registries, layouts and archives
    Copy(copy::CopyArguments),
    /// Copy an image from a registry to a file or directory
    Pull(copy::PullArguments),
    /// Copy an image from a file or directory to a registry
    Push(copy::PushArguments),
    /// Write an image to an archive
    Save(copy::SaveArguments),
    /// Read an image from an archive
    Load(copy::LoadArguments),
    /// Convert an image into a lazily pullable one
    Convert(convert::ConvertArguments),
    /// Make an index of an image's layers, which stay as they are, so that they are read lazily
    Index(index::IndexArguments),
    /// Show what each layer really is, and whether it would be lazy
    Inspect(inspect::InspectArguments),
    /// Look into an image by range reads, without pulling it
    #[command(subcommand)]
    Fs(fs::FsCommand),
    /// Check an image: digests, tables of contents, annotations
    Verify(verify::VerifyArguments),
    /// Mount an image lazily at a directory
    Mount(mount::MountArguments),
    /// Unmount what `loris mount` has mounted
    #[command(visible_alias = "unmount")]
    Umount(mount::UmountArguments),
    /// Run a container over a lazily mounted image
    Run(run::RunArguments),
    /// Fetch all of an image ahead of time, so that it is mounted without its registry
    Warm(warm::WarmArguments),
    /// Show what of images is here, who uses it, and what is being fetched and why
    Status(status::StatusArguments),
    /// Show whether an image or a container is lazy under containerd, which layers are not and why, and what was waited for
    Explain(explain::ExplainArguments),
    /// Show, check and clean what was kept of images
    #[command(subcommand)]
    Cache(cache::CacheCommand),
    /// Serve lazy images to others: containerd
    #[command(subcommand)]
    Daemon(daemon::DaemonCommand),
    /// Show what this machine allows, which engine mounts would get, and what to change for a better one
    Doctor(doctor::DoctorArguments),
    /// Measure: lazy against full pull, and conversion against the tools of today
    Bench(bench::BenchArguments),
    /// Show the main job on this machine: one image, pulled whole and lazily
    Demo(demo::DemoArguments),
    /// Print a completion script for a shell
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Take down the mounts of a process that was killed, as its keeper calls it
    #[command(hide = true, name = engine::SWEEP_VERB)]
    MountSweep {
        /// Its register of mounts
        register: std::path::PathBuf,
    },
    /// The embedded OCI runtime, as `loris run` calls it
    #[command(hide = true, name = run::RUNTIME_VERB)]
    OciRuntime(run::RuntimeArguments),
}

fn main() -> ExitCode {
    // The keeper forks, and must stay small: not even its arguments are parsed, which follow `--` as they are.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == loris_mount::keeper::VERB) {
        return loris_mount::keeper::main(&std::env::args_os().skip(2).collect::<Vec<_>>());
    }
    let matches = Arguments::command().get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let global = arguments.global;
    // The embedded runtime forks: it must be alone in its process, without the threads that logging and the network bring.
    if let Verb::OciRuntime(arguments) = &arguments.verb {
        return run::runtime_main(arguments);
    }
    if let Verb::Completion { shell } = arguments.verb {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Arguments::command(), "loris", &mut script);
        let written = std::io::stdout().write_all(&script).context("writing the script");
        return failure::exit(written.map(|()| Outcome::Done));
    }
    if global.json
        && let Some(verb) = arguments.verb.without_report()
    {
        let message = format!("`{verb}` has no report; leave --json out\n");
        Arguments::command().error(ErrorKind::ArgumentConflict, message).exit();
    }
    logging::start(&global.log);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("loris: can't start threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let outcome = match arguments.verb {
        Verb::Copy(arguments) => runtime.block_on(unless_signalled(arguments.run(&global))),
        Verb::Pull(arguments) => runtime.block_on(unless_signalled(arguments.run(&global))),
        Verb::Push(arguments) => runtime.block_on(unless_signalled(arguments.run(&global))),
        Verb::Save(arguments) => runtime.block_on(unless_signalled(arguments.run(&global))),
        Verb::Load(arguments) => runtime.block_on(unless_signalled(arguments.run(&global))),
        Verb::Convert(arguments) => runtime.block_on(unless_signalled(arguments.run(&global))),
        Verb::Index(arguments) => runtime.block_on(unless_signalled(arguments.run(&global))),
        Verb::Inspect(arguments) => runtime.block_on(arguments.run(&global)),
        Verb::Fs(command) => runtime.block_on(command.run(&global)),
        Verb::Verify(arguments) => runtime.block_on(arguments.run(&global)),
        Verb::Mount(arguments) => runtime.block_on(arguments.run(&global)),
        Verb::Umount(arguments) => arguments.run(&global),
        Verb::MountSweep { register } => engine::sweep(&register),
        Verb::Run(arguments) => runtime.block_on(arguments.run(&global)),
        Verb::Warm(arguments) => runtime.block_on(unless_signalled(arguments.run(&global))),
        Verb::Status(arguments) => arguments.run(&global),
        Verb::Explain(arguments) => arguments.run(&global),
        Verb::Cache(command) => command.run(&global),
        Verb::Daemon(command) => runtime.block_on(command.run(&global, &matches)),
        Verb::Doctor(arguments) => arguments.run(&global),
        Verb::Bench(arguments) => runtime.block_on(arguments.run(&global)),
        Verb::Demo(arguments) => runtime.block_on(unless_signalled(arguments.run(&global))),
        Verb::Completion { .. } | Verb::OciRuntime(_) => Ok(Outcome::Done),
    };
    // Background work that is still under way (a prefetch nobody waits for) must not hold up the exit.
    if matches!(outcome, Ok(Outcome::Interrupted(_))) {
        // Work that was given up has temporary files.
        runtime.shutdown_timeout(STOPPING);
    } else {
        runtime.shutdown_background();
    }
    failure::exit(outcome)
}

impl Verb {
    /// Returns the name of a verb that has nothing to print as JSON.
    fn without_report(&self) -> Option<&'static str> {
        match self {
            Self::Run(_) => Some("run"),
            Self::Daemon(_) => Some("daemon"),
            Self::Mount(_) => Some("mount"),
            Self::Umount(_) => Some("umount"),
            Self::Fs(fs::FsCommand::Cat(_)) => Some("fs cat"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}

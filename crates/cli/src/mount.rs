//! `mount` and `umount`: a lazy root file system at a directory.
//!
//! A mount needs a process that serves it. Without `--foreground` the command starts itself once more in the background,
//! waits until that one says that the mount is live, and ends.

use std::{
    ffi::{OsStr, OsString},
    io::{BufRead as _, BufReader, Read as _, Seek as _, Write as _},
    os::unix::ffi::OsStrExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use clap::Args;
use loris_lazy::{FetchPolicy, LazyLayer, beside::with_known_indexes, open::open_all_layers};
use loris_mount::{
    Special,
    keeper::{Inherited, Keeper},
    mounts::Unmounted,
    rootfs::{Access, RootFs, RootFsOptions, Server},
};
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    Global,
    access::{self, OnePlatform},
    activity,
    engine::{self, EngineArgument},
    failure::{self, Outcome, Usage},
    opened::{FetchAhead, Looked, OpenLazily, Opened},
};

mod resume;

/// Mount an image lazily at a directory.
#[derive(Args)]
pub(crate) struct MountArguments {
    /// The image
    image: String,
    /// An existing directory
    directory: PathBuf,
    /// Let the mount be written to; changes are thrown away when it is unmounted
    #[arg(long)]
    rw: bool,
    /// Let the mount be written to, and keep the changes in this directory
    #[arg(long, value_name = "DIR", conflicts_with = "rw")]
    upper: Option<PathBuf>,
    /// Let set-user-id programs of the image run with their owner's rights: only for images whose maker you trust as root
    #[arg(long)]
    suid: bool,
    /// Let device files of the image lead to devices
    #[arg(long)]
    dev: bool,
    /// Serve the mount from this process, until it is unmounted or interrupted
    #[arg(long, short)]
    foreground: bool,
    /// Where the serving process in the background writes its log
    #[arg(long, value_name = "FILE", conflicts_with = "foreground")]
    log_file: Option<PathBuf>,
    #[command(flatten)]
    engine: EngineArgument,
    #[command(flatten)]
    platform: OnePlatform,
    #[command(flatten)]
    open: OpenLazily,
    #[command(flatten)]
    ahead: FetchAhead,
}

/// Unmount what `loris mount` has mounted.
#[derive(Args)]
pub(crate) struct UmountArguments {
    /// The directory
    directory: PathBuf,
}

/// Set for the process in the background: how it knows that somebody waits for its word.
const BACKGROUND: &str = "LORIS_MOUNT_BACKGROUND";
/// The word.
const READY: &str = "ready";
/// Between attempts to take over the mount of a killed process, whose last descriptors may not be closed yet.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Numbers of signals, for exit statuses.
const INTERRUPT: u8 = 2;
const TERMINATE: u8 = 15;

impl MountArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        if std::env::var_os(BACKGROUND).is_some() {
            return self.serve(global, true).await;
        }
        if self.foreground {
            return self.serve(global, false).await;
        }
        if self.image == "-" {
            return Err(Usage("an archive on standard input can only be mounted with --foreground".to_owned()).into());
        }
        start_in_background(&self.directory)
    }

    async fn serve(self, global: &Global, background: bool) -> failure::Result {
        // Before the mount exists, so that no signal finds it without its handler.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mounted = match Keeper::inherit().context("taking over from a process that was killed")? {
            Some(inherited) => tokio::select! {
                mounted = self.take_over(global, inherited) => mounted?,
                _ = interrupt.recv() => return self.give_up(128 + INTERRUPT),
                _ = terminate.recv() => return self.give_up(128 + TERMINATE),
            },
            None => {
                if background {
                    // Whoever waits for the word may be killed. A mount that nobody knows of must not come up then.
                    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
                }
                tokio::select! {
                    mounted = self.mount(global, background) => mounted?,
                    _ = interrupt.recv() => return Ok(Outcome::Interrupted(128 + INTERRUPT)),
                    _ = terminate.recv() => return Ok(Outcome::Interrupted(128 + TERMINATE)),
                }
            }
        };
        if background {
            rustix::process::set_parent_process_death_signal(None)?;
            tell_ready(self.log_file.as_deref())?;
        } else if !global.quiet {
            eprintln!("{} is mounted at {}; interrupt to unmount it", self.image, self.directory.display());
        }
        tokio::select! {
            () = mounted.ended() => {}
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        mounted.take_down().await
    }

    async fn mount(&self, global: &Global, background: bool) -> anyhow::Result<Mounted> {
        let store = self.open.store()?;
        let looked = Looked::open(global, &self.image, &self.platform, &self.open, &store, FetchPolicy::MOUNT).await?;
        let opened = Opened::from_looked(looked.image, &self.image)?;
        let access = match (&self.upper, self.rw) {
            (Some(directory), _) => Access::Keep(std::path::absolute(directory)?),
            (None, true) => Access::Discard,
            (None, false) => Access::ReadOnly,
        };
        // Whoever waits for a process in the foreground wants to hear of its end, and not have another one.
        let pager = if background {
            self.engine.restarting(resume::note(&looked.document, &opened.config().diff_ids)?, self.log())
        } else {
            self.engine.paging()
        };
        let options = RootFsOptions {
            mountpoint: Some(self.directory.clone()),
            access,
            engine: self.engine.engine,
            special: Special { suid: self.suid, devices: self.dev },
            pager,
            ..RootFsOptions::read_only(&store)
        };
        let runtime = tokio::runtime::Handle::current();
        let root = RootFs::assemble(opened.layers(), &options, &runtime)
            .with_context(|| format!("mounting {} at {}", self.image, self.directory.display()))?;
        self.ahead.begin(opened.layers(), None);
        activity::tell(&store, "mount", &self.image, Some(&self.directory), opened.layers());
        Ok(Mounted { root: Some(root), server: None, layers: opened.layers().to_vec() })
    }

    /// Goes on where a process was killed that had been started with the same arguments. What is here is read without the
    /// registry.
    async fn take_over(&self, global: &Global, inherited: Inherited) -> anyhow::Result<Mounted> {
        let (document, diff_ids) = resume::read(&inherited.note()?)?;
        let store = self.open.store()?;
        for data in inherited.data_files()? {
            store.adopt(data)?;
        }
        let options = self.open.options(FetchPolicy::MOUNT);
        let manifest = document.manifest(&options.limits)?;
        let manifest = with_known_indexes(manifest, &document.digest, &store, &options);
        let opening = async {
            let source = global.access.source(&self.image).await?;
            anyhow::Ok(open_all_layers(source, &manifest, &store, &options, &diff_ids).await?)
        };
        // Readers wait. Where this process gives up, the keeper refuses those who have waited long enough, and starts
        // another one.
        let patience = Duration::from_secs(self.engine.read_timeout);
        let opened = tokio::time::timeout(patience, opening).await;
        let layers = opened.context("what the store lacks can't be had in time")??;
        let log = Some(self.log());
        let runtime = tokio::runtime::Handle::current();
        let server = Server::resume(inherited, &layers, &self.engine.pager_options(engine::restart(), log), &runtime)?;
        self.ahead.begin(&layers, None);
        activity::tell(&store, "mount", &self.image, Some(&self.directory), &layers);
        let mut pause = FIRST_PAUSE;
        // From here on reads are answered. Given up now, they would be refused for ever.
        let root = loop {
            match RootFs::resume(&self.directory, &layers, &server) {
                Ok(root) => break root,
                Err(error) => {
                    tracing::warn!(directory = %self.directory.display(), %error, "not taken over yet; tried again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        };
        Ok(Mounted { root, server: Some(server), layers })
    }

    /// Ends without having taken over what a killed process had mounted.
    fn give_up(&self, status: u8) -> failure::Result {
        if let Err(error) = loris_mount::rootfs::unmount_at(&self.directory) {
            tracing::warn!(%error, "unmounting");
        }
        Ok(Outcome::Interrupted(status))
    }

    /// Where a process in the background writes its log.
    fn log(&self) -> PathBuf {
        self.log_file.clone().unwrap_or_else(|| "/dev/null".into())
    }
}

/// A mount that this process serves.
struct Mounted {
    /// `None` where it was unmounted while no process served it, but is still in use.
    root: Option<RootFs>,
    server: Option<Server>,
    layers: Vec<Arc<LazyLayer>>,
}

impl Mounted {
    async fn ended(&self) {
        match (&self.root, &self.server) {
            (Some(root), _) => root.ended().await,
            (None, Some(server)) => server.idle().await,
            (None, None) => {}
        }
    }

    async fn take_down(self) -> failure::Result {
        if let Some(root) = self.root {
            root.unmount().context("unmounting")?;
        }
        for layer in &self.layers {
            layer.sync().await.context("keeping what was fetched")?;
        }
        Ok(Outcome::Done)
    }
}

impl UmountArguments {
    pub(crate) fn run(self, global: &Global) -> failure::Result {
        // First: one whose processes were killed is not only to be unmounted.
        let swept = engine::sweep_dead();
        let directory = self.directory.canonicalize().unwrap_or_else(|_| self.directory.clone());
        let unmounted = match (swept.in_use.contains(&directory), swept.mountpoints.contains(&directory)) {
            (true, _) => Unmounted::Detached,
            (_, true) => Unmounted::Whole,
            _ => {
                let unmounted = loris_mount::rootfs::unmount_at(&self.directory)
                    .with_context(|| format!("unmounting {}", self.directory.display()))?;
                // Nobody else takes one out of the register that needed no process.
                engine::sweep_dead();
                unmounted
            }
        };
        if unmounted == Unmounted::Detached && !global.quiet {
            eprintln!("{} is still in use; it was detached and goes when its users do", self.directory.display());
        }
        Ok(Outcome::Done)
    }
}

fn start_in_background(directory: &Path) -> failure::Result {
    let program = std::env::current_exe().context("finding this program")?;
    let (arguments, password) = without_password(std::env::args_os().skip(1));
    // A file and not a pipe: however much is logged before the mount is live, nobody waits for somebody to read it.
    let mut errors = tempfile::tempfile().context("making a file for what the serving process says")?;
    let mut child = Command::new(program)
        .args(arguments)
        .envs(password.map(|password| (access::CREDS_VARIABLE, password)))
        .env(BACKGROUND, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::from(errors.try_clone()?))
        .spawn()
        .context("starting the process that serves the mount")?;
    let output = child.stdout.take().context("no output of the serving process")?;
    let mut line = String::new();
    BufReader::new(output.take(64)).read_line(&mut line)?;
    if line.trim() == READY {
        return Ok(Outcome::Done);
    }
    let status = child.wait()?;
    let mut said = Vec::new();
    errors.rewind()?;
    errors.take(64 << 10).read_to_end(&mut said)?;
    let said = String::from_utf8_lossy(&said);
    // It has said what is wrong, in our own form.
    eprint!("{said}");
    if said.trim().is_empty() {
        bail!("{} is not mounted: the process that was to serve it has ended ({status})", directory.display());
    }
    Ok(if status.code() == Some(3) { Outcome::SaidRefused } else { Outcome::FoundFaults })
}

/// Takes credentials out of arguments: those of a process that runs for days can be read by all, its environment by its
/// owner alone.
fn without_password(arguments: impl Iterator<Item = OsString>) -> (Vec<OsString>, Option<OsString>) {
    let (mut kept, mut password, mut is_next) = (Vec::new(), None, false);
    for argument in arguments {
        if std::mem::take(&mut is_next) {
            password = Some(argument);
        } else if argument == "--creds" {
            is_next = true;
        } else if let Some(value) = argument.as_bytes().strip_prefix(b"--creds=") {
            password = Some(OsStr::from_bytes(value).to_owned());
        } else {
            kept.push(argument);
        }
    }
    (kept, password)
}

/// Tells the process in the foreground that the mount is live, and lets go of its standard streams and its terminal.
fn tell_ready(log: Option<&Path>) -> anyhow::Result<()> {
    let rest = match log {
        Some(path) => std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .with_context(|| path.display().to_string())?,
        None => std::fs::OpenOptions::new().write(true).open("/dev/null")?,
    };
    let mut output = std::io::stdout();
    writeln!(output, "{READY}")?;
    output.flush()?;
    // A process that already leads its group stays in its session; it was not started from a shell then.
    let _ = rustix::process::setsid();
    rustix::stdio::dup2_stdout(&rest)?;
    rustix::stdio::dup2_stderr(&rest)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_leave_the_command_line() {
        for (line, kept, password) in [
            ("mount a b", "mount a b", None),
            ("mount --creds u:p a b", "mount a b", Some("u:p")),
            ("--creds=u:p mount a --rw b", "mount a --rw b", Some("u:p")),
            ("mount a b --creds", "mount a b", None),
        ] {
            let (arguments, found) = without_password(line.split(' ').map(OsString::from));
            assert_eq!(arguments.join(OsStr::new(" ")), kept);
            assert_eq!(found, password.map(OsString::from), "{line}");
        }
    }
}

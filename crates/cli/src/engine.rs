//! `--engine`: how an image becomes visible, where that is not left to the probe; and what fills it meanwhile.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser as _},
};
use loris_mount::{
    engine::Engine,
    keeper,
    pager::{OnDeath, PagerOptions},
    register,
    rootfs::Paging,
};

use crate::failure::{self, Outcome};

/// How an image becomes visible.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct EngineArgument {
    /// How the image becomes visible; without, the best way that works here, see `loris doctor`
    #[arg(long, env = "LORIS_ENGINE", value_parser = PossibleValuesParser::new(Engine::ALL.map(Engine::name)).try_map(|name| name.parse::<Engine>()))]
    pub engine: Option<Engine>,
    /// How long a read waits for content that can't be had at the moment, before it fails (engine fanotify; the others fail
    /// when the registry was asked as often as --retries says)
    #[arg(long, env = "LORIS_READ_TIMEOUT", value_name = "SECONDS", default_value_t = 60)]
    pub read_timeout: u64,
}

/// Where is noted which mounts are up, unless `LORIS_REGISTER` names another directory. Gone, as they are, when the machine
/// starts anew.
const REGISTER: &str = "/run/loris/mounts";

/// Programs that are to know of each other's mounts have the same one; successors inherit it.
fn register() -> PathBuf {
    std::env::var_os("LORIS_REGISTER").map_or_else(|| REGISTER.into(), PathBuf::from)
}

impl EngineArgument {
    /// Returns what fills data files, should the engine want that; when this process is killed, its mounts are taken down.
    /// Takes down the mounts of processes that were killed together with their keepers, so that nobody reads from them.
    pub(crate) fn paging(self) -> Paging {
        let Ok(program) = keeper::this_program() else { return Paging::None };
        self.paging_with(OnDeath::Clean(vec![program.into(), SWEEP_VERB.into()]), None, None)
    }

    /// Does the same for a mount that outlives its process: a successor is started, with the same arguments, and finds the
    /// note.
    pub(crate) fn restarting(self, note: Vec<u8>, log: PathBuf) -> Paging {
        self.paging_with(restart(), Some(note), Some(log))
    }

    fn paging_with(self, on_death: OnDeath, note: Option<Vec<u8>>, log: Option<PathBuf>) -> Paging {
        // Whatever the engine: a dead mount could stand where this one will.
        sweep_dead();
        if self.engine == Some(Engine::Fuse) || !rustix::process::geteuid().is_root() {
            return Paging::None;
        }
        Paging::Own(PagerOptions { note, ..self.pager_options(on_death, log) })
    }

    /// Returns how a pager is run.
    pub(crate) fn pager_options(self, on_death: OnDeath, log: Option<PathBuf>) -> PagerOptions {
        let patience = Duration::from_secs(self.read_timeout);
        PagerOptions { patience, register: register(), on_death, keeper: None, note: None, log }
    }

    /// Returns it as arguments of another process of this program.
    pub(crate) fn arguments(self) -> Vec<String> {
        self.engine.map_or_else(Vec::new, |engine| vec!["--engine".to_owned(), engine.to_string()])
    }
}

/// The hidden verb that takes down the mounts of a process that was killed.
pub(crate) const SWEEP_VERB: &str = "mount-sweep";

/// Starts this program again, as it was started.
pub(crate) fn restart() -> OnDeath {
    let program = keeper::this_program().unwrap_or_else(|_| "/proc/self/exe".into());
    let arguments = std::env::args_os().skip(1);
    OnDeath::Restart([program.into()].into_iter().chain(arguments).collect())
}

/// Takes down the mounts of processes that were killed together with their keepers, unless they are complete: those need no
/// process. Only root has any.
pub(crate) fn sweep_dead() -> register::Swept {
    if !rustix::process::geteuid().is_root() {
        return register::Swept::default();
    }
    let swept = register::sweep(&register(), None).unwrap_or_else(|error| {
        tracing::warn!(%error, "what killed processes have left is not looked for");
        register::Swept::default()
    });
    for mountpoint in &swept.mountpoints {
        let mountpoint = mountpoint.display();
        tracing::warn!(%mountpoint, "unmounted what a killed process had left");
    }
    for mountpoint in &swept.in_use {
        let mountpoint = mountpoint.display();
        tracing::error!(%mountpoint, "it is still in use: who uses it may have read zeros, and is refused from now on; end it");
    }
    swept
}

/// Takes down the mounts of the process whose register is at `register`.
pub(crate) fn sweep(register: &Path) -> failure::Result {
    let swept = register::sweep_one(register).context("taking down the mounts of a process that was killed")?;
    for mountpoint in swept.mountpoints {
        tracing::info!(mountpoint = %mountpoint.display(), "unmounted");
    }
    Ok(Outcome::Done)
}

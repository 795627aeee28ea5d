//! `--engine`: how an image becomes visible, where that is not left to the probe; and what fills it meanwhile.

use std::{path::Path, time::Duration};

use clap::{
    Args,
    builder::{PossibleValuesParser, TypedValueParser as _},
};
use loris_mount::{
    engine::Engine,
    pager::{OnDeath, PagerOptions},
    register,
    rootfs::Paging,
};

/// How an image becomes visible.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct EngineArgument {
    /// How the image becomes visible; without, the best way that works here, see `loris doctor`
    #[arg(long, env = "LORIS_ENGINE", value_parser = PossibleValuesParser::new(Engine::ALL.map(Engine::name)).try_map(|name| name.parse::<Engine>()))]
    pub engine: Option<Engine>,
}

/// Where is noted which mounts are up. Gone, as they are, when the machine starts anew.
const REGISTER: &str = "/run/loris/mounts";
/// How long a read waits for content that can't be had at the moment.
const PATIENCE: Duration = Duration::from_secs(60);

impl EngineArgument {
    /// Returns what fills data files, should the engine want that. Takes down the mounts of processes that were killed
    /// together with their keepers, so that nobody reads from them.
    pub(crate) fn paging(self) -> Paging {
        if self.engine.is_some_and(|engine| engine != Engine::Fanotify) || !rustix::process::geteuid().is_root() {
            return Paging::None;
        }
        match register::sweep(Path::new(REGISTER)) {
            Ok(swept) => {
                for mountpoint in swept.mountpoints {
                    tracing::warn!(mountpoint = %mountpoint.display(), "unmounted what a killed process had left");
                }
            }
            Err(error) => tracing::warn!(%error, "what killed processes have left is not looked for"),
        }
        let Ok(program) = std::env::current_exe() else { return Paging::None };
        Paging::Own(PagerOptions {
            patience: PATIENCE,
            register: REGISTER.into(),
            on_death: OnDeath::Clean(vec![program.into(), "umount".into(), "--quiet".into(), "--".into()]),
            keeper: None,
            log: None,
        })
    }

    /// Returns it as arguments of another process of this program.
    pub(crate) fn arguments(self) -> Vec<String> {
        self.engine.map_or_else(Vec::new, |engine| vec!["--engine".to_owned(), engine.to_string()])
    }
}

//! The ways in which a tree becomes visible, and which of them this machine has.

use std::{fmt, str::FromStr};

mod probe;
mod tiny;

pub use probe::{EngineReport, probe};

/// A way in which a tree becomes visible.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Engine {
    /// EROFS over the data files, which the kernel reads by itself; it asks, through fanotify, before it reads what may
    /// be missing. Nothing of ours is on the way of what is here.
    Fanotify,
    /// EROFS over files of a FUSE mount of ours: metadata is the kernel's, content that is not cached is asked for.
    ErofsFuse,
    /// The same through loop devices: for kernels that mount no plain files.
    ErofsLoop,
    /// All of the tree over FUSE. The only one that needs no root.
    Fuse,
}

impl Engine {
    /// All of them, the best first.
    pub const ALL: [Self; 4] = [Self::Fanotify, Self::ErofsFuse, Self::ErofsLoop, Self::Fuse];

    /// Its name, as on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fanotify => "fanotify",
            Self::ErofsFuse => "erofs-fuse",
            Self::ErofsLoop => "erofs-loop",
            Self::Fuse => "fuse",
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A name that no engine has.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no engine is called {name:?}: there are fanotify, erofs-fuse, erofs-loop and fuse")]
pub struct UnknownEngine {
    /// The name.
    pub name: String,
}

impl FromStr for Engine {
    type Err = UnknownEngine;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let found = Self::ALL.into_iter().find(|engine| engine.name() == name);
        found.ok_or_else(|| UnknownEngine { name: name.to_owned() })
    }
}

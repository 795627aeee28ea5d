//! The root file systems that are compared: each with overlayfs over one lower directory, and writable.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use loris_mount::{
    engine::Engine,
    overlay::{OverlayMount, OverlayOptions, Upper},
};

use crate::stage::ourselves;

/// One of them. Dropping it unmounts it.
pub(super) struct Root {
    pub(super) name: String,
    pub(super) path: PathBuf,
    kind: Kind,
}

enum Kind {
    /// A plain directory.
    Unpacked(Option<OverlayMount>),
    /// A process of this program serves it.
    Ours,
    /// Somebody else's.
    Foreign,
}

impl Root {
    /// Mounts an image by an engine, in a process and with a cache of its own, as a user would.
    pub(super) fn lazy(engine: Engine, reference: &str, folder: &Path) -> Result<Self> {
        let path = folder.join(format!("{engine}.root"));
        fs::create_dir(&path)?;
        let mut command = ourselves()?;
        command.args(["mount", "--rw", "--plain-http", "--engine", engine.name(), "--cache-dir"]);
        let status = command.arg(folder.join(format!("{engine}.cache"))).arg(reference).arg(&path).status()?;
        ensure!(status.success(), "mounting by {engine}: {status}");
        Ok(Self { name: engine.name().to_owned(), path, kind: Kind::Ours })
    }

    /// Copies a root to a plain directory, which becomes the lower one of overlayfs.
    pub(super) fn unpacked(from: &Path, folder: &Path) -> Result<Self> {
        let make = |name: &str| -> Result<PathBuf> {
            let path = folder.join(name);
            fs::create_dir(&path)?;
            Ok(path)
        };
        let lower = make("unpacked")?;
        let status = Command::new("cp").arg("-a").arg(from.join(".")).arg(&lower).status().context("starting cp")?;
        ensure!(status.success(), "copying the image to a plain directory: {status}");
        let upper = Upper { upper: make("unpacked.upper")?, work: make("unpacked.work")? };
        let options =
            OverlayOptions { lower: vec![lower], upper: Some(upper), volatile: true, ..OverlayOptions::default() };
        let path = make("unpacked.root")?;
        let overlay = OverlayMount::mount(&options, &path)?;
        Ok(Self { name: "unpacked".to_owned(), path, kind: Kind::Unpacked(Some(overlay)) })
    }

    /// Takes one that stands already: `NAME=DIRECTORY`.
    pub(super) fn foreign(argument: &str) -> Result<Self> {
        let (name, path) = argument.split_once('=').context("not of the form NAME=DIRECTORY")?;
        Ok(Self { name: name.to_owned(), path: path.into(), kind: Kind::Foreign })
    }

    fn take_down(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Unpacked(overlay) => {
                if let Some(overlay) = overlay.take() {
                    overlay.unmount()?;
                }
            }
            Kind::Ours => {
                let status = ourselves()?.arg("umount").arg(&self.path).status()?;
                ensure!(status.success(), "unmounting {}: {status}", self.path.display());
            }
            Kind::Foreign => {}
        }
        Ok(())
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        if let Err(error) = self.take_down() {
            tracing::warn!(%error, "a root file system stays mounted");
        }
    }
}

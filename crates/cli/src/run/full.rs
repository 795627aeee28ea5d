//! A full pull: every layer fetched whole, checked and unpacked before anything starts. The way of images that are not
//! lazy, and what the lazy start is compared with.

use std::{
    io::{self, Read},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use loris_format::{
    compression,
    digest::{DiffId, Hasher},
    limits::Limits,
    tree::OpaqueStyle,
};
use loris_mount::{
    overlay::{OverlayMount, OverlayOptions, Upper},
    removal::remove_tree,
    unpack::unpack_layer,
};
use loris_oci::{Descriptor, ImageSource};
use tokio::sync::watch;
use tokio_util::io::{StreamReader, SyncIoBridge};

use crate::progress::Bars;

/// Layers that are fetched and unpacked at the same time: as many as containerd and Docker do.
const SIDE_BY_SIDE: usize = 3;

/// How long threads that unpack are waited for when they are stopped: longer than any of them goes without a look at
/// its input.
const STOPPING: Duration = Duration::from_secs(10);

/// The root file system of an image that was pulled whole; what is written to it goes with it.
pub(super) struct Unpacked {
    overlay: OverlayMount,
    /// Behind the overlay, so that it is removed after that was unmounted.
    folder: tempfile::TempDir,
}

impl Unpacked {
    /// Pulls and mounts. `layers` and `diff_ids` have the lowest layer first and are of one length.
    pub(super) async fn pull(
        source: &Arc<dyn ImageSource>,
        layers: &[Descriptor],
        diff_ids: &[DiffId],
        bars: &Arc<Bars>,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("loris-pulled.").tempdir().context("making a temporary folder")?;
        let work = Work::start();
        let unpacking = layers.iter().zip(diff_ids).enumerate().map(|(number, (layer, diff_id))| {
            let target = folder.path().join(format!("layer{number}"));
            unpack(source.clone(), layer.clone(), *diff_id, target, bars.clone(), work.share())
        });
        let mut lower: Vec<PathBuf> = stream::iter(unpacking).buffered(SIDE_BY_SIDE).try_collect().await?;
        drop(work);
        // Overlayfs wants the uppermost first; the empty one lets it have two, as it must.
        lower.reverse();
        let make = |name: &str| -> io::Result<PathBuf> {
            let path = folder.path().join(name);
            std::fs::create_dir(&path)?;
            Ok(path)
        };
        lower.push(make("empty")?);
        let upper = Upper { upper: make("upper")?, work: make("work")? };
        let options = OverlayOptions {
            lower,
            upper: Some(upper),
            volatile: true,
            special: loris_mount::Special::ALL,
            ..OverlayOptions::default()
        };
        let overlay = OverlayMount::mount(&options, &make("rootfs")?)?;
        Ok(Self { overlay, folder })
    }

    pub(super) fn path(&self) -> &Path {
        self.overlay.mountpoint()
    }

    pub(super) fn take_down(self) -> Result<()> {
        self.overlay.unmount().context("unmounting the root file system")?;
        let folder = self.folder.keep();
        remove_tree(&folder).with_context(|| format!("removing what was unpacked, {}", folder.display()))
    }
}

async fn unpack(
    source: Arc<dyn ImageSource>,
    layer: Descriptor,
    diff_id: DiffId,
    target: PathBuf,
    bars: Arc<Bars>,
    share: Share,
) -> Result<PathBuf> {
    std::fs::create_dir(&target)?;
    let Share { mut given_up, running } = share;
    let given_up = async move { given_up.wait_for(|given_up| *given_up).await.map(drop) };
    let blob = bars.watch(&layer, source.blob(&layer).await?).take_until(Box::pin(given_up));
    let reader = SyncIoBridge::new(StreamReader::new(blob.map_err(io::Error::other)));
    let digest = layer.digest;
    let unpacked = target.clone();
    tokio::task::spawn_blocking(move || {
        let _running = running;
        let limits = Limits::default();
        let decoded = compression::Decoder::new(reader)?;
        let mut hashed = Hashed { inner: decoded, hasher: diff_id.0.hasher() };
        unpack_layer(&mut hashed, &unpacked, OpaqueStyle::Trusted, &limits)?;
        // To the end: what is behind the archive counts for both digests, and the source checks the blob's there.
        io::copy(&mut hashed, &mut io::sink())?;
        let found = DiffId(hashed.hasher.finish());
        ensure!(found == diff_id, "its content is {found}, but the configuration says {diff_id}");
        Ok(())
    })
    .await?
    .with_context(|| format!("unpacking layer {digest}"))?;
    Ok(target)
}

/// Work of threads that write below a folder. When it is dropped, their input ends, and they are waited for: what they
/// would still write could not be removed.
struct Work {
    given_up: watch::Sender<bool>,
    running: mpsc::Sender<()>,
    ended: mpsc::Receiver<()>,
}

/// What each of the threads has of it.
struct Share {
    given_up: watch::Receiver<bool>,
    running: mpsc::Sender<()>,
}

impl Work {
    fn start() -> Self {
        let (running, ended) = mpsc::channel();
        Self { given_up: watch::Sender::new(false), running, ended }
    }

    fn share(&self) -> Share {
        Share { given_up: self.given_up.subscribe(), running: self.running.clone() }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.given_up.send_replace(true);
        self.running = mpsc::channel().0;
        // An error is what is waited for: nobody is left who could send.
        let _ = self.ended.recv_timeout(STOPPING);
    }
}

struct Hashed<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

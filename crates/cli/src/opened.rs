//! Opening an image lazily, as `fs`, `mount`, `run` and `inspect` do.

use std::{
    fs::File,
    io::Read as _,
    num::NonZeroU64,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use clap::{Args, ValueEnum as _};
use loris_format::{
    amounts,
    position::{DataOffset, DataRange},
    tree::{InodeKind, Tree},
};
use loris_lazy::{
    Command, Completion, FetchPolicy, IndexTrust, LayerError, LazyImage, LazyLayer, OpenOptions, OpenedImage, Store,
    StoreOptions, Trust,
    beside::{fetch_from, with_indexes},
    documents::Remembering,
    open_image,
};
use loris_oci::{Document, ImageSource, document::ImageConfig, platform};

use crate::{
    Global,
    access::{self, OnePlatform},
    failure::Refused,
};

/// How an image is opened lazily.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct OpenLazily {
    /// Serve layers whose content no digest in the manifest vouches for
    #[arg(long)]
    allow_unverified: bool,
    /// Whose word counts for an index beside layers that are no lazy format themselves (SOCI): the image's `manifest`
    /// (version 2), also whoever may write to the image's `repository` (version 1, a referrer), or `any`. What this machine
    /// has indexed itself counts always
    #[arg(long, value_enum, default_value_t = IndexTrusted::Manifest, env = "LORIS_INDEX_TRUST", value_name = "WHO")]
    index_trust: IndexTrusted,
    /// Look for indexes in this repository too, `registry/name`; they count with `--index-trust any`
    #[arg(long, env = "LORIS_INDEX_REPO", value_name = "REPOSITORY")]
    index_repo: Option<String>,
    #[command(flatten)]
    place: StorePlace,
}

/// Whose word counts for an index beside a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum IndexTrusted {
    #[default]
    Manifest,
    Repository,
    Any,
}

impl From<IndexTrusted> for IndexTrust {
    fn from(trusted: IndexTrusted) -> Self {
        match trusted {
            IndexTrusted::Manifest => Self::Manifest,
            IndexTrusted::Repository => Self::Repository,
            IndexTrusted::Any => Self::Any,
        }
    }
}

/// Where the store is.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct StorePlace {
    /// Where content that was read is kept
    #[arg(long, env = "LORIS_CACHE_DIR", value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Most of the disk that it may take, such as `20G`: what nobody uses makes room, the longest unused first
    #[arg(long, env = "LORIS_CACHE_QUOTA", value_name = "SIZE", value_parser = amounts::size)]
    cache_quota: Option<u64>,
    /// Hash again what is on the disk before it is used for the first time
    #[arg(long)]
    paranoid: bool,
    /// Most memory for what was fetched and is not on the disk yet, such as `64M`; what needs more alone comes alone
    #[arg(long, value_name = "SIZE", value_parser = amounts::size, default_value = "128M")]
    memory: u64,
}

impl StorePlace {
    pub(crate) fn open(&self) -> anyhow::Result<Store> {
        let options = StoreOptions {
            memory_bytes: self.memory,
            quota_bytes: self.cache_quota,
            paranoid: self.paranoid,
            ..StoreOptions::default()
        };
        open_store(self.cache_dir.as_deref(), &options)
    }
}

/// Opens the store in a directory; where none is named, in the usual one.
pub(crate) fn open_store(directory: Option<&Path>, options: &StoreOptions) -> anyhow::Result<Store> {
    let directory = directory.map_or_else(default_store, Path::to_owned);
    Store::open_with(&directory, options).with_context(|| format!("opening the cache {}", directory.display()))
}

/// What is fetched before anyone asks for it.
#[derive(Args, Clone, Debug)]
pub(crate) struct FetchAhead {
    #[command(flatten)]
    completing: Completing,
    /// Fetch these files first, in this order: a path a line, as recorded; behind a tab perhaps START-END, the bytes of it
    /// that are needed. What the image has not is passed over
    #[arg(long, value_name = "FILE")]
    prefetch_list: Option<PathBuf>,
}

/// How the rest of an image is fetched.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Completing {
    /// Fetch the rest of the image in the background, behind what is read: `always` (not much later than a pull would
    /// have it), `idle` (only while nobody waits for a read) or `never`
    #[arg(long, value_enum, default_value_t = Complete::Always, value_name = "WHEN")]
    complete: Complete,
    /// Most bytes a second for that, as `10M`
    #[arg(long, value_name = "BYTES", value_parser = amounts::size)]
    complete_rate: Option<u64>,
}

impl Completing {
    /// `None` where it is not fetched.
    pub(crate) fn completion(self) -> Option<Completion> {
        (self.complete != Complete::Never).then_some(Completion {
            only_idle: self.complete == Complete::Idle,
            bytes_per_second: self.complete_rate.and_then(NonZeroU64::new),
            patience: PATIENCE,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Complete {
    Always,
    Idle,
    Never,
}

/// How long after the registry went away a mount goes on trying to complete itself.
pub(crate) const PATIENCE: Duration = Duration::from_hours(24);

impl FetchAhead {
    /// Returns the arguments that say the same to another process.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let when = self.completing.complete.to_possible_value();
        let mut arguments = vec![format!("--complete={}", when.as_ref().map_or("always", |value| value.get_name()))];
        arguments.extend(self.completing.complete_rate.map(|rate| format!("--complete-rate={rate}")));
        if let Some(list) = &self.prefetch_list {
            arguments.push(format!("--prefetch-list={}", list.display()));
        }
        arguments
    }

    /// Begins to fetch what the list names, what the writers of the layers marked as worth it (or where there is neither, what
    /// `command` seems to need), and then the rest. Nobody waits for it.
    pub(crate) fn begin(&self, layers: &[Arc<LazyLayer>], command: Option<Command>) {
        if self.prefetch_list.is_none()
            && let Some(command) = command
        {
            tokio::spawn(loris_lazy::foresee(layers.to_vec(), command));
        }
        let (layers, wish) = (layers.to_vec(), self.clone());
        tokio::spawn(async move {
            if let Some(list) = &wish.prefetch_list {
                let listed = match listed(list, &layers) {
                    Ok(listed) => loris_lazy::prefetch_in_order(&listed).await.map_err(anyhow::Error::from),
                    Err(error) => Err(error),
                };
                if let Err(error) = listed {
                    tracing::warn!(list = %list.display(), error = %format!("{error:#}"), "prefetching ended early");
                }
            }
            if let Err(error) = loris_lazy::prefetch(&layers).await {
                tracing::debug!(%error, "prefetching ended early");
            }
            let Some(how) = wish.completing.completion() else { return };
            if let Err(error) = loris_lazy::complete_all(&layers, &how).await {
                tracing::warn!(%error, "the image is not complete");
            }
        });
    }
}

/// Most bytes of a list: some hundred thousand paths.
const MOST_LIST_BYTES: u64 = 64 << 20;

/// Finds the files of a list in an image.
pub(crate) fn listed(list: &Path, layers: &[Arc<LazyLayer>]) -> anyhow::Result<Vec<(Arc<LazyLayer>, DataRange)>> {
    let mut text = Vec::new();
    File::open(list)?.take(MOST_LIST_BYTES + 1).read_to_end(&mut text)?;
    anyhow::ensure!(text.len() as u64 <= MOST_LIST_BYTES, "it is longer than {MOST_LIST_BYTES} bytes");
    let tree = Tree::merged(&layers.iter().map(|layer| layer.index()).collect::<Vec<_>>());
    let file = |line: &[u8]| {
        let (path, bytes) = with_bytes(line);
        match tree.inode(tree.resolve(path).ok()?)?.kind {
            InodeKind::Regular { layer, size, data, .. } => {
                let (start, end) = (bytes.start.min(size), bytes.end.min(size));
                let layer = layers.get(layer.0 as usize)?;
                (start < end).then(|| (Arc::clone(layer), DataOffset(data.0 + start)..DataOffset(data.0 + end)))
            }
            _ => None,
        }
    };
    Ok(text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()).filter_map(file).collect())
}

/// Reads a line of a list: a path, and which bytes of the file are needed.
fn with_bytes(line: &[u8]) -> (&[u8], Range<u64>) {
    let split = || {
        let tab = line.iter().rposition(|&byte| byte == b'\t')?;
        let (start, end) = std::str::from_utf8(&line[tab + 1..]).ok()?.split_once('-')?;
        Some((&line[..tab], start.parse().ok()?..end.parse().ok()?))
    };
    split().unwrap_or((line, 0..u64::MAX))
}

impl OpenLazily {
    pub(crate) fn store(&self) -> anyhow::Result<Store> {
        self.place.open()
    }

    pub(crate) fn options(&self, policy: FetchPolicy) -> OpenOptions {
        let trust = if self.allow_unverified { Trust::Anything } else { Trust::Vouched };
        OpenOptions { trust, index_trust: self.index_trust.into(), policy, ..OpenOptions::default() }
    }
}

/// `/var/lib/loris` for root; `$XDG_CACHE_HOME/loris` or `~/.cache/loris` for everyone else.
fn default_store() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return "/var/lib/loris".into();
    }
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    cache.unwrap_or_else(|| std::env::home_dir().unwrap_or_else(|| "/tmp".into()).join(".cache")).join("loris")
}

/// Keeps what a registry says, for when it can't be reached.
fn remembered(source: Arc<dyn ImageSource>, store: &Store) -> Arc<dyn ImageSource> {
    if source.repository().is_none() { source } else { Arc::new(Remembering::new(source, store)) }
}

/// One image of a source whose layers were all looked at.
pub(crate) struct Looked {
    /// Where it is.
    pub source: Arc<dyn ImageSource>,
    /// Its manifest, as it is stored.
    pub document: Document,
    /// Its layers, and why some are not lazy.
    pub image: OpenedImage,
}

impl Looked {
    pub(crate) async fn open(
        global: &Global,
        name: &str,
        platform: &OnePlatform,
        open: &OpenLazily,
        store: &Store,
        policy: FetchPolicy,
    ) -> anyhow::Result<Self> {
        let source = remembered(global.access.source(name).await?, store);
        let options = open.options(policy);
        let (document, manifest) = platform::resolve_manifest(&*source, platform.wanted(), &options.limits)
            .await
            .with_context(|| access::doing("opening", name))?;
        if let Some(repository) = open.index_repo.as_ref().filter(|_| options.index_trust == IndexTrust::Any) {
            let indexes = global.access.source(repository).await?;
            if let Err(error) = fetch_from(&*indexes, &manifest, &document.digest, store, &options).await {
                tracing::warn!(%repository, %error, "no index can be had from there");
            }
        }
        let manifest = with_indexes(&*source, manifest, &document.digest, store, &options).await;
        let image = open_image(source.clone(), &manifest, store, &options).await?;
        Ok(Self { source, document, image })
    }
}

impl Looked {
    /// Returns why the image can't be used lazily, where it is of another kind; an image that claims to be lazy and is
    /// corrupt is not meant.
    pub(crate) fn why_not_lazy(&self) -> Option<String> {
        self.image.layers.iter().find_map(|opened| match &opened.layer {
            Err(error @ LayerError::NotLazy { .. }) => Some(error.to_string()),
            _ => None,
        })
    }
}

/// An image all of whose layers are lazy.
pub(crate) struct Opened {
    image: LazyImage,
}

impl Opened {
    /// Opens an image.
    ///
    /// # Errors
    /// Where one of its layers is not lazy; the message says which, why, and what to do.
    pub(crate) async fn open(
        global: &Global,
        name: &str,
        platform: &OnePlatform,
        open: &OpenLazily,
        policy: FetchPolicy,
    ) -> anyhow::Result<Self> {
        let store = open.store()?;
        let looked = Looked::open(global, name, platform, open, &store, policy).await?;
        let opened = Self::from_looked(looked.image, name)?;
        opened.fill_unasked().await;
        Ok(opened)
    }

    /// Sees to it that a process which has mounted the image is not asked before this one fills it: it would fetch the same.
    pub(crate) async fn fill_unasked(&self) {
        let layers = self.image.layers.clone();
        let filling = tokio::task::spawn_blocking(move || loris_mount::pager::fill_unasked(&layers));
        if let Ok(Err(error)) = filling.await {
            tracing::debug!(%error, "where the image is mounted, what is fetched here is fetched there too");
        }
    }

    pub(crate) fn from_looked(image: OpenedImage, name: &str) -> anyhow::Result<Self> {
        match image.into_lazy() {
            Ok(image) => Ok(Self { image }),
            Err(error @ (LayerError::Unvouched { .. } | LayerError::Undigested { .. })) => {
                Err(Refused(format!("{name}: {error} (--allow-unverified)")).into())
            }
            Err(error) => Err(anyhow::Error::new(error).context(format!("opening {name}"))),
        }
    }

    /// Returns all layers as one tree.
    pub(crate) fn tree(&self) -> Tree {
        let indexes: Vec<_> = self.image.layers.iter().map(|layer| layer.index()).collect();
        Tree::merged(&indexes)
    }

    /// Returns the configuration.
    pub(crate) fn config(&self) -> &ImageConfig {
        &self.image.config
    }

    /// Returns the layers, the lowest first.
    pub(crate) fn layers(&self) -> &[Arc<LazyLayer>] {
        &self.image.layers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_list() {
        assert_eq!(with_bytes(b"/etc/passwd"), (&b"/etc/passwd"[..], 0..u64::MAX));
        assert_eq!(with_bytes(b"/a b\t5-70"), (&b"/a b"[..], 5..70));
        for odd in [&b"/a\tb"[..], b"/a\t5", b"/a\t-5", b"/a\t5-", b"/a\t5-99999999999999999999999"] {
            assert_eq!(with_bytes(odd), (odd, 0..u64::MAX));
        }
    }
}

//! Writing into a layout directory, beside others who do.
//!
//! Blobs wait inside the layout until the image is complete; then they are renamed to their places, and `index.json` is
//! replaced, under a lock on the layout's directory (`flock`).

use std::{
    collections::BTreeMap,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use loris_format::{digest::Digest, limits::Limits};

use super::{INDEX, MARKER, Marker, blob_path, referrer};
use crate::{
    blob::{blocking, file_error},
    document::{Descriptor, Document, Index, REF_NAME, media_type},
    name::Selector,
    place::{BlobStream, Error, ImageSink},
    stage::{PREFIX, Stage, lock, new_file_in, sync_directory},
};

/// An image in a layout directory, to be written.
pub struct LayoutSink {
    path: PathBuf,
    selector: Selector,
    limits: Limits,
    state: Mutex<State>,
    // Dropped in this order: the stage's directory, then what was made for it.
    stage: Stage,
    _made: Made,
}

#[derive(Default)]
struct State {
    /// Manifests with a subject, to be listed in `index.json`.
    referrers: Vec<Descriptor>,
    /// Whether the image has been committed; referrers that come later are listed at once.
    committed: bool,
}

/// The layout's directory, where it was not there before. It is removed again unless something was put into it.
struct Made(Option<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Fails where it is not empty, which is what is wanted.
            let _ = std::fs::remove_dir(path);
        }
    }
}

impl LayoutSink {
    /// Opens a layout to write an image into it; makes the directory where there is none.
    ///
    /// # Errors
    /// [`Error::Invalid`] where `path` is a directory that holds something else, or `selector` has a digest;
    /// [`Error::File`] where it can't be written.
    pub async fn open(path: &Path, selector: &Selector, limits: &Limits) -> Result<Self, Error> {
        let (path, selector, limits) = (path.to_owned(), selector.clone(), limits.clone());
        blocking(move || {
            let made = match std::fs::create_dir(&path) {
                Ok(()) => Made(Some(path.clone())),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Made(None),
                Err(source) => return Err(file_error(path, source)),
            };
            check_is_ours(&path)?;
            let stage = Stage::new_in(&path, &format!("oci:{}{selector}", path.display()), true)?;
            Ok(Self { path, selector, limits, state: Mutex::default(), stage, _made: made })
        })
        .await
    }
}

#[async_trait]
impl ImageSink for LayoutSink {
    fn name(&self) -> String {
        format!("oci:{}{}", self.path.display(), self.selector)
    }

    async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        Ok(self.stage.has(descriptor) || is_there(&self.path, &descriptor.digest, descriptor.size))
    }

    async fn mount_blob(&self, _: &Descriptor, _: (&str, &str)) -> Result<bool, Error> {
        Ok(false)
    }

    async fn put_blob(&self, descriptor: &Descriptor, content: BlobStream) -> Result<(), Error> {
        self.stage.put(descriptor, content).await
    }

    async fn put_blob_file(&self, descriptor: &Descriptor, file: &Path) -> Result<(), Error> {
        self.stage.put_file(descriptor, file).await
    }

    async fn put_manifest(&self, document: &Document) -> Result<(), Error> {
        self.stage.put_document(document).await?;
        let kind = document.parse_kind(&self.limits)?;
        if kind.subject().is_none() {
            return Ok(());
        }
        let referrer = referrer(document, &kind);
        let committed = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.referrers.push(referrer);
            state.committed
        };
        if committed { self.publish(None).await } else { Ok(()) }
    }

    async fn commit(&self, root: &Document, annotations: &BTreeMap<String, String>) -> Result<(), Error> {
        self.selector.check(&self.name(), root)?;
        let mut entry = Descriptor { annotations: annotations.clone(), ..root.descriptor() };
        match &self.selector.name {
            Some(name) => entry.annotations.insert(REF_NAME.to_owned(), name.clone()),
            None => entry.annotations.remove(REF_NAME),
        };
        self.publish(Some(entry)).await?;
        self.state.lock().unwrap_or_else(PoisonError::into_inner).committed = true;
        Ok(())
    }
}

impl LayoutSink {
    /// Moves what waits to its place and lists it.
    async fn publish(&self, root: Option<Descriptor>) -> Result<(), Error> {
        let (path, limits) = (self.path.clone(), self.limits.clone());
        let (blobs, stage) = (self.stage.all(), self.stage.directory().to_owned());
        let referrers = std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).referrers);
        blocking(move || {
            let _lock = lock(&path);
            for (digest, staged) in blobs {
                let target = path.join(blob_path(&digest));
                // Moved by an earlier call.
                if !staged.path.exists() && is_there(&path, &digest, staged.size) {
                    continue;
                }
                if let Some(parent) = target.parent() {
                    std::fs::create_dir_all(parent).map_err(|source| file_error(parent, source))?;
                }
                std::fs::rename(&staged.path, &target).map_err(|source| file_error(&target, source))?;
            }
            for algorithm in ["blobs/sha256", "blobs/sha512", "blobs"] {
                let directory = path.join(algorithm);
                if directory.exists() {
                    sync_directory(&directory)?;
                }
            }
            let mut index = read_index(&path, &limits)?;
            for referrer in referrers {
                if !index.manifests.iter().any(|entry| entry.digest == referrer.digest) {
                    index.manifests.push(referrer);
                }
            }
            if let Some(root) = root {
                add(&mut index, root);
            }
            let document = index.to_document()?;
            // What could not be read again must not be written.
            document.index(&limits)?;
            if !path.join(MARKER).exists() {
                let marker = serde_json::to_vec(&Marker::current());
                let marker = marker.map_err(|error| file_error(path.join(MARKER), error.into()))?;
                replace(&path, MARKER, &marker, &stage)?;
            }
            replace(&path, INDEX, &document.bytes, &stage)
        })
        .await
    }
}

/// Adds an entry, in place of one of the same name, or of the same manifest without a name.
fn add(index: &mut Index, new: Descriptor) {
    let name = |entry: &Descriptor| entry.annotations.get(REF_NAME).cloned();
    let new_name = name(&new);
    if new_name.is_some() {
        index.manifests.retain(|entry| name(entry) != new_name);
    }
    match index.manifests.iter_mut().find(|entry| entry.digest == new.digest && name(entry).is_none()) {
        Some(same) => *same = new,
        None => index.manifests.push(new),
    }
}

fn read_index(path: &Path, limits: &Limits) -> Result<Index, Error> {
    let path = path.join(INDEX);
    match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Index::empty()),
        Err(source) => return Err(file_error(path, source)),
        Ok(metadata) if metadata.len() > limits.manifest_bytes => {
            let what = path.display().to_string();
            return Err(Error::TooLarge { what, limit: limits.manifest_bytes });
        }
        Ok(_) => {}
    }
    let bytes = std::fs::read(&path).map_err(|source| file_error(&path, source))?;
    Document::new(media_type::OCI_INDEX, bytes.into())?.index(limits)
}

/// Replaces a small file at once, for readers and for the disk.
fn replace(directory: &Path, name: &str, bytes: &[u8], stage: &Path) -> Result<(), Error> {
    let mut file = new_file_in(stage)?;
    let target = directory.join(name);
    let written = file.write_all(bytes).and_then(|()| file.as_file().sync_all());
    written.map_err(|source| file_error(&target, source))?;
    file.persist(&target).map_err(|error| file_error(&target, error.error))?;
    sync_directory(directory)
}

fn is_there(path: &Path, digest: &Digest, size: u64) -> bool {
    std::fs::metadata(path.join(blob_path(digest))).is_ok_and(|found| found.is_file() && found.len() == size)
}

/// Refuses to turn a directory with something else in it into a layout.
fn check_is_ours(path: &Path) -> Result<(), Error> {
    if path.join(MARKER).exists() {
        return Ok(());
    }
    let mut entries = std::fs::read_dir(path).map_err(|source| file_error(path, source))?.flatten();
    match entries.find(|entry| !entry.file_name().to_string_lossy().starts_with(PREFIX)) {
        None => Ok(()),
        Some(entry) => Err(Error::Invalid {
            what: path.display().to_string(),
            detail: format!("not an OCI layout and not empty (it holds {:?})", entry.file_name()),
        }),
    }
}

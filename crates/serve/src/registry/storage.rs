//! What a registry keeps, in a directory. No HTTP here.
//!
//! ```text
//! DIR/oci-layout                                        what an OCI layout begins with
//! DIR/blobs/<algorithm>/<hex>                           all content, once, as in an OCI layout
//! DIR/uploads/<temporary>                               uploads under way; emptied when the registry is opened
//! DIR/repositories/<name>/_blobs/<algorithm>/<hex>      a hard link to the content: the repository has that blob
//! DIR/repositories/<name>/_manifests/<algorithm>/<hex>        a hard link to the content of a manifest
//! DIR/repositories/<name>/_manifests/<algorithm>/<hex>.json   its entry: media type, size, artifact type, annotations
//! DIR/repositories/<name>/_referrers/<algorithm>-<hex>/<algorithm>-<hex>  empty: the second refers to the first
//! DIR/repositories/<name>/_tags/<tag>                   the digest that the tag names, as JSON
//! DIR/lock                                              held while a registry is open
//! ```
//!
//! Every file is written under a temporary name, synced and renamed, so a reader sees the old state or the new one. The
//! number of hard links tells whether content is still wanted: with one link left, no repository has it.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use loris_format::digest::Digest;
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tempfile::TempPath;

use super::name::{Reference, Repository, Tag};

/// The directory can't be used, or what is in it can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The system refused.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Another process has the directory open.
    #[error("{} is in use by another registry", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// A file of ours holds something else.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
}

type Result<T, E = StorageError> = std::result::Result<T, E>;

/// What a registry tells about a manifest without opening it: a descriptor of the image specification.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Its kind of artifact: its `artifactType`, else the media type of its configuration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Its annotations, which a list of referrers repeats.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// What the file of a tag holds.
#[derive(Serialize, Deserialize)]
struct Tagged {
    digest: Digest,
}

/// A directory with a registry's content. Its methods block on the disk.
pub struct Storage {
    root: PathBuf,
    /// Held for as long as the storage is open; the kernel lets go of it when the process dies.
    _lock: File,
    /// Guards the order of links: that content is not removed while another repository gets it.
    links: Mutex<()>,
}

impl Storage {
    /// Opens the registry in `root`, or makes one. Uploads that an earlier process left are removed.
    ///
    /// # Errors
    /// The directory can't be written, or another registry has it open.
    pub fn open(root: &Path) -> Result<Self> {
        for name in ["blobs/sha256", "blobs/sha512", "uploads", "repositories"] {
            let path = root.join(name);
            fs::create_dir_all(&path).map_err(failed("create", &path))?;
        }
        let lock_path = root.join("lock");
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(failed("open", &lock_path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StorageError::InUse { path: root.to_owned() }),
            Err(errno) => return Err(failed("lock", &lock_path)(errno.into())),
        }
        let storage = Self { root: root.to_owned(), _lock: lock, links: Mutex::new(()) };
        storage.remove_uploads()?;
        let layout = root.join("oci-layout");
        if !layout.exists() {
            storage.write(&layout, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        Ok(storage)
    }

    /// Removes all uploads that have not become blobs.
    ///
    /// # Errors
    /// A file can't be removed.
    pub fn remove_uploads(&self) -> Result<()> {
        let directory = self.root.join("uploads");
        for name in names(&directory)? {
            let path = directory.join(name);
            remove(&path)?;
        }
        Ok(())
    }

    /// Opens a blob of a repository, and returns it with its size in bytes.
    ///
    /// # Errors
    /// The file can't be read. A blob that the repository hasn't is `None`.
    pub fn blob(&self, repository: &Repository, digest: &Digest) -> Result<Option<(File, u64)>> {
        open(&self.blob_link(repository, digest))
    }

    /// Returns a new file for content that is on its way. It is removed with the returned value.
    ///
    /// # Errors
    /// The file can't be created.
    pub fn new_upload(&self) -> Result<(File, TempPath)> {
        let directory = self.root.join("uploads");
        let file = tempfile::Builder::new()
            .prefix("")
            // The name is the identifier that a client sees: it must not be met by chance.
            .rand_bytes(24)
            .tempfile_in(&directory)
            .map_err(failed("create a file in", &directory))?;
        Ok(file.into_parts())
    }

    /// Makes verified content a blob of a repository. `file` must hold exactly what `digest` names.
    ///
    /// # Errors
    /// The content can't be stored; the repository is then as it was.
    pub fn add_blob(&self, repository: &Repository, digest: &Digest, file: &File, path: TempPath) -> Result<()> {
        file.sync_data().map_err(failed("sync", &path))?;
        let _links = self.links();
        self.add_content(digest, path)?;
        self.link(digest, &self.blob_link(repository, digest))
    }

    /// Gives a repository a blob that another one has. Says whether the other had it.
    ///
    /// # Errors
    /// The link can't be made.
    pub fn mount_blob(&self, from: &Repository, to: &Repository, digest: &Digest) -> Result<bool> {
        let _links = self.links();
        if !self.blob_link(from, digest).exists() {
            return Ok(false);
        }
        self.link(digest, &self.blob_link(to, digest))?;
        Ok(true)
    }

    /// Takes a blob from a repository, and removes the content if no other has it. Says whether the repository had it.
    ///
    /// # Errors
    /// A file can't be removed.
    pub fn delete_blob(&self, repository: &Repository, digest: &Digest) -> Result<bool> {
        let _links = self.links();
        let had = remove(&self.blob_link(repository, digest))?;
        self.remove_unwanted(digest)?;
        Ok(had)
    }

    /// Stores a manifest, under a tag where there is one. `subject` is what it refers to.
    ///
    /// # Errors
    /// It can't be stored; a tag is then as it was.
    pub fn put_manifest(
        &self,
        repository: &Repository,
        entry: &Entry,
        bytes: &[u8],
        subject: Option<&Digest>,
        tag: Option<&Tag>,
    ) -> Result<()> {
        let (mut file, path) = self.new_upload()?;
        file.write_all(bytes).map_err(failed("write", &path))?;
        file.sync_data().map_err(failed("sync", &path))?;
        let _links = self.links();
        self.add_content(&entry.digest, path)?;
        self.link(&entry.digest, &self.manifest_link(repository, &entry.digest))?;
        if let Some(subject) = subject {
            self.write(&self.referrers(repository, subject).join(flat(&entry.digest)), b"")?;
        }
        // The entry makes the manifest visible, so it comes after what it promises, and before the tag.
        self.write_json(&self.manifest_entry(repository, &entry.digest), entry)?;
        if let Some(tag) = tag {
            self.write_json(&self.tags_of(repository).join(tag.as_str()), &Tagged { digest: entry.digest })?;
        }
        Ok(())
    }

    /// Returns a manifest's entry, and the manifest if `with_content`.
    ///
    /// # Errors
    /// A file can't be read, or is not what it should be. What isn't there is `None`.
    pub fn manifest(&self, repository: &Repository, reference: &Reference) -> Result<Option<(Entry, File)>> {
        let digest = match reference {
            Reference::Digest(digest) => *digest,
            Reference::Tag(tag) => match read_json::<Tagged>(&self.tags_of(repository).join(tag.as_str()))? {
                Some(tagged) => tagged.digest,
                None => return Ok(None),
            },
        };
        let Some(entry) = read_json::<Entry>(&self.manifest_entry(repository, &digest))? else { return Ok(None) };
        Ok(open(&self.manifest_link(repository, &digest))?.map(|(file, _)| (entry, file)))
    }

    /// Removes a tag, or a manifest with its tags. Says whether it was there.
    ///
    /// # Errors
    /// A file can't be read or removed.
    pub fn delete_manifest(&self, repository: &Repository, reference: &Reference) -> Result<bool> {
        let _links = self.links();
        let digest = match reference {
            Reference::Tag(tag) => return remove(&self.tags_of(repository).join(tag.as_str())),
            Reference::Digest(digest) => digest,
        };
        for tag in names(&self.tags_of(repository))? {
            let path = self.tags_of(repository).join(tag);
            if read_json::<Tagged>(&path)?.is_some_and(|tagged| tagged.digest == *digest) {
                remove(&path)?;
            }
        }
        let had = remove(&self.manifest_entry(repository, digest))?;
        let link = self.manifest_link(repository, digest);
        if let Some(subject) = subject_of(&link)? {
            remove(&self.referrers(repository, &subject).join(flat(digest)))?;
        }
        remove(&link)?;
        self.remove_unwanted(digest)?;
        Ok(had)
    }

    /// Returns the tags of a repository in order, `None` if there is no such repository.
    ///
    /// # Errors
    /// The directory can't be read.
    pub fn tags(&self, repository: &Repository) -> Result<Option<Vec<String>>> {
        if !self.repository(repository).join("_manifests").exists() && !self.tags_of(repository).exists() {
            return Ok(None);
        }
        let mut tags = names(&self.tags_of(repository))?;
        tags.sort_unstable();
        Ok(Some(tags))
    }

    /// Returns the manifests that refer to `subject`, in the order of their digests.
    ///
    /// # Errors
    /// A file can't be read, or is not what it should be.
    pub fn referrers_of(&self, repository: &Repository, subject: &Digest) -> Result<Vec<Entry>> {
        let mut names = names(&self.referrers(repository, subject))?;
        names.sort_unstable();
        let mut entries = Vec::with_capacity(names.len());
        for name in names {
            let Ok(digest) = name.replacen('-', ":", 1).parse::<Digest>() else { continue };
            // One that is being deleted at this moment is not there any more.
            entries.extend(read_json(&self.manifest_entry(repository, &digest))?);
        }
        Ok(entries)
    }

    /// Returns the names of all repositories, in order.
    ///
    /// # Errors
    /// A directory can't be read.
    pub fn repositories(&self) -> Result<Vec<String>> {
        let mut found = Vec::new();
        let mut pending = vec![String::new()];
        while let Some(name) = pending.pop() {
            for child in names(&self.root.join("repositories").join(&name))? {
                match child.as_str() {
                    "_manifests" => found.push(name.clone()),
                    _ if child.starts_with('_') => {}
                    _ if name.is_empty() => pending.push(child),
                    _ => pending.push(format!("{name}/{child}")),
                }
            }
        }
        found.sort_unstable();
        Ok(found)
    }

    fn links(&self) -> MutexGuard<'_, ()> {
        // The guarded state is on the disk, where a panic leaves it consistent between any two steps.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn content(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm()).join(digest.hex())
    }

    fn repository(&self, repository: &Repository) -> PathBuf {
        self.root.join("repositories").join(repository.as_str())
    }

    fn blob_link(&self, repository: &Repository, digest: &Digest) -> PathBuf {
        self.repository(repository).join("_blobs").join(digest.algorithm()).join(digest.hex())
    }

    fn manifest_link(&self, repository: &Repository, digest: &Digest) -> PathBuf {
        self.repository(repository).join("_manifests").join(digest.algorithm()).join(digest.hex())
    }

    fn manifest_entry(&self, repository: &Repository, digest: &Digest) -> PathBuf {
        self.repository(repository).join("_manifests").join(digest.algorithm()).join(format!("{}.json", digest.hex()))
    }

    fn referrers(&self, repository: &Repository, subject: &Digest) -> PathBuf {
        self.repository(repository).join("_referrers").join(flat(subject))
    }

    fn tags_of(&self, repository: &Repository) -> PathBuf {
        self.repository(repository).join("_tags")
    }

    fn add_content(&self, digest: &Digest, path: TempPath) -> Result<()> {
        let content = self.content(digest);
        if content.exists() {
            return Ok(());
        }
        path.persist(&content).map_err(|error| failed("create", &content)(error.error))
    }

    fn link(&self, digest: &Digest, link: &Path) -> Result<()> {
        create_parent(link)?;
        match fs::hard_link(self.content(digest), link) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed("create", link)(error)),
            _ => Ok(()),
        }
    }

    fn remove_unwanted(&self, digest: &Digest) -> Result<()> {
        use std::os::unix::fs::MetadataExt;
        let content = self.content(digest);
        match fs::metadata(&content) {
            Ok(metadata) if metadata.nlink() <= 1 => remove(&content).map(|_| ()),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failed("read", &content)(error)),
        }
    }

    fn write_json(&self, path: &Path, value: &impl Serialize) -> Result<()> {
        let bytes = serde_json::to_vec(value).map_err(|error| damaged(path, &error))?;
        self.write(path, &bytes)
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        create_parent(path)?;
        let (mut file, temporary) = self.new_upload()?;
        file.write_all(bytes).map_err(failed("write", &temporary))?;
        file.sync_data().map_err(failed("sync", &temporary))?;
        temporary.persist(path).map_err(|error| failed("create", path)(error.error))
    }
}

/// A digest as one component of a path.
fn flat(digest: &Digest) -> String {
    format!("{}-{}", digest.algorithm(), digest.hex())
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StorageError {
    move |source| StorageError::Io { action, path: path.to_owned(), source }
}

fn damaged(path: &Path, reason: &dyn std::fmt::Display) -> StorageError {
    StorageError::Damaged { path: path.to_owned(), reason: reason.to_string() }
}

fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(parent) => fs::create_dir_all(parent).map_err(failed("create", parent)),
        None => Ok(()),
    }
}

fn open(path: &Path) -> Result<Option<(File, u64)>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let size = file.metadata().map_err(failed("read", path))?.len();
    Ok(Some((file, size)))
}

fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some((mut file, _)) = open(path)? else { return Ok(None) };
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(failed("read", path))?;
    serde_json::from_slice(&bytes).map(Some).map_err(|error| damaged(path, &error))
}

/// The digest in `subject` of a stored manifest. It was checked when it came in.
fn subject_of(path: &Path) -> Result<Option<Digest>> {
    #[derive(Deserialize)]
    struct Manifest {
        subject: Option<Subject>,
    }
    #[derive(Deserialize)]
    struct Subject {
        digest: Digest,
    }
    Ok(read_json::<Manifest>(path)?.and_then(|manifest| manifest.subject).map(|subject| subject.digest))
}

/// Removes a file. Says whether it was there.
fn remove(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed("remove", path)(error)),
    }
}

/// The names in a directory, none if it isn't there. Names that are not UTF-8 are not ours.
fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("read", directory)(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("read", directory))?;
        found.extend(entry.file_name().into_string());
    }
    Ok(found)
}

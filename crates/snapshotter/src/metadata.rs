//! What the snapshotter knows of its snapshots, in one file that survives a killed process and a power failure.
//!
//! Rules and errors are those of containerd's own metadata store (`core/snapshots/storage/bolt.go`), so that clients see
//! no difference: which states lead where, what must exist, what is kept of labels.
//!
//! | table | key | value |
//! |---|---|---|
//! | `about` | `version`, `next` | 1; the next number |
//! | `snapshots` | name, as containerd gives it | [`Snapshot`] as JSON |
//! | `children` | parent, a NUL, child | nothing |
//! | `discards` | a layer's directory, below the root of the store | nothing: its content is to be removed |
//!
//! What this module must not know: directories, mounts, registries.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use redb::{Database, ReadableDatabase as _, ReadableTable as _, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::remote::RemoteLayer;

/// Version of the file.
const VERSION: u64 = 1;
const ABOUT: TableDefinition<'_, &str, u64> = TableDefinition::new("about");
const SNAPSHOTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("snapshots");
const CHILDREN: TableDefinition<'_, &[u8], ()> = TableDefinition::new("children");
const DISCARDS: TableDefinition<'_, &str, ()> = TableDefinition::new("discards");
/// Bytes of memory that the file's pages take at most.
const CACHE_BYTES: usize = 4 << 20;
/// Longest chain of parents: what overlayfs can show is a tenth of it.
const MOST_PARENTS: usize = 5000;
/// Most bytes of a label's key and value together (containerd's `labels.Validate`).
const MOST_LABEL_BYTES: usize = 4096;

/// Names of snapshots and what is wrong with them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MetadataError {
    /// Something is not there.
    #[error("snapshot {0} does not exist")]
    NotFound(String),
    /// Something is there already.
    #[error("snapshot {0} already exists")]
    AlreadyExists(String),
    /// A request that makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// A snapshot is in the wrong state for it.
    #[error("{0}")]
    WrongState(String),
    /// The file can't be read or written.
    #[error("{path} can't be used: {reason}; where the disk is sound, remove it and the images, and pull them again")]
    File {
        /// The file.
        path: PathBuf,
        /// What the storage engine says.
        reason: String,
    },
    /// It was made by a newer Loris.
    #[error("{path} is of version {found}, and this Loris understands {VERSION}: use a newer Loris")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
}

/// What a snapshot is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only.
    View,
    /// Can be written.
    Active,
    /// Finished, can be a parent.
    Committed,
}

/// A time of day, as it goes over the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Time {
    /// Since 1970.
    pub seconds: i64,
    /// Of a second.
    pub nanos: i32,
}

impl Time {
    /// Returns the time of day.
    #[must_use]
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self {
            seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        }
    }
}

/// Labels, in the order in which they are shown.
pub type Labels = BTreeMap<String, String>;

/// What is known of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Snapshot {
    /// Its name.
    #[serde(skip)]
    pub name: String,
    /// Its number, which names its directory. Never used twice.
    pub id: u64,
    /// What it is.
    pub kind: Kind,
    /// Its parent's name.
    pub parent: Option<String>,
    /// When it was made.
    pub created: Time,
    /// When it was last changed.
    pub updated: Time,
    /// What the client noted.
    pub labels: Labels,
    /// What it takes, once it is committed: bytes and files.
    pub usage: Usage,
    /// The layer of which it is made, where it is lazy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<RemoteLayer>,
    /// Why it is not lazy, where it was meant to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fallback: Option<String>,
}

/// What a snapshot takes on the disk.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of blocks.
    pub bytes: u64,
    /// Files and directories.
    pub inodes: u64,
}

/// A snapshot that is to be made.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its parent's; empty for none.
    pub parent: &'a str,
    /// What it is to be.
    pub kind: Kind,
    /// What the client noted.
    pub labels: Labels,
    /// The layer of which it is made, where it is lazy.
    pub remote: Option<RemoteLayer>,
    /// Why it is not lazy, where it was meant to be.
    pub fallback: Option<String>,
}

/// A file of snapshots.
#[derive(Debug)]
pub struct Metadata {
    database: Database,
    path: PathBuf,
}

type Result<T> = std::result::Result<T, MetadataError>;

impl Metadata {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// Where it can't be used, another process uses it, or it was made by a newer Loris.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |reason: String| MetadataError::File { path: path.to_owned(), reason };
        let database =
            Database::builder().set_cache_size(CACHE_BYTES).create(path).map_err(|error| failed(error.to_string()))?;
        let metadata = Self { database, path: path.to_owned() };
        metadata.write(|transaction| {
            let mut about = transaction.about()?;
            let found = about.get("version").map_err(fault)?.map(|found| found.value());
            match found {
                None => about.insert("version", VERSION).map_err(fault).map(drop)?,
                Some(VERSION) => {}
                Some(found) => return Err(Fault::Said(MetadataError::Newer { path: path.to_owned(), found })),
            }
            drop(about);
            transaction.snapshots().map(drop)?;
            transaction.children().map(drop)?;
            // Files of earlier versions have none.
            transaction.discards().map(drop)
        })?;
        Ok(metadata)
    }

    /// Returns a snapshot.
    ///
    /// # Errors
    /// Where there is none of this name.
    pub fn get(&self, name: &str) -> Result<Snapshot> {
        self.read(|snapshots| find(snapshots, name)?.ok_or_else(|| not_found(name)))
    }

    /// Returns all snapshots that are wanted, by name.
    ///
    /// # Errors
    /// Where the file can't be read.
    pub fn list(&self, wanted: impl Fn(&Snapshot) -> bool) -> Result<Vec<Snapshot>> {
        self.read(|snapshots| {
            let mut found = Vec::new();
            for entry in snapshots.iter().map_err(fault)? {
                let (name, value) = entry.map_err(fault)?;
                let snapshot = decode(name.value(), value.value())?;
                if wanted(&snapshot) {
                    found.push(snapshot);
                }
            }
            Ok(found)
        })
    }

    /// Returns a snapshot's parents, its nearest first.
    ///
    /// # Errors
    /// Where there is no snapshot of this name.
    pub fn parents(&self, name: &str) -> Result<Vec<Snapshot>> {
        self.read(|snapshots| {
            let mut parents = Vec::new();
            let mut next = find(snapshots, name)?.ok_or_else(|| not_found(name))?.parent;
            while let Some(name) = next.take() {
                if parents.len() == MOST_PARENTS {
                    return Err(Fault::Said(MetadataError::Invalid(format!("{name} has too many parents"))));
                }
                let parent = find(snapshots, &name)?.ok_or_else(|| not_found(&name))?;
                next.clone_from(&parent.parent);
                parents.push(parent);
            }
            Ok(parents)
        })
    }

    /// Makes a snapshot.
    ///
    /// # Errors
    /// Where there is one of this name, or the parent is not there or not committed.
    pub fn create(&self, wanted: &Wanted<'_>) -> Result<Snapshot> {
        check_name(wanted.name)?;
        check_labels(&wanted.labels)?;
        self.write(|transaction| {
            let mut snapshots = transaction.snapshots()?;
            if find(&snapshots, wanted.name)?.is_some() {
                return Err(Fault::Said(MetadataError::AlreadyExists(wanted.name.to_owned())));
            }
            let parent = (!wanted.parent.is_empty()).then(|| wanted.parent.to_owned());
            if let Some(parent) = &parent {
                check_parent(&snapshots, parent)?;
                transaction.children()?.insert(&*child_key(parent, wanted.name), ()).map_err(fault)?;
            }
            let now = Time::now();
            let snapshot = Snapshot {
                name: wanted.name.to_owned(),
                id: transaction.next_id()?,
                kind: wanted.kind,
                parent,
                created: now,
                updated: now,
                labels: wanted.labels.clone(),
                usage: Usage::default(),
                remote: wanted.remote.clone(),
                fallback: wanted.fallback.clone(),
            };
            put(&mut snapshots, &snapshot)?;
            Ok(snapshot)
        })
    }

    /// Makes a committed snapshot of an active one. It keeps its number and its parent, and gets the labels that are
    /// given here and no others. One that was prepared without a parent may be given one (layers that are unpacked side by
    /// side, as containerd 2.2 does).
    ///
    /// # Errors
    /// Where there is none of this name or it is not active, or there is one of the new name; where the parent is not there,
    /// not committed, or another one than it was prepared on.
    pub fn commit(&self, name: &str, key: &str, parent: &str, labels: &Labels, usage: Usage) -> Result<Snapshot> {
        check_name(name)?;
        check_labels(labels)?;
        self.write(|transaction| {
            let mut snapshots = transaction.snapshots()?;
            if find(&snapshots, name)?.is_some() {
                return Err(Fault::Said(MetadataError::AlreadyExists(name.to_owned())));
            }
            let active = find(&snapshots, key)?.ok_or_else(|| not_found(key))?;
            if active.kind != Kind::Active {
                let message = format!("snapshot {key} can't be committed: it is not active");
                return Err(Fault::Said(MetadataError::WrongState(message)));
            }
            let before = active.parent.clone();
            let parent = match (&before, parent) {
                (_, "") => before.clone(),
                (Some(before), parent) if before != parent => {
                    let message = format!("snapshot {key} can't be committed on {parent}: it was prepared on {before}");
                    return Err(Fault::Said(MetadataError::Invalid(message)));
                }
                (_, parent) => {
                    check_parent(&snapshots, parent)?;
                    Some(parent.to_owned())
                }
            };
            let now = Time::now();
            let kind = Kind::Committed;
            let labels = labels.clone();
            let committed =
                Snapshot { name: name.to_owned(), kind, parent, created: now, updated: now, labels, usage, ..active };
            snapshots.remove(key).map_err(fault)?;
            let mut children = transaction.children()?;
            if let Some(before) = &before {
                children.remove(&*child_key(before, key)).map_err(fault)?;
            }
            if let Some(parent) = &committed.parent {
                children.insert(&*child_key(parent, name), ()).map_err(fault)?;
            }
            put(&mut snapshots, &committed)?;
            Ok(committed)
        })
    }

    /// Removes a snapshot and returns it. Where it was the last one of its layer, the content of that is noted as to be
    /// removed: `directory` says where it is.
    ///
    /// # Errors
    /// Where there is none of this name, or it is somebody's parent.
    pub fn remove(&self, name: &str, directory: impl Fn(&Snapshot) -> Option<String>) -> Result<Snapshot> {
        self.write(|transaction| {
            let mut snapshots = transaction.snapshots()?;
            let snapshot = find(&snapshots, name)?.ok_or_else(|| not_found(name))?;
            let mut children = transaction.children()?;
            let (first, last) = (child_key(name, ""), [name.as_bytes(), &[1]].concat());
            if children.range(&*first..&*last).map_err(fault)?.next().is_some() {
                let message = format!("snapshot {name} can't be removed: it is the parent of others");
                return Err(Fault::Said(MetadataError::WrongState(message)));
            }
            if let Some(parent) = &snapshot.parent {
                children.remove(&*child_key(parent, name)).map_err(fault)?;
            }
            snapshots.remove(name).map_err(fault)?;
            if let Some(remote) = &snapshot.remote
                && let Some(directory) = directory(&snapshot)
                && !has_layer(&snapshots, &remote.key())?
            {
                transaction.discards()?.insert(&*directory, ()).map_err(fault)?;
            }
            Ok(snapshot)
        })
    }

    /// Returns the directories of content that is to be removed, below the root of the store.
    ///
    /// # Errors
    /// Where the file can't be read.
    pub fn discards(&self) -> Result<Vec<String>> {
        let read = || {
            let transaction = self.database.begin_read().map_err(fault)?;
            let discards = transaction.open_table(DISCARDS).map_err(fault)?;
            let mut found = Vec::new();
            for entry in discards.iter().map_err(fault)? {
                found.push(entry.map_err(fault)?.0.value().to_owned());
            }
            Ok(found)
        };
        read().map_err(|fault| self.said(fault))
    }

    /// Content is gone, or is wanted again.
    ///
    /// # Errors
    /// Where the file can't be written.
    pub fn discarded(&self, directory: &str) -> Result<()> {
        self.write(|transaction| transaction.discards()?.remove(directory).map(drop).map_err(fault))
    }

    /// Changes a snapshot's labels: replaces all, or those that `paths` names (`labels`, `labels.KEY`).
    ///
    /// # Errors
    /// Where there is no snapshot of this name, or a path names something else.
    pub fn update(&self, name: &str, labels: &Labels, paths: &[String]) -> Result<Snapshot> {
        check_name(name)?;
        check_labels(labels)?;
        self.write(|transaction| {
            let mut snapshots = transaction.snapshots()?;
            let mut snapshot = find(&snapshots, name)?.ok_or_else(|| not_found(name))?;
            if paths.is_empty() {
                snapshot.labels = labels.clone();
            }
            for path in paths {
                match path.strip_prefix("labels") {
                    Some("") => snapshot.labels = labels.clone(),
                    Some(key) if key.starts_with('.') => {
                        let key = &key[1..];
                        match labels.get(key) {
                            Some(value) => drop(snapshot.labels.insert(key.to_owned(), value.clone())),
                            None => drop(snapshot.labels.remove(key)),
                        }
                    }
                    _ => {
                        let message = format!("{path} of snapshot {name} can't be changed");
                        return Err(Fault::Said(MetadataError::Invalid(message)));
                    }
                }
            }
            snapshot.updated = Time::now();
            put(&mut snapshots, &snapshot)?;
            Ok(snapshot)
        })
    }

    fn read<T>(&self, work: impl FnOnce(&redb::ReadOnlyTable<&str, &[u8]>) -> Answer<T>) -> Result<T> {
        let answer = self
            .database
            .begin_read()
            .map_err(fault)
            .and_then(|transaction| work(&transaction.open_table(SNAPSHOTS).map_err(fault)?));
        answer.map_err(|fault| self.said(fault))
    }

    /// Does all of it or nothing. On return it is on the disk.
    fn write<T>(&self, work: impl FnOnce(&Transaction) -> Answer<T>) -> Result<T> {
        let answer = self.database.begin_write().map_err(fault).and_then(|transaction| {
            let transaction = Transaction(transaction);
            match work(&transaction) {
                Ok(value) => transaction.0.commit().map_err(fault).map(|()| value),
                Err(fault) => {
                    let _ = transaction.0.abort();
                    Err(fault)
                }
            }
        });
        answer.map_err(|fault| self.said(fault))
    }

    fn said(&self, fault: Fault) -> MetadataError {
        match fault {
            Fault::Said(error) => error,
            Fault::Engine(reason) => MetadataError::File { path: self.path.clone(), reason },
        }
    }
}

/// What ends a transaction early.
enum Fault {
    Said(MetadataError),
    Engine(String),
}

type Answer<T> = std::result::Result<T, Fault>;

fn fault(error: impl std::fmt::Display) -> Fault {
    Fault::Engine(error.to_string())
}

fn not_found(name: &str) -> Fault {
    Fault::Said(MetadataError::NotFound(name.to_owned()))
}

struct Transaction(redb::WriteTransaction);

impl Transaction {
    fn about(&self) -> Answer<redb::Table<'_, &'static str, u64>> {
        self.0.open_table(ABOUT).map_err(fault)
    }

    fn snapshots(&self) -> Answer<redb::Table<'_, &'static str, &'static [u8]>> {
        self.0.open_table(SNAPSHOTS).map_err(fault)
    }

    fn children(&self) -> Answer<redb::Table<'_, &'static [u8], ()>> {
        self.0.open_table(CHILDREN).map_err(fault)
    }

    fn discards(&self) -> Answer<redb::Table<'_, &'static str, ()>> {
        self.0.open_table(DISCARDS).map_err(fault)
    }

    fn next_id(&self) -> Answer<u64> {
        let mut about = self.about()?;
        let id = about.get("next").map_err(fault)?.map_or(1, |next| next.value());
        about.insert("next", id + 1).map_err(fault)?;
        Ok(id)
    }
}

fn find(snapshots: &impl redb::ReadableTable<&'static str, &'static [u8]>, name: &str) -> Answer<Option<Snapshot>> {
    snapshots.get(name).map_err(fault)?.map(|value| decode(name, value.value())).transpose()
}

fn has_layer(snapshots: &impl redb::ReadableTable<&'static str, &'static [u8]>, key: &str) -> Answer<bool> {
    for entry in snapshots.iter().map_err(fault)? {
        let (name, value) = entry.map_err(fault)?;
        if decode(name.value(), value.value())?.remote.is_some_and(|remote| remote.key() == key) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn check_parent(snapshots: &impl redb::ReadableTable<&'static str, &'static [u8]>, parent: &str) -> Answer<()> {
    if find(snapshots, parent)?.ok_or_else(|| not_found(parent))?.kind == Kind::Committed {
        return Ok(());
    }
    let message = format!("snapshot {parent} can't be a parent: it is not committed");
    Err(Fault::Said(MetadataError::Invalid(message)))
}

fn decode(name: &str, value: &[u8]) -> Answer<Snapshot> {
    let snapshot: Snapshot = serde_json::from_slice(value).map_err(fault)?;
    Ok(Snapshot { name: name.to_owned(), ..snapshot })
}

fn put(snapshots: &mut redb::Table<'_, &'static str, &'static [u8]>, snapshot: &Snapshot) -> Answer<()> {
    let value = serde_json::to_vec(snapshot).map_err(fault)?;
    snapshots.insert(&*snapshot.name, &*value).map_err(fault).map(drop)
}

fn child_key(parent: &str, child: &str) -> Vec<u8> {
    [parent.as_bytes(), &[0], child.as_bytes()].concat()
}

/// Names are containerd's, but for this.
fn check_name(name: &str) -> Result<()> {
    match name {
        "" => Err(MetadataError::Invalid("a snapshot must have a name".to_owned())),
        name if name.contains('\0') => Err(MetadataError::Invalid("a snapshot's name must not hold a NUL".to_owned())),
        _ => Ok(()),
    }
}

fn check_labels(labels: &Labels) -> Result<()> {
    match labels.iter().find(|(key, value)| key.len() + value.len() > MOST_LABEL_BYTES) {
        Some((key, _)) => {
            let key: String = key.chars().take(64).collect();
            Err(MetadataError::Invalid(format!("label {key} has more than {MOST_LABEL_BYTES} bytes")))
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;

//! What an installation changes on a machine: units of systemd, containerd's and Docker's configuration; and all of it back.
//!
//! ```text
//!  install::plan ─▶ Plan: each file before and after ─▶ shown ─▶ carried out, a backup of each file beside it
//!  install::removal ─▶ the same, the other way                    and /etc/loris/installed.json, which says what was done
//! ```
//!
//! A file that nobody has changed since is put back byte for byte. In one that somebody has, only what was put in is taken
//! out.
//!
//! What this module must not know: terminals, running processes.

use std::{
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use loris_format::digest::Digest;
use serde::{Deserialize, Serialize};

mod containerd;
mod json;
mod toml;

#[cfg(test)]
mod tests;

pub use containerd::is_two;
use toml::Edit;

const SERVICE: &str = "etc/systemd/system/loris-snapshotter.service";
const SOCKET: &str = "etc/systemd/system/loris-snapshotter.socket";
const CONTAINERD: &str = "etc/containerd/config.toml";
const DOCKER: &str = "etc/docker/daemon.json";
/// What was done.
const RECORD: &str = "etc/loris/installed.json";
const RECORD_VERSION: u32 = 1;
/// What the backup of a file ends in.
const BACKUP: &str = ".before-loris";
/// Largest file that is changed, in bytes.
const MOST_BYTES: u64 = 4 << 20;

/// Why nothing is installed, or not all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    /// A file can't be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file says something that can't be changed.
    #[error("{path}: {reason}; correct the file, or leave it out (--no-cri, --no-docker, --no-containerd)")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What.
        reason: String,
    },
    /// What was installed was noted by another version of this program.
    #[error(
        "{path} is of version {version}, and this program knows {RECORD_VERSION}: uninstall with the program that installed"
    )]
    Version {
        /// The note.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// What is to be installed.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Where the machine's files are: `/`, or a directory with a machine's image.
    pub root_dir: PathBuf,
    /// The program, as that machine has it.
    pub program: PathBuf,
    /// Its configuration, where it is not the usual file.
    pub config: Option<PathBuf>,
    /// The socket.
    pub address: PathBuf,
    /// Where snapshots are kept.
    pub root: PathBuf,
    /// Whether containerd is told.
    pub containerd: bool,
    /// Whether Kubernetes' images are to be lazy.
    pub cri: bool,
    /// Whether Docker's are, where it is there.
    pub docker: bool,
    /// Whether containerd is known to be of version 2 or later.
    pub is_two: bool,
}

/// What changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// The files that do.
    pub changes: Vec<Change>,
    /// What else is to be known.
    pub notes: Vec<String>,
    root_dir: PathBuf,
    record: Record,
}

/// A file that changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    /// The file, as its machine names it.
    pub path: PathBuf,
    /// What it says; `None` where it is not there.
    pub before: Option<String>,
    /// What it will say; `None` where it will not be there.
    pub after: Option<String>,
    /// Whether what it says now is kept beside it, or what was kept is no more needed.
    backup: Backup,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Backup {
    Make,
    Remove,
    Leave,
}

/// What was done to a machine.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
struct Record {
    version: u32,
    files: Vec<Installed>,
    /// Directories that were made for them, in this order.
    #[serde(default)]
    directories: Vec<String>,
}

/// What was done to a file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Installed {
    path: String,
    /// The digest of what was written.
    written: Digest,
    /// Whether the backup and what was written differ by what was installed, and nothing else.
    restores: bool,
    /// Whether it was there before.
    existed: bool,
    /// What was done to it; nothing where all of it is ours.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    edits: Vec<Edit>,
}

/// Says what an installation changes.
///
/// # Errors
/// See [`InstallError`].
pub fn plan(wanted: &Wanted) -> Result<Plan, InstallError> {
    let mut plan = Plan::begin(&wanted.root_dir)?;
    let exec = match &wanted.config {
        Some(config) => format!("{} daemon snapshotter --config {}", escaped(&wanted.program), escaped(config)),
        None => format!("{} daemon snapshotter", escaped(&wanted.program)),
    };
    let service = include_str!("install/loris-snapshotter.service").replace("@EXEC@", &exec);
    let socket = include_str!("install/loris-snapshotter.socket").replace("@ADDRESS@", &escaped(&wanted.address));
    plan.put(SERVICE, service, Vec::new())?;
    plan.put(SOCKET, socket, Vec::new())?;
    if wanted.containerd {
        let Wanted { address, root, cri, is_two, .. } = wanted;
        let wanted = containerd::Wanted { address, root, cri: *cri, is_two: *is_two };
        let before = plan.read(CONTAINERD)?;
        let changed = containerd::change(before.as_deref(), &wanted)
            .map_err(|reason| InstallError::Invalid { path: plan.at(CONTAINERD), reason })?;
        plan.notes.extend(changed.notes);
        plan.put(CONTAINERD, changed.text, changed.edits)?;
    }
    if wanted.docker && (plan.at(DOCKER).exists() || plan.at("usr/bin/dockerd").exists()) {
        plan.docker()?;
    }
    if plan.at("var/lib/rancher").exists() || plan.at("etc/rancher").exists() {
        plan.notes.push(K3S.to_owned());
    }
    Ok(plan)
}

const K3S: &str = "k3s or RKE2 is here: its containerd has a configuration of its own, which is left alone. \
                   docs/snapshotter.md says what to put into its config.toml.tmpl.";

/// Says what takes an installation back.
///
/// # Errors
/// See [`InstallError`].
pub fn removal(root_dir: &Path) -> Result<Plan, InstallError> {
    let mut plan = Plan::begin(root_dir)?;
    for installed in std::mem::take(&mut plan.record.files) {
        plan.take_back(&installed)?;
    }
    Ok(plan)
}

impl Plan {
    fn begin(root_dir: &Path) -> Result<Self, InstallError> {
        let mut plan = Self {
            changes: Vec::new(),
            notes: Vec::new(),
            root_dir: root_dir.to_owned(),
            record: Record { version: RECORD_VERSION, ..Record::default() },
        };
        if let Some(text) = plan.read(RECORD)? {
            let path = plan.at(RECORD);
            let invalid =
                |error: serde_json::Error| InstallError::Invalid { path: path.clone(), reason: error.to_string() };
            let version: Versioned = serde_json::from_str(&text).map_err(invalid)?;
            if version.version != RECORD_VERSION {
                return Err(InstallError::Version { path, version: version.version });
            }
            plan.record = serde_json::from_str(&text).map_err(invalid)?;
        }
        Ok(plan)
    }

    /// Whether nothing changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Shows all changes, as `diff -u` does.
    #[must_use]
    pub fn diff(&self) -> String {
        self.changes.iter().map(Change::diff).collect()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root_dir.join(path)
    }

    fn read(&self, path: &str) -> Result<Option<String>, InstallError> {
        let path = self.at(path);
        let failed = |source| InstallError::File { path: path.clone(), source };
        match path.metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
            Ok(metadata) if metadata.len() > MOST_BYTES => return Err(failed(io::ErrorKind::FileTooLarge.into())),
            Ok(_) => {}
        }
        // What a link of a machine's image names is a file of that machine, and not of this one.
        let (target, inside) = (path.canonicalize().map_err(failed)?, self.root_dir.canonicalize().map_err(failed)?);
        if !target.starts_with(inside) {
            let outside = format!("it leads to {}, outside of {}", target.display(), self.root_dir.display());
            return Err(failed(io::Error::other(outside)));
        }
        std::fs::read_to_string(&path).map(Some).map_err(failed)
    }

    /// A file gets another content. Without edits, all of it is ours.
    fn put(&mut self, path: &str, after: String, edits: Vec<Edit>) -> Result<(), InstallError> {
        let before = self.read(path)?;
        let written = Digest::sha256_of(after.as_bytes());
        if before.as_deref() == Some(&after) {
            return Ok(());
        }
        let now = before.as_ref().map(|before| Digest::sha256_of(before.as_bytes()));
        let known = self.record.files.iter_mut().find(|installed| installed.path == path);
        let backup = match known {
            Some(known) => {
                known.restores &= now == Some(known.written);
                known.written = written;
                for edit in edits {
                    match known.edits.iter_mut().find(|known| known.keys == edit.keys && edit.before.is_some()) {
                        // What was there at first comes back.
                        Some(known) => known.after = edit.after,
                        None => known.edits.push(edit),
                    }
                }
                Backup::Leave
            }
            None => {
                let existed = before.is_some();
                self.record.files.push(Installed { path: path.to_owned(), written, restores: true, existed, edits });
                if existed { Backup::Make } else { Backup::Leave }
            }
        };
        self.changes.push(Change { path: Path::new("/").join(path), before, after: Some(after), backup });
        Ok(())
    }

    fn docker(&mut self) -> Result<(), InstallError> {
        let invalid = |reason| InstallError::Invalid { path: self.root_dir.join(DOCKER), reason };
        let before = self.read(DOCKER)?.unwrap_or_default();
        let mut edited = json::Edited::parse(&before).map_err(invalid)?;
        edited.set(&["features", "containerd-snapshotter"], "true").map_err(invalid)?;
        edited.set(&["storage-driver"], &format!("{:?}", containerd::NAME)).map_err(invalid)?;
        let (text, edits) = edited.finish();
        self.notes.push(
            "Docker shows the images of one storage driver at a time: those that are here come back with \
             `loris daemon uninstall`."
                .into(),
        );
        self.put(DOCKER, text, edits)
    }

    fn take_back(&mut self, installed: &Installed) -> Result<(), InstallError> {
        let path = &installed.path;
        let Some(before) = self.read(path)? else { return Ok(()) };
        let backup = self.read(&format!("{path}{BACKUP}"))?;
        let is_untouched = installed.restores && Digest::sha256_of(before.as_bytes()) == installed.written;
        let (after, kept) = match (is_untouched, installed.existed, backup) {
            (true, true, Some(backup)) => (Some(backup), Backup::Remove),
            (true, false, _) => (None, Backup::Leave),
            // A file of ours that stood in another's place.
            (false, true, Some(backup)) if installed.edits.is_empty() => (Some(backup), Backup::Remove),
            // All of it is ours.
            _ if installed.edits.is_empty() => (None, Backup::Leave),
            _ => {
                let after = self.without(&before, installed)?;
                self.notes.push(format!("/{path} was changed since: what was put into it is taken out, and no more."));
                (Some(after), Backup::Leave)
            }
        };
        self.changes.push(Change { path: Path::new("/").join(path), before: Some(before), after, backup: kept });
        Ok(())
    }

    fn without(&mut self, text: &str, installed: &Installed) -> Result<String, InstallError> {
        let path = self.at(&installed.path);
        let invalid = |reason| InstallError::Invalid { path: path.clone(), reason };
        let mut stays = Vec::new();
        let mut note = |edit: &Edit, is_undone: bool| {
            if !is_undone {
                stays.push(edit.keys.join("."));
            }
        };
        let after = if installed.path.ends_with(".json") {
            let mut edited = json::Edited::parse(text).map_err(invalid)?;
            installed.edits.iter().rev().for_each(|edit| note(edit, edited.undo(edit)));
            edited.finish().0
        } else {
            let mut edited = toml::Edited::parse(text, containerd::REMARK, toml::Place::Inside).map_err(invalid)?;
            installed.edits.iter().rev().for_each(|edit| note(edit, edited.undo(edit)));
            edited.finish().ok_or_else(|| invalid("what is left is no TOML".to_owned()))?.0
        };
        for key in stays {
            self.notes.push(format!("/{}: {key} has another value by now, and stays.", installed.path));
        }
        Ok(after)
    }

    /// Does it. What was done is noted before it is, so that nothing is forgotten where something fails in between.
    ///
    /// # Errors
    /// See [`InstallError`].
    pub fn carry_out(mut self) -> Result<(), InstallError> {
        let is_removal = self.record.files.is_empty();
        if !is_removal {
            self.make_directories()?;
            let mut record = serde_json::to_string_pretty(&self.record).unwrap_or_default();
            record.push('\n');
            write(&self.at(RECORD), &record)?;
        }
        for change in &self.changes {
            let path = self.root_dir.join(change.path.strip_prefix("/").unwrap_or(&change.path));
            let mut backup = path.clone().into_os_string();
            backup.push(BACKUP);
            let backup = PathBuf::from(backup);
            if change.backup == Backup::Make {
                write_like(&backup, &path, change.before.as_deref().unwrap_or_default())?;
            }
            match &change.after {
                Some(after) => write(&path, after)?,
                None => remove(&path)?,
            }
            if change.backup == Backup::Remove {
                remove(&backup)?;
            }
        }
        if is_removal {
            remove(&self.at(RECORD))?;
            for directory in self.record.directories.iter().rev() {
                // Unless somebody else has put something there.
                let _ = std::fs::remove_dir(self.at(directory));
            }
        }
        Ok(())
    }

    fn make_directories(&mut self) -> Result<(), InstallError> {
        let paths = self.record.files.iter().map(|installed| installed.path.as_str()).chain([RECORD]);
        let mut wanted = Vec::new();
        for path in paths {
            let mut above: Vec<&Path> = Path::new(path).ancestors().skip(1).collect();
            above.reverse();
            wanted.extend(above.into_iter().filter(|path| !path.as_os_str().is_empty()).map(Path::to_owned));
        }
        for directory in wanted {
            let at = self.root_dir.join(&directory);
            match std::fs::create_dir(&at) {
                Ok(()) => self.record.directories.push(directory.to_string_lossy().into_owned()),
                Err(_) if at.is_dir() => {}
                Err(source) => return Err(InstallError::File { path: at, source }),
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

impl Change {
    /// Shows it, as `diff -u` does.
    #[must_use]
    pub fn diff(&self) -> String {
        let (before, after) = (self.before.as_deref().unwrap_or_default(), self.after.as_deref().unwrap_or_default());
        let path = self.path.display().to_string();
        let name = |text: &Option<String>| if text.is_some() { path.clone() } else { "/dev/null".to_owned() };
        let diff = similar::TextDiff::from_lines(before, after);
        diff.unified_diff().context_radius(3).header(&name(&self.before), &name(&self.after)).to_string()
    }
}

/// A path as units of systemd have it.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace('%', "%%").replace('\\', "\\\\").replace(' ', "\\x20").replace('$', "$$")
}

/// Writes a file beside its place and renames it. Mode and owner stay.
fn write(path: &Path, text: &str) -> Result<(), InstallError> {
    // A link stays one.
    let target = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    write_like(&target, &target, text)
}

fn write_like(path: &Path, like: &Path, text: &str) -> Result<(), InstallError> {
    let failed = |source| InstallError::File { path: path.to_owned(), source };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::Builder::new().prefix(".loris-").tempfile_in(directory).map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    let metadata = like.metadata().ok();
    let mode = metadata.as_ref().map_or(0o644, |metadata| metadata.mode() & 0o7777);
    if let Some(metadata) = metadata
        && rustix::process::geteuid().is_root()
    {
        std::os::unix::fs::fchown(file.as_file(), Some(metadata.uid()), Some(metadata.gid())).map_err(failed)?;
    }
    file.as_file().set_permissions(std::fs::Permissions::from_mode(mode)).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map(drop).map_err(|error| failed(error.error))
}

fn remove(path: &Path) -> Result<(), InstallError> {
    match std::fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(InstallError::File { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

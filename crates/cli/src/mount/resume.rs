//! What a mount's process leaves for its successor, should it be killed.
//!
//! The keeper of the mount keeps everything that only a descriptor can hold. The rest is a file beside the register of
//! mounts: the manifest, since a successor must not need the registry for what is here.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use loris_oci::Document;
use serde::{Deserialize, Serialize};

/// Version of the file.
const VERSION: u32 = 1;
/// Behind the name of the register.
const SUFFIX: &str = "resume.json";
/// More than any manifest may have.
const MOST_BYTES: u64 = 16 << 20;

/// The file.
#[derive(Serialize, Deserialize)]
struct Resume {
    version: u32,
    media_type: String,
    manifest: String,
}

/// Where a register's mount keeps it.
fn path_of(register: &Path) -> PathBuf {
    register.with_extension(SUFFIX)
}

/// Notes the manifest of a mount. It goes when what is returned is dropped.
pub(super) fn note(register: &Path, document: &Document) -> anyhow::Result<Note> {
    let path = path_of(register);
    let manifest = String::from_utf8(document.bytes.to_vec()).context("a manifest that is no text")?;
    let resume = Resume { version: VERSION, media_type: document.media_type.clone(), manifest };
    let write = || -> anyhow::Result<()> {
        let folder = path.parent().context("the register has no folder")?;
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(folder)?;
        file.write_all(&serde_json::to_vec(&resume)?)?;
        file.persist(&path)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))?;
    Ok(Note { path })
}

/// Returns the manifest that a killed process has noted, and the note.
pub(super) fn noted(register: &Path) -> anyhow::Result<(Document, Note)> {
    let path = path_of(register);
    let read = || -> anyhow::Result<Document> {
        let file = std::fs::File::open(&path)?;
        let resume: Resume = serde_json::from_reader(std::io::Read::take(file, MOST_BYTES))?;
        if resume.version != VERSION {
            bail!("it is of version {}, and {VERSION} is understood", resume.version);
        }
        Ok(Document::new(&resume.media_type, resume.manifest.into_bytes().into())?)
    };
    let document = read().with_context(|| format!("reading {}", path.display()))?;
    Ok((document, Note { path }))
}

/// The file, which is removed with this.
pub(super) struct Note {
    path: PathBuf,
}

impl Drop for Note {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_manifest_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        let register = folder.path().join("1-abc.mounts");
        let manifest = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}"#;
        let document = Document::new("", manifest.as_bytes().to_vec().into()).unwrap();
        let note = note(&register, &document).unwrap();
        // A killed process drops nothing.
        std::mem::forget(note);
        let (found, note) = noted(&register).unwrap();
        assert_eq!((found.digest, found.media_type), (document.digest, document.media_type));
        drop(note);
        assert!(noted(&register).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_newer_version_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let register = folder.path().join("1-abc.mounts");
        std::fs::write(path_of(&register), r#"{"version":2,"media_type":"","manifest":""}"#).unwrap();
        let Err(error) = noted(&register) else { panic!() };
        assert!(format!("{error:#}").contains("version 2"), "{error:#}");
    }
}

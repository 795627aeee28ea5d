//! What a mount's process leaves for its successor, should it be killed.
//!
//! The keeper of the mount keeps everything that only a descriptor can hold. The rest is a note beside the register of
//! mounts: the manifest, since a successor must not need the registry for what is here.

use anyhow::{Context as _, bail};
use loris_oci::Document;
use serde::{Deserialize, Serialize};

/// Version of the note.
const VERSION: u32 = 1;

/// The note.
#[derive(Serialize, Deserialize)]
struct Note {
    version: u32,
    media_type: String,
    manifest: String,
}

/// Writes the note of an image's mount.
pub(super) fn note(document: &Document) -> anyhow::Result<Vec<u8>> {
    let manifest = String::from_utf8(document.bytes.to_vec()).context("a manifest that is no text")?;
    let note = Note { version: VERSION, media_type: document.media_type.clone(), manifest };
    Ok(serde_json::to_vec(&note)?)
}

/// Returns the manifest that a killed process has noted.
pub(super) fn manifest(note: &[u8]) -> anyhow::Result<Document> {
    let read = || -> anyhow::Result<Document> {
        let note: Note = serde_json::from_slice(note)?;
        if note.version != VERSION {
            bail!("it is of version {}, and {VERSION} is understood", note.version);
        }
        Ok(Document::new(&note.media_type, note.manifest.into_bytes().into())?)
    };
    read().context("reading the note beside the register of mounts")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_manifest_is_found_again() {
        let text = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}"#;
        let document = Document::new("", text.as_bytes().to_vec().into()).unwrap();
        let found = manifest(&note(&document).unwrap()).unwrap();
        assert_eq!((found.digest, found.media_type), (document.digest, document.media_type));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (note, said) in
            [(r#"{"version":2,"media_type":"","manifest":""}"#, "version 2"), ("{}", "note"), ("", "note")]
        {
            let error = manifest(note.as_bytes()).unwrap_err();
            assert!(format!("{error:#}").contains(said), "{error:#}");
        }
    }
}

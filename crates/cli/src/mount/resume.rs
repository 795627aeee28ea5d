//! What a mount's process leaves for its successor, should it be killed.
//!
//! The keeper of the mount keeps everything that only a descriptor can hold. The rest is a note beside the register of
//! mounts: the manifest, and the DiffIDs that the configuration has for the layers, since a successor must not need the
//! registry for what is here, and must not serve what its predecessor had condemned for its DiffID.

use anyhow::{Context as _, bail};
use loris_format::digest::DiffId;
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
    /// Not there in the note of an older version.
    #[serde(default)]
    diff_ids: Vec<String>,
}

/// Writes the note of an image's mount.
pub(super) fn note(document: &Document, diff_ids: &[DiffId]) -> anyhow::Result<Vec<u8>> {
    let manifest = String::from_utf8(document.bytes.to_vec()).context("a manifest that is no text")?;
    let diff_ids = diff_ids.iter().map(|diff_id| diff_id.0.to_string()).collect();
    let note = Note { version: VERSION, media_type: document.media_type.clone(), manifest, diff_ids };
    Ok(serde_json::to_vec(&note)?)
}

/// Returns the manifest and the DiffIDs that a killed process has noted.
pub(super) fn read(note: &[u8]) -> anyhow::Result<(Document, Vec<DiffId>)> {
    let read = || -> anyhow::Result<_> {
        let note: Note = serde_json::from_slice(note)?;
        if note.version != VERSION {
            bail!("it is of version {}, and {VERSION} is understood", note.version);
        }
        let diff_ids = note.diff_ids.iter().map(|text| Ok(DiffId(text.parse()?))).collect::<anyhow::Result<_>>()?;
        Ok((Document::new(&note.media_type, note.manifest.into_bytes().into())?, diff_ids))
    };
    read().context("reading the note beside the register of mounts")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use loris_format::digest::Digest;

    use super::*;

    #[test]
    fn a_manifest_is_found_again() {
        let text = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}"#;
        let document = Document::new("", text.as_bytes().to_vec().into()).unwrap();
        let claimed = [DiffId(Digest::sha256_of(b"tar"))];
        let (found, diff_ids) = read(&note(&document, &claimed).unwrap()).unwrap();
        assert_eq!((found.digest, found.media_type), (document.digest, document.media_type));
        assert_eq!(diff_ids, claimed);
        let older = format!(r#"{{"version":1,"media_type":"","manifest":{}}}"#, serde_json::to_string(text).unwrap());
        assert_eq!(read(older.as_bytes()).unwrap().1, []);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (note, said) in
            [(r#"{"version":2,"media_type":"","manifest":""}"#, "version 2"), ("{}", "note"), ("", "note")]
        {
            let error = read(note.as_bytes()).unwrap_err();
            assert!(format!("{error:#}").contains(said), "{error:#}");
        }
    }
}

//! Makes the demo's image: tar layers of the machine's files, a configuration and a manifest, in an OCI layout.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufWriter, Read as _, Write},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
};

use anyhow::{Context as _, Result};
use loris_format::{
    digest::{Digest, Hasher},
    index::Timestamp,
    tar::{END_OF_ARCHIVE, Entry, EntryKind, encode_header, padding},
};
use loris_oci::{Descriptor, Document, ImageSink};

use super::machine::{LayerFiles, Plan};

/// Every time in the image: a demo's bytes should not depend on when it is run more than its files do.
const CREATED: &str = "2026-01-01T00:00:00Z";

/// Writes the image through `sink`; layer archives are made in `folder` first.
pub(super) async fn write(plan: &Plan, folder: &Path, sink: &dyn ImageSink) -> Result<()> {
    let mut layers = Vec::new();
    for (number, files) in plan.layers.iter().enumerate() {
        let archive = folder.join(format!("layer{number}.tar"));
        let (digest, size) =
            write_archive(files, &archive).with_context(|| format!("making the layer of {}", files.title))?;
        let descriptor = Descriptor::new("application/vnd.oci.image.layer.v1.tar", digest, size);
        sink.put_blob_file(&descriptor, &archive).await?;
        fs::remove_file(&archive)?;
        layers.push(descriptor);
    }
    let architecture = loris_oci::Platform::host().architecture;
    let config = serde_json::json!({
        "created": CREATED,
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"],
            "Cmd": plan.command,
            "WorkingDir": "/",
        },
        "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|layer| layer.digest).collect::<Vec<_>>() },
        "history": plan.layers.iter().map(|layer| serde_json::json!({
            "created": CREATED,
            "created_by": format!("loris demo: {}", layer.title),
        })).collect::<Vec<_>>(),
    });
    let config = Document::new("application/vnd.oci.image.config.v1+json", serde_json::to_vec(&config)?.into())?;
    let stream = futures_util::stream::iter([Ok(config.bytes.clone())]);
    sink.put_blob(&config.descriptor(), Box::pin(stream)).await?;
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config.descriptor(),
        "layers": layers,
    });
    let manifest = Document::new("application/vnd.oci.image.manifest.v1+json", serde_json::to_vec(&manifest)?.into())?;
    sink.put_manifest(&manifest).await?;
    sink.commit(&manifest, &BTreeMap::new()).await?;
    Ok(())
}

/// Writes one layer's archive; returns its digest and size.
fn write_archive(files: &LayerFiles, archive: &Path) -> Result<(Digest, u64)> {
    let file = File::create(archive)?;
    let mut out = Hashing { inner: BufWriter::with_capacity(1 << 20, file), hasher: Hasher::sha256(), written: 0 };
    let mut links: BTreeMap<(u64, u64), Vec<u8>> = BTreeMap::new();
    for path in &files.paths {
        let metadata = fs::symlink_metadata(path)?;
        let kind = metadata.file_type();
        // Paths are absolute; a layer's are relative.
        let name = path.as_os_str().as_bytes().strip_prefix(b"/").unwrap_or_default().to_vec();
        let mut entry = Entry {
            path: name.clone(),
            kind: EntryKind::Regular,
            // Twelve bits of permissions fit.
            permissions: u16::try_from(metadata.mode() & 0o7777).unwrap_or(0o644),
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime: Timestamp { seconds: metadata.mtime(), nanoseconds: 0 },
            ..Entry::default()
        };
        if kind.is_dir() {
            entry.kind = EntryKind::Directory;
        } else if kind.is_symlink() {
            entry.kind = EntryKind::Symlink;
            entry.link = fs::read_link(path)?.as_os_str().as_bytes().to_vec();
        } else if let Some(first) = links.get(&(metadata.dev(), metadata.ino())) {
            entry.kind = EntryKind::HardLink;
            entry.link.clone_from(first);
        } else {
            if metadata.nlink() > 1 {
                links.insert((metadata.dev(), metadata.ino()), name);
            }
            entry.size = metadata.len();
        }
        out.write_all(&encode_header(&entry)?)?;
        if entry.kind == EntryKind::Regular {
            let source = File::open(path).with_context(|| path.display().to_string())?;
            let copied = io::copy(&mut source.take(entry.size), &mut out)?;
            anyhow::ensure!(copied == entry.size, "{} shrank while it was read", path.display());
            out.write_all(padding(entry.size))?;
        }
    }
    out.write_all(&END_OF_ARCHIVE)?;
    out.inner.flush()?;
    Ok((out.hasher.finish(), out.written))
}

struct Hashing<W> {
    inner: W,
    hasher: Hasher,
    written: u64,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..written]);
        self.written += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

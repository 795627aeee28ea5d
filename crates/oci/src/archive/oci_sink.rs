//! Writing an OCI archive.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::Path,
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;
use loris_format::{digest::Digest, limits::Limits};

use super::target::Target;
use crate::{
    blob::{blocking, file_error},
    document::{Descriptor, Document, Index, REF_NAME},
    layout::{INDEX, MARKER, Marker, blob_path, referrer},
    name::Selector,
    place::{BlobStream, Error, ImageSink},
    stage::{Stage, Staged},
};

/// An image in an OCI archive, to be written.
pub struct ArchiveSink {
    name: String,
    target: Target,
    selector: Selector,
    stage: Stage,
    /// Manifests with a subject, to be listed beside the image.
    referrers: Mutex<BTreeMap<Digest, Descriptor>>,
}

impl ArchiveSink {
    /// Gets ready to write a file, or to a pipe that has a name. What is there is replaced in the end.
    ///
    /// # Errors
    /// Where nothing can be written there.
    pub async fn create(path: &Path, selector: &Selector, temp_dir: &Path) -> Result<Self, Error> {
        let (path, selector, temp_dir) = (path.to_owned(), selector.clone(), temp_dir.to_owned());
        let name = format!("oci-archive:{}{selector}", path.display());
        blocking(move || Self::of_target(name, Target::of_path(&path)?, selector, &temp_dir)).await
    }

    /// Gets ready to write to standard output.
    ///
    /// # Errors
    /// [`Error::Invalid`] where it is a terminal; [`Error::File`] where nothing can be written to `temp_dir`.
    pub async fn standard_output(temp_dir: &Path) -> Result<Self, Error> {
        let temp_dir = temp_dir.to_owned();
        blocking(move || Self::of_target("-".to_owned(), Target::standard_output()?, Selector::default(), &temp_dir))
            .await
    }

    fn of_target(name: String, target: Target, selector: Selector, temp_dir: &Path) -> Result<Self, Error> {
        let stage = target.stage(temp_dir, &name)?;
        Ok(Self { name, target, selector, stage, referrers: Mutex::default() })
    }
}

#[async_trait]
impl ImageSink for ArchiveSink {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn has_blob(&self, descriptor: &Descriptor) -> Result<bool, Error> {
        Ok(self.stage.has(descriptor))
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
        let kind = document.parse_kind(&Limits::default())?;
        if kind.subject().is_some() {
            let referrer = referrer(document, &kind);
            self.referrers.lock().unwrap_or_else(PoisonError::into_inner).insert(document.digest, referrer);
        }
        Ok(())
    }

    async fn commit(&self, root: &Document, annotations: &BTreeMap<String, String>) -> Result<(), Error> {
        self.selector.check(&self.name, root)?;
        let mut entry = Descriptor { annotations: annotations.clone(), ..root.descriptor() };
        if let Some(name) = &self.selector.name {
            entry.annotations.insert(REF_NAME.to_owned(), name.clone());
        }
        let mut index = Index::empty();
        index.manifests.push(entry);
        let referrers = self.referrers.lock().unwrap_or_else(PoisonError::into_inner).clone();
        index.manifests.extend(referrers.into_values().filter(|referrer| referrer.digest != root.digest));
        let index = index.to_document()?;
        let (target, blobs, stage) = (self.target.clone(), self.stage.all(), self.stage.directory().to_owned());
        blocking(move || write(&target, &index, &blobs, &stage)).await
    }
}

fn write(target: &Target, index: &Document, blobs: &[(Digest, Staged)], stage: &Path) -> Result<(), Error> {
    let marker = serde_json::to_vec(&Marker::current())
        .map_err(|error| Error::Invalid { what: MARKER.to_owned(), detail: error.to_string() })?;
    target.write(stage, |tar| {
        tar.bytes(MARKER, &marker)?;
        tar.bytes(INDEX, &index.bytes)?;
        tar.directory("blobs/")?;
        let algorithms: BTreeSet<&str> = blobs.iter().map(|(digest, _)| digest.algorithm()).collect();
        for algorithm in algorithms {
            tar.directory(&format!("blobs/{algorithm}/"))?;
        }
        for (digest, staged) in blobs {
            let mut file = File::open(&staged.path).map_err(|source| file_error(&staged.path, source))?;
            tar.file(&blob_path(digest), &mut file, staged.size)?;
        }
        Ok(())
    })
}

//! Writing a Docker archive, which `docker load` and `podman load` read.
//!
//! Such an archive knows neither manifests nor compressed layers: the configuration and the layers' tars are what
//! remains of an image, and its digest changes.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read as _, Seek as _, Write as _},
    path::Path,
};

use async_trait::async_trait;
use loris_format::{
    compression::Decoder,
    digest::{DiffId, Digest},
    limits::Limits,
};

use super::{
    PIECE_BYTES,
    docker::{Item, MANIFEST},
    target::Target,
};
use crate::{
    blob::{blocking, file_error},
    document::{Descriptor, Document, media_type},
    layout::CONTAINERD_NAME,
    name::Selector,
    place::{BlobStream, Error, ImageSink},
    stage::{Stage, Staged},
};

/// An image in a Docker archive, to be written.
pub struct DockerArchiveSink {
    name: String,
    target: Target,
    selector: Selector,
    stage: Stage,
    limits: Limits,
}

/// A layer on its way into the archive.
struct Layer {
    diff_id: DiffId,
    digest: Digest,
    staged: Staged,
}

impl DockerArchiveSink {
    /// Gets ready to write a file, or to a pipe that has a name. What is there is replaced in the end. The selector's
    /// name is a reference in its canonical form.
    ///
    /// # Errors
    /// Where nothing can be written there.
    pub async fn create(path: &Path, selector: &Selector, temp_dir: &Path, limits: &Limits) -> Result<Self, Error> {
        let (path, temp_dir) = (path.to_owned(), temp_dir.to_owned());
        let (selector, limits) = (selector.clone(), limits.clone());
        blocking(move || {
            let name = format!("docker-archive:{}{selector}", path.display());
            let target = Target::of_path(&path)?;
            let stage = target.stage(&temp_dir, &name)?;
            Ok(Self { name, target, selector, stage, limits })
        })
        .await
    }

    fn staged(&self, descriptor: &Descriptor) -> Result<Staged, Error> {
        let missing = || Error::NotFound { what: descriptor.digest.to_string(), place: self.name.clone() };
        self.stage.get(&descriptor.digest).ok_or_else(missing)
    }
}

#[async_trait]
impl ImageSink for DockerArchiveSink {
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

    /// Takes nothing but checks that the archive can hold it: a Docker archive has no manifests.
    async fn put_manifest(&self, document: &Document) -> Result<(), Error> {
        document.parse_kind(&self.limits)?;
        Ok(())
    }

    async fn commit(&self, root: &Document, annotations: &BTreeMap<String, String>) -> Result<(), Error> {
        if media_type::is_index(&root.media_type) {
            return Err(Error::Unsupported {
                what: "images for several platforms; choose one with --platform, or write an oci-archive".to_owned(),
                place: self.name.clone(),
            });
        }
        self.selector.check(&self.name, root)?;
        let manifest = root.manifest(&self.limits)?;
        if !manifest.is_image() {
            let what = format!("artifacts ({})", manifest.effective_artifact_type());
            return Err(Error::Unsupported { what, place: self.name.clone() });
        }
        let config_file = self.staged(&manifest.config)?;
        let layers: Vec<(Digest, Staged)> = manifest
            .layers
            .iter()
            .map(|layer| Ok((layer.digest, self.staged(layer)?)))
            .collect::<Result<_, Error>>()?;
        let (target, limits, name) = (self.target.clone(), self.limits.clone(), self.name.clone());
        let stage = self.stage.directory().to_owned();
        let named = annotations.get(CONTAINERD_NAME);
        let repo_tags: Vec<String> = self.selector.name.iter().chain(named).take(1).cloned().collect();
        blocking(move || {
            let bytes = std::fs::read(&config_file.path).map_err(|source| file_error(&config_file.path, source))?;
            let config = Document::verified(bytes.into(), &manifest.config, &name)?;
            let view = config.image_config(&limits)?;
            view.check_layers(&manifest)?;
            let layers = layers.into_iter().zip(view.diff_ids);
            let layers: Vec<Layer> =
                layers.map(|((digest, staged), diff_id)| Layer { diff_id, digest, staged }).collect();
            write(&target, &config, &layers, repo_tags, &stage, &limits)
        })
        .await
    }
}

fn write(
    target: &Target,
    config: &Document,
    layers: &[Layer],
    repo_tags: Vec<String>,
    stage: &Path,
    limits: &Limits,
) -> Result<(), Error> {
    let layer_path = |layer: &Layer| format!("{}.tar", layer.diff_id.0.hex());
    let config_path = format!("{}.json", config.digest.hex());
    let item = Item { config: config_path.clone(), repo_tags, layers: layers.iter().map(layer_path).collect() };
    let list = serde_json::to_vec(&[item])
        .map_err(|error| Error::Invalid { what: MANIFEST.to_owned(), detail: error.to_string() })?;
    target.write(stage, |tar| {
        tar.bytes(MANIFEST, &list)?;
        tar.bytes(&config_path, &config.bytes)?;
        // The same layer may be there twice; its file is not.
        let unique: BTreeMap<DiffId, &Layer> = layers.iter().map(|layer| (layer.diff_id, layer)).collect();
        for layer in unique.into_values() {
            let mut content = uncompressed(layer, stage, limits)?;
            let size = content.metadata().map_err(|source| file_error(stage, source))?.len();
            tar.file(&layer_path(layer), &mut content, size)?;
        }
        Ok(())
    })
}

/// Returns a layer's tar, checked against its DiffID.
fn uncompressed(layer: &Layer, stage: &Path, limits: &Limits) -> Result<File, Error> {
    let file = File::open(&layer.staged.path).map_err(|source| file_error(&layer.staged.path, source))?;
    if layer.digest == layer.diff_id.0 {
        return Ok(file);
    }
    let corrupt = |detail: String| Error::Corrupt {
        what: format!("layer {}", layer.digest),
        place: "the source of the image".to_owned(),
        detail,
    };
    let mut decoder = Decoder::new(file).map_err(|error| corrupt(error.to_string()))?;
    let mut output = tempfile::tempfile_in(stage).map_err(|source| file_error(stage, source))?;
    let mut hasher = layer.diff_id.0.hasher();
    let mut piece = vec![0; PIECE_BYTES];
    let mut written = 0;
    loop {
        let length = match decoder.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(corrupt(error.to_string())),
        };
        written += length as u64;
        if written > limits.file_bytes {
            let what = format!("layer {}, uncompressed,", layer.digest);
            return Err(Error::TooLarge { what, limit: limits.file_bytes });
        }
        hasher.update(&piece[..length]);
        output.write_all(&piece[..length]).map_err(|source| file_error(stage, source))?;
    }
    let found = hasher.finish();
    if found != layer.diff_id.0 {
        return Err(corrupt(format!("its uncompressed bytes have the digest {found}, expected {}", layer.diff_id)));
    }
    output.rewind().map_err(|source| file_error(stage, source))?;
    Ok(output)
}

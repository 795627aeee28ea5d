//! Which registries a layer may have come from that containerd's store has not got.
//!
//! | what says it | why it may not be enough |
//! |---|---|
//! | labels of the layer's snapshot | the snapshotter has another name than those that are tried |
//! | `containerd.io/distribution.source.HOST` on the image's manifest | containerd leaves the port out |
//! | the image's own name | it was tagged or committed here, and no registry has it |
//! | names of other images with the same layer (the source's to find, and only then) | there is none |
//!
//! What this module must not know: how anything is fetched or kept.

use std::{collections::HashMap, sync::Arc};

use loris_format::digest::Digest;
use loris_oci::{
    Descriptor, ImageSource as _, Reference,
    place::{BlobStream, Error},
    registry::Client,
};

use super::Store;

/// What containerd calls where content came from.
const SOURCE_LABEL: &str = "containerd.io/distribution.source.";
/// Usual names of lazy snapshotters in containerd's configuration.
const SNAPSHOTTERS: [&str; 3] = ["loris", "stargz", "soci"];
/// Labels that say which layer and which image a snapshot is of.
const LABELS: [(&str, &str); 2] = [
    ("containerd.io/snapshot/remote/stargz.digest", "containerd.io/snapshot/remote/stargz.reference"),
    ("containerd.io/snapshot/cri.layer-digest", "containerd.io/snapshot/cri.image-ref"),
];

/// Finds layers in registries.
#[derive(Clone)]
pub struct Origins {
    client: Client,
    known: Arc<HashMap<Digest, Reference>>,
}

impl Origins {
    /// Asks nobody yet.
    #[must_use]
    pub fn new(client: Client) -> Self {
        Self { client, known: Arc::default() }
    }

    /// Returns the same with references that are known beforehand, by the layers that they were asked for.
    #[must_use]
    pub fn knowing(self, references: &HashMap<Digest, String>) -> Self {
        let known = references.iter().filter_map(|(layer, name)| Some((*layer, name.parse().ok()?)));
        Self { known: Arc::new(known.collect()), ..self }
    }

    /// Asks registries in the order of the references, and returns the layer from the first that has it. Verified as it
    /// passes.
    pub(super) async fn blob(&self, layer: &Descriptor, references: &[Reference]) -> Result<BlobStream, Error> {
        use futures_util::{StreamExt as _, stream};
        let mut first_error = None;
        for reference in references {
            let answer = match self.client.source(reference).blob(layer).await {
                Ok(mut content) => match content.next().await {
                    Some(Ok(piece)) => return Ok(stream::once(async { Ok(piece) }).chain(content).boxed()),
                    Some(Err(error)) => error,
                    None => return Ok(stream::empty().boxed()),
                },
                Err(error) => error,
            };
            tracing::debug!(%reference, layer = %layer.digest, error = %answer, "the layer is not to be had there");
            first_error.get_or_insert(answer);
        }
        Err(first_error.unwrap_or_else(|| Error::NotFound {
            what: format!("layer {}", layer.digest),
            place: "containerd's store, and nothing says which registry it came from".to_owned(),
        }))
    }

    /// Returns bytes of the layer from the first registry that has it. They are not verified.
    pub(super) async fn range(
        &self,
        layer: &Descriptor,
        range: std::ops::Range<u64>,
        references: &[Reference],
    ) -> Result<bytes::Bytes, Error> {
        let mut first_error = None;
        for reference in references {
            match self.client.source(reference).blob_range(layer, range.clone()).await {
                Ok(content) => return Ok(content),
                Err(error) => drop(first_error.get_or_insert(error)),
            }
        }
        Err(first_error.unwrap_or_else(|| Error::NotFound {
            what: format!("layer {}", layer.digest),
            place: "containerd's store, and nothing says which registry it came from".to_owned(),
        }))
    }

    /// What was known beforehand.
    pub(super) fn known(&self, layer: &Digest) -> Option<&Reference> {
        self.known.get(layer)
    }

    /// Asks for documents.
    pub(super) fn source(&self, reference: &Reference) -> loris_oci::registry::RegistrySource {
        self.client.source(reference)
    }
}

/// Returns references by which the layer of an image is likely to be found, the surest first, each repository once.
pub(super) async fn of(
    store: &Store,
    layer: &Descriptor,
    image: &Reference,
    labels: impl Iterator<Item = (String, String)>,
) -> Vec<Reference> {
    let mut found = Vec::new();
    for snapshotter in SNAPSHOTTERS {
        let filters = LABELS.iter().map(|(name, _)| format!("labels.\"{name}\"=={}", layer.digest)).collect();
        let names = store.references(snapshotter, filters, &LABELS.map(|(_, reference)| reference)).await;
        found.extend(names.iter().filter_map(|name| name.parse().ok()));
    }
    found.extend(labelled(labels, image));
    found.push(image.clone());
    let mut repositories = Vec::new();
    found.retain(|reference: &Reference| {
        let is_new = !repositories.contains(&reference.name());
        repositories.push(reference.name());
        is_new
    });
    found
}

/// Reads labels of content; `image` gives the port that they leave out.
fn labelled(labels: impl Iterator<Item = (String, String)>, image: &Reference) -> Vec<Reference> {
    let mut found = Vec::new();
    for (name, repositories) in labels {
        let Some(host) = name.strip_prefix(SOURCE_LABEL) else { continue };
        let own = image.registry();
        let is_own = own.rsplit_once(':').is_some_and(|(own, _)| own == host);
        for repository in repositories.split(',') {
            for registry in is_own.then_some(own).into_iter().chain([host]) {
                found.extend(Reference::new(registry, repository, None, None).ok());
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn labels_name_repositories_without_the_port() {
        let label = |host: &str, value: &str| (format!("{SOURCE_LABEL}{host}"), value.to_owned());
        let image: Reference = "localhost:5000/team/copy:1".parse().unwrap();
        let labels = [label("localhost", "team/app,team/other"), label("docker.io", "library/base"), label("x y", "a")];
        let found = labelled(labels.into_iter().chain([("other".to_owned(), "b".to_owned())]), &image);
        let names: Vec<String> = found.iter().map(Reference::name).collect();
        let expected = [
            "localhost:5000/team/app",
            "localhost/team/app",
            "localhost:5000/team/other",
            "localhost/team/other",
            "docker.io/library/base",
        ];
        assert_eq!(names, expected);
    }
}

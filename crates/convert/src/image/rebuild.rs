//! The new image's documents, from the leaves to the root.

use std::collections::HashMap;

use loris_oci::document::REFERENCE_DIGEST;

use super::{
    ConvertOptions, Digest, Document, Error, ImageNode, Node,
    edit::{self, Edit},
    layers::MadeLayers,
};
use crate::{
    carry::Carrier,
    survey::{Child, IndexNode, OtherNode},
};

/// The new documents.
pub(crate) struct Rebuilt {
    /// By the digest of the old one: manifests and indexes.
    pub(crate) documents: HashMap<Digest, Document>,
    /// New configurations.
    configs: Vec<Document>,
}

impl Rebuilt {
    /// Returns what became of a document.
    pub(crate) fn document(&self, old: Digest) -> Result<&Document, Error> {
        self.documents
            .get(&old)
            .ok_or_else(|| Error::Document { what: old.to_string(), detail: "nothing of it is left".to_owned() })
    }
}

/// Makes the new documents.
pub(super) fn rebuild(root: &Node, made: &MadeLayers, options: &ConvertOptions) -> Result<Rebuilt, Error> {
    let mut rebuilt = Rebuilt { documents: HashMap::new(), configs: Vec::new() };
    for image in root.images() {
        let document = rebuilt.image(image, made, options)?;
        rebuilt.documents.insert(image.document.digest, document);
    }
    rebuilt.node(root, options.oci)?;
    Ok(rebuilt)
}

/// Makes the documents of an image of which only some platforms are left, and nothing else is changed.
pub(crate) fn prune(root: &Node) -> Result<Rebuilt, Error> {
    let mut rebuilt = Rebuilt { documents: HashMap::new(), configs: Vec::new() };
    for image in root.images() {
        rebuilt.documents.insert(image.document.digest, image.document.clone());
        rebuilt.configs.push(image.config_document.clone());
    }
    rebuilt.node(root, false)?;
    Ok(rebuilt)
}

impl Rebuilt {
    fn image(&mut self, image: &ImageNode, made: &MadeLayers, options: &ConvertOptions) -> Result<Document, Error> {
        let old = &image.document.digest;
        let diff_ids = image.config.diff_ids.iter().enumerate();
        let diff_ids: Vec<_> = diff_ids.map(|(index, id)| made.diff_id(old, index, *id)).collect();
        let mut config = Edit::new(&image.config_document)?;
        if diff_ids != image.config.diff_ids {
            config = config.diff_ids(&diff_ids)?;
        }
        let mut config = config.finish()?;
        // A configuration does not hold its own type.
        if options.oci {
            config.media_type = edit::oci_type(&config.media_type);
        }
        let layers = image.manifest.layers.iter().enumerate();
        let layers: Vec<_> = layers.map(|(index, layer)| Some(made.target(old, index, layer))).collect();
        let mut edit = Edit::new(&image.document)?;
        if options.oci {
            edit = edit.media_type(&edit::oci_type(&image.document.media_type))?;
        }
        let target = edit::Target {
            media_type: options.oci.then(|| edit::oci_type(&image.manifest.config.media_type)),
            content: Some((config.digest, config.bytes.len() as u64)),
            annotations: Vec::new(),
        };
        let document = edit.descriptor("config", &target)?.descriptors("layers", &layers)?.finish()?;
        self.configs.push(config);
        Ok(document)
    }

    /// Makes what is not an image. Images must have been made.
    fn node(&mut self, node: &Node, oci: bool) -> Result<(), Error> {
        match node {
            Node::Image(_) => Ok(()),
            Node::Other(other) => self.other(other),
            Node::Index(index) => self.index(index, oci),
        }
    }

    /// An attestation or artifact: what it is about may have another digest now.
    fn other(&mut self, other: &OtherNode) -> Result<(), Error> {
        let about = other.manifest.subject.as_ref().and_then(|subject| self.documents.get(&subject.digest));
        let document = match about {
            Some(about) => {
                let target = edit::Target::document(about);
                Edit::new(&other.document)?.descriptor("subject", &target)?.finish()?
            }
            None => other.document.clone(),
        };
        self.documents.insert(other.document.digest, document);
        Ok(())
    }

    fn index(&mut self, index: &IndexNode, oci: bool) -> Result<(), Error> {
        for child in &index.children {
            if let Some(node) = &child.node {
                self.node(node, oci)?;
            }
        }
        let mut left = index.children.iter().peekable();
        let mut targets = Vec::with_capacity(index.index.manifests.len());
        for descriptor in &index.index.manifests {
            // Children are those entries that were not pruned, in order.
            let child = left.next_if(|child| child.descriptor == *descriptor);
            targets.push(child.map(|child| self.entry(child)));
        }
        let mut edit = Edit::new(&index.document)?;
        if oci {
            edit = edit.media_type(&edit::oci_type(&index.document.media_type))?;
        }
        let document = edit.descriptors("manifests", &targets)?.finish()?;
        self.documents.insert(index.document.digest, document);
        Ok(())
    }

    fn entry(&self, child: &Child) -> edit::Target {
        let mut target = match self.documents.get(&child.descriptor.digest) {
            Some(document) if child.node.is_some() => edit::Target::document(document),
            _ => edit::Target::default(),
        };
        if child.descriptor.media_type.is_empty() {
            target.media_type = None;
        }
        if let Some(about) = child.descriptor.attested().and_then(|about| self.documents.get(&about)) {
            target.annotations.push((REFERENCE_DIGEST.to_owned(), Some(about.digest.to_string())));
        }
        target
    }
}

/// Stores everything that the new root leads to, and the root itself. Layers of images must be there.
pub(crate) async fn put(root: &Node, rebuilt: &Rebuilt, carrier: &Carrier<'_>) -> Result<(), Error> {
    for config in &rebuilt.configs {
        carrier.config(config).await?;
    }
    // Leaves come before what leads to them.
    let mut open = vec![root];
    let mut order = Vec::new();
    while let Some(node) = open.pop() {
        order.push(node);
        match node {
            Node::Image(_) => {}
            Node::Other(other) => {
                for blob in other.manifest.layers.iter().chain([&other.manifest.config]) {
                    carrier.blob(blob).await?;
                }
            }
            Node::Index(index) => {
                for child in &index.children {
                    match &child.node {
                        Some(node) => open.push(node),
                        None => carrier.blob(&child.descriptor).await?,
                    }
                }
            }
        }
    }
    for node in order.into_iter().rev() {
        carrier.sink.put_manifest(rebuilt.document(node.document().digest)?).await?;
    }
    Ok(())
}

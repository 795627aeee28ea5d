//! What clients say of a layer when they ask for its snapshot: two families of labels, and a few beside them.
//!
//! | who | says |
//! |---|---|
//! | `ctr-remote`, nerdctl, BuildKit, Docker | `containerd.io/snapshot/remote/stargz.{reference,digest,layers,prefetch}` |
//! | CRI, containerd's transfer service | `containerd.io/snapshot/cri.{image-ref,layer-digest,image-layers,manifest-digest}` |
//!
//! (`fs/source/source.go` of stargz-snapshotter; `pkg/snapshotters/annotations.go` of containerd.) Annotations of the layer
//! that begin with `containerd.io/snapshot/` are passed on as labels too, such as the digest of its table of contents.

use loris_format::{digest::Digest, estargz::toc::TOC_DIGEST_ANNOTATION};

use crate::metadata::Labels;

/// The committed snapshot that the client wants in the end.
pub const TARGET: &str = "containerd.io/snapshot.ref";
/// Marks a committed snapshot as a remote one.
pub const REMOTE: &str = "containerd.io/snapshot/remote";
/// What the mark says.
pub const REMOTE_VALUE: &str = "remote snapshot";
/// Why a snapshot that could have been remote is not.
pub const FALLBACK: &str = "containerd.io/snapshot/loris.fallback";
/// User numbers of a container that has its own: `CONTAINER:HOST:COUNT`, separated by commas.
pub const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
/// Group numbers likewise.
pub const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// Reference, layer and neighbours, in both families.
///
/// The annotations of a layer are its author's, and come as labels too. A client overwrites those of its own family, and
/// which one that is can't be told: so the two must not contradict each other.
const FAMILIES: [[&str; 3]; 2] = [
    [
        "containerd.io/snapshot/cri.image-ref",
        "containerd.io/snapshot/cri.layer-digest",
        "containerd.io/snapshot/cri.image-layers",
    ],
    [
        "containerd.io/snapshot/remote/stargz.reference",
        "containerd.io/snapshot/remote/stargz.digest",
        "containerd.io/snapshot/remote/stargz.layers",
    ],
];
const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";

/// A layer that a client wants to have as a remote snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Asked {
    /// The image, as the client names it.
    pub reference: String,
    /// The blob.
    pub layer: Digest,
    /// Its manifest or index, where the client says it.
    pub manifest: Option<Digest>,
    /// The digest of its table of contents, from an annotation that the client has verified.
    pub toc: Option<String>,
    /// The committed snapshot's name.
    pub target: String,
}

/// Returns the layer that labels ask for. `None` where they ask for an ordinary snapshot.
///
/// # Errors
/// Why the layer can't be remote: what the client did not say, or what makes no sense.
pub fn asked(labels: &Labels) -> Option<Result<Asked, String>> {
    let target = labels.get(TARGET)?.clone();
    for part in 0..2 {
        let [cri, other] = FAMILIES.map(|family| labels.get(family[part]));
        if let (Some(cri), Some(other)) = (cri, other)
            && cri != other
        {
            let reason = format!("the layer's labels contradict each other: {cri} and {other}");
            return Some(Err(reason.chars().take(512).collect()));
        }
    }
    for [reference, digest, _] in FAMILIES {
        let (Some(reference), Some(text)) = (labels.get(reference), labels.get(digest)) else { continue };
        let layer = match text.parse() {
            Ok(layer) => layer,
            Err(error) => return Some(Err(format!("label {digest}: {error}"))),
        };
        let manifest = labels.get(MANIFEST_DIGEST).and_then(|text| text.parse().ok());
        let toc = labels.get(TOC_DIGEST_ANNOTATION).cloned();
        return Some(Ok(Asked { reference: reference.clone(), layer, manifest, toc, target }));
    }
    Some(Err("the client does not say which image the layer belongs to: with ctr use `ctr-remote images rpull`, for \
              Kubernetes set `disable_snapshot_annotations = false` in containerd's CRI plugin, for containerd 2.1 and \
              later set `enable_remote_snapshot_annotations = \"true\"` in the plugin's exports"
        .to_owned()))
}

/// Returns the image and the layer that labels name, as they name them.
pub(crate) fn image_and_layer(labels: &Labels) -> (Option<String>, Option<String>) {
    let named = |number: usize| FAMILIES.iter().find_map(|family| labels.get(family[number])).cloned();
    (named(0), named(1))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn both_families_are_understood() {
        for family in FAMILIES {
            let labels = labels(&[
                (TARGET, "sha256:chain"),
                (family[0], "host/image:tag"),
                (family[1], DIGEST),
                (family[2], DIGEST),
                (TOC_DIGEST_ANNOTATION, "sha256:toc"),
                (MANIFEST_DIGEST, DIGEST),
            ]);
            let asked = asked(&labels).unwrap().unwrap();
            assert_eq!(asked.reference, "host/image:tag");
            assert_eq!((asked.layer.to_string(), asked.manifest.unwrap().to_string()), (DIGEST.into(), DIGEST.into()));
            assert_eq!((asked.toc.as_deref(), &*asked.target), (Some("sha256:toc"), "sha256:chain"));
        }
    }

    #[test]
    fn ordinary_snapshots_and_silent_clients() {
        assert_eq!(asked(&labels(&[("a", "b")])), None);
        let said = asked(&labels(&[(TARGET, "sha256:chain")])).unwrap().unwrap_err();
        assert!(said.contains("disable_snapshot_annotations"), "{said}");
        // One of the two comes from the author of the image, who would have the node ask another registry.
        let forged = labels(&[
            (TARGET, "x"),
            (FAMILIES[0][0], "host/image:tag"),
            (FAMILIES[0][1], DIGEST),
            (FAMILIES[1][0], "other/secret:tag"),
            (FAMILIES[1][1], DIGEST),
        ]);
        assert!(asked(&forged).unwrap().unwrap_err().contains("contradict"));
        let wrong = labels(&[(TARGET, "x"), (FAMILIES[0][0], "image"), (FAMILIES[0][1], "sha256:1")]);
        assert!(asked(&wrong).unwrap().unwrap_err().contains("cri.layer-digest"));
    }
}

//! What refers to an image (signatures, attestations, indexes of layers), carried along.

use loris_format::limits::Limits;
use loris_oci::document::Kind;

use super::{
    Digest, Document, Error, Warnings,
    edit::{Edit, Target},
};
use crate::carry::Carrier;

/// Referrers of referrers (the signature of a list of packages) to this depth.
const DEPTH: usize = 4;

/// Most referrers that are carried along; a registry may list any number.
const MOST: usize = 1000;

/// Tables of contents of layers, which are of no use to other layers.
const SOCI_INDEX: &str = "application/vnd.amazon.soci.index.v1+json";

/// Takes along what refers to `subjects`: digests in the source, and what they are in the sink. Returns the manifests
/// that were stored. A manifest whose subject has another digest now is relinked.
pub(crate) async fn carry(
    carrier: &Carrier<'_>,
    subjects: Vec<(Digest, Document)>,
    limits: &Limits,
    warnings: &mut Warnings<'_>,
) -> Result<Vec<Digest>, Error> {
    let mut stored = Vec::new();
    let mut level = subjects;
    level.sort_by_key(|(old, _)| *old);
    for _ in 0..DEPTH {
        let mut next = Vec::new();
        for (old, subject) in &level {
            let referrers = match carrier.source.referrers(old, None).await {
                Ok(referrers) => referrers,
                Err(loris_oci::Error::Unsupported { .. } | loris_oci::Error::NotFound { .. }) => Vec::new(),
                Err(error) => return Err(error.into()),
            };
            for descriptor in referrers {
                if stored.len() >= MOST {
                    warnings.add(format!("only the first {MOST} referrers were taken along"));
                    return Ok(stored);
                }
                let document = carrier.source.document(&descriptor).await?;
                let relinked = subject.digest != *old;
                let manifest = match document.parse_kind(limits)? {
                    Kind::Manifest(manifest) => manifest,
                    Kind::Index(_) => {
                        warnings.add(format!("referrer {} is an index and was left behind", descriptor.digest));
                        continue;
                    }
                };
                if relinked && manifest.effective_artifact_type() == SOCI_INDEX {
                    let digest = descriptor.digest;
                    warnings.add(format!("SOCI index {digest} is of the old layers and was left behind"));
                    continue;
                }
                if manifest.subject.as_ref().is_none_or(|subject| subject.digest != *old) {
                    continue;
                }
                for blob in manifest.layers.iter().chain([&manifest.config]) {
                    carrier.blob(blob).await?;
                }
                let new = if relinked {
                    Edit::new(&document)?.descriptor("subject", &Target::document(subject))?.finish()?
                } else {
                    document
                };
                carrier.sink.put_manifest(&new).await?;
                if !stored.contains(&new.digest) {
                    stored.push(new.digest);
                    next.push((descriptor.digest, new));
                }
            }
        }
        if next.is_empty() {
            break;
        }
        level = next;
    }
    Ok(stored)
}

//! What refers to a manifest: by the registry's API, or by a tag that clients keep up to date where there is none.
//!
//! Source: distribution specification 1.1, sections "Listing Referrers", "Referrers Tag Schema" and "Pushing Manifests
//! with Subject".

use std::collections::BTreeSet;

use bytes::Bytes;
use http::header;
use loris_format::digest::Digest;
use serde_json::{Value, json};

use super::{Repository, location::next_page, manifest::ManifestName};
use crate::{
    document::{Descriptor, Document, Kind, media_type},
    place::Error,
};

/// Most pages of one list.
const MAX_PAGES: usize = 1000;
/// Longest parts of the tag that stands for a digest, in characters.
const TAG_ALGORITHM: usize = 32;
const TAG_ENCODED: usize = 64;

impl Repository {
    /// Returns the descriptors of the manifests whose `subject` is `digest`, of one artifact type or of any. None where
    /// nothing refers to it, also where it does not exist.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] where the list is not an index; otherwise as any request.
    pub async fn referrers(&self, digest: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        let mut all = match self.referrers_by_api(digest, artifact_type).await? {
            Some(referrers) => referrers,
            None => match self.fallback_index(digest).await? {
                Some(index) => self.descriptors(&index, digest)?,
                None => Vec::new(),
            },
        };
        // Registries may filter, and say so in OCI-Filters-Applied; doing it twice changes nothing.
        all.retain(|referrer| artifact_type.is_none_or(|wanted| referrer.artifact_type.as_deref() == Some(wanted)));
        let mut seen = BTreeSet::new();
        all.retain(|referrer| seen.insert(referrer.digest));
        Ok(all)
    }

    /// Returns the registry's list; `None` where it has no such API.
    async fn referrers_by_api(
        &self,
        digest: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Option<Vec<Descriptor>>, Error> {
        let mut url = self.url(self.upstream()?, &format!("referrers/{digest}")).await?;
        if let Some(wanted) = artifact_type {
            url.query_pairs_mut().append_pair("artifactType", wanted);
        }
        let limits = &self.client.config().limits;
        let mut referrers: Vec<Descriptor> = Vec::new();
        for _ in 0..MAX_PAGES {
            let what = || format!("referrers of {digest}");
            let small = match self.small(url, Some(media_type::OCI_INDEX), what, limits.manifest_bytes).await {
                Ok(small) => small,
                Err(Error::NotFound { .. }) => return Ok(None),
                // What registries without the API say to a path that they don't know, beside 404.
                Err(Error::Registry { status: Some(400 | 405 | 501), .. }) => return Ok(None),
                Err(error) => return Err(error),
            };
            let content_type = small.header(header::CONTENT_TYPE).map(media_type::essence).unwrap_or_default();
            if !media_type::is_index(content_type) {
                // A page for people, from something that answers everything with 200.
                return Ok(None);
            }
            let document = Document::new(content_type, small.body.clone())?;
            referrers.extend(self.descriptors(&document, digest)?);
            if referrers.len() > limits.entries {
                break;
            }
            url = match next_page(&small.headers, &small.url) {
                None => return Ok(Some(referrers)),
                Some(next) => self.same_origin(next).await?,
            };
        }
        Err(Error::Invalid {
            what: format!("{}'s list of referrers", self.place()),
            detail: "it has no end".to_owned(),
        })
    }

    fn descriptors(&self, index: &Document, subject: &Digest) -> Result<Vec<Descriptor>, Error> {
        match index.parse_kind(&self.client.config().limits)? {
            Kind::Index(index) => Ok(index.manifests),
            Kind::Manifest(_) => Err(Error::Invalid {
                what: format!("the list of referrers of {subject} in {}", self.place()),
                detail: "it is a manifest, not an index".to_owned(),
            }),
        }
    }

    async fn fallback_index(&self, subject: &Digest) -> Result<Option<Document>, Error> {
        match self.manifest_upstream(ManifestName::Tag(&fallback_tag(subject))).await {
            Ok(index) => Ok(Some(index)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Lists a manifest that was just stored under the tag of its subject, if it has one.
    pub(super) async fn add_to_fallback(&self, document: &Document) -> Result<(), Error> {
        let parsed = document.parse_kind(&self.client.config().limits)?;
        let Some(subject) = parsed.subject().map(|subject| subject.digest) else { return Ok(()) };
        let mut descriptor = document.descriptor();
        descriptor.artifact_type = parsed.artifact_type().map(str::to_owned);
        descriptor.annotations = parsed.annotations().clone();
        self.change_fallback(&subject, |manifests| {
            let known = manifests.iter().any(|known| known["digest"] == document.digest.to_string());
            if known {
                return Ok(false);
            }
            manifests.push(serde_json::to_value(&descriptor)?);
            Ok(true)
        })
        .await
    }

    /// Takes a manifest that was just deleted off the list under its subject's tag.
    pub(super) async fn remove_from_fallback(&self, subject: &Digest, digest: &Digest) -> Result<(), Error> {
        self.change_fallback(subject, |manifests| {
            let before = manifests.len();
            manifests.retain(|known| known["digest"] != digest.to_string());
            Ok(manifests.len() != before)
        })
        .await
    }

    /// Returns the subject of a manifest that is about to be deleted, where its referrers are kept by tag.
    pub(super) async fn subject_to_forget(&self, name: ManifestName<'_>) -> Result<Option<Digest>, Error> {
        let parsed = self.manifest(name).await?.parse_kind(&self.client.config().limits);
        // What can't be read has no subject that this client has listed.
        let Some(subject) = parsed.ok().and_then(|parsed| parsed.subject().map(|subject| subject.digest)) else {
            return Ok(None);
        };
        let by_api = self.referrers_by_api(&subject, None).await?.is_some();
        Ok((!by_api).then_some(subject))
    }

    /// Changes the index under a subject's tag. It is read and written as JSON, so that what others have put in stays.
    /// Within this process one change follows another; against other clients there is no protection in the protocol.
    async fn change_fallback(
        &self,
        subject: &Digest,
        change: impl FnOnce(&mut Vec<Value>) -> serde_json::Result<bool>,
    ) -> Result<(), Error> {
        let tag = fallback_tag(subject);
        let _turn = self.client.fallback_turn().lock().await;
        let current = self.fallback_index(subject).await?;
        let invalid = |detail: String| Error::Invalid { what: format!("the index {tag} in {}", self.place()), detail };
        let mut index = match &current {
            Some(document) => {
                self.descriptors(document, subject)?;
                serde_json::from_slice(&document.bytes).map_err(|error| invalid(error.to_string()))?
            }
            None => json!({"schemaVersion": 2, "mediaType": media_type::OCI_INDEX, "manifests": []}),
        };
        let Some(manifests) = index["manifests"].as_array_mut() else {
            return Err(invalid("it has no list of manifests".to_owned()));
        };
        if !change(manifests).map_err(|error| invalid(error.to_string()))? {
            return Ok(());
        }
        let bytes: Bytes = index.to_string().into();
        let limit = self.client.config().limits.manifest_bytes;
        if bytes.len() as u64 > limit {
            return Err(Error::TooLarge { what: format!("the index {tag} in {}", self.place()), limit });
        }
        let document = Document::new(media_type::OCI_INDEX, bytes)?;
        self.put_manifest_only(ManifestName::Tag(&tag), &document).await.map(|_| ())
    }
}

/// Returns the tag that stands for the referrers of a digest: `sha256-<hex>`.
fn fallback_tag(subject: &Digest) -> String {
    let cut = |text: &str, length: usize| text.chars().take(length).collect::<String>();
    format!("{}-{}", cut(subject.algorithm(), TAG_ALGORITHM), cut(&subject.hex(), TAG_ENCODED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_of_subjects_are_tags() {
        let sha256 = Digest::sha256_of(b"");
        assert_eq!(fallback_tag(&sha256), format!("sha256-{}", sha256.hex()));
        let sha512 = Digest::Sha512([0xab; 64]);
        assert_eq!(fallback_tag(&sha512), format!("sha512-{}", "ab".repeat(32)));
    }
}

//! Manifests, indexes and configurations: read whole, bounded, verified; written and deleted.

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use loris_format::digest::Digest;
use reqwest::Url;

use super::{
    Repository,
    host::Host,
    request::{Call, Failure},
    retry::{Attempts, within},
    route::{Content, Trip},
    transport::Payload,
};
use crate::{
    document::{Descriptor, Document, media_type},
    place::Error,
};

/// What names a manifest in a repository.
#[derive(Clone, Copy, Debug)]
pub enum ManifestName<'a> {
    /// A tag.
    Tag(&'a str),
    /// A digest.
    Digest(&'a Digest),
}

impl std::fmt::Display for ManifestName<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => write!(f, "{digest}"),
        }
    }
}

/// A whole answer.
pub(super) struct Small {
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// What is asked for, whoever is asked.
struct Asked<'a> {
    /// Behind the repository's name.
    path: &'a str,
    accept: Option<&'a str>,
    /// Its name, for errors.
    what: &'a str,
    /// Most bytes of the answer.
    limit: u64,
}

impl Small {
    pub(super) fn header(&self, name: impl header::AsHeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

impl Repository {
    /// Returns a manifest or an index.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::Corrupt`] where its bytes are not what the digest or `Docker-Content-Digest` says;
    /// [`Error::TooLarge`].
    pub async fn manifest(&self, name: ManifestName<'_>) -> Result<Document, Error> {
        let trip = self.trip(match name {
            ManifestName::Tag(_) => Content::Tag,
            ManifestName::Digest(digest) => Content::Whole(digest),
        })?;
        let (path, accept) = (format!("manifests/{name}"), accept());
        let limit = self.client.config().limits.manifest_bytes;
        let asked = Asked { path: &path, accept: Some(&accept), what: &format!("manifest {name}"), limit };
        self.anywhere(trip, asked, |small| self.verified(name, small)).await
    }

    /// Returns a manifest or an index as the registry itself has it.
    pub(super) async fn manifest_upstream(&self, name: ManifestName<'_>) -> Result<Document, Error> {
        let url = self.url(self.upstream()?, &format!("manifests/{name}")).await?;
        let limit = self.client.config().limits.manifest_bytes;
        let small = self.small(url, Some(&accept()), || format!("manifest {name}"), limit).await?;
        self.verified(name, small)
    }

    /// Makes a document of an answer, and checks what can be checked.
    fn verified(&self, name: ManifestName<'_>, small: Small) -> Result<Document, Error> {
        let said = self.named_digest(small.header("docker-content-digest"))?;
        let digest = match name {
            ManifestName::Digest(digest) => *digest,
            ManifestName::Tag(_) => said.unwrap_or_else(|| Digest::sha256_of(&small.body)),
        };
        // Some servers have a type of their own, or none, for everything; the document knows better then.
        let content_type = small.header(header::CONTENT_TYPE).map(media_type::essence).unwrap_or_default();
        let is_known = media_type::is_manifest(content_type)
            || media_type::is_index(content_type)
            || media_type::is_schema1(content_type);
        let descriptor = Descriptor::new(if is_known { content_type } else { "" }, digest, small.body.len() as u64);
        let document = Document::verified(small.body, &descriptor, &self.place())?;
        if let Some(said) = said.filter(|said| said.algorithm() == digest.algorithm() && *said != digest) {
            let detail = format!("the answer says that it is {said}");
            return Err(self.corrupt(&document.descriptor(), detail));
        }
        Ok(document)
    }

    /// Returns what a manifest's name leads to at the registry itself, without its bytes; `None` where it leads to nothing.
    ///
    /// # Errors
    ///
    /// As [`Repository::manifest`], which is used where the registry's answer to HEAD says too little.
    pub async fn manifest_descriptor(&self, name: ManifestName<'_>) -> Result<Option<Descriptor>, Error> {
        let upstream = self.upstream()?;
        let url = self.url(upstream, &format!("manifests/{name}")).await?;
        let mut call = Call::read(Method::HEAD, url, &self.name).header(header::ACCEPT, accept());
        let mut attempts = Attempts::new(self.client.config());
        let answer = self.client.send(upstream, &mut call, &mut attempts).await?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => return Ok(None),
            // HEAD is optional in the field, whatever the specification says.
            StatusCode::METHOD_NOT_ALLOWED => return self.manifest(name).await.map(|it| Some(it.descriptor())),
            _ => return Err(answer.into_error().await),
        }
        let digest = self.named_digest(answer.header("docker-content-digest"))?;
        let content_type = answer.header(header::CONTENT_TYPE).map(media_type::essence).unwrap_or_default();
        match (digest, answer.length()) {
            (Some(digest), Some(size)) if size > 0 && !media_type::is_unspecific(content_type) => {
                if let ManifestName::Digest(asked) = name
                    && asked.algorithm() == digest.algorithm()
                    && *asked != digest
                {
                    let detail = format!("the answer says that it is {digest}");
                    return Err(self.corrupt(&Descriptor::new(content_type, *asked, size), detail));
                }
                Ok(Some(Descriptor::new(content_type, digest, size)))
            }
            _ => self.manifest(name).await.map(|document| Some(document.descriptor())),
        }
    }

    /// Returns a document that a descriptor leads to: a manifest or an index, else a blob such as a configuration.
    ///
    /// # Errors
    ///
    /// As [`crate::ImageSource::document`].
    pub async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        let limit = descriptor.document_limit(&self.client.config().limits);
        if descriptor.size > limit {
            return Err(Error::TooLarge { what: descriptor.digest.to_string(), limit });
        }
        if let Some(inline) = descriptor.inline() {
            return Document::verified(inline, descriptor, &self.place());
        }
        let is_document = descriptor.is_document() || descriptor.media_type.is_empty();
        let kind = if is_document { "manifests" } else { "blobs" };
        let path = format!("{kind}/{}", descriptor.digest);
        let accept = is_document.then(accept);
        let what = format!("{} {}", kind.trim_end_matches('s'), descriptor.digest);
        let trip = self.trip(Content::Whole(&descriptor.digest))?;
        let asked = Asked { path: &path, accept: accept.as_deref(), what: &what, limit };
        self.anywhere(trip, asked, |small| Document::verified(small.body, descriptor, &self.place())).await
    }

    /// Stores a manifest or an index. Where it has a `subject` it becomes a referrer of it, in registries without that
    /// API by the tag that stands for it.
    ///
    /// # Errors
    ///
    /// [`Error::Registry`] where the registry refuses it, as for blobs that were not put before.
    pub async fn put_manifest(&self, name: ManifestName<'_>, document: &Document) -> Result<(), Error> {
        let lists_referrer = self.put_manifest_only(name, document).await?;
        if lists_referrer {
            return Ok(());
        }
        self.add_to_fallback(document).await
    }

    /// Stores a manifest and says whether its subject's referrers are the registry's care, if it has a subject.
    pub(super) async fn put_manifest_only(&self, name: ManifestName<'_>, document: &Document) -> Result<bool, Error> {
        let target = self.target()?;
        let url = self.url(target, &format!("manifests/{name}")).await?;
        let mut call = Call::write(Method::PUT, url, &self.name).header(header::CONTENT_TYPE, &document.media_type);
        call.payload = Payload::Bytes(document.bytes.clone());
        let mut attempts = Attempts::new(self.client.config());
        let answer = self.client.send(target, &mut call, &mut attempts).await?;
        if !answer.status().is_success() {
            return Err(answer.into_error().await);
        }
        let stored = self.named_digest(answer.header("docker-content-digest"))?;
        if let Some(stored) =
            stored.filter(|it| it.algorithm() == document.digest.algorithm() && *it != document.digest)
        {
            return Err(self.corrupt(&document.descriptor(), format!("it was stored as {stored}")));
        }
        Ok(answer.headers().contains_key("oci-subject"))
    }

    /// Deletes a tag or, by digest, a manifest with all its tags.
    ///
    /// # Errors
    ///
    /// [`Error::NotFound`]; [`Error::Unsupported`] where the registry does not delete.
    pub async fn delete_manifest(&self, name: ManifestName<'_>) -> Result<(), Error> {
        let subject = match name {
            ManifestName::Digest(_) => self.subject_to_forget(name).await?,
            ManifestName::Tag(_) => None,
        };
        self.delete(&format!("manifests/{name}"), format!("manifest {name}")).await?;
        match (subject, name) {
            (Some(subject), ManifestName::Digest(digest)) => self.remove_from_fallback(&subject, digest).await,
            _ => Ok(()),
        }
    }

    /// Deletes a blob from the repository.
    ///
    /// # Errors
    ///
    /// As [`Repository::delete_manifest`].
    pub async fn delete_blob(&self, digest: &Digest) -> Result<(), Error> {
        self.delete(&format!("blobs/{digest}"), format!("blob {digest}")).await
    }

    async fn delete(&self, path: &str, what: String) -> Result<(), Error> {
        let target = self.target()?;
        let mut call = Call::write(Method::DELETE, self.url(target, path).await?, &self.name);
        call.scopes = super::scope::Scopes::repository(&self.name, &["delete", "pull", "push"]);
        let mut attempts = Attempts::new(self.client.config());
        let answer = self.client.send(target, &mut call, &mut attempts).await?;
        match answer.status() {
            status if status.is_success() => Ok(()),
            // An earlier attempt whose answer was lost may have been the one.
            StatusCode::NOT_FOUND if attempts.has_failed() => Ok(()),
            StatusCode::NOT_FOUND => Err(self.not_found(what)),
            StatusCode::METHOD_NOT_ALLOWED => {
                Err(Error::Unsupported { what: "deletion".to_owned(), place: self.place() })
            }
            _ => Err(answer.into_error().await),
        }
    }

    /// Reads a whole answer of bounded size from the registry itself, again where it breaks off.
    pub(super) async fn small(
        &self,
        url: Url,
        accept: Option<&str>,
        what: impl Fn() -> String,
        limit: u64,
    ) -> Result<Small, Error> {
        let host = self.upstream()?;
        let mut attempts = Attempts::new(self.client.config());
        within(self.client.config(), async move |deadline| {
            attempts = attempts.until(deadline);
            loop {
                let Failure { error, wait } = match self.small_once(host, &url, accept, &what(), limit).await {
                    Ok(small) => return Ok(small),
                    Err(failure) => failure,
                };
                if !error.is_transient() || !attempts.pause(wait).await {
                    return Err(error);
                }
                self.client.count_retry();
            }
        })
        .await
    }

    /// Reads a whole answer of bounded size from whatever host has a right one.
    async fn anywhere<T>(
        &self,
        trip: Trip,
        asked: Asked<'_>,
        check: impl Fn(Small) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let Asked { path, accept, what, limit } = asked;
        within(self.client.config(), async move |deadline| {
            let mut trip = trip.until(deadline);
            loop {
                let host = trip.host();
                let url = self.url(&host, path).await;
                let outcome = match url {
                    Ok(url) => self.small_once(&host, &url, accept, what, limit).await,
                    Err(error) => Err(error.into()),
                };
                match outcome.and_then(|small| Ok(check(small)?)) {
                    Ok(checked) => {
                        trip.succeeded();
                        return Ok(checked);
                    }
                    Err(failure) => {
                        let again = failure.error.is_transient();
                        trip.failed(failure, again).await?;
                    }
                }
                self.client.count_retry();
            }
        })
        .await
    }

    async fn small_once(
        &self,
        host: &Host,
        url: &Url,
        accept: Option<&str>,
        what: &str,
        limit: u64,
    ) -> Result<Small, Failure> {
        let mut call = Call::read(Method::GET, url.clone(), &self.name);
        if let Some(accept) = accept {
            call = call.header(header::ACCEPT, accept);
        }
        let mut answer = self.client.attempt(host, &mut call).await?;
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => {
                // Read, so that the connection can be used again.
                let words = answer.words().await;
                tracing::debug!(words, "not found");
                return Err(self.not_found(what.to_owned()).into());
            }
            _ => return Err(answer.into_error().await.into()),
        }
        answer.check_encoding()?;
        // Dropped at the end: an answer has a place among the host's requests, and a failure is waited after.
        let body = answer.body(what, limit).await?;
        Ok(Small { url: answer.url.clone(), headers: answer.headers().clone(), body })
    }

    /// Reads `Docker-Content-Digest`. A digest of an algorithm that is not known says nothing.
    fn named_digest(&self, text: Option<&str>) -> Result<Option<Digest>, Error> {
        let Some(text) = text.map(str::trim).filter(|text| !text.is_empty()) else { return Ok(None) };
        match text.parse() {
            Ok(digest) => Ok(Some(digest)),
            Err(_) if !text.starts_with("sha256:") && !text.starts_with("sha512:") => Ok(None),
            Err(error) => {
                Err(Error::Invalid { what: format!("{}'s answer", self.place()), detail: format!("{error}") })
            }
        }
    }
}

/// All types of manifests and indexes that can be read.
fn accept() -> String {
    media_type::DOCUMENTS.join(", ")
}

//! References to images in registries: what they may look like, and what they mean where parts are left out.
//!
//! Source: the grammar and the normalisation of the CNCF distribution project's reference package, which Docker,
//! containerd and Podman share. What it adds for short names: no registry means `docker.io`, one component there means
//! `library/...`, neither tag nor digest means `latest`.

use std::{fmt, str::FromStr};

use loris_format::digest::Digest;

use crate::place::Error;

/// The registry that is meant where none is named.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag that is meant where neither tag nor digest is given.
pub const DEFAULT_TAG: &str = "latest";
/// Docker Hub's API is not at its name.
const DEFAULT_REGISTRY_API: &str = "registry-1.docker.io";
/// Docker Hub's name of long ago.
const LEGACY_REGISTRY: &str = "index.docker.io";
/// Where Docker Hub keeps the images whose names are one word.
const OFFICIAL: &str = "library/";
/// Longest repository, in characters.
const REPOSITORY_LENGTH: usize = 255;
/// Longest tag, in characters.
const TAG_LENGTH: usize = 128;
/// Longest host: DNS allows 253 characters; with brackets and port this is plenty.
const REGISTRY_LENGTH: usize = 300;

/// A reference to an image in a registry: `registry/repository[:tag][@digest]`. At least one of tag and digest is there.
///
/// With both, the digest decides and the tag is only carried along, as Docker does.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Returns a reference made of its parts; `latest` is filled in where neither tag nor digest is given, and Docker Hub's
    /// `library/` where `repository` is one word.
    ///
    /// # Errors
    /// [`Error::Invalid`] where a part has characters that it must not have, or is too long.
    pub fn new(registry: &str, repository: &str, tag: Option<&str>, digest: Option<Digest>) -> Result<Self, Error> {
        let invalid = |detail: String| invalid(&format!("{registry}/{repository}"), detail);
        check_registry(registry).map_err(invalid)?;
        let registry = if registry == LEGACY_REGISTRY { DEFAULT_REGISTRY } else { registry };
        let is_official = registry == DEFAULT_REGISTRY && !repository.contains('/');
        let repository = format!("{}{repository}", if is_official { OFFICIAL } else { "" });
        check_repository(&repository).map_err(invalid)?;
        tag.map_or(Ok(()), check_tag).map_err(invalid)?;
        let tag = tag.or(digest.is_none().then_some(DEFAULT_TAG));
        Ok(Self { registry: registry.to_owned(), repository, tag: tag.map(str::to_owned), digest })
    }

    /// Returns the registry's name: host and port, `docker.io` for Docker Hub.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Returns the host and port at which the registry's API is: its name, but for Docker Hub.
    #[must_use]
    pub fn api_host(&self) -> &str {
        if self.registry == DEFAULT_REGISTRY { DEFAULT_REGISTRY_API } else { &self.registry }
    }

    /// Returns the repository, with `library/` for Docker Hub's official images.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// Returns the tag.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// Returns the digest.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Returns what the manifest is asked for by: the digest where there is one, else the tag.
    #[must_use]
    pub fn identifier(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            // No constructor leaves both out.
            (None, None) => DEFAULT_TAG.to_owned(),
        }
    }

    /// Returns the reference with a digest in place of the one it has; the tag stays.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }

    /// Returns the reference to another tag of the same repository, without a digest.
    ///
    /// # Errors
    /// [`Error::Invalid`] where `tag` is not one.
    pub fn with_tag(&self, tag: &str) -> Result<Self, Error> {
        check_tag(tag).map_err(|detail| invalid(&format!("{}:{tag}", self.name()), detail))?;
        Ok(Self { tag: Some(tag.to_owned()), digest: None, ..self.clone() })
    }

    /// Returns the reference without its digest, to the tag that it has or `latest`.
    #[must_use]
    pub fn without_digest(&self) -> Self {
        let tag = self.tag.clone().or_else(|| Some(DEFAULT_TAG.to_owned()));
        Self { tag, digest: None, ..self.clone() }
    }

    /// Returns registry and repository, without tag and digest.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// Returns the reference with nothing left out: `docker.io/library/alpine:latest`. Other tools' stores use this form.
    #[must_use]
    pub fn canonical(&self) -> String {
        self.render(&self.name())
    }

    /// Returns the shortest name that means this repository: `alpine` for `docker.io/library/alpine`.
    fn familiar_name(&self) -> String {
        if self.registry != DEFAULT_REGISTRY {
            return self.name();
        }
        let short = match self.repository.strip_prefix(OFFICIAL) {
            Some(official) if !official.contains('/') => official,
            _ => &self.repository,
        };
        // `docker.io/example.com/x` must not become `example.com/x`, which is another registry's.
        match short.split_once('/') {
            Some((first, _)) if is_registry(first) => self.name(),
            _ => short.to_owned(),
        }
    }

    fn render(&self, name: &str) -> String {
        let mut text = name.to_owned();
        if let Some(tag) = &self.tag {
            text.push(':');
            text.push_str(tag);
        }
        if let Some(digest) = &self.digest {
            text.push('@');
            text.push_str(&digest.to_string());
        }
        text
    }
}

/// The short form, as users type it: `alpine:3.20`. [`Reference::canonical`] is the long one.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(&self.familiar_name()))
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let error = |detail: String| invalid(text, detail);
        if text.is_empty() {
            return Err(error("it is empty".to_owned()));
        }
        if text.contains("://") {
            return Err(error("a reference has no scheme; leave out what is before and including `://`".to_owned()));
        }
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(|digest| error(format!("{digest}")))?)),
            None => (text, None),
        };
        // A colon before the last slash is a port's (or an IPv6 address').
        let (name, tag) = match rest.rfind(':') {
            Some(colon) if !rest[colon..].contains('/') => (&rest[..colon], Some(&rest[colon + 1..])),
            _ => (rest, None),
        };
        if rest.len() == 64 && rest.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(error("64 hexadecimal digits are an image's ID, not a name".to_owned()));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if is_registry(first) => (first, path),
            _ => (DEFAULT_REGISTRY, name),
        };
        Self::new(registry, path, tag, digest).map_err(|problem| match problem {
            Error::Invalid { detail, .. } => error(detail),
            other => other,
        })
    }
}

/// Says whether a name's first component is a registry's host: it has a dot or a port, is `localhost`, or has capitals,
/// which a repository must not have.
fn is_registry(first: &str) -> bool {
    first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn check_registry(registry: &str) -> Result<(), String> {
    let wrong = |why: &str| Err(format!("{registry:?} is not a registry's host: {why}"));
    if registry.len() > REGISTRY_LENGTH {
        return wrong("it is too long");
    }
    let port = if let Some(address) = registry.strip_prefix('[') {
        let Some((address, port)) = address.split_once(']') else { return wrong("`]` is missing") };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return wrong("not an IPv6 address in the brackets");
        }
        match port.strip_prefix(':') {
            Some(port) => Some(port),
            None if port.is_empty() => None,
            None => return wrong("only a port may follow `]`"),
        }
    } else {
        let (host, port) = registry.split_once(':').map_or((registry, None), |(host, port)| (host, Some(port)));
        let is_label = |label: &str| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        };
        if !host.split('.').all(is_label) {
            return wrong("names are letters, digits and hyphens between dots");
        }
        port
    };
    match port {
        Some(port) if !port.bytes().all(|byte| byte.is_ascii_digit()) || port.parse::<u16>().is_err() => {
            wrong("the port is not a number up to 65535")
        }
        _ => Ok(()),
    }
}

fn check_repository(repository: &str) -> Result<(), String> {
    if repository.len() > REPOSITORY_LENGTH {
        return Err(format!("the repository has more than {REPOSITORY_LENGTH} characters"));
    }
    if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err("the repository has capital letters; only registry and tag may have them".to_owned());
    }
    match repository.split('/').find(|component| !is_component(component)) {
        Some("") => Err("a component of the repository is empty".to_owned()),
        Some(component) => Err(format!(
            "{component:?} in the repository: components are lower-case letters and digits, separated by one of `.`, \
             `_`, `__` or hyphens"
        )),
        None => Ok(()),
    }
}

/// `[a-z0-9]+ ((. | _ | __ | -+) [a-z0-9]+)*`
fn is_component(component: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let separators = component.split(|character: char| character.is_ascii() && is_word(character as u8));
    let ends_in_words = component.bytes().next().is_some_and(is_word) && component.bytes().last().is_some_and(is_word);
    ends_in_words
        && separators
            .into_iter()
            .all(|separator| matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-'))
}

fn check_tag(tag: &str) -> Result<(), String> {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    let fits = tag.len() <= TAG_LENGTH
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|byte| is_word(byte) || matches!(byte, b'.' | b'-'));
    if fits {
        return Ok(());
    }
    Err(format!(
        "{:?} is not a tag: 1 to {TAG_LENGTH} letters, digits, `_`, `.` and `-`, the first neither `.` nor `-`",
        shown(tag)
    ))
}

fn invalid(text: &str, detail: String) -> Error {
    Error::Invalid { what: format!("reference {:?}", shown(text)), detail }
}

/// Cuts a text to a length that can be shown.
fn shown(text: &str) -> String {
    text.chars().take(REPOSITORY_LENGTH).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn short_names_mean_what_docker_says() {
        let with_digest = format!("alpine@{DIGEST}");
        let with_both = format!("localhost:5000/a/b:3@{DIGEST}");
        for (text, canonical, familiar, api_host) in [
            ("alpine", "docker.io/library/alpine:latest", "alpine:latest", "registry-1.docker.io"),
            ("alpine:3", "docker.io/library/alpine:3", "alpine:3", "registry-1.docker.io"),
            ("docker.io/alpine", "docker.io/library/alpine:latest", "alpine:latest", "registry-1.docker.io"),
            ("index.docker.io/a/b", "docker.io/a/b:latest", "a/b:latest", "registry-1.docker.io"),
            ("library/alpine", "docker.io/library/alpine:latest", "alpine:latest", "registry-1.docker.io"),
            ("library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest", "registry-1.docker.io"),
            ("me/x_y", "docker.io/me/x_y:latest", "me/x_y:latest", "registry-1.docker.io"),
            ("localhost/x", "localhost/x:latest", "localhost/x:latest", "localhost"),
            ("localhost:5000/x", "localhost:5000/x:latest", "localhost:5000/x:latest", "localhost:5000"),
            // Not a registry: there is no slash.
            ("localhost:5000", "docker.io/library/localhost:5000", "localhost:5000", "registry-1.docker.io"),
            ("[::1]:5000/x:y", "[::1]:5000/x:y", "[::1]:5000/x:y", "[::1]:5000"),
            ("[2001:db8::1]/x", "[2001:db8::1]/x:latest", "[2001:db8::1]/x:latest", "[2001:db8::1]"),
            ("Host/x", "Host/x:latest", "Host/x:latest", "Host"),
            ("a.b/c-d--e__f.g:T_1.x-", "a.b/c-d--e__f.g:T_1.x-", "a.b/c-d--e__f.g:T_1.x-", "a.b"),
            ("docker.io/a.b/c", "docker.io/a.b/c:latest", "docker.io/a.b/c:latest", "registry-1.docker.io"),
            (&with_digest, &format!("docker.io/library/alpine@{DIGEST}"), &with_digest, "registry-1.docker.io"),
            (&with_both, &with_both, &with_both, "localhost:5000"),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference.canonical(), canonical);
            assert_eq!(reference.to_string(), familiar);
            assert_eq!(reference.api_host(), api_host);
        }
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let id = "a".repeat(64);
        let long = format!("h.x/{}", "a".repeat(256));
        let long_tag = format!("x:{}", "a".repeat(129));
        for (text, message) in [
            ("", "empty"),
            ("docker://x", "scheme"),
            (":x", "empty"),
            ("x:", "not a tag"),
            ("x:-a", "not a tag"),
            ("x:a b", "not a tag"),
            (&long_tag, "not a tag"),
            ("Alpine", "capital"),
            ("a/B", "capital"),
            ("a//b", "empty"),
            ("/a", "empty"),
            ("a/", "empty"),
            ("a..b/c", "not a registry"),
            ("x/a..b", "separated by"),
            ("x/a___b", "separated by"),
            ("x/-a", "separated by"),
            ("x/a-", "separated by"),
            ("x/a.-b", "separated by"),
            ("x/\u{e4}", "separated by"),
            ("h.x:99999/a", "port"),
            ("h.x:+80/a", "port"),
            ("h.x:/a", "port"),
            ("-h.x/a", "not a registry"),
            ("[::1/a", "not a registry"),
            ("[::1]x:1/a", "not a registry"),
            ("[::x]/a", "IPv6"),
            ("user@host/x", "not a digest"),
            ("x@sha256:abc", "not a digest"),
            ("x@md5:d41d8cd98f00b204e9800998ecf8427e", "not a digest"),
            (&id, "image's ID"),
            (&long, "more than 255"),
        ] {
            let error = text.parse::<Reference>().unwrap_err().to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    #[test]
    fn tag_and_digest_are_exchanged() {
        let reference: Reference = "a.b/c:1".parse().unwrap();
        let digest: Digest = DIGEST.parse().unwrap();
        assert_eq!(reference.identifier(), "1");
        let pinned = reference.with_digest(digest);
        assert_eq!((pinned.identifier(), pinned.to_string()), (DIGEST.to_owned(), format!("a.b/c:1@{DIGEST}")));
        assert_eq!(pinned.without_digest(), reference);
        assert_eq!(pinned.with_tag("2").unwrap().to_string(), "a.b/c:2");
        assert!(pinned.with_tag("2/3").is_err());
        assert_eq!(Reference::new("a.b", "c", None, Some(digest)).unwrap().without_digest().tag(), Some("latest"));
    }

    proptest! {
        #[test]
        fn both_forms_read_the_same(
            registry in "(docker\\.io|localhost(:[1-9][0-9]{0,3})?|[a-zA-Z0-9]{1,4}\\.[a-z]{2}(:[1-9][0-9]{0,3})?|\\[::1\\])",
            path in "[a-z0-9]{1,3}((\\.|_|__|-|--)[a-z0-9]{1,3}){0,2}(/[a-z0-9]{1,3}){0,2}",
            library in any::<bool>(),
            tag in proptest::option::of("[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,5}"),
            digest in any::<bool>(),
        ) {
            let path = if library { format!("library/{path}") } else { path };
            let digest = digest.then(|| DIGEST.parse().unwrap());
            let reference = Reference::new(&registry, &path, tag.as_deref(), digest).unwrap();
            prop_assert_eq!(&reference.canonical().parse::<Reference>().unwrap(), &reference);
            prop_assert_eq!(&reference.to_string().parse::<Reference>().unwrap(), &reference);
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}") {
            if let Ok(reference) = text.parse::<Reference>() {
                prop_assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            }
        }
    }
}

//! What a user types to name an image, wherever it is: skopeo's transports, and a plain reference for a registry.
//!
//! | name | place |
//! |---|---|
//! | `alpine:3`, `docker://alpine:3` | a registry |
//! | `oci:DIR[:TAG]` | an OCI layout, a directory |
//! | `oci-archive:FILE[:TAG]` | a tar of an OCI layout |
//! | `docker-archive:FILE[:REFERENCE]` | what `docker save` writes |
//! | `containerd:[NAMESPACE/]REFERENCE` | containerd's own store (opened by the `snapshotter` crate, which speaks its protocol) |
//! | `-` | an OCI archive (to read: a Docker archive too) on standard input or output |
//!
//! In place of TAG and REFERENCE, `@N` takes the image at that place (the first is 0) of those in there, for sources only;
//! and a digest behind `@` says what the image must be, so that what Loris prints can be typed again.
//!
//! Source: `containers-transports(5)`.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use loris_format::{digest::Digest, limits::Limits};

use crate::{
    archive::{Archive, ArchiveSink, DockerArchiveSink},
    document::Document,
    layout::{LayoutSink, LayoutSource},
    place::{Error, ImageSink, ImageSource},
    reference::Reference,
    registry::Client,
};

/// Transports that other tools have and Loris has not, and what can be done instead.
const NOT_SUPPORTED: [(&str, &str); 6] = [
    ("dir", "use `oci:DIR` (`skopeo copy dir:... oci:...` converts)"),
    ("containers-storage", "pipe it: `podman save --format oci-archive IMAGE | loris ... -`, and `podman load` back"),
    ("docker-daemon", "pipe it: `docker save IMAGE | loris ... -`, and `docker load` back"),
    ("ostree", "use `skopeo copy` to make an OCI layout of it first"),
    ("sif", "use `skopeo copy` to make an OCI layout of it first"),
    ("tarball", "use `skopeo copy` to make an OCI layout of it first"),
];

/// Longest reference in a layout, in bytes.
const LAYOUT_REFERENCE_BYTES: usize = 1024;
/// The namespace of Kubernetes in containerd.
const KUBERNETES: &str = "k8s.io";
/// Longest namespace of containerd, in bytes.
const NAMESPACE_BYTES: usize = 76;

/// Which of the images in a layout or archive is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// Its name there: in layouts `org.opencontainers.image.ref.name`.
    pub name: Option<String>,
    /// Its place in the list of images, from 0; without a name.
    pub index: Option<usize>,
    /// What it must be.
    pub digest: Option<Digest>,
}

impl Selector {
    /// Checks what is about to be written under a name against the digest in it.
    pub(crate) fn check(&self, name: &str, root: &Document) -> Result<(), Error> {
        match self.digest {
            Some(expected) if expected != root.digest => Err(Error::Invalid {
                what: name.to_owned(),
                detail: format!("the image has the digest {}, not the one in its name", root.digest),
            }),
            _ => Ok(()),
        }
    }
}

/// The name of an image and of the place that holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageName {
    /// An image in a registry.
    Registry(Reference),
    /// An image in an OCI layout.
    Layout {
        /// The directory.
        path: PathBuf,
        /// Which image.
        selector: Selector,
    },
    /// An image in a tar of an OCI layout.
    OciArchive {
        /// The file.
        path: PathBuf,
        /// Which image.
        selector: Selector,
    },
    /// An image in an archive of `docker save`.
    DockerArchive {
        /// The file.
        path: PathBuf,
        /// Which image; its name is a reference in its canonical form.
        selector: Selector,
    },
    /// An image in containerd's store.
    Containerd {
        /// The namespace; the one of containerd's clients where it is not given.
        namespace: Option<String>,
        /// Its name there.
        reference: Reference,
    },
    /// An archive on standard input or output.
    Standard,
}

impl ImageName {
    /// Returns the reference, where the image is in a registry.
    #[must_use]
    pub fn reference(&self) -> Option<&Reference> {
        match self {
            Self::Registry(reference) => Some(reference),
            _ => None,
        }
    }

    /// Returns the same name with the digest that the image has, as Loris prints it. Not for [`ImageName::Standard`].
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        let mut name = self.clone();
        match &mut name {
            Self::Registry(reference) | Self::Containerd { reference, .. } => {
                *reference = reference.with_digest(digest);
            }
            Self::Layout { selector, .. }
            | Self::OciArchive { selector, .. }
            | Self::DockerArchive { selector, .. } => {
                selector.digest = Some(digest);
                selector.index = None;
            }
            Self::Standard => {}
        }
        name
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(name) = &self.name {
            write!(f, ":{name}")?;
        } else if let Some(index) = self.index {
            write!(f, ":@{index}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => {
                let text = reference.to_string();
                // An image that is called as a transport is.
                let prefix = text.split_once(':').map_or("", |(prefix, _)| prefix);
                let scheme = if is_transport(prefix) { "docker://" } else { "" };
                write!(f, "{scheme}{text}")
            }
            Self::Layout { path, selector } => write!(f, "oci:{}{selector}", path.display()),
            Self::OciArchive { path, selector } => write!(f, "oci-archive:{}{selector}", path.display()),
            Self::DockerArchive { path, selector } => write!(f, "docker-archive:{}{selector}", path.display()),
            // In full, so that the namespace can be told from the registry.
            Self::Containerd { namespace: Some(namespace), reference } => {
                write!(f, "containerd:{namespace}/{}", reference.canonical())
            }
            Self::Containerd { namespace: None, reference } => write!(f, "containerd:{}", reference.canonical()),
            Self::Standard => f.write_str("-"),
        }
    }
}

impl FromStr for ImageName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "-" {
            return Ok(Self::Standard);
        }
        if let Some(reference) = text.strip_prefix("docker://") {
            return reference.parse().map(Self::Registry);
        }
        match text.split_once(':') {
            Some(("oci", rest)) => {
                let (path, selector) = in_file(text, rest, layout_name)?;
                Ok(Self::Layout { path, selector })
            }
            Some(("oci-archive", rest)) => {
                let (path, selector) = in_file(text, rest, layout_name)?;
                Ok(Self::OciArchive { path, selector })
            }
            Some(("docker-archive", rest)) => {
                let (path, selector) = in_file(text, rest, docker_name)?;
                Ok(Self::DockerArchive { path, selector })
            }
            Some(("containerd", rest)) => {
                let (namespace, reference) = in_containerd(text, rest)?;
                Ok(Self::Containerd { namespace, reference })
            }
            Some((transport, _)) if is_transport(transport) => {
                let instead = NOT_SUPPORTED.iter().find(|(name, _)| *name == transport).map_or("", |(_, hint)| hint);
                Err(Error::Unsupported {
                    what: format!("the transport `{transport}:` yet; {instead}"),
                    place: "loris".to_owned(),
                })
            }
            _ if text.starts_with(['/', '.']) => Err(Error::Invalid {
                what: format!("image name {text:?}"),
                detail: "a directory or file is named `oci:DIR`, `oci-archive:FILE` or `docker-archive:FILE`"
                    .to_owned(),
            }),
            Some(("docker", rest)) => text.parse().map(Self::Registry).map_err(|_| Error::Invalid {
                what: format!("image name {text:?}"),
                detail: format!("an image in a registry is named `docker://{rest}`"),
            }),
            _ => text.parse().map(Self::Registry),
        }
    }
}

fn is_transport(prefix: &str) -> bool {
    matches!(prefix, "oci" | "oci-archive" | "docker-archive" | "containerd")
        || NOT_SUPPORTED.iter().any(|(name, _)| *name == prefix)
}

/// Reads `PATH[:SELECTOR]`.
fn in_file(
    text: &str,
    rest: &str,
    check_name: fn(&str) -> Result<String, String>,
) -> Result<(PathBuf, Selector), Error> {
    let invalid = |detail: String| Error::Invalid {
        what: format!("image name {:?}", text.chars().take(200).collect::<String>()),
        detail,
    };
    // The digest first: it has a colon too.
    let (rest, digest) = match rest.rfind("@sha").map(|at| (&rest[..at], rest[at + 1..].parse())) {
        Some((before, Ok(digest))) => (before, Some(digest)),
        _ => (rest, None),
    };
    let (path, selected) = rest.split_once(':').map_or((rest, ""), |(path, selected)| (path, selected));
    if path.is_empty() || path.contains('\0') {
        return Err(invalid("a path must follow the transport".to_owned()));
    }
    let (name, index) = match selected.strip_prefix('@') {
        Some(index) if index.bytes().all(|byte| byte.is_ascii_digit()) => {
            let index = index.parse().map_err(|_| invalid("a number must follow `:@`".to_owned()))?;
            (None, Some(index))
        }
        Some(_) => return Err(invalid("a number must follow `:@`".to_owned())),
        None if selected.is_empty() => (None, None),
        None => (Some(check_name(selected).map_err(invalid)?), None),
    };
    Ok((PathBuf::from(path), Selector { name, index, digest }))
}

/// Reads `[NAMESPACE/]REFERENCE`. What comes first is a namespace where it can't be a registry. Where it can be one, as
/// `k8s.io` looks, and what follows can be a registry as well as the first part of a repository, nobody guesses: the wrong
/// one would be a stranger's registry, or a namespace that nobody sees.
fn in_containerd(text: &str, rest: &str) -> Result<(Option<String>, Reference), Error> {
    let is_registry = |part: &str| part == "localhost" || part.contains(['.', ':']) || part.to_lowercase() != part;
    let (namespace, reference) = match rest.split_once('/') {
        Some((first, behind)) if !is_registry(first) => (Some(first), behind),
        // No namespace has a port.
        Some((first, _)) if first.contains(':') => (None, rest),
        Some((first, behind)) => match behind.split_once('/').map(|(second, _)| second) {
            Some(second) if is_registry(second) => {
                // No part of a repository has a port or capitals, and `k8s.io` is Kubernetes' namespace and no registry.
                let is_surely = second.contains(':') || second.to_lowercase() != second;
                if first != KUBERNETES && !is_surely {
                    let first: String = first.chars().take(100).collect();
                    return Err(Error::Invalid {
                        what: format!("image name {:?}", text.chars().take(200).collect::<String>()),
                        detail: format!(
                            "{first} may be a namespace of containerd or a registry: where it is a registry, write \
                             `containerd:default/{first}/...`; where it is a namespace, leave it out and set \
                             CONTAINERD_NAMESPACE={first}"
                        ),
                    });
                }
                (Some(first), behind)
            }
            _ => (None, rest),
        },
        None => (None, rest),
    };
    // `containerd/pkg/identifiers`.
    let is_namespace = |name: &str| {
        let is_word = |word: &str| !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric());
        name.len() <= NAMESPACE_BYTES && name.split(['.', '_', '-']).all(is_word)
    };
    if namespace.is_some_and(|namespace| !is_namespace(namespace)) {
        return Err(Error::Invalid {
            what: format!("image name {:?}", text.chars().take(200).collect::<String>()),
            detail: "a namespace of containerd is letters and digits, separated by one of `-._`".to_owned(),
        });
    }
    Ok((namespace.map(str::to_owned), reference.parse()?))
}

/// Checks a name for a layout: OCI image specification, `annotations.md`, section on `ref.name`.
fn layout_name(name: &str) -> Result<String, String> {
    let is_component = |component: &str| {
        let is_end = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
        let separators = component.split(|character: char| character.is_ascii_alphanumeric());
        is_end(component.bytes().next())
            && is_end(component.bytes().last())
            && separators
                .into_iter()
                .all(|separator| matches!(separator, "" | "-" | "." | "_" | ":" | "@" | "+" | "--"))
    };
    if name.len() <= LAYOUT_REFERENCE_BYTES && name.split('/').all(is_component) {
        return Ok(name.to_owned());
    }
    Err("the name of an image in a layout is letters and digits, separated by one of `-._:@+/` or `--`".to_owned())
}

fn docker_name(name: &str) -> Result<String, String> {
    let reference: Reference = name.parse().map_err(|error: Error| error.to_string())?;
    Ok(reference.canonical())
}

/// What is needed to open any place.
#[derive(Clone)]
pub struct OpenOptions {
    /// The client of registries; clones share its connections and tokens.
    pub registry: Client,
    /// Where standard input and compressed archives are unpacked to; the files have no name there.
    pub temp_dir: PathBuf,
    /// Bounds on documents and archives.
    pub limits: Limits,
}

impl OpenOptions {
    /// Returns options with the usual limits and, for large temporary files, the directory `$TMPDIR`, else `/var/tmp`:
    /// `/tmp` is in memory on many systems.
    #[must_use]
    pub fn new(registry: Client) -> Self {
        let on_disk = PathBuf::from("/var/tmp");
        let is_chosen = std::env::var_os("TMPDIR").is_some() || !on_disk.is_dir();
        let temp_dir = if is_chosen { std::env::temp_dir() } else { on_disk };
        Self { registry, temp_dir, limits: Limits::default() }
    }
}

/// Opens the place that holds an image.
///
/// # Errors
/// Where there is no such place, or no such image in it, or where it is damaged. A registry is not asked anything yet.
pub async fn open_source(name: &ImageName, options: &OpenOptions) -> Result<Arc<dyn ImageSource>, Error> {
    match name {
        ImageName::Registry(reference) => Ok(Arc::new(options.registry.source(reference))),
        ImageName::Layout { path, selector } => {
            Ok(Arc::new(LayoutSource::open(path, selector, &options.limits).await?))
        }
        ImageName::OciArchive { path, selector } => {
            Archive::open(path, options).await?.oci(name.to_string(), selector, &options.limits).await
        }
        ImageName::DockerArchive { path, selector } => {
            Archive::open(path, options).await?.docker(name.to_string(), selector, &options.limits).await
        }
        ImageName::Containerd { .. } => Err(in_another_crate(name)),
        ImageName::Standard => Archive::standard_input(options).await?.any("-".to_owned(), &options.limits).await,
    }
}

/// Opens the place that an image is to be written to.
///
/// # Errors
/// Where nothing can be written there. A registry is not asked anything yet.
pub async fn open_sink(name: &ImageName, options: &OpenOptions) -> Result<Arc<dyn ImageSink>, Error> {
    let only_to_read = |path: &Path| Error::Unsupported {
        what: "writing to an image that is chosen by number; give it a name".to_owned(),
        place: path.display().to_string(),
    };
    match name {
        ImageName::Registry(reference) => Ok(Arc::new(options.registry.sink(reference))),
        ImageName::Layout { path, selector }
        | ImageName::OciArchive { path, selector }
        | ImageName::DockerArchive { path, selector }
            if selector.index.is_some() =>
        {
            Err(only_to_read(path))
        }
        ImageName::Layout { path, selector } => Ok(Arc::new(LayoutSink::open(path, selector, &options.limits).await?)),
        ImageName::OciArchive { path, selector } => {
            Ok(Arc::new(ArchiveSink::create(path, selector, &options.temp_dir).await?))
        }
        ImageName::DockerArchive { path, selector } => {
            Ok(Arc::new(DockerArchiveSink::create(path, selector, &options.temp_dir, &options.limits).await?))
        }
        ImageName::Containerd { .. } => Err(in_another_crate(name)),
        ImageName::Standard => Ok(Arc::new(ArchiveSink::standard_output(&options.temp_dir).await?)),
    }
}

/// containerd's protocol is not known here: the caller asks the `snapshotter` crate.
fn in_another_crate(name: &ImageName) -> Error {
    Error::Unsupported { what: format!("opening {name} as a registry, layout or archive"), place: "loris".to_owned() }
}

#[cfg(test)]
mod tests;

//! Platforms: what a user types, what two spellings mean the same, and which manifest of an index is for a machine.
//!
//! Source: OCI image specification 1.1, `image-index.md`; the spellings and the order of fallbacks (an arm64 machine runs
//! arm/v7) are those of containerd's platforms package, so that the same manifest is chosen as elsewhere.

use std::{collections::BTreeSet, fmt, str::FromStr};

use loris_format::limits::Limits;

pub use crate::document::Platform;
use crate::{
    document::{Descriptor, Document, ImageConfig, Kind, Manifest, media_type},
    place::{Error, ImageSource},
};

/// Most documents that are read to find one platform's manifest; an index of indexes can name a great many.
const MOST_LOOKUPS: usize = 64;
/// Most platforms and digests that an error lists.
const MOST_LISTED: usize = 32;
/// Marks the zstd variant beside the gzip one for the same platform (Podman, Buildah).
const ZSTD_VARIANT: &str = "io.github.containers.compression.zstd";

impl Platform {
    /// Returns a platform in its usual spelling: `x86_64` becomes `amd64`, `aarch64` becomes `arm64`.
    #[must_use]
    pub fn new(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let (architecture, variant) = usual_architecture(architecture, variant.unwrap_or_default());
        Self {
            architecture,
            os: usual_os(os),
            variant: (!variant.is_empty()).then_some(variant),
            os_version: None,
            os_features: Vec::new(),
        }
    }

    /// Returns the platform of this machine. The variant of 32-bit ARM is taken to be v7.
    #[must_use]
    pub fn host() -> Self {
        Self::new(std::env::consts::OS, std::env::consts::ARCH, None)
    }

    /// Returns the platform in its usual spelling, with everything else as it is.
    #[must_use]
    pub fn normalized(&self) -> Self {
        Self {
            os_version: self.os_version.clone().filter(|version| !version.is_empty()),
            os_features: self.os_features.clone(),
            ..Self::new(&self.os, &self.architecture, self.variant.as_deref())
        }
    }

    /// Says how well an image for `self` runs on a machine of the platform `machine`: 0 is best, `None` not at all.
    #[must_use]
    pub fn rank_on(&self, machine: &Self) -> Option<usize> {
        let (image, machine) = (self.normalized(), machine.normalized());
        let version_fits = match (&machine.os_version, &image.os_version) {
            (Some(wanted), Some(found)) => found == wanted || found.starts_with(&format!("{wanted}.")),
            _ => true,
        };
        if image.os != machine.os || !version_fits {
            return None;
        }
        runnable(&machine.architecture, machine.variant.as_deref().unwrap_or_default()).into_iter().position(
            |(architecture, variant)| {
                architecture == image.architecture && variant == image.variant.as_deref().unwrap_or_default()
            },
        )
    }
}

/// The usual form: `linux/arm/v7`.
impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        if let Some(variant) = &self.variant {
            write!(f, "/{variant}")?;
        }
        if let Some(version) = &self.os_version {
            write!(f, " ({version})")?;
        }
        Ok(())
    }
}

impl FromStr for Platform {
    type Err = Error;

    /// Reads `os/architecture[/variant]`, or one of the first two where the other is this machine's.
    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid = |detail: &str| Error::Invalid {
            what: format!("platform {:?}", text.chars().take(100).collect::<String>()),
            detail: detail.to_owned(),
        };
        let parts: Vec<&str> = text.split('/').collect();
        let is_word = |part: &&str| {
            !part.is_empty()
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.'))
        };
        if !parts.iter().all(is_word) {
            return Err(invalid("expected OS/ARCHITECTURE[/VARIANT], such as linux/arm64, or all"));
        }
        let host = Self::host();
        match parts.as_slice() {
            [word] if OPERATING_SYSTEMS.contains(&usual_os(word).as_str()) => {
                Ok(Self::new(word, &host.architecture, host.variant.as_deref()))
            }
            [word] if ARCHITECTURES.contains(&usual_architecture(word, "").0.as_str()) => {
                Ok(Self::new(&host.os, word, None))
            }
            [_] => Err(invalid("neither an operating system nor an architecture that is known")),
            [os, architecture] => Ok(Self::new(os, architecture, None)),
            [os, architecture, variant] => Ok(Self::new(os, architecture, Some(variant))),
            _ => Err(invalid("more than three parts")),
        }
    }
}

/// Which platforms of an image a command is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Platforms {
    /// All that there are.
    All,
    /// These, at least one.
    Only(Vec<Platform>),
}

impl FromStr for Platforms {
    type Err = Error;

    /// Reads `all`, or platforms separated by commas.
    fn from_str(text: &str) -> Result<Self, Error> {
        if text == "all" {
            return Ok(Self::All);
        }
        text.split(',').map(str::parse).collect::<Result<_, _>>().map(Self::Only)
    }
}

/// Operating systems that are known by a single word (GOOS).
const OPERATING_SYSTEMS: [&str; 10] =
    ["linux", "windows", "darwin", "freebsd", "netbsd", "openbsd", "solaris", "illumos", "android", "wasip1"];

/// Architectures that are known by a single word (GOARCH).
const ARCHITECTURES: [&str; 14] = [
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64", "ppc64le", "riscv64",
    "s390x", "wasm",
];

fn usual_os(os: &str) -> String {
    match os.to_ascii_lowercase().as_str() {
        "macos" => "darwin".to_owned(),
        os => os.to_owned(),
    }
}

fn usual_architecture(architecture: &str, variant: &str) -> (String, String) {
    let variant = variant.to_ascii_lowercase();
    let lower = architecture.to_ascii_lowercase();
    let (architecture, variant) = match (lower.as_str(), variant.as_str()) {
        ("i386" | "i486" | "i586" | "i686" | "x86", _) => ("386", ""),
        ("x86_64" | "x86-64" | "amd64", "" | "v1") => ("amd64", ""),
        ("x86_64" | "x86-64", variant) => ("amd64", variant),
        ("aarch64" | "arm64", "" | "8" | "v8" | "v8.0") => ("arm64", ""),
        ("aarch64", variant) => ("arm64", variant),
        ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
        ("armel", _) | ("arm", "6") => ("arm", "v6"),
        ("arm", "5") => ("arm", "v5"),
        ("arm", "8") => ("arm", "v8"),
        ("loongarch64", variant) => ("loong64", variant),
        ("powerpc64", variant) => ("ppc64", variant),
        (architecture, variant) => (architecture, variant),
    };
    (architecture.to_owned(), variant.to_owned())
}

/// Returns the architectures and variants whose programs run on a machine, the best first.
fn runnable(architecture: &str, variant: &str) -> Vec<(String, String)> {
    let pair = |architecture: &str, variant: &str| (architecture.to_owned(), variant.to_owned());
    let level = variant.strip_prefix('v').and_then(|level| level.parse::<u8>().ok()).filter(|level| *level <= 9);
    let mut found = vec![pair(architecture, variant)];
    match (architecture, level) {
        ("amd64", level) => {
            let lower = (2..level.unwrap_or(1)).rev().map(|level| pair(architecture, &format!("v{level}")));
            found.extend(lower);
            if level.is_some_and(|level| level > 1) {
                found.push(pair(architecture, ""));
            }
            found.push(pair("386", ""));
        }
        ("arm", Some(level)) => {
            found.extend((5..level).rev().map(|level| pair(architecture, &format!("v{level}"))));
        }
        ("arm64", level) => {
            if level.is_some_and(|level| level > 8) {
                found.push(pair(architecture, ""));
            }
            found.extend((5..=8).rev().map(|level| pair("arm", &format!("v{level}"))));
        }
        _ => {}
    }
    found
}

/// One image of a source: its manifest and configuration.
#[derive(Clone, Debug)]
pub struct ResolvedImage {
    /// The manifest, as it is stored.
    pub document: Document,
    /// Its view.
    pub manifest: Manifest,
    /// The configuration, as it is stored.
    pub config_document: Document,
    /// Its view. It has as many DiffIDs as the manifest has layers.
    pub config: ImageConfig,
}

/// Finds one platform's image in a source, through nested indexes, and reads its manifest and configuration.
///
/// Without a platform, that of this machine is chosen from an index, and an image that stands alone is taken whatever it
/// is for.
///
/// # Errors
/// [`Error::NoPlatform`] where there is none, with a list of those that there are; [`Error::Ambiguous`] where there are
/// several; [`Error::Invalid`] where what was found is not an image.
pub async fn resolve_image(
    source: &dyn ImageSource,
    platform: Option<&Platform>,
    limits: &Limits,
) -> Result<ResolvedImage, Error> {
    let root = source.root().await?;
    let wanted = only_alone(&root, platform);
    let (document, manifest) = descend(source, root, platform, limits).await?;
    let (config_document, config) = read_config(source, &manifest, wanted, limits).await?;
    Ok(ResolvedImage { document, manifest, config_document, config })
}

/// As [`resolve_image`], without the configuration: it costs a round trip, which whoever opens layers can spend beside
/// theirs.
///
/// # Errors
/// As [`resolve_image`].
pub async fn resolve_manifest(
    source: &dyn ImageSource,
    platform: Option<&Platform>,
    limits: &Limits,
) -> Result<(Document, Manifest), Error> {
    let root = source.root().await?;
    let wanted = only_alone(&root, platform);
    let (document, manifest) = descend(source, root, platform, limits).await?;
    if wanted.is_some() {
        read_config(source, &manifest, wanted, limits).await?;
    }
    Ok((document, manifest))
}

/// Returns the platform that the configuration must be for. In an index, the descriptor has said what the image is for;
/// of an image that stands alone, only its configuration does.
fn only_alone<'a>(root: &Document, platform: Option<&'a Platform>) -> Option<&'a Platform> {
    platform.filter(|_| media_type::is_manifest(&root.media_type))
}

async fn descend(
    source: &dyn ImageSource,
    root: Document,
    platform: Option<&Platform>,
    limits: &Limits,
) -> Result<(Document, Manifest), Error> {
    let (document, manifest) = match root.parse_kind(limits)? {
        Kind::Manifest(manifest) => (root, manifest),
        Kind::Index(index) => {
            let host = Platform::host();
            let descriptor = choose(source, &index.manifests, platform.unwrap_or(&host), limits).await?;
            let document = source.document(&descriptor).await?;
            let manifest = document.manifest(limits)?;
            (document, manifest)
        }
    };
    if manifest.is_image() {
        return Ok((document, manifest));
    }
    Err(Error::Invalid {
        what: format!("manifest {} of {}", document.digest, source.name()),
        detail: format!("not an image but an artifact of type {:?}", manifest.effective_artifact_type()),
    })
}

async fn read_config(
    source: &dyn ImageSource,
    manifest: &Manifest,
    platform: Option<&Platform>,
    limits: &Limits,
) -> Result<(Document, ImageConfig), Error> {
    let document = source.document(&manifest.config).await?;
    let config = document.image_config(limits)?;
    config.check_layers(manifest)?;
    let found = config.platform();
    match platform {
        Some(wanted) if !found.architecture.is_empty() && found.rank_on(wanted).is_none() => Err(Error::NoPlatform {
            wanted: wanted.to_string(),
            place: source.name(),
            available: found.normalized().to_string(),
        }),
        _ => Ok((document, config)),
    }
}

/// Finds the manifest for a machine in an index, through nested indexes.
///
/// Attestations and artifacts are passed over. Of several equally good manifests, those with required features of the
/// operating system and zstd variants of others give way.
///
/// # Errors
/// As [`resolve_image`].
pub async fn choose(
    source: &dyn ImageSource,
    manifests: &[Descriptor],
    machine: &Platform,
    limits: &Limits,
) -> Result<Descriptor, Error> {
    let candidates = candidates(source, manifests, limits).await?;
    let ranked = |candidate: &Candidate| candidate.platform.rank_on(machine);
    let Some(best) = candidates.iter().filter_map(ranked).min() else {
        return Err(Error::NoPlatform {
            wanted: machine.to_string(),
            place: source.name(),
            available: listed(candidates.iter().map(|candidate| candidate.platform.normalized().to_string())),
        });
    };
    let mut equal: Vec<_> = candidates.into_iter().filter(|candidate| ranked(candidate) == Some(best)).collect();
    for gives_way in
        [(|candidate: &Candidate| !candidate.platform.os_features.is_empty()) as fn(&Candidate) -> bool, |candidate| {
            candidate.descriptor.annotations.contains_key(ZSTD_VARIANT)
        }]
    {
        if !equal.iter().all(gives_way) {
            equal.retain(|candidate| !gives_way(candidate));
        }
    }
    equal.dedup_by_key(|candidate| candidate.descriptor.digest);
    match equal.as_slice() {
        [one] => Ok(one.descriptor.clone()),
        several => Err(Error::Ambiguous {
            what: format!("an image for {machine}"),
            place: source.name(),
            choices: listed(several.iter().map(|candidate| {
                let platform = candidate.platform.normalized();
                format!("{} for {platform}", candidate.descriptor.digest)
            })),
        }),
    }
}

struct Candidate {
    descriptor: Descriptor,
    platform: Platform,
}

/// Returns the images of an index and of the indexes in it, with their platforms.
async fn candidates(
    source: &dyn ImageSource,
    manifests: &[Descriptor],
    limits: &Limits,
) -> Result<Vec<Candidate>, Error> {
    let mut found = Vec::new();
    let mut lookups = 0;
    // The next one is last; a level deeper is pushed on top.
    let mut open: Vec<(Descriptor, usize)> = manifests.iter().rev().map(|each| (each.clone(), 1)).collect();
    while let Some((descriptor, depth)) = open.pop() {
        if descriptor.is_attestation() || !(descriptor.is_document() || descriptor.media_type.is_empty()) {
            continue;
        }
        let is_manifest = media_type::is_manifest(&descriptor.media_type);
        // An index of SOCI has the platform of the image that it is for.
        if descriptor
            .artifact_type
            .as_deref()
            .is_some_and(|kind| !kind.is_empty() && !media_type::is_image_config(kind))
        {
            continue;
        }
        match &descriptor.platform {
            Some(platform) if platform.os == "unknown" => continue,
            Some(platform) if is_manifest && !platform.architecture.is_empty() => {
                found.push(Candidate { platform: platform.clone(), descriptor });
                continue;
            }
            _ => {}
        }
        lookups += 1;
        if lookups > MOST_LOOKUPS {
            return Err(Error::Invalid {
                what: format!("the index of {}", source.name()),
                detail: format!("more than {MOST_LOOKUPS} documents would have to be read to find a platform in it"),
            });
        }
        let document = source.document(&descriptor).await?;
        match document.parse_kind(limits)? {
            Kind::Index(_) if depth >= limits.index_depth => {
                return Err(Error::Invalid {
                    what: format!("index {} of {}", document.digest, source.name()),
                    detail: format!("indexes are nested deeper than the limit of {}", limits.index_depth),
                });
            }
            Kind::Index(index) => {
                open.extend(index.manifests.into_iter().rev().map(|each| (each, depth + 1)));
            }
            Kind::Manifest(manifest) if manifest.is_image() => {
                let config = source.document(&manifest.config).await?.image_config(limits)?;
                found.push(Candidate { platform: config.platform(), descriptor });
            }
            Kind::Manifest(_) => {}
        }
    }
    Ok(found)
}

/// Joins what an error lists: sorted, each once, not too many.
fn listed(items: impl Iterator<Item = String>) -> String {
    let items: BTreeSet<String> = items.collect();
    let more = items.len().saturating_sub(MOST_LISTED);
    let mut list: Vec<String> = items.into_iter().take(MOST_LISTED).collect();
    if more > 0 {
        list.push(format!("{more} more"));
    }
    if list.is_empty() { "nothing".to_owned() } else { list.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_mean_what_containerd_says() {
        let host = Platform::host();
        let amd64_here = format!("{}/amd64", host.os);
        for (text, usual) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm64/v9", "linux/arm64/v9"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/arm/6", "linux/arm/v6"),
            ("LINUX/ARM64", "linux/arm64"),
            ("linux/i686", "linux/386"),
            ("macos/arm64", "darwin/arm64"),
            ("amd64", &amd64_here),
            ("x86_64", &amd64_here),
        ] {
            assert_eq!(text.parse::<Platform>().unwrap().to_string(), usual, "{text}");
        }
        assert_eq!("linux".parse::<Platform>().unwrap().architecture, host.architecture);
        for bad in ["", "/", "linux/", "a/b/c/d", "linux/am d64", "vax", "linux/amd64/\u{e4}"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
        assert_eq!("all".parse::<Platforms>().unwrap(), Platforms::All);
        let Platforms::Only(two) = "linux/arm64,linux/amd64".parse().unwrap() else { panic!("all") };
        assert_eq!(two.len(), 2);
    }

    #[test]
    fn machines_prefer_their_own_programs() {
        for (machine, best_first, none) in [
            ("linux/amd64", &["linux/amd64", "linux/386"][..], &["linux/arm64", "linux/amd64/v3", "windows/amd64"][..]),
            ("linux/amd64/v3", &["linux/amd64/v3", "linux/amd64/v2", "linux/amd64", "linux/386"], &["linux/amd64/v4"]),
            ("linux/arm64", &["linux/arm64", "linux/arm/v8", "linux/arm/v7", "linux/arm/v5"], &["linux/arm64/v9"]),
            ("linux/arm64/v9", &["linux/arm64/v9", "linux/arm64", "linux/arm/v7"], &["linux/amd64"]),
            ("linux/arm/v7", &["linux/arm/v7", "linux/arm/v6", "linux/arm/v5"], &["linux/arm/v8", "linux/arm64"]),
            ("linux/riscv64", &["linux/riscv64"], &["linux/386"]),
        ] {
            let machine: Platform = machine.parse().unwrap();
            let rank = |image: &&str| image.parse::<Platform>().unwrap().rank_on(&machine);
            let ranks: Vec<usize> = best_first.iter().map(|image| rank(image).unwrap()).collect();
            assert!(ranks.is_sorted_by(|a, b| a < b), "{machine}: {ranks:?}");
            assert!(none.iter().all(|image| rank(image).is_none()), "{machine}");
        }
        let windows = |version: &str| Platform {
            os_version: Some(version.to_owned()),
            ..Platform::new("windows", "amd64", None)
        };
        assert!(windows("10.0.20348.1").rank_on(&windows("10.0.20348")).is_some());
        assert!(windows("10.0.17763.1").rank_on(&windows("10.0.20348")).is_none());
    }
}

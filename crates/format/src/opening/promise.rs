//! What a manifest says of a layer: the annotations of its descriptor that name a table of contents.
//!
//! | annotation | of | value |
//! |---|---|---|
//! | `containerd.io/snapshot/stargz/toc.digest` | eStargz; zstd:chunked of stargz-snapshotter | digest of the uncompressed table |
//! | `io.github.containers.zstd-chunked.manifest-checksum` | zstd:chunked of containers/storage | digest of the compressed table |
//! | `io.containers.zstd-chunked.manifest-checksum` | zstd:chunked of stargz-snapshotter, and of containers/storage until 2022 | the same |
//! | `....manifest-position` | | `OFFSET:BYTES:UNCOMPRESSED:1` of the table |
//! | `....tarsplit-position` | | `OFFSET:BYTES:UNCOMPRESSED` of the tar's other bytes |

use std::collections::BTreeMap;

use crate::{
    digest::Digest,
    estargz::toc::TOC_DIGEST_ANNOTATION,
    position::{BlobOffset, BlobRange, Packed},
};

/// What a manifest says of a layer. Empty for an ordinary layer, and for one that nobody vouches for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Promise {
    /// The digest of the table of contents, uncompressed.
    pub toc: Option<Digest>,
    /// That the layer is zstd:chunked.
    pub zstd_chunked: Option<ZstdChunked>,
    /// That there is an index beside the layer, which is as it always was. Counts where nothing else is promised.
    pub beside: Option<Beside>,
}

/// An index beside a layer: a ztoc.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Beside {
    /// Its digest.
    pub digest: Digest,
    /// Its bytes.
    pub size: u64,
    /// Who vouches for it.
    pub voucher: Voucher,
}

/// Who says that an index is that of a layer: the one who vouches most comes first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Voucher {
    /// This machine has made it of the layer.
    Node,
    /// The image's manifest, as for all that it names.
    Manifest,
    /// Whoever may write to the image's repository.
    Repository,
    /// Whoever may write to another one.
    Elsewhere,
}

impl Voucher {
    const ALL: [(Self, &str); 4] = [
        (Self::Node, "node"),
        (Self::Manifest, "manifest"),
        (Self::Repository, "repository"),
        (Self::Elsewhere, "elsewhere"),
    ];

    /// A word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(voucher, _)| *voucher == self).map_or("elsewhere", |(_, name)| name)
    }
}

/// Annotation of a layer's descriptor: the ztoc beside it, `DIGEST SIZE VOUCHER`. Readers add it to a view of the manifest
/// when they have found one; in a manifest it is as good as any other word of it.
pub const BESIDE_ANNOTATION: &str = "org.loris.index";

impl std::str::FromStr for Beside {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let malformed = || format!("{text:?} is not what it should be, DIGEST SIZE VOUCHER");
        let mut words = text.split(' ');
        let (digest, size, voucher) = (words.next(), words.next(), words.next());
        let voucher = Voucher::ALL.iter().find(|(_, name)| Some(*name) == voucher).map(|(voucher, _)| *voucher);
        let digest = digest.and_then(|digest| digest.parse().ok()).ok_or_else(malformed)?;
        let size = size.and_then(|size| size.parse().ok()).ok_or_else(malformed)?;
        match (voucher, words.next()) {
            (Some(voucher), None) => Ok(Self { digest, size, voucher }),
            _ => Err(malformed()),
        }
    }
}

impl std::fmt::Display for Beside {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} {}", self.digest, self.size, self.voucher.name())
    }
}

/// That a layer is zstd:chunked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ZstdChunked {
    /// Whose annotations say so.
    pub family: Family,
    /// The digest of the table of contents, compressed.
    pub checksum: Digest,
    /// Where it stands.
    pub position: Option<Packed>,
    /// Where the other bytes of the tar stand, as `tar-split` keeps them.
    pub tar_split: Option<Packed>,
}

/// Who has made up the annotations of a zstd:chunked layer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Family {
    /// containers/storage: Podman, Buildah, Skopeo.
    Containers,
    /// stargz-snapshotter; containers/storage until 2022.
    Stargz,
}

/// Annotations that can't be followed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PromiseError {
    /// A value that is none.
    #[error("annotation {annotation}: {problem}")]
    Malformed {
        /// The annotation's key.
        annotation: String,
        /// What is wrong with the value.
        problem: String,
    },
    /// Two annotations of which only one can be true, or which different readers would take differently.
    #[error(
        "it claims two formats: its annotations {one} and {other} vouch for different things, and which of them counts \
         would depend on who reads it; convert the image again"
    )]
    TwoFormats {
        /// One annotation's key.
        one: String,
        /// The other's.
        other: String,
    },
}

impl Family {
    const ALL: [Self; 2] = [Self::Containers, Self::Stargz];

    fn prefix(self) -> &'static str {
        match self {
            Self::Containers => "io.github.containers.zstd-chunked",
            Self::Stargz => "io.containers.zstd-chunked",
        }
    }

    /// Returns the key of the annotation with the digest of the compressed table of contents.
    #[must_use]
    pub fn checksum_annotation(self) -> String {
        format!("{}.manifest-checksum", self.prefix())
    }

    /// Returns the key of the annotation with the place of the table of contents.
    #[must_use]
    pub fn position_annotation(self) -> String {
        format!("{}.manifest-position", self.prefix())
    }

    /// Returns the key of the annotation with the place of the `tar-split`.
    #[must_use]
    pub fn tar_split_annotation(self) -> String {
        format!("{}.tarsplit-position", self.prefix())
    }
}

impl Promise {
    /// Promises eStargz with a table of contents of this digest; nothing where there is none.
    #[must_use]
    pub fn estargz(toc: Option<Digest>) -> Self {
        Self { toc, ..Self::default() }
    }

    /// Reads the annotations of a layer's descriptor.
    ///
    /// # Errors
    /// Where a value is malformed, or two formats are promised. That containers/storage's annotations stand beside the
    /// digest that stargz-snapshotter goes by counts as two: Podman refuses such a layer as well.
    pub fn read(annotations: &BTreeMap<String, String>) -> Result<Self, PromiseError> {
        let toc = annotations.get(TOC_DIGEST_ANNOTATION).map(|text| digest(TOC_DIGEST_ANNOTATION, text)).transpose()?;
        let mut zstd_chunked: Option<ZstdChunked> = None;
        for family in Family::ALL {
            let Some(found) = ZstdChunked::read(family, annotations)? else { continue };
            match &zstd_chunked {
                None => zstd_chunked = Some(found),
                Some(first) if (first.checksum, first.position) == (found.checksum, found.position) => {}
                Some(first) => return Err(two(first.family.checksum_annotation(), family.checksum_annotation())),
            }
        }
        match &zstd_chunked {
            Some(ZstdChunked { family: family @ Family::Containers, .. }) if toc.is_some() => {
                Err(two(TOC_DIGEST_ANNOTATION.to_owned(), family.checksum_annotation()))
            }
            _ => Ok(Self { toc, zstd_chunked, beside: beside(annotations)? }),
        }
    }

    /// Says whether there is nothing to go by in the blob itself.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.toc.is_none() && self.zstd_chunked.is_none()
    }

    /// Returns the index beside the layer, where that is what counts.
    #[must_use]
    pub fn index_beside(&self) -> Option<Beside> {
        self.beside.filter(|_| self.is_empty())
    }

    /// Returns the digest that vouches for the index, which is part of the layer's name wherever indexes are kept: the same
    /// blob with another table is another layer.
    #[must_use]
    pub fn identity(&self) -> Option<Digest> {
        let inside = self.toc.or_else(|| self.zstd_chunked.as_ref().map(|promise| promise.checksum));
        inside.or_else(|| self.beside.map(|beside| beside.digest))
    }

    /// Returns the annotations that say this.
    #[must_use]
    pub fn annotations(&self) -> BTreeMap<String, String> {
        let mut annotations = BTreeMap::new();
        if let Some(toc) = self.toc {
            annotations.insert(TOC_DIGEST_ANNOTATION.to_owned(), toc.to_string());
        }
        if let Some(promise) = &self.zstd_chunked {
            let family = promise.family;
            annotations.insert(family.checksum_annotation(), promise.checksum.to_string());
            if let Some(position) = promise.position {
                annotations.insert(family.position_annotation(), format!("{}:1", position_text(position)));
            }
            if let Some(position) = promise.tar_split {
                annotations.insert(family.tar_split_annotation(), position_text(position));
            }
        }
        if let Some(beside) = self.beside {
            annotations.insert(BESIDE_ANNOTATION.to_owned(), beside.to_string());
        }
        annotations
    }
}

fn beside(annotations: &BTreeMap<String, String>) -> Result<Option<Beside>, PromiseError> {
    let malformed = |problem| PromiseError::Malformed { annotation: BESIDE_ANNOTATION.to_owned(), problem };
    annotations.get(BESIDE_ANNOTATION).map(|text| text.parse().map_err(malformed)).transpose()
}

impl ZstdChunked {
    fn read(family: Family, annotations: &BTreeMap<String, String>) -> Result<Option<Self>, PromiseError> {
        let key = family.checksum_annotation();
        let Some(checksum) = annotations.get(&key) else { return Ok(None) };
        let position = |key: String, last: &str| {
            let Some(text) = annotations.get(&key) else { return Ok(None) };
            let problem = || format!("{text:?} is not what it should be, OFFSET:BYTES:UNCOMPRESSED{last}");
            let position = text.strip_suffix(last).and_then(parse_position);
            position.map(Some).ok_or_else(|| PromiseError::Malformed { annotation: key.clone(), problem: problem() })
        };
        Ok(Some(Self {
            family,
            checksum: digest(&key, checksum)?,
            position: position(family.position_annotation(), ":1")?,
            tar_split: position(family.tar_split_annotation(), "")?,
        }))
    }
}

/// Reads `OFFSET:BYTES:UNCOMPRESSED`.
fn parse_position(text: &str) -> Option<Packed> {
    let mut numbers = text.split(':').map(|number| number.parse::<u64>().ok());
    let (start, length, uncompressed) = (numbers.next()??, numbers.next()??, numbers.next()??);
    start.checked_add(length)?;
    let range = BlobRange { start: BlobOffset(start), length };
    numbers.next().is_none().then_some(Packed { range, uncompressed })
}

fn position_text(position: Packed) -> String {
    format!("{}:{}:{}", position.range.start, position.range.length, position.uncompressed)
}

fn digest(annotation: &str, text: &str) -> Result<Digest, PromiseError> {
    let malformed = |error: crate::digest::InvalidDigest| PromiseError::Malformed {
        annotation: annotation.to_owned(),
        problem: error.to_string(),
    };
    text.parse().map_err(malformed)
}

fn two(one: String, other: String) -> PromiseError {
    PromiseError::TwoFormats { one, other }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    const B: &str = "sha256:bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";
    const GITHUB: &str = "io.github.containers.zstd-chunked";
    const STARGZ: &str = "io.containers.zstd-chunked";

    fn read(annotations: &[(&str, &str)]) -> Result<Promise, PromiseError> {
        let owned = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Promise::read(&owned.collect())
    }

    fn key(prefix: &str, what: &str) -> String {
        format!("{prefix}.{what}")
    }

    #[test]
    fn annotations_are_read_and_written() {
        assert!(read(&[("org.opencontainers.image.title", "x")]).unwrap().is_empty());
        let estargz = read(&[(TOC_DIGEST_ANNOTATION, A)]).unwrap();
        assert_eq!(estargz, Promise::estargz(Some(A.parse().unwrap())));
        for prefix in [GITHUB, STARGZ] {
            let promise = read(&[
                (&key(prefix, "manifest-checksum"), B),
                (&key(prefix, "manifest-position"), "100:20:300:1"),
                (&key(prefix, "tarsplit-position"), "128:7:70"),
            ])
            .unwrap();
            assert_eq!(promise.identity(), Some(B.parse().unwrap()));
            let zstd_chunked = promise.zstd_chunked.clone().unwrap();
            assert_eq!(zstd_chunked.position.unwrap().range, BlobRange { start: BlobOffset(100), length: 20 });
            assert_eq!(zstd_chunked.tar_split.unwrap().uncompressed, 70);
            assert_eq!(promise.annotations().len(), 3);
            assert_eq!(Promise::read(&promise.annotations()), Ok(promise));
        }
        let both = read(&[(TOC_DIGEST_ANNOTATION, A), (&key(STARGZ, "manifest-checksum"), B)]).unwrap();
        assert_eq!(both.identity(), Some(A.parse().unwrap()));
    }

    #[test]
    fn two_formats_are_refused() {
        let github = key(GITHUB, "manifest-checksum");
        let stargz = key(STARGZ, "manifest-checksum");
        assert!(matches!(read(&[(TOC_DIGEST_ANNOTATION, A), (&github, A)]), Err(PromiseError::TwoFormats { .. })));
        assert!(matches!(read(&[(&stargz, B), (&github, A)]), Err(PromiseError::TwoFormats { .. })));
        assert!(read(&[(&stargz, A), (&github, A)]).is_ok());
    }

    #[test]
    fn malformed_values_are_refused() {
        let checksum = key(GITHUB, "manifest-checksum");
        assert!(matches!(read(&[(&checksum, "sha256:12")]), Err(PromiseError::Malformed { .. })));
        let position = key(GITHUB, "manifest-position");
        for text in ["", "1:2:3", "1:2:3:2", "1:2:3:4:1", "-1:2:3:1", "1:18446744073709551615:3:1", "a:2:3:1", "1:2::1"]
        {
            let error = read(&[(&checksum, A), (&position, text)]).unwrap_err();
            assert!(error.to_string().contains("OFFSET:BYTES:UNCOMPRESSED:1"), "{text}: {error}");
        }
    }
}

//! Digests: the names of content, and the only reason to believe it.
//!
//! Grammar: OCI image specification, `descriptor.md`, section Digests. SHA-256 and SHA-512 are the registered
//! algorithms that a verifier must or may know; any other is refused rather than ignored.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::Digest as _;

/// The digest of some bytes, as in `sha256:e3b0...`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Digest {
    /// SHA-256, which all manifests in the field use.
    Sha256([u8; 32]),
    /// SHA-512, which the specification registers too.
    Sha512([u8; 64]),
}

/// The digest of a layer's *uncompressed* tar, as the image configuration lists it under `rootfs.diff_ids`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiffId(pub Digest);

/// A text that is not a digest, or is one of an algorithm that can't be verified here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a digest that can be verified: {text:?} (expected sha256:<64 hex digits> or sha512:<128 hex digits>)")]
pub struct InvalidDigest {
    /// The text, cut to a length that can be shown.
    pub text: String,
}

impl Digest {
    /// Returns the SHA-256 digest of `bytes`.
    #[must_use]
    pub fn sha256_of(bytes: &[u8]) -> Self {
        Self::Sha256(sha2::Sha256::digest(bytes).into())
    }

    /// Returns the name of the algorithm, `sha256` or `sha512`.
    #[must_use]
    pub fn algorithm(&self) -> &'static str {
        match self {
            Self::Sha256(_) => "sha256",
            Self::Sha512(_) => "sha512",
        }
    }

    /// Returns the part behind the colon: lower-case hexadecimal.
    #[must_use]
    pub fn hex(&self) -> String {
        self.with_hex(str::to_owned)
    }

    /// Returns a hasher of this digest's algorithm, to check content against it.
    #[must_use]
    pub fn hasher(&self) -> Hasher {
        match self {
            Self::Sha256(_) => Hasher::Sha256(sha2::Sha256::new()),
            Self::Sha512(_) => Hasher::Sha512(sha2::Sha512::new()),
        }
    }

    /// Says whether `bytes` are what this digest names.
    #[must_use]
    pub fn matches(&self, bytes: &[u8]) -> bool {
        let mut hasher = self.hasher();
        hasher.update(bytes);
        hasher.finish() == *self
    }

    /// Reads a digest from text that need not be UTF-8 (what is not, is no digest).
    pub(crate) fn from_text(text: &[u8]) -> Result<Self, InvalidDigest> {
        let digest = match text.split_first_chunk::<7>() {
            Some((b"sha256:", hex)) => decode_hex(hex).map(Self::Sha256),
            Some((b"sha512:", hex)) => decode_hex(hex).map(Self::Sha512),
            _ => None,
        };
        digest.ok_or_else(|| InvalidDigest { text: String::from_utf8_lossy(text).chars().take(160).collect() })
    }

    /// Hands the hexadecimal digits to `use_hex`. A table of contents has some hundred thousand digests.
    fn with_hex<T>(&self, use_hex: impl FnOnce(&str) -> T) -> T {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let bytes = self.bytes();
        let mut hex = [0; 128];
        for (pair, byte) in hex.chunks_exact_mut(2).zip(bytes) {
            pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
        // ASCII, as the digits are.
        use_hex(str::from_utf8(&hex[..2 * bytes.len()]).unwrap_or_default())
    }

    fn bytes(&self) -> &[u8] {
        match self {
            Self::Sha256(bytes) => bytes,
            Self::Sha512(bytes) => bytes,
        }
    }
}

/// Hashes content piece by piece.
#[derive(Clone)]
pub enum Hasher {
    /// Ends in a [`Digest::Sha256`].
    Sha256(sha2::Sha256),
    /// Ends in a [`Digest::Sha512`].
    Sha512(sha2::Sha512),
}

impl Hasher {
    /// Returns a SHA-256 hasher, the algorithm of everything we write.
    #[must_use]
    pub fn sha256() -> Self {
        Self::Sha256(sha2::Sha256::new())
    }

    /// Takes the next bytes of the content.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Sha512(hasher) => hasher.update(bytes),
        }
    }

    /// Returns the digest of all bytes taken so far.
    #[must_use]
    pub fn finish(self) -> Digest {
        match self {
            Self::Sha256(hasher) => Digest::Sha256(hasher.finalize().into()),
            Self::Sha512(hasher) => Digest::Sha512(hasher.finalize().into()),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.algorithm())?;
        f.write_str(":")?;
        self.with_hex(|hex| f.write_str(hex))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Digest {
    type Err = InvalidDigest;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::from_text(text.as_bytes())
    }
}

fn decode_hex<const N: usize>(hex: &[u8]) -> Option<[u8; N]> {
    let (pairs, rest) = hex.as_chunks::<2>();
    if pairs.len() != N || !rest.is_empty() {
        return None;
    }
    let mut bytes = [0; N];
    let mut seen = 0;
    for (byte, pair) in bytes.iter_mut().zip(pairs) {
        let (high, low) = (NIBBLES[usize::from(pair[0])], NIBBLES[usize::from(pair[1])]);
        seen |= high | low;
        *byte = high << 4 | low;
    }
    // One check at the end is twice as fast as one for each digit.
    (seen < NO_NIBBLE).then_some(bytes)
}

const NO_NIBBLE: u8 = 16;

/// The value of each hexadecimal digit. The specification allows lower case only: two spellings of one digest would be
/// two cache entries.
const NIBBLES: [u8; 256] = {
    let mut nibbles = [NO_NIBBLE; 256];
    let mut digit = 0;
    while digit < 16 {
        nibbles[b"0123456789abcdef"[digit as usize] as usize] = digit;
        digit += 1;
    }
    nibbles
};

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_canonical_texts_are_digests() {
        let empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(empty.parse::<Digest>().unwrap(), Digest::sha256_of(b""));
        assert_eq!(Digest::sha256_of(b"").to_string(), empty);
        for bad in [
            "",
            "sha256:",
            "sha256",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            "sha256:E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855",
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b85",
            "sha256:../../../../../../../../../../../../../../../../../../../../../aaa",
            "sha512:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sha512_round_trips() {
        let mut hasher = Digest::Sha512([0; 64]).hasher();
        hasher.update(b"abc");
        let digest = hasher.finish();
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!(digest.matches(b"abc") && !digest.matches(b"abd"));
    }
}

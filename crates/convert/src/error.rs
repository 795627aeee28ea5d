//! Why an image cannot be converted or copied.

use loris_format::digest::{DiffId, Digest};

use crate::layer;

/// Why an image cannot be converted or copied. Messages are fragments that fit "failed to convert ...: {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source does not give the image, or the sink does not take it.
    #[error(transparent)]
    Place(#[from] loris_oci::Error),
    /// A layer cannot be converted.
    #[error("layer {digest}: {source}")]
    Layer {
        /// The source's layer.
        digest: Digest,
        /// Why not.
        source: layer::Error,
    },
    /// A layer is not the one that the image's configuration lists.
    #[error("layer {digest} has the DiffID {found}, but the configuration of {manifest} says {expected}", found = .found.0, expected = .expected.0)]
    DiffId {
        /// The layer.
        digest: Digest,
        /// The manifest.
        manifest: Digest,
        /// What the configuration says.
        expected: DiffId,
        /// What the layer's content has.
        found: DiffId,
    },
    /// A document of the image that cannot be taken or changed.
    #[error("{what}: {detail}")]
    Document {
        /// Which.
        what: String,
        /// Why not.
        detail: String,
    },
    /// A local file failed.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The system gives no threads.
    #[error("threads cannot be started: {0}")]
    Threads(#[source] std::io::Error),
    /// The work was given up because the program ends.
    #[error("stopped")]
    Stopped,
}

impl Error {
    /// Returns the error of the source or sink that is behind this one, however deep.
    #[must_use]
    pub fn place(&self) -> Option<&loris_oci::Error> {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = next {
            if let Some(place) = error.downcast_ref::<loris_oci::Error>() {
                return Some(place);
            }
            next = match error.downcast_ref::<Self>() {
                Some(Self::Place(place)) => return Some(place),
                _ => match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
                    // An error that was wrapped for `Read` is not among the sources of its wrapping.
                    Some(inner) => Some(inner),
                    None => error.source(),
                },
            };
        }
        None
    }

    /// Says whether trying again can help.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.place().is_some_and(loris_oci::Error::is_transient)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_behind_an_error_is_found() {
        let place = || loris_oci::Error::NotFound { what: "x".into(), place: "y".into() };
        let layer = |source| Error::Layer { digest: Digest::sha256_of(b""), source };
        let wrapped = std::io::Error::other(place());
        let read = loris_format::tar::Error::Read { offset: 0, source: std::io::Error::other(wrapped) };
        for error in [
            Error::Place(place()),
            layer(layer::Error::Tar(read)),
            layer(layer::Error::Input(std::io::Error::other(place()))),
        ] {
            assert!(matches!(error.place(), Some(loris_oci::Error::NotFound { .. })), "{error}");
            assert!(!error.is_transient());
        }
        assert!(Error::Stopped.place().is_none());
    }
}

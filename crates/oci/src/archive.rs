//! Images in a single file: OCI archives (a tar of an OCI layout) and Docker archives (`docker save`).
//!
//! To read one, its tar is gone through once, from header to header, which gives the place of every member; blobs are
//! then read from there, without unpacking anything. What is not a plain file that can be read at any place (standard
//! input, a pipe, a compressed archive) is written to a file without a name first, which is gone when the process is.
//!
//! To write one, blobs wait in a directory beside the file; the archive is put together when the image is complete, in
//! an order and with times that depend on the image alone, and then takes the file's place.

use std::{
    fs::File,
    io::{IsTerminal as _, Read, Seek as _, Write as _},
    os::fd::AsFd as _,
    path::Path,
    sync::Arc,
};

use loris_format::{compression::Decoder, limits::Limits};

use crate::{
    blob::{blocking, file_error},
    layout::{Files, INDEX, LayoutSource, MARKER},
    name::{OpenOptions, Selector},
    place::{Error, ImageSource},
};

mod docker;
mod docker_sink;
mod members;
mod oci_sink;
mod target;

pub use docker::DockerArchiveSource;
pub use docker_sink::DockerArchiveSink;
pub(crate) use members::Members;
pub use oci_sink::ArchiveSink;

/// Streams are unpacked in pieces of this many bytes.
const PIECE_BYTES: usize = 256 << 10;

/// An archive whose members are known.
pub struct Archive {
    members: Arc<Members>,
}

impl Archive {
    /// Opens a file, compressed or not.
    ///
    /// # Errors
    /// [`Error::File`] where it can't be read; [`Error::Corrupt`] where it is not a tar.
    pub async fn open(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let (path, options) = (path.to_owned(), options.clone());
        blocking(move || {
            let file = File::open(&path).map_err(|source| file_error(&path, source))?;
            Self::of_file(file, &path.display().to_string(), &options)
        })
        .await
    }

    /// Reads standard input to its end, unless it is a file already.
    ///
    /// # Errors
    /// As [`Archive::open`], and [`Error::Invalid`] where standard input is a terminal.
    pub async fn standard_input(options: &OpenOptions) -> Result<Self, Error> {
        let options = options.clone();
        blocking(move || {
            let place = "standard input";
            let input = std::io::stdin();
            if input.is_terminal() {
                let detail = "it is a terminal, where an archive is expected".to_owned();
                return Err(Error::Invalid { what: place.to_owned(), detail });
            }
            let input = input.as_fd().try_clone_to_owned().map_err(|source| file_error(place, source))?;
            Self::of_file(input.into(), place, &options)
        })
        .await
    }

    fn of_file(mut file: File, place: &str, options: &OpenOptions) -> Result<Self, Error> {
        let metadata = file.metadata().map_err(|source| file_error(place, source))?;
        if metadata.is_dir() {
            let detail = "it is a directory; an OCI layout is named `oci:DIR`".to_owned();
            return Err(Error::Invalid { what: place.to_owned(), detail });
        }
        let is_plain = metadata.is_file()
            && file.stream_position().is_ok_and(|position| position == 0)
            && !is_compressed(&file, place)?;
        let file = if is_plain { file } else { unpack(file, place, &options.temp_dir, options.limits.file_bytes)? };
        Ok(Self { members: Arc::new(Members::scan(file, place, &options.limits)?) })
    }

    /// Finds an image in an OCI archive. `name` is the source's name, for messages.
    ///
    /// # Errors
    /// As [`LayoutSource::open`].
    pub async fn oci(self, name: String, selector: &Selector, limits: &Limits) -> Result<Arc<dyn ImageSource>, Error> {
        if !self.is_oci() && self.members.has(docker::MANIFEST) {
            let detail = "it is a Docker archive, which is named `docker-archive:FILE`".to_owned();
            return Err(Error::Invalid { what: name, detail });
        }
        Ok(Arc::new(LayoutSource::of_files(name, Files::Archive(self.members), selector, limits).await?))
    }

    /// Finds an image in a Docker archive. `name` is the source's name, for messages.
    ///
    /// Docker 25 and later writes archives that are OCI archives too; they are read as such, since only that form has
    /// the image's own manifest.
    ///
    /// # Errors
    /// [`Error::NotFound`] and [`Error::Ambiguous`] where `selector` leads to no image, or to several;
    /// [`Error::Invalid`] and [`Error::Corrupt`] where the archive makes no sense.
    pub async fn docker(
        self,
        name: String,
        selector: &Selector,
        limits: &Limits,
    ) -> Result<Arc<dyn ImageSource>, Error> {
        if self.is_oci() {
            let files = Files::Archive(self.members.clone());
            match LayoutSource::of_files(name.clone(), files, selector, limits).await {
                // The layout's list may lack the names that Docker's own list has.
                Err(Error::NotFound { .. } | Error::Ambiguous { .. }) if self.members.has(docker::MANIFEST) => {}
                found => return Ok(Arc::new(found?)),
            }
        }
        Ok(Arc::new(DockerArchiveSource::open(name, self.members, selector, limits).await?))
    }

    /// Finds the only image in an archive of either kind.
    ///
    /// # Errors
    /// As [`Archive::oci`] and [`Archive::docker`].
    pub async fn any(self, name: String, limits: &Limits) -> Result<Arc<dyn ImageSource>, Error> {
        if self.members.has(docker::MANIFEST) {
            self.docker(name, &Selector::default(), limits).await
        } else {
            self.oci(name, &Selector::default(), limits).await
        }
    }

    fn is_oci(&self) -> bool {
        self.members.has(MARKER) && self.members.has(INDEX)
    }
}

fn is_compressed(file: &File, place: &str) -> Result<bool, Error> {
    use loris_format::compression::Compression;
    use std::os::unix::fs::FileExt as _;
    let mut start = [0; Compression::DETECT_BYTES];
    let length = file.read_at(&mut start, 0).map_err(|source| file_error(place, source))?;
    Ok(Compression::detect(&start[..length]) != Compression::None)
}

/// Writes a stream, uncompressed, to a file without a name.
fn unpack(input: impl Read, place: &str, directory: &Path, limit: u64) -> Result<File, Error> {
    let corrupt = |detail: String| Error::Corrupt { what: "the archive".to_owned(), place: place.to_owned(), detail };
    let mut input = Decoder::new(input).map_err(|error| corrupt(error.to_string()))?;
    let mut file = tempfile::tempfile_in(directory).map_err(|source| file_error(directory, source))?;
    let mut piece = vec![0; PIECE_BYTES];
    let mut written = 0;
    loop {
        let length = match input.read(&mut piece) {
            Ok(0) => return Ok(file),
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(corrupt(error.to_string())),
        };
        written += length as u64;
        if written > limit {
            return Err(Error::TooLarge { what: format!("the archive {place}, uncompressed,"), limit });
        }
        file.write_all(&piece[..length])
            .map_err(|source| file_error(format!("a temporary file in {}", directory.display()), source))?;
    }
}

#[cfg(test)]
mod tests;

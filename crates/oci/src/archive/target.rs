//! Where an archive is written to, and the tar that it is.

use std::{
    fs::File,
    io::{IsTerminal as _, Write as _},
    os::fd::AsFd as _,
    path::{Path, PathBuf},
};

use loris_format::tar::{self, EntryKind};

use crate::{
    blob::file_error,
    place::Error,
    stage::{Stage, new_file_in, sync_directory},
};

/// Where an archive is written to.
#[derive(Clone, Debug)]
pub(super) enum Target {
    /// A file, which is replaced when the archive is complete.
    File(PathBuf),
    /// A pipe or a device, which is written to when the image is complete.
    Stream(PathBuf),
    /// Standard output, likewise.
    StandardOutput,
}

impl Target {
    /// Looks at what a path names. Blocks.
    pub(super) fn of_path(path: &Path) -> Result<Self, Error> {
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                let detail = "it is a directory; an OCI layout is named `oci:DIR`".to_owned();
                Err(Error::Invalid { what: path.display().to_string(), detail })
            }
            Ok(metadata) if !metadata.is_file() => Ok(Self::Stream(path.to_owned())),
            Ok(_) => Ok(Self::File(path.to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::File(path.to_owned())),
            Err(source) => Err(file_error(path, source)),
        }
    }

    /// Returns standard output, unless it is a terminal.
    pub(super) fn standard_output() -> Result<Self, Error> {
        if std::io::stdout().is_terminal() {
            let detail = "it is a terminal; send it to a file or a pipe".to_owned();
            return Err(Error::Invalid { what: "standard output".to_owned(), detail });
        }
        Ok(Self::StandardOutput)
    }

    /// Makes a place for what waits to be put into the archive: beside the file, where copying within a file system may
    /// cost nothing.
    pub(super) fn stage(&self, temp_dir: &Path, name: &str) -> Result<Stage, Error> {
        let directory = match self {
            Self::File(path) => parent(path),
            Self::Stream(_) | Self::StandardOutput => temp_dir,
        };
        Stage::new_in(directory, name, false)
    }

    /// Writes an archive and, where it is a file, puts it in its place; until then it is in `stage`. Blocks.
    pub(super) fn write(&self, stage: &Path, fill: impl FnOnce(&mut Tar) -> Result<(), Error>) -> Result<(), Error> {
        let to_stream = |file: File, name: String| {
            let mut tar = Tar { file, name };
            fill(&mut tar)?;
            tar.finish()
        };
        match self {
            Self::StandardOutput => {
                let name = "standard output";
                let file = std::io::stdout().as_fd().try_clone_to_owned();
                to_stream(file.map_err(|source| file_error(name, source))?.into(), name.to_owned())
            }
            Self::Stream(path) => {
                let file = File::options().write(true).open(path).map_err(|source| file_error(path, source))?;
                to_stream(file, path.display().to_string())
            }
            Self::File(path) => {
                let file = new_file_in(stage)?;
                let handle = file.as_file().try_clone().map_err(|source| file_error(path, source))?;
                to_stream(handle, path.display().to_string())?;
                file.as_file().sync_all().map_err(|source| file_error(path, source))?;
                file.persist(path).map_err(|error| file_error(path, error.error))?;
                sync_directory(parent(path))
            }
        }
    }
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A tar that is being written: no times, no owners, so that its bytes depend on what is in it alone.
pub(super) struct Tar {
    file: File,
    name: String,
}

impl Tar {
    pub(super) fn directory(&mut self, path: &str) -> Result<(), Error> {
        let path = path.as_bytes().to_vec();
        self.header(&tar::Entry { path, kind: EntryKind::Directory, permissions: 0o755, ..tar::Entry::default() })
    }

    pub(super) fn bytes(&mut self, path: &str, bytes: &[u8]) -> Result<(), Error> {
        self.begin(path, bytes.len() as u64)?;
        self.put(bytes)?;
        self.put(tar::padding(bytes.len() as u64))
    }

    /// Puts a file, from its first byte on, of which `size` bytes are expected.
    pub(super) fn file(&mut self, path: &str, content: &mut File, size: u64) -> Result<(), Error> {
        self.begin(path, size)?;
        // Between two files, the kernel copies by itself, or only notes that both are the same.
        let copied = std::io::copy(content, &mut self.file).map_err(|source| file_error(&self.name, source))?;
        if copied != size {
            let detail = format!("{path} has {copied} bytes, expected {size}");
            return Err(Error::Corrupt { what: "a staged blob".to_owned(), place: self.name.clone(), detail });
        }
        self.put(tar::padding(size))
    }

    fn begin(&mut self, path: &str, size: u64) -> Result<(), Error> {
        let path = path.as_bytes().to_vec();
        self.header(&tar::Entry { path, size, permissions: 0o644, ..tar::Entry::default() })
    }

    fn header(&mut self, entry: &tar::Entry) -> Result<(), Error> {
        let header = tar::encode_header(entry)
            .map_err(|error| Error::Invalid { what: self.name.clone(), detail: error.to_string() })?;
        self.put(&header)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(|source| file_error(&self.name, source))
    }

    fn finish(mut self) -> Result<(), Error> {
        self.put(&tar::END_OF_ARCHIVE)
    }
}

//! What a directory takes on the disk, as containerd counts it (`fs.DiskUsage`): blocks and files, each once.
//!
//! What this module must not know: snapshots.

use std::{collections::HashSet, io, os::unix::fs::MetadataExt as _, path::Path};

use crate::metadata::Usage;

/// Measures a directory and everything below it. Does not follow links. What goes away meanwhile does not count.
///
/// # Errors
/// Where the directory can't be read.
pub fn of(directory: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut open = vec![directory.to_owned()];
    while let Some(path) = open.pop() {
        let metadata = match path.symlink_metadata() {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound && path != directory => continue,
            Err(error) => return Err(error),
        };
        if metadata.nlink() > 1 && !metadata.is_dir() && !seen.insert((metadata.dev(), metadata.ino())) {
            continue;
        }
        usage.bytes += metadata.blocks() * 512;
        usage.inodes += 1;
        if metadata.is_dir() {
            match std::fs::read_dir(&path) {
                Ok(entries) => open.extend(entries.filter_map(|entry| Some(entry.ok()?.path()))),
                Err(error) if error.kind() == io::ErrorKind::NotFound && path != directory => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(usage)
}

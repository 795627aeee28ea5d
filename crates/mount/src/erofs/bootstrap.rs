//! Bootstraps of images, each written once and kept in the store.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    os::unix::{ffi::OsStrExt as _, fs::FileExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use loris_format::{
    digest::Digest,
    erofs::write_bootstrap,
    tree::{LayerNumber, OpaqueStyle, Tree},
};
use loris_lazy::{LazyLayer, Store};

use crate::MountError;

/// Stands for all that decides about a bootstrap beside the layers themselves: how layers are merged, what is shown of
/// them, and how the bootstrap is written. Where one of these changes, it must become another one.
const VERSION: &[u8] = b"loris bootstrap 1";

/// What a bootstrap shows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Form {
    /// All layers, merged: a root file system.
    Merged,
    /// One layer, as a lower directory of overlayfs.
    Layer(OpaqueStyle),
}

impl Form {
    /// Returns what is shown of `layers`, the lowest first.
    ///
    /// # Panics
    /// Where it is that of one layer, and there is not exactly one.
    pub(crate) fn tree(self, layers: &[Arc<LazyLayer>]) -> Tree {
        match (self, layers) {
            (Self::Merged, layers) => Tree::merged(&layers.iter().map(|layer| layer.index()).collect::<Vec<_>>()),
            (Self::Layer(style), [layer]) => Tree::of_layer(layer.index(), LayerNumber(0), style),
            (Self::Layer(_), layers) => panic!("the form of one layer was asked for, and there are {}", layers.len()),
        }
    }
}

/// Returns the path of a bootstrap over the data files of `layers`, the lowest first, which are its devices in this
/// order. It is written where the store has it not; nothing but its header is looked at where it has. Blocks.
///
/// # Errors
/// [`MountError::Bootstrap`] where it can't be written.
///
/// # Panics
/// Where `form` is that of one layer, and there is not exactly one.
pub fn cached_bootstrap(store: &Store, layers: &[Arc<LazyLayer>], form: Form) -> Result<PathBuf, MountError> {
    let key = key(store, layers, form);
    let path = store.bootstrap_path(&key);
    if is_whole(&path) {
        return Ok(path);
    }
    let tree = form.tree(layers);
    let devices: Vec<u64> = layers.iter().map(|layer| layer.index().data_length()).collect();
    let failed =
        |reason: &dyn std::fmt::Display| MountError::Bootstrap { path: path.clone(), reason: reason.to_string() };
    let directories = layers.iter().map(|layer| layer.directory());
    let mut file = store.begin_bootstrap(&key, directories).map_err(|error| failed(&error))?;
    let mut output = BufWriter::with_capacity(BUFFER_BYTES, file.file());
    write_bootstrap(&tree, &devices, identity(&key), &mut output).map_err(|error| failed(&error))?;
    output.flush().map_err(|error| failed(&error))?;
    drop(output);
    file.finish().map_err(|error| failed(&error))
}

/// Bytes that are written to the disk at once.
const BUFFER_BYTES: usize = 1 << 20;

/// The UUID of the file system of a bootstrap.
fn identity(key: &Digest) -> [u8; 16] {
    let bytes: &[u8] = match key {
        Digest::Sha256(bytes) => bytes,
        Digest::Sha512(bytes) => bytes,
    };
    bytes.first_chunk().copied().unwrap_or_default()
}

/// Names all that a bootstrap depends on.
fn key(store: &Store, layers: &[Arc<LazyLayer>], form: Form) -> Digest {
    let mut text = VERSION.to_vec();
    text.extend_from_slice(match form {
        Form::Merged => b"\0merged",
        Form::Layer(OpaqueStyle::Trusted) => b"\0layer, trusted",
        Form::Layer(OpaqueStyle::User) => b"\0layer, user",
        Form::Layer(OpaqueStyle::Both) => b"\0layer, both",
    });
    for layer in layers {
        // The directory names the table of contents, that is all metadata. Relative, so that a store can be moved.
        let directory = layer.directory();
        let directory = directory.strip_prefix(store.root()).unwrap_or(directory);
        text.push(0);
        text.extend_from_slice(directory.as_os_str().as_bytes());
        text.push(0);
        text.extend_from_slice(layer.layout());
    }
    Digest::sha256_of(&text)
}

/// Where the superblock stands, in bytes; and its beginning (Linux, `fs/erofs/erofs_fs.h`).
const SUPERBLOCK: u64 = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
/// Place of the block size's binary logarithm, one byte, and of the number of blocks, 32 bits.
const BLOCK_BITS_AT: usize = 12;
const BLOCKS_AT: usize = 36;

/// Whether a file is an EROFS that has not been cut short: its name says already that it is the right one.
fn is_whole(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return false };
    let mut head = [0; BLOCKS_AT + 4];
    if file.read_exact_at(&mut head, SUPERBLOCK).is_err() {
        return false;
    }
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let bytes = u64::from(word(BLOCKS_AT)).checked_shl(head[BLOCK_BITS_AT].into());
    word(0) == MAGIC && file.metadata().is_ok_and(|metadata| Some(metadata.len()) == bytes && metadata.is_file())
}

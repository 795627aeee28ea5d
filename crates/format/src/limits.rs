//! Bounds on what an image may ask of us. Every size, count and depth in an image is an attacker's.

/// The bounds that parsers keep. [`Limits::default`] is right for all images in the field, by a wide margin.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Largest table of contents, in uncompressed bytes. A layer of a million files has about 400 MiB of it.
    pub toc_bytes: u64,
    /// Most entries of one layer, chunks included.
    pub entries: usize,
    /// Longest path, in bytes. `PATH_MAX` is 4096 on Linux; an image may hold longer ones, which no program could open.
    pub path_bytes: usize,
    /// Longest name of a path's component: `NAME_MAX`.
    pub name_bytes: usize,
    /// Deepest path, in components.
    pub depth: usize,
    /// Largest file, in uncompressed bytes; also bounds what a sparse file may expand to.
    pub file_bytes: u64,
    /// Largest single frame's decoded size that is held in memory, in bytes. A frame beyond it is refused.
    pub frame_bytes: u64,
    /// Largest metadata that precedes a tar entry (PAX records, GNU long names), in bytes.
    pub tar_metadata_bytes: u64,
    /// Largest total size of one node's extended attributes, in bytes. Linux allows 64 KiB a value.
    pub xattr_bytes: usize,
    /// Largest manifest or index, in bytes. The distribution specification asks registries to take 4 MiB.
    pub manifest_bytes: u64,
    /// Largest image configuration, in bytes.
    pub config_bytes: u64,
    /// Most layers of one image.
    pub layers: usize,
    /// Deepest nesting of indexes.
    pub index_depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            toc_bytes: 1 << 30,
            entries: 8_000_000,
            path_bytes: 16 << 10,
            name_bytes: 255,
            depth: 1024,
            file_bytes: 1 << 40,
            frame_bytes: 256 << 20,
            tar_metadata_bytes: 8 << 20,
            xattr_bytes: 1 << 20,
            manifest_bytes: 4 << 20,
            config_bytes: 16 << 20,
            layers: 4096,
            index_depth: 4,
        }
    }
}

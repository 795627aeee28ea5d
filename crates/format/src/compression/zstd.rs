//! Zstd: what the decoders share, and frames made of whole buffers.

use zstd_safe::{CCtx, CParameter, DCtx, DParameter, zstd_sys::ZSTD_ErrorCode};

use super::Error;

/// The largest window a frame may ask for, as a power of two: 128 MiB, the default of zstd's own decoder. The format
/// allows up to 2 GiB (31) in the library and more in the standard; decoders refuse those unless they are told not to.
pub(super) const WINDOW_LOG_MAX: u32 = 27;

const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// Says whether a frame, or a skippable frame (whose first byte is 0x50 to 0x5f), begins so.
pub(super) fn is_magic(start: &[u8]) -> bool {
    start.starts_with(&MAGIC) || matches!(start, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// Returns a context that refuses large windows.
pub(crate) fn decoder() -> DCtx<'static> {
    let mut context = DCtx::create();
    // It can only fail in the middle of a frame or out of the range of 10 to 31; it is the default, too.
    let _ = context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX));
    context
}

/// Makes an error of zstd's code.
pub(crate) fn error(code: zstd_safe::ErrorCode, offset: u64) -> Error {
    if zstd_safe::is_error_kind(code, ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge) {
        return Error::Window { offset, window_log_max: WINDOW_LOG_MAX };
    }
    Error::Corrupt { compression: "zstd", offset, problem: zstd_safe::get_error_name(code) }
}

/// Compresses buffers into zstd frames, one after another, with one working memory. The same input gives the same bytes.
///
/// Frames state their decoded size and have no checksum: every extent in them has a digest.
pub struct ZstdCompressor {
    context: CCtx<'static>,
}

impl ZstdCompressor {
    /// Takes a level of zstd's scale, 1 to 22 or negative; one out of range is the nearest in it.
    #[must_use]
    pub fn new(level: i32) -> Self {
        let mut context = CCtx::create();
        let level = level.clamp(zstd_safe::min_c_level(), zstd_safe::max_c_level());
        // It can only fail for a level out of range.
        let _ = context.set_parameter(CParameter::CompressionLevel(level));
        Self { context }
    }

    /// Returns `data` as one frame.
    ///
    /// # Panics
    /// Where memory runs out.
    #[must_use]
    pub fn compress(&mut self, data: &[u8]) -> Vec<u8> {
        let mut frame = Vec::with_capacity(zstd_safe::compress_bound(data.len()));
        if let Err(code) = self.context.compress2(&mut frame, data) {
            // The buffer has the size that never is too small, which leaves lack of memory.
            panic!("zstd cannot compress: {}", zstd_safe::get_error_name(code));
        }
        frame
    }
}

impl std::fmt::Debug for ZstdCompressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ZstdCompressor").finish_non_exhaustive()
    }
}

/// Returns `data` as one zstd frame. For more than one, a [`ZstdCompressor`] saves the working memory.
#[must_use]
pub fn zstd_frame(level: i32, data: &[u8]) -> Vec<u8> {
    ZstdCompressor::new(level).compress(data)
}

//! `convert`: any image into a lazily pullable one. Flags are nerdctl's.

use std::{
    io::BufReader,
    num::NonZeroUsize,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use clap::Args;
use loris_convert::{
    image::{ConvertOptions, Target, convert_image},
    layer::{Dialect, Format, LayerOptions, MAX_CHUNK_BYTES},
    record::Record,
    soci::{SociOptions, Version, convert_soci},
};
use loris_format::{
    compression::GzipLevel,
    limits::Limits,
    soci::{MIN_LAYER_BYTES, SPAN_BYTES},
};
use loris_oci::ImageSource;

use crate::{
    Global,
    access::{self, Selection},
    failure::{self, Outcome, Usage},
    progress::Bars,
};

/// Convert an image into a lazily pullable one.
///
/// All platforms are converted unless some are chosen. Without a format, eStargz is made.
#[derive(Args)]
pub(crate) struct ConvertArguments {
    /// The image: a registry's `name:tag`, `oci:DIR[:TAG]`, `oci-archive:FILE`, `docker-archive:FILE`, or `-`
    source: String,
    /// The new image's name
    destination: String,
    /// Make eStargz layers
    #[arg(long, conflicts_with_all = ["uncompress", "zstdchunked"])]
    estargz: bool,
    /// Make zstd:chunked layers, with OCI's media types
    #[arg(long, conflicts_with = "uncompress")]
    zstdchunked: bool,
    /// Strength of compression on zstd's scale, 1 to 22
    #[arg(long, default_value_t = 3, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=22))]
    zstdchunked_compression_level: i32,
    /// Most uncompressed bytes of a chunk, also as in `512K` or `1MiB`; 0 for 4 MiB. Content is cut by what it is
    #[arg(long, default_value_t = 0, value_name = "BYTES", value_parser = byte_count)]
    zstdchunked_chunk_size: u64,
    /// Files that a workload reads, as `ctr-remote` records them: they come first in their layers
    #[arg(long, value_name = "FILE", conflicts_with = "estargz_record_in")]
    zstdchunked_record_in: Option<PathBuf>,
    /// Who trusts the layers lazily, beside Loris: Podman and its kin, or stargz-snapshotter. The bytes serve both, the
    /// annotations can't
    #[arg(long, value_enum, default_value_t = Reader::Containers, value_name = "READER")]
    zstdchunked_dialect: Reader,
    /// Strength of compression on zlib's scale: 0 to 9, or -1 for its default
    #[arg(long, default_value_t = 9, value_name = "LEVEL", allow_negative_numbers = true)]
    estargz_compression_level: i32,
    /// Uncompressed bytes of a chunk, also as in `512K` or `1MiB`; 0 for the usual 4 MiB
    #[arg(long, default_value_t = 0, value_name = "BYTES", value_parser = byte_count)]
    estargz_chunk_size: u64,
    /// Put several files or chunks into one gzip member while that has fewer uncompressed bytes: smaller layers, which
    /// readers before stargz-snapshotter 0.13 misread
    #[arg(long, default_value_t = 0, value_name = "BYTES", value_parser = byte_count)]
    estargz_min_chunk_size: u64,
    /// Files that a workload reads, as `ctr-remote` records them: they come first in their layers
    #[arg(long, value_name = "FILE")]
    estargz_record_in: Option<PathBuf>,
    /// Turn Docker's media types into OCI's; alone, changes media types only, and makes nothing lazy
    #[arg(long)]
    oci: bool,
    /// Leave layers as they are and make an index beside them (SOCI)
    #[arg(long, conflicts_with_all = ["estargz", "uncompress", "oci", "estargz_record_in"])]
    soci: bool,
    /// 2: new manifests name their index, as `soci convert` makes them. 1: the image stays as it is, and the index is a
    /// referrer, as `soci create` and `soci push` make it
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=2))]
    soci_version: u8,
    /// Uncompressed bytes between two places of a layer where reading can begin
    #[arg(long, value_name = "BYTES", value_parser = byte_count, default_value_t = SPAN_BYTES)]
    soci_span_size: u64,
    /// Make no index of smaller layers
    #[arg(long, value_name = "BYTES", value_parser = byte_count, default_value_t = MIN_LAYER_BYTES)]
    soci_min_layer_size: u64,
    /// Make uncompressed layers
    #[arg(long)]
    uncompress: bool,
    /// Threads that compress; all processors where it is not given. The output is the same
    #[arg(long, value_name = "COUNT")]
    threads: Option<NonZeroUsize>,
    /// Leave out what refers to the image (signatures, indexes)
    #[arg(long)]
    no_referrers: bool,
    #[command(flatten)]
    selection: Selection,
}

/// Readers of zstd:chunked.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Reader {
    /// Podman, Buildah, Skopeo, CRI-O
    Containers,
    /// stargz-snapshotter
    Stargz,
}

/// What `loris convert` does without flags.
pub(crate) fn defaults() -> ConvertOptions {
    ConvertOptions { target: Target::Lazy(LayerOptions::default()), ..ConvertOptions::default() }
}

impl ConvertArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        let source = global.access.source(&self.source).await?;
        if self.soci {
            return self.with_index(global, &*source).await;
        }
        let options = self.options()?;
        let sink = global.access.sink(&self.destination).await?;
        let bars = Bars::new(global);
        let report = convert_image(&*source, &*sink, &options, &bars)
            .await
            .with_context(|| access::doing("converting", &self.source))?;
        bars.finish();
        access::print_written(global, &self.destination, &report.digest, &report)?;
        Ok(Outcome::Done)
    }

    async fn with_index(&self, global: &Global, source: &dyn ImageSource) -> failure::Result {
        let options = SociOptions {
            version: if self.soci_version == 1 { Version::One } else { Version::Two },
            span_bytes: self.soci_span_size,
            min_layer_bytes: self.soci_min_layer_size,
            platforms: self.selection.platforms(),
            ..SociOptions::default()
        };
        let sink = global.access.sink(&self.destination).await?;
        let bars = Bars::new(global);
        let report = convert_soci(source, &*sink, &options, &bars)
            .await
            .with_context(|| access::doing("converting", &self.source))?;
        bars.finish();
        access::print_written(global, &self.destination, &report.digest, &report)?;
        Ok(Outcome::Done)
    }

    fn options(&self) -> anyhow::Result<ConvertOptions> {
        let (flag, asked) = match self.zstdchunked {
            true => ("--zstdchunked-chunk-size", self.zstdchunked_chunk_size),
            false => ("--estargz-chunk-size", self.estargz_chunk_size),
        };
        let chunk_bytes = match asked {
            0 => LayerOptions::default().chunk_bytes,
            asked if asked <= MAX_CHUNK_BYTES => asked,
            asked => return Err(Usage(format!("{flag} {asked}: the largest is {MAX_CHUNK_BYTES}")).into()),
        };
        let min_member_bytes = match self.estargz_min_chunk_size {
            asked if asked <= MAX_CHUNK_BYTES => asked,
            asked => {
                return Err(Usage(format!("--estargz-min-chunk-size {asked}: the largest is {MAX_CHUNK_BYTES}")).into());
            }
        };
        let dialect = match self.zstdchunked_dialect {
            Reader::Containers => Dialect::Containers,
            Reader::Stargz => Dialect::Stargz,
        };
        let format = match self.zstdchunked {
            true => Format::ZstdChunked(self.zstdchunked_compression_level, dialect),
            false => Format::Estargz,
        };
        let level = GzipLevel::new(self.estargz_compression_level)
            .map_err(|error| Usage(format!("--estargz-compression-level: {error}")))?;
        let target = if self.uncompress {
            Target::Uncompressed
        } else if self.oci && !self.estargz && !self.zstdchunked && self.estargz_record_in.is_none() {
            // As nerdctl: `--oci` alone changes media types and nothing else.
            Target::Keep
        } else {
            Target::Lazy(LayerOptions { format, level, chunk_bytes, min_member_bytes, ..LayerOptions::default() })
        };
        let record = self
            .estargz_record_in
            .as_ref()
            .or(self.zstdchunked_record_in.as_ref())
            .map(|path| record(path))
            .transpose()?;
        Ok(ConvertOptions {
            target,
            // Docker has no type for it.
            oci: self.oci || self.zstdchunked,
            platforms: self.selection.platforms(),
            referrers: !self.no_referrers,
            record,
            threads: self.threads,
            ..ConvertOptions::default()
        })
    }
}

/// Reads a number of bytes, in K (KiB), M (MiB) or G (GiB) where it says so: multiples of 1024, as everywhere about files.
fn byte_count(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let unit = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        _ => return Err("the units are K, M and G, of 1024".to_owned()),
    };
    let count: u64 = digits.parse().map_err(|_| "not a number of bytes".to_owned())?;
    count.checked_mul(unit).ok_or_else(|| "too large".to_owned())
}

fn record(path: &Path) -> anyhow::Result<Record> {
    let file = std::fs::File::open(path).with_context(|| path.display().to_string())?;
    Record::read(BufReader::new(file), &Limits::default()).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_bytes_have_units() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("512K", 512 << 10), ("1M", 1 << 20), ("2MiB", 2 << 20), ("3kib", 3 << 10)]
        {
            assert_eq!(byte_count(text), Ok(bytes), "{text}");
        }
        for text in ["", "M", "1MB", "-1", "1.5M", "99999999999G", "1 M"] {
            assert!(byte_count(text).is_err(), "{text}");
        }
    }
}

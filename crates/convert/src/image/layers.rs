//! The layers of an image: each that has to be converted once, side by side; the others carried along.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io,
    num::NonZeroUsize,
    path::Path,
    sync::Arc,
    thread,
};

use futures_util::{StreamExt as _, TryStreamExt as _, future, stream};
use loris_format::{
    digest::Hasher,
    estargz::{
        footer,
        toc::{TOC_DIGEST_ANNOTATION, UNCOMPRESSED_SIZE_ANNOTATION},
    },
    opening::Promise,
};
use loris_oci::document::media_type::{LayerCompression, LayerType};
use tempfile::NamedTempFile;
use tokio::sync::Semaphore;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::{
    ConvertOptions, Descriptor, DiffId, Digest, Error, ImageNode, LayerChange, LayerOptions, LayerReport, Node, Target,
    Warnings, edit,
};
use crate::{
    carry::{Carrier, counted, watched},
    layer::{self, Dialect, Format, Watch, Workers, convert_layer},
    progress::{Action, Outcome},
};

/// The annotation by which a layer of our own is recognised: what wrote it, and with which options.
///
/// `estargz/1 level=9 chunk=4194304 order=none`, with the digest of the list of files in place of `none` where there was
/// one. It vouches for nothing: a layer that has it without being ours is passed on as it is, as any copy is.
pub const WRITER_ANNOTATION: &str = "dev.loris.layer.writer";

/// Raised when the same layer and options come to give other bytes: another order, other members, another compressor.
const REVISION: u32 = 1;

/// Annotations that tell of a layer's old bytes.
const STALE_ANNOTATIONS: [&str; 8] = [
    TOC_DIGEST_ANNOTATION,
    UNCOMPRESSED_SIZE_ANNOTATION,
    WRITER_ANNOTATION,
    "io.containers.zstd-chunked.manifest-checksum",
    "io.containers.zstd-chunked.manifest-position",
    "io.github.containers.zstd-chunked.manifest-checksum",
    "io.github.containers.zstd-chunked.manifest-position",
    "io.github.containers.zstd-chunked.tarsplit-position",
];

/// Blobs that are carried along at the same time.
const CARRIED_AT_ONCE: usize = 4;

/// A layer that was converted.
#[derive(Clone)]
struct MadeLayer {
    digest: Digest,
    size: u64,
    diff_id: DiffId,
    source_diff_id: DiffId,
    compression: LayerCompression,
    annotations: Vec<(String, Option<String>)>,
    toc_digest: Option<Digest>,
    missing: usize,
    dangling: usize,
}

/// What is to be done with a layer of an image.
enum Plan {
    Keep(LayerChange),
    /// The number of the job.
    Convert(usize),
}

struct Job {
    descriptor: Descriptor,
    prioritised: Vec<Vec<u8>>,
}

/// What became of all layers.
pub(super) struct MadeLayers {
    /// By manifest, then by layer.
    plans: HashMap<Digest, Vec<Plan>>,
    made: Vec<MadeLayer>,
    oci: bool,
}

/// Converts what has to be, carries what has not.
pub(super) async fn convert_all(
    root: &Node,
    carrier: &Carrier<'_>,
    options: &ConvertOptions,
    warnings: &mut Warnings<'_>,
) -> Result<MadeLayers, Error> {
    let mut plans = HashMap::new();
    let mut jobs: Vec<Job> = Vec::new();
    let mut known: BTreeMap<(Digest, Vec<Vec<u8>>), usize> = BTreeMap::new();
    let mut kept = Vec::new();
    let images = root.images();
    let recorded =
        images.iter().any(|image| options.record.as_ref().is_some_and(|it| it.knows(&image.document.digest)));
    for image in &images {
        let mut layers = Vec::with_capacity(image.manifest.layers.len());
        for (index, descriptor) in image.manifest.layers.iter().enumerate() {
            let prioritised = prioritised(options, image, index, recorded);
            let plan = match keep(carrier, options, descriptor, &prioritised).await? {
                Some(change) => {
                    kept.push(descriptor);
                    if change == LayerChange::Unknown {
                        let (digest, media_type) = (descriptor.digest, &descriptor.media_type);
                        warnings
                            .add(format!("layer {digest} is of the unknown type {media_type:?} and was left as it is"));
                    }
                    Plan::Keep(change)
                }
                None => {
                    let job = *known.entry((descriptor.digest, prioritised)).or_insert_with_key(|(_, prioritised)| {
                        jobs.push(Job { descriptor: descriptor.clone(), prioritised: prioritised.clone() });
                        jobs.len() - 1
                    });
                    Plan::Convert(job)
                }
            };
            layers.push(plan);
        }
        if matches!(options.target, Target::Lazy(_))
            && !options.oci
            && image.document.media_type != edit::oci_type(&image.document.media_type)
        {
            warnings.add(
                "Docker's media types are kept: tools that drop annotations from such manifests make the image \
                 pullable in full only; `--estargz --oci` avoids that"
                    .to_owned(),
            );
        }
        if matches!(options.target, Target::Keep) && options.oci && !crate::survey::is_lazy(image) {
            warnings.add(
                "layers stay as they are, so the image is not lazily pullable; `--estargz --oci` makes it so"
                    .to_owned(),
            );
        }
        plans.insert(image.document.digest, layers);
    }
    let copies: Vec<_> = kept.into_iter().map(|layer| carrier.blob(layer)).collect();
    let carry = stream::iter(copies).buffer_unordered(CARRIED_AT_ONCE);
    let (made, ()) = future::try_join(convert_jobs(&jobs, carrier, options), carry.try_collect()).await?;
    for (job, layer) in jobs.iter().zip(&made) {
        if layer.dangling > 0 {
            let (digest, count) = (job.descriptor.digest, layer.dangling);
            warnings.add(format!(
                "layer {digest} has {count} hard links to files that it does not have: it can't be mounted lazily"
            ));
        }
    }
    let made = MadeLayers { plans, made, oci: options.oci };
    for image in images {
        made.check_source(image)?;
    }
    Ok(made)
}

fn prioritised(options: &ConvertOptions, image: &ImageNode, index: usize, recorded: bool) -> Vec<Vec<u8>> {
    let Target::Lazy(layer) = &options.target else { return Vec::new() };
    match &options.record {
        None => layer.prioritised.clone(),
        Some(record) if recorded => record.layer(&image.document.digest, index),
        Some(record) => record.all(),
    }
}

/// Says whether a layer is taken along as it is, and why.
async fn keep(
    carrier: &Carrier<'_>,
    options: &ConvertOptions,
    descriptor: &Descriptor,
    prioritised: &[Vec<u8>],
) -> Result<Option<LayerChange>, Error> {
    let Some(layer) = LayerType::parse(&descriptor.media_type) else { return Ok(Some(LayerChange::Unknown)) };
    if layer.foreign {
        return Ok(Some(LayerChange::Foreign));
    }
    let unchanged = match &options.target {
        Target::Keep => true,
        Target::Uncompressed => layer.compression == LayerCompression::None,
        Target::Lazy(options) => is_ours(carrier, descriptor, options, prioritised).await?,
    };
    Ok(unchanged.then_some(LayerChange::Unchanged))
}

fn writer(options: &LayerOptions, prioritised: &[Vec<u8>]) -> String {
    let mut hasher = Hasher::sha256();
    for name in prioritised {
        hasher.update(name);
        hasher.update(&[0]);
    }
    let order = if prioritised.is_empty() { "none".to_owned() } else { hasher.finish().to_string() };
    let chunk = options.chunk_bytes;
    match options.format {
        Format::Estargz => {
            let least = options.min_member_bytes;
            let least = if least > 0 { format!(" least={least}") } else { String::new() };
            format!("estargz/{REVISION} level={} chunk={chunk}{least} order={order}", options.level.get())
        }
        Format::ZstdChunked(level, dialect) => {
            let dialect = match dialect {
                Dialect::Containers => "containers",
                Dialect::Stargz => "stargz",
            };
            format!("zstd-chunked/{REVISION} dialect={dialect} level={level} chunk={chunk} order={order}")
        }
    }
}

async fn is_ours(
    carrier: &Carrier<'_>,
    descriptor: &Descriptor,
    options: &LayerOptions,
    prioritised: &[Vec<u8>],
) -> Result<bool, Error> {
    let wanted = writer(options, prioritised);
    let Some(found) = descriptor.annotations.get(WRITER_ANNOTATION) else { return Ok(false) };
    let same = match wanted.strip_suffix("none") {
        Some(any_order) => found.starts_with(any_order),
        None => *found == wanted,
    };
    let promise = Promise::read(&descriptor.annotations).unwrap_or_default();
    let is_zstd = options.format != Format::Estargz;
    let sized = promise.toc.is_none() || descriptor.annotations.contains_key(UNCOMPRESSED_SIZE_ANNOTATION);
    if !same || promise.is_empty() || promise.zstd_chunked.is_some() != is_zstd || !sized {
        return Ok(false);
    }
    let begin = descriptor.size.saturating_sub(footer::DETECT_BYTES as u64);
    let tail = carrier.source.blob_range(descriptor, begin..descriptor.size).await?;
    let found = footer::detect(&tail, descriptor.size);
    Ok(if is_zstd { found.is_some_and(footer::Kind::is_zstd) } else { found == Some(footer::Kind::Estargz) })
}

async fn convert_jobs(jobs: &[Job], carrier: &Carrier<'_>, options: &ConvertOptions) -> Result<Vec<MadeLayer>, Error> {
    if jobs.is_empty() {
        return Ok(Vec::new());
    }
    let workers = match &options.target {
        Target::Lazy(layer) => {
            let threads =
                options.threads.unwrap_or_else(|| thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
            Some(Arc::new(Workers::start(threads, layer.piece_bytes(), options.memory_bytes).map_err(Error::Threads)?))
        }
        Target::Keep | Target::Uncompressed => None,
    };
    let converting = Semaphore::new(options.layers_at_once.get());
    // As many results wait for their upload, at most: they take space.
    let sending = Semaphore::new(options.layers_at_once.get());
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    // The largest first: what is left at the end is small.
    order.sort_by_key(|&job| std::cmp::Reverse(jobs[job].descriptor.size));
    let gates = Gates { converting: &converting, sending: &sending };
    let conversions: Vec<_> = order
        .into_iter()
        .map(|number| convert_job(number, &jobs[number], carrier, options, workers.clone(), gates))
        .collect();
    let at_once = options.layers_at_once.get().saturating_mul(2);
    let mut made: Vec<(usize, MadeLayer)> = stream::iter(conversions).buffer_unordered(at_once).try_collect().await?;
    made.sort_by_key(|(number, _)| *number);
    Ok(made.into_iter().map(|(_, layer)| layer).collect())
}

/// How many layers may be where.
#[derive(Clone, Copy)]
struct Gates<'a> {
    converting: &'a Semaphore,
    sending: &'a Semaphore,
}

async fn convert_job(
    number: usize,
    job: &Job,
    carrier: &Carrier<'_>,
    options: &ConvertOptions,
    workers: Option<Arc<Workers>>,
    gates: Gates<'_>,
) -> Result<(usize, MadeLayer), Error> {
    let converting = gates.converting.acquire().await.map_err(|_| Error::Stopped)?;
    let (layer, file) = convert_blob(job, carrier, options, workers).await?;
    let sending = gates.sending.acquire().await.map_err(|_| Error::Stopped)?;
    drop(converting);
    send(&layer, &file, carrier).await?;
    drop(sending);
    Ok((number, layer))
}

async fn send(layer: &MadeLayer, file: &NamedTempFile, carrier: &Carrier<'_>) -> Result<(), Error> {
    // Sinks look at digest and size only; the type is not known to be that of one image alone.
    let descriptor = Descriptor::new(String::new(), layer.digest, layer.size);
    carrier.progress.began(Action::Send, &layer.digest, layer.size);
    let outcome = if carrier.sink.has_blob(&descriptor).await? {
        Outcome::Present
    } else {
        carrier.sink.put_blob_file(&descriptor, file.path()).await?;
        Outcome::Done
    };
    carrier.progress.ended(Action::Send, &layer.digest, outcome);
    Ok(())
}

/// Stops a conversion whose result nobody waits for any more.
struct StopOnDrop(Arc<Watch>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

async fn convert_blob(
    job: &Job,
    carrier: &Carrier<'_>,
    options: &ConvertOptions,
    workers: Option<Arc<Workers>>,
) -> Result<(MadeLayer, NamedTempFile), Error> {
    let (digest, size) = (job.descriptor.digest, job.descriptor.size);
    carrier.progress.began(Action::Convert, &digest, size);
    let (content, counter) = counted(carrier.source.blob(&job.descriptor).await?);
    let input = SyncIoBridge::new(StreamReader::new(content.map_err(io::Error::other)));
    let directory = options.work_directory.clone();
    let disk = |path: &Path, source| Error::File { path: path.display().to_string(), source };
    let file = NamedTempFile::new_in(&directory).map_err(|source| disk(&directory, source))?;
    let sink = file.reopen().map_err(|source| disk(file.path(), source))?;
    let watch = Arc::new(Watch::default());
    let _stop = StopOnDrop(Arc::clone(&watch));
    let target = match &options.target {
        Target::Lazy(layer) => Some(LayerOptions {
            prioritised: job.prioritised.clone(),
            allow_missing: layer.allow_missing || options.record.is_some(),
            ..layer.clone()
        }),
        Target::Keep | Target::Uncompressed => None,
    };
    let work = tokio::task::spawn_blocking(move || match (target, workers) {
        (Some(options), Some(workers)) => lazy(input, &options, &workers, &watch, &directory, sink),
        _ => uncompressed(input, &watch, sink),
    });
    let told = |bytes| carrier.progress.advanced(Action::Convert, &digest, bytes);
    let made = match watched(work, &counter, told).await {
        Ok(made) => made.map_err(|source| Error::Layer { digest, source })?,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => return Err(Error::Stopped),
    };
    carrier.progress.ended(Action::Convert, &digest, Outcome::Done);
    Ok((made, file))
}

fn lazy(
    input: impl io::Read + Send,
    options: &LayerOptions,
    workers: &Workers,
    watch: &Watch,
    directory: &Path,
    sink: File,
) -> Result<MadeLayer, layer::Error> {
    let layer = convert_layer(input, options, workers, watch, directory, sink)?;
    let mut annotations: Vec<(String, Option<String>)> =
        STALE_ANNOTATIONS.iter().map(|key| ((*key).to_owned(), None)).collect();
    let writer = (WRITER_ANNOTATION.to_owned(), writer(options, &options.prioritised));
    for (key, value) in layer.annotations().into_iter().chain([writer]) {
        annotations.retain(|(stale, _)| *stale != key);
        annotations.push((key, Some(value)));
    }
    Ok(MadeLayer {
        digest: layer.blob_digest,
        size: layer.blob_size,
        diff_id: layer.diff_id,
        source_diff_id: layer.source_diff_id,
        compression: match options.format {
            Format::Estargz => LayerCompression::Gzip,
            Format::ZstdChunked(..) => LayerCompression::Zstd,
        },
        annotations,
        toc_digest: Some(layer.toc_digest),
        missing: layer.missing.len(),
        dangling: layer.dangling_links.len(),
    })
}

fn uncompressed(input: impl io::Read, watch: &Watch, sink: File) -> Result<MadeLayer, layer::Error> {
    let (digest, size) = layer::decompress_layer(input, watch, sink)?;
    Ok(MadeLayer {
        digest,
        size,
        diff_id: DiffId(digest),
        source_diff_id: DiffId(digest),
        compression: LayerCompression::None,
        annotations: STALE_ANNOTATIONS.iter().map(|key| ((*key).to_owned(), None)).collect(),
        toc_digest: None,
        missing: 0,
        dangling: 0,
    })
}

impl MadeLayers {
    fn made(&self, manifest: &Digest, index: usize) -> Option<&MadeLayer> {
        match self.plans.get(manifest)?.get(index)? {
            Plan::Convert(job) => self.made.get(*job),
            Plan::Keep(_) => None,
        }
    }

    /// Compares what was read with what the configuration says.
    fn check_source(&self, image: &ImageNode) -> Result<(), Error> {
        for (index, (layer, expected)) in image.manifest.layers.iter().zip(&image.config.diff_ids).enumerate() {
            let Some(made) = self.made(&image.document.digest, index) else { continue };
            // One of another algorithm can't be compared; the blob's digest was checked.
            let comparable = made.source_diff_id.0.algorithm() == expected.0.algorithm();
            if comparable && made.source_diff_id != *expected {
                return Err(Error::DiffId {
                    digest: layer.digest,
                    manifest: image.document.digest,
                    expected: *expected,
                    found: made.source_diff_id,
                });
            }
        }
        Ok(())
    }

    /// Returns what a layer's descriptor is to become.
    pub(super) fn target(&self, manifest: &Digest, index: usize, layer: &Descriptor) -> edit::Target {
        let mut target = match self.made(manifest, index) {
            None => edit::Target::default(),
            Some(made) => edit::Target {
                media_type: LayerType::parse(&layer.media_type)
                    .map(|old| LayerType { compression: made.compression, ..old }.as_str().to_owned()),
                content: Some((made.digest, made.size)),
                annotations: made.annotations.clone(),
            },
        };
        if self.oci {
            target.media_type = Some(edit::oci_type(target.media_type.as_ref().unwrap_or(&layer.media_type)));
        }
        target
    }

    /// Returns a layer's new DiffID, or the old one.
    pub(super) fn diff_id(&self, manifest: &Digest, index: usize, old: DiffId) -> DiffId {
        self.made(manifest, index).map_or(old, |made| made.diff_id)
    }

    pub(super) fn report(&self, manifest: &Digest, index: usize, layer: &Descriptor) -> LayerReport {
        let made = self.made(manifest, index);
        let change = match self.plans.get(manifest).and_then(|plans| plans.get(index)) {
            Some(Plan::Keep(change)) => *change,
            _ => LayerChange::Converted,
        };
        let media_type = self.target(manifest, index, layer).media_type.unwrap_or_else(|| layer.media_type.clone());
        LayerReport {
            source: layer.digest,
            source_bytes: layer.size,
            digest: made.map_or(layer.digest, |made| made.digest),
            bytes: made.map_or(layer.size, |made| made.size),
            media_type,
            change,
            toc_digest: made.and_then(|made| made.toc_digest),
            missing: made.map_or(0, |made| made.missing),
        }
    }
}

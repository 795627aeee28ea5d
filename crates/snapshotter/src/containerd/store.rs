//! The calls of containerd that this crate makes as a client, with their errors.
//!
//! What this module must not know: what images consist of, registries.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use loris_format::digest::Digest;
use loris_oci::{BlobStream, Descriptor, Error};
use tonic::{
    Code, Request, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use super::Place;
use crate::proto::{
    content::{
        AbortRequest, Info, InfoRequest, ReadContentRequest, UpdateRequest, WriteAction, WriteContentRequest,
        WriteContentResponse, content_client::ContentClient,
    },
    images::{
        CreateImageRequest, GetImageRequest, Image, ListImagesRequest, UpdateImageRequest, images_client::ImagesClient,
    },
    leases::{AddResourceRequest, CreateRequest, DeleteRequest, Resource, leases_client::LeasesClient},
    snapshots::{ListSnapshotsRequest, snapshots_client::SnapshotsClient},
    types,
};

/// Written in pieces of so many bytes: containerd takes messages of up to 16 MiB.
const PIECE_BYTES: usize = 1 << 20;
/// Largest message that is taken.
const MESSAGE_BYTES: usize = 16 << 20;
/// What becomes of a lease that nobody ends, as containerd's own clients have it.
const LEASE_LASTS: Duration = Duration::from_hours(24);
/// Between looks whether somebody else's writing of the same blob has ended.
const PAUSE: Duration = Duration::from_millis(250);
/// How often that is looked at: for ten minutes.
const LOOKS: u32 = 2400;

/// A namespace of a containerd. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Store {
    channel: Channel,
    headers: Headers,
    place: Place,
}

/// What every request says beside its message.
#[derive(Clone, Debug)]
struct Headers {
    namespace: MetadataValue<Ascii>,
    lease: Option<MetadataValue<Ascii>>,
}

impl Interceptor for Headers {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        Ok(request)
    }
}

type Calling = InterceptedService<Channel, Headers>;

impl Store {
    /// Connects.
    ///
    /// # Errors
    /// Where nobody answers, or the namespace's name can't be one.
    pub async fn connect(place: &Place) -> Result<Self, Error> {
        let invalid = |what: String| Error::Invalid { what, detail: "it must be printable ASCII".to_owned() };
        let namespace = place.namespace.parse().map_err(|_| invalid(format!("namespace {:?}", place.namespace)))?;
        // Once by hand: this error says more than the one of the first call.
        let path = place.address.display().to_string();
        let failed = |source| Error::File { path: path.clone(), source };
        drop(tokio::net::UnixStream::connect(&place.address).await.map_err(failed)?);
        let endpoint =
            Endpoint::from_shared(format!("unix://{path}")).map_err(|_| invalid(format!("socket {path:?}")))?;
        let headers = Headers { namespace, lease: None };
        Ok(Self { channel: endpoint.connect_lazy(), headers, place: place.clone() })
    }

    /// Returns which it is.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    fn calling(&self) -> Calling {
        InterceptedService::new(self.channel.clone(), self.headers.clone())
    }

    fn content(&self) -> ContentClient<Calling> {
        ContentClient::new(self.calling()).max_decoding_message_size(MESSAGE_BYTES)
    }

    fn failed(&self, call: &'static str) -> impl Fn(Status) -> Error + use<> {
        let url = format!("unix://{}", self.place.address.display());
        move |status| Error::Registry {
            method: call.to_owned(),
            url: url.clone(),
            status: None,
            detail: status.message().to_owned(),
            transient: status.code() == Code::Unavailable,
        }
    }

    /// Returns what an image's name leads to.
    ///
    /// # Errors
    /// Where containerd does not answer, or not rightly. `None` stands for a name that it does not know.
    pub async fn image(&self, name: &str) -> Result<Option<Image>, Error> {
        let request = GetImageRequest { name: name.to_owned() };
        match ImagesClient::new(self.calling()).get(request).await {
            Ok(answer) => Ok(answer.into_inner().image),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.failed("Images.Get")(status)),
        }
    }

    /// Returns all images.
    ///
    /// # Errors
    /// Where containerd does not answer, or not rightly.
    pub async fn images(&self) -> Result<Vec<Image>, Error> {
        let mut images = ImagesClient::new(self.calling()).max_decoding_message_size(MESSAGE_BYTES);
        let answer = images.list(ListImagesRequest::default()).await.map_err(self.failed("Images.List"))?;
        Ok(answer.into_inner().images)
    }

    /// Makes a name lead to a manifest or index.
    ///
    /// # Errors
    /// Where containerd does not answer, or refuses.
    pub async fn set_image(&self, name: &str, target: &Descriptor) -> Result<(), Error> {
        let target = types::Descriptor {
            media_type: target.media_type.clone(),
            digest: target.digest.to_string(),
            size: signed(target.size),
            annotations: target.annotations.clone().into_iter().collect(),
        };
        let image = Some(Image { name: name.to_owned(), labels: HashMap::new(), target: Some(target) });
        let mut images = ImagesClient::new(self.calling());
        match images.create(CreateImageRequest { image: image.clone() }).await {
            Ok(_) => return Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) => return Err(self.failed("Images.Create")(status)),
        }
        let update_mask = Some(prost_types::FieldMask { paths: vec!["target".to_owned()] });
        let updated = images.update(UpdateImageRequest { image, update_mask }).await;
        updated.map(drop).map_err(self.failed("Images.Update"))
    }

    /// Returns what is known of a blob. `None` where it is not there.
    ///
    /// # Errors
    /// Where containerd does not answer, or not rightly.
    pub async fn info(&self, digest: &Digest) -> Result<Option<Info>, Error> {
        match self.content().info(InfoRequest { digest: digest.to_string() }).await {
            Ok(answer) => Ok(answer.into_inner().info),
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(self.failed("Content.Info")(status)),
        }
    }

    /// Returns bytes of a blob. They are not verified.
    ///
    /// # Errors
    /// Where containerd does not answer, or not rightly; the stream then ends with an error too.
    pub async fn read(&self, digest: &Digest, range: Range<u64>) -> Result<BlobStream, Error> {
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        let (offset, size) = (signed(range.start), signed(range.end - range.start));
        let request = ReadContentRequest { digest: digest.to_string(), offset, size };
        let failed = self.failed("Content.Read");
        let answer = self.content().read(request).await.map_err(&failed)?;
        Ok(answer.into_inner().map(move |part| part.map(|part| part.data.into()).map_err(&failed)).boxed())
    }

    /// Adds labels to a blob.
    ///
    /// # Errors
    /// Where containerd does not answer, or refuses.
    pub async fn label(&self, digest: &Digest, labels: BTreeMap<String, String>) -> Result<(), Error> {
        if labels.is_empty() {
            return Ok(());
        }
        let paths = labels.keys().map(|name| format!("labels.{name}")).collect();
        let info = Info { digest: digest.to_string(), size: 0, labels: labels.into_iter().collect() };
        let request = UpdateRequest { info: Some(info), update_mask: Some(prost_types::FieldMask { paths }) };
        self.content().update(request).await.map(drop).map_err(self.failed("Content.Update"))
    }

    /// Returns the references by which snapshots of a layer were asked for.
    pub async fn references(&self, snapshotter: &str, filters: Vec<String>, labels: &[&str]) -> Vec<String> {
        let request = ListSnapshotsRequest { snapshotter: snapshotter.to_owned(), filters };
        let mut snapshots = SnapshotsClient::new(self.calling()).max_decoding_message_size(MESSAGE_BYTES);
        // Perhaps containerd has no such snapshotter.
        let Ok(answer) = snapshots.list(request).await else { return Vec::new() };
        let mut answer = answer.into_inner();
        let mut found = Vec::new();
        while let Ok(Some(part)) = answer.message().await {
            for snapshot in part.info {
                found.extend(labels.iter().find_map(|label| snapshot.labels.get(*label)).cloned());
            }
        }
        found
    }

    /// Returns the same, with a lease on all that is written from now on.
    ///
    /// # Errors
    /// Where containerd does not answer, or refuses.
    pub async fn leased(&self) -> Result<Self, Error> {
        let expires = prost_types::Timestamp::from(SystemTime::now() + LEASE_LASTS).to_string();
        let id = format!("loris-{}-{:x}", std::process::id(), unique());
        let labels = [("containerd.io/gc.expire".to_owned(), expires)].into();
        let request = CreateRequest { id: id.clone(), labels };
        LeasesClient::new(self.calling()).create(request).await.map_err(self.failed("Leases.Create"))?;
        let mut leased = self.clone();
        leased.headers.lease = id.parse().ok();
        Ok(leased)
    }

    fn lease(&self) -> Option<String> {
        self.headers.lease.as_ref()?.to_str().ok().map(str::to_owned)
    }

    /// Puts a blob that is there under the lease too.
    ///
    /// # Errors
    /// Where containerd does not answer, or refuses.
    pub async fn hold(&self, digest: &Digest) -> Result<(), Error> {
        let Some(id) = self.lease() else { return Ok(()) };
        let resource = Some(Resource { id: digest.to_string(), r#type: "content".to_owned() });
        let request = AddResourceRequest { id, resource };
        let held = LeasesClient::new(self.calling()).add_resource(request).await;
        held.map(drop).map_err(self.failed("Leases.AddResource"))
    }

    /// Ends the lease.
    pub async fn end_lease(&self) {
        let Some(id) = self.lease() else { return };
        if let Err(error) = LeasesClient::new(self.calling()).delete(DeleteRequest { id, sync: false }).await {
            tracing::debug!(%error, "a lease is left to expire");
        }
    }

    /// Writes a blob, whose size and digest containerd checks. Nothing is done where it is there.
    ///
    /// # Errors
    /// Where the content ends in an error, containerd refuses, or is gone.
    pub async fn write(
        &self,
        descriptor: &Descriptor,
        content: BlobStream,
        labels: BTreeMap<String, String>,
    ) -> Result<(), Error> {
        let reference = format!("loris-{}", descriptor.digest);
        for _ in 0..LOOKS {
            match self.begin(&reference, descriptor).await {
                Ok(mut writing) => {
                    let written = writing.all(descriptor, content, labels).await;
                    if written.is_err() {
                        drop(writing);
                        let _ = self.content().abort(AbortRequest { r#ref: reference }).await;
                    }
                    return written;
                }
                Err(status) if status.code() == Code::AlreadyExists => return Ok(()),
                // Somebody else is writing it.
                Err(status) if is_locked(&status) => tokio::time::sleep(PAUSE).await,
                Err(status) => return Err(self.failed("Content.Write")(status)),
            }
        }
        let locked = Status::unavailable("another process has been writing the same blob for ten minutes");
        Err(self.failed("Content.Write")(locked))
    }

    async fn begin(&self, reference: &str, descriptor: &Descriptor) -> Result<Writing, Status> {
        let (requests, receiver) = tokio::sync::mpsc::channel(1);
        let requested = stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
        let first = WriteContentRequest {
            action: WriteAction::Stat.into(),
            r#ref: reference.to_owned(),
            total: signed(descriptor.size),
            expected: descriptor.digest.to_string(),
            ..WriteContentRequest::default()
        };
        // There is room for one.
        let _ = requests.send(first).await;
        let answers = self.content().write(requested).await?.into_inner();
        let mut writing = Writing { requests, answers, failed: Box::new(self.failed("Content.Write")) };
        writing.answer().await?;
        Ok(writing)
    }
}

/// A blob that is being written.
struct Writing {
    requests: tokio::sync::mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
    failed: Box<dyn Fn(Status) -> Error + Send + Sync>,
}

impl Writing {
    async fn answer(&mut self) -> Result<WriteContentResponse, Status> {
        self.answers.message().await?.ok_or_else(|| Status::unavailable("the connection ended in the middle of a blob"))
    }

    /// Writes everything, from the first byte: what an earlier attempt has left is overwritten.
    async fn all(
        &mut self,
        descriptor: &Descriptor,
        mut content: BlobStream,
        labels: BTreeMap<String, String>,
    ) -> Result<(), Error> {
        let (mut offset, mut waiting) = (0, BytesMut::new());
        while let Some(piece) = content.next().await {
            waiting.extend_from_slice(&piece?);
            while waiting.len() >= PIECE_BYTES {
                let piece = waiting.split_to(PIECE_BYTES).freeze();
                offset = self.piece(offset, &piece).await?;
            }
        }
        if !waiting.is_empty() {
            offset = self.piece(offset, &waiting.freeze()).await?;
        }
        let commit = WriteContentRequest {
            action: WriteAction::Commit.into(),
            total: signed(descriptor.size),
            expected: descriptor.digest.to_string(),
            offset,
            labels: labels.into_iter().collect(),
            ..WriteContentRequest::default()
        };
        match self.ask(commit).await {
            Err(status) if status.code() == Code::AlreadyExists => Ok(()),
            answer => answer.map(drop).map_err(|status| (self.failed)(status)),
        }
    }

    async fn piece(&mut self, offset: i64, piece: &Bytes) -> Result<i64, Error> {
        let request = WriteContentRequest {
            action: WriteAction::Write.into(),
            offset,
            data: piece.to_vec(),
            ..WriteContentRequest::default()
        };
        let answer = self.ask(request).await.map_err(|status| (self.failed)(status))?;
        Ok(answer.offset)
    }

    async fn ask(&mut self, request: WriteContentRequest) -> Result<WriteContentResponse, Status> {
        // Where nobody takes it, the answer says why.
        let _ = self.requests.send(request).await;
        self.answer().await
    }
}

fn is_locked(status: &Status) -> bool {
    status.code() == Code::Unavailable && status.message().contains("locked")
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// Returns another number each time, in all processes that may run here.
fn unique() -> u128 {
    static COUNT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    now.as_nanos() << 8 | u128::from(count & 0xff)
}

//! The snapshots service: requests into calls, errors into the codes that containerd understands.
//!
//! What this module must not know: what a call does.

use std::{pin::Pin, time::Instant};

use futures_util::{Stream, stream};
use tonic::{Code, Request, Response, Status};

use crate::{
    content::Content,
    filter::Filters,
    metadata::{Kind, Labels, MetadataError, Snapshot, Time},
    metrics::Metrics,
    mounting::Mount,
    proto::{
        snapshots::{
            self as wire, CleanupRequest, CommitSnapshotRequest, ListSnapshotsRequest, ListSnapshotsResponse,
            MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest,
            StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest,
            UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse, snapshots_server,
        },
        types,
    },
    snapshots::{Prepared, SnapshotError, Snapshots},
};

/// Most snapshots in a message, as containerd's own service has it.
const LISTED: usize = 100;

/// The service.
#[derive(Clone)]
pub(crate) struct Service {
    snapshots: Snapshots,
    content: Content,
}

impl Service {
    pub(crate) fn new(snapshots: Snapshots, content: Content) -> Self {
        Self { snapshots, content }
    }
}

type Answer<T> = Result<Response<T>, Status>;

/// A call that is being answered, and is counted when it was.
struct Counting<'a> {
    metrics: &'a Metrics,
    call: &'static str,
    began: Instant,
    result: &'static str,
}

impl Service {
    fn count(&self, call: &'static str) -> Counting<'_> {
        Counting { metrics: self.snapshots.metrics(), call, began: Instant::now(), result: "error" }
    }
}

impl Counting<'_> {
    fn went_well(mut self) {
        self.result = "ok";
    }

    fn fine<T>(self, answer: T) -> Answer<T> {
        self.went_well();
        Ok(Response::new(answer))
    }
}

impl Drop for Counting<'_> {
    fn drop(&mut self) {
        self.metrics.called(self.call, self.began.elapsed(), self.result);
    }
}

#[async_trait::async_trait]
impl snapshots_server::Snapshots for Service {
    type ListStream = Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send>>;

    async fn prepare(&self, request: Request<PrepareSnapshotRequest>) -> Answer<PrepareSnapshotResponse> {
        let counting = self.count("prepare");
        let PrepareSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        match self.snapshots.prepare(&key, &parent, sorted(labels)).await.map_err(|error| status(&error))? {
            Prepared::Mounts(mounts) => counting.fine(PrepareSnapshotResponse { mounts: on_wire(mounts) }),
            // As good as an answer can be, though it goes over the wire as an error.
            Prepared::Remote => {
                counting.went_well();
                self.content.changed(&key);
                Err(Status::already_exists(format!("the target snapshot of {key} is there")))
            }
        }
    }

    async fn view(&self, request: Request<ViewSnapshotRequest>) -> Answer<ViewSnapshotResponse> {
        let counting = self.count("view");
        let ViewSnapshotRequest { key, parent, labels, .. } = request.into_inner();
        let mounts = self.snapshots.view(&key, &parent, sorted(labels)).await.map_err(|error| status(&error))?;
        counting.fine(ViewSnapshotResponse { mounts: on_wire(mounts) })
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Answer<MountsResponse> {
        let counting = self.count("mounts");
        let mounts = self.snapshots.mounts(&request.into_inner().key).await.map_err(|error| status(&error))?;
        counting.fine(MountsResponse { mounts: on_wire(mounts) })
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Answer<()> {
        let counting = self.count("commit");
        let CommitSnapshotRequest { name, key, labels, parent, .. } = request.into_inner();
        self.snapshots.commit(&name, &key, &parent, sorted(labels)).await.map_err(|error| status(&error))?;
        self.content.changed(&key);
        counting.fine(())
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Answer<()> {
        let counting = self.count("remove");
        self.snapshots.remove(&request.into_inner().key).await.map_err(|error| status(&error))?;
        counting.fine(())
    }

    async fn stat(&self, request: Request<StatSnapshotRequest>) -> Answer<StatSnapshotResponse> {
        let counting = self.count("stat");
        let snapshot = self.snapshots.stat(&request.into_inner().key).await.map_err(|error| status(&error))?;
        counting.fine(StatSnapshotResponse { info: Some(info(snapshot)) })
    }

    async fn update(&self, request: Request<UpdateSnapshotRequest>) -> Answer<UpdateSnapshotResponse> {
        let counting = self.count("update");
        let UpdateSnapshotRequest { info: wanted, update_mask, .. } = request.into_inner();
        let wanted = wanted.ok_or_else(|| Status::invalid_argument("nothing is said of the snapshot"))?;
        let paths = update_mask.unwrap_or_default().paths;
        let snapshot = self.snapshots.update(&wanted.name, sorted(wanted.labels), paths).await;
        counting.fine(UpdateSnapshotResponse { info: Some(info(snapshot.map_err(|error| status(&error))?)) })
    }

    async fn list(&self, request: Request<ListSnapshotsRequest>) -> Answer<Self::ListStream> {
        let counting = self.count("list");
        let filters = Filters::parse(&request.into_inner().filters);
        let filters = filters.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let listed = self.snapshots.list(move |snapshot| filters.match_snapshot(snapshot)).await;
        let mut infos: Vec<wire::Info> = listed.map_err(|error| status(&error))?.into_iter().map(info).collect();
        let mut parts = Vec::new();
        while !infos.is_empty() {
            let rest = infos.split_off(infos.len().min(LISTED));
            parts.push(Ok(ListSnapshotsResponse { info: std::mem::replace(&mut infos, rest) }));
        }
        counting.fine(Box::pin(stream::iter(parts)))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Answer<UsageResponse> {
        let counting = self.count("usage");
        let usage = self.snapshots.usage(&request.into_inner().key).await.map_err(|error| status(&error))?;
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        counting.fine(UsageResponse { size: signed(usage.bytes), inodes: signed(usage.inodes) })
    }

    async fn cleanup(&self, _request: Request<CleanupRequest>) -> Answer<()> {
        let counting = self.count("cleanup");
        self.snapshots.cleanup().await.map_err(|error| status(&error))?;
        counting.fine(())
    }
}

fn sorted(labels: std::collections::HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

fn on_wire(mounts: Vec<Mount>) -> Vec<types::Mount> {
    let on_wire = |mount: Mount| types::Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    };
    mounts.into_iter().map(on_wire).collect()
}

fn info(snapshot: Snapshot) -> wire::Info {
    let time = |time: Time| Some(prost_types::Timestamp { seconds: time.seconds, nanos: time.nanos });
    let kind = match snapshot.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: snapshot.name,
        parent: snapshot.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: time(snapshot.created),
        updated_at: time(snapshot.updated),
        labels: snapshot.labels.into_iter().collect(),
    }
}

/// The codes of containerd's `errgrpc.ToGRPC`.
fn status(error: &SnapshotError) -> Status {
    let code = match error {
        SnapshotError::Metadata(MetadataError::NotFound(_)) => Code::NotFound,
        SnapshotError::Metadata(MetadataError::AlreadyExists(_)) => Code::AlreadyExists,
        SnapshotError::Metadata(MetadataError::Invalid(_)) => Code::InvalidArgument,
        SnapshotError::Metadata(MetadataError::WrongState(_)) => Code::FailedPrecondition,
        // containerd takes the image as gone then, and pulls it anew.
        SnapshotError::Layer { .. } | SnapshotError::Stopping => Code::Unavailable,
        _ => Code::Unknown,
    };
    if matches!(code, Code::Unavailable | Code::Unknown) {
        tracing::warn!(%error, "a request failed");
    }
    Status::new(code, error.to_string())
}

//! An image source in memory that counts, waits and lies as it is told.

use std::{
    collections::HashMap,
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use bytes::Bytes;
use loris_format::digest::Digest;
use loris_oci::{BlobStream, Descriptor, Document, Error, ImageSource};
use tokio::sync::watch;

type Fault = Box<dyn Fn(Range<u64>, Bytes) -> Result<Bytes, Error> + Send + Sync>;

pub struct TestSource {
    name: String,
    blobs: HashMap<Digest, Bytes>,
    requests: Mutex<Vec<(Digest, Range<u64>)>>,
    fault: Mutex<Option<Fault>>,
    open: watch::Sender<bool>,
    withheld: watch::Sender<Range<u64>>,
    breaks_at: Mutex<Option<u64>>,
    waiting: AtomicUsize,
    /// Answers of somebody else, once this one is distrusted.
    other: Mutex<Option<Bytes>>,
    distrusted: AtomicBool,
}

impl TestSource {
    pub fn new(blobs: impl IntoIterator<Item = Bytes>) -> Self {
        Self {
            name: "memory".to_owned(),
            blobs: blobs.into_iter().map(|bytes| (Digest::sha256_of(&bytes), bytes)).collect(),
            requests: Mutex::default(),
            fault: Mutex::default(),
            open: watch::channel(true).0,
            withheld: watch::channel(0..0).0,
            breaks_at: Mutex::default(),
            waiting: AtomicUsize::new(0),
            other: Mutex::default(),
            distrusted: AtomicBool::new(false),
        }
    }

    /// Lies: has `bytes` under a digest that is not theirs.
    pub fn lying(digest: Digest, bytes: Bytes) -> Self {
        Self { blobs: HashMap::from([(digest, bytes)]), ..Self::new([]) }
    }

    pub fn named(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Has somebody else to ask, who has these bytes under each digest.
    pub fn or_else(self, bytes: Bytes) -> Self {
        *self.other.lock().unwrap() = Some(bytes);
        self
    }

    /// Ranges asked for since the last call.
    pub fn take_requests(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut *self.requests.lock().unwrap()).into_iter().map(|(_, range)| range).collect()
    }

    /// What happens to every answer from now on.
    pub fn fault(&self, fault: impl Fn(Range<u64>, Bytes) -> Result<Bytes, Error> + Send + Sync + 'static) {
        *self.faults() = Some(Box::new(fault));
    }

    pub fn fail(&self) {
        self.fault(|_, _| Err(unreachable_registry()));
    }

    pub fn heal(&self) {
        *self.faults() = None;
    }

    /// A fault may panic: that is no fault of the lock's.
    fn faults(&self) -> MutexGuard<'_, Option<Fault>> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds all answers back until [`TestSource::release`].
    pub fn hold(&self) {
        self.open.send_replace(false);
    }

    pub fn release(&self) {
        self.open.send_replace(true);
    }

    /// Holds the bytes of all answers back from this offset of the blob on; [`u64::MAX`] for none.
    pub fn withhold_from(&self, offset: u64) {
        self.withhold(offset..u64::MAX);
    }

    /// Holds these bytes of the blob back, and what stands behind them in the same answer.
    pub fn withhold(&self, bytes: Range<u64>) {
        self.withheld.send_replace(bytes);
    }

    /// Breaks one answer off at this offset of the blob.
    pub fn break_at(&self, offset: u64) {
        *self.breaks_at.lock().unwrap() = Some(offset);
    }

    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Waits until so many requests are held back.
    pub async fn held(&self, count: usize) {
        crate::until("a request", || self.waiting.load(Ordering::SeqCst) >= count).await;
    }
}

pub fn unreachable_registry() -> Error {
    Error::Registry {
        method: "GET".to_owned(),
        url: "http://memory/".to_owned(),
        status: Some(503),
        detail: "out of order".to_owned(),
        transient: true,
    }
}

#[async_trait]
impl ImageSource for TestSource {
    fn name(&self) -> String {
        self.name.clone()
    }

    async fn root(&self) -> Result<Document, Error> {
        Err(Error::NotFound { what: "root".to_owned(), place: self.name() })
    }

    async fn document(&self, descriptor: &Descriptor) -> Result<Document, Error> {
        let bytes = self.blobs.get(&descriptor.digest).cloned();
        let bytes = bytes.ok_or_else(|| Error::NotFound { what: descriptor.digest.to_string(), place: self.name() })?;
        Document::verified(bytes, descriptor, &self.name())
    }

    async fn blob(&self, descriptor: &Descriptor) -> Result<BlobStream, Error> {
        let bytes = self.blob_range(descriptor, 0..descriptor.size).await?;
        let found = Digest::sha256_of(&bytes);
        if found != descriptor.digest {
            let detail = format!("its bytes have the digest {found}");
            return Err(Error::Corrupt { what: descriptor.digest.to_string(), place: self.name(), detail });
        }
        Ok(Box::pin(futures_util::stream::iter([Ok(bytes)])))
    }

    async fn blob_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        assert!(range.end <= descriptor.size && range.start <= range.end, "outside of the blob: {range:?}");
        self.requests.lock().unwrap().push((descriptor.digest, range.clone()));
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let open = self.open.subscribe().wait_for(|open| *open).await.map(|open| *open);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        assert!(open.unwrap());
        let other = self.other.lock().unwrap().clone().filter(|_| self.distrusted.load(Ordering::SeqCst));
        let bytes = other.or_else(|| self.blobs.get(&descriptor.digest).cloned());
        let bytes = bytes.ok_or_else(|| Error::NotFound { what: descriptor.digest.to_string(), place: self.name() })?;
        let part = bytes.slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap());
        match &*self.faults() {
            Some(fault) => fault(range, part),
            None => Ok(part),
        }
    }

    async fn blob_range_pieces(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Error> {
        let mut rest = self.blob_range(descriptor, range.clone()).await?;
        let mut at = range.start;
        let breaks_at = self.breaks_at.lock().unwrap().take_if(|at| range.contains(at)).unwrap_or(u64::MAX);
        while !rest.is_empty() {
            let next = self.withheld.subscribe().wait_for(|withheld| !withheld.contains(&at)).await.unwrap().start;
            let end = if next > at { next } else { u64::MAX };
            let most = usize::try_from(end.min(breaks_at) - at).unwrap_or(usize::MAX);
            let piece = rest.split_to(1000.min(rest.len()).min(most));
            at += piece.len() as u64;
            take(piece);
            if at == breaks_at {
                return Err(unreachable_registry());
            }
        }
        Ok(())
    }

    fn distrust_range(&self, _: &Descriptor, _: Range<u64>) -> bool {
        self.other.lock().unwrap().is_some() && !self.distrusted.swap(true, Ordering::SeqCst)
    }

    async fn referrers(&self, _: &Digest, _: Option<&str>) -> Result<Vec<Descriptor>, Error> {
        Ok(Vec::new())
    }
}

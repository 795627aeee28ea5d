//! Reading blobs: whole, verified and resumed; and by ranges, exact or not at all.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http::{Method, StatusCode, header};
use loris_format::digest::{Digest, Hasher};
use reqwest::Url;

use super::{
    Repository,
    connections::Lane,
    host::Host,
    request::{BlobKey, Call, Failure},
    retry::within,
    route::{Content, Trip},
    transport::Answer,
};
use crate::{
    document::Descriptor,
    link::Link,
    place::{BlobStream, Error},
};

/// Where ranges are ignored, a range that ends before this many bytes is read all the same, from the blob's beginning.
pub(super) const SHORT_PREFIX: u64 = 1 << 20;
/// A resumed download counts as going on after so many bytes: its failures are forgotten. Bounds the number of
/// connections that a server can make us open by sending one byte on each.
const PROGRESS: u64 = 1 << 20;
/// Memory that is taken for a range before its bytes arrive.
const RANGE_CAPACITY: u64 = 4 << 20;

impl Repository {
    /// Returns a blob, from its first byte. Nothing is asked before the stream is polled; see
    /// [`crate::ImageSource::blob`] for what it promises.
    ///
    /// A foreign layer that the registry does not have is read from where its descriptor says, without credentials.
    #[must_use]
    pub fn blob(&self, descriptor: &Descriptor) -> BlobStream {
        let reading = Reading {
            repository: self.clone(),
            descriptor: descriptor.clone(),
            hasher: Some(descriptor.digest.hasher()),
            offset: 0,
            discard: 0,
            answer: None,
            trip: None,
            failed_at: 0,
            foreign: None,
        };
        Box::pin(stream::try_unfold(reading, |mut reading| async move {
            Ok(reading.next().await?.map(|chunk| (chunk, reading)))
        }))
    }

    /// Returns bytes of a blob, exactly `range.end - range.start` of them, not verified.
    ///
    /// # Errors
    ///
    /// As [`Repository::blob_range_pieces`].
    pub async fn blob_range(&self, descriptor: &Descriptor, range: Range<u64>) -> Result<Bytes, Error> {
        let mut got = Collected::new(range.end.saturating_sub(range.start));
        self.blob_range_pieces(descriptor, range, &mut |piece| got.push(piece)).await?;
        Ok(got.finish())
    }

    /// Hands bytes of a blob to `take` as they arrive: in order, in pieces, exactly `range.end - range.start` of them, not
    /// verified. After a failure the rest is asked for, perhaps elsewhere; what was handed out is not handed out again.
    ///
    /// RFC 9110, section 14.2, lets a server answer a range with the whole. Near the blob's beginning that is as good: what
    /// stands before the range is passed over. Elsewhere no byte of such a body is read, and the registry is asked once
    /// more, since it may be a cache on the way that has answered so for once; likewise after a range that was not asked
    /// for.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] where the registry ignores ranges, twice in a row, and the range is not near the blob's
    /// beginning; [`Error::Corrupt`] where the answer's range or length is another than was asked for.
    pub async fn blob_range_pieces(
        &self,
        descriptor: &Descriptor,
        range: Range<u64>,
        take: &mut (dyn FnMut(Bytes) + Send),
    ) -> Result<(), Error> {
        if range.start > range.end || range.end > descriptor.size {
            let detail = format!("bytes {}..{} of {}", range.start, range.end, descriptor.size);
            return Err(Error::Invalid { what: format!("a range of {}", descriptor.digest), detail });
        }
        if range.is_empty() {
            return Ok(());
        }
        // The whole blob, or what ends near its beginning, can be had without ranges.
        let needs_ranges = range.end > SHORT_PREFIX && range != (0..descriptor.size);
        let trip = self.trip(Content::Range(&descriptor.digest, &range))?;
        within(self.client.config(), async move |deadline| {
            let mut trip = trip.until(deadline);
            let mut next = range.start;
            // Hosts that have sent something else than the range.
            let mut odd = Vec::new();
            loop {
                let host = trip.host();
                let mut reader = RangeReader { repository: self, descriptor, trip: &trip, next, take: &mut *take };
                let outcome = if needs_ranges && host.ignores_ranges() {
                    Err(RangeError::Other(self.ignores_ranges().into()))
                } else {
                    reader.read(&host, range.end, needs_ranges).await
                };
                next = reader.next;
                let (failure, again) = match outcome {
                    Ok(()) => {
                        trip.succeeded();
                        return Ok(());
                    }
                    Err(RangeError::NotTheRange(error)) => {
                        let again = !odd.contains(&trip.number());
                        odd.push(trip.number());
                        if !again && matches!(error, Error::Unsupported { .. }) {
                            host.remember_ranges_ignored();
                        }
                        (error.into(), again)
                    }
                    Err(RangeError::Other(failure)) => {
                        let again = failure.error.is_transient();
                        (failure, again)
                    }
                };
                if next == range.end {
                    // All has come but the body's end.
                    return if again { Ok(()) } else { Err(failure.error) };
                }
                trip.failed(failure, again).await?;
                tracing::debug!(digest = %descriptor.digest, "a range is asked for again");
                self.client.count_retry();
            }
        })
        .await
    }

    /// Returns what is known of the way to the host that served the newest range of this registry: after redirects, and
    /// perhaps a mirror. `None` before anything has been measured.
    #[must_use]
    pub fn link(&self) -> Option<Link> {
        self.route.link()
    }

    /// Takes note that bytes of a range proved wrong; see [`crate::ImageSource::distrust_range`].
    pub fn distrust_range(&self, descriptor: &Descriptor, range: &Range<u64>) -> bool {
        self.client.targets().forget_blob(&self.name, &descriptor.digest);
        self.route.distrust(&descriptor.digest, range, self.client.config())
    }

    /// Asks for a blob or a range of it. The answer is 200 or, only where a range was asked for, 206.
    async fn open(
        &self,
        host: &Host,
        descriptor: &Descriptor,
        wanted: &Range<u64>,
        lane: Lane,
    ) -> Result<Answer, Failure> {
        let url = self.url(host, &format!("blobs/{}", descriptor.digest)).await?;
        let mut call = Call::read(Method::GET, url, &self.name);
        call.lane = lane;
        call.blob = Some(BlobKey { host: host.key(), repository: self.name.clone(), digest: descriptor.digest });
        let is_range = *wanted != (0..descriptor.size);
        if is_range {
            call = call.header(header::RANGE, format!("bytes={}-{}", wanted.start, wanted.end - 1));
        }
        let answer = self.client.attempt(host, &mut call).await?;
        Ok(self.check_blob(answer, descriptor, is_range).await?)
    }

    /// Asks a foreign layer's own address, which is no registry's and is shown nothing.
    async fn open_foreign(&self, descriptor: &Descriptor, url: &Url, wanted: &Range<u64>) -> Result<Answer, Failure> {
        let mut call = Call::read(Method::GET, url.clone(), "");
        call.lane = Lane::Download;
        call.elsewhere = true;
        let is_range = *wanted != (0..descriptor.size);
        if is_range {
            call = call.header(header::RANGE, format!("bytes={}-{}", wanted.start, wanted.end - 1));
        }
        let answer = self.client.attempt(self.upstream()?, &mut call).await?;
        Ok(self.check_blob(answer, descriptor, is_range).await?)
    }

    async fn check_blob(&self, mut answer: Answer, descriptor: &Descriptor, is_range: bool) -> Result<Answer, Error> {
        match answer.status() {
            StatusCode::OK => {}
            StatusCode::PARTIAL_CONTENT if is_range => {}
            StatusCode::NOT_FOUND => {
                // Read, so that the connection can be used again.
                let words = answer.words().await;
                tracing::debug!(words, "no such blob");
                return Err(self.not_found(format!("blob {}", descriptor.digest)));
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                let detail = format!("it is not as long as it should be ({} bytes)", descriptor.size);
                return Err(self.corrupt(descriptor, detail));
            }
            _ => return Err(answer.into_error().await),
        }
        answer.check_encoding()?;
        // A registry that names another digest of the same algorithm has another blob in mind.
        let named = answer.header("docker-content-digest").and_then(|text| text.parse::<Digest>().ok());
        if let Some(named) = named.filter(|named| named.algorithm() == descriptor.digest.algorithm())
            && named != descriptor.digest
        {
            return Err(self.corrupt(descriptor, format!("the answer says that it is {named}")));
        }
        Ok(answer)
    }

    /// Checks `Content-Range` and `Content-Length` against what was asked for.
    fn check_range(&self, answer: &Answer, descriptor: &Descriptor, wanted: &Range<u64>) -> Result<(), Error> {
        let text = answer.header(header::CONTENT_RANGE).unwrap_or_default();
        let Some((range, total)) = parse_content_range(text) else {
            let text = super::error::printable(text);
            return Err(answer.wrong(format!("206 with a Content-Range that means nothing ({text:?})")));
        };
        if range != *wanted || total.is_some_and(|total| total != descriptor.size) {
            let Range { start, end } = wanted;
            let expected = format!("bytes {start}-{}/{}", end - 1, descriptor.size);
            return Err(self.corrupt(descriptor, format!("{expected} were asked for, {text} came")));
        }
        self.check_length(answer, descriptor, wanted.end - wanted.start)
    }

    fn check_length(&self, answer: &Answer, descriptor: &Descriptor, expected: u64) -> Result<(), Error> {
        match answer.length() {
            Some(length) if length != expected => {
                Err(self.corrupt(descriptor, format!("the answer has {length} bytes instead of {expected}")))
            }
            _ => Ok(()),
        }
    }

    fn ignores_ranges(&self) -> Error {
        let what = "range requests: it answers them with the whole blob".to_owned();
        Error::Unsupported { what, place: self.place() }
    }
}

/// Why a range was not read.
enum RangeError {
    /// The answer says that it is something else than the range.
    NotTheRange(Error),
    Other(Failure),
}

impl From<Error> for RangeError {
    fn from(error: Error) -> Self {
        Self::Other(error.into())
    }
}

impl From<Failure> for RangeError {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

/// One attempt at a range, and how far it has come.
struct RangeReader<'a> {
    repository: &'a Repository,
    descriptor: &'a Descriptor,
    trip: &'a Trip,
    /// The offset in the blob of what is handed out next.
    next: u64,
    take: &'a mut (dyn FnMut(Bytes) + Send),
}

impl RangeReader<'_> {
    /// Hands out what is missing before `end`, or as much of it as comes.
    async fn read(&mut self, host: &Host, end: u64, needs_ranges: bool) -> Result<(), RangeError> {
        let Self { repository, descriptor, next: start, .. } = *self;
        let wanted = start..end;
        let mut answer = repository.open(host, descriptor, &wanted, Lane::Short).await?;
        let is_part = answer.status() == StatusCode::PARTIAL_CONTENT;
        let mut discard = 0;
        if is_part {
            repository.check_range(&answer, descriptor, &wanted).map_err(RangeError::NotTheRange)?;
        } else if needs_ranges && wanted != (0..descriptor.size) {
            return Err(RangeError::NotTheRange(repository.ignores_ranges()));
        } else {
            repository.check_length(&answer, descriptor, descriptor.size)?;
            discard = start;
        }
        repository.route.is_measured_by(answer.meter());
        while let Some(chunk) = answer.chunk().await? {
            let mut chunk = discarded(&chunk, &mut discard);
            let missing = end - self.next;
            if chunk.len() as u64 > missing {
                if is_part {
                    let detail = format!("more than the {} bytes of the range were sent", end - start);
                    return Err(repository.corrupt(descriptor, detail).into());
                }
                chunk.truncate(usize::try_from(missing).unwrap_or(usize::MAX));
            }
            self.hand_out(start, chunk);
            // Where the length was said, it is right: there is no need to wait for the body's end.
            if self.next == end && (!is_part || answer.length().is_some()) {
                return Ok(());
            }
        }
        match end - self.next {
            0 => Ok(()),
            missing => Err(truncated(&answer, missing).into()),
        }
    }

    fn hand_out(&mut self, start: u64, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        let end = self.next + chunk.len() as u64;
        // First: whoever is handed bytes may find them wrong at once.
        self.repository.route.served(&self.descriptor.digest, start, self.next..end, self.trip);
        self.next = end;
        (self.take)(chunk);
    }
}

fn truncated(answer: &Answer, missing: u64) -> Error {
    let detail = format!("the body ended {missing} bytes too early");
    super::error::broken(&answer.method, &answer.url, detail)
}

/// Reads `bytes 0-99/1000`, as a range with an exclusive end, and the total where it is said.
fn parse_content_range(text: &str) -> Option<(Range<u64>, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        number => Some(number.parse().ok()?),
    };
    (first <= last).then_some((first..last.checked_add(1)?, total))
}

/// Takes bytes that are not wanted from the beginning of a chunk.
fn discarded(chunk: &Bytes, discard: &mut u64) -> Bytes {
    let skipped = chunk.len().min(usize::try_from(*discard).unwrap_or(usize::MAX));
    *discard -= skipped as u64;
    chunk.slice(skipped..)
}

/// Chunks of a range. One that came in one piece is not copied.
struct Collected {
    first: Bytes,
    rest: BytesMut,
    expected: u64,
}

impl Collected {
    fn new(expected: u64) -> Self {
        Self { first: Bytes::new(), rest: BytesMut::new(), expected }
    }

    fn length(&self) -> u64 {
        (self.first.len() + self.rest.len()) as u64
    }

    fn push(&mut self, chunk: Bytes) {
        if self.length() == 0 {
            self.first = chunk;
            return;
        }
        if self.rest.is_empty() {
            let capacity = usize::try_from(self.expected.min(RANGE_CAPACITY)).unwrap_or(0);
            self.rest.reserve(capacity.max(self.first.len() + chunk.len()));
            self.rest.extend_from_slice(&std::mem::take(&mut self.first));
        }
        self.rest.extend_from_slice(&chunk);
    }

    fn finish(self) -> Bytes {
        if self.rest.is_empty() { self.first } else { self.rest.freeze() }
    }
}

/// A whole blob that is being read.
struct Reading {
    repository: Repository,
    descriptor: Descriptor,
    /// Gone when all bytes have been hashed and found right.
    hasher: Option<Hasher>,
    offset: u64,
    /// Bytes of the current answer that were read from an earlier one.
    discard: u64,
    answer: Option<Answer>,
    /// Begun with the first step: what may fail belongs into the stream.
    trip: Option<Trip>,
    /// The offset at the newest failure.
    failed_at: u64,
    /// The place of a foreign layer that is being read.
    foreign: Option<Url>,
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        if self.hasher.is_none() {
            return Ok(None);
        }
        if self.descriptor.size == 0 {
            return self.check_digest().map(|()| None);
        }
        loop {
            match self.step().await {
                Ok(chunk) if chunk.is_empty() => {}
                Ok(chunk) => return Ok(Some(chunk)),
                Err(failure) => {
                    self.answer = None;
                    self.recover(failure).await?;
                    tracing::debug!(digest = %self.descriptor.digest, offset = self.offset, "a download is resumed");
                    self.repository.client.count_retry();
                }
            }
        }
    }

    /// Makes ready for the next step after a failure, or says that there is none.
    async fn recover(&mut self, failure: Failure) -> Result<(), Error> {
        let Some(trip) = &mut self.trip else { return Err(failure.error) };
        let again = failure.error.is_transient();
        if self.hasher.is_none() {
            // All has been handed out but its end, and it is wrong.
            trip.condemn(&failure.error);
            return Err(failure.error);
        }
        if self.offset - self.failed_at >= PROGRESS {
            trip.progress();
        }
        self.failed_at = self.offset;
        if self.foreign.is_some() {
            return if again && trip.pause(failure.wait).await { Ok(()) } else { Err(failure.error) };
        }
        match trip.failed(failure, again).await {
            Err(Error::NotFound { .. }) => {
                self.foreign = Some(self.foreign_place()?);
                Ok(())
            }
            other => other,
        }
    }

    /// Returns the next bytes, or none where the next step has to come first.
    async fn step(&mut self) -> Result<Bytes, Failure> {
        let (size, offset) = (self.descriptor.size, self.offset);
        let answer = match &mut self.answer {
            Some(answer) => answer,
            None => {
                let answer = self.open().await?;
                self.answer.insert(answer)
            }
        };
        let Some(chunk) = answer.chunk().await? else { return Err(truncated(answer, size - offset).into()) };
        let length_known = answer.length().is_some();
        let chunk = discarded(&chunk, &mut self.discard);
        if chunk.len() as u64 > size - offset {
            return Err(self.too_long().into());
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&chunk);
        }
        self.offset += chunk.len() as u64;
        if self.offset == size {
            // The last bytes are handed out only when all are known to be right.
            self.check_digest()?;
            if !length_known && let Some(answer) = &mut self.answer {
                // A connection that breaks now has done its duty.
                while let Ok(Some(more)) = answer.chunk().await {
                    if !more.is_empty() {
                        return Err(self.too_long().into());
                    }
                }
            }
            self.answer = None;
            if let Some(trip) = self.trip.as_ref().filter(|_| self.foreign.is_none()) {
                trip.succeeded();
            }
        }
        Ok(chunk)
    }

    async fn open(&mut self) -> Result<Answer, Failure> {
        let wanted = self.offset..self.descriptor.size;
        let answer = self.ask(&wanted).await?;
        self.discard = if answer.status() == StatusCode::PARTIAL_CONTENT {
            self.repository.check_range(&answer, &self.descriptor, &wanted)?;
            0
        } else {
            // Ranges are ignored here: what was read already comes once more.
            self.repository.check_length(&answer, &self.descriptor, self.descriptor.size)?;
            self.offset
        };
        Ok(answer)
    }

    async fn ask(&mut self, wanted: &Range<u64>) -> Result<Answer, Failure> {
        let Self { repository, descriptor, .. } = self;
        let trip = match &mut self.trip {
            Some(trip) => trip,
            None => self.trip.insert(repository.trip(Content::Whole(&descriptor.digest))?),
        };
        match &self.foreign {
            None => repository.open(&trip.host(), descriptor, wanted, Lane::Download).await,
            Some(url) => repository.open_foreign(descriptor, url, wanted).await,
        }
    }

    fn foreign_place(&self) -> Result<Url, Error> {
        let urls = self.descriptor.urls.iter().filter_map(|url| url.parse::<Url>().ok());
        let mut usable =
            urls.filter(|url| url.scheme() == "https" && url.username().is_empty() && url.password().is_none());
        usable.next().ok_or_else(|| self.repository.not_found(format!("blob {}", self.descriptor.digest)))
    }

    fn check_digest(&mut self) -> Result<(), Error> {
        match self.hasher.take().map(Hasher::finish) {
            Some(found) if found != self.descriptor.digest => {
                Err(self.repository.corrupt(&self.descriptor, format!("its bytes have the digest {found}")))
            }
            _ => Ok(()),
        }
    }

    fn too_long(&self) -> Error {
        self.repository.corrupt(&self.descriptor, format!("it has more than {} bytes", self.descriptor.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        for (text, expected) in [
            ("bytes 0-99/1000", Some((0..100, Some(1000)))),
            ("bytes 5-5/*", Some((5..6, None))),
            ("bytes 0-18446744073709551614/*", Some((0..u64::MAX, None))),
            ("bytes 0-18446744073709551615/*", None),
            ("bytes 9-5/10", None),
            ("bytes */10", None),
            ("bytes 0-5", None),
            ("items 0-5/10", None),
            ("", None),
        ] {
            assert_eq!(parse_content_range(text), expected, "{text}");
        }
    }

    #[test]
    fn a_range_in_one_piece_is_not_copied() {
        let chunk = Bytes::from(vec![1; 100]);
        let mut collected = Collected::new(100);
        collected.push(chunk.clone());
        assert_eq!(collected.finish().as_ptr(), chunk.as_ptr());
        let mut collected = Collected::new(200);
        for _ in 0..3 {
            collected.push(chunk.clone());
        }
        assert_eq!(collected.length(), 300);
        assert_eq!(collected.finish(), vec![1; 300]);
    }
}

//! One request's way: fetch, decode, verify, write, publish. Each frame goes it as soon as its bytes are here, while the
//! rest of the request still arrives: who waits for a frame waits for no other.
//!
//! A *flight* is a frame on its way. Each frame has at most one; whoever wants the frame waits for it. The task that
//! brings it holds the *ticket*, and belongs to the layer: it ends whether or not someone still waits.

use std::{
    collections::VecDeque,
    fs::File,
    os::unix::fs::FileExt as _,
    sync::{Arc, atomic::Ordering},
};

use bytes::Bytes;
use loris_format::{
    compression::FrameDecoder,
    index::{Frame, FrameId},
    position::BlobRange,
};
use tokio::sync::{mpsc, watch};

use crate::{
    arriving::Arriving,
    error::{EnsureError, path_of},
    layer::{Counters, LazyLayer},
    plan::{FetchPolicy, Request, fetched_range, plan},
    rest::{self, Records},
    schedule::{Claim, Turn, Urgency},
};

/// What became of a frame.
pub(crate) type Outcome = Result<Arc<Landed>, EnsureError>;

/// A frame that was fetched and decoded. Its extents are published but for those that are refused.
#[derive(Debug)]
pub(crate) struct Landed {
    pub(crate) refused: Vec<Refusal>,
}

/// An extent that is not what it should be. Its file is looked for when somebody wants to know: a frame may have a hundred
/// thousand of them.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) extent: usize,
    /// What is wrong with the frame, where the extent does not decode.
    fault: Option<Arc<str>>,
}

/// The waiting end of a frame on its way.
#[derive(Clone, Debug)]
pub(crate) struct Flight {
    outcome: watch::Receiver<Option<Outcome>>,
    wish: Wish,
}

/// Whether somebody waits for a request that was planned for nobody.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish(Arc<watch::Sender<bool>>);

impl Wish {
    async fn comes(&self) {
        // The sender is here.
        let _ = self.0.subscribe().wait_for(|is_wished| *is_wished).await;
    }
}

/// The bringing end of a frame on its way.
pub(crate) struct Ticket {
    frame: FrameId,
    outcome: watch::Sender<Option<Outcome>>,
}

impl Flight {
    /// Makes a flight of a request, of which somebody may come to wait for some frame.
    pub(crate) fn new(frame: FrameId, wish: &Wish) -> (Ticket, Self) {
        let (sender, outcome) = watch::channel(None);
        (Ticket { frame, outcome: sender }, Self { outcome, wish: wish.clone() })
    }

    /// Lets the request go out as one that somebody waits for, where it has not gone out yet.
    pub(crate) fn hurry(&self) {
        self.wish.0.send_replace(true);
    }

    /// Waits for the frame; `None` where whoever brings it has given up.
    pub(crate) async fn landing(mut self) -> Option<Outcome> {
        self.outcome.wait_for(Option::is_some).await.ok().and_then(|outcome| outcome.clone())
    }
}

/// A frame and the bytes that were fetched of it.
type Whole = (FrameId, Bytes);

/// The frames of one request. Dropped at whatever point, it leaves no flight behind that nobody brings.
pub(crate) struct Flights {
    layer: Arc<LazyLayer>,
    /// In the order of the blob.
    tickets: VecDeque<Ticket>,
    wish: Wish,
    /// How many bytes of the request are waited for; what is behind them lies ahead.
    waited: u64,
}

impl Flights {
    pub(crate) fn new(layer: Arc<LazyLayer>, tickets: VecDeque<Ticket>, wish: Wish, waited: u64) -> Self {
        Self { layer, tickets, wish, waited }
    }

    /// Brings all frames, which lie in `range`: out of other layers of the store, and, when their turn has come, from the
    /// source what is in none.
    pub(crate) async fn run(mut self, range: BlobRange, claim: Claim, turn: Option<Turn>) {
        let (layer, frames) = (Arc::clone(&self.layer), self.frames());
        let filling = tokio::task::spawn_blocking(move || layer.fill_from_store(&frames));
        let room = match filling.await {
            Ok(Ok(room)) => Arc::new(room),
            Ok(Err(error)) => return self.fail(&error),
            // The waiters are told by `drop`.
            Err(_) => return,
        };
        let (layer, mut turn) = (Arc::clone(&self.layer), turn);
        let requests = self.without_whole(range);
        if requests.is_empty() {
            layer.prove_when_whole();
        }
        for (range, flights) in requests {
            let claim = Claim { bytes: flights.layer.claim(&flights.frames(), claim.urgency).bytes, ..claim };
            let (room, turn) = (Arc::clone(&room), turn.take());
            tokio::spawn(async move {
                flights.bring(range, claim, turn).await;
                drop(room);
            });
        }
        layer.prove_when_whole();
    }

    fn frames(&self) -> Vec<FrameId> {
        self.tickets.iter().map(|ticket| ticket.frame).collect()
    }

    /// Ends the flights of frames that are here, and returns requests for the rest.
    fn without_whole(mut self, range: BlobRange) -> Vec<(BlobRange, Self)> {
        let mut left = VecDeque::new();
        let all = self.tickets.len();
        while let Some(ticket) = self.tickets.front() {
            if self.layer.has_frame(ticket.frame) {
                self.arrive(Ok(Arc::new(Landed { refused: Vec::new() })));
            } else {
                left.extend(self.tickets.pop_front());
            }
        }
        self.tickets = left;
        if self.tickets.len() == all {
            return vec![(range, self)];
        }
        let policy = FetchPolicy { read_ahead_bytes: 0, ..self.layer.policy.adapted(self.layer.source.link()) };
        let requests = plan(self.layer.index.frames(), &self.frames(), |_| false, &policy);
        let part = |request: Request| {
            let tickets = self.tickets.drain(..request.frames.len()).collect();
            (request.range, Self::new(Arc::clone(&self.layer), tickets, self.wish.clone(), request.range.length))
        };
        requests.into_iter().map(part).collect()
    }

    /// Fetches all frames, which lie in `range`, when their turn has come.
    async fn bring(self, range: BlobRange, claim: Claim, turn: Option<Turn>) {
        let layer = Arc::clone(&self.layer);
        let mut turn = match turn {
            Some(mut turn) => {
                turn.resize(claim.bytes);
                turn
            }
            None => self.turn(claim).await,
        };
        let urgency = turn.urgency();
        let (whole, wholes) = mpsc::unbounded_channel();
        let (frames, waited) = (self.frames(), self.waited);
        // What arrives while others are decoded waits for its turn: it is claimed as a whole, and never more than that.
        let fetching = async {
            let fetched = layer.fetch_frames(range, &frames, (urgency, waited), whole).await;
            turn.landed();
            fetched
        };
        let (fetched, landed) = tokio::join!(fetching, self.land_all(wholes, urgency));
        match (fetched, landed) {
            (Err(error), Some(mut flights)) => flights.fail(&error),
            // Where decoding panics or the runtime ends, the waiters were told by `drop`.
            (_, None) | (Ok(()), Some(_)) => {}
        }
        drop(turn);
        layer.prove_when_whole();
        if let Some(link) = layer.source.link() {
            layer.schedule.note_round_trip(link.round_trip);
        }
        if layer.cache.take_sync_wanted()
            && let Err(error) = layer.sync().await
        {
            tracing::warn!(%error, "what was fetched could not be made durable; it will be fetched again");
        }
    }

    /// Waits for a turn: as one on demand once somebody waits for a frame.
    async fn turn(&self, claim: Claim) -> Turn {
        let schedule = &self.layer.schedule;
        tokio::select! {
            turn = schedule.turn(claim) => turn,
            () = self.wish.comes(), if claim.urgency != Urgency::Demand => {
                schedule.turn(Claim { urgency: Urgency::Demand, ..claim }).await
            }
        }
    }

    /// Lands frames as they become whole, those that have become so meanwhile together, on a thread that may block. Returns
    /// those that have not, or `None` where decoding panics or the runtime ends.
    async fn land_all(self, mut wholes: mpsc::UnboundedReceiver<Whole>, urgency: Urgency) -> Option<Self> {
        let layer = Arc::clone(&self.layer);
        let _landing = Landing::begin(&layer);
        let rest = layer.verdict().is_none().then(Records::new);
        let (mut flights, mut tools) = (self, Tools { decoder: None, rest });
        while let Some(first) = wholes.recv().await {
            let mut batch = vec![first];
            while let Ok(next) = wholes.try_recv() {
                batch.push(next);
            }
            let place = layer.schedule.decoder(urgency).await;
            let landing = tokio::task::spawn_blocking(move || {
                for whole in batch {
                    flights.land(&mut tools, whole);
                }
                if flights.tickets.is_empty() {
                    tools.put_away(&flights.layer);
                }
                drop(place);
                (flights, tools)
            });
            (flights, tools) = landing.await.ok()?;
        }
        if !flights.tickets.is_empty() {
            // The request has failed, and some of it is here.
            tokio::task::spawn_blocking(move || tools.put_away(&layer)).await.ok()?;
        }
        Some(flights)
    }

    fn land(&mut self, tools: &mut Tools, (frame, compressed): Whole) {
        let decoder = tools.decoder.get_or_insert_with(FrameDecoder::new);
        let outcome = self.layer.land(decoder, frame, &compressed, tools.rest.as_mut());
        if let Err(error) = &outcome {
            Counters::add(&self.layer.counters.errors, 1);
            tracing::error!(%error, "fetched and not kept");
        }
        self.arrive(outcome);
    }

    fn fail(&mut self, error: &EnsureError) {
        Counters::add(&self.layer.counters.errors, 1);
        tracing::debug!(%error, "fetch failed");
        while !self.tickets.is_empty() {
            self.arrive(Err(error.clone()));
        }
    }

    /// Ends the first flight. What it brought is published; now nobody new may wait for it, and then who waits is told.
    fn arrive(&mut self, outcome: Outcome) {
        if let Some(ticket) = self.tickets.pop_front() {
            self.layer.flights().remove(&ticket.frame);
            ticket.outcome.send_replace(Some(outcome));
        }
    }
}

/// What a request's frames are landed with, one after the other.
struct Tools {
    decoder: Option<FrameDecoder>,
    /// Where the layer is still to be proven.
    rest: Option<Records>,
}

impl Tools {
    /// Writes what the proof needs. Blocks.
    fn put_away(&mut self, layer: &LazyLayer) {
        let Some(rest) = self.rest.take() else { return };
        // What a frame has between its extents is the writer's choice, and need not compress.
        let room = layer.cache.store().room(rest.length());
        let written = room
            .map_err(|error| EnsureError::no_room(layer.digest, error))
            .and_then(|_room| rest.write(layer.directory()).map_err(|error| layer.file_error(error)));
        if let Err(error) = written {
            tracing::debug!(%error, "what the proof of a layer needs will be fetched again");
        }
    }
}

/// A request whose frames are landing.
struct Landing(Arc<LazyLayer>);

impl Landing {
    fn begin(layer: &Arc<LazyLayer>) -> Self {
        layer.landing.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(layer))
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.landing.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Flights {
    fn drop(&mut self) {
        let mut flights = self.layer.flights();
        for ticket in &self.tickets {
            flights.remove(&ticket.frame);
        }
        // The tickets go next, which wakes those who wait.
    }
}

impl LazyLayer {
    pub(crate) async fn fetch(&self, range: BlobRange) -> Result<Bytes, EnsureError> {
        Counters::add(&self.counters.requests, 1);
        let bytes = self
            .source
            .blob_range(&self.descriptor, range.start.0..range.end().0)
            .await
            .map_err(|source| EnsureError::Fetch { layer: self.digest, range, source: Arc::new(source) })?;
        Counters::add(&self.counters.fetched_bytes, bytes.len() as u64);
        if bytes.len() as u64 != range.length {
            return Err(EnsureError::WrongLength { layer: self.digest, range, found: bytes.len() as u64 });
        }
        Ok(bytes)
    }

    /// Fetches a range, and hands over the frames in it as they become whole. After a failure, those that were handed over
    /// are as good as ever.
    async fn fetch_frames(
        &self,
        range: BlobRange,
        frames: &[FrameId],
        (urgency, waited): (Urgency, u64),
        whole: mpsc::UnboundedSender<Whole>,
    ) -> Result<(), EnsureError> {
        Counters::add(&self.counters.requests, 1);
        let place = |&frame: &FrameId| (frame, fetched_range(&self.index.frames()[frame.0 as usize]));
        let mut arriving = Arriving::new(range, frames.iter().map(place));
        let mut take = |piece: Bytes| {
            Counters::add(&self.counters.fetched_bytes, piece.len() as u64);
            let urgency = if arriving.came() < waited { urgency } else { Urgency::ReadAhead };
            Counters::add(&self.counters.by_urgency[urgency as usize], piece.len() as u64);
            // Nobody takes them where decoding has panicked.
            arriving.take(piece, |frame, bytes| drop(whole.send((frame, bytes))));
        };
        let fetched = self.source.blob_range_pieces(&self.descriptor, range.start.0..range.end().0, &mut take).await;
        fetched.map_err(|source| EnsureError::Fetch { layer: self.digest, range, source: Arc::new(source) })?;
        match arriving.came() {
            came if came == range.length => Ok(()),
            found => Err(EnsureError::WrongLength { layer: self.digest, range, found }),
        }
    }

    /// Fills everything that is missing out of the blob, which is in a file. Blocks.
    pub(crate) fn fill_from(&self, blob: &File) -> Result<(), EnsureError> {
        let mut tools = Tools { decoder: None, rest: self.verdict().is_none().then(Records::new) };
        let decoder = tools.decoder.insert(FrameDecoder::new());
        for (frame, id) in self.index.frames().iter().zip((0..).map(FrameId)) {
            if self.has_frame(id) && !self.index.has_spans() {
                continue;
            }
            self.check_size(id)?;
            // Checked to fit into memory.
            let mut bytes = vec![0; usize::try_from(frame.range.length).unwrap_or_default()];
            blob.read_exact_at(&mut bytes, frame.range.start.0).map_err(|error| self.file_error(error))?;
            self.land(decoder, id, &bytes, tools.rest.as_mut())?;
        }
        tools.put_away(self);
        Ok(())
    }

    /// Decodes a frame, and publishes what is right of it. Blocks.
    fn land(&self, decoder: &mut FrameDecoder, id: FrameId, compressed: &[u8], rest: Option<&mut Records>) -> Outcome {
        let frame = &self.index.frames()[id.0 as usize];
        let range = fetched_range(frame);
        if self.index.has_spans() {
            let most = frame.decoded_length.saturating_add(rest::MOST_BYTES);
            // No more is decoded than was claimed, or is of use.
            let all = rest.is_some() && self.index.span(id).is_some_and(|span| span.length <= most);
            let (decoded, is_all, fault) = match self.decode_span(decoder, id, compressed, all) {
                Ok((decoded, is_all)) => (decoded, is_all, None),
                Err(fault) => (Vec::new(), false, Some(fault)),
            };
            let is_all = is_all && decoded.len() as u64 <= most;
            return self.keep(id, (decoded, is_all, fault), rest);
        }
        let most = frame.decoded_length.saturating_add(rest::MOST_BYTES);
        let all = rest
            .as_ref()
            .map(|_| decoder.decode_all(frame.codec, compressed, frame.decoded_length, most, &self.limits));
        let (decoded, is_all, fault) = match all {
            Some(Ok((decoded, is_all))) => (decoded, is_all && range == frame.range, None),
            _ => {
                let (decoded, fault) = self.decode(decoder, id, frame, compressed);
                (decoded, false, fault)
            }
        };
        self.keep(id, (decoded, is_all, fault), rest)
    }

    /// Verifies, writes and publishes what a frame was decoded to: what of it is right, and whether that is all.
    fn keep(
        &self,
        id: FrameId,
        (decoded, is_all, fault): (Vec<u8>, bool, Option<String>),
        rest: Option<&mut Records>,
    ) -> Outcome {
        let frame = &self.index.frames()[id.0 as usize];
        Counters::add(&self.counters.decoded_bytes, frame.decoded_length.min(decoded.len() as u64));

        self.cache.check_length(&self.index).map_err(|error| self.file_error(error))?;
        let mut right = Vec::new();
        let mut right_bytes = 0;
        let mut refused = Vec::new();
        let fault: Arc<str> = fault.as_deref().unwrap_or("it is shorter than the index says").into();
        for &number in self.index.extents_of(id) {
            let number = number as usize;
            if self.cache.filled().contains(number) {
                continue;
            }
            let extent = self.extent(number);
            let content = usize::try_from(extent.frame_offset).ok().and_then(|start| {
                let length = usize::try_from(extent.length).ok()?;
                decoded.get(start..start.checked_add(length)?)
            });
            match content {
                Some(content) if extent.digest.is_none_or(|digest| digest.matches(content)) => {
                    self.cache.write(extent.data, content).map_err(|error| self.file_error(error))?;
                    right.push(number);
                    right_bytes += extent.length;
                }
                Some(_) => refused.push(Refusal { extent: number, fault: None }),
                None => refused.push(Refusal { extent: number, fault: Some(Arc::clone(&fault)) }),
            }
        }
        if is_all
            && refused.is_empty()
            && let Some(rest) = rest
        {
            rest.add(&self.index, id, &decoded);
        }
        self.cache.publish(right, right_bytes).map_err(|error| self.file_error(error))?;
        if let Some(first) = refused.first() {
            Counters::add(&self.counters.errors, refused.len() as u64);
            tracing::error!(error = %self.refused(first), more = refused.len() - 1, "refused");
        }
        Ok(Arc::new(Landed { refused }))
    }

    /// Decodes a frame, or as much of it as is sound: what comes before a fault is as good as ever, and is verified by
    /// extent anyway. Returns the fault with it.
    fn decode(
        &self,
        decoder: &mut FrameDecoder,
        id: FrameId,
        frame: &Frame,
        compressed: &[u8],
    ) -> (Vec<u8>, Option<String>) {
        let mut decode = |length| decoder.decode(frame.codec, compressed, length, &self.limits);
        let fault = match decode(frame.decoded_length) {
            Ok(decoded) => return (decoded, None),
            Err(error) => error.to_string(),
        };
        let mut ends: Vec<u64> = self
            .index
            .extents_of(id)
            .iter()
            .map(|&number| self.extent(number as usize))
            .map(|extent| extent.frame_offset.saturating_add(extent.length))
            .filter(|&end| end < frame.decoded_length)
            .collect();
        ends.sort_unstable();
        ends.dedup();
        let mut sound = Vec::new();
        let _ = ends.partition_point(|&end| match decode(end) {
            Ok(decoded) => {
                sound = decoded;
                true
            }
            Err(_) => false,
        });
        (sound, Some(fault))
    }

    /// Says what is wrong with an extent.
    pub(crate) fn refused(&self, refusal: &Refusal) -> EnsureError {
        let extent = self.extent(refusal.extent);
        let path = path_of(&self.index, extent.node);
        match &refusal.fault {
            None => EnsureError::Mismatch {
                layer: self.digest,
                path,
                offset: extent.file_offset,
                length: extent.length,
                // Only an extent that has a digest can fail to match it.
                expected: extent.digest.unwrap_or(self.digest),
            },
            Some(fault) => EnsureError::Decode {
                layer: self.digest,
                path,
                offset: extent.file_offset,
                range: self.index.frames()[extent.frame.0 as usize].range,
                detail: fault.as_ref().to_owned(),
            },
        }
    }
}

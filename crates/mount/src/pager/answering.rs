//! From an event to its answer.

use std::{
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
};

use loris_format::position::{DataOffset, DataRange};
use loris_lazy::LazyLayer;
use rustix::io::Errno;

use super::{
    Inner, errno,
    event::{Answer, Event},
    event_file,
    files::Watched,
    slots::Left,
};

/// So many extents of a layer that nobody has asked for are fetched to be done with it.
const LEFT_OVER: u64 = 2;

/// An event that was read and not answered. Dropped without an answer, it is refused: no reader waits for ever, and
/// none goes on without its bytes.
struct Pending {
    pager: Arc<Inner>,
    slot: u32,
    descriptor: i32,
    /// What holds the event's number: the file itself, or after a restart a placeholder.
    number: Option<OwnedFd>,
    answer: Answer,
}

impl Pending {
    fn answer(mut self, answer: Answer) {
        self.answer = answer;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        let Self { pager, slot, descriptor, number, answer } = self;
        if let Err(error) = pager.group.answer(*descriptor, *answer) {
            // The event stays in the journal: a successor answers it.
            tracing::error!(%error, "a reader could not be answered");
            return;
        }
        // In this order: see `journal`.
        pager.journal.clear(*slot);
        *number = None;
        pager.slots.give_back(*slot);
    }
}

/// Answers the event that was read into a slot: at once, or by a task.
pub(super) fn answer(pager: &Arc<Inner>, slot: u32) {
    let event = Event::parse(&pager.journal.event(slot));
    let file = event.as_ref().ok().and_then(|event| event_file(event.descriptor));
    let (Ok(event), Some(file)) = (event, file) else {
        // An overflow, which the flags of the group rule out, or a kernel of the future.
        tracing::error!("the kernel sent an event that is not understood");
        pager.journal.clear(slot);
        pager.slots.give_back(slot);
        return;
    };
    let descriptor = file.as_raw_fd();
    let metadata = rustix::fs::fstat(&file);
    let pending =
        Pending { pager: Arc::clone(pager), slot, descriptor, number: Some(file), answer: Answer::Deny(Errno::IO) };
    let Ok(metadata) = metadata else { return };
    let identity = (metadata.st_dev, metadata.st_ino);
    let size = u64::try_from(metadata.st_size).unwrap_or_default();
    // A read of content is never taken for it: that begins before the file's end.
    if event.range.start >= size
        && event.process == rustix::process::getpid().as_raw_nonzero().get()
        && let Some(waiting) = pager.files.take_expected(identity)
    {
        // Brought about by `Inner::fill_unasked`. Nothing is mounted that could be meant.
        if let Some(Ok(file)) = pending.number.as_ref().map(OwnedFd::try_clone) {
            let _ = waiting.send(file.into());
        }
        return pending.answer(Answer::Allow);
    }
    let Some((key, watched)) = pager.files.find(identity) else {
        // Either no mount of ours reads it any more, and somebody looks at the store; or something went wrong that must
        // not show zeros.
        let answer = if pager.journal.has_mounts() { Answer::Deny(Errno::IO) } else { Answer::Allow };
        return pending.answer(answer);
    };
    pager.journal.key(slot).store(key, Ordering::Release);
    // Somebody changes the file's length: perhaps we ourselves, who repair what was cut. No bytes are read.
    if event.range.is_empty() {
        return pending.answer(Answer::Allow);
    }
    fill(pending, vec![watched], &event.range, size);
}

/// Answers an event that a killed process has left behind.
pub(super) fn take_up(pager: &Arc<Inner>, left: Left) {
    let Left { slot, event, key, placeholder } = left;
    let pending = Pending {
        pager: Arc::clone(pager),
        slot,
        descriptor: event.descriptor,
        number: Some(placeholder),
        answer: Answer::Deny(Errno::IO),
    };
    let watched = match key {
        // Killed within microseconds after it was read. Whichever file it is: fill that range of each.
        0 => pager.files.all(),
        key => pager.files.by_key(key).into_iter().collect(),
    };
    // The length is not known; what is cut is found by the next event.
    fill(pending, watched, &event.range, u64::MAX);
}

/// Fills a range of files and allows the reader to go on, or refuses it.
fn fill(pending: Pending, watched: Vec<Watched>, range: &Range<u64>, size: u64) {
    let mut layers = Vec::with_capacity(watched.len());
    for file in watched {
        match file {
            Watched::Layer(layer) => layers.push(layer),
            // Nobody of this process can fill it.
            Watched::Orphan => return,
        }
    }
    let ranges: Vec<(Arc<LazyLayer>, DataRange)> = layers
        .into_iter()
        .filter_map(|layer| {
            let end = range.end.min(layer.index().data_length());
            let range = DataOffset(range.start.min(end))..DataOffset(end);
            let is_whole = size >= layer.index().data_length();
            layer.touched(&range, &pending.pager.runtime);
            (!is_whole || !layer.is_filled(&range)).then_some((layer, range))
        })
        .collect();
    if ranges.is_empty() {
        return pending.answer(Answer::Allow);
    }
    let runtime = pending.pager.runtime.clone();
    runtime.spawn(async move {
        for (layer, range) in ranges {
            let patience = pending.pager.files.patience(&layer, pending.pager.patience);
            if let Err(error) = filled(&layer, range.clone(), size, patience).await {
                pending.pager.files.waited_in_vain(&layer);
                pending.pager.files.complain(&layer, range, &error);
                return pending.answer(Answer::Deny(errno(&error)));
            }
            pending.pager.files.waited_well(&layer);
            finish(&layer);
        }
        pending.answer(Answer::Allow);
    });
}

/// Fetches what is left of a layer, where that is so little that it costs less than the mark: every read of a marked file
/// is asked for. Mostly it is what no program ever reads, as the landmarks of eStargz.
fn finish(layer: &Arc<LazyLayer>) {
    let statistics = layer.statistics();
    if (1..=LEFT_OVER).contains(&(statistics.extents_total - statistics.extents_filled)) {
        let layer = Arc::clone(layer);
        tokio::spawn(async move {
            if let Err(error) = loris_lazy::complete(&layer).await {
                tracing::debug!(layer = %layer.digest(), %error, "the rest of a layer is left for later");
            }
        });
    }
}

async fn filled(
    layer: &Arc<LazyLayer>,
    range: DataRange,
    size: u64,
    patience: std::time::Duration,
) -> Result<(), loris_lazy::EnsureError> {
    if size < layer.index().data_length() {
        layer.check_length()?;
    }
    layer.ensure_within(range, patience).await
}

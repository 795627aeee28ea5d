//! Which bytes of a blob to ask for.
//!
//! Pure: frames and wishes in, requests out. Nothing here knows time, networks or files, so that a better policy replaces
//! this module and nothing else.

use loris_format::{
    index::{Codec, Frame, FrameId},
    position::{BlobOffset, BlobRange},
};
use loris_oci::link::Link;

/// How wanted frames become requests. Figures are compressed bytes where they don't say otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FetchPolicy {
    /// Bytes nobody asked for that may lie between two wanted frames of one request. Worth about what the link carries
    /// in a round trip.
    pub gap_bytes: u64,
    /// Longest request, in bytes. A single frame that is longer is one request all the same.
    pub max_request_bytes: u64,
    /// Bytes that are asked for behind the last wanted frame, by a request of their own for which nobody waits.
    pub read_ahead_bytes: u64,
    /// Most bytes of content that are fetched ahead of a reader that goes on in sequence; 0 for none.
    pub sequential_bytes: u64,
}

impl FetchPolicy {
    /// Little more than what was asked for: for `fs cat`, which reads one file and goes away.
    pub const EXACT: Self =
        Self { gap_bytes: 32 << 10, max_request_bytes: 4 << 20, read_ahead_bytes: 0, sequential_bytes: 0 };

    /// For a mounted image: files that lie side by side in a layer are mostly read together, and a round trip of 20 ms
    /// costs as much as 256 KiB at 100 Mbit/s.
    pub const MOUNT: Self = Self {
        gap_bytes: 128 << 10,
        max_request_bytes: 4 << 20,
        read_ahead_bytes: 256 << 10,
        sequential_bytes: 8 << 20,
    };

    /// Fits the policy to a link: what lies in a gap and what is read ahead may cost about a round trip.
    #[must_use]
    pub fn adapted(self, link: Option<Link>) -> Self {
        let Some(trip) = link.map(trip_bytes) else { return self };
        Self {
            gap_bytes: trip.clamp(16 << 10, 1 << 20),
            read_ahead_bytes: self.read_ahead_bytes.min(trip.max(64 << 10)),
            ..self
        }
    }
}

/// Returns the bytes that a link carries in a round trip.
pub(crate) fn trip_bytes(link: Link) -> u64 {
    let bytes = u128::from(link.bytes_per_second) * link.round_trip.as_nanos() / 1_000_000_000;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// Returns how many bytes one request of a completion asks for: so many that a round trip is small beside it, and so few
/// that a read on demand does not wait long behind it, nor much is lost where it fails.
#[must_use]
pub fn window_bytes(link: Option<Link>) -> u64 {
    /// How long a window is under way.
    const WINDOW_MILLIS: u128 = 100;
    const UNKNOWN: u64 = 1 << 20;
    let Some(link) = link else { return UNKNOWN };
    let bytes = u128::from(link.bytes_per_second) * WINDOW_MILLIS / 1000;
    u64::try_from(bytes).unwrap_or(u64::MAX).clamp(128 << 10, 4 << 20)
}

/// Returns the same while others read on demand, or may soon again: what is under way when they do shares the link with
/// them.
#[must_use]
pub fn small_window_bytes(link: Option<Link>) -> u64 {
    (window_bytes(link) / 4).max(64 << 10)
}

/// Returns how many of a sorted list of frames make a request of about `bytes`; one at least.
#[must_use]
pub fn window(frames: &[Frame], wanted: &[FrameId], bytes: u64) -> usize {
    let Some(first) = wanted.first() else { return 0 };
    let start = fetched_range(&frames[first.0 as usize]).start.0;
    let fits = |id: &FrameId| fetched_range(&frames[id.0 as usize]).end().0 - start <= bytes;
    wanted.iter().position(|id| !fits(id)).unwrap_or(wanted.len()).max(1)
}

/// Cuts a sorted list of frames into pieces that make a request of about `bytes` each.
#[must_use]
pub fn windows(frames: &[Frame], wanted: &[FrameId], bytes: u64) -> Vec<Vec<FrameId>> {
    let (mut windows, mut rest) = (Vec::new(), wanted);
    while !rest.is_empty() {
        let (next, behind) = rest.split_at(window(frames, rest, bytes));
        windows.push(next.to_vec());
        rest = behind;
    }
    windows
}

/// Returns how many of a sorted list of frames stand with no more than `gap` bytes between two of them; one at least.
#[must_use]
pub fn without_gap(frames: &[Frame], wanted: &[FrameId], gap: u64) -> usize {
    let range = |id: FrameId| fetched_range(&frames[id.0 as usize]);
    let is_far = |pair: &[FrameId]| range(pair[1]).start.0 > range(pair[0]).end().0.saturating_add(gap);
    wanted.windows(2).position(is_far).map_or(wanted.len(), |place| place + 1)
}

impl Default for FetchPolicy {
    fn default() -> Self {
        Self::EXACT
    }
}

/// One range of a blob to fetch, and the frames in it that are to be decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to ask for.
    pub range: BlobRange,
    /// What it holds, in the order of the blob; at least one. Frames in a gap are among them: their bytes are paid for.
    pub frames: Vec<FrameId>,
}

/// Returns what of a frame is fetched: all of it, or as much as its decoded length can need.
///
/// Formats that tell only where frames start make a frame reach to the next one, whatever lies between. No encoder makes
/// content twice as long as it was, so what is beyond that (and a generous constant for headers) is not needed.
#[must_use]
pub fn fetched_range(frame: &Frame) -> BlobRange {
    const HEADERS: u64 = 1 << 20;
    // What is stored is as long as it is, and a span is hashed as a whole.
    if matches!(frame.codec, Codec::Stored | Codec::Deflate) {
        return frame.range;
    }
    let enough = frame.decoded_length.saturating_mul(2).saturating_add(HEADERS);
    BlobRange { start: frame.range.start, length: frame.range.length.min(enough) }
}

/// Plans the requests that bring the `wanted` frames.
///
/// `frames` are those of an index (sorted, without overlap); `wanted` is sorted and without repetition; `fetchable` says
/// of a frame that was *not* wanted whether it is worth having (not here yet, nor on its way).
///
/// The requests don't overlap and are in the order of the blob. Every wanted frame is in exactly one.
///
/// # Panics
/// Where `wanted` names a frame that is not in `frames`.
#[must_use]
pub fn plan(
    frames: &[Frame],
    wanted: &[FrameId],
    fetchable: impl Fn(FrameId) -> bool,
    policy: &FetchPolicy,
) -> Vec<Request> {
    let mut requests: Vec<Request> = Vec::new();
    for &id in wanted {
        let range = fetched_range(&frames[id.0 as usize]);
        if let Some(open) = requests.last_mut().filter(|open| fits(open.range, range, policy.gap_bytes, policy)) {
            let last = open.frames[open.frames.len() - 1];
            open.frames.extend((last.0 + 1..id.0).map(FrameId).filter(|&between| fetchable(between)));
            open.frames.push(id);
            open.range = through(open.range.start, range);
        } else {
            requests.push(Request { range, frames: vec![id] });
        }
    }
    if let Some(ahead) = wanted.last().and_then(|&last| read_ahead(frames, last, fetchable, policy)) {
        requests.push(ahead);
    }
    requests
}

/// Lets the last request, which somebody waits for, go on with what lies ahead of it, where that stands right behind it:
/// the bytes of one answer follow each other, those of two share the link. `wanted` is sorted. Returns how many bytes of
/// the last request are waited for, where it has become longer than that.
pub(crate) fn go_on(requests: &mut Vec<Request>, wanted: &[FrameId]) -> Option<u64> {
    let [.., last, ahead] = &mut requests[..] else { return None };
    let is_ahead = ahead.frames.iter().all(|frame| wanted.binary_search(frame).is_err());
    // Neighbouring spans share a byte.
    let begins_behind = ahead.range.start <= last.range.end() && ahead.range.end() > last.range.end();
    if !is_ahead || !begins_behind {
        return None;
    }
    let waited = last.range.length;
    last.range = through(last.range.start, ahead.range);
    last.frames.append(&mut ahead.frames);
    requests.pop();
    Some(waited)
}

/// Says whether a request may grow to take in a further range, at most `gap` bytes behind its end.
fn fits(open: BlobRange, next: BlobRange, gap: u64, policy: &FetchPolicy) -> bool {
    let grown = through(open.start, next);
    next.start.0.saturating_sub(open.end().0) <= gap && grown.length <= policy.max_request_bytes
}

fn through(start: BlobOffset, last: BlobRange) -> BlobRange {
    BlobRange { start, length: last.end().0 - start.0 }
}

fn read_ahead(
    frames: &[Frame],
    last: FrameId,
    fetchable: impl Fn(FrameId) -> bool,
    policy: &FetchPolicy,
) -> Option<Request> {
    let budget = policy.read_ahead_bytes.min(policy.max_request_bytes);
    let mut ahead: Option<Request> = None;
    for (frame, id) in frames.iter().zip(0..).skip(last.0 as usize + 1) {
        let (id, range) = (FrameId(id), fetched_range(frame));
        let start = ahead.as_ref().map_or(range.start, |request| request.range.start);
        let grown = through(start, range);
        if grown.length > budget || !fetchable(id) {
            break;
        }
        ahead.get_or_insert_with(|| Request { range: grown, frames: Vec::new() }).frames.push(id);
        if let Some(request) = &mut ahead {
            request.range = grown;
        }
    }
    ahead
}

#[cfg(test)]
mod tests {
    use loris_format::index::Codec;
    use proptest::prelude::*;

    use super::*;

    fn frame(start: u64, length: u64) -> Frame {
        Frame { range: BlobRange { start: BlobOffset(start), length }, codec: Codec::Gzip, decoded_length: length }
    }

    fn ids(numbers: &[u32]) -> Vec<FrameId> {
        numbers.iter().copied().map(FrameId).collect()
    }

    #[test]
    fn neighbours_merge_and_strangers_do_not() {
        let frames = [frame(0, 100), frame(100, 100), frame(200, 100), frame(300, 100), frame(1000, 50)];
        let policy = |gap_bytes, max_request_bytes, read_ahead_bytes| FetchPolicy {
            gap_bytes,
            max_request_bytes,
            read_ahead_bytes,
            sequential_bytes: 0,
        };
        type Case = (&'static [u32], FetchPolicy, &'static [u32], Vec<(u64, u64, &'static [u32])>);
        // What is wanted, how, what else is on its way; then start, length and frames of the requests.
        let cases: Vec<Case> = vec![
            (&[], policy(0, 1000, 1000), &[], vec![]),
            (&[0, 1], policy(0, 1000, 0), &[], vec![(0, 200, &[0, 1])]),
            (&[0, 1], policy(0, 150, 0), &[], vec![(0, 100, &[0]), (100, 100, &[1])]),
            (&[0], policy(0, 10, 0), &[], vec![(0, 100, &[0])]),
            (&[0, 2], policy(99, 1000, 0), &[], vec![(0, 100, &[0]), (200, 100, &[2])]),
            (&[0, 2], policy(100, 1000, 0), &[], vec![(0, 300, &[0, 1, 2])]),
            (&[0, 2], policy(100, 1000, 0), &[1], vec![(0, 300, &[0, 2])]),
            (&[3, 4], policy(599, 2000, 0), &[], vec![(300, 100, &[3]), (1000, 50, &[4])]),
            (&[3, 4], policy(600, 2000, 0), &[], vec![(300, 750, &[3, 4])]),
            (&[0], policy(0, 1000, 250), &[], vec![(0, 100, &[0]), (100, 200, &[1, 2])]),
            (&[0], policy(0, 1000, 250), &[2], vec![(0, 100, &[0]), (100, 100, &[1])]),
            (&[0], policy(0, 1000, 250), &[1], vec![(0, 100, &[0])]),
            (&[0], policy(0, 1000, 99), &[], vec![(0, 100, &[0])]),
            (&[4], policy(0, 1000, 1000), &[], vec![(1000, 50, &[4])]),
        ];
        for (wanted, policy, busy, expected) in cases {
            let found = plan(&frames, &ids(wanted), |id| !busy.contains(&id.0), &policy);
            let expected: Vec<Request> = expected
                .into_iter()
                .map(|(start, length, frames)| Request {
                    range: BlobRange { start: BlobOffset(start), length },
                    frames: ids(frames),
                })
                .collect();
            assert_eq!(found, expected, "{wanted:?} {policy:?} {busy:?}");
        }
    }

    #[test]
    fn an_overlong_frame_is_fetched_as_far_as_its_content_can_reach() {
        let mut frame = frame(7, 1 << 40);
        frame.decoded_length = 10;
        assert_eq!(fetched_range(&frame), BlobRange { start: BlobOffset(7), length: (1 << 20) + 20 });
        frame.decoded_length = u64::MAX;
        assert_eq!(fetched_range(&frame), frame.range);
    }

    #[test]
    fn what_lies_ahead_comes_in_the_same_answer_where_it_stands_right_behind() {
        let frames = [frame(0, 100), frame(100, 100), frame(210, 100), frame(310, 100)];
        let policy = FetchPolicy { read_ahead_bytes: 150, ..FetchPolicy::EXACT };
        let planned = |wanted: &[u32]| {
            let wanted = ids(wanted);
            let mut requests = plan(&frames, &wanted, |_| true, &FetchPolicy { gap_bytes: 0, ..policy });
            let waited = go_on(&mut requests, &wanted);
            let ranges: Vec<_> = requests.iter().map(|request| (request.range.start.0, request.range.length)).collect();
            (ranges, requests.last().map_or(0, |request| request.frames.len()), waited)
        };
        assert_eq!(planned(&[0]), (vec![(0, 200)], 2, Some(100)));
        assert_eq!(planned(&[1]), (vec![(100, 100), (210, 100)], 1, None));
        assert_eq!(planned(&[0, 2]), (vec![(0, 100), (210, 200)], 2, Some(100)));
        assert_eq!(planned(&[2, 3]), (vec![(210, 200)], 2, None));
        assert_eq!(planned(&[1, 2]), (vec![(100, 100), (210, 200)], 2, Some(100)));
        assert_eq!(planned(&[]), (vec![], 0, None));
    }

    #[test]
    fn windows_are_as_long_as_they_may_be() {
        let frames = [frame(0, 100), frame(100, 100), frame(300, 100), frame(400, 900)];
        let all = ids(&[0, 1, 2, 3]);
        assert_eq!(windows(&frames, &all, 200), [ids(&[0, 1]), ids(&[2]), ids(&[3])]);
        assert_eq!(windows(&frames, &all, 1), [ids(&[0]), ids(&[1]), ids(&[2]), ids(&[3])]);
        assert_eq!(windows(&frames, &all, u64::MAX), std::slice::from_ref(&all));
        assert_eq!(window(&frames, &[], 1), 0);
    }

    fn any_frames() -> impl Strategy<Value = Vec<Frame>> {
        proptest::collection::vec((0u64..300, 1u64..500), 1..60).prop_map(|parts| {
            let mut at = 0;
            parts
                .into_iter()
                .map(|(gap, length)| {
                    let frame = frame(at + gap, length);
                    at = frame.range.end().0;
                    frame
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn requests_cover_what_is_wanted_within_the_policy(
            frames in any_frames(),
            wishes in proptest::collection::vec(0u8..3, 60),
            gap_bytes in 0u64..600,
            max_request_bytes in 1u64..3000,
            read_ahead_bytes in 0u64..2000,
        ) {
            let policy = FetchPolicy { gap_bytes, max_request_bytes, read_ahead_bytes, sequential_bytes: 0 };
            // 0: wanted, 1: fetchable, 2: here already.
            let all: Vec<FrameId> = (0..).map(FrameId).take(frames.len()).collect();
            let wanted: Vec<FrameId> = all.iter().copied().filter(|id| wishes[id.0 as usize] == 0).collect();
            let requests = plan(&frames, &wanted, |id| wishes[id.0 as usize] == 1, &policy);

            let listed: Vec<FrameId> = requests.iter().flat_map(|request| request.frames.iter().copied()).collect();
            prop_assert!(listed.is_sorted_by(|a, b| a < b), "repeated or out of order: {listed:?}");
            prop_assert!(wanted.iter().all(|id| listed.contains(id)));
            prop_assert!(listed.iter().all(|id| wishes[id.0 as usize] != 2));
            prop_assert!(requests.is_sorted_by(|a, b| a.range.end() <= b.range.start));
            let mut ahead = 0;
            for request in &requests {
                let ranges: Vec<BlobRange> =
                    request.frames.iter().map(|id| fetched_range(&frames[id.0 as usize])).collect();
                prop_assert_eq!(request.range.start, ranges[0].start);
                prop_assert_eq!(request.range.end(), ranges[ranges.len() - 1].end());
                prop_assert!(ranges.len() == 1 || request.range.length <= max_request_bytes);
                let asked: Vec<FrameId> =
                    request.frames.iter().copied().filter(|id| wanted.contains(id)).collect();
                if asked.is_empty() {
                    ahead += 1;
                    prop_assert!(request.range.length <= read_ahead_bytes);
                    prop_assert!(Some(&request.frames[0]) > wanted.last());
                } else {
                    // A request that someone waits for begins and ends with what was asked for.
                    prop_assert_eq!(asked[0], request.frames[0]);
                    prop_assert_eq!(asked.last(), request.frames.last());
                    for pair in asked.windows(2) {
                        let (a, b) = (fetched_range(&frames[pair[0].0 as usize]), frames[pair[1].0 as usize].range);
                        prop_assert!(b.start.0 - a.end().0 <= gap_bytes);
                    }
                }
            }
            prop_assert!(ahead <= 1);
        }
    }
}

//! Power failures, replayed: whatever of the writes that were not synced got lost, no bit counts whose data is not there.

use std::collections::HashMap;

use loris_format::{
    index::{
        LayerIndex,
        builder::{Attributes, IndexBuilder, MissingDigest, NewChunk, NewKind},
    },
    limits::Limits,
    position::{BlobOffset, FileOffset},
};
use proptest::prelude::*;

use super::*;
use crate::disk::recording::{Operation, record};

const EXTENTS: usize = 130;
/// What a disk writes at once.
const SECTOR: usize = 512;

fn content(extent: usize) -> Vec<u8> {
    let length = 1 + extent * 97 % 9000;
    (0..length).map(|at| u8::try_from(1 + (at * 31 + extent * 7) % 255).unwrap()).collect()
}

fn index() -> LayerIndex {
    let mut builder = IndexBuilder::new(BlobOffset(1 << 30), MissingDigest::Refuse, Limits::default());
    for (number, extent) in (0..).zip(0..EXTENTS) {
        let content = content(extent);
        let length = content.len() as u64;
        let kind = NewKind::Regular { size: length, digest: None };
        builder.push(number, format!("f{extent}").as_bytes(), Attributes::default(), kind).unwrap();
        let chunk = NewChunk {
            file_offset: FileOffset(0),
            length,
            frame: BlobOffset(number * 100_000),
            frame_offset: 0,
            digest: Some(Digest::sha256_of(&content)),
        };
        builder.chunk(number, chunk).unwrap();
    }
    builder.finish().unwrap()
}

#[derive(Clone, Debug)]
enum Step {
    Fill(Vec<usize>),
    Sync,
    Forget(Vec<usize>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let some = || prop::collection::vec(0..EXTENTS, 1..20);
    let step = prop_oneof![3 => some().prop_map(Step::Fill), 1 => Just(Step::Sync), 1 => some().prop_map(Step::Forget)];
    prop::collection::vec(step, 1..12)
}

/// What a file may look like after a power failure: of each sector, any of what was written to it since the last sync, or
/// what it was before.
fn after_loss(operations: &[Operation], of: u64, length: usize, random: &mut impl FnMut() -> usize) -> Vec<u8> {
    let mut synced = vec![0; length];
    let mut since: HashMap<usize, Vec<[u8; SECTOR]>> = HashMap::new();
    let mut latest = synced.clone();
    for operation in operations {
        match operation {
            Operation::Write { inode, at, bytes } if *inode == of => {
                let at = usize::try_from(*at).unwrap();
                latest[at..at + bytes.len()].copy_from_slice(bytes);
                for sector in at / SECTOR..(at + bytes.len()).div_ceil(SECTOR) {
                    let written = latest[sector * SECTOR..][..SECTOR].try_into().unwrap();
                    since.entry(sector).or_default().push(written);
                }
            }
            Operation::Sync { inode } if *inode == of => {
                synced.copy_from_slice(&latest);
                since.clear();
            }
            _ => {}
        }
    }
    let mut sectors: Vec<_> = since.into_iter().collect();
    sectors.sort_unstable_by_key(|(sector, _)| *sector);
    for (sector, versions) in sectors {
        if let Some(kept) = versions.get(random() % (versions.len() + 1)) {
            synced[sector * SECTOR..][..SECTOR].copy_from_slice(kept);
        }
    }
    synced
}

fn memory_file(bytes: &[u8]) -> File {
    let file = File::from(rustix::fs::memfd_create("filled", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// Returns how many bits counted, over all cuts.
fn replay(steps: &[Step], seed: u64) -> Result<usize, TestCaseError> {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let layer = directory.path().join("layers/b/t");
    let index = index();
    let blob = Digest::sha256_of(b"blob");
    let mut inodes = [0; 2];
    let mut operations = record(|| {
        let cache = LayerCache::open(&layer, &blob, &index, None, &store).unwrap();
        inodes = ["data", "filled"].map(|name| layer.join(name).metadata().unwrap().ino());
        for step in steps {
            match step {
                Step::Fill(extents) => {
                    for &extent in extents {
                        cache.write(index.extents()[extent].data, &content(extent)).unwrap();
                    }
                    cache.publish(extents.iter().copied(), 1).unwrap();
                }
                Step::Sync => cache.sync().unwrap(),
                // What is forgotten is wrong, and gets overwritten.
                Step::Forget(extents) => cache.forget(extents).unwrap(),
            }
        }
    });
    operations.push(Operation::Sync { inode: 0 });
    let expected = |boot| Expected {
        blob: sha256(blob.to_string().as_bytes()),
        layout: layout(&index),
        extents: EXTENTS as u64,
        data_length: index.data_length(),
        boot,
    };
    let lengths = ["data", "filled"].map(|name| usize::try_from(layer.join(name).metadata().unwrap().len()).unwrap());
    let mut state = seed | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 20) as usize
    };
    let mut counted = 0;
    for cut in 0..operations.len() {
        let before = &operations[..cut];
        // Killed: everything that was written is there. And without power, which loses what was not synced.
        for killed in [true, false] {
            let mut state_of = |file: usize| {
                if killed {
                    let mut whole = before.to_vec();
                    whole.push(Operation::Sync { inode: inodes[file] });
                    after_loss(&whole, inodes[file], lengths[file], &mut || 0)
                } else {
                    after_loss(before, inodes[file], lengths[file], &mut random)
                }
            };
            let (data, filled) = (state_of(0), state_of(1));
            let boot = if killed { BootId::current() } else { BootId([9; 16]) };
            let header = expected(boot).header(inodes[0]);
            // What is no bitmap is thrown away with the data.
            let Loaded::Usable(map) = FilledMap::load(memory_file(&filled), &header, true).unwrap() else { continue };
            for extent in (0..EXTENTS).filter(|&extent| map.contains(extent)) {
                let start = usize::try_from(index.extents()[extent].data.0).unwrap();
                let right = content(extent);
                prop_assert!(data[start..start + right.len()] == right, "cut {cut}, killed {killed}: extent {extent}");
                counted += 1;
            }
        }
    }
    Ok(counted)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    #[test]
    fn no_cut_leaves_a_bit_without_its_data(steps in steps(), seed in any::<u64>()) {
        replay(&steps, seed)?;
    }
}

#[test]
fn what_was_synced_is_kept() {
    let steps = [Step::Fill((0..EXTENTS).collect()), Step::Sync, Step::Fill(vec![1]), Step::Forget(vec![2, 3])];
    assert!(replay(&steps, 1).unwrap() >= EXTENTS);
}

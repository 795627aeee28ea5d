//! Any bytes as the table of contents of a layer: an error or a sound index, whose trees can be walked; and a table that
//! was read is the same when it is written and read again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loris_format::{
    estargz::{
        open,
        toc::{self, TocError, TocWriter},
    },
    index::{Codec, NodeKind},
    limits::Limits,
    opening::Trust,
    position::BlobOffset,
    tree::{InodeId, LayerNumber, OpaqueStyle, Tree},
};

const PAYLOAD_END: BlobOffset = BlobOffset(1 << 20);

fuzz_target!(|json: &[u8]| {
    let limits = Limits { entries: 1000, depth: 64, ..Limits::default() };
    let mut writer = TocWriter::new();
    let mut entries = Vec::new();
    let read = toc::read(json, &limits, |_, entry| {
        writer.push(&entry);
        entries.push(entry);
        Ok::<_, TocError>(())
    });
    if read.is_ok() {
        let written = writer.finish();
        let mut again = Vec::new();
        let read = toc::read(&written, &limits, |_, entry| {
            again.push(entry);
            Ok::<_, TocError>(())
        });
        assert!(read.is_ok(), "{}", written.escape_ascii());
        for (one, other) in entries.iter_mut().zip(&again) {
            // Written in order, and each name once.
            one.xattrs.clone_from(&other.xattrs);
        }
        assert_eq!(entries, again);
    }
    let Ok((index, _)) = open::index(json, PAYLOAD_END, Codec::Gzip, Trust::Optional, &limits) else { return };
    for extent in index.extents() {
        let frame = &index.frames()[extent.frame.0 as usize];
        assert!(frame.range.end() <= PAYLOAD_END && extent.frame_offset + extent.length <= frame.decoded_length);
    }
    for node in index.nodes() {
        if let NodeKind::Regular(content) = &node.kind {
            let end = content.data.checked_add(content.size).expect("the data file is as long");
            let extents = &index.extents()[index.extents_in(&(content.data..end))];
            assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), content.size);
        }
    }
    for tree in [
        Tree::merged(&[&index, &index]),
        Tree::of_layer(&index, LayerNumber(0), OpaqueStyle::Both),
    ] {
        let mut waiting = vec![InodeId::ROOT];
        let mut reached = 0;
        while let Some(id) = waiting.pop() {
            reached += 1;
            waiting.extend(tree.children(id).iter().map(|(_, child)| *child));
            for (name, _) in tree.children(id) {
                let _ = tree.resolve(name);
            }
        }
        assert!(reached >= tree.inodes().count());
    }
});

//! Tables of contents that lie about where content is and how much: each verb says which layer and where in it, and
//! leaves nothing.
#![expect(clippy::ptr_arg, reason = "one of the lies takes an entry away, and all have one type")]

use std::path::Path;

use loris_testkit::require_fuse;
use serde_json::{Value, json};

use crate::{
    bad_input::{is_refused, name_of, put_toc, replace_toc},
    harness::{Place, run},
    image::{self, BIG},
    layout,
    ours_to_peers::convert,
};

/// The layer with the file of several chunks, and that file's entry and its chunks.
const LAYER: usize = 0;

/// Changes the entries of a table of contents, and returns what has to be said of it.
type Lie = fn(&mut Vec<Value>) -> Vec<String>;

/// Returns the file's entry (0) or a further chunk of it.
fn chunk(entries: &mut [Value], number: usize) -> &mut Value {
    entries.iter_mut().filter(|entry| entry["name"] == BIG).nth(number).expect("a file of several chunks")
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

fn overlapping_chunks(entries: &mut Vec<Value>) -> Vec<String> {
    let second = chunk(entries, 1);
    let expected = number(&second["chunkOffset"]);
    second["chunkOffset"] = json!(expected - 1);
    vec![BIG.into(), format!("chunk begins at {} of the file instead of {expected}", expected - 1)]
}

fn missing_chunk(entries: &mut Vec<Value>) -> Vec<String> {
    let offsets = [1, 2].map(|chunk_number| number(&chunk(entries, chunk_number)["chunkOffset"]));
    let place = entries.iter().position(|entry| entry["chunkOffset"] == offsets[0]).unwrap();
    entries.remove(place);
    vec![BIG.into(), format!("chunk begins at {} of the file instead of {}", offsets[1], offsets[0])]
}

fn chunks_of_one_frame(entries: &mut Vec<Value>) -> Vec<String> {
    let offset = chunk(entries, 0)["offset"].clone();
    chunk(entries, 1)["offset"] = offset.clone();
    vec![BIG.into(), format!("overlaps with that of another entry in the frame at {offset} of the blob")]
}

fn files_of_one_frame(entries: &mut Vec<Value>) -> Vec<String> {
    let offset = chunk(entries, 0)["offset"].clone();
    let other = entries.iter_mut().find(|entry| entry["name"] == "data/zeros").unwrap();
    other["offset"] = offset.clone();
    vec![format!("overlaps with that of another entry in the frame at {offset} of the blob")]
}

fn bomb(entries: &mut Vec<Value>) -> Vec<String> {
    let one = entries.iter_mut().find(|entry| entry["name"] == "data/one").unwrap();
    one["size"] = json!(200 << 20);
    one["chunkSize"] = json!(200 << 20);
    vec!["data/one".into(), format!("frame at {} of the blob cannot hold {} bytes in ", one["offset"], 200 << 20)]
}

fn frame_beyond_memory(entries: &mut Vec<Value>) -> Vec<String> {
    let one = entries.iter_mut().find(|entry| entry["name"] == "data/one").unwrap();
    one["size"] = json!(1_u64 << 39);
    one["chunkSize"] = json!(1_u64 << 39);
    vec!["data/one".into(), format!("frame at {} of the blob has more than {} bytes", one["offset"], 256 << 20)]
}

fn file_beyond_the_blob(entries: &mut Vec<Value>) -> Vec<String> {
    let one = entries.iter_mut().find(|entry| entry["name"] == "data/one").unwrap();
    one["offset"] = json!(1_u64 << 41);
    vec!["data/one".into(), format!("content at {} of the blob lies behind the end of content at ", 1_u64 << 41)]
}

fn chunk_beyond_the_blob(entries: &mut Vec<Value>) -> Vec<String> {
    chunk(entries, 2)["offset"] = json!(u64::MAX);
    vec![BIG.into(), format!("content at {} of the blob lies behind the end of content at ", u64::MAX)]
}

fn inside_of_a_frame_beyond_its_end(entries: &mut Vec<Value>) -> Vec<String> {
    let one = entries.iter_mut().find(|entry| entry["name"] == "data/one").unwrap();
    one["innerOffset"] = json!(u64::MAX);
    vec!["data/one".into(), format!("frame at {} of the blob has more than {} bytes", one["offset"], 256 << 20)]
}

#[test]
fn lies_about_content_are_refused_with_layer_and_offset() {
    let test = "lies_about_content_are_refused_with_layer_and_offset";
    let Some(small) = image::small(test) else { return };
    if !require_fuse(test) {
        return;
    }
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let cases: [(&str, Lie); 9] = [
        ("overlapping-chunks", overlapping_chunks),
        ("missing-chunk", missing_chunk),
        ("chunks-of-one-frame", chunks_of_one_frame),
        ("files-of-one-frame", files_of_one_frame),
        ("bomb", bomb),
        ("frame-beyond-memory", frame_beyond_memory),
        ("file-beyond-the-blob", file_beyond_the_blob),
        ("chunk-beyond-the-blob", chunk_beyond_the_blob),
        ("inside-of-a-frame", inside_of_a_frame_beyond_its_end),
    ];
    for (name, lie) in cases {
        println!("{name}");
        let layout = place.join(name);
        layout::copy(&converted, &layout);
        let mut said = Vec::new();
        replace_toc(&layout, LAYER, |entries| said = lie(entries));
        refused(&layout, &said);
        std::fs::remove_dir_all(&layout).unwrap();
    }
    place.assert_clean();
}

/// [`is_refused`], with the layer's digest.
fn refused(layout: &Path, said: &[String]) {
    let layer = layout::layers(layout)[LAYER].clone();
    is_refused(layout, &[&[layer.as_str()], &said.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat());
}

#[test]
fn tables_of_contents_that_are_bombs_are_refused() {
    let test = "tables_of_contents_that_are_bombs_are_refused";
    let Some(small) = image::small(test) else { return };
    if !require_fuse(test) {
        return;
    }
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    for (name, stated, said) in [
        (
            "too-large",
            (1 << 30) + 1,
            format!("table of contents has {} bytes, which is beyond the limit", (1 << 30) + 1),
        ),
        ("too-dense", 900 << 20, format!("bytes of gzip cannot hold {} bytes", 900 << 20)),
        ("cut-off", 60_000, "the tar entry is cut off".to_owned()),
    ] {
        println!("{name}");
        let layout = place.join(name);
        layout::copy(&converted, &layout);
        put_toc(&layout, LAYER, br#"{"version":1,"entries":[]}"#, Some(stated));
        refused(&layout, &[said]);
    }

    // More entries than a layer may have, each as short as it can be.
    let layout = place.join("too-many");
    layout::copy(&converted, &layout);
    let entry = br#"{"type":"dir"},"#;
    let mut table = br#"{"version":1,"entries":["#.to_vec();
    table.extend(entry.iter().cycle().take(entry.len() * 8_000_001));
    table.pop();
    table.extend(b"]}");
    put_toc(&layout, LAYER, &table, None);
    let layer = layout::layers(&layout)[LAYER].clone();
    let at = place.make("mnt");
    let mut mount = place.loris("mount");
    run(mount.arg(name_of(&layout)).arg(&at)).failed(1, &[&layer, "more than 8000000 entries"]);
    place.assert_clean();
}

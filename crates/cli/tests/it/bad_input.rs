//! Bytes that are not what they should be, registries that lie, command lines that are wrong.

use std::{
    fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use flate2::{Compression, read::GzDecoder, write::GzEncoder};
use loris_testkit::{
    registry::{Effect, Fault, FaultRegistry},
    require_fuse,
};
use serde_json::{Value, json};

use crate::{
    harness::{Place, containers, ok, run},
    image::{self, BIG},
    layout::{self, TOC_DIGEST},
    ours_to_peers::convert,
};

/// Exit status of `loris run` where no container was started, as `docker run` has it.
const NOT_STARTED: i32 = 125;
const FOOTER_BYTES: usize = 51;

pub fn name_of(layout: &Path) -> String {
    format!("oci:{}:t", layout.display())
}

/// Reads the table of contents of an eStargz blob, and where it starts.
fn toc(blob: &[u8]) -> (usize, Value) {
    let footer = &blob[blob.len() - FOOTER_BYTES..];
    let digits = std::str::from_utf8(&footer[16..32]).unwrap();
    let offset = usize::from_str_radix(digits, 16).unwrap();
    let mut archive = Vec::new();
    GzDecoder::new(&blob[offset..]).read_to_end(&mut archive).unwrap();
    let size = std::str::from_utf8(&archive[124..135]).unwrap();
    let size = usize::from_str_radix(size, 8).unwrap();
    (offset, serde_json::from_slice(&archive[512..512 + size]).unwrap())
}

/// A change to the entries of a table of contents.
type Change = Box<dyn FnOnce(&mut Vec<Value>)>;

/// Puts another table of contents into a layer of a layout, with all digests right.
pub fn replace_toc(layout: &Path, number: usize, change: impl FnOnce(&mut Vec<Value>)) {
    let digest = &layout::layers(layout)[number];
    let blob = fs::read(layout::blob_path(layout, digest)).unwrap();
    let (_, mut table) = toc(&blob);
    change(table["entries"].as_array_mut().unwrap());
    put_toc(layout, number, &serde_json::to_vec(&table).unwrap(), None);
}

/// Puts a text in the place of a layer's table of contents, with all digests right. `stated`: what its tar header says
/// of its size.
pub fn put_toc(layout: &Path, number: usize, table: &[u8], stated: Option<usize>) {
    let digest = &layout::layers(layout)[number];
    let blob = fs::read(layout::blob_path(layout, digest)).unwrap();
    let (offset, _) = toc(&blob);
    let mut header = [0; 512];
    header[..17].copy_from_slice(b"stargz.index.json");
    header[100..108].copy_from_slice(b"0000644\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", stated.unwrap_or(table.len())).as_bytes());
    header[148..156].copy_from_slice(b"        ");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut archive = [&header[..], table].concat();
    archive.resize(archive.len().next_multiple_of(512) + 1024, 0);
    let mut encoder = GzEncoder::new(blob[..offset].to_vec(), Compression::fast());
    encoder.write_all(&archive).unwrap();
    let mut changed = encoder.finish().unwrap();
    changed.extend_from_slice(&blob[blob.len() - FOOTER_BYTES..]);
    layout::replace_layer(layout, number, &changed, &layout::digest(table));
}

#[test]
fn a_flipped_byte_fails_its_own_read_and_no_other() {
    let test = "a_flipped_byte_fails_its_own_read_and_no_other";
    let Some(small) = image::small(test) else { return };
    if !require_fuse(test) {
        return;
    }
    let place = Place::new();
    let layout = convert(&place, small, "converted", &[]);
    let sound = place.mount(&name_of(&layout));
    let expected = fs::read(sound.at.join(BIG)).unwrap();
    let mut others = Vec::new();
    for entry in loris_testkit::tree::facts(&sound.at, Default::default()).unwrap() {
        if entry.1.kind == "file" && entry.0 != Path::new(BIG) {
            others.push((fs::read(sound.at.join(&entry.0)).unwrap(), entry.0));
        }
    }
    assert!(others.len() > 10);
    sound.unmount();

    // A byte in the middle of the second chunk.
    let layer = layout::layers(&layout)[0].clone();
    let file = layout::blob_path(&layout, &layer);
    let mut blob = fs::read(&file).unwrap();
    let (_, table) = toc(&blob);
    let chunks: Vec<_> = table["entries"].as_array().unwrap().iter().filter(|entry| entry["name"] == BIG).collect();
    assert!(chunks.len() > 2, "{chunks:?}");
    let offset = usize::try_from(chunks[1]["offset"].as_u64().unwrap()).unwrap();
    let (start, length) = (chunks[1]["chunkOffset"].as_u64().unwrap(), chunks[1]["chunkSize"].as_u64().unwrap());
    blob[offset + 1_000_000] ^= 1;
    fs::write(&file, blob).unwrap();

    let fresh = Place::new();
    let mounted = fresh.mount(&name_of(&layout));
    let big = fs::File::open(mounted.at.join(BIG)).unwrap();
    let mut buffer = vec![0; 4096];
    let error = std::os::unix::fs::FileExt::read_at(&big, &mut buffer, start + length / 2).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()), "{error}");
    // The chunks before and after it are as good as ever.
    let end = start + length;
    for at in [0, start / 2, end, expected.len() as u64 - 4096] {
        std::os::unix::fs::FileExt::read_exact_at(&big, &mut buffer, at).unwrap();
        let at = usize::try_from(at).unwrap();
        assert!(buffer == expected[at..at + 4096], "at {at}");
    }
    assert!(fs::read(mounted.at.join(BIG)).is_err());
    for (content, path) in &others {
        assert!(fs::read(mounted.at.join(path)).unwrap() == *content, "{}", path.display());
    }
    drop(big);
    mounted.unmount();
    let other = Place::new();
    run(other.loris("fs cat").arg(name_of(&layout)).arg(BIG)).failed(1, &[&layer, BIG]);
    ok(other.loris("fs cat").arg(name_of(&layout)).arg("data/one"));
}

/// No verb takes the layout's image, each says why, and nothing is left. `fs ls`, `mount` and `run` fail; `inspect`
/// shows what is wrong with the layer.
pub fn is_refused(layout: &Path, said: &[&str]) {
    let name = name_of(layout);
    let place = Place::new();
    run(place.loris("fs ls").arg(&name)).failed(1, said);
    run(place.loris("fs cat").arg(&name).arg("data/one")).failed(1, said);
    let at = place.make("mnt");
    run(place.loris("mount").arg(&name).arg(&at)).failed(1, said);
    {
        let _alone = containers();
        run(place.loris("run --net none").args([&name, "/bin/sh", "-c", "true"])).failed(NOT_STARTED, said);
    }
    let inspected = run(place.loris("inspect").arg(&name));
    let told = format!("{}{}", inspected.text(), inspected.stderr);
    assert!(said.last().is_some_and(|reason| told.contains(reason)), "{said:?}: {inspected}");
    assert!(matches!(inspected.status.code(), Some(0 | 1)), "{inspected}");
    place.assert_clean();
}

#[test]
fn hostile_tables_of_contents_are_refused() {
    let test = "hostile_tables_of_contents_are_refused";
    let Some(small) = image::small(test) else { return };
    if !require_fuse(test) {
        return;
    }
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let file = |entries: &mut [Value], key: &str, value: Value| {
        let entry = entries.iter_mut().find(|entry| entry["name"] == "changes").expect("a file in the layer");
        entry[key] = value;
    };
    let cases: Vec<(&str, Change, &str)> = vec![
        ("huge", Box::new(move |e| file(e, "size", json!(1_u64 << 50))), "changes"),
        ("negative", Box::new(move |e| file(e, "size", json!(-1))), "negative"),
        ("outside", Box::new(move |e| file(e, "offset", json!(1_u64 << 40))), "changes"),
        ("wraps", Box::new(move |e| file(e, "offset", json!(i64::MAX))), "changes"),
        (
            "itself",
            Box::new(|e| e.push(json!({"name": "loop", "type": "hardlink", "linkName": "loop", "mode": 420}))),
            "loop",
        ),
        (
            "cycle",
            Box::new(|e| {
                e.push(json!({"name": "x1", "type": "hardlink", "linkName": "x2", "mode": 420}));
                e.push(json!({"name": "x2", "type": "hardlink", "linkName": "x1", "mode": 420}));
            }),
            "x1",
        ),
        ("nul", Box::new(|e| e.push(json!({"name": "a\u{0}b", "type": "dir", "mode": 493}))), "table of contents"),
        ("kind", Box::new(move |e| file(e, "type", json!("reg2"))), "reg2"),
        ("no-digest", Box::new(move |e| file(e, "chunkDigest", json!("sha256:00"))), "sha256:00"),
        ("chunk", Box::new(|e| e.insert(0, json!({"name": "q", "type": "chunk", "chunkOffset": 5}))), "entry 0"),
    ];
    for (name, change, said) in cases {
        let layout = place.join(name);
        layout::copy(&converted, &layout);
        replace_toc(&layout, 1, change);
        println!("{name}");
        let layer = layout::layers(&layout)[1].clone();
        is_refused(&layout, &[&layer, said]);
    }
    // Names that climb stay below the image's root.
    let layout = place.join("climbs");
    layout::copy(&converted, &layout);
    replace_toc(&layout, 1, |entries| {
        entries.push(json!({"name": "../a/../../b", "type": "dir", "mode": 0o755}));
        entries.push(json!({"name": "/../../etc/c", "type": "symlink", "linkName": "../../../../d", "mode": 0o777}));
    });
    let listed = ok(place.loris("fs ls -R").arg(name_of(&layout))).text();
    assert!(listed.lines().any(|line| line == "b") && listed.lines().any(|line| line == "etc/c"), "{listed}");
    assert!(!listed.contains(".."), "{listed}");
    // The way in which the others are made is not what is refused.
    let layout = place.join("unchanged");
    layout::copy(&converted, &layout);
    replace_toc(&layout, 1, |_| {});
    ok(place.loris("fs cat").arg(name_of(&layout)).arg("changes"));
}

#[test]
fn broken_blobs_are_refused() {
    let test = "broken_blobs_are_refused";
    let Some(small) = image::small(test) else { return };
    if !require_fuse(test) {
        return;
    }
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    type Break = fn(&mut Vec<u8>);
    let cases: [(&str, Break); 4] = [
        ("points-past-its-end", |blob| set_offset(blob, "00000000ffffffff")),
        ("points-into-content", |blob| set_offset(blob, "0000000000000005")),
        ("is-no-number", |blob| set_offset(blob, "zzzzzzzzzzzzzzzz")),
        ("flipped-in-the-table", |blob| {
            let at = toc(blob).0 + 40;
            blob[at] ^= 0x10;
        }),
    ];
    for (name, break_it) in cases {
        let layout = place.join(name);
        layout::copy(&converted, &layout);
        let digest = layout::layers(&layout)[1].clone();
        let mut blob = fs::read(layout::blob_path(&layout, &digest)).unwrap();
        break_it(&mut blob);
        println!("{name}");
        let annotation = layout::manifest(&layout)["layers"][1]["annotations"][TOC_DIGEST].as_str().unwrap().to_owned();
        layout::replace_layer(&layout, 1, &blob, &annotation);
        let layer = layout::layers(&layout)[1].clone();
        is_refused(&layout, &[&layer]);
    }
    // Shorter than its manifest says, without a new digest: a download or a disk that broke.
    let layout = place.join("truncated");
    layout::copy(&converted, &layout);
    let digest = layout::layers(&layout)[1].clone();
    let path = layout::blob_path(&layout, &digest);
    let blob = fs::read(&path).unwrap();
    fs::write(&path, &blob[..blob.len() / 2]).unwrap();
    is_refused(&layout, &[&digest]);
    // And converting it again leaves no half of an image.
    let to = place.join("again");
    run(place.loris("convert --estargz").arg(name_of(&layout)).arg(name_of(&to))).failed(1, &[&digest]);
    let left = fs::read_to_string(to.join("index.json")).unwrap_or_default();
    assert!(!left.contains("sha256:"), "{left}");
    place.assert_clean();
}

fn set_offset(blob: &mut [u8], digits: &str) {
    let start = blob.len() - FOOTER_BYTES + 16;
    blob[start..start + 16].copy_from_slice(digits.as_bytes());
}

#[test]
fn registries_that_lie_get_no_wrong_byte_through() {
    let test = "registries_that_lie_get_no_wrong_byte_through";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let expected = ok(place.loris("fs cat").arg(name_of(&converted)).arg(BIG)).stdout;
    // The layer with the file: what else is opened is not what is tested.
    let layer = layout::layers(&converted)[0].clone();
    let wrong = fs::read(layout::blob_path(&converted, &layout::layers(&converted)[1])).unwrap();
    let blobs = format!("/blobs/{layer}");
    for (name, effect, times) in [
        ("whole for a range", Effect::IgnoreRange, 1),
        ("whole for every range", Effect::IgnoreRange, usize::MAX),
        ("truncated", Effect::Truncate(1000), 3),
        ("reset", Effect::Reset(50_000), 2),
        ("too many requests", Effect::RetryAfter(429, "0".to_owned()), 2),
        ("server trouble", Effect::Status(503), 2),
        ("refused in mid-read", Effect::Unauthorized, 1),
        ("another range", Effect::ShiftRange(7), 1),
        ("bytes of another range", Effect::ShiftBytes(7), 1),
        ("another blob", Effect::WrongContent(wrong.into()), 1),
        ("a flipped bit", Effect::FlipBit(20_000), 1),
        ("never right", Effect::ShiftBytes(7), usize::MAX),
    ] {
        let registry = runtime.block_on(FaultRegistry::start());
        let image = registry.reference("t");
        ok(place.loris("push --quiet").arg(&converted).arg(&image));
        registry.forget_requests();
        // The first request for the layer gets its table of contents; the fault comes in the middle of the reading.
        registry.fault(Fault::new(effect.clone()).method("GET").path(&blobs).skip(1).times(times));
        let fresh = Place::new();
        let ran = run(fresh.loris("fs cat").arg(&image).arg(BIG));
        println!("{name}: {}", ran.status);
        // One odd answer is asked about again.
        assert!(ran.status.success() || !matches!((&effect, times), (Effect::IgnoreRange | Effect::ShiftRange(_), 1)));
        if ran.status.success() {
            assert!(ran.stdout == expected, "{name}: wrong bytes");
            assert_ne!(times, usize::MAX, "{name}: where did the bytes come from?");
        } else {
            assert!(expected.starts_with(&ran.stdout), "{name}: wrong bytes before the error");
            ran.failed(1, &[&layer]);
        }
        if times != usize::MAX {
            let left = registry.faults_left();
            assert_eq!(left, Vec::<String>::new(), "{name}: has not happened");
            // A lie is not kept: the next reading is right.
            let again = ok(fresh.loris("fs cat").arg(&image).arg(BIG));
            assert!(again.stdout == expected, "{name}: wrong bytes the second time");
        }
        fresh.assert_clean();
    }
}

#[test]
fn wrong_command_lines_and_unverified_layers_have_their_own_statuses() {
    let test = "wrong_command_lines_and_unverified_layers_have_their_own_statuses";
    let place = Place::new();
    for arguments in [
        &["no-such-verb"][..],
        &["mount"],
        &["mount", "--rw", "--upper", "x", "image", "dir"],
        &["fs"],
        &["fs", "cat", "image"],
        &["convert", "--estargz", "only-one"],
        &["convert", "--estargz", "--estargz-compression-level", "99", "a", "b"],
        &["run"],
        &["inspect", "--no-such-option", "image"],
    ] {
        let mut command = place.command(crate::harness::LORIS);
        let ran = run(command.args(arguments)).failed(2, &[]);
        assert!(!ran.stderr.is_empty(), "{ran}");
    }
    run(place.loris("inspect").arg("oci:/no/such/layout:t")).failed(1, &["/no/such/layout"]);

    let Some(small) = image::small(test) else { return };
    let layout = convert(&place, small, "converted", &[]);
    layout::edit_manifest(&layout, |manifest| {
        manifest["layers"][1]["annotations"].as_object_mut().unwrap().remove(TOC_DIGEST);
    });
    let layer = layout::layers(&layout)[1].clone();
    let at: PathBuf = place.make("mnt");
    let name = name_of(&layout);
    run(place.loris("fs ls").arg(&name)).failed(3, &[&layer, "--allow-unverified"]);
    run(place.loris("fs cat").args([&name, "changes"])).failed(3, &[&layer]);
    run(place.loris("mount").arg(&name).arg(&at)).failed(3, &[&layer]);
    let report = ok(place.loris("inspect --json").arg(&name)).json();
    assert_eq!((&report["lazy"], &report["layers"][0]["lazy"]), (&json!(false), &json!(true)), "{report}");
    let read = ok(place.loris("fs cat --allow-unverified").args([&name, "changes"]));
    assert_eq!(read.text(), "after, and longer");
    place.assert_clean();
}

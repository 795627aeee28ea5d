//! Mounts by each engine, as users make them; and what `doctor` says about the engines.

use std::{fs, time::Duration};

use loris_testkit::require_fuse;

use crate::{
    harness::{LIMIT, Place, containers, mounted_in, ok, run},
    image, layout,
    ours_to_peers::{assert_same, convert, unpacked_facts},
};

/// The engines that `doctor` says work in a place; of each other one it is said that the test is skipped for it.
fn engines(test: &str, place: &Place) -> Vec<String> {
    let report = ok(&mut place.loris("doctor --json")).json();
    let mut working = Vec::new();
    for engine in report["engines"].as_array().unwrap() {
        let name = engine["name"].as_str().unwrap();
        if engine["works"] == true {
            working.push(name.to_owned());
        } else {
            loris_testkit::skip(&format!("{test} ({name})"), engine["reason"].as_str().unwrap());
        }
    }
    working
}

#[test]
fn the_doctor_tells_what_works_and_leaves_nothing() {
    let place = Place::new();
    let before = fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    let text = ok(&mut place.loris("doctor")).text();
    for said in ["kernel", "store", "fanotify", "erofs-fuse", "mount --rw and run, as root", "mount, as a user"] {
        assert!(text.contains(said), "{said:?} is not in {text}");
    }
    let report = ok(&mut place.loris("doctor --json")).json();
    let names: Vec<_> = report["engines"].as_array().unwrap().iter().map(|engine| &engine["name"]).collect();
    assert_eq!(names, ["fanotify", "erofs-fuse", "erofs-loop", "fuse"]);
    for engine in report["engines"].as_array().unwrap() {
        assert_eq!(engine["works"] == false, engine["remedy"].is_string(), "{engine}");
    }
    assert_eq!(report["cases"].as_array().unwrap().len(), 3);
    let left: Vec<_> = fs::read_dir(place.join("cache")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["version"]);
    place.assert_clean();
    // Other tests mount and unmount meanwhile; a probe would leave something without a place.
    let after = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(after.lines().count() <= before || !after.contains("/proc/self/fd/"), "{after}");
}

#[test]
fn every_engine_shows_the_image() {
    let test = "every_engine_shows_the_image";
    if !require_fuse(test) {
        return;
    }
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let name = format!("oci:{}:t", converted.display());
    let expected = unpacked_facts(&layout::unpack(small, "t", &place.join("bundle")));
    for engine in engines(test, &place) {
        // The first has nothing, the second finds all that the first has read.
        for round in 0..2 {
            let at = place.make(&format!("{engine}-{round}"));
            let mut command = place.loris("mount");
            command
                .args(["--engine", &engine, &name])
                .arg(&at)
                .env("LORIS_CACHE_DIR", place.join(&format!("c-{engine}")));
            ok(&mut command);
            assert_same(&expected, &unpacked_facts(&at));
            let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
            let line = table.lines().find(|line| line.split(' ').nth(4) == at.to_str()).unwrap();
            assert_eq!(line.contains(" - erofs "), engine != "fuse", "{line}");
            ok(place.loris("umount").arg(&at));
            place.assert_clean();
        }
    }
}

#[test]
fn a_killed_server_never_shows_zeros_and_is_cleaned_up() {
    let test = "a_killed_server_never_shows_zeros_and_is_cleaned_up";
    if !require_fuse(test) {
        return;
    }
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let name = format!("oci:{}:t", converted.display());
    let content = fs::read(layout::unpack(small, "t", &place.join("bundle")).join(image::BIG)).unwrap();
    for engine in engines(test, &place).into_iter().filter(|engine| engine != "fanotify") {
        for flags in [&[][..], &["--rw"]] {
            let at = place.make(&format!("{engine}{}", flags.concat()));
            let mut command = place.loris("mount --foreground --quiet --engine");
            command
                .arg(&engine)
                .args(flags)
                .arg(&name)
                .arg(&at)
                .env("LORIS_CACHE_DIR", place.join(&format!("c-{engine}")));
            let mut server = command.spawn().unwrap();
            let end = std::time::Instant::now() + LIMIT;
            while !mounted_in(place.path()).contains(&at) && std::time::Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            server.kill().unwrap();
            server.wait().unwrap();
            match fs::read(at.join(image::BIG)) {
                Ok(read) => assert!(read == content, "{engine} {flags:?}: not what is in the image"),
                Err(error) => assert!(matches!(error.raw_os_error(), Some(5 | 107)), "{engine} {flags:?}: {error}"),
            }
            ok(place.loris("umount").arg(&at));
            place.assert_clean();
        }
    }
}

#[test]
fn containers_run_by_every_engine() {
    let test = "containers_run_by_every_engine";
    if !require_fuse(test) {
        return;
    }
    let Some(small) = image::small(test) else { return };
    let _alone = containers();
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let name = format!("oci:{}:t", converted.display());
    for engine in engines(test, &place) {
        let mut command = place.loris("run --net none --engine");
        command.args([&engine, &name]).env("LORIS_CACHE_DIR", place.join(&format!("c-{engine}")));
        assert_eq!(ok(&mut command).text(), image::GREETING, "{engine}");
        place.assert_clean();
    }
}

#[test]
fn an_engine_that_is_none() {
    let place = Place::new();
    run(place.loris("mount --engine loop image:t").arg(place.path())).failed(2, &["loop", "fanotify", "erofs-fuse"]);
}

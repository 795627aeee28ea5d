//! What somebody finds who uses the program for the first time: names, hints, statuses.

use std::fs;

use serde_json::Value;

use crate::{
    bad_input::name_of,
    harness::{Place, containers, ok, run},
    image, layout,
    ours_to_peers::convert,
};

#[test]
fn wrong_words_are_refused_with_what_to_do() {
    let place = Place::new();
    fs::create_dir(place.join("name")).unwrap();
    for (line, code, said) in [
        ("inspect --log bogus oci:x", 2, &["bogus", "debug"][..]),
        ("run --json oci:x", 2, &["--json"]),
        ("mount --json oci:x name", 2, &["--json"]),
        ("umount --json name", 2, &["--json"]),
        ("fs cat --json oci:x y", 2, &["--json"]),
        ("convert --estargz-chunk-size 1MB oci:x oci:y", 2, &["units"]),
        ("pull 127.0.0.1:1/name x.tar.gz", 2, &["x.tar"]),
        ("copy 127.0.0.1:1/name oci-archive:x.tgz", 2, &["x.tar"]),
        ("inspect docker:registry.example/x", 2, &["docker://registry.example/x"]),
        ("inspect --plain-http --retries 0 127.0.0.1:1/name:t", 1, &["127.0.0.1:1"]),
    ] {
        let ran = run(&mut place.loris(line)).failed(code, said);
        assert!(!ran.stderr.contains("there is a"), "{ran}");
    }
    assert!(!place.join("x.tar.gz").exists());
    // Where a directory has a registry's name.
    fs::create_dir_all(place.join("127.0.0.1/name")).unwrap();
    run(place.loris("inspect --plain-http --retries 0").arg("127.0.0.1/name:t")).failed(1, &["oci:127.0.0.1/name:t"]);
    let ran = run(place.command("sh").args(["-c", "\"$0\" completion zsh | head -n 1", crate::harness::LORIS]));
    assert!(ran.status.success() && ran.stderr.is_empty(), "{ran}");
    place.assert_clean();
}

#[test]
fn an_image_keeps_its_name_in_archives_and_says_what_it_loses() {
    let test = "an_image_keeps_its_name_in_archives_and_says_what_it_loses";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let registry = runtime.block_on(loris_testkit::registry::FaultRegistry::start());
    let image = registry.reference("t");
    let lazy = convert(&place, small, "lazy", &[]);
    ok(place.loris("push --quiet").arg(name_of(&lazy)).arg(&image));
    let member = |archive: &str, name: &str| -> Value {
        serde_json::from_str(&ok(place.command("tar").args(["-xOf", archive, name])).text()).unwrap()
    };
    // As an OCI archive: it stays as it is.
    let saved = ok(place.loris("save --output x.tar").arg(&image)).text();
    let annotations = member("x.tar", "index.json")["manifests"][0]["annotations"].clone();
    for key in ["org.opencontainers.image.ref.name", "io.containerd.image.name"] {
        assert_eq!(annotations[key], image.as_str(), "{annotations}");
    }
    assert_eq!(ok(place.loris("inspect --json").arg(saved.trim())).json()["lazy"], true);
    // And as Docker's.
    let ran = ok(place.loris("save --format docker-archive --output y.tar").arg(&image));
    assert!(ran.stderr.contains("not lazily pullable"), "{ran}");
    assert_eq!(member("y.tar", "manifest.json")[0]["RepoTags"], serde_json::json!([image]));
    let report = ok(place.loris("inspect --json").arg(ran.text().trim())).json();
    assert!(ran.text().trim().ends_with(report["digest"].as_str().unwrap()), "{ran}");
    // Media types alone make nothing lazy, which is said.
    let ran = ok(place.loris("convert --quiet --json --oci").arg(name_of(small)).arg("oci:media:t"));
    assert!(ran.json()["warnings"].to_string().contains("--estargz --oci"), "{ran}");
    let ran = ok(place.loris("convert --quiet --json --oci").arg(name_of(&lazy)).arg("oci:again:t"));
    assert_eq!(ran.json()["warnings"], serde_json::json!([]), "{ran}");
    let report = ok(place.loris("verify --json").arg(name_of(&lazy))).json();
    assert_eq!(report["name"], name_of(&lazy));
    assert_eq!(report["layersChecked"], layout::layers(&lazy).len());
    assert!(report["digest"].is_string() && report["problems"] == serde_json::json!([]), "{report}");
    place.assert_clean();
}

#[test]
fn one_path_that_is_not_there_does_not_hide_the_others() {
    let test = "one_path_that_is_not_there_does_not_hide_the_others";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let lazy = name_of(&convert(&place, small, "lazy", &[]));
    let ran = run(place.loris("fs cat").args([&lazy, "none", "changes", "data"])).failed(1, &["none", "data"]);
    assert_eq!(ran.text(), "after, and longer");
    let ran = run(place.loris("fs ls").args([&lazy, "none", "changes"])).failed(1, &["none"]);
    assert_eq!(ran.text(), "changes\n");
    assert_eq!(ok(place.loris("fs ls -a -d").args([&lazy, "/data"])).text(), "data\n");
    place.assert_clean();
}

#[test]
fn what_does_not_start_says_why_in_a_line() {
    let test = "what_does_not_start_says_why_in_a_line";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let lazy = name_of(&convert(&place, small, "lazy", &[]));
    {
        let _alone = containers();
        for image in [lazy, name_of(small)] {
            let ran = run(place.loris("run --quiet --net none").args([&image, "no-such-program"])).failed(127, &[]);
            assert_eq!(ran.stderr, "loris: program not found in the container: \"no-such-program\"\n");
        }
    }
    let at = place.make("mnt");
    let ran = run(place.loris("mount").arg("oci:nowhere:t").arg(&at)).failed(1, &["nowhere"]);
    assert_eq!(ran.stderr.lines().count(), 1, "{ran}");
    place.assert_clean();
}

#[test]
fn a_mounts_processes_do_not_show_the_password() {
    let test = "a_mounts_processes_do_not_show_the_password";
    let Some(small) = image::small(test) else { return };
    if !loris_testkit::require_fuse(test) {
        return;
    }
    let place = Place::new();
    let lazy = name_of(&convert(&place, small, "lazy", &[]));
    let mounted =
        place.try_mount_with("mount --creds user:hunter2-of-a-test", &lazy).unwrap_or_else(|ran| panic!("{ran}"));
    let lines: Vec<Vec<u8>> = fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| fs::read(entry.unwrap().path().join("cmdline")).ok())
        .filter(|line| line.starts_with(crate::harness::LORIS.as_bytes()))
        .collect();
    assert!(!lines.is_empty());
    for line in lines {
        let line = String::from_utf8_lossy(&line).into_owned();
        assert!(!line.contains("hunter2-of-a-test"), "{line:?}");
    }
    mounted.unmount();
}

//! A mount whose registry stands still or refuses in the midst of it: the read that needs it fails, and nothing else.

use std::{
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use loris_testkit::{
    registry::{Effect, Fault, FaultRegistry},
    require_fuse,
};

use crate::{
    bad_input::name_of,
    harness::{LIMIT, Place, ok, run},
    image::{self, BIG},
    layout,
    ours_to_peers::convert,
};

/// A small file of another layer than [`BIG`].
const OTHER: &str = "changes";
const OTHER_TEXT: &str = "after, and longer";

/// A registry with the small image, a reader's own place, and what the large file holds.
struct Scene {
    registry: FaultRegistry,
    image: String,
    /// What is in the path of every request for the layer with [`BIG`].
    layer: String,
    place: Place,
    expected: Vec<u8>,
}

impl Scene {
    fn new(test: &str) -> Option<Self> {
        let small = image::small(test)?;
        if !require_fuse(test) {
            return None;
        }
        let place = Place::new();
        let converted = convert(&place, small, "converted", &[]);
        let expected = ok(place.loris("fs cat").arg(name_of(&converted)).arg(BIG)).stdout;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        // It runs on threads of its own.
        let registry = runtime.block_on(FaultRegistry::start());
        let image = registry.reference("t");
        ok(place.loris("push --quiet").arg(&converted).arg(&image));
        registry.forget_requests();
        let layer = format!("/blobs/{}", layout::layers(&converted)[0]);
        Some(Self { registry, image, layer, place, expected })
    }

    /// From the second request on: the first one gets the table of contents.
    fn in_mid_read(&self, effect: Effect) {
        self.registry.fault(Fault::new(effect).method("GET").path(&self.layer).skip(1).always());
    }
}

fn cat(path: &Path) -> Command {
    let mut command = Command::new("cat");
    command.env("LC_ALL", "C").arg(path);
    command
}

#[track_caller]
fn others_go_on(root: &Path) {
    assert_eq!(ok(&mut cat(&root.join(OTHER))).text(), OTHER_TEXT);
    assert!(root.join(BIG).metadata().unwrap().len() > 0);
    assert!(root.join("names").read_dir().unwrap().count() > 3);
}

#[test]
fn reads_fail_while_the_registry_does_and_no_longer() {
    let test = "reads_fail_while_the_registry_does_and_no_longer";
    let Some(scene) = Scene::new(test) else { return };
    let stall = || Effect::Stall(1000, Duration::from_secs(3600));
    for (name, effect) in [("stalled", stall()), ("refused", Effect::Status(403)), ("gone", Effect::Status(404))] {
        println!("{name}");
        let fresh = Place::new();
        scene.in_mid_read(effect);
        let mounted = fresh
            .try_mount_with("mount --stall-timeout 1 --retries 1 --read-timeout 3", &scene.image)
            .unwrap_or_else(|ran| panic!("{name}: {ran}"));
        for _ in 0..2 {
            let read = run(&mut cat(&mounted.at.join(BIG))).failed(1, &["Input/output error"]);
            assert!(scene.expected.starts_with(&read.stdout), "{name}: wrong bytes before the error");
            others_go_on(&mounted.at);
        }
        scene.registry.end_faults();
        // A request that was stalled may still be under way, and is waited for before another one is made.
        let end = Instant::now() + LIMIT;
        let read = loop {
            let read = run(&mut cat(&mounted.at.join(BIG)));
            if read.status.success() || Instant::now() > end {
                break read.succeeded();
            }
        };
        assert!(read.stdout == scene.expected, "{name}: wrong bytes");
        mounted.unmount();
        fresh.assert_clean();
    }
    scene.place.assert_clean();
}

/// A program that reads; killed when dropped.
struct Reading(Child);

impl Drop for Reading {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_read_that_waits_holds_up_no_other() {
    let test = "a_read_that_waits_holds_up_no_other";
    let Some(scene) = Scene::new(test) else { return };
    scene.in_mid_read(Effect::Stall(0, Duration::from_secs(3600)));
    // It waits for longer than the test may take. The scene's own cache has the file.
    let fresh = Place::new();
    let mounted = fresh.try_mount_with("mount --complete never --stall-timeout 3600", &scene.image);
    let mounted = mounted.unwrap_or_else(|ran| panic!("{ran}"));
    let asked = |scene: &Scene| scene.registry.requests().iter().filter(|it| it.path.contains(&scene.layer)).count();
    let before = asked(&scene);
    let mut command = cat(&mounted.at.join(BIG));
    // Its own group, as for programs that are waited for.
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    let mut reading = Reading(command.spawn().unwrap());
    while asked(&scene) == before {
        assert!(reading.0.try_wait().unwrap().is_none(), "the read is over before it has asked");
        std::thread::sleep(Duration::from_millis(5));
    }
    others_go_on(&mounted.at);
    assert!(reading.0.try_wait().unwrap().is_none(), "the read did not wait");
    drop(reading);
    mounted.unmount();
    fresh.assert_clean();
    scene.place.assert_clean();
}

//! `loris daemon snapshotter` beside a real containerd when something goes wrong: the registry, credentials, the disk,
//! containerd itself. Whatever it is, readers get right bytes or an error, and all is well when the cause is gone.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use loris_testkit::registry::{Access, Effect, Fault, FaultRegistry, Tokens};
use rustix::process::Signal;

use crate::{
    bad_input::name_of,
    harness::{LIMIT, Place, containers, ok, run},
    image, layout,
    ours_to_peers::convert,
    snapshotter::{Scene, greeter},
};

/// Short enough that a test need not wait long, and long enough for a machine with much to do.
const PATIENCE: [&str; 5] =
    ["--complete=never", "--open-timeout=3", "--read-timeout=3", "--stall-timeout=1", "--retries=1"];

/// A scene whose images are in a registry that does what it is told.
struct Faulty {
    registry: FaultRegistry,
    scene: Scene,
    layout: PathBuf,
    name: String,
    /// What the large file holds.
    truth: Vec<u8>,
}

impl Faulty {
    fn new(test: &str, more: &[&str]) -> Option<Self> {
        let small = image::small(test)?;
        let scene = Scene::new(test, &[&PATIENCE[..], more].concat())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let registry = runtime.block_on(FaultRegistry::start());
        let layout = convert(&scene.place, small, "converted", &["--estargz-chunk-size", "65536"]);
        let name = registry.reference("t");
        ok(scene.place.loris("push --quiet").arg(name_of(&layout)).arg(&name));
        registry.forget_requests();
        let truth = layout::unpack(small, "t", &scene.place.join("bundle")).join(image::BIG);
        let truth = fs::read(truth).unwrap();
        Some(Self { registry, scene, layout, name, truth })
    }

    fn reads(&self, what: &str) {
        self.scene.reads(&self.name, &format!("{}-{}", what.replace(' ', "-"), std::process::id()));
    }

    fn removed(&self) {
        ok(self.scene.containerd().ctr().args(["images", "rm", "--sync", &self.name]));
        assert_eq!(self.scene.snapshots(), Vec::<String>::new());
    }

    /// Waits until nothing is kept of layers. (What was opened beside others and is no snapshot's stays.)
    fn freed(&self) {
        let end = Instant::now() + LIMIT;
        while fs::read_dir(self.scene.place.join("cache/layers")).map_or(0, Iterator::count) > 0 {
            assert!(Instant::now() < end, "layers stay: {}", self.scene.daemon.said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Reads a part of a file; an error says what the system said.
fn read_part(path: &Path, from: usize, length: usize) -> Result<Vec<u8>, String> {
    use std::os::unix::fs::FileExt as _;
    let mut part = vec![0; length];
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    file.read_exact_at(&mut part, from as u64).map_err(|error| error.to_string())?;
    Ok(part)
}

/// Reads the same part until it can be had.
fn read_in_the_end(path: &Path, from: usize, length: usize) -> Vec<u8> {
    let end = Instant::now() + LIMIT;
    loop {
        match read_part(path, from, length) {
            Ok(part) => return part,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn what_a_registry_does_wrong_is_an_error_and_no_wrong_byte() {
    let test = "what_a_registry_does_wrong_is_an_error_and_no_wrong_byte";
    let _alone = containers();
    let Some(faulty) = Faulty::new(test, &[]) else { return };
    let part = 256 << 10;
    let stall = || Effect::Stall(100, Duration::from_secs(3600));
    let effects = [
        ("stalled", stall()),
        ("refused", Effect::Status(403)),
        ("gone", Effect::Status(404)),
        ("broken", Effect::Status(500)),
        ("cut", Effect::ResetAtOnce),
        ("wrong", Effect::FlipBit(2000)),
        ("shifted", Effect::ShiftBytes(1000)),
    ];
    // Before a layer is open, the client pulls it itself, or says what is wrong.
    let slow = ("slow", Effect::Delay(Duration::from_secs(6)));
    for (what, effect) in effects[1..5].iter().chain([&slow]) {
        faulty.registry.fault(Fault::new(effect.clone()).path("/blobs/").method("GET").times(40));
        let mut pull = faulty.scene.containerd().ctr_remote();
        let pulled = run(pull.args(["images", "rpull", "--plain-http", "--snapshotter", "loris", &faulty.name]));
        faulty.registry.end_faults();
        if !pulled.status.success() {
            faulty.scene.pull(&faulty.name);
        }
        faulty.reads(what);
        faulty.removed();
    }

    // What could not be had a moment ago is tried again, though not at once.
    let end = Instant::now() + LIMIT;
    loop {
        faulty.scene.pull(&faulty.name);
        if ok(&mut faulty.scene.explain(&faulty.name)).json()["is_lazy"] == true {
            break;
        }
        assert!(Instant::now() < end, "{}", faulty.scene.daemon.said());
        faulty.removed();
        std::thread::sleep(Duration::from_secs(1));
    }
    // What containers read is here from then on.
    faulty.reads("at first");
    let busy = faulty.scene.run_in_background_without_reading(&faulty.name);
    let root = &busy.at;
    for (number, (what, effect)) in effects.iter().enumerate() {
        let from = number * 2 * part;
        faulty.registry.fault(Fault::new(effect.clone()).path("/blobs/").always());
        match read_part(&root.join(image::BIG), from, part) {
            Err(error) => assert!(error.contains("Input/output error"), "{what}: {error}"),
            Ok(read) => assert!(read == faulty.truth[from..][..part], "{what}: wrong bytes"),
        }
        // What is here is served, to new containers too.
        faulty.reads(what);
        faulty.registry.end_faults();
        let read = read_in_the_end(&root.join(image::BIG), from, part);
        assert!(read == faulty.truth[from..][..part], "{what}: wrong bytes when it was over");
        assert!(faulty.scene.is_running(&busy.container), "{what}");
    }
    let explained = ok(&mut faulty.scene.explain(&faulty.name)).json();
    assert_eq!(explained["is_lazy"], true, "{explained}");
    assert_eq!(explained["layers"].as_array().unwrap().len(), layout::layers(&faulty.layout).len());
    faulty.scene.end(&busy.container);
    faulty.removed();
    faulty.freed();
    faulty.scene.finish();
}

#[test]
fn credentials_that_expire_are_asked_for_again() {
    let test = "credentials_that_expire_are_asked_for_again";
    let _alone = containers();
    let place = Place::new();
    let (user, password) = ("reader", "a-secret-of-this-test");
    let authfile = place.join("auth.json");
    let Some(faulty) = Faulty::new(test, &[&format!("--authfile={}", authfile.display())]) else { return };
    let write = |password: &str| {
        let auth = base64(&format!("{user}:{password}"));
        let auths = serde_json::json!({"auths": {(faulty.registry.address()): {"auth": auth}}});
        fs::write(&authfile, auths.to_string()).unwrap();
    };
    let access = |password: &str| {
        let credentials = Some((user.to_owned(), password.to_owned()));
        faulty.registry.access(Access::Token(Tokens { credentials, uses: 7, ..Tokens::default() }));
    };
    write(password);
    access(password);
    let mut pull = faulty.scene.containerd().ctr_remote();
    pull.args(["images", "rpull", "--plain-http", "--snapshotter", "loris", "--user", &format!("{user}:{password}")]);
    ok(pull.arg(&faulty.name));
    let explained = ok(&mut faulty.scene.explain(&faulty.name)).json();
    assert_eq!(explained["is_lazy"], true, "{explained}");
    let root = faulty.scene.run_in_background_without_reading(&faulty.name);
    let part = 256 << 10;
    let issued = faulty.registry.tokens_issued();
    // From behind, so that nothing is read ahead.
    for number in (0..8).rev() {
        let from = number * 2 * part;
        faulty.registry.expire_tokens();
        if number == 4 {
            // Another password, written where the daemon looks.
            access("another");
            write("another");
        }
        let read = read_in_the_end(&root.at.join(image::BIG), from, part);
        assert!(read == faulty.truth[from..][..part], "part {number}");
    }
    assert!(faulty.registry.tokens_issued() >= issued + 8);
    for secret in [password, "another"] {
        assert!(!faulty.scene.daemon.said().contains(secret), "a password is in the log");
    }
    faulty.scene.end(&root.container);
    faulty.removed();
    faulty.freed();
    faulty.scene.finish();
    place.assert_clean();
}

fn base64(text: &str) -> String {
    ok(std::process::Command::new("sh").args(["-c", "printf %s \"$1\" | base64 -w0", "sh", text])).text()
}

/// A file system in memory of a given size; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn at(path: PathBuf, bytes: usize) -> Self {
        fs::create_dir_all(&path).unwrap();
        ok(std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes},mode=0700"), "small"])
            .arg(&path));
        Self(path)
    }

    fn resize(&self, bytes: usize) {
        ok(std::process::Command::new("mount").args(["-o", &format!("remount,size={bytes}")]).arg(&self.0));
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn a_full_disk_is_an_error_until_there_is_room() {
    let test = "a_full_disk_is_an_error_until_there_is_room";
    let _alone = containers();
    let place = Place::new();
    if !loris_testkit::require_root(test) {
        return;
    }
    let disk = Small::at(place.join("disk"), 5 << 20);
    let (root, cache) = (disk.0.join("root"), disk.0.join("cache"));
    let more = [format!("--root={}", root.display()), format!("--cache-dir={}", cache.display())];
    let Some(faulty) = Faulty::new(test, &[&more[0], &more[1]]) else { return };
    faulty.scene.pull(&faulty.name);
    let explained = ok(&mut faulty.scene.explain(&faulty.name)).json();
    assert_eq!(explained["is_lazy"], true, "{explained}");
    // What the container reads is here from then on.
    faulty.reads("at first");
    let root = faulty.scene.run_in_background_without_reading(&faulty.name);
    // More than there is room for.
    let error = read_part(&root.at.join(image::BIG), 0, faulty.truth.len()).unwrap_err();
    assert!(error.contains("No space left") || error.contains("Input/output"), "{error}");
    let said = faulty.scene.daemon.said();
    assert!(said.contains("no space left for") && said.contains("free some"), "{said}");
    // To others it says so too, and takes nothing down.
    let written =
        run(faulty.scene.containerd().ctr().args(["run", "--rm", "--snapshotter", "loris", &faulty.name, &greeter()]));
    if !written.status.success() {
        assert!(written.stderr.contains("no space left") || written.stderr.contains("No space left"), "{written}");
    }
    assert!(faulty.scene.is_running(&root.container));
    disk.resize(64 << 20);
    let read = read_in_the_end(&root.at.join(image::BIG), 0, faulty.truth.len());
    assert!(read == faulty.truth, "wrong bytes when there was room");
    faulty.reads("when there was room");
    faulty.scene.end(&root.container);
    ok(faulty.scene.containerd().ctr().args(["images", "rm", "--sync", &faulty.name]));
    faulty.scene.finish();
    drop(disk);
    place.assert_clean();
}

#[test]
fn containers_outlive_containerd_and_the_daemon_together() {
    let test = "containers_outlive_containerd_and_the_daemon_together";
    let _alone = containers();
    let Some(mut faulty) = Faulty::new(test, &[]) else { return };
    faulty.scene.pull(&faulty.name);
    let root = faulty.scene.run_in_background_without_reading(&faulty.name);
    let part = 512 << 10;
    let mut from = 0;
    for (number, signal) in [Signal::TERM, Signal::KILL, Signal::TERM, Signal::KILL].into_iter().enumerate() {
        let both = number >= 2;
        let reader = {
            let (path, from) = (root.at.join(image::BIG), from);
            std::thread::spawn(move || read_part(&path, from, part))
        };
        let Scene { containerd, daemon, .. } = &mut faulty.scene;
        containerd.as_mut().unwrap().restart(signal, || {
            if both {
                daemon.signal(Signal::KILL);
                daemon.start();
            }
        });
        let read = reader.join().unwrap().unwrap();
        assert!(read == faulty.truth[from..][..part], "round {number}");
        from += part;
        assert!(faulty.scene.is_running(&root.container), "round {number}");
        faulty.reads(&format!("round {number}"));
    }
    faulty.scene.end(&root.container);
    faulty.removed();
    faulty.freed();
    faulty.scene.finish();
}

//! Processes that are killed under a mount's readers, who must not notice.

use std::{
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use loris_testkit::registry::{Effect, Fault, FaultRegistry};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    debian,
    harness::{LIMIT, Place, have, mounted_in, ok},
    image, layout,
    ours_to_peers::convert,
};

/// Processes that read.
const READERS: usize = 8;
/// Each with an empty cache.
const ROUNDS: usize = 5;
const KILLS: usize = 10;

/// Whether the first choice among the engines that survive their processes works here; says so where not.
pub fn can_page(test: &str, place: &Place) -> bool {
    works(test, place, "fanotify")
}

/// Whether an engine works here; says so where not.
fn works(test: &str, place: &Place, engine: &str) -> bool {
    let report = ok(&mut place.loris("doctor --json")).json();
    let engine = report["engines"].as_array().unwrap().iter().find(|found| found["name"] == engine).unwrap();
    if engine["works"] != true {
        loris_testkit::skip(&format!("{test} ({})", engine["name"]), engine["reason"].as_str().unwrap());
        return false;
    }
    true
}

/// Whether the kernel sends requests again that a killed server has read; says so where not.
fn can_resend(test: &str) -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.parse::<u32>().ok());
    let can = (numbers.next(), numbers.next()) >= (Some(6), Some(9));
    if !can {
        loris_testkit::skip(test, "FUSE_NOTIFY_RESEND, which takes Linux 6.9");
    }
    can
}

/// A large image, what it must look like, and a place for its mounts.
struct Scene {
    place: Place,
    name: String,
    truth: PathBuf,
}

impl Scene {
    fn new(test: &str) -> Option<Self> {
        if !have(test, &["python3"]) {
            return None;
        }
        let large = debian::large(test)?;
        let place = Place::new();
        let converted = convert(&place, large, "converted", &[]);
        let truth = layout::unpack(large, "t", &place.join("bundle"));
        Some(Self { name: format!("oci:{}:t", converted.display()), place, truth })
    }

    fn mount(&self, program: &Path, engine: &str, round: usize) -> PathBuf {
        let at = self.place.make(&format!("mnt-{engine}-{round}"));
        let mut command = self.place.command(program);
        // By itself it would be complete after some seconds, and nobody would be asked any more.
        command.args(["mount", "--engine", engine, "--complete", "never", "--cache-dir"]);
        command.arg(self.place.join(&format!("cache-{engine}-{round}"))).arg(&self.name).arg(&at);
        ok(&mut command);
        at
    }

    fn readers(&self, at: &Path) -> Readers {
        let stop = self.place.join("stop");
        let _ = fs::remove_file(&stop);
        let reader = |seed: usize| {
            Command::new("python3")
                .args(["-c", include_str!("crash.py")])
                .arg(at)
                .arg(&self.truth)
                .arg(seed.to_string())
                .arg(&stop)
                .arg(self.lenient())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap()
        };
        let mut children: Vec<Child> = (0..READERS).map(reader).collect();
        for child in &mut children {
            let mut said = [0; 8];
            child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
            assert_eq!(&said, b"reading\n");
        }
        Readers { children, stop }
    }

    /// While it is there, reads may fail.
    fn lenient(&self) -> PathBuf {
        self.place.join("lenient")
    }

    /// Everything, once more, from beginning to end.
    fn compare_all(&self, at: &Path) {
        let mut diff = Command::new("diff");
        ok(diff.args(["-r", "--no-dereference", "-x", "dev"]).arg(&self.truth).arg(at));
    }

    fn unmount(&self, at: &Path) {
        ok(self.place.loris("umount").arg(at));
        self.place.assert_clean();
    }
}

struct Readers {
    children: Vec<Child>,
    stop: PathBuf,
}

impl Readers {
    /// Lets all of them end, none of whom may have met anything odd.
    fn finish(self) {
        fs::write(&self.stop, "").unwrap();
        let end = Instant::now() + LIMIT;
        let mut reads = 0;
        for mut child in self.children {
            while child.try_wait().unwrap().is_none() {
                if Instant::now() > end {
                    child.kill().unwrap();
                    panic!("a reader hangs");
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            let output = child.wait_with_output().unwrap();
            let (said, wrong) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            assert!(output.status.success(), "{wrong}");
            reads += said.trim().parse::<usize>().unwrap();
        }
        assert!(reads > READERS, "only {reads} reads");
    }
}

/// The processes that serve the mount at a directory, or their keepers.
fn serving(at: &Path, keepers: bool) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id: &i32| {
        let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
        let is_keeper = words.get(1).is_some_and(|word| *word == b"mount-keeper");
        let is_server = words.get(1).is_some_and(|word| *word == b"mount");
        let about = words.iter().any(|word| *word == std::os::unix::ffi::OsStrExt::as_bytes(at.as_os_str()));
        about && (if keepers { is_keeper } else { is_server })
    })
    .filter_map(Pid::from_raw)
    .collect()
}

/// Waits for a process that serves a mount, which is not one of those `before`.
fn server(at: &Path, keeper: bool, before: &[Pid]) -> Pid {
    let end = Instant::now() + LIMIT;
    loop {
        if let Some(&found) = serving(at, keeper).iter().find(|found| !before.contains(found)) {
            return found;
        }
        assert!(Instant::now() < end, "nobody serves {} any more", at.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Kills whoever serves, so many times, at moments that are nowhere the same.
fn kill(at: &Path, keeper: bool, times: usize, seed: usize) {
    let mut dead = Vec::new();
    let mut state = seed as u64 + 1;
    for _ in 0..times {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        std::thread::sleep(Duration::from_millis((state >> 33) % 250));
        let victim = server(at, keeper, &dead);
        // Where both are killed in the same instant, nobody is left to keep the readers waiting: not meant here.
        server(at, !keeper, &[]);
        kill_process(victim, Signal::KILL).unwrap();
        dead.push(victim);
    }
    server(at, keeper, &dead);
}

/// The same, while the keeper stands still, so that it can be looked how many events the daemon has left unanswered: in
/// all. Some of its successors are killed too, before they have taken over or while they do.
fn kill_amid_events(at: &Path, times: usize, seed: usize) -> usize {
    let mut dead = Vec::new();
    let mut state = seed as u64 + 1;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut unanswered = 0;
    for number in 0..times {
        std::thread::sleep(Duration::from_millis(random(250)));
        let victim = server(at, false, &dead);
        let keeper = server(at, true, &[]);
        kill_process(keeper, Signal::STOP).unwrap();
        // Where it was just dismissed, another one acts at once: nothing is known of that one's daemon then.
        kill_process(victim, Signal::KILL).unwrap();
        let end = Instant::now() + LIMIT;
        while serving(at, false).contains(&victim) {
            assert!(Instant::now() < end, "it does not die");
            std::thread::sleep(Duration::from_millis(1));
        }
        unanswered += events_in_journal(keeper);
        let _ = kill_process(keeper, Signal::CONT);
        dead.push(victim);
        for _ in 0..number % 3 {
            let successor = server(at, false, &dead);
            // An exec, an inheritance, a keeper of its own: some milliseconds each.
            std::thread::sleep(Duration::from_millis(random(40)));
            kill_process(successor, Signal::KILL).unwrap();
            dead.push(successor);
        }
        // Two are not killed in the same instant.
        server(at, false, &dead);
        server(at, true, &[]);
    }
    unanswered
}

/// How many events stand in the journal that a keeper holds: see docs/formats/mounts.md.
fn events_in_journal(keeper: Pid) -> usize {
    let descriptors = format!("/proc/{}/fd", keeper.as_raw_nonzero());
    let Ok(descriptors) = fs::read_dir(descriptors) else { return 0 };
    let paths = descriptors.filter_map(Result::ok).map(|entry| entry.path());
    let is_journal = |path: &PathBuf| fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("journal"));
    let Some(journal) = paths.into_iter().find(is_journal).and_then(|path| fs::read(path).ok()) else { return 0 };
    assert!(journal.starts_with(b"LORISJNL"));
    journal[4096..].chunks(128).filter(|slot| slot[..4] != [0; 4]).count()
}

fn kill_daemons(scene: &Scene, engine: &str, rounds: usize) {
    let (mut unanswered, mut met) = (0, 0);
    for round in 0..rounds {
        let at = scene.mount(Path::new(crate::harness::LORIS), engine, round);
        let readers = scene.readers(&at);
        let found = kill_amid_events(&at, KILLS, round);
        (unanswered, met) = (unanswered + found, met + usize::from(found > 0));
        readers.finish();
        if round + 1 == rounds {
            scene.compare_all(&at);
        }
        scene.unmount(&at);
        fs::remove_dir_all(scene.place.join(&format!("cache-{engine}-{round}"))).unwrap();
    }
    println!("{engine}: {unanswered} events were unanswered, in {met} of {rounds} rounds");
    // Requests of FUSE are in no journal.
    assert!(met > 0 || engine != "fanotify", "no daemon was killed amid an event");
}

#[test]
fn readers_do_not_notice_that_the_daemon_is_killed() {
    let test = "readers_do_not_notice_that_the_daemon_is_killed";
    let Some(scene) = Scene::new(test) else { return };
    if can_page(test, &scene.place) {
        kill_daemons(&scene, "fanotify", ROUNDS);
    }
    for engine in ["erofs-fuse", "erofs-loop"] {
        if can_resend(test) && works(test, &scene.place, engine) {
            kill_daemons(&scene, engine, 1);
        }
    }
}

/// A registry that is away in the midst of it, while the daemon is killed again and again: what is here is read, what is
/// not fails when it was waited for long enough, and is had when the registry is back.
#[test]
fn readers_outlast_a_registry_that_is_cut_off() {
    let test = "readers_outlast_a_registry_that_is_cut_off";
    let Some(mut scene) = Scene::new(test) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    // It runs on threads of its own.
    let registry = runtime.block_on(FaultRegistry::start());
    let reference = registry.reference("t");
    ok(scene.place.loris("push --quiet").arg(scene.name.strip_prefix("oci:").unwrap()).arg(&reference));
    scene.name = reference;
    for engine in ["fanotify", "erofs-fuse"] {
        if !works(test, &scene.place, engine) || (engine != "fanotify" && !can_resend(test)) {
            continue;
        }
        let at = scene.place.make(&format!("mnt-{engine}"));
        let mut command = scene.place.loris("mount --complete never --read-timeout 2 --retries 1 --engine");
        command.args([engine, "--cache-dir"]).arg(scene.place.join(&format!("cache-{engine}")));
        ok(command.arg(&scene.name).arg(&at));
        // Already while it is there, since what was waited for before it was made fails too.
        let met = scene.lenient().with_extension("met");
        fs::write(scene.lenient(), "").unwrap();
        let readers = scene.readers(&at);
        kill(&at, false, 1, 21);
        registry.fault(Fault::new(Effect::Status(503)).method("GET").path("/blobs/").always());
        kill(&at, false, 4, 22);
        let end = Instant::now() + LIMIT;
        while !met.exists() {
            assert!(Instant::now() < end, "{engine}: nothing fails though the registry is away");
            std::thread::sleep(Duration::from_millis(20));
        }
        registry.end_faults();
        // All of it, with patience for what has just been given up.
        let end = Instant::now() + LIMIT;
        let mut diff = Command::new("diff");
        diff.args(["-r", "--no-dereference", "-x", "dev"]).arg(&scene.truth).arg(&at);
        while !crate::harness::run(&mut diff).status.success() {
            assert!(Instant::now() < end, "{engine}: the registry is back, and reads still fail");
        }
        fs::remove_file(scene.lenient()).unwrap();
        fs::remove_file(&met).unwrap();
        kill(&at, false, 2, 23);
        readers.finish();
        scene.compare_all(&at);
        scene.unmount(&at);
    }
}

/// The program is replaced while it serves, as a package's upgrade does; its process is ended, and the new one goes on.
fn upgrade(scene: &Scene, engine: &str) {
    let program = scene.place.join("loris");
    fs::copy(crate::harness::LORIS, &program).unwrap();
    let at = scene.mount(&program, engine, 1);
    let readers = scene.readers(&at);
    let old = server(&at, false, &[]);
    let new = scene.place.join("loris.new");
    fs::copy(crate::harness::LORIS, &new).unwrap();
    fs::rename(&new, &program).unwrap();
    kill_process(old, Signal::KILL).unwrap();
    let successor = server(&at, false, &[old]);
    let running = fs::read_link(format!("/proc/{}/exe", successor.as_raw_nonzero())).unwrap();
    assert_eq!(running, program.canonicalize().unwrap(), "not the old one, which is deleted");
    let keeper = server(&at, true, &[]);
    readers.finish();
    let end = Instant::now() + LIMIT;
    while fs::read_link(format!("/proc/{}/exe", keeper.as_raw_nonzero())).is_ok_and(|exe| exe != running) {
        // The old keeper is dismissed as soon as there is a new one.
        assert!(Instant::now() < end, "the keeper is an old one");
        std::thread::sleep(Duration::from_millis(5));
        if serving(&at, true).first() != Some(&keeper) {
            break;
        }
    }
    scene.compare_all(&at);
    scene.unmount(&at);
}

#[test]
fn readers_do_not_notice_that_the_keeper_is_killed_or_the_program_upgraded() {
    let test = "readers_do_not_notice_that_the_keeper_is_killed_or_the_program_upgraded";
    let Some(scene) = Scene::new(test) else { return };
    for engine in ["fanotify", "erofs-fuse"] {
        if !works(test, &scene.place, engine) || (engine != "fanotify" && !can_resend(test)) {
            continue;
        }
        let at = scene.mount(Path::new(crate::harness::LORIS), engine, 0);
        let readers = scene.readers(&at);
        kill(&at, true, KILLS, 7);
        readers.finish();
        scene.unmount(&at);
        upgrade(&scene, engine);
    }
}

/// Two daemons fill the same data files, each of which is asked for the other's reads too.
#[test]
fn two_daemons_share_a_cache() {
    let test = "two_daemons_share_a_cache";
    let Some(scene) = Scene::new(test) else { return };
    if !can_page(test, &scene.place) {
        return;
    }
    let mount = |name: &str| {
        let at = scene.place.make(name);
        let mut command = scene.place.loris("mount --engine fanotify");
        ok(command.arg(&scene.name).arg(&at));
        at
    };
    let (one, other) = (mount("one"), mount("other"));
    let (at_one, at_other) = (scene.readers(&one), scene.readers(&other));
    kill(&one, false, 3, 11);
    kill(&other, false, 3, 12);
    at_one.finish();
    ok(scene.place.loris("umount").arg(&one));
    at_other.finish();
    scene.compare_all(&other);
    scene.unmount(&other);
}

/// What keeps a successor from taking the mount over, here a lock that is held for long, keeps nobody from reading.
#[test]
fn a_successor_that_meets_obstacles_tries_again() {
    let test = "a_successor_that_meets_obstacles_tries_again";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    if !can_page(test, &place) {
        return;
    }
    let name = format!("oci:{}:t", convert(&place, small, "converted", &[]).display());
    let truth = layout::unpack(small, "t", &place.join("bundle"));
    let at = place.make("mnt");
    ok(place.loris("mount --engine fanotify --rw").arg(&name).arg(&at));
    let first = server(&at, false, &[]);
    let scratch = fs::read_dir(place.join("tmp")).unwrap().map(|entry| entry.unwrap().path());
    let scratch = scratch.into_iter().find(|path| path.to_string_lossy().contains("loris-rootfs.")).unwrap();
    let lock = fs::File::open(&scratch).unwrap();
    std::thread::scope(|scope| {
        // Waits for it now, so that it has it before any successor.
        let locking = scope.spawn(|| rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        kill_process(first, Signal::KILL).unwrap();
        locking.join().unwrap();
    });
    server(&at, false, &[first]);
    assert!(fs::read(at.join(image::BIG)).unwrap() == fs::read(truth.join(image::BIG)).unwrap());
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::Unlock).unwrap();
    let end = Instant::now() + LIMIT;
    while rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok() {
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::Unlock).unwrap();
        assert!(Instant::now() < end, "nobody takes it over");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(lock);
    ok(place.loris("umount").arg(&at));
    place.assert_clean();
}

#[test]
fn a_mount_whose_processes_were_killed_together_is_taken_down_by_the_next() {
    let test = "a_mount_whose_processes_were_killed_together_is_taken_down_by_the_next";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let name = format!("oci:{}:t", converted.display());
    for (engine, flags) in
        [("fanotify", &[][..]), ("fanotify", &["--rw"]), ("erofs-fuse", &[]), ("erofs-fuse", &["--rw"])]
    {
        if !works(test, &place, engine) || (engine != "fanotify" && !can_resend(test)) {
            continue;
        }
        let at = place.make(&format!("mnt{engine}{}", flags.concat()));
        let mount = |at: &Path, flags: &[&str]| {
            let mut command = place.loris("mount --engine");
            // A complete one would be left alone.
            command
                .arg(engine)
                .args(["--complete", "never"])
                .args(flags)
                .arg(&name)
                .arg(at)
                .env("LORIS_CACHE_DIR", place.join(engine));
            ok(&mut command);
        };
        mount(&at, flags);
        kill_together(&place, &[server(&at, false, &[]), server(&at, true, &[])]);
        assert!(mounted_in(place.path()).contains(&at));
        if engine != "fanotify" {
            // What no process holds any more, the kernel refuses: no zeros.
            let error = fs::read(at.join(image::BIG)).unwrap_err();
            assert!(matches!(error.raw_os_error(), Some(5 | 107)), "{error}");
        }
        let other = place.make("other");
        mount(&other, &[]);
        assert_eq!(mounted_in(place.path()), std::slice::from_ref(&other), "the dead one is gone");
        ok(place.loris("umount").arg(&other));
        place.assert_clean();
    }
}

/// What is in use stays, out of sight, and read zeros. From the next mount on it is refused; but where its layers are served
/// again, it is served too.
#[test]
fn a_mount_in_use_whose_processes_were_killed_together_is_refused_by_the_next() {
    let test = "a_mount_in_use_whose_processes_were_killed_together_is_refused_by_the_next";
    if !loris_testkit::require_root(test) || !have(test, &["umoci"]) {
        return;
    }
    let place = Place::new();
    if !can_page(test, &place) {
        return;
    }
    let Some(small) = image::small(test) else { return };
    let (name, other) = (readable(&place), format!("oci:{}:t", convert(&place, small, "other", &[]).display()));
    let truth = image::noise(3, 40 << 20);
    for (flags, next, end) in
        [(&[][..], &other, "umount"), (&["--rw"], &other, "umount"), (&[], &name, "umount"), (&[], &other, "kill")]
    {
        let at = place.make("mnt");
        let mount = |at: &Path, name: &str, flags: &[&str]| {
            let mut command = place.loris("mount --engine fanotify --complete never");
            ok(command.args(flags).arg(name).arg(at).env("LORIS_CACHE_DIR", place.join("cache")));
        };
        fs::remove_dir_all(place.join("cache")).ok();
        mount(&at, &name, flags);
        let file = fs::File::open(at.join("f3")).unwrap();
        let read = |from: u64| {
            let mut bytes = vec![0; 4096];
            let start = usize::try_from(from).unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, from)
                .map(|()| bytes == truth[start..start + 4096])
        };
        assert!(read(0).unwrap());
        let both = [server(&at, false, &[]), server(&at, true, &[])];
        kill_together(&place, &both);
        // Nobody can help that; and it is cached.
        assert!(!read(20 << 20).unwrap(), "the test shows nothing");
        if end == "umount" {
            let beside = place.make("beside");
            mount(&beside, next, &[]);
            for from in [20 << 20, 24 << 20] {
                match read(from) {
                    Ok(is_right) => assert!(is_right && next == &name, "{flags:?}: wrong bytes at {from}"),
                    Err(error) => assert!(error.raw_os_error() == Some(5) && next == &other, "{flags:?}: {error}"),
                }
            }
            ok(place.loris("umount").arg(&beside));
        } else {
            ok(place.loris("umount").arg(&at));
        }
        // The next one is gone too.
        for from in [20 << 20, 30 << 20] {
            match read(from) {
                Ok(is_right) => assert!(is_right && next == &name, "{flags:?} {end}: wrong bytes at {from}"),
                Err(error) => assert_eq!(error.raw_os_error(), Some(5), "{flags:?} {end}"),
            }
        }
        // Others can read the layer meanwhile.
        let beside = place.make("beside");
        mount(&beside, &name, &[]);
        assert!(fs::read(beside.join("f3")).unwrap() == truth);
        ok(place.loris("umount").arg(&beside));
        let refusing =
            || registers(&place, both[0]).iter().any(|path| fs::File::open(path).unwrap().try_lock().is_err());
        assert!(refusing(), "{flags:?}: nobody refuses");
        drop(file);
        let limit = Instant::now() + LIMIT;
        while refusing() {
            assert!(Instant::now() < limit, "reads of a mount that is gone are refused");
            std::thread::sleep(Duration::from_millis(10));
        }
        mount(&beside, &name, &[]);
        ok(place.loris("umount").arg(&beside));
        assert_eq!(registers(&place, both[0]), Vec::<PathBuf>::new());
        place.assert_clean();
    }
}

/// By `umount(8)`, which knows nothing of us, also lazily: the process hears of it, and takes the rest down.
#[test]
fn somebody_else_unmounts() {
    let test = "somebody_else_unmounts";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let name = format!("oci:{}:t", convert(&place, small, "converted", &[]).display());
    let truth = fs::read(layout::unpack(small, "t", &place.join("bundle")).join(image::BIG)).unwrap();
    for engine in ["fanotify", "erofs-fuse", "erofs-loop", "fuse"] {
        if !works(test, &place, engine) {
            continue;
        }
        for (flags, is_lazy) in [(&[][..], false), (&["--rw"], false), (&[], true), (&["--rw"], true)] {
            println!("{engine} {flags:?} {is_lazy}");
            let at = place.make("mnt");
            ok(place.loris("mount --complete never --engine").arg(engine).args(flags).arg(&name).arg(&at));
            let process = server(&at, false, &[]);
            let open = is_lazy.then(|| fs::File::open(at.join(image::BIG)).unwrap());
            assert_eq!(fs::read(at.join(image::BIG)).unwrap().len(), truth.len());
            ok(Command::new("umount").args(is_lazy.then_some("-l")).arg(&at));
            assert!(!mounted_in(place.path()).contains(&at));
            if let Some(mut open) = open {
                // Served for as long as somebody uses it.
                let mut bytes = Vec::new();
                open.read_to_end(&mut bytes).unwrap();
                assert!(bytes == truth, "{engine} {flags:?}: wrong bytes");
                drop(open);
            }
            // Which the process hears of, and takes down what it had put up itself.
            let end = Instant::now() + LIMIT;
            while !mounted_in(place.path()).is_empty() {
                assert!(Instant::now() < end, "{engine} {flags:?}: {:?}", mounted_in(place.path()));
                std::thread::sleep(Duration::from_millis(5));
            }
            place.assert_clean();
            assert_eq!(registers(&place, process), Vec::<PathBuf>::new(), "{engine} {flags:?}");
        }
    }
}

/// Of one layer, in which no file hides another: all of it can be read.
fn readable(place: &Place) -> String {
    let (layout, bundle) = (place.join("layout"), place.join("bundle"));
    let image = format!("{}:t", layout.display());
    image::umoci(&["init", "--layout", layout.to_str().unwrap()]);
    image::umoci(&["new", "--image", &image]);
    image::umoci(&["unpack", "--image", &image, bundle.to_str().unwrap()]);
    for (number, length) in [1, 4096, 100_000, 40 << 20].into_iter().enumerate() {
        fs::write(bundle.join(format!("rootfs/f{number}")), image::noise(number as u64, length)).unwrap();
    }
    image::umoci(&["repack", "--image", &image, bundle.to_str().unwrap()]);
    format!("oci:{}:t", convert(place, &layout, "converted", &[]).display())
}

/// Registers of a process's mounts, with what lies beside them.
fn registers(place: &Place, process: Pid) -> Vec<PathBuf> {
    let prefix = format!("{}-", process.as_raw_nonzero());
    let all = fs::read_dir(place.join("register")).unwrap().filter_map(Result::ok).map(|entry| entry.path());
    all.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(&prefix)).collect()
}

/// Neither sees the other one die.
fn kill_together(place: &Place, both: &[Pid]) {
    both.iter().for_each(|process| kill_process(*process, Signal::STOP).unwrap());
    both.iter().for_each(|process| kill_process(*process, Signal::KILL).unwrap());
    // Until their last threads are gone they hold what they held, and are not dead to others.
    let is_held = || {
        let registers = both.iter().flat_map(|process| registers(place, *process));
        registers.filter_map(|path| fs::File::open(path).ok()).any(|file| file.try_lock().is_err())
    };
    let end = Instant::now() + LIMIT;
    while is_held() {
        assert!(Instant::now() < end, "they do not die");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// When everything was read, nothing of ours is on the way any more, and the next one leaves the mount alone.
#[test]
fn a_complete_image_outlives_all_processes() {
    let test = "a_complete_image_outlives_all_processes";
    if !loris_testkit::require_root(test) || !have(test, &["umoci"]) {
        return;
    }
    let place = Place::new();
    if !can_page(test, &place) {
        return;
    }
    let name = readable(&place);
    for flags in [&[][..], &["--rw"]] {
        let at = place.make(&format!("mnt{}", flags.concat()));
        ok(place.loris("mount --engine fanotify").args(flags).arg(&name).arg(&at));
        let both = [server(&at, false, &[]), server(&at, true, &[])];
        let sums = || {
            let script = "find . -type f -print0 | sort -z | xargs -0 cksum";
            ok(Command::new("sh").args(["-c", script]).current_dir(&at)).text()
        };
        let expected = sums();
        let register =
            registers(&place, both[0]).into_iter().find(|path| path.extension().unwrap() == "mounts").unwrap();
        let end = Instant::now() + LIMIT;
        while !fs::read_to_string(&register).unwrap().contains(&format!("={}\0", at.display())) {
            assert!(Instant::now() < end, "{:?}", fs::read_to_string(&register));
            std::thread::sleep(Duration::from_millis(20));
        }
        kill_together(&place, &both);
        // What the kernel has cached would prove nothing.
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        assert_eq!(sums(), expected);
        let other = place.make("other");
        ok(place.loris("mount --engine fanotify").arg(&name).arg(&other));
        ok(place.loris("umount").arg(&other));
        fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
        assert_eq!(sums(), expected, "{flags:?}: after another one has started");
        assert_eq!(registers(&place, both[0]).len(), 2, "the register stays, with its note");
        ok(place.loris("umount").arg(&at));
        assert_eq!(registers(&place, both[0]), Vec::<PathBuf>::new());
        place.assert_clean();
    }
}

#[test]
fn a_container_dies_with_its_owner_and_leaves_nothing() {
    let test = "a_container_dies_with_its_owner_and_leaves_nothing";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    if !can_page(test, &place) {
        return;
    }
    let _alone = crate::harness::containers();
    let converted = convert(&place, small, "converted", &[]);
    let mut command = place.loris("run --net none --engine fanotify");
    command.arg(format!("oci:{}:t", converted.display())).args(["/bin/sh", "-c", "echo up; read nothing"]);
    let mut owner = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(owner.stdout.as_mut().unwrap()), &mut line).unwrap();
    assert!(!mounted_in(place.path()).is_empty(), "{line}");
    owner.kill().unwrap();
    owner.wait().unwrap();
    // Taken down by another process, which nobody here knows.
    let end = Instant::now() + LIMIT;
    let is_left = || !mounted_in(place.path()).is_empty() || fs::read_dir(place.join("tmp")).unwrap().count() > 0;
    while is_left() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(10));
    }
    place.assert_clean();
}

//! `loris daemon snapshotter` beside a real containerd, again and again: many containers of many images, and images that
//! come and go, leave nothing behind.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal};

use crate::{
    harness::{LIMIT, containers, mounted_in, ok},
    image, layout,
    ours_to_peers::convert,
    snapshotter::{Scene, disk_use},
};

/// How often images are pulled and removed; more, where a person has the time.
const ROUNDS: usize = 40;
const ROUNDS_VARIABLE: &str = "LORIS_TEST_ROUNDS";
/// Rounds before anything is counted: pools and tables have their size then.
const WARM_UP: usize = 8;
/// Memory that allocators keep back may differ by so much.
const MEMORY_SLACK: u64 = 12 << 20;

/// Makes images of the same files in other blobs.
fn variants(scene: &Scene, small: &Path, count: usize) -> Vec<(PathBuf, String)> {
    let make = |number: usize| {
        let chunk = ((number + 1) << 16).to_string();
        let converted = convert(&scene.place, small, &format!("variant-{number}"), &["--estargz-chunk-size", &chunk]);
        let name = scene.push(&converted, &format!("variant-{number}:t"));
        (converted, name)
    };
    (0..count).map(make).collect()
}

/// What a process and its directories take.
#[derive(Debug)]
struct Taken {
    descriptors: usize,
    threads: usize,
    memory: u64,
    keeper: (usize, u64),
    mounts: usize,
    disk: u64,
}

impl Taken {
    fn now(scene: &Scene) -> Self {
        let daemon = scene.daemon.process().unwrap();
        let keeper = keeper(&scene.daemon.root).unwrap();
        Self {
            descriptors: descriptors(daemon),
            threads: fs::read_dir(format!("/proc/{}/task", daemon.as_raw_nonzero())).unwrap().count(),
            memory: memory(daemon),
            keeper: (descriptors(keeper), memory(keeper)),
            mounts: mounted_in(scene.place.path()).len(),
            disk: disk_use(&scene.daemon.root) + disk_use(&scene.place.join("cache")),
        }
    }

    /// Whether it is no more than at another time.
    fn fits(&self, before: &Self) -> bool {
        self.descriptors <= before.descriptors + 4
            && self.threads <= before.threads + 2
            && self.memory <= before.memory + MEMORY_SLACK
            && self.keeper.0 <= before.keeper.0 + 2
            && self.keeper.1 <= before.keeper.1 + (1 << 20)
            && self.mounts <= before.mounts
            && self.disk <= before.disk + (256 << 10)
    }
}

fn descriptors(process: Pid) -> usize {
    fs::read_dir(format!("/proc/{}/fd", process.as_raw_nonzero())).unwrap().count()
}

/// Bytes that nobody else has.
fn memory(process: Pid) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.as_raw_nonzero())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10
}

/// Its keeper, which was told how a successor is started; `None` where nothing was mounted yet.
fn keeper(root: &Path) -> Option<Pid> {
    let is_ours = |process: &i32| {
        let read = |file: &str| fs::read(format!("/proc/{process}/{file}")).unwrap_or_default();
        let command = String::from_utf8_lossy(&read("cmdline")).into_owned();
        read("comm").starts_with(b"loris-keeper") && command.contains(&*root.to_string_lossy())
    };
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(is_ours).and_then(Pid::from_raw)
}

#[test]
fn images_that_come_and_go_leave_nothing_behind() {
    let test = "images_that_come_and_go_leave_nothing_behind";
    let _alone = containers();
    let Some(small) = image::small(test) else { return };
    let Some(scene) = Scene::new(test, &[]) else { return };
    let rounds = std::env::var(ROUNDS_VARIABLE).ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS);
    let variants = variants(&scene, small, 4);
    let round = |number: usize| {
        let (_, name) = &variants[number % variants.len()];
        scene.pull(name);
        // Some are removed before anything of them is read.
        if number % 4 != 3 {
            let id = format!("round-{number}-{}", std::process::id());
            scene.reads(name, &id);
        }
        ok(scene.containerd().ctr().args(["images", "rm", "--sync", name]));
    };
    let halves = [0..rounds / 2, rounds / 2..rounds];
    for (half, rounds) in halves.into_iter().enumerate() {
        let mut before = None;
        for (done, number) in rounds.enumerate() {
            if done == WARM_UP {
                settle(&scene);
                before = Some(Taken::now(&scene));
            }
            round(number);
        }
        let before = before.expect("more rounds than those of the warm-up");
        settle(&scene);
        let end = Instant::now() + LIMIT;
        let mut now = Taken::now(&scene);
        while !now.fits(&before) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(200));
            now = Taken::now(&scene);
        }
        println!("half {half}: {before:?}, then {now:?}");
        assert!(now.fits(&before), "half {half}: {before:?}, then {now:?}: {}", scene.daemon.said());
        if half == 0 {
            // Who comes after one that was killed leaves nothing behind either.
            let killed = scene.daemon.process().unwrap();
            scene.daemon.signal(Signal::KILL);
            scene.daemon.wait_for_another(killed);
            scene.daemon.wait_until_it_answers();
        }
    }
    assert_eq!(scene.snapshots(), Vec::<String>::new());
    scene.finish();
}

/// Waits until what was fetched of removed images is gone.
fn settle(scene: &Scene) {
    let end = Instant::now() + LIMIT;
    let layers = || fs::read_dir(scene.place.join("cache/layers")).map_or(0, Iterator::count);
    while layers() > 0 || !mounted_in(&scene.daemon.root).is_empty() {
        assert!(Instant::now() < end, "{} layers stay: {}", layers(), scene.daemon.said());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn many_containers_of_many_images_start_at_once() {
    let test = "many_containers_of_many_images_start_at_once";
    const IMAGES: usize = 10;
    const CONTAINERS: usize = 50;
    let _alone = containers();
    let Some(small) = image::small(test) else { return };
    let Some(scene) = Scene::new(test, &["--complete=never"]) else { return };
    let variants = variants(&scene, small, IMAGES);
    // Nothing of it is pulled before: the first container of each image waits for nobody else's.
    std::thread::scope(|scope| {
        for (_, name) in &variants {
            scope.spawn(|| scene.pull(name));
        }
    });
    std::thread::scope(|scope| {
        for number in 0..CONTAINERS {
            let (scene, name) = (&scene, &variants[number % IMAGES].1);
            scope.spawn(move || {
                let id = format!("one-of-many-{number}-{}", std::process::id());
                scene.reads(name, &id);
            });
        }
    });
    for (layout, name) in &variants {
        let explained = ok(&mut scene.explain(name)).json();
        assert_eq!(explained["is_lazy"], true, "{explained}");
        for layer in explained["layers"].as_array().unwrap() {
            let of = |key: &str| layer["activity"][key].as_u64().unwrap();
            let fetched = of("demand_bytes") + of("read_ahead_bytes") + of("prefetch_bytes") + of("completion_bytes");
            assert!(fetched <= of("size"), "more was fetched than there is: {layer}");
        }
        assert_eq!(explained["layers"].as_array().unwrap().len(), layout::layers(layout).len());
        ok(scene.containerd().ctr().args(["images", "rm", "--sync", name]));
    }
    settle(&scene);
    scene.finish();
}

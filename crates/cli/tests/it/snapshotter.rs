//! `loris daemon snapshotter` beside a real containerd: images pulled and run without being pulled, containers that notice
//! nothing of what becomes of the daemon, and what is left when images go.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use loris_testkit::registry::{DockerRegistry, DockerRegistryOptions};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    containerd::Containerd,
    crash::can_page,
    harness::{LIMIT, LORIS, Place, containers, have, mounted_in, ok, run},
    image, layout,
    ours_to_peers::{assert_same, convert, unpacked_facts},
};

/// Where everything of a test is.
pub struct Scene {
    // In this order they are taken down.
    pub containerd: Option<Containerd>,
    pub daemon: Snapshotter,
    pub registry: DockerRegistry,
    pub place: Place,
}

/// The daemon and its successors.
pub struct Snapshotter {
    pub started: Option<Child>,
    pub root: PathBuf,
    socket: PathBuf,
    log: PathBuf,
    arguments: Vec<String>,
    /// Where metrics are.
    watched: String,
}

impl Snapshotter {
    pub fn start(&mut self) {
        let log = fs::File::options().create(true).append(true).open(&self.log).unwrap();
        let mut command = Command::new(LORIS);
        command.args(["daemon", "snapshotter"]).args(&self.arguments).env("LORIS_LOG", "info");
        // A service manager that runs the tests must not be taken for one that runs the daemon.
        command.env_remove("INVOCATION_ID").env_remove("NOTIFY_SOCKET");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        if let Some(mut before) = self.started.replace(child) {
            before.wait().unwrap();
        }
        self.wait_until_it_answers();
    }

    pub fn wait_until_it_answers(&self) {
        let end = Instant::now() + LIMIT;
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            assert!(Instant::now() < end, "the daemon does not answer: {}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Asks what is watched.
    pub fn http(&self, path: &str) -> String {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(&self.watched).unwrap();
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// Who serves now.
    pub fn process(&self) -> Option<Pid> {
        Pid::from_raw(fs::read_to_string(self.root.join("lock")).ok()?.trim().parse().ok()?)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(self.process().unwrap(), signal).unwrap();
    }

    /// Waits until another process serves than `before`.
    pub fn wait_for_another(&self, before: Pid) {
        let end = Instant::now() + LIMIT;
        while self.process().is_none_or(|now| now == before) {
            assert!(Instant::now() < end, "no successor: {}", self.said());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// A container that runs, and where its root file system is.
pub struct Background {
    pub container: String,
    pub at: PathBuf,
}

impl Drop for Scene {
    fn drop(&mut self) {
        // A test that has failed may leave containers, which containerd leaves running.
        let Some(containerd) = &self.containerd else { return };
        let tasks = run(containerd.ctr().args(["tasks", "ls", "-q"])).text();
        for task in tasks.lines() {
            let _ = run(containerd.ctr().args(["tasks", "rm", "--force", task]));
        }
        self.containerd.take();
    }
}

impl Snapshotter {
    pub fn end(&mut self) {
        // It takes down what is mounted, and its keeper ends with it.
        if let Some(process) = self.process() {
            let _ = kill_process(process, Signal::INT);
        }
        let end = Instant::now() + Duration::from_secs(20);
        if let Some(mut child) = self.started.take() {
            while child.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Drop for Snapshotter {
    fn drop(&mut self) {
        self.end();
    }
}

impl Scene {
    pub fn new(test: &str, more: &[&str]) -> Option<Self> {
        if !loris_testkit::require_root(test) || !have(test, &["runc"]) {
            return None;
        }
        let place = Place::new();
        if !can_page(test, &place) {
            return None;
        }
        let registry = DockerRegistry::start(test, &DockerRegistryOptions::default()).unwrap()?;
        let given = more.iter().find_map(|argument| argument.strip_prefix("--root="));
        let root = given.map_or_else(|| place.make("snapshotter"), PathBuf::from);
        let socket = place.join("snapshotter.sock");
        let text = |path: &Path| path.display().to_string();
        let mut arguments = vec![
            format!("--root={}", text(&root)),
            format!("--address={}", text(&socket)),
            format!("--cache-dir={}", text(&place.join("cache"))),
        ];
        // A port that was free a moment ago.
        let watched = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        arguments.push(format!("--metrics-address={watched}"));
        // What is said again counts, and clap wants it once.
        let name = |argument: &str| argument.split('=').next().unwrap_or_default().to_owned();
        arguments.retain(|argument| !more.iter().any(|other| name(other) == name(argument)));
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        let mut daemon = Snapshotter { started: None, root, socket, log: place.join("daemon.log"), arguments, watched };
        daemon.start();
        let plugin = format!("[proxy_plugins.loris]\ntype = \"snapshot\"\naddress = \"{}\"\n", text(daemon.socket()));
        let containerd = Containerd::start_with(test, &place, &plugin)?;
        Some(Self { containerd: Some(containerd), daemon, registry, place })
    }

    pub fn containerd(&self) -> &Containerd {
        self.containerd.as_ref().unwrap()
    }

    /// Converts a layout's image, and pushes it under a name.
    pub fn push(&self, image: &Path, name: &str) -> String {
        let name = format!("{}/{name}", self.registry.address());
        ok(self.place.loris("copy --quiet").arg(format!("oci:{}:t", image.display())).arg(&name));
        name
    }

    pub fn pull(&self, name: &str) {
        let mut command = self.containerd().ctr_remote();
        ok(command.args(["images", "rpull", "--plain-http", "--snapshotter", "loris", name]));
    }

    /// Starts a container that waits, and returns where its root file system is.
    pub fn run_in_background(&self, name: &str, container: &str) -> PathBuf {
        let mut command = self.containerd().ctr();
        command.args(["run", "--detach", "--snapshotter", "loris", name, container, "/bin/sh", "-c"]);
        ok(command.arg("while read -r line; do :; done < /data/big; while :; do . /hello; done > /dev/null"));
        self.place.join("containerd/state/io.containerd.runtime.v2.task/tests").join(container).join("rootfs")
    }

    /// Runs a container that says by its exit status whether it has read what it should: on a machine with much to do,
    /// `ctr` of containerd 1.6 loses what containers print.
    pub fn reads(&self, name: &str, container: &str) {
        const RIGHT: i32 = 42;
        let script =
            format!("read -r line < /hello; [ \"$line\" = 'echo {}' ] && exit {RIGHT}", image::GREETING.trim());
        let mut command = self.containerd().ctr();
        command.args(["run", "--rm", "--snapshotter", "loris", name, container, "/bin/sh", "-c", &script]);
        let ran = run(&mut command);
        assert_eq!(ran.status.code(), Some(RIGHT), "{container}: {ran} {}", self.daemon.said());
    }

    /// Starts a container that reads little, and goes on until it is ended.
    pub fn run_in_background_without_reading(&self, name: &str) -> Background {
        let container = format!("background-{}", std::process::id());
        let mut command = self.containerd().ctr();
        command.args(["run", "--detach", "--snapshotter", "loris", name, &container, "/bin/sh", "-c"]);
        ok(command.arg("while :; do . /hello; done > /dev/null"));
        let state = self.place.join("containerd/state/io.containerd.runtime.v2.task/tests");
        Background { at: state.join(&container).join("rootfs"), container }
    }

    pub fn is_running(&self, container: &str) -> bool {
        let tasks = ok(self.containerd().ctr().args(["tasks", "ls"])).text();
        tasks.lines().any(|line| line.starts_with(container) && line.contains("RUNNING"))
    }

    pub fn end(&self, container: &str) {
        ok(self.containerd().ctr().args(["tasks", "kill", "--signal", "SIGKILL", container]));
        let end = Instant::now() + LIMIT;
        while !run(self.containerd().ctr().args(["containers", "rm", container])).status.success() {
            assert!(Instant::now() < end, "{container} can't be removed");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Shows the root file system of the only image, as `ctr` mounts a view of it. (`ctr images mount` of containerd 1.6
    /// unpacks for its default snapshotter, whatever it is told.)
    pub fn view(&self, look: impl FnOnce(&Path)) {
        let listed = self.snapshots();
        let field = |line: &str, number: usize| line.split_whitespace().nth(number).unwrap_or_default().to_owned();
        let parents: Vec<String> = listed.iter().map(|line| field(line, 1)).collect();
        let is_top = |line: &&String| line.ends_with("Committed ") && !parents.contains(&field(line, 0));
        let top = field(listed.iter().find(is_top).unwrap(), 0);
        let snapshots = |arguments: &[&str]| {
            ok(self.containerd().ctr().args(["snapshots", "--snapshotter", "loris"]).args(arguments)).text()
        };
        let at = self.place.make("viewed");
        // Nothing holds the view, and containerd may just be collecting garbage.
        let told = loop {
            snapshots(&["view", "test-view", &top]);
            let mut mounts = self.containerd().ctr();
            let told = run(mounts.args(["snapshots", "--snapshotter", "loris", "mounts"]).arg(&at).arg("test-view"));
            if !told.stderr.contains("not found") {
                break told.succeeded().text();
            }
        };
        ok(Command::new("sh").args(["-c", &told]));
        look(&at);
        ok(Command::new("umount").arg(&at));
        // Perhaps it is garbage by now.
        let _ = run(self.containerd().ctr().args(["snapshots", "--snapshotter", "loris", "rm", "test-view"]));
    }

    pub fn snapshots(&self) -> Vec<String> {
        let listed = ok(self.containerd().ctr().args(["snapshots", "--snapshotter", "loris", "ls"])).text();
        listed.lines().skip(1).map(str::to_owned).collect()
    }

    /// Layer blobs that were asked for, whole or in part.
    pub fn requests(&self, layers: &[String]) -> usize {
        let is_layer = |request: &String| layers.iter().any(|layer| request.contains(layer.as_str()));
        self.registry.requests().iter().filter(|request| is_layer(request)).count()
    }

    pub fn explain(&self, name: &str) -> Command {
        let mut command = self.place.loris("explain --json --root");
        command.arg(&self.daemon.root).arg(name);
        command
    }

    pub fn finish(mut self) {
        self.containerd.take();
        self.daemon.end();
        self.place.assert_clean();
    }
}

/// A container's name, which the runtime keeps in a place that all tests share.
pub fn greeter() -> String {
    format!("greeter-{}", std::process::id())
}

/// Bytes of blocks below a directory.
pub fn disk_use(directory: &Path) -> u64 {
    let told = ok(Command::new("du").args(["--summarize", "--block-size=1"]).arg(directory)).text();
    told.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn images_run_before_they_are_pulled_and_go_without_a_trace() {
    let test = "images_run_before_they_are_pulled_and_go_without_a_trace";
    let _alone = containers();
    let Some(small) = image::small(test) else { return };
    // Nothing but what is read.
    let Some(scene) = Scene::new(test, &["--complete=never"]) else { return };
    let converted = convert(&scene.place, small, "converted", &[]);
    let name = scene.push(&converted, "small:t");
    scene.pull(&name);
    assert_eq!(scene.snapshots().len(), layout::layers(&converted).len());
    let greeting = ok(scene.containerd().ctr().args(["run", "--rm", "--snapshotter", "loris", &name, &greeter()]));
    assert_eq!(greeting.text(), image::GREETING);
    // containerd has fetched no layer, and we only what was read: not the large file, which does not compress.
    let has_content = ok(scene.containerd().ctr().args(["content", "ls", "-q"])).text();
    for layer in layout::layers(&converted) {
        assert!(!has_content.contains(&layer), "containerd has pulled {layer}");
    }
    assert!(disk_use(&scene.place.join("cache")) < 8 << 20, "{} bytes are here", disk_use(&scene.place.join("cache")));

    // All of it is right.
    let root = layout::unpack(small, "t", &scene.place.join("bundle"));
    scene.view(|at| assert_same(&unpacked_facts(&root), &unpacked_facts(at)));

    let explained = ok(&mut scene.explain(&name)).json();
    assert_eq!(explained["is_lazy"], true, "{explained}");
    assert!(explained["layers"][1]["activity"]["demand_bytes"].as_u64().unwrap() > 0, "{explained}");
    // Told once in a second.
    let end = Instant::now() + LIMIT;
    loop {
        let status = ok(scene.place.loris("status --json").arg(&name)).json();
        if status["processes"][0]["verb"] == "daemon snapshotter" {
            break;
        }
        assert!(Instant::now() < end, "{status}");
        std::thread::sleep(Duration::from_millis(100));
    }
    scene.explain("no-such-image").output().map(|ran| assert!(!ran.status.success())).unwrap();
    for (path, said) in [
        ("/metrics", "loris_layers_prepared_total{outcome=\"lazy\"}"),
        ("/metrics", "loris_fetched_bytes_total{why=\"demand\"}"),
        ("/healthz", "ok"),
        ("/readyz", "ok"),
    ] {
        let answer = scene.daemon.http(path);
        assert!(answer.contains(said), "{path}: {answer}");
    }

    ok(scene.containerd().ctr().args(["images", "rm", "--sync", &name]));
    assert_eq!(scene.snapshots(), Vec::<String>::new());
    let end = Instant::now() + LIMIT;
    while disk_use(&scene.place.join("cache")) > 2 << 20 {
        assert!(Instant::now() < end, "the disk is not freed: {}", scene.daemon.said());
        std::thread::sleep(Duration::from_millis(100));
    }
    let left = mounted_in(&scene.daemon.root);
    assert_eq!(left, Vec::<PathBuf>::new(), "still mounted");
    assert_eq!(fs::read_dir(scene.daemon.root.join("snapshots")).unwrap().count(), 0);
    scene.finish();
}

#[test]
fn what_is_not_lazy_is_pulled_and_says_why() {
    let test = "what_is_not_lazy_is_pulled_and_says_why";
    let _alone = containers();
    let Some(small) = image::small(test) else { return };
    let Some(scene) = Scene::new(test, &[]) else { return };
    let converted = convert(&scene.place, small, "converted", &[]);
    // The second layer claims to be lazy no more.
    let mixed = scene.place.join("mixed");
    layout::copy(&converted, &mixed);
    layout::edit_manifest(&mixed, |manifest| {
        manifest["layers"][1].as_object_mut().unwrap().remove("annotations");
    });
    let root = layout::unpack(small, "t", &scene.place.join("bundle"));
    let expected = as_containerd_unpacks(&root);
    for (number, layout) in [small, &mixed].into_iter().enumerate() {
        let name = scene.push(layout, &format!("image-{number}:t"));
        scene.pull(&name);
        scene.view(|at| assert_same(&expected, &as_containerd_unpacks(at)));
        let greeting = ok(scene.containerd().ctr().args(["run", "--rm", "--snapshotter", "loris", &name, &greeter()]));
        assert_eq!(greeting.text(), image::GREETING, "{name}");
        let explained = ok(&mut scene.explain(&name)).json();
        assert_eq!(explained["is_lazy"], false, "{explained}");
        let layer = &explained["layers"][number];
        assert!(layer["fallback"].as_str().is_some_and(|reason| !reason.is_empty()), "{explained}");
        if number == 1 {
            assert_eq!(explained["layers"][0]["is_lazy"], true, "{explained}");
            assert!(scene.daemon.said().contains("remote_snapshot_prepared=true"), "{}", scene.daemon.said());
        }
        ok(scene.containerd().ctr().args(["images", "rm", "--sync", &name]));
        assert_eq!(scene.snapshots(), Vec::<String>::new());
    }
    assert!(scene.daemon.said().contains("a layer is pulled as usual"), "{}", scene.daemon.said());
    scene.finish();
}

/// Reads a tree without what containerd does otherwise than the tar says: the root directory's time, and times before 1970.
fn as_containerd_unpacks(root: &Path) -> std::collections::BTreeMap<PathBuf, loris_testkit::tree::Facts> {
    let mut all = unpacked_facts(root);
    all.retain(|path, _| path != Path::new("") && !path.starts_with("times"));
    all
}

/// How a daemon ends.
#[derive(Clone, Copy, Debug)]
enum End {
    /// Its keeper starts another one.
    Killed,
    /// Its keeper starts one that serves reads, until somebody starts a whole one.
    Stopped,
    /// It is killed, and somebody starts another one at the same time.
    KilledAndStarted,
}

#[test]
fn containers_go_on_whatever_becomes_of_the_daemon() {
    let test = "containers_go_on_whatever_becomes_of_the_daemon";
    let _alone = containers();
    let Some(small) = image::small(test) else { return };
    let Some(mut scene) = Scene::new(test, &["--complete=never"]) else { return };
    let converted = convert(&scene.place, small, "converted", &["--estargz-chunk-size", "65536"]);
    let name = scene.push(&converted, "small:t");
    scene.pull(&name);
    // Its runtime keeps names in a place that all tests share.
    let busy = &format!("busy-{}", std::process::id());
    let root = scene.run_in_background(&name, busy);
    let truth = layout::unpack(small, "t", &scene.place.join("bundle"));
    let truth = fs::read(truth.join(image::BIG)).unwrap();
    // Each time, the next part of a file is read that is not here.
    let part = 1 << 20;
    let ends = [End::Killed, End::Stopped, End::KilledAndStarted, End::Killed, End::Stopped, End::KilledAndStarted];
    for (number, how) in ends.into_iter().enumerate() {
        let before = scene.daemon.process().unwrap();
        let reader = {
            let (path, from) = (root.join(image::BIG), number * part);
            std::thread::spawn(move || read_part(&path, from, part))
        };
        match how {
            End::Killed => {
                scene.daemon.signal(Signal::KILL);
                scene.daemon.wait_for_another(before);
            }
            End::Stopped => {
                scene.daemon.signal(Signal::TERM);
                scene.daemon.wait_for_another(before);
                let resting = scene.daemon.process().unwrap();
                let also = read_part(&root.join(image::BIG), (ends.len() + number) * part / 2, part / 2);
                assert!(also == truth[(ends.len() + number) * part / 2..][..part / 2], "by {resting:?}");
                scene.daemon.start();
            }
            End::KilledAndStarted => {
                scene.daemon.signal(Signal::KILL);
                scene.daemon.start();
            }
        }
        assert!(reader.join().unwrap() == truth[number * part..][..part], "round {number}, {how:?}");
        assert!(scene.is_running(busy), "round {number}, {how:?}");
        scene.daemon.wait_until_it_answers();
        let again = format!("greeter-{number}-{}", std::process::id());
        let mut greeter = scene.containerd().ctr();
        let greeting = run(greeter.args(["run", "--rm", "--snapshotter", "loris", &name, &again]));
        assert_eq!(greeting.text(), image::GREETING, "round {number}, {how:?}: {greeting} {}", scene.daemon.said());
    }
    scene.end(busy);
    scene.finish();
}

fn read_part(path: &Path, from: usize, length: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt as _;
    let mut part = vec![0; length];
    fs::File::open(path).unwrap().read_exact_at(&mut part, from as u64).unwrap();
    part
}

#[test]
fn many_containers_of_one_image_fetch_each_byte_once() {
    let test = "many_containers_of_one_image_fetch_each_byte_once";
    const CONTAINERS: usize = 50;
    let _alone = containers();
    let Some(small) = image::small(test) else { return };
    let Some(scene) = Scene::new(test, &["--complete=never"]) else { return };
    let converted = convert(&scene.place, small, "converted", &[]);
    let name = scene.push(&converted, "small:t");
    let descriptors = |pid: Pid| fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).unwrap().count();
    scene.pull(&name);
    let before = descriptors(scene.daemon.process().unwrap());
    std::thread::scope(|scope| {
        for number in 0..CONTAINERS {
            let (scene, name) = (&scene, &name);
            scope.spawn(move || {
                let id = format!("many-{number}-{}", std::process::id());
                let mut run = scene.containerd().ctr();
                let greeting = ok(run.args(["run", "--rm", "--snapshotter", "loris", name, &id]));
                assert_eq!(greeting.text(), image::GREETING);
            });
        }
    });
    let layers = ok(&mut scene.explain(&name)).json();
    for layer in layers["layers"].as_array().unwrap() {
        let activity = &layer["activity"];
        let of = |key: &str| activity[key].as_u64().unwrap();
        let fetched = of("demand_bytes") + of("read_ahead_bytes") + of("prefetch_bytes") + of("completion_bytes");
        assert!(fetched <= of("size"), "more was fetched than there is: {layer}");
    }
    // Neither mounts nor descriptors are left of them.
    ok(scene.containerd().ctr().args(["images", "rm", "--sync", &name]));
    assert_eq!(mounted_in(&scene.daemon.root), Vec::<PathBuf>::new());
    let end = Instant::now() + LIMIT;
    while descriptors(scene.daemon.process().unwrap()) > before + 8 {
        assert!(Instant::now() < end, "descriptors are left open");
        std::thread::sleep(Duration::from_millis(100));
    }
    scene.finish();
}

#[test]
fn a_machine_that_starts_anew_needs_no_registry() {
    let test = "a_machine_that_starts_anew_needs_no_registry";
    let _alone = containers();
    let Some(small) = image::small(test) else { return };
    let Some(mut scene) = Scene::new(test, &[]) else { return };
    let converted = convert(&scene.place, small, "converted", &[]);
    let name = scene.push(&converted, "small:t");
    scene.pull(&name);
    let layers = layout::layers(&converted);
    let end = Instant::now() + LIMIT;
    while !scene.daemon.said().contains("all of its lazy layers are complete") {
        assert!(Instant::now() < end, "{}", scene.daemon.said());
        std::thread::sleep(Duration::from_millis(50));
    }
    // As a reboot: nothing is mounted, nobody runs.
    scene.daemon.signal(Signal::INT);
    scene.daemon.started.take().unwrap().wait().unwrap();
    assert_eq!(mounted_in(&scene.daemon.root), Vec::<PathBuf>::new());
    let before = scene.requests(&layers);
    scene.daemon.start();
    let greeting = ok(scene.containerd().ctr().args(["run", "--rm", "--snapshotter", "loris", &name, &greeter()]));
    assert_eq!(greeting.text(), image::GREETING);
    assert_eq!(scene.requests(&layers), before, "the registry was asked for what is here");
    ok(scene.containerd().ctr().args(["images", "rm", "--sync", &name]));
    scene.finish();
}

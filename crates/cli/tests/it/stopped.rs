//! Signals in the middle of work: it ends at once, with the status that says so, and leaves nothing.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use loris_testkit::registry::{Effect, Fault, FaultRegistry, LoggedRequest};
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    bad_input::name_of,
    harness::{LIMIT, Place, containers, ok},
    image,
};

/// Longer than a test may take: what waits for it has to be stopped.
const FOREVER: Duration = Duration::from_secs(3600);

/// Starts a command, sends it a signal when it has asked the registry for what does not come, and returns its exit status and what it said.
fn stopped(
    registry: &FaultRegistry,
    command: &mut Command,
    signal: Signal,
    awaited: &dyn Fn(&LoggedRequest) -> bool,
) -> (Option<i32>, String) {
    registry.forget_requests();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let end = Instant::now() + LIMIT;
    let has_asked = || registry.requests().iter().any(awaited);
    while !has_asked() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    let asked = has_asked();
    // Time to be in the midst of what came before the standstill.
    std::thread::sleep(Duration::from_millis(100));
    let _ = kill_process(Pid::from_child(&child), signal);
    let mut child = child;
    while child.try_wait().unwrap().is_none() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = child.try_wait().unwrap().is_some();
    let _ = child.kill();
    let output = child.wait_with_output().unwrap();
    registry.end_faults();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(asked, "the registry was never asked: {said}");
    assert!(ended, "{command:?} goes on: {said}");
    (output.status.code(), said)
}

fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn verbs_that_write_leave_nothing_when_a_signal_ends_them() {
    let test = "verbs_that_write_leave_nothing_when_a_signal_ends_them";
    let Some(small) = image::small(test) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let registry = runtime.block_on(FaultRegistry::start());
    let place = Place::new();
    let image = registry.reference("t");
    ok(place.loris("push --quiet").arg(name_of(small)).arg(&image));
    let layer = crate::layout::layers(small)[0].clone();
    let cases = [
        ("pull", "x.tar", Signal::INT, 130),
        ("pull", "layout", Signal::TERM, 143),
        ("copy", "oci-archive:x", Signal::HUP, 129),
        ("save --format docker-archive --output x.tar", "", Signal::INT, 130),
        ("convert --estargz", "oci:layout:t", Signal::INT, 130),
        ("convert --estargz", "oci-archive:x.tar", Signal::TERM, 143),
    ];
    for (verb, destination, signal, status) in cases {
        println!("{verb} {destination}");
        registry.fault(
            Fault::new(Effect::Stall(50_000, FOREVER)).method("GET").path(format!("/blobs/{layer}")).times(usize::MAX),
        );
        let target = place.make("target");
        let mut command = place.loris(verb);
        command.arg(&image).args((!destination.is_empty()).then_some(destination)).current_dir(&target);
        let (code, said) = stopped(&registry, &mut command, signal, &|request| request.path.ends_with(&layer));
        assert_eq!(code, Some(status), "{said}");
        let left: Vec<String> = names(&target).into_iter().filter(|name| name != "layout").collect();
        assert_eq!(left, Vec::<String>::new(), "{verb}");
        if target.join("layout").exists() {
            let unfinished = names(&target.join("layout")).into_iter().find(|name| name.starts_with('.'));
            assert_eq!(unfinished, None, "{verb}");
        }
        fs::remove_dir_all(&target).unwrap();
        place.assert_clean();
    }
}

#[test]
fn run_is_stopped_while_it_opens_and_while_it_pulls() {
    let test = "run_is_stopped_while_it_opens_and_while_it_pulls";
    let Some(small) = image::small(test) else { return };
    let _alone = containers();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let registry = runtime.block_on(FaultRegistry::start());
    let place = Place::new();
    let image = registry.reference("t");
    ok(place.loris("push --quiet").arg(name_of(small)).arg(&image));
    let layer = crate::layout::layers(small)[0].clone();
    let opening = || Fault::new(Effect::Delay(FOREVER)).path("/manifests/").times(usize::MAX);
    // How often it is looked what kind of layer it is, before it is pulled.
    registry.forget_requests();
    ok(place.loris("run --quiet --no-lazy --net none").arg(&image));
    let of_layer = |request: &&LoggedRequest| request.method == "GET" && request.path.ends_with(&layer);
    let looks = registry.requests().iter().filter(of_layer).count() - 1;
    let pulling =
        || Fault::new(Effect::Stall(300_000, FOREVER)).path(format!("/blobs/{layer}")).skip(looks).times(usize::MAX);
    let manifest: &dyn Fn(&LoggedRequest) -> bool = &|request| request.path.contains("/manifests/");
    let whole_layer: &dyn Fn(&LoggedRequest) -> bool =
        &|request| request.path.ends_with(&layer) && request.method == "GET" && request.header("range").is_none();
    for (name, fault, awaited, signal, status) in [
        ("opening", opening(), manifest, Signal::INT, 130),
        ("opening", opening(), manifest, Signal::TERM, 143),
        ("pulling", pulling(), whole_layer, Signal::INT, 130),
        ("pulling", pulling(), whole_layer, Signal::HUP, 129),
    ] {
        println!("{name} {signal:?}");
        registry.fault(fault);
        let mut command = place.loris("run --no-lazy --net none");
        let (code, said) = stopped(&registry, command.arg(&image), signal, awaited);
        assert_eq!(code, Some(status), "{said}");
        place.assert_clean();
    }
    // Who ignores a signal goes on ignoring it, as under nohup.
    registry.fault(Fault::new(Effect::Delay(Duration::from_secs(2))).path("/manifests/"));
    let mut command = place.command("sh");
    command.args([
        "-c",
        "trap '' HUP; exec \"$@\"",
        "sh",
        crate::harness::LORIS,
        "run",
        "--quiet",
        "--net",
        "none",
        &image,
    ]);
    let (code, said) = stopped(&registry, command.env("LORIS_CACHE_DIR", place.join("cache")), Signal::HUP, manifest);
    assert_eq!(code, Some(0), "{said}");
    place.assert_clean();
}

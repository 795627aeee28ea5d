//! Images in containerd's own store: copied there and from there, and made whole behind a lazy pull, so that containerd's
//! other clients can export, push and convert them.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use loris_testkit::registry::{DockerRegistry, DockerRegistryOptions};

use crate::{
    containerd::Containerd,
    harness::{LIMIT, Place, containers, have, ok, run},
    image, layout,
    ours_to_peers::convert,
    snapshotter::{Scene, greeter},
};

/// `loris`, that speaks to a test's containerd.
fn loris(place: &Place, containerd: &Containerd, arguments: &str) -> Command {
    let mut command = place.loris(arguments);
    command.env("CONTAINERD_ADDRESS", containerd.socket()).env_remove("CONTAINERD_NAMESPACE");
    command
}

fn in_containerd(name: &str) -> String {
    format!("containerd:tests/{name}")
}

/// Digests of all blobs that containerd has.
fn blobs(containerd: &Containerd) -> BTreeSet<String> {
    let told = ok(containerd.ctr().args(["content", "ls", "-q"])).text();
    told.lines().map(|line| line.trim_start_matches("sha256:").to_owned()).collect()
}

/// Digests of an image's layers, as file names.
fn layers(layout: &Path) -> BTreeSet<String> {
    layout::layers(layout).iter().map(|layer| layer.trim_start_matches("sha256:").to_owned()).collect()
}

/// containerd looks for garbage when an image is removed.
fn collect_garbage(scene: &Scene, name: &str) {
    ok(scene.containerd().ctr().args(["images", "tag", name, "garbage:t"]));
    ok(scene.containerd().ctr().args(["images", "rm", "--sync", "garbage:t"]));
}

#[test]
fn a_lazily_pulled_image_becomes_whole_where_it_is() {
    let test = "a_lazily_pulled_image_becomes_whole_where_it_is";
    let _alone = containers();
    let Some(small) = image::small(test) else { return };
    let Some(scene) = Scene::new(test, &["--complete=never"]) else { return };
    let Some(other) = DockerRegistry::start(test, &DockerRegistryOptions::default()).unwrap() else { return };
    let converted = convert(&scene.place, small, "converted", &[]);
    let name = scene.push(&converted, "small:t");
    scene.pull(&name);
    let wanted = layers(&converted);
    assert!(blobs(scene.containerd()).is_disjoint(&wanted), "it was not pulled lazily");
    let elsewhere = format!("{}/small:t", other.address());
    let archive = scene.place.join("archive.tar");
    let export = || run(scene.containerd().ctr().args(["images", "export"]).arg(&archive).arg(&name));
    let push = || run(scene.containerd().ctr().args(["images", "push", "--plain-http", &elsewhere, &name]));
    let uncompress = || run(scene.containerd().ctr().args(["images", "convert", "--uncompress", &name, "plain:t"]));
    for failed in [export(), push(), uncompress()] {
        assert!(!failed.status.success() && failed.stderr.contains("not found"), "{failed}");
    }
    // What is not there comes from the registry, whoever asks.
    let copied = scene.place.join("copied");
    ok(loris(&scene.place, scene.containerd(), "copy --quiet").arg(in_containerd(&name)).arg(name_of(&copied)));
    assert_eq!(layers(&copied), wanted);
    assert!(blobs(scene.containerd()).is_disjoint(&wanted), "reading has changed what containerd has");

    let complete = || {
        let name = in_containerd(&name);
        ok(loris(&scene.place, scene.containerd(), "copy --quiet --json").args([&name, &name])).json()
    };
    let report = complete();
    assert_eq!(report["fetched"].as_array().unwrap().len(), wanted.len(), "{report}");
    assert!(blobs(scene.containerd()).is_superset(&wanted));
    for worked in [export(), push(), uncompress()] {
        worked.succeeded();
    }
    let exported = scene.place.make("exported");
    ok(Command::new("tar").arg("-C").arg(&exported).arg("-xf").arg(&archive));
    assert_eq!(layers(&exported), wanted);
    let pushed = scene.place.join("pushed");
    ok(scene.place.loris("copy --quiet").arg(&elsewhere).arg(name_of(&pushed)));
    assert_eq!(layers(&pushed), wanted);

    // Done twice, it does nothing. What was fetched stays as long as the image, and no longer.
    let before = scene.requests(&layout::layers(&converted));
    assert_eq!(complete()["fetched"].as_array().unwrap().len(), 0);
    assert_eq!(scene.requests(&layout::layers(&converted)), before);
    collect_garbage(&scene, &name);
    assert!(blobs(scene.containerd()).is_superset(&wanted), "it was garbage");
    assert_eq!(ok(scene.containerd().ctr().args(["leases", "ls", "-q"])).text(), "");
    for name in ["plain:t", &name] {
        ok(scene.containerd().ctr().args(["images", "rm", "--sync", name]));
    }
    assert_eq!(blobs(scene.containerd()), BTreeSet::new());
    scene.finish();
}

fn name_of(layout: &Path) -> String {
    format!("oci:{}:t", layout.display())
}

#[test]
fn images_go_into_containerds_store_and_out_of_it() {
    let test = "images_go_into_containerds_store_and_out_of_it";
    let _alone = containers();
    if !have(test, &["runc"]) {
        return;
    }
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let Some(containerd) = Containerd::start(test, &place) else { return };
    let local = "localhost/team/small:t";
    ok(loris(&place, &containerd, "copy --quiet").arg(name_of(small)).arg(in_containerd(local)));
    assert_eq!(ok(containerd.ctr().args(["images", "ls", "-q"])).text().trim(), local);
    assert!(blobs(&containerd).is_superset(&layers(small)));
    // containerd can use it, and collects none of it.
    ok(containerd.ctr().args(["images", "tag", local, "again:t"]));
    ok(containerd.ctr().args(["images", "rm", "--sync", "again:t"]));
    let greeting = ok(containerd.ctr().args(["run", "--rm", local, &greeter()]));
    assert_eq!(greeting.text(), image::GREETING);
    let back = place.join("back");
    containerd.export(local, &back);
    assert_eq!(layers(&back), layers(small));
    let converted = place.join("converted");
    let command = "convert --quiet --estargz --oci";
    ok(loris(&place, &containerd, command).arg(in_containerd(local)).arg(name_of(&converted)));
    ok(loris(&place, &containerd, "copy --quiet").arg(name_of(&converted)).arg(in_containerd("localhost/team/lazy:t")));
    let listed = ok(loris(&place, &containerd, "fs ls").arg(in_containerd("localhost/team/lazy:t")).arg("/")).text();
    assert!(listed.contains("hello"), "{listed}");

    let said = |arguments: &[&str], address: &Path| {
        let mut command = loris(&place, &containerd, "copy --quiet");
        let ran = run(command.args(arguments).env("CONTAINERD_ADDRESS", address));
        assert_eq!(ran.status.code(), Some(1), "{ran}");
        ran.stderr
    };
    let (none, to) = (in_containerd("localhost/none:t"), name_of(&place.join("never")));
    let error = said(&[&none, &to], &containerd.socket());
    assert!(error.contains("localhost/none:t is not in containerd") && error.contains("namespace tests"), "{error}");
    let error = said(&[&none, &to], &place.join("no-socket"));
    assert!(error.contains("no-socket: No such file"), "{error}");
    // A layer that is nowhere.
    let layer = layers(small).pop_first().unwrap();
    ok(containerd.ctr().args(["content", "rm", &format!("sha256:{layer}")]));
    let error = said(&[&in_containerd(local), &to], &containerd.socket());
    assert!(error.contains("localhost"), "{error}");
    drop(containerd);
    place.assert_clean();
}

#[test]
fn the_daemon_makes_images_whole_in_namespaces_that_expect_it() {
    let test = "the_daemon_makes_images_whole_in_namespaces_that_expect_it";
    let _alone = containers();
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let config = place.join("snapshotter.toml");
    let socket = "SOCKET";
    let file = format!("[containerd]\naddress = \"{socket}\"\ncomplete_namespaces = [\"tests\"]\n");
    fs::write(&config, &file).unwrap();
    let Some(mut scene) = Scene::new(test, &[&format!("--config={}", config.display())]) else { return };
    // Where it is, is known only now.
    fs::write(&config, file.replace(socket, &scene.containerd().socket().display().to_string())).unwrap();
    scene.daemon.signal(rustix::process::Signal::INT);
    scene.daemon.started.take().unwrap().wait().unwrap();
    scene.daemon.start();
    let converted = convert(&scene.place, small, "converted", &[]);
    let name = scene.push(&converted, "small:t");
    let wanted = layers(&converted);
    scene.pull(&name);
    let end = Instant::now() + LIMIT;
    while !scene.daemon.said().contains("containerd has all layers of the image") {
        assert!(Instant::now() < end, "{}", scene.daemon.said());
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(blobs(scene.containerd()).is_superset(&wanted));
    let explained = ok(&mut scene.explain(&name)).json();
    assert_eq!(explained["is_lazy"], true, "{explained}");
    let exported = scene.place.join("exported");
    scene.containerd().export(&name, &exported);
    assert_eq!(layers(&exported), wanted);
    ok(scene.containerd().ctr().args(["images", "rm", "--sync", &name]));
    assert_eq!(blobs(scene.containerd()), BTreeSet::new());
    scene.finish();
    place.assert_clean();
}

//! Podman's storage and ours: archives go in and out.

use std::{path::Path, process::Command};

use serde_json::Value;

use crate::{
    bad_input::name_of,
    harness::{Place, have, ok, peer, run},
    image, layout,
    ours_to_peers::{assert_same, convert, unpacked_facts},
};

/// Podman with everything that it keeps in a place.
pub fn podman(place: &Place) -> Command {
    let mut command = place.command(peer("podman").get_program());
    for (option, name) in [("--root", "root"), ("--runroot", "run"), ("--tmpdir", "libpod")] {
        command.arg(option).arg(place.make("podman").join(name));
    }
    // A machine's own limits may be lower than what Podman asks for, and systemd may not be there.
    command.args(["--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file"]);
    command
}

/// Returns what a layout's image says of its layers' content.
fn diff_ids(layout: &Path) -> Value {
    let manifest = layout::manifest(layout);
    let config = layout::blob_path(layout, manifest["config"]["digest"].as_str().unwrap());
    let config: Value = serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
    config["rootfs"]["diff_ids"].clone()
}

#[test]
fn archives_go_in_and_out() {
    let test = "archives_go_in_and_out";
    let Some(small) = image::small(test) else { return };
    if !have(test, &["podman", "skopeo"]) {
        return;
    }
    let place = Place::new();
    // What cannot go in without us says nothing about us.
    let known = place.join("known.tar");
    ok(peer("skopeo")
        .args(["copy", "--quiet"])
        .arg(name_of(small))
        .arg(format!("docker-archive:{}:localhost/known:t", known.display())));
    let ran = run(podman(&place).args(["load", "-i"]).arg(&known));
    if !ran.status.success() {
        let reason = ran.stderr.lines().last().unwrap_or_default();
        loris_testkit::skip(test, &format!("a machine where podman loads an archive of skopeo's: {reason}"));
        return;
    }
    let converted = convert(&place, small, "converted", &[]);
    for (name, source) in [("original", small), ("converted", converted.as_path())] {
        let unpacked = unpacked_facts(&layout::unpack(source, "t", &place.join(&format!("{name}-bundle"))));
        for (kind, reference) in
            [("docker-archive", format!("localhost/{name}:docker-archive")), ("oci-archive", "t".to_owned())]
        {
            println!("{name} {kind}");
            // In.
            let ours = place.join("ours.tar");
            ok(place.loris("copy --quiet").arg(name_of(source)).arg(format!("{kind}:{}:{reference}", ours.display())));
            let loaded = ok(podman(&place).args(["load", "-i"]).arg(&ours)).text();
            let (_, loaded) = loaded.trim().rsplit_once(' ').expect("`Loaded image: NAME`");
            std::fs::remove_file(&ours).unwrap();
            // Out.
            let theirs = place.join("theirs.tar");
            ok(podman(&place).args(["save", "--quiet", "--format", kind, "-o"]).arg(&theirs).arg(loaded));
            let back = place.join(&format!("{name}-{kind}"));
            ok(place
                .loris("copy --quiet")
                .arg(format!("{kind}:{}", theirs.display()))
                .arg(format!("oci:{}:t", back.display())));
            std::fs::remove_file(&theirs).unwrap();
            assert_eq!(diff_ids(&back), diff_ids(source), "{name} {kind}");
            let bundle = place.join("bundle");
            assert_same(&unpacked, &unpacked_facts(&layout::unpack(&back, "t", &bundle)));
            std::fs::remove_dir_all(bundle).unwrap();
            // And what came out is verified, and can be converted.
            ok(place.loris("verify --quiet").arg(name_of(&back)));
            let lazy = convert(&place, &back, &format!("{name}-{kind}-lazy"), &[]);
            let report = ok(place.loris("inspect --json").arg(name_of(&lazy))).json();
            assert_eq!(report["lazy"], true, "{report}");
        }
    }
    // What `save` writes has the name that the image had.
    for format in ["oci-archive", "docker-archive"] {
        let reference = format!("localhost/named-{format}:t");
        let named = format!("oci:{}:{reference}", place.join("named").display());
        ok(place.loris("copy --quiet").arg(name_of(small)).arg(&named));
        ok(place.loris("save --quiet --output saved.tar --format").arg(format).arg(&named));
        let loaded = ok(podman(&place).args(["load", "-i"]).arg(place.join("saved.tar"))).text();
        assert!(loaded.trim().ends_with(&reference), "{loaded}");
        std::fs::remove_file(place.join("saved.tar")).unwrap();
    }
    place.assert_clean();
}

//! Images that were fetched ahead of time, without their registry.

use std::fs;

use loris_testkit::{registry::FaultRegistry, require_fuse};

use crate::{
    bad_input::name_of,
    harness::{Place, ok, run},
    image::{self, BIG},
    ours_to_peers::convert,
};

#[test]
fn a_warm_image_needs_no_registry() {
    let test = "a_warm_image_needs_no_registry";
    let Some(small) = image::small(test) else { return };
    let place = Place::new();
    let converted = convert(&place, small, "converted", &[]);
    let expected = ok(place.loris("fs cat").arg(name_of(&converted)).arg(BIG)).stdout;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let registry = runtime.block_on(FaultRegistry::start());
    let image = registry.reference("t");
    ok(place.loris("push --quiet").arg(&converted).arg(&image));
    // All from the registry, and nothing from what `fs cat` has left.
    ok(&mut place.loris("cache prune --all"));
    registry.forget_requests();

    let report = ok(place.loris("warm --json").arg(&image)).json();
    let layers = report["layers"].as_array().unwrap();
    assert!(layers.iter().all(|layer| layer["verdict"].as_str().unwrap().starts_with("sound sha256:")), "{report}");
    // Nothing is fetched twice, now or later.
    let (size, fetched) = layers.iter().fold((0, 0), |(size, fetched), layer| {
        (size + layer["size"].as_u64().unwrap(), fetched + layer["fetched"].as_u64().unwrap())
    });
    assert!(fetched <= size + size / 20, "{fetched} of {size}");
    let again = ok(place.loris("warm --json").arg(&image)).json();
    assert!(again["layers"].as_array().unwrap().iter().all(|layer| layer["fetched"] == 0), "{again}");

    let status = ok(&mut place.loris("status --json")).json();
    let here = status["images"].as_array().unwrap().iter().find(|of| of["name"] == image.as_str()).unwrap();
    for layer in here["layers"].as_array().unwrap() {
        assert_eq!(layer["extents_filled"], layer["extents_total"]);
    }
    assert!(ok(&mut place.loris("status")).text().contains("proven"));

    drop(registry);
    let away = |verb: &str| place.loris(&format!("{verb} --retries 0"));
    let read = run(away("fs cat").arg(&image).arg(BIG)).succeeded();
    assert!(read.stdout == expected && read.stderr.contains("can't be reached"), "{read}");
    run(away("fs cat").arg(format!("{image}-other")).arg(BIG)).failed(1, &[]);
    if require_fuse(test) {
        let mounted = place.try_mount_with("mount --retries 0", &image).unwrap_or_else(|ran| panic!("{ran}"));
        assert!(fs::read(mounted.at.join(BIG)).unwrap() == expected);
        let status = ok(&mut place.loris("status --json")).json();
        let process = &status["processes"][0];
        assert_eq!((&process["verb"], &process["image"]), (&"mount".into(), &image.as_str().into()));
        mounted.unmount();
    }
    place.assert_clean();
}

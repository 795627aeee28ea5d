//! Layers that stay as they are, by an index beside them. The image is umoci's: gzip, nobody's lazy format.

use crate::{
    bad_input::name_of,
    harness::{Place, ok, run},
    image::{self, BIG},
    layout,
    ours_to_peers::convert,
};

/// Bytes between two places where reading can begin: small ones, for a small image.
const SPAN: &str = "--soci-span-size 64K";

/// Compares an image's tree with that of the same image in eStargz.
fn same_trees(place: &Place, lazy: &str, indexed: &str, trust: &str) {
    for directory in ["/", "/data", "/links", "/dev", "/names", "/opaque", "/times", "/becomes-directory"] {
        let list =
            |image: &str, trust: &str| ok(place.loris(&format!("fs ls --json{trust}")).args([image, directory])).text();
        assert_eq!(list(lazy, ""), list(indexed, trust), "{directory}");
    }
    for path in [BIG, "data/zeros", "data/empty", "links/b", "changes", "times/a", "bin/sh"] {
        let cat = |image: &str, trust: &str| ok(place.loris(&format!("fs cat{trust}")).args([image, path])).stdout;
        assert!(cat(lazy, "") == cat(indexed, trust), "{path}");
    }
}

#[test]
fn an_image_with_an_index_of_its_own_is_lazy() {
    let Some(small) = image::small("an_image_with_an_index_of_its_own_is_lazy") else { return };
    let place = Place::new();
    let lazy = name_of(&convert(&place, small, "lazy", &[]));
    for version in ["1", "2"] {
        let options = format!("convert --soci --soci-version {version} --soci-min-layer-size 1M {SPAN}");
        let indexed = place.join(&format!("soci-{version}"));
        let name = name_of(&indexed);
        ok(place.loris(&options).arg(name_of(small)).arg(&name));
        if version == "1" {
            // The image is what it was, and only its repository knows of the index.
            run(place.loris("fs ls").arg(&name)).failed(1, &["not lazily readable"]);
        }
        let trust = if version == "1" { " --index-trust repository" } else { "" };
        let inspected = ok(place.loris(&format!("inspect --json{trust}")).arg(&name)).json();
        assert_eq!(inspected["lazy"], true, "{inspected}");
        assert_eq!(inspected["layers"][0]["format"], "tar with a SOCI index");
        let layers = inspected["layers"].as_array().unwrap().iter().map(|layer| layer["digest"].as_str().unwrap());
        assert_eq!(layers.collect::<Vec<_>>(), layout::layers(small));
        same_trees(&place, &lazy, &name, trust);
        ok(place.loris("verify").arg(&name));
    }
}

#[test]
fn an_index_of_this_machine_makes_an_image_lazy() {
    let Some(small) = image::small("an_index_of_this_machine_makes_an_image_lazy") else { return };
    let place = Place::new();
    let lazy = name_of(&convert(&place, small, "lazy", &[]));
    let name = name_of(small);
    run(place.loris("fs ls").arg(&name)).failed(1, &["not lazily readable"]);
    let report = ok(place.loris(&format!("index --json {SPAN}")).arg(&name)).json();
    let layers = report["images"][0]["layers"].as_array().unwrap();
    assert!(layers[0]["spans"].as_u64().unwrap() > 3, "{report}");
    assert!(layers.iter().all(|layer| layer["ztoc"].is_string()), "{report}");
    same_trees(&place, &lazy, &name, "");
    ok(place.loris("warm").arg(&name));
    let kept = ok(&mut place.loris("cache ls --json")).text();
    assert!(kept.contains("sound"), "{kept}");
}

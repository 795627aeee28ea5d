//! Trees that are really mounted, compared with the same tree unpacked on disk, and used as programs use them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod engines;
mod erofs_bootstrap;
mod image;
mod keeper;
mod mounted;
mod pager;
mod races;
mod read;
mod rootfs;
mod source;
mod syscalls;
mod user;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use image::TestImage;
use loris_format::tree::Tree;
use loris_mount::{
    engine::{self, Engine},
    fuse::{FuseMount, FuseOptions},
    mounts,
    pager::{OnDeath, PagerOptions},
    rootfs::{Access, Paging, RootFs, RootFsOptions},
};

/// The engines that this machine has. Says of each other one that the test is skipped for it.
fn engines(test: &str) -> Vec<Engine> {
    if !can_mount_as_root(test) {
        return Vec::new();
    }
    let wanted = std::env::var("LORIS_TEST_ENGINES").unwrap_or_default();
    let store = tempfile::tempdir().unwrap();
    let report = engine::probe(store.path());
    let is_there = |engine: &Engine| {
        let ability = report.ability(*engine);
        if !ability.is_present() {
            loris_testkit::skip(&format!("{test} ({engine})"), &ability.to_string());
        }
        ability.is_present()
    };
    let is_wanted = |engine: &Engine| wanted.is_empty() || wanted.split(',').any(|name| name == engine.name());
    Engine::ALL.into_iter().filter(is_wanted).filter(is_there).collect()
}

/// Mounts an image, read-only, by an engine.
fn mount(engine: Engine, image: &TestImage, mountpoint: &Path) -> RootFs {
    let options = options(engine, image, Access::ReadOnly, Some(mountpoint));
    RootFs::assemble(&image.layers, &options, image.runtime.handle()).unwrap()
}

fn options(engine: Engine, image: &TestImage, access: Access, mountpoint: Option<&Path>) -> RootFsOptions {
    RootFsOptions {
        mountpoint: mountpoint.map(Path::to_owned),
        access,
        scratch: image.directory.path().to_owned(),
        engine: Some(engine),
        pager: Paging::Own(PagerOptions {
            patience: Duration::from_millis(300),
            register: image.directory.path().join("mounts"),
            on_death: OnDeath::Clean(vec!["/bin/true".into()]),
            keeper: Some(PathBuf::from(env!("CARGO_BIN_EXE_mount-keeper"))),
            log: None,
            note: None,
        }),
        ..RootFsOptions::read_only(&image.store)
    }
}

/// Mounts a tree of an image over FUSE.
fn mount_over_fuse(image: &TestImage, tree: Arc<Tree>, mountpoint: &Path) -> FuseMount {
    let options = FuseOptions::default();
    FuseMount::mount(tree, image.layers.clone(), mountpoint, &options, image.runtime.handle()).unwrap()
}

/// Nothing is mounted at or below a directory.
fn assert_nothing_mounted(directory: &Path) {
    let left: Vec<_> = mounts::list().unwrap().into_iter().filter(|m| m.mountpoint.starts_with(directory)).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// Whether a test that needs both can run; says so where not.
fn can_mount_as_root(test: &str) -> bool {
    loris_testkit::require_root(test) && loris_testkit::require_fuse(test)
}

//! Trees that are really mounted, compared with the same tree unpacked on disk, and used as programs use them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod image;
mod mounted;
mod read;
mod rootfs;
mod source;
mod user;

use std::{path::Path, sync::Arc};

use image::TestImage;
use loris_format::tree::Tree;
use loris_mount::{
    fuse::{FuseMount, FuseOptions},
    mounts,
};

/// Mounts a tree of an image.
fn mount(image: &TestImage, tree: Arc<Tree>, mountpoint: &Path) -> FuseMount {
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

//! File-system trees at directories.
//!
//! A [`Tree`](loris_format::tree::Tree) says what an image looks like, and
//! [lazy layers](loris_lazy::LazyLayer) hold its content. This crate makes the two visible to every program:
//!
//! - [`fuse`]: a read-only tree, served by this process. It needs no root.
//! - [`erofs`]: a read-only tree which the kernel reads by itself, and asks for what is missing.
//! - [`engine`]: which of these ways this machine has.
//! - [`overlay`]: overlayfs over such trees, so that the root file system of a container can be written to.
//! - [`rootfs`]: both put together, and taken apart again in reverse order.
//! - [`unpack`]: a layer as plain files, for a full pull.
//! - [`removal`]: what was made, removed again, however deep.
//! - [`mounts`]: what is mounted, as the kernel says; which of it is ours; how to get rid of it.
//! - [`probe`]: what this machine allows, and what to do about what it does not.
//!
//! What this crate must not know: registries, references, formats. Content comes from
//! [`ensure`](loris_lazy::LazyLayer::ensure) alone, so that verification cannot be forgotten here.
//!
//! [`rootfs::RootFs`] is the only place which chooses an engine.

#![warn(clippy::disallowed_methods)]

pub mod engine;
pub mod erofs;
mod error;
mod fsopen;
pub mod fuse;
pub mod keeper;
mod loop_device;
pub mod memory;
pub mod mounts;
pub mod overlay;
pub mod pager;
pub mod probe;
pub mod register;
pub mod removal;
pub mod rootfs;
pub mod unpack;

pub use error::MountError;

use rustix::mount::{MountAttrFlags, MountFlags};

/// What of an image's special files is special in a mount of it. Neither, where all users of a machine can reach the mount:
/// whoever made the image would be root otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Special {
    /// Set-user-id and set-group-id programs run with their owner's rights.
    pub suid: bool,
    /// Device files lead to devices.
    pub devices: bool,
}

impl Special {
    /// All of it, for a root file system that only a container can reach.
    pub const ALL: Self = Self { suid: true, devices: true };

    /// As attributes of `fsmount(2)`.
    pub(crate) fn attributes(self) -> MountAttrFlags {
        let mut attributes = MountAttrFlags::empty();
        attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, !self.suid);
        attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, !self.devices);
        attributes
    }

    /// As flags of `mount(2)`.
    pub(crate) fn flags(self) -> MountFlags {
        let mut flags = MountFlags::empty();
        flags.set(MountFlags::NOSUID, !self.suid);
        flags.set(MountFlags::NODEV, !self.devices);
        flags
    }
}

/// The name under which our mounts stand in the kernel's list: source of all of them, subtype of those over FUSE.
pub(crate) const MOUNT_NAME: &str = "loris";

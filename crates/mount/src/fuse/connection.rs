//! A connection to the kernel: `/dev/fuse`, mounted.
//!
//! The options are those of the kernel's `Documentation/filesystems/fuse/fuse.rst`.

use std::{ffi::CString, fs::OpenOptions, os::fd::AsRawFd, os::fd::OwnedFd, path::Path};

use rustix::mount::MountFlags;

use super::{DEVICE, FuseOptions, fusermount};
use crate::{
    MOUNT_NAME, MountError,
    probe::{fuse_device_remedy, probe},
};

/// Mounts at a directory, in the way that this process may, and returns the connection. The kernel has not got an
/// answer to its first message yet, and everything that enters the mount waits for it.
pub(super) fn open(mountpoint: &Path, options: &FuseOptions) -> Result<OwnedFd, MountError> {
    if probe().is_admin() { open_directly(mountpoint, options) } else { open_as_user(mountpoint, options) }
}

fn open_directly(mountpoint: &Path, options: &FuseOptions) -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(|source| {
        let remedy = fuse_device_remedy(&source);
        MountError::FuseDevice { source, remedy }
    })?;
    let refused = |source: std::io::Error| MountError::Refused {
        what: "FUSE",
        path: mountpoint.to_owned(),
        source,
        detail: String::new(),
    };
    // 40000 is S_IFDIR: what stands at the root.
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions{}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        if options.allow_other { ",allow_other" } else { "" },
    );
    let data = CString::new(data).map_err(|error| refused(error.into()))?;
    let kind = format!("fuse.{MOUNT_NAME}");
    rustix::mount::mount(MOUNT_NAME, mountpoint, kind, MountFlags::RDONLY | options.special.flags(), data.as_c_str())
        .map_err(|errno| refused(errno.into()))?;
    Ok(device.into())
}

fn open_as_user(mountpoint: &Path, options: &FuseOptions) -> Result<OwnedFd, MountError> {
    let others = if options.allow_other && fusermount::may_allow_other() { ",allow_other" } else { "" };
    let text = format!("ro,nosuid,nodev,default_permissions,fsname={MOUNT_NAME},subtype={MOUNT_NAME}{others}");
    fusermount::mount(mountpoint, &text)
}

//! Block devices over files: loop(4), for file systems that can't be mounted over plain files.
//!
//! | made with | gone |
//! |---|---|
//! | `LOOP_CONFIGURE` (Linux 5.8), read-only, through the file's page cache | with its last user (`LO_FLAGS_AUTOCLEAR`), however that ends |
//!
//! A loop device reads its file by itself, around the hook by which the [pager](crate::pager) hears of reads. So its file
//! must be whole, or one whose server answers each read.
//!
//! Layouts and numbers are those of the kernel's `include/uapi/linux/loop.h`.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

const CONTROL: &str = "/dev/loop-control";
const GET_FREE: u32 = 0x4c82;
const CONFIGURE: u32 = 0x4c0a;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
/// Whoever else makes loop devices may be faster, so often.
const ATTEMPTS: usize = 128;

/// `struct loop_info64`.
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    file: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// A loop device that lives for at least as long as this.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    path: PathBuf,
    _open: OwnedFd,
}

impl LoopDevice {
    /// Makes one over a file, whose length must be a multiple of 512 bytes: the rest is cut off.
    pub(crate) fn over(file: &Path) -> io::Result<Self> {
        let name = file.as_os_str().as_bytes();
        let file = File::open(file)?;
        let control = File::options().read(true).write(true).open(CONTROL)?;
        let mut config = Config {
            file: u32::try_from(file.as_raw_fd()).map_err(io::Error::other)?,
            block_size: 0,
            info: Info {
                device: 0,
                inode: 0,
                rdevice: 0,
                offset: 0,
                size_limit: 0,
                number: 0,
                encrypt_type: 0,
                encrypt_key_size: 0,
                flags: READ_ONLY | AUTOCLEAR,
                file_name: [0; 64],
                crypt_name: [0; 64],
                encrypt_key: [0; 32],
                init: [0; 2],
            },
            reserved: [0; 8],
        };
        // What `losetup` shows where it can't show the path. It ends with a NUL.
        let shown = name.len().min(config.info.file_name.len() - 1);
        config.info.file_name[..shown].copy_from_slice(&name[..shown]);
        for _ in 0..ATTEMPTS {
            // SAFETY: takes no pointer, and returns the number of a device that was free a moment ago.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), GET_FREE as libc::Ioctl) };
            if number < 0 {
                return Err(io::Error::last_os_error());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let open = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
            // SAFETY: the structure is that of the kernel, and outlives the call, which only reads it.
            let result = unsafe { libc::ioctl(open.as_raw_fd(), CONFIGURE as libc::Ioctl, &raw const config) };
            if result == 0 {
                return Ok(Self { path, _open: open });
            }
            match io::Error::last_os_error() {
                // Somebody else was faster.
                error if error.raw_os_error() == Some(libc::EBUSY) => {}
                error => return Err(error),
            }
        }
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    /// Returns the way to it.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Returns the path of the file that a loop device is over: where it stood, where it was deleted.
pub(crate) fn backing_file(device: &Path) -> Option<PathBuf> {
    let number = device.to_str()?.strip_prefix("/dev/loop")?.parse::<u32>().ok()?;
    let path = std::fs::read(format!("/sys/block/loop{number}/loop/backing_file")).ok()?;
    let path = path.strip_suffix(b"\n").unwrap_or(&path);
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(path)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write as _;

    use super::*;

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!((size_of::<Info>(), size_of::<Config>()), (232, 304));
    }

    #[test]
    fn a_file_is_a_block_device_until_nobody_uses_it() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let device = match LoopDevice::over(file.path()) {
            Ok(device) => device,
            Err(error) => {
                return loris_testkit::skip("a_file_is_a_block_device_until_nobody_uses_it", &error.to_string());
            }
        };
        assert_eq!(std::fs::read(device.path()).unwrap(), [7; 8192]);
        assert_eq!(backing_file(device.path()).unwrap(), file.path());
        let path = device.path().to_owned();
        drop(device);
        // Whoever looks at new devices, as udev does, may have it open for a moment.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while backing_file(&path).as_deref() == Some(file.path()) {
            assert!(std::time::Instant::now() < end, "{} stays", path.display());
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    #[test]
    fn what_is_no_loop_device() {
        for path in ["/dev/null", "/dev/loop-control", "/dev/loop999999", "loop0"] {
            assert_eq!(backing_file(Path::new(path)), None);
        }
        assert!(LoopDevice::over(Path::new("/no/such/file")).is_err());
    }
}

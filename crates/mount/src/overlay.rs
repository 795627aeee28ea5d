//! overlayfs: lower directories that cannot be written to, and one upper directory that takes the changes.
//!
//! Mounted through the file-descriptor based calls (fsopen(2) and its kin), since the older mount(2) ends its options
//! after one page: lower directories are appended one by one (`lowerdir+`, Linux 6.7). Older kernels get mount(2).
//! The options are described in the kernel's `Documentation/filesystems/overlayfs.rst`.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen, mount as mount2, move_mount,
    },
};

use crate::{
    MOUNT_NAME, MountError, Special,
    erofs::Goodbye,
    fsopen::{STRING_BYTES, kernel_messages},
    mounts::{self, OwnMount, Unmounted},
};

/// mount(2) takes a page of options, with the NUL that ends them. Pages are larger on some machines, never smaller.
const CLASSIC_OPTIONS_BYTES: usize = 4096 - 1;
/// Most lower directories: the kernel's `OVL_MAX_STACK`.
pub const MAX_LOWER: usize = 500;

/// The directories that take the changes. Both must be on one file system, empty at first or from an earlier mount
/// over the same lower directories, and used by one mount at a time.
#[derive(Clone, Debug)]
pub struct Upper {
    /// What differs from the lower directories.
    pub upper: PathBuf,
    /// The kernel's workshop.
    pub work: PathBuf,
}

/// What to mount.
#[derive(Clone, Debug, Default)]
pub struct OverlayOptions {
    /// Lower directories, uppermost first. Without `upper`, at least two.
    pub lower: Vec<PathBuf>,
    /// Where changes go; without, nothing can be written.
    pub upper: Option<Upper>,
    /// Mark with `user.overlay.*` attributes, as mounts in a user namespace must.
    pub user_xattrs: bool,
    /// Never wait for the disk. After a crash the upper directory must be thrown away.
    pub volatile: bool,
    /// What of its special files is special.
    pub special: Special,
}

/// An overlay that is mounted. Dropping it unmounts it.
#[derive(Debug)]
pub struct OverlayMount {
    mount: OwnMount,
    goodbye: Option<Goodbye>,
    gone: bool,
}

impl OverlayMount {
    /// Takes over the overlay at a directory, which another process mounted.
    pub(crate) fn adopt(mountpoint: &Path) -> Result<Self, MountError> {
        OwnMount::note(mountpoint).map(Self::new)
    }

    fn new(mount: OwnMount) -> Self {
        // Where a user has no inotify instance left, whoever waits is not told; it can be unmounted all the same.
        let goodbye = Goodbye::of(mount.mountpoint());
        let goodbye =
            goodbye.inspect_err(|error| tracing::debug!(%error, "the end of an overlay will not be heard of"));
        Self { mount, goodbye: goodbye.ok(), gone: false }
    }

    /// Mounts at a directory. Blocks for a few system calls, and for as long as the lower directories take to answer.
    ///
    /// # Errors
    /// [`MountError::Overlay`] where the directories cannot be combined, [`MountError::Refused`] where the kernel
    /// says no, with what it logged.
    pub fn mount(options: &OverlayOptions, mountpoint: &Path) -> Result<Self, MountError> {
        let wrong = |reason: String| MountError::Overlay { path: mountpoint.to_owned(), reason };
        let least = if options.upper.is_some() { 1 } else { 2 };
        if options.lower.len() < least {
            return Err(wrong(format!("{} lower directories, but at least {least} are needed", options.lower.len())));
        }
        if options.lower.len() > MAX_LOWER {
            return Err(wrong(format!("{} lower directories, but the kernel takes {MAX_LOWER}", options.lower.len())));
        }
        let mountpoint = &mounts::check_mountpoint(mountpoint)?;
        let refused = |(source, detail): (io::Error, String)| MountError::Refused {
            what: "overlayfs",
            path: mountpoint.clone(),
            source,
            detail,
        };
        if !mount_by_descriptor(options, mountpoint).map_err(refused)? {
            mount_classic(options, mountpoint)?;
        }
        OwnMount::note(mountpoint).map(Self::new)
    }

    /// Waits until the kernel has no use for it any more: somebody has unmounted it, and nobody has a file of it open.
    pub async fn ended(&self) {
        match &self.goodbye {
            Some(goodbye) => goodbye.said().await,
            None => std::future::pending().await,
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        self.mount.mountpoint()
    }

    /// Unmounts it: as usual, or where it is in use, by detaching it.
    ///
    /// # Errors
    /// [`MountError::Unmount`] where the kernel refuses.
    pub fn unmount(mut self) -> Result<Unmounted, MountError> {
        self.gone = true;
        self.mount.unmount()
    }
}

impl Drop for OverlayMount {
    fn drop(&mut self) {
        if !self.gone
            && let Err(error) = self.mount.unmount()
        {
            tracing::warn!(%error, "an overlay stays mounted");
        }
    }
}

/// A path as overlayfs gets it, and what must stay open until it has got it.
struct Argument {
    text: Vec<u8>,
    _open: Option<OwnedFd>,
}

impl Argument {
    /// The path itself, or where it is too long for the kernel, another way to the same directory.
    fn new(path: &Path, longest: usize) -> io::Result<Self> {
        let absolute = std::path::absolute(path)?;
        let bytes = absolute.as_os_str().as_bytes();
        if bytes.len() <= longest { Ok(Self { text: bytes.to_vec(), _open: None }) } else { Self::short(path) }
    }

    fn short(path: &Path) -> io::Result<Self> {
        let directory = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        let text = format!("/proc/self/fd/{}", directory.as_raw_fd()).into_bytes();
        Ok(Self { text, _open: Some(directory) })
    }
}

/// Mounts through fsopen(2). Returns `false` where the kernel has it not, or not for lower directories one by one.
fn mount_by_descriptor(options: &OverlayOptions, mountpoint: &Path) -> Result<bool, (io::Error, String)> {
    let plain = |errno: Errno| (io::Error::from(errno), String::new());
    let context = match fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(context) => context,
        Err(Errno::NOSYS) => return Ok(false),
        Err(Errno::NODEV) => {
            return Err((Errno::NODEV.into(), "; overlayfs is missing, try `modprobe overlay`".into()));
        }
        Err(errno) => return Err(plain(errno)),
    };
    let logged = |errno: Errno| (io::Error::from(errno), kernel_messages(&context));
    let argument = |path: &Path| {
        Argument::new(path, STRING_BYTES).map_err(|error| (error, format!("; directory {}", path.display())))
    };

    let mut arguments = Vec::with_capacity(options.lower.len() + 2);
    for (number, path) in options.lower.iter().enumerate() {
        let argument = argument(path)?;
        match fsconfig_set_string(&context, "lowerdir+", argument.text.as_slice()) {
            Ok(()) => {}
            // No such option. A kernel that has it finds other words for what is wrong with a directory, and where
            // it has not, mount(2) says it again.
            Err(Errno::INVAL) if number == 0 => return Ok(false),
            Err(errno) => return Err(logged(errno)),
        }
        arguments.push(argument);
    }
    if let Some(Upper { upper, work }) = &options.upper {
        for (key, path) in [("upperdir", upper), ("workdir", work)] {
            let argument = argument(path)?;
            fsconfig_set_string(&context, key, escape(&argument.text, b"\\")).map_err(logged)?;
            arguments.push(argument);
        }
    }
    fsconfig_set_string(&context, "source", MOUNT_NAME).map_err(logged)?;
    for (key, wanted) in [("userxattr", options.user_xattrs), ("volatile", options.volatile)] {
        if wanted {
            fsconfig_set_flag(&context, key).map_err(logged)?;
        }
    }
    fsconfig_create(&context).map_err(logged)?;
    let mut attributes = options.special.attributes();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, options.upper.is_none());
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(logged)?;
    move_mount(mount.as_fd(), "", CWD, mountpoint, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(plain)?;
    Ok(true)
}

fn mount_classic(options: &OverlayOptions, mountpoint: &Path) -> Result<(), MountError> {
    let refused = |source: io::Error| MountError::Refused {
        what: "overlayfs",
        path: mountpoint.to_owned(),
        source,
        detail: String::new(),
    };
    let mut arguments = Vec::new();
    let mut text = classic_options(options, &mut arguments, |path| Argument::new(path, usize::MAX)).map_err(refused)?;
    if text.len() > CLASSIC_OPTIONS_BYTES {
        arguments.clear();
        text = classic_options(options, &mut arguments, Argument::short).map_err(refused)?;
    }
    if text.len() > CLASSIC_OPTIONS_BYTES {
        let reason = format!(
            "{} lower directories make options of {} bytes, but this kernel takes {CLASSIC_OPTIONS_BYTES}; \
             Linux 6.7 has no such bound",
            options.lower.len(),
            text.len(),
        );
        return Err(MountError::Overlay { path: mountpoint.to_owned(), reason });
    }
    let text = CString::new(text).map_err(|error| refused(error.into()))?;
    let mut flags = options.special.flags();
    flags.set(MountFlags::RDONLY, options.upper.is_none());
    mount2(MOUNT_NAME, mountpoint, "overlay", flags, text.as_c_str()).map_err(|errno| refused(errno.into()))
}

/// Options as mount(2) takes them. Descriptors behind the paths are put into `arguments`.
fn classic_options(
    options: &OverlayOptions,
    arguments: &mut Vec<Argument>,
    argument: impl Fn(&Path) -> io::Result<Argument>,
) -> io::Result<Vec<u8>> {
    let mut text = b"lowerdir=".to_vec();
    for (number, path) in options.lower.iter().enumerate() {
        let argument = argument(path)?;
        if number > 0 {
            text.push(b':');
        }
        text.extend(escape(&argument.text, b"\\:,"));
        arguments.push(argument);
    }
    if let Some(Upper { upper, work }) = &options.upper {
        for (key, path) in [(&b",upperdir="[..], upper), (b",workdir=", work)] {
            let argument = argument(path)?;
            text.extend_from_slice(key);
            text.extend(escape(&argument.text, b"\\,"));
            arguments.push(argument);
        }
    }
    for (flag, wanted) in [(&b",userxattr"[..], options.user_xattrs), (b",volatile", options.volatile)] {
        if wanted {
            text.extend_from_slice(flag);
        }
    }
    Ok(text)
}

/// Puts a backslash before each of the `special` bytes.
fn escape(path: &[u8], special: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(path.len());
    for &byte in path {
        if special.contains(&byte) {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    escaped
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs;

    use super::*;

    /// Whether overlays can be mounted here; says so where not. The upper directory's file system must not itself be
    /// an overlay, which a mount at it would show.
    fn can_mount(test: &str) -> bool {
        let abilities = crate::probe::probe();
        let missing = [&abilities.admin, &abilities.overlay].into_iter().find(|ability| !ability.is_present());
        if let Some(missing) = missing {
            eprintln!("skipped: {test}: {missing}");
        }
        missing.is_none()
    }

    fn layers(root: &Path, names: &[&str]) -> Vec<PathBuf> {
        let make = |(number, name): (usize, &&str)| {
            let path = root.join(name);
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("same"), name.as_bytes()).unwrap();
            fs::write(path.join(format!("only-{number}")), name.as_bytes()).unwrap();
            path
        };
        names.iter().enumerate().map(make).collect()
    }

    #[test]
    fn options_for_mount() {
        let options = OverlayOptions {
            lower: vec!["/a".into(), "/b:c,d\\e".into()],
            upper: Some(Upper { upper: "/u,1:2".into(), work: "/w".into() }),
            user_xattrs: true,
            volatile: true,
            special: Special::default(),
        };
        let text = classic_options(&options, &mut Vec::new(), |path| Argument::new(path, usize::MAX)).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            r"lowerdir=/a:/b\:c\,d\\e,upperdir=/u\,1:2,workdir=/w,userxattr,volatile"
        );
    }

    #[test]
    fn too_few_directories() {
        let cases = [(0, true), (0, false), (1, false), (MAX_LOWER + 1, true)];
        for (count, writable) in cases {
            let options = OverlayOptions {
                lower: vec!["/a".into(); count],
                upper: writable.then(|| Upper { upper: "/u".into(), work: "/w".into() }),
                ..OverlayOptions::default()
            };
            let error = OverlayMount::mount(&options, Path::new("/nowhere")).unwrap_err();
            assert!(matches!(error, MountError::Overlay { .. }), "{count} {writable}: {error}");
        }
    }

    #[test]
    fn names_with_special_bytes_both_ways() {
        if !can_mount("names_with_special_bytes_both_ways") {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        // Longer than `fsconfig` takes.
        let long = "l".repeat(250);
        let lower = layers(
            root,
            &["top:1,x", r"mid\:dle", "p lain", &format!("deep/{long}"), &format!("deeper/{long}/{long}")],
        );
        let upper = Upper { upper: root.join(r"up:p,e\r"), work: root.join(r"w:o,r\k") };
        let mountpoint = root.join("merged");
        for path in [&upper.upper, &upper.work, &mountpoint] {
            fs::create_dir(path).unwrap();
        }
        let options = OverlayOptions { lower, upper: Some(upper.clone()), ..OverlayOptions::default() };
        for classic in [false, true] {
            if classic {
                mount_classic(&options, &mountpoint).unwrap();
            } else if !mount_by_descriptor(&options, &mountpoint).unwrap() {
                eprintln!("skipped: names_with_special_bytes_both_ways: the kernel has no lowerdir+");
                continue;
            }
            let mount = OverlayMount::new(OwnMount::note(&mountpoint).unwrap());
            let info = crate::mounts::find(&mountpoint).unwrap().unwrap();
            assert!(info.is_loris(), "{info:?}");
            assert_eq!(info.lower_directories()[..3], options.lower[..3], "{info:?}");
            assert_eq!(fs::read(mountpoint.join("same")).unwrap(), b"top:1,x");
            for number in 0..5 {
                assert!(mountpoint.join(format!("only-{number}")).exists(), "{number}");
            }
            let written = format!("written-{classic}");
            fs::write(mountpoint.join(&written), "x").unwrap();
            assert_eq!(mount.unmount().unwrap(), Unmounted::Whole);
            assert!(upper.upper.join(&written).exists());
            assert!(!mountpoint.join("same").exists());
        }
    }

    #[test]
    fn many_directories() {
        if !can_mount("many_directories") {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let names: Vec<_> = (0..200).map(|number| format!("a-rather-long-name-for-a-layer-{number}")).collect();
        let lower = layers(directory.path(), &names.iter().map(String::as_str).collect::<Vec<_>>());
        let mountpoint = directory.path().join("merged");
        fs::create_dir(&mountpoint).unwrap();
        let options = OverlayOptions { lower, ..OverlayOptions::default() };
        for classic in [false, true] {
            if classic {
                mount_classic(&options, &mountpoint).unwrap();
            } else if !mount_by_descriptor(&options, &mountpoint).unwrap() {
                continue;
            }
            let mount = OverlayMount::new(OwnMount::note(&mountpoint).unwrap());
            for number in [0, 199] {
                assert_eq!(fs::read(mountpoint.join(format!("only-{number}"))).unwrap(), names[number].as_bytes());
            }
            let error = fs::write(mountpoint.join("new"), "x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
            drop(mount);
        }
        assert!(crate::mounts::find(&mountpoint).unwrap().is_none());
    }

    #[test]
    fn in_use_is_detached() {
        if !can_mount("in_use_is_detached") {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let lower = layers(directory.path(), &["a", "b"]);
        let mountpoint = directory.path().join("merged");
        fs::create_dir(&mountpoint).unwrap();
        let options = OverlayOptions { lower, ..OverlayOptions::default() };
        let mount = OverlayMount::mount(&options, &mountpoint).unwrap();
        let mut held = fs::File::open(mountpoint.join("same")).unwrap();
        assert_eq!(mount.unmount().unwrap(), Unmounted::Detached);
        let mut content = String::new();
        io::Read::read_to_string(&mut held, &mut content).unwrap();
        assert_eq!(content, "a");
        assert!(crate::mounts::find(&mountpoint).unwrap().is_none());
    }

    #[test]
    fn the_kernel_is_quoted() {
        if !can_mount("the_kernel_is_quoted") {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let options = OverlayOptions {
            lower: vec![directory.path().join("missing"), directory.path().join("too")],
            ..OverlayOptions::default()
        };
        let error = OverlayMount::mount(&options, directory.path()).unwrap_err();
        assert!(matches!(&error, MountError::Refused { source, .. } if source.kind() == io::ErrorKind::NotFound));
    }
}

//! What a read-only tree refuses, and what it says of what is not there: the same by every engine.

use std::{
    fs::{self, File},
    path::Path,
};

use loris_mount::mounts::Unmounted;
use rustix::{
    fs::{
        Access, AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags, accessat, chmod,
        chown, fallocate, getxattr, link, mkdir, mknodat, open, readlink, removexattr, rename, rmdir, setxattr,
        symlink, unlink, utimensat,
    },
    io::Errno,
};

use crate::{
    engines,
    image::{Kind, TestImage, directory, entry, file, noise},
    mount,
};

type Result = rustix::io::Result<()>;
type Call = fn(&Path) -> Result;

fn opened(path: &Path, flags: OFlags) -> Result {
    open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644)).map(drop)
}

/// Sets the length of a file by its path, which rustix has not.
fn truncated(path: &Path) -> Result {
    use std::os::unix::ffi::OsStrExt as _;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: the string ends with NUL and outlives the call.
    match unsafe { libc::truncate(path.as_ptr(), 0) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
    }
}

const CHANGES: [(&str, Call); 22] = [
    ("open, write", |at| opened(&at.join("f"), OFlags::WRONLY)),
    ("open, both", |at| opened(&at.join("f"), OFlags::RDWR)),
    ("open, append", |at| opened(&at.join("f"), OFlags::WRONLY | OFlags::APPEND)),
    ("open, truncate", |at| opened(&at.join("f"), OFlags::WRONLY | OFlags::TRUNC)),
    ("open, create", |at| opened(&at.join("new"), OFlags::WRONLY | OFlags::CREATE)),
    ("open, nameless", |at| opened(at, OFlags::RDWR | OFlags::TMPFILE)),
    ("truncate", |at| truncated(&at.join("f"))),
    ("chmod", |at| chmod(at.join("f"), Mode::from_raw_mode(0o600))),
    ("chmod of the root", |at| chmod(at, Mode::from_raw_mode(0o700))),
    ("chown", |at| chown(at.join("f"), Some(Uid::from_raw(1)), Some(Gid::from_raw(1)))),
    ("utimensat", |at| {
        let now = Timespec { tv_sec: 1, tv_nsec: 0 };
        let times = Timestamps { last_access: now, last_modification: now };
        utimensat(CWD, at.join("f"), &times, AtFlags::empty())
    }),
    ("link", |at| link(at.join("f"), at.join("new"))),
    ("symlink", |at| symlink("f", at.join("new"))),
    ("rename", |at| rename(at.join("f"), at.join("new"))),
    ("rename over another one", |at| rename(at.join("f"), at.join("g"))),
    ("unlink", |at| unlink(at.join("f"))),
    ("mkdir", |at| mkdir(at.join("new"), Mode::from_raw_mode(0o755))),
    ("rmdir", |at| rmdir(at.join("empty"))),
    ("mknod", |at| mknodat(CWD, at.join("new"), FileType::Fifo, Mode::from_raw_mode(0o644), 0)),
    ("setxattr", |at| setxattr(at.join("f"), "user.new", b"x", XattrFlags::empty())),
    ("removexattr", |at| removexattr(at.join("f"), "user.there")),
    ("access to write", |at| accessat(CWD, at.join("f"), Access::WRITE_OK, AtFlags::empty())),
];

const REFUSALS: [(&str, Errno, Call); 15] = [
    ("not there", Errno::NOENT, |at| opened(&at.join("missing"), OFlags::RDONLY)),
    ("below what is not there", Errno::NOENT, |at| opened(&at.join("missing/f"), OFlags::RDONLY)),
    ("a link to nothing", Errno::NOENT, |at| opened(&at.join("dangling"), OFlags::RDONLY)),
    ("an empty path", Errno::NOENT, |_| opened(Path::new(""), OFlags::RDONLY)),
    ("below a file", Errno::NOTDIR, |at| opened(&at.join("f/x"), OFlags::RDONLY)),
    ("a file with a slash", Errno::NOTDIR, |at| opened(&at.join("f/"), OFlags::RDONLY)),
    ("a file as a directory", Errno::NOTDIR, |at| opened(&at.join("f"), OFlags::RDONLY | OFlags::DIRECTORY)),
    ("a long name", Errno::NAMETOOLONG, |at| opened(&at.join("n".repeat(256)), OFlags::RDONLY)),
    ("a long path", Errno::NAMETOOLONG, |at| opened(&at.join("d/../".repeat(900)), OFlags::RDONLY)),
    ("a ring of links", Errno::LOOP, |at| opened(&at.join("ring"), OFlags::RDONLY)),
    ("a link that is not to be followed", Errno::LOOP, |at| {
        opened(&at.join("dangling"), OFlags::RDONLY | OFlags::NOFOLLOW)
    }),
    ("a directory to write to", Errno::ISDIR, |at| opened(&at.join("d"), OFlags::WRONLY)),
    ("the bytes of a directory", Errno::ISDIR, |at| {
        let directory = File::open(at.join("d")).unwrap();
        let mut bytes = [0; 8];
        rustix::io::read(&directory, &mut bytes).map(drop)
    }),
    ("the target of a file", Errno::INVAL, |at| readlink(at.join("f"), Vec::new()).map(drop)),
    ("an attribute that is not there", Errno::NODATA, |at| {
        let mut value = [0; 8];
        getxattr(at.join("f"), "user.none", &mut value).map(drop)
    }),
];

/// What a user without rights may not, and may.
const RIGHTS: [(&str, Result, Call); 8] = [
    ("a file of all", Ok(()), |at| opened(&at.join("f"), OFlags::RDONLY)),
    ("a file of its owner", Err(Errno::ACCESS), |at| opened(&at.join("private"), OFlags::RDONLY)),
    ("a file of the user's own", Ok(()), |at| opened(&at.join("own"), OFlags::RDONLY)),
    ("a directory of its owner", Err(Errno::ACCESS), |at| opened(&at.join("closed"), OFlags::RDONLY)),
    ("below a directory of its owner", Err(Errno::ACCESS), |at| opened(&at.join("closed/f"), OFlags::RDONLY)),
    ("a directory that can only be gone through", Err(Errno::ACCESS), |at| opened(&at.join("through"), OFlags::RDONLY)),
    ("below that", Ok(()), |at| opened(&at.join("through/f"), OFlags::RDONLY)),
    ("execution", Err(Errno::ACCESS), |at| accessat(CWD, at.join("f"), Access::EXEC_OK, AtFlags::empty())),
];

const USER: u32 = 65_534;

fn image() -> TestImage {
    let link = |path: &'static str, target: &'static str| entry(path, Kind::Symlink(target));
    let image = TestImage::new(&[vec![
        file("f", noise(1, 10_000)).xattr("user.there", "x"),
        file("g", "g"),
        file("private", "x").mode(0o600),
        file("own", "x").mode(0o600).owner(USER, USER),
        directory("d"),
        directory("empty"),
        directory("closed").mode(0o700),
        file("closed/f", "x"),
        directory("through").mode(0o711),
        file("through/f", "x"),
        link("dangling", "nowhere"),
        link("ring", "gnir"),
        link("gnir", "ring"),
    ]]);
    fs::set_permissions(image.directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    image
}

#[test]
fn a_tree_refuses_every_change() {
    for engine in engines("a_tree_refuses_every_change") {
        let image = image();
        let at = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &at);
        for (name, change) in CHANGES {
            assert_eq!(change(&at), Err(Errno::ROFS), "{engine}: {name}");
        }
        let open = File::open(at.join("f")).unwrap();
        assert_eq!(rustix::io::write(&open, b"x"), Err(Errno::BADF), "{engine}");
        assert_eq!(fallocate(&open, rustix::fs::FallocateFlags::empty(), 0, 1), Err(Errno::BADF), "{engine}");
        drop(open);
        assert!(fs::read(at.join("f")).unwrap() == noise(1, 10_000), "{engine}");
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
    }
}

#[test]
fn what_cannot_be_opened_is_the_same_error() {
    for engine in engines("what_cannot_be_opened_is_the_same_error") {
        let image = image();
        let at = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &at);
        // The second time out of the kernel's caches.
        for round in 0..2 {
            for (name, errno, call) in REFUSALS {
                assert_eq!(call(&at), Err(errno), "{engine}: {name}, round {round}");
            }
        }
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
    }
}

#[test]
fn users_have_the_rights_that_the_image_gives() {
    for engine in engines("users_have_the_rights_that_the_image_gives") {
        let image = image();
        let at = image.mountpoint("mounted");
        let mounted = mount(engine, &image, &at);
        std::thread::scope(|scope| {
            let attempts = scope.spawn(|| {
                use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
                let (uid, gid) = (Uid::from_raw(USER), Gid::from_raw(USER));
                // Of this thread alone, which ends here; without them it has no capabilities either.
                set_thread_groups(&[]).unwrap();
                set_thread_res_gid(gid, gid, gid).unwrap();
                set_thread_res_uid(uid, uid, uid).unwrap();
                RIGHTS.map(|(_, _, call)| call(&at))
            });
            for ((name, expected, _), found) in RIGHTS.into_iter().zip(attempts.join().unwrap()) {
                assert_eq!(found, expected, "{engine}: {name}");
            }
        });
        assert_eq!(mounted.unmount().unwrap(), Unmounted::Whole);
    }
}

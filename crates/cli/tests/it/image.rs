//! A small image with everything that a file system can have, made by others' tools: umoci, and GNU tar for what umoci
//! does not write.

use std::{
    ffi::OsStr,
    fs,
    os::unix::{
        ffi::OsStrExt as _,
        fs::{PermissionsExt as _, chown, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use crate::harness::{cached, have, ok, peer};

/// What the image's command prints.
pub const GREETING: &str = "hello from the small image\n";
/// A file of several chunks.
pub const BIG: &str = "data/big";
/// Bytes of it: two of eStargz's usual chunks and a bit.
const BIG_BYTES: usize = (9 << 20) + 77;

/// Returns the image's OCI layout, tag `t`; `None` where it can't be made here, which has then been said.
pub fn small(test: &str) -> Option<&'static Path> {
    if !loris_testkit::require_root(test) || !have(test, &["umoci", "ldd", "tar"]) {
        return None;
    }
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    Some(MADE.get_or_init(|| cached("small-image", include_str!("image.rs"), build)))
}

/// Bytes that do not compress and are nowhere the same.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(length).collect()
}

fn build(directory: &Path) {
    let layout = directory.join("layout");
    let image = format!("{}:t", layout.display());
    let bundle = directory.join("bundle");
    let root = bundle.join("rootfs");
    umoci(&["init", "--layout", layout.to_str().unwrap()]);
    umoci(&["new", "--image", &image]);
    umoci(&["config", "--image", &image, "--config.cmd", "/bin/sh", "--config.cmd", "/hello"]);
    umoci(&["unpack", "--image", &image, bundle.to_str().unwrap()]);
    programs(&root);
    specials(&root);
    umoci(&["repack", "--refresh-bundle", "--image", &image, bundle.to_str().unwrap()]);
    changes(&root);
    umoci(&["repack", "--image", &image, bundle.to_str().unwrap()]);
    let archive = directory.join("layer.tar");
    opaque_layer(&directory.join("top"), &archive);
    umoci(&["raw", "add-layer", "--image", &image, archive.to_str().unwrap()]);
}

pub fn umoci(arguments: &[&str]) {
    ok(peer("umoci").args(arguments));
}

/// A shell with its libraries.
fn programs(root: &Path) {
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::copy("/bin/sh", root.join("bin/sh")).unwrap();
    let libraries = ok(Command::new("ldd").arg("/bin/sh")).text();
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let to = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(library, to).unwrap();
    }
    fs::write(root.join("hello"), format!("echo {GREETING}")).unwrap();
    fs::create_dir(root.join("etc")).unwrap();
    fs::write(root.join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n").unwrap();
}

fn specials(root: &Path) {
    let file = |name: &str, content: &[u8]| fs::write(root.join(name), content).unwrap();
    let mode = |name: &str, mode| fs::set_permissions(root.join(name), fs::Permissions::from_mode(mode)).unwrap();
    for name in ["data", "links", "dev", "names", "tmp", "group", "opaque", "opaque/below", "gone", "gone/deep"] {
        fs::create_dir(root.join(name)).unwrap();
    }
    file("data/empty", b"");
    file("data/one", b"1");
    file(BIG, &noise(1, BIG_BYTES));
    file("data/zeros", &vec![0; 300_000]);
    file("data/set-uid", b"set-uid");
    chown(root.join("data/set-uid"), Some(7), Some(8)).unwrap();
    mode("data/set-uid", 0o4755);
    mode("tmp", 0o1777);
    mode("group", 0o2775);
    file("data/noted", b"noted");
    let attribute = |name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(root.join("data/noted"), name, value, XattrFlags::empty()).unwrap();
    };
    attribute("user.note", b"text");
    attribute("user.binary", &[0, 255, 128, 10]);
    // cap_net_raw=ep, as the kernel has it: revision 2, effective.
    attribute("security.capability", &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file("links/a", &noise(2, 5000));
    for other in ["links/b", "names/c"] {
        fs::hard_link(root.join("links/a"), root.join(other)).unwrap();
    }
    for (name, target) in [("absolute", "/data/one"), ("relative", "../data/one"), ("dangling", "/no/such/file")] {
        symlink(target, root.join("links").join(name)).unwrap();
    }
    let node = |name: &str, kind, bits, device| {
        rustix::fs::mknodat(CWD, root.join("dev").join(name), kind, Mode::from_raw_mode(bits), device).unwrap();
        mode(&format!("dev/{name}"), bits);
    };
    node("fifo", FileType::Fifo, 0o600, 0);
    node("char", FileType::CharacterDevice, 0o666, rustix::fs::makedev(1, 3));
    node("block", FileType::BlockDevice, 0o660, rustix::fs::makedev(259, 70_000));
    let long = "n".repeat(200);
    file(&format!("names/{long}"), b"long");
    fs::create_dir_all(root.join("names").join(&long[..150]).join(&long[..150])).unwrap();
    file(&format!("names/{}/{}/deep", &long[..150], &long[..150]), b"deep");
    file("names/space and: \\ more", b"odd");
    file("names/\u{e9}\u{4e16}", b"not ASCII");
    fs::write(root.join("names").join(OsStr::from_bytes(b"not-utf8-\xff\xfe")), "bytes").unwrap();
    for name in ["opaque/hidden", "opaque/below/hidden", "gone/deep/file", "gone-file", "becomes-directory"] {
        file(name, b"below");
    }
    fs::create_dir(root.join("becomes-file")).unwrap();
    file("becomes-file/hidden", b"below");
    file("changes", b"before");
    let old = Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 };
    let times = Timestamps { last_access: old, last_modification: old };
    for name in ["data/one", "links/absolute", "group"] {
        rustix::fs::utimensat(CWD, root.join(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    }
}

/// The second layer: whiteouts, and a file that turns into a directory.
fn changes(root: &Path) {
    fs::remove_dir_all(root.join("gone")).unwrap();
    fs::remove_file(root.join("gone-file")).unwrap();
    fs::remove_file(root.join("becomes-directory")).unwrap();
    fs::create_dir(root.join("becomes-directory")).unwrap();
    fs::write(root.join("becomes-directory/file"), "new").unwrap();
    fs::write(root.join("changes"), "after, and longer").unwrap();
}

/// The third layer: an opaque directory, times below the second, and a directory that turns into a file. (umoci writes
/// whiteouts below such a file, which neither containerd nor Podman accepts.)
fn opaque_layer(top: &Path, archive: &Path) {
    fs::create_dir_all(top.join("opaque")).unwrap();
    fs::create_dir_all(top.join("times")).unwrap();
    fs::write(top.join("opaque/.wh..wh..opq"), "").unwrap();
    fs::write(top.join("opaque/new"), "new").unwrap();
    fs::write(top.join("becomes-file"), "new").unwrap();
    for (name, seconds, nanoseconds) in
        [("a", 1_600_000_000, 123_456_789), ("b", -5, 999_999_999), ("c", 1, 100_000_000)]
    {
        let path = top.join("times").join(name);
        fs::write(&path, name).unwrap();
        let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, &path, &times, AtFlags::empty()).unwrap();
    }
    let mut tar = peer("tar");
    tar.args(["--format=posix", "--sort=name", "--pax-option=delete=atime,delete=ctime", "-C"]).arg(top);
    ok(tar.arg("-cf").arg(archive).args(["becomes-file", "opaque", "times"]));
}

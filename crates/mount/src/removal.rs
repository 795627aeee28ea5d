//! Removes what images and containers have made, however deep it is.
//!
//! `std::fs::remove_dir_all` holds a descriptor for each level, and a layer or a container can make more levels than a
//! process may have descriptors. Here there are three at any time: what lies deeper is moved up first.

use std::{
    ffi::OsString,
    io,
    os::{
        fd::OwnedFd,
        unix::ffi::{OsStrExt as _, OsStringExt as _},
    },
    path::Path,
};

use rustix::{
    fs::{AtFlags, CWD, Dir, Mode, OFlags, fstat, openat, renameat, rmdir, unlinkat},
    io::Errno,
};

/// Names that are read of a directory before they are dealt with.
const BATCH: usize = 1024;

/// Removes a directory and everything below it. Links are not followed, and no other file system is entered.
///
/// # Errors
/// Where something cannot be removed; `EXDEV` where something is mounted below it. Some of it may be gone then.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let root = open(CWD, path.as_os_str())?;
    let device = fstat(&root)?.st_dev;
    let mut moved = 0;
    loop {
        let names = names(&root)?;
        if names.is_empty() {
            break;
        }
        for name in names {
            let Some(directory) = remove_file(&root, &name)? else { continue };
            if fstat(&directory)?.st_dev != device {
                return Err(Errno::XDEV.into());
            }
            move_up(&directory, &root, &mut moved)?;
            drop(directory);
            unlinkat(&root, &name, AtFlags::REMOVEDIR)?;
        }
    }
    Ok(rmdir(path)?)
}

/// Empties a directory: removes its files, and moves its directories up to the root.
fn move_up(directory: &OwnedFd, root: &OwnedFd, moved: &mut u64) -> io::Result<()> {
    loop {
        let names = names(directory)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in names {
            if remove_file(directory, &name)?.is_none() {
                continue;
            }
            loop {
                *moved += 1;
                match renameat(directory, &name, root, format!(".loris-removed-{moved}")) {
                    Ok(()) => break,
                    Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
    }
}

/// Removes a file; returns what turns out to be a directory.
fn remove_file(parent: &OwnedFd, name: &OsString) -> io::Result<Option<OwnedFd>> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(None),
        Err(Errno::ISDIR | Errno::PERM) => Ok(Some(open(parent, name)?)),
        Err(errno) => Err(errno.into()),
    }
}

fn open(parent: impl std::os::fd::AsFd, name: impl rustix::path::Arg) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(openat(parent, name, flags, Mode::empty())?)
}

fn names(directory: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name.to_vec()));
        }
        if names.len() == BATCH {
            break;
        }
    }
    debug_assert!(names.iter().all(|name| !name.as_bytes().is_empty()));
    Ok(names)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn trees_of_any_depth_and_width_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let (outside, tree) = (directory.path().join("outside"), directory.path().join("tree"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("stays"), "").unwrap();
        fs::create_dir(&tree).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        fs::write(tree.join(".loris-removed-1"), "a name that is taken").unwrap();
        for number in 0..BATCH + 7 {
            fs::write(tree.join(format!("f{number}")), "").unwrap();
        }
        // Deeper than any path can be, and than a process has descriptors by default.
        let mut at = open(CWD, tree.as_os_str()).unwrap();
        for _ in 0..5000 {
            rustix::fs::mkdirat(&at, "d", Mode::from_raw_mode(0o755)).unwrap();
            rustix::fs::symlinkat("/", &at, "link").ok();
            at = open(&at, "d").unwrap();
        }
        drop(at);
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        assert!(outside.join("stays").exists());
        assert_eq!(remove_tree(&tree).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(remove_tree(&outside.join("stays")).is_err());
    }
}

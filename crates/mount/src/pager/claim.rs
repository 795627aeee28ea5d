//! Says to other processes that a data file is marked: that its readers are answered by somebody who can fill it.
//!
//! A lock of a byte of the layer's lock file (`F_OFD_SETLK`), which has nothing to do with that file's `flock`: the layer is
//! in use by many who are not asked for its reads. It goes with the last copy of the descriptor, as the group does; and is
//! given up before the mark is.

use std::{fs::File, io, os::fd::AsRawFd as _};

/// Which byte.
const BYTE: libc::off_t = 0;

/// Claims a layer, by its lock file. Claimed more than once it is claimed once.
pub(crate) fn claim(lock: &File) -> io::Result<()> {
    control(lock, libc::F_OFD_SETLK, libc::F_RDLCK).map(drop)
}

/// Gives the claim up.
pub(crate) fn give_up(lock: &File) -> io::Result<()> {
    control(lock, libc::F_OFD_SETLK, libc::F_UNLCK).map(drop)
}

/// Whether anybody else claims it. Allocates nothing.
pub(crate) fn is_claimed(lock: &File) -> bool {
    // Asked for what no other claim would go with.
    control(lock, libc::F_OFD_GETLK, libc::F_WRLCK).is_ok_and(|kind| kind != libc::F_UNLCK)
}

/// Returns the kind of lock that the kernel has answered with.
fn control(lock: &File, command: libc::c_int, kind: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: a structure of numbers.
    let mut wanted: libc::flock = unsafe { std::mem::zeroed() };
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    wanted.l_type = kind.try_into().map_err(invalid)?;
    wanted.l_whence = libc::SEEK_SET.try_into().map_err(invalid)?;
    wanted.l_start = BYTE;
    wanted.l_len = 1;
    // SAFETY: the descriptor is open, and the kernel reads and writes the one structure.
    match unsafe { libc::fcntl(lock.as_raw_fd(), command, &raw mut wanted) } {
        0 => Ok(wanted.l_type.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn others_see_a_claim_until_its_last_copy_is_gone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(file.path()).unwrap();
        let (one, other, asking) = (open(), open(), File::open(file.path()).unwrap());
        asking.lock_shared().unwrap();
        assert!(!is_claimed(&asking), "a flock is no claim");
        claim(&one).unwrap();
        claim(&other).unwrap();
        claim(&other).unwrap();
        assert!(is_claimed(&asking));
        give_up(&other).unwrap();
        assert!(is_claimed(&asking) && is_claimed(&other) && !is_claimed(&one));
        let copy = one.try_clone().unwrap();
        drop(one);
        assert!(is_claimed(&asking));
        drop(copy);
        assert!(!is_claimed(&asking));
    }
}

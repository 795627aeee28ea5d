//! What tests need and no product code may use: servers that misbehave on purpose, real peer programs, and the lines by
//! which a test says that it was skipped.
//!
//! - [`registry`]: an in-memory registry with programmable faults, and Debian's `docker-registry` as a child process.
//! - [`tree`]: a directory tree as facts, to compare what one tool unpacked with what another shows.
//! - [`peer`], [`require_root`], [`require_fuse`]: what the machine can do; where it can't, the test prints
//!   `skipped: TEST: WHAT IS MISSING` and returns.
//!
//! What this crate must not know: the other crates of the workspace. It is the other side of every protocol, so that a
//! mistake in ours is not made twice.
#![forbid(unsafe_code)]

use std::{
    io::Write as _,
    path::{Path, PathBuf},
};

pub mod registry;
pub mod tree;

/// Finds a peer program in `PATH` and in the `sbin` directories, which are not in every user's `PATH`.
#[must_use]
pub fn peer(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|directory| directory.join(name))
        .find(|file| is_executable(file))
}

/// Finds a peer program, or says that `test` is skipped for want of it.
#[must_use]
pub fn require_peer(test: &str, name: &str) -> Option<PathBuf> {
    let found = peer(name);
    if found.is_none() {
        skip(test, name);
    }
    found
}

/// Prints `skipped: TEST: MISSING` to standard error, and appends `TEST: MISSING` to the file that the environment
/// variable `LORIS_SKIPPED` names, where it is set: `cargo xtask test` counts those lines.
pub fn skip(test: &str, missing: &str) {
    // One line is one test, whatever a program has said.
    let line = format!("{test}: {}", missing.split_whitespace().collect::<Vec<_>>().join(" "));
    // Written past the test harness's capture, which would swallow the line of a test that passes.
    let _ = writeln!(std::io::stderr(), "skipped: {line}");
    if let Some(file) = std::env::var_os("LORIS_SKIPPED") {
        // One write for a line: tests of many processes append to the file at once.
        let appended = std::fs::OpenOptions::new().append(true).create(true).open(file);
        let _ = appended.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    }
}

/// Says whether the test runs as root; where not, says that `test` is skipped.
#[must_use]
pub fn require_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skip(test, "root");
    }
    root
}

/// Says whether FUSE file systems can be mounted here; where not, says that `test` is skipped.
#[must_use]
pub fn require_fuse(test: &str) -> bool {
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    if let Err(error) = device {
        skip(test, &format!("/dev/fuse ({error})"));
        return false;
    }
    if !rustix::process::geteuid().is_root() && peer("fusermount3").is_none() {
        skip(test, "root or fusermount3");
        return false;
    }
    true
}

fn is_executable(file: &Path) -> bool {
    file.is_file() && rustix::fs::access(file, rustix::fs::Access::EXEC_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_programs_only() {
        assert!(peer("sh").is_some_and(|sh| sh.is_absolute()));
        assert_eq!(peer("no-such-program-anywhere"), None);
        // `/etc/passwd` exists, but can't be run.
        assert!(!is_executable(Path::new("/etc/passwd")));
        assert!(!is_executable(Path::new("/etc")));
    }
}

//! What this machine allows, and what to do about what it does not.
//!
//! Asked before anything is fetched, so that a command can say all that it lacks at once. What stands here is a
//! forecast; the mount itself decides.

use std::{fmt, fs, io, os::unix::fs::PermissionsExt as _};

use rustix::thread::CapabilitySet;

use crate::fuse::fusermount;

/// Whether one thing is there.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Ability {
    /// It is.
    Present,
    /// It is not.
    Missing {
        /// Why, in words.
        reason: String,
        /// What to do, in words.
        remedy: &'static str,
    },
}

impl Ability {
    /// Whether it is there.
    #[must_use]
    pub fn is_present(&self) -> bool {
        *self == Self::Present
    }

    pub(crate) fn missing(reason: impl Into<String>, remedy: &'static str) -> Self {
        Self::Missing { reason: reason.into(), remedy }
    }
}

impl fmt::Display for Ability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Present => f.write_str("present"),
            Self::Missing { reason, remedy } => write!(f, "{reason}; {remedy}"),
        }
    }
}

/// What this process can do on this machine. [`probe`] makes it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Abilities {
    /// `/dev/fuse` can be opened. `fusermount3`, too, opens it with its caller's rights.
    pub fuse_device: Ability,
    /// The right to mount: root, or `CAP_SYS_ADMIN` in a user namespace.
    pub admin: Ability,
    /// `fusermount3`, which mounts FUSE for others than root.
    pub fusermount: Ability,
    /// overlayfs is in the kernel.
    pub overlay: Ability,
    /// Users without privileges can mount FUSE: `fusermount3` is there, and they may open the device.
    pub users: Ability,
    /// Users may let other users see their FUSE mounts (`user_allow_other`).
    pub users_may_allow_other: bool,
}

/// What somebody wants to mount.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// A tree that cannot be written to.
    ReadOnly,
    /// A root file system that can be written to.
    ReadWrite,
}

impl Abilities {
    /// Whether this process may mount by itself.
    #[must_use]
    pub fn is_admin(&self) -> bool {
        self.admin.is_present()
    }

    /// Returns what is missing for a mount over FUSE, each with its remedy; nothing where it can be tried.
    #[must_use]
    pub fn missing_for(&self, wish: Wish) -> Vec<&Ability> {
        let needed: &[&Ability] = match (wish, self.is_admin()) {
            (Wish::ReadOnly, true) => &[&self.fuse_device],
            (Wish::ReadOnly, false) => &[&self.fuse_device, &self.fusermount],
            (Wish::ReadWrite, true) => &[&self.fuse_device, &self.overlay],
            (Wish::ReadWrite, false) => &[&self.admin, &self.fuse_device, &self.overlay],
        };
        needed.iter().copied().filter(|ability| !ability.is_present()).collect()
    }

    /// Returns what is missing for an overlay, where one is needed.
    #[must_use]
    pub fn missing_for_overlay(&self, wish: Wish) -> Vec<&Ability> {
        let needed: &[&Ability] = match wish {
            Wish::ReadOnly => &[],
            Wish::ReadWrite => &[&self.admin, &self.overlay],
        };
        needed.iter().copied().filter(|ability| !ability.is_present()).collect()
    }

    /// Returns all abilities with their names, for a report.
    #[must_use]
    pub fn all(&self) -> [(&'static str, &Ability); 5] {
        [
            ("FUSE for users", &self.users),
            ("/dev/fuse", &self.fuse_device),
            ("right to mount", &self.admin),
            ("fusermount3", &self.fusermount),
            ("overlayfs", &self.overlay),
        ]
    }
}

/// Looks at this machine. Takes less than a millisecond and changes nothing.
#[must_use]
pub fn probe() -> Abilities {
    Abilities {
        fuse_device: fuse_device(),
        admin: admin(),
        fusermount: match fusermount::find() {
            Some(_) => Ability::Present,
            None => Ability::missing("fusermount3 is not installed", "`apt install fuse3` installs it"),
        },
        overlay: overlay(),
        users: users(),
        users_may_allow_other: fusermount::may_allow_other(),
    }
}

fn users() -> Ability {
    if fusermount::find().is_none() {
        return Ability::missing("fusermount3 is not installed", "`apt install fuse3` installs it");
    }
    match fs::metadata(crate::fuse::DEVICE) {
        // Reading and writing for others.
        Ok(device) if device.permissions().mode() & 0o006 == 0o006 => Ability::Present,
        Ok(_) => Ability::missing("only root may open /dev/fuse", "let all users open it with `chmod 666 /dev/fuse`"),
        Err(error) => {
            let remedy = fuse_device_remedy(&error);
            Ability::missing(format!("{}: {error}", crate::fuse::DEVICE), remedy)
        }
    }
}

/// What to do where `/dev/fuse` cannot be opened.
pub(crate) fn fuse_device_remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "load the kernel module with `modprobe fuse`, or give the container the device with `--device /dev/fuse`"
        }
        io::ErrorKind::PermissionDenied => {
            "run as root, or let root open it to all users with `chmod 666 /dev/fuse`, as most systems have it"
        }
        _ => "the kernel may lack FUSE: try `modprobe fuse`",
    }
}

fn fuse_device() -> Ability {
    match fs::OpenOptions::new().read(true).write(true).open(crate::fuse::DEVICE) {
        Ok(_) => Ability::Present,
        Err(error) => {
            let remedy = fuse_device_remedy(&error);
            Ability::missing(format!("cannot open {}: {error}", crate::fuse::DEVICE), remedy)
        }
    }
}

fn admin() -> Ability {
    let remedy = "run as root, or in a user namespace of one's own (`unshare -rm`)";
    match rustix::thread::capabilities(None) {
        Ok(sets) if sets.effective.contains(CapabilitySet::SYS_ADMIN) => Ability::Present,
        Ok(_) => Ability::missing("no right to mount (CAP_SYS_ADMIN)", remedy),
        Err(error) => Ability::missing(format!("cannot read capabilities: {error}"), remedy),
    }
}

fn overlay() -> Ability {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let known = fs::read("/proc/filesystems").is_ok_and(|text| lists(&text, b"overlay"));
    // The kernel loads the module when somebody mounts, so that it need not be there yet.
    let loadable = || {
        ["modules.dep", "modules.builtin"].iter().any(|list| {
            fs::read(format!("/lib/modules/{release}/{list}"))
                .is_ok_and(|text| text.windows(b"/overlay.ko".len()).any(|window| window == b"/overlay.ko"))
        })
    };
    if known || loadable() {
        Ability::Present
    } else {
        Ability::missing("the kernel has no overlayfs", "load it with `modprobe overlay`, or mount read-only")
    }
}

/// Whether `/proc/filesystems` names a kind: it is the last word of a line.
fn lists(text: &[u8], kind: &[u8]) -> bool {
    text.split(|&byte| byte == b'\n').any(|line| line.rsplit(|&byte| byte == b'\t').next() == Some(kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_are_found_by_whole_names() {
        let text = b"nodev\tsysfs\n\text4\nnodev\toverlay\nnodev\tfuse\n";
        for (kind, listed) in [("overlay", true), ("ext4", true), ("over", false), ("nodev", false), ("btrfs", false)] {
            assert_eq!(lists(text, kind.as_bytes()), listed, "{kind}");
        }
    }

    #[test]
    fn what_is_missing_depends_on_who_asks() {
        let missing = || Ability::missing("x", "y");
        let with = |admin: bool, fusermount: bool| Abilities {
            fuse_device: Ability::Present,
            admin: if admin { Ability::Present } else { missing() },
            fusermount: if fusermount { Ability::Present } else { missing() },
            overlay: missing(),
            users: missing(),
            users_may_allow_other: false,
        };
        let cases = [
            (with(true, false), Wish::ReadOnly, 0),
            (with(true, false), Wish::ReadWrite, 1),
            (with(false, true), Wish::ReadOnly, 0),
            (with(false, false), Wish::ReadOnly, 1),
            (with(false, true), Wish::ReadWrite, 2),
            (with(false, false), Wish::ReadWrite, 2),
        ];
        for (abilities, wish, count) in cases {
            assert_eq!(abilities.missing_for(wish).len(), count, "{abilities:?} {wish:?}");
        }
    }

    #[test]
    fn a_remedy_is_named() {
        let shown = Ability::missing("fusermount3 is not installed", "`apt install fuse3` installs it").to_string();
        assert_eq!(shown, "fusermount3 is not installed; `apt install fuse3` installs it");
    }
}

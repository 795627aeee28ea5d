//! How containerd is told to mount a snapshot: a bind mount, or overlayfs over lower directories.
//!
//! The options are those of containerd's overlayfs snapshotter, in its order (`plugins/snapshots/overlay/overlay.go`), so
//! that whoever reads them finds what they know.
//!
//! What this module must not know: where lower directories come from.

use std::path::{Path, PathBuf};

use loris_format::tree::OpaqueStyle;

use crate::{
    labels,
    metadata::{Kind, Labels, Snapshot},
};

/// One mount.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mount {
    /// The file system's type, or `bind`.
    pub kind: &'static str,
    /// A directory, or the file system's name.
    pub source: String,
    /// As in `/etc/fstab`.
    pub options: Vec<String>,
}

/// What is the same for all of them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MountSettings {
    /// Whether the kernel's overlayfs has the option `index`.
    pub has_index: bool,
    /// Whether overlayfs keeps its attributes in `user.*`, as it must in a user namespace.
    pub user_xattrs: bool,
    /// More options of snapshots that can be written, such as `volatile`.
    pub options: Vec<String>,
}

impl MountSettings {
    /// Finds out what this machine has.
    #[must_use]
    pub fn of_this_machine(options: Vec<String>) -> Self {
        let map = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        Self {
            has_index: Path::new("/sys/module/overlay/parameters/index").exists(),
            user_xattrs: !map.split_whitespace().eq(["0", "0", "4294967295"]),
            options,
        }
    }

    /// Which attribute marks opaque directories of layers that are mounted alone. Containers would see the other one.
    #[must_use]
    pub fn opaque_style(&self) -> OpaqueStyle {
        if self.user_xattrs { OpaqueStyle::User } else { OpaqueStyle::Trusted }
    }
}

/// Says how to mount a snapshot over its lower directories, the uppermost first.
#[must_use]
pub fn mounts(snapshot: &Snapshot, directory: &Path, lower: &[PathBuf], settings: &MountSettings) -> Vec<Mount> {
    let can_write = snapshot.kind == Kind::Active;
    let own = directory.join("fs");
    let bind = |source: &Path| {
        let access = if can_write { "rw" } else { "ro" };
        Mount {
            kind: "bind",
            source: source.display().to_string(),
            options: vec![access.to_owned(), "rbind".to_owned()],
        }
    };
    match (can_write, lower) {
        (_, []) => return vec![bind(&own)],
        (false, [only]) => return vec![bind(only)],
        _ => {}
    }
    let mut options = Vec::new();
    if settings.has_index {
        options.push("index=off".to_owned());
    }
    if settings.user_xattrs {
        options.push("userxattr".to_owned());
    }
    for (label, option) in [(labels::UID_MAPPING, "uidmap"), (labels::GID_MAPPING, "gidmap")] {
        if let Some(mapping) = snapshot.labels.get(label) {
            options.push(format!("{option}={mapping}"));
        }
    }
    if can_write {
        options.push(format!("workdir={}", directory.join("work").display()));
        options.push(format!("upperdir={}", own.display()));
        options.extend(settings.options.iter().cloned());
    }
    let lower: Vec<String> = lower.iter().map(|path| path.display().to_string()).collect();
    options.push(format!("lowerdir={}", lower.join(":")));
    vec![Mount { kind: "overlay", source: "overlay".to_owned(), options }]
}

/// Returns who owns the root of a container that has user numbers of its own: what its number 0 stands for.
#[must_use]
pub fn owner_of_root(labels: &Labels) -> Option<(u32, u32)> {
    let root = |label: &str| {
        let mappings = labels.get(label)?.split(',').map(|mapping| mapping.split(':').collect::<Vec<_>>());
        mappings
            .filter_map(|parts| match parts.as_slice() {
                ["0", host, _] => host.parse().ok(),
                _ => None,
            })
            .next()
    };
    Some((root(labels::UID_MAPPING)?, root(labels::GID_MAPPING)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::{Time, Usage};

    fn snapshot(kind: Kind, labels: &[(&str, &str)]) -> Snapshot {
        let now = Time::now();
        Snapshot {
            name: "name".to_owned(),
            id: 7,
            kind,
            parent: None,
            created: now,
            updated: now,
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            usage: Usage::default(),
            remote: None,
            fallback: None,
        }
    }

    #[test]
    fn options_are_those_of_the_overlayfs_snapshotter() {
        let plain = MountSettings { has_index: true, ..MountSettings::default() };
        let options = vec!["volatile".to_owned()];
        let more = MountSettings { has_index: true, user_xattrs: true, options };
        let mapped = [(labels::UID_MAPPING, "0:1000:65536"), (labels::GID_MAPPING, "0:2000:65536")];
        type Case<'a> = (Kind, &'a [(&'a str, &'a str)], &'a [&'a str], &'a MountSettings, &'a str);
        let cases: [Case<'_>; 7] = [
            (Kind::Active, &[], &[], &plain, "bind /s/7/fs rw,rbind"),
            (Kind::View, &[], &[], &plain, "bind /s/7/fs ro,rbind"),
            (Kind::View, &[], &["/a"], &plain, "bind /a ro,rbind"),
            (Kind::View, &[], &["/b", "/a"], &plain, "overlay overlay index=off,lowerdir=/b:/a"),
            (
                Kind::Active,
                &[],
                &["/b", "/a"],
                &plain,
                "overlay overlay index=off,workdir=/s/7/work,upperdir=/s/7/fs,lowerdir=/b:/a",
            ),
            (
                Kind::Active,
                &[],
                &["/a"],
                &more,
                "overlay overlay index=off,userxattr,workdir=/s/7/work,upperdir=/s/7/fs,volatile,lowerdir=/a",
            ),
            (
                Kind::Active,
                &mapped,
                &["/a"],
                &plain,
                "overlay overlay index=off,uidmap=0:1000:65536,gidmap=0:2000:65536,workdir=/s/7/work,upperdir=/s/7/fs,lowerdir=/a",
            ),
        ];
        for (kind, labels, lower, settings, expected) in cases {
            let lower: Vec<PathBuf> = lower.iter().map(PathBuf::from).collect();
            let made = mounts(&snapshot(kind, labels), Path::new("/s/7"), &lower, settings);
            let said: Vec<String> =
                made.iter().map(|m| format!("{} {} {}", m.kind, m.source, m.options.join(","))).collect();
            assert_eq!(said, [expected]);
        }
        let labels = snapshot(Kind::Active, &mapped).labels;
        assert_eq!(owner_of_root(&labels), Some((1000, 2000)));
    }
}

//! What containerd is told: where snapshots are asked for, and that CRI and the transfer service use them.
//!
//! What this module must not know: the file system.

use std::path::Path;

use super::toml::{Edit, Edited, Place};

/// The name of the snapshotter.
pub(super) const NAME: &str = "loris";
pub(super) const REMARK: &str = "Written by `loris daemon install`; `loris daemon uninstall` takes it back.";
/// What the plugin of CRI is called.
const CRI: [&str; 3] = ["cri", "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"];
const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// What is wanted.
pub(super) struct Wanted<'a> {
    pub(super) address: &'a Path,
    pub(super) root: &'a Path,
    /// Whether Kubernetes' images are to be lazy.
    pub(super) cri: bool,
    /// Whether containerd is known to be of version 2 or later.
    pub(super) is_two: bool,
}

/// A changed configuration.
pub(super) struct Changed {
    pub(super) text: String,
    pub(super) edits: Vec<Edit>,
    pub(super) notes: Vec<String>,
}

/// Changes a configuration; `None` for one that is not there.
pub(super) fn change(text: Option<&str>, wanted: &Wanted<'_>) -> Result<Changed, String> {
    // All that is in use take it, and 2.x reads it as its own.
    let text = text.filter(|text| !text.trim().is_empty()).unwrap_or("version = 2\n");
    let at_the_end = change_at(text, wanted, Place::End)?;
    let changed = at_the_end.map_or_else(|| change_at(text, wanted, Place::Inside), |changed| Ok(Some(changed)))?;
    changed.ok_or_else(|| "what is there can't be added to".to_owned())
}

fn change_at(text: &str, wanted: &Wanted<'_>, place: Place) -> Result<Option<Changed>, String> {
    let mut edited = Edited::parse(text, REMARK, place)?;
    let mut notes = Vec::new();
    let version = edited.get(&["version"]).and_then(|item| item.as_integer()).unwrap_or(1);
    let proxy = |key: &'static str| ["proxy_plugins", NAME, key];
    edited.set(&proxy("type"), "snapshot")?;
    edited.set(&proxy("address"), wanted.address.to_string_lossy().as_ref())?;
    let exports = |key: &'static str| ["proxy_plugins", NAME, "exports", key];
    edited.set(&exports("root"), wanted.root.to_string_lossy().as_ref())?;
    edited.set(&exports("enable_remote_snapshot_annotations"), "true")?;
    let has_cri = !is_disabled(&edited);
    if wanted.cri && has_cri {
        let tables: &[&str] = match version {
            ..=1 => &["plugins", "cri", "containerd"],
            2 => &["plugins", CRI[1], "containerd"],
            _ => &["plugins", CRI[2]],
        };
        let key = |name: &'static str| [tables, &[name]].concat();
        edited.set(&key("snapshotter"), NAME)?;
        edited.set(&key("disable_snapshot_annotations"), false)?;
        notes.push(
            "Kubernetes pulls its images anew: those that are here belong to the snapshotter that pulled them.".into(),
        );
    } else if wanted.cri {
        notes.push("CRI is disabled in containerd's configuration, and is left so (disabled_plugins).".into());
    }
    if version >= 3 || wanted.is_two {
        transfer(&mut edited, &mut notes)?;
    }
    if edited.get(&["imports"]).is_some() {
        notes.push("containerd's configuration imports other files, which were not looked at.".into());
    }
    Ok(edited.finish().map(|(text, edits)| Changed { text, edits, notes }))
}

/// The transfer service unpacks for snapshotters that it was told of, and for the usual one where it was told nothing.
fn transfer(edited: &mut Edited, notes: &mut Vec<String>) -> Result<(), String> {
    let keys = ["plugins", TRANSFER, "unpack_config"];
    let ours: &[(&str, &str)] = &[("platform", "linux"), ("snapshotter", NAME)];
    match edited.get(&keys) {
        None => edited.append(&keys, &[&[("platform", "linux"), ("snapshotter", "overlayfs")], ours]),
        Some(item) => match item.as_array_of_tables() {
            Some(list) if list.iter().any(|entry| entry.get("snapshotter").and_then(|s| s.as_str()) == Some(NAME)) => {
                Ok(())
            }
            Some(_) => edited.append(&keys, &[ours]),
            None => {
                notes.push(format!(
                    "{} is written as one value: add {{ platform = \"linux\", snapshotter = \"{NAME}\" }} to it.",
                    keys.join(".")
                ));
                Ok(())
            }
        },
    }
}

fn is_disabled(edited: &Edited) -> bool {
    let disabled = edited.get(&["disabled_plugins"]).and_then(|item| item.as_array());
    disabled.is_some_and(|names| names.iter().filter_map(|name| name.as_str()).any(|name| CRI.contains(&name)))
}

/// Reads what `containerd --version` prints. Says whether that is version 2 or later.
#[must_use]
pub fn is_two(printed: &str) -> bool {
    let version = printed.split_whitespace().nth(2).unwrap_or_default();
    let major = version.trim_start_matches('v').split('.').next().unwrap_or_default();
    major.parse::<u32>().is_ok_and(|major| major >= 2)
}

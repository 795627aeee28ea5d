//! Who a container's process runs as: `name|uid[:group|gid]`, looked up in the image's own `/etc/passwd` and
//! `/etc/group`, as Docker does.

use std::{io, path::Path};

use crate::root::Root;

/// Most bytes of `/etc/passwd` or `/etc/group` that are read.
const FILE_BYTES: u64 = 4 << 20;
/// Largest identifier that Docker and runc take.
const LARGEST_ID: u32 = i32::MAX as u32;

/// A user and their groups.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Supplementary groups, sorted.
    pub groups: Vec<u32>,
    /// The home directory, where the user has an entry that names one.
    pub home: Option<String>,
}

/// A user or a group that the image doesn't know.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserError {
    /// The name has no entry.
    #[error("no user {name:?} in the image's /etc/passwd (a number needs no entry)")]
    UnknownUser {
        /// The name.
        name: String,
    },
    /// The name has no entry.
    #[error("no group {name:?} in the image's /etc/group (a number needs no entry)")]
    UnknownGroup {
        /// The name.
        name: String,
    },
    /// The file can't be read.
    #[error("read {file} of the image: {source}")]
    Unreadable {
        /// The file.
        file: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Looks a user up. An empty `user` is root.
///
/// # Errors
/// A name is unknown, or a file can't be read. Malformed lines are passed over, as the C library does.
pub fn resolve(root: &Root, user: &str) -> Result<Identity, UserError> {
    let passwd = read(root, "/etc/passwd")?;
    let group = read(root, "/etc/group")?;
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let entry = entries(&passwd).find(|fields| fields.first() == Some(&user)).or_else(|| {
        entries(&passwd).find(|fields| fields.len() > 3 && number(user).is_some() && id(fields, 2) == number(user))
    });
    let mut identity = match &entry {
        Some(fields) => Identity {
            uid: id(fields, 2).ok_or_else(|| UserError::UnknownUser { name: user.to_owned() })?,
            gid: id(fields, 3).unwrap_or(0),
            groups: Vec::new(),
            home: fields.get(5).filter(|home| home.starts_with('/')).map(|home| (*home).to_owned()),
        },
        None => Identity {
            uid: number(user).ok_or_else(|| UserError::UnknownUser { name: user.to_owned() })?,
            ..Identity::default()
        },
    };
    match wanted_group {
        Some(wanted) => {
            let found =
                entries(&group).find(|fields| fields.first() == Some(&wanted)).and_then(|fields| id(&fields, 2));
            identity.gid =
                found.or_else(|| number(wanted)).ok_or_else(|| UserError::UnknownGroup { name: wanted.to_owned() })?;
        }
        None => {
            // A user without an entry is in no group's list.
            let name = entry.as_ref().and_then(|fields| fields.first().copied());
            identity.groups = entries(&group)
                .filter(|fields| {
                    name.is_some_and(|name| {
                        fields.get(3).is_some_and(|list| list.split(',').any(|member| member == name))
                    })
                })
                .filter_map(|fields| id(&fields, 2))
                .collect();
            identity.groups.sort_unstable();
            identity.groups.dedup();
        }
    }
    Ok(identity)
}

fn read(root: &Root, file: &'static str) -> Result<String, UserError> {
    let bytes = root.read(Path::new(file), FILE_BYTES).map_err(|source| UserError::Unreadable { file, source })?;
    Ok(String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned())
}

fn entries(file: &str) -> impl Iterator<Item = Vec<&str>> {
    file.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| line.split(':').map(str::trim).collect())
}

fn id(fields: &[&str], position: usize) -> Option<u32> {
    fields.get(position).and_then(|field| number(field))
}

fn number(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|id| digits && *id <= LARGEST_ID)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn users_and_groups() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("etc")).unwrap();
        let passwd = "# users\nroot:x:0:0:root:/root:/bin/sh\n\nbroken\nweb:x:33:34:www:/var/www:/bin/sh\n7:x:70:71::/seven:\nbad:x:-1:0::/:\n";
        fs::write(directory.path().join("etc/passwd"), passwd).unwrap();
        let group = "root:x:0:\nwww:x:34:\nadm:x:4:other,web\nlog:x:3:web\nlog2:x:3:web\n";
        fs::write(directory.path().join("etc/group"), group).unwrap();
        let root = Root::open(directory.path()).unwrap();
        let identity = |uid, gid, groups: &[u32], home: Option<&str>| Identity {
            uid,
            gid,
            groups: groups.to_vec(),
            home: home.map(str::to_owned),
        };
        let cases = [
            ("", identity(0, 0, &[], Some("/root"))),
            ("root", identity(0, 0, &[], Some("/root"))),
            ("web", identity(33, 34, &[3, 4], Some("/var/www"))),
            ("33", identity(33, 34, &[3, 4], Some("/var/www"))),
            ("web:", identity(33, 34, &[3, 4], Some("/var/www"))),
            ("web:adm", identity(33, 4, &[], Some("/var/www"))),
            ("web:99", identity(33, 99, &[], Some("/var/www"))),
            (":adm", identity(0, 4, &[], Some("/root"))),
            ("7", identity(70, 71, &[], Some("/seven"))),
            ("1000", identity(1000, 0, &[], None)),
            ("1000:1001", identity(1000, 1001, &[], None)),
        ];
        for (user, expected) in cases {
            assert_eq!(resolve(&root, user).unwrap(), expected, "{user:?}");
        }
        for bad in ["nobody", "web:none", "bad", "-1", "+1", "2147483648", "99999999999", "1000:x", " web"] {
            assert!(resolve(&root, bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_image_without_files() {
        let directory = tempfile::tempdir().unwrap();
        let root = Root::open(directory.path()).unwrap();
        assert_eq!(resolve(&root, "").unwrap(), Identity::default());
        assert_eq!(resolve(&root, "5").unwrap().uid, 5);
        assert!(resolve(&root, "root").is_err());
    }
}

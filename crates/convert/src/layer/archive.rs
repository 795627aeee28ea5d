//! Builds archives for tests.

use loris_format::tar::{self, Entry, EntryKind};

/// An archive, entry by entry.
#[derive(Default, Clone)]
pub(crate) struct Archive(pub(crate) Vec<u8>);

impl Archive {
    pub(crate) fn entry(mut self, entry: &Entry, content: &[u8]) -> Self {
        let entry = Entry { size: content.len() as u64, ..entry.clone() };
        self.0.extend(tar::encode_header(&entry).unwrap());
        self.0.extend_from_slice(content);
        self.0.extend_from_slice(tar::padding(entry.size));
        self
    }

    pub(crate) fn file(self, path: &str, content: &[u8]) -> Self {
        self.entry(&Entry { path: path.into(), permissions: 0o644, ..Entry::default() }, content)
    }

    pub(crate) fn directory(self, path: &str) -> Self {
        let kind = EntryKind::Directory;
        self.entry(&Entry { path: path.into(), kind, permissions: 0o755, ..Entry::default() }, b"")
    }

    pub(crate) fn link(self, path: &str, target: &str) -> Self {
        let kind = EntryKind::HardLink;
        self.entry(&Entry { path: path.into(), kind, link: target.into(), ..Entry::default() }, b"")
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&tar::END_OF_ARCHIVE);
        self.0
    }
}

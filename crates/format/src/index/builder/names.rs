//! Names of directories while an index is built: a hash table of (directory, name).
//!
//! Names are stored once and moved into the index at the end. 32 bytes a name, 4 to 8 for the table, and the name.

use std::hash::{BuildHasher, RandomState};

#[derive(Debug, Default)]
pub(super) struct Names {
    names: Vec<Name>,
    /// Open addressing: a name's place and one, or 0. A power of two long, at most half full.
    table: Vec<u32>,
    /// Seeded, since names are an attacker's. The order of names does not depend on it.
    hasher: RandomState,
}

#[derive(Debug)]
struct Name {
    directory: u32,
    node: u32,
    hash: u64,
    name: Box<[u8]>,
}

/// Names sorted by directory, those of one directory by name.
pub(super) struct ByDirectory {
    order: Vec<u32>,
    first: Vec<u32>,
}

impl ByDirectory {
    pub(super) fn of(&self, directory: u32) -> &[u32] {
        let directory = directory as usize;
        &self.order[self.first[directory] as usize..self.first[directory + 1] as usize]
    }
}

impl Names {
    pub(super) fn find(&self, directory: u32, name: &[u8]) -> Option<u32> {
        if self.table.is_empty() {
            return None;
        }
        let mut slot = self.slot(self.hasher.hash_one((directory, name)));
        loop {
            let place = self.table[slot].checked_sub(1)?;
            let candidate = &self.names[place as usize];
            if candidate.directory == directory && *candidate.name == *name {
                return Some(place);
            }
            slot = (slot + 1) & (self.table.len() - 1);
        }
    }

    /// Adds a name that is not there; `None` where there are too many.
    pub(super) fn insert(&mut self, directory: u32, name: &[u8], node: u32) -> Option<()> {
        if (self.names.len() + 1) * 2 > self.table.len() {
            self.grow()?;
        }
        let hash = self.hasher.hash_one((directory, name));
        let place = u32::try_from(self.names.len() + 1).ok()?;
        self.names.push(Name { directory, node, hash, name: name.into() });
        self.occupy(hash, place);
        Some(())
    }

    pub(super) fn node(&self, place: u32) -> u32 {
        self.names[place as usize].node
    }

    pub(super) fn set_node(&mut self, place: u32, node: u32) {
        self.names[place as usize].node = node;
    }

    pub(super) fn take(&mut self, place: u32) -> Box<[u8]> {
        std::mem::take(&mut self.names[place as usize].name)
    }

    /// Returns a name's directory, and the name.
    pub(super) fn standing(&self, place: u32) -> (u32, &[u8]) {
        let name = &self.names[place as usize];
        (name.directory, &name.name)
    }

    /// Returns one name of each node that has one.
    pub(super) fn of_nodes(&self, nodes: usize) -> Vec<Option<u32>> {
        let mut of_nodes = vec![None; nodes];
        for (place, name) in (0..).zip(&self.names) {
            of_nodes[name.node as usize].get_or_insert(place);
        }
        of_nodes
    }

    pub(super) fn by_directory(&self, nodes: usize) -> ByDirectory {
        let mut first = vec![0_u32; nodes + 1];
        for name in &self.names {
            first[name.directory as usize + 1] += 1;
        }
        for directory in 0..nodes {
            first[directory + 1] += first[directory];
        }
        let mut next = first.clone();
        let mut order = vec![0_u32; self.names.len()];
        for (place, name) in (0..).zip(&self.names) {
            let slot = &mut next[name.directory as usize];
            order[*slot as usize] = place;
            *slot += 1;
        }
        for directory in first.windows(2) {
            order[directory[0] as usize..directory[1] as usize]
                .sort_unstable_by(|one, other| self.standing(*one).cmp(&self.standing(*other)));
        }
        ByDirectory { order, first }
    }

    fn slot(&self, hash: u64) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "the low bits are as good as others, and only they count")]
        let bits = hash as usize;
        bits & (self.table.len() - 1)
    }

    fn occupy(&mut self, hash: u64, place: u32) {
        let mut slot = self.slot(hash);
        while self.table[slot] != 0 {
            slot = (slot + 1) & (self.table.len() - 1);
        }
        self.table[slot] = place;
    }

    fn grow(&mut self) -> Option<()> {
        let length = self.table.len().checked_mul(2)?.max(64);
        self.table.clear();
        self.table.resize(length, 0);
        for place in 0..self.names.len() {
            let hash = self.names[place].hash;
            self.occupy(hash, u32::try_from(place + 1).ok()?);
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_again_and_sorted() {
        let mut names = Names::default();
        for number in (0..1000_u32).rev() {
            let name = format!("{number:04}");
            names.insert(number % 7, name.as_bytes(), number).unwrap();
        }
        for number in 0..1000 {
            let name = format!("{number:04}");
            let place = names.find(number % 7, name.as_bytes()).unwrap();
            assert_eq!(names.node(place), number);
            assert_eq!(names.find(8, name.as_bytes()), None);
        }
        let sorted = names.by_directory(9);
        assert_eq!(
            sorted.of(0).iter().map(|place| names.node(*place)).collect::<Vec<_>>(),
            Vec::from_iter((0..1000).step_by(7))
        );
        assert!(sorted.of(8).is_empty());
    }
}

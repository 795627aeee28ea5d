//! Names of directories while an index is built: a hash table of names for each directory.
//!
//! One table for all would be smaller, and each look into it a miss of all caches: entries of one directory come
//! together, and so the table that they need is at hand. Names are stored once and moved into the index at the end. 24
//! bytes a name, 16 to 32 for the table, and the name.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};

#[derive(Debug, Default)]
pub(super) struct Names {
    names: Vec<Name>,
    /// A directory's table and one, by its node; 0 where it has no names.
    tables_of: Vec<u32>,
    tables: Vec<Table>,
    /// Seeded, since names are an attacker's. The order of names does not depend on it.
    hasher: RandomState,
}

/// The names of one directory. Open addressing: a power of two long, at most half full.
#[derive(Debug, Default)]
struct Table {
    slots: Vec<Slot>,
    taken: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    /// A name's place and one; 0 where there is none.
    name: u32,
    /// A part of its hash: the name need not be looked at where it differs.
    tag: u32,
}

#[derive(Debug)]
struct Name {
    directory: u32,
    node: u32,
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
        let table = self.tables_of.get(directory as usize)?.checked_sub(1)?;
        let tag = self.tag(name);
        self.tables[table as usize].with(tag).find(|place| *self.names[*place as usize].name == *name)
    }

    /// Makes room for so many names.
    pub(super) fn reserve(&mut self, names: usize) {
        self.names.reserve(names);
        self.tables_of.reserve(names);
    }

    /// Adds a name that is not there; `None` where there are too many.
    pub(super) fn insert(&mut self, directory: u32, name: &[u8], node: u32) -> Option<()> {
        let place = u32::try_from(self.names.len() + 1).ok()?;
        let at = directory as usize;
        if self.tables_of.len() <= at {
            self.tables_of.resize(at + 1, 0);
        }
        if self.tables_of[at] == 0 {
            self.tables.push(Table::default());
            // No more tables than names.
            self.tables_of[at] = u32::try_from(self.tables.len()).ok()?;
        }
        let tag = self.tag(name);
        self.tables[self.tables_of[at] as usize - 1].insert(Slot { name: place, tag });
        self.names.push(Name { directory, node, name: name.into() });
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

    fn tag(&self, name: &[u8]) -> u32 {
        let mut hasher = self.hasher.build_hasher();
        hasher.write(name);
        // What is left are 32 bits.
        u32::try_from(hasher.finish() >> 32).unwrap_or_default()
    }
}

impl Table {
    const LEAST_SLOTS: usize = 8;

    /// Returns the places of the names that have this tag.
    fn with(&self, tag: u32) -> impl Iterator<Item = u32> {
        let mask = self.slots.len().wrapping_sub(1);
        // At least half of the slots are free, so that one ends the search.
        let slots = (0..self.slots.len()).map(move |step| self.slots[(tag as usize + step) & mask]);
        slots.take_while(|slot| slot.name != 0).filter(move |slot| slot.tag == tag).map(|slot| slot.name - 1)
    }

    fn insert(&mut self, slot: Slot) {
        if (self.taken + 1) * 2 > self.slots.len() {
            let length = (self.slots.len() * 2).max(Self::LEAST_SLOTS);
            let before = std::mem::replace(&mut self.slots, vec![Slot::default(); length]);
            before.into_iter().filter(|slot| slot.name != 0).for_each(|slot| self.occupy(slot));
        }
        self.occupy(slot);
        self.taken += 1;
    }

    fn occupy(&mut self, slot: Slot) {
        let mask = self.slots.len() - 1;
        let mut at = slot.tag as usize & mask;
        while self.slots[at].name != 0 {
            at = (at + 1) & mask;
        }
        self.slots[at] = slot;
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

//! In which order a layer's entries are written.
//!
//! Entries are told to a [`Sorter`] in the order of the source archive; it answers with the order of the blob:
//! prioritised files in the given order, each behind its parents and (a hard link) its target; the landmark; the rest
//! as it was. Of entries with one name the last wins, as it does where the archive is unpacked; landmarks and tables of
//! contents of an earlier conversion are dropped.
//!
//! Unpacking has consequences that a list of names has not, and they are kept: a name that is replaced leaves its inode
//! to the other hard links of it ([`Change::Takes`]), and a file that replaces a directory takes away what was below.
//!
//! Memory: about 100 bytes an entry beside its name.

use std::{collections::BTreeMap, ops::Bound};

use super::Error;
use crate::estargz::toc::{NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_NAME};

/// An entry's number in the source archive, counting those that were kept.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct EntryId(pub u32);

/// What the order depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sort<'a> {
    /// A directory: a second one of the name leaves what is below it.
    Directory,
    /// Another name of the entry with this (clean) name.
    HardLink(&'a [u8]),
    /// Anything else.
    Other,
}

/// What an entry must become, because of entries behind it in the source.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// A hard link whose target's name was given to another entry: it becomes the file itself, with all of the target's
    /// attributes and content, under its own name.
    Takes(EntryId),
    /// A hard link that must point to another (clean) name of the same inode.
    LinksTo(Box<[u8]>),
}

/// The order of the blob.
#[derive(Debug, Default)]
pub struct Order {
    /// The entries, in the order of the blob.
    pub entries: Vec<EntryId>,
    /// How many of `entries` stand before the landmark.
    pub prioritised: usize,
    /// Name of the landmark.
    pub landmark: &'static str,
    /// Entries that do not stay as they were.
    pub changes: BTreeMap<EntryId, Change>,
    /// Prioritised names that the layer does not have.
    pub missing: Vec<Vec<u8>>,
    /// Hard links whose target the layer does not have; lazy readers will refuse the layer.
    pub dangling: Vec<EntryId>,
}

/// Says whether an entry of this (clean) name belongs to the format and not to the layer.
#[must_use]
pub fn is_reserved(clean_name: &[u8]) -> bool {
    [PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK, TOC_NAME].iter().any(|name| name.as_bytes() == clean_name)
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Item {
    live: bool,
    directory: bool,
    /// For a hard link: the entry that its target's name meant where the link stood; `NONE` where the name was not yet
    /// there, and for entries that are not links.
    target: u32,
    /// The entry at the end of the chain of targets: the inode. The entry itself where it is no link.
    inode: u32,
}

/// Takes the entries of an archive and finds their order.
#[derive(Default)]
pub struct Sorter {
    names: BTreeMap<Box<[u8]>, u32>,
    items: Vec<Item>,
    /// Targets of links that stand before what they link to (or link to nothing).
    forward: BTreeMap<u32, Box<[u8]>>,
    /// Whether a name was given twice; without, no link can have lost its target.
    replaced: bool,
}

impl Sorter {
    /// Takes the next entry of the source. Returns its number, or `None` where it is not part of the layer: landmarks,
    /// tables of contents, and a hard link to its own name.
    ///
    /// # Errors
    /// Where there are more entries than `most`.
    pub fn add(&mut self, clean_name: &[u8], sort: Sort<'_>, most: usize) -> Result<Option<EntryId>, Error> {
        if is_reserved(clean_name) {
            return Ok(None);
        }
        let id = u32::try_from(self.items.len()).ok().filter(|&id| (id as usize) < most && id != NONE);
        let id = id.ok_or(Error::TooManyEntries { limit: most })?;
        let mut item = Item { live: true, directory: sort == Sort::Directory, target: NONE, inode: id };
        if let Sort::HardLink(target) = sort {
            match self.names.get(target) {
                Some(_) if target == clean_name => return Ok(None),
                Some(&target) => {
                    item.target = target;
                    item.inode = self.items[target as usize].inode;
                }
                None => {
                    self.forward.insert(id, target.into());
                }
            }
        }
        if let Some(place) = self.names.get_mut(clean_name) {
            let old = std::mem::replace(place, id);
            self.replaced = true;
            self.items[old as usize].live = false;
            if self.items[old as usize].directory && !item.directory && !clean_name.is_empty() {
                self.remove_below(clean_name);
            }
        } else {
            self.names.insert(clean_name.into(), id);
        }
        self.items.push(item);
        Ok(Some(EntryId(id)))
    }

    /// Each entry is removed at most once, so that all calls together are linear.
    fn remove_below(&mut self, directory: &[u8]) {
        let mut start = directory.to_vec();
        start.push(b'/');
        let mut end = directory.to_vec();
        end.push(b'/' + 1);
        let bounds = (Bound::Included(start.as_slice()), Bound::Excluded(end.as_slice()));
        let below: Vec<Box<[u8]>> = self.names.range::<[u8], _>(bounds).map(|(name, _)| name.clone()).collect();
        for name in below {
            if let Some(id) = self.names.remove(&name) {
                self.items[id as usize].live = false;
            }
        }
    }

    /// Returns the order. `prioritised` are clean names; an empty list asks for the no-prefetch landmark.
    ///
    /// # Errors
    /// Where hard links form a circle.
    pub fn finish(mut self, prioritised: &[Vec<u8>]) -> Result<Order, Error> {
        let mut order = Order {
            landmark: if prioritised.is_empty() { NO_PREFETCH_LANDMARK } else { PREFETCH_LANDMARK },
            ..Order::default()
        };
        resolve_forward(&self.names, &self.forward, &mut self.items, &mut order)?;
        let mut placer = Placer::new(&self.names, &mut self.items);
        if self.replaced {
            placer.mend_links(&mut order);
        }
        for name in prioritised {
            if !placer.place(name) {
                order.missing.push(name.clone());
            }
        }
        order.prioritised = placer.out.len();
        order.entries = placer.finish();
        Ok(order)
    }
}

/// Gives links that stood before their target the entry that the name has come to mean, and all links their inode.
fn resolve_forward(
    names: &BTreeMap<Box<[u8]>, u32>,
    forward: &BTreeMap<u32, Box<[u8]>>,
    items: &mut [Item],
    order: &mut Order,
) -> Result<(), Error> {
    if forward.is_empty() {
        return Ok(());
    }
    for (&id, target) in forward {
        match names.get(target) {
            Some(&target) => items[id as usize].target = target,
            None if items[id as usize].live => order.dangling.push(EntryId(id)),
            None => {}
        }
    }
    // The ends of chains, by following each to an entry whose end is known: every link is walked once.
    let mut known = vec![false; items.len()];
    let mut chain = Vec::new();
    for (&start, target) in forward {
        let mut at = start;
        while !known[at as usize] {
            let item = items[at as usize];
            if item.inode != at {
                at = item.inode;
            } else if item.target == NONE {
                known[at as usize] = true;
            } else {
                chain.push(at);
                if chain.len() > forward.len() {
                    return Err(Error::LinkCircle { target: String::from_utf8_lossy(target).into_owned() });
                }
                at = item.target;
            }
        }
        let inode = items[at as usize].inode;
        for link in chain.drain(..) {
            items[link as usize].inode = inode;
            known[link as usize] = true;
        }
    }
    for id in 0..items.len() {
        items[id].inode = items[items[id].inode as usize].inode;
    }
    Ok(())
}

/// Puts entries into their place.
struct Placer<'a> {
    names: &'a BTreeMap<Box<[u8]>, u32>,
    /// The name of each entry that still has one.
    name_of: Vec<Option<&'a [u8]>>,
    items: &'a mut [Item],
    placed: Vec<bool>,
    out: Vec<EntryId>,
}

impl<'a> Placer<'a> {
    fn new(names: &'a BTreeMap<Box<[u8]>, u32>, items: &'a mut [Item]) -> Self {
        let mut name_of = vec![None; items.len()];
        for (name, &id) in names {
            name_of[id as usize] = Some(name.as_ref());
        }
        Self { names, name_of, placed: vec![false; items.len()], items, out: Vec::new() }
    }

    /// Repairs links whose target's name was given to another entry behind them.
    fn mend_links(&mut self, order: &mut Order) {
        let mut heirs: BTreeMap<u32, u32> = BTreeMap::new();
        for (own, id) in (0..self.items.len()).zip(0_u32..) {
            let item = self.items[own];
            if !item.live || item.target == NONE || self.items[item.target as usize].live {
                continue;
            }
            let heir =
                if self.items[item.inode as usize].live { item.inode } else { *heirs.entry(item.inode).or_insert(id) };
            if heir == id {
                order.changes.insert(EntryId(id), Change::Takes(EntryId(item.inode)));
                self.items[own].target = NONE;
            } else if let Some(name) = self.name_of[heir as usize] {
                order.changes.insert(EntryId(id), Change::LinksTo(name.into()));
                self.items[own].target = heir;
            }
        }
    }

    /// Places a prioritised name: its parents, the chain of its links' targets, itself. Says whether the name exists.
    fn place(&mut self, name: &[u8]) -> bool {
        let Some(&first) = self.names.get(name) else { return false };
        let mut chain = Vec::new();
        let mut at = first;
        // Ends: `resolve_forward` refused circles, and links that point backwards have none.
        while at != NONE && !self.placed[at as usize] {
            chain.push(at);
            if let Some(name) = self.name_of[at as usize] {
                self.place_parents(name);
            }
            at = self.items[at as usize].target;
        }
        for id in chain.into_iter().rev() {
            self.put(id);
        }
        true
    }

    fn place_parents(&mut self, name: &[u8]) {
        if name.is_empty() {
            return;
        }
        let slashes = name.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(place, _)| place);
        for end in std::iter::once(0).chain(slashes) {
            if let Some(&id) = self.names.get(&name[..end]) {
                self.put(id);
            }
        }
    }

    fn put(&mut self, id: u32) {
        if !std::mem::replace(&mut self.placed[id as usize], true) {
            self.out.push(EntryId(id));
        }
    }

    fn finish(mut self) -> Vec<EntryId> {
        let rest = self.items.iter().zip(&self.placed).zip(0..).filter(|((item, placed), _)| item.live && !**placed);
        self.out.extend(rest.map(|(_, id)| EntryId(id)));
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lossy(name: &[u8]) -> String {
        String::from_utf8_lossy(name).into_owned()
    }

    fn sort(text: &str) -> (Vec<u8>, Option<Vec<u8>>, bool) {
        if let Some((name, target)) = text.split_once("=>") {
            return (name.into(), Some(target.into()), false);
        }
        (text.trim_end_matches('/').into(), None, text.ends_with('/'))
    }

    /// Returns the order as words, the landmark as `*` (prefetch) or `-`, changes behind a name.
    fn order(source: &str, log: &str) -> Result<String, Error> {
        let mut sorter = Sorter::default();
        let mut names = Vec::new();
        for word in source.split_whitespace() {
            let (name, link, directory) = sort(word);
            let kind = match &link {
                Some(target) => Sort::HardLink(target),
                None if directory => Sort::Directory,
                None => Sort::Other,
            };
            if sorter.add(&name, kind, 100)?.is_some() {
                names.push(word.to_owned());
            }
        }
        let log: Vec<Vec<u8>> = log.split_whitespace().map(|word| word.trim_end_matches('/').into()).collect();
        let order = sorter.finish(&log)?;
        let mark = if order.landmark == PREFETCH_LANDMARK { "*" } else { "-" };
        let mut words: Vec<String> = order
            .entries
            .iter()
            .map(|id| match order.changes.get(id) {
                None => names[id.0 as usize].clone(),
                Some(Change::Takes(of)) => format!("{}<{}>", names[id.0 as usize], of.0),
                Some(Change::LinksTo(name)) => format!("{}[{}]", names[id.0 as usize], lossy(name)),
            })
            .collect();
        words.insert(order.prioritised, mark.to_owned());
        words.extend(order.missing.iter().map(|name| format!("!{}", lossy(name))));
        words.extend(order.dangling.iter().map(|id| format!("?{}", id.0)));
        Ok(words.join(" "))
    }

    #[test]
    fn orders_as_the_reference_does() {
        const TREE: &str = "foo.txt baz/ baz/bar.txt baz/bazbaz/ baz/bazbaz/b.txt baz/bazbaz/a.txt baz/baz2.txt";
        for (name, source, log, want) in [
            ("no log", "foo.txt bar/ bar/a", "", "- foo.txt bar/ bar/a"),
            ("identical", "foo.txt baz.txt", "foo.txt baz.txt", "foo.txt baz.txt *"),
            ("shuffled files", "a b bar/ bar/a", "bar/a b a", "bar/ bar/a b a *"),
            (
                "shuffled directories",
                TREE,
                "baz/bazbaz/a.txt baz/baz2.txt foo.txt",
                "baz/ baz/bazbaz/ baz/bazbaz/a.txt baz/baz2.txt foo.txt * baz/bar.txt baz/bazbaz/b.txt",
            ),
            ("only a link's target in the log", "a bar/ l=>a bar/c", "a bar/c", "a bar/ bar/c * l=>a"),
            ("link in the log", "a b/ b/t l=>b/t z", "l z", "b/ b/t l=>b/t z * a"),
            ("chain of links", "x a b=>a c=>b", "c", "a b=>a c=>b * x"),
            ("landmark with a log", ".prefetch.landmark a b", "b", "b * a"),
            ("landmark without", ".prefetch.landmark a b .no.prefetch.landmark", "", "- a b"),
            ("not a landmark", "foo/.prefetch.landmark", "", "- foo/.prefetch.landmark"),
            ("own table of contents", "a stargz.index.json", "", "- a"),
            ("missing", "a", "b a", "a * !b"),
            ("nothing but missing", "a", "b", "* a !b"),
            ("last of a name", "a b a", "", "- b a"),
            ("last of a name in the log", "a b a c", "c a", "c a * b"),
            ("twice in the log", "a b", "b b", "b * a"),
            ("root", "/ a b", "b", "/ b * a"),
            ("root in the log", "a /", "/", "/ * a"),
            ("parent that is not declared", "a x/y", "x/y", "x/y * a"),
            ("parent behind", "x/y x/ a", "x/y", "x/ x/y * a"),
        ] {
            assert_eq!(order(source, log).unwrap(), want, "{name}");
        }
    }

    #[test]
    fn links_keep_their_inode() {
        for (name, source, log, want) in [
            ("target replaced", "a l=>a a", "", "- l=>a<0> a"),
            ("two links of it", "a l=>a m=>a a", "", "- l=>a<0> m=>a[l] a"),
            ("link of a link", "a l=>a m=>l a", "", "- l=>a<0> m=>l a"),
            ("middle replaced", "a l=>a m=>l l", "", "- a m=>l[a] l"),
            ("both replaced", "a l=>a m=>l a l", "", "- m=>l<0> a l"),
            ("link itself replaced", "a l=>a l", "", "- a l"),
            ("heir comes first", "a l=>a m=>a a", "m", "l=>a<0> m=>a[l] * a"),
            ("link to itself", "a a=>a", "", "- a"),
            ("target behind", "l=>a a", "", "- l=>a a"),
            ("target behind, in the log", "l=>a b a", "l", "a l=>a * b"),
            ("target nowhere", "l=>a b", "", "- l=>a b ?0"),
            ("file in a directory's place", "d/ d/x l=>d/x d dd", "", "- l=>d/x<1> d dd"),
            ("directory twice", "d/ d/x d/", "", "- d/x d/"),
        ] {
            assert_eq!(order(source, log).unwrap(), want, "{name}");
        }
        for circle in ["l=>m m=>l", "a=>b b=>c c=>a", "l=>l"] {
            assert!(matches!(order(circle, ""), Err(Error::LinkCircle { .. })), "{circle}");
        }
        assert!(matches!(Sorter::default().add(b"a", Sort::Other, 0), Err(Error::TooManyEntries { limit: 0 })));
    }
}

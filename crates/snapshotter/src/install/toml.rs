//! Keys put into a TOML file and taken out again, while everything else in it stays as it is: order, comments, spaces.
//!
//! What this module must not know: whose file it is.

use serde::{Deserialize, Serialize};
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, TableLike, Value};

/// What was done to a key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Edit {
    /// The key, behind those of its tables.
    pub(super) keys: Vec<String>,
    /// What it had, as it was written; `None` where it was not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) before: Option<String>,
    /// What it has.
    pub(super) after: String,
}

/// A file, and what was done to it.
pub(super) struct Edited {
    document: DocumentMut,
    /// Tables that are not in the file, which are written behind all that is.
    added: DocumentMut,
    edits: Vec<Edit>,
    remark: String,
    /// Where a table that is not there goes.
    place: Place,
}

/// Where tables go that are not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    /// Behind everything else, so that nothing that people wrote comes under another heading.
    End,
    /// Into the tables that they belong to: these are written in a way which can't be added to elsewhere.
    Inside,
}

impl Edited {
    pub(super) fn parse(text: &str, remark: &str, place: Place) -> Result<Self, String> {
        let document: DocumentMut = text.parse().map_err(|error: toml_edit::TomlError| error.to_string())?;
        Ok(Self { document, added: DocumentMut::new(), edits: Vec::new(), remark: remark.to_owned(), place })
    }

    /// Returns the text. `None` where the tables at its end contradict what is before them.
    pub(super) fn finish(self) -> Option<(String, Vec<Edit>)> {
        let mut text = self.document.to_string();
        if !self.added.is_empty() {
            let end = if text.is_empty() || text.ends_with('\n') { "" } else { "\n" };
            text = format!("{text}{end}\n# {}\n{}", self.remark, self.added.to_string().trim_start());
            text.parse::<DocumentMut>().ok()?;
        }
        Some((text, self.edits))
    }

    /// Returns what a key has.
    pub(super) fn get(&self, keys: &[&str]) -> Option<&Item> {
        keys.iter().try_fold(self.document.as_item(), |item, key| item.as_table_like()?.get(key))
    }

    /// Gives a key a value.
    pub(super) fn set(&mut self, keys: &[&str], value: impl Into<Value>) -> Result<(), String> {
        let mut value: Value = value.into();
        let after = value.to_string();
        let Some((last, tables)) = keys.split_last() else { return Ok(()) };
        let table = self.table(tables)?;
        let before = match table.get_mut(last) {
            None => {
                let indent = indent_of(table);
                table.insert(last, Item::Value(value));
                if let (Some(indent), Some(mut key)) = (indent, table.key_mut(last)) {
                    key.leaf_decor_mut().set_prefix(indent);
                }
                None
            }
            Some(Item::Value(there)) => {
                let decor = std::mem::take(there.decor_mut());
                let before = there.to_string();
                if before == after {
                    *there.decor_mut() = decor;
                    return Ok(());
                }
                *value.decor_mut() = decor;
                *there = value;
                Some(before)
            }
            Some(_) => return Err(format!("{} is a table", keys.join("."))),
        };
        self.edits.push(Edit { keys: keys.iter().map(|key| (*key).to_owned()).collect(), before, after });
        Ok(())
    }

    /// Puts tables at the end of a list of tables, which is made if need be.
    pub(super) fn append(&mut self, keys: &[&str], entries: &[&[(&str, &str)]]) -> Result<(), String> {
        let Some((last, tables)) = keys.split_last() else { return Ok(()) };
        let document = if self.get(keys).is_some() { &mut self.document } else { &mut self.added };
        let mut table: &mut dyn TableLike = document.as_table_mut();
        for key in tables {
            let item = table.entry(key).or_insert_with(|| {
                let mut made = Table::new();
                made.set_implicit(true);
                Item::Table(made)
            });
            table = item.as_table_like_mut().ok_or_else(|| format!("{key} is not a table"))?;
        }
        let list = table.entry(last).or_insert_with(|| Item::ArrayOfTables(ArrayOfTables::new()));
        let Some(list) = list.as_array_of_tables_mut() else {
            return Err(format!("{} is not a list of tables", keys.join(".")));
        };
        for entry in entries {
            let mut table = Table::new();
            for (key, value) in *entry {
                table.insert(key, Item::Value((*value).into()));
            }
            list.push(table.clone());
            let keys = keys.iter().map(|key| (*key).to_owned()).collect();
            self.edits.push(Edit { keys, before: None, after: table.to_string() });
        }
        Ok(())
    }

    /// Returns a table, and makes it where it is not there.
    fn table(&mut self, keys: &[&str]) -> Result<&mut dyn TableLike, String> {
        let there = self.get(keys).map(|item| (item.as_table_like().is_some(), item.as_table()));
        let has_heading = match there {
            Some((false, _)) => return Err(format!("{} is not a table", keys.join("."))),
            Some((true, Some(table))) => !table.is_implicit(),
            Some((true, None)) => true,
            None => false,
        };
        if has_heading || self.place == Place::Inside {
            return table_at(self.document.as_table_mut(), keys);
        }
        table_at(self.added.as_table_mut(), keys)
    }

    /// Takes an edit back. Says `false` where the key has another value by now, which somebody else gave it.
    pub(super) fn undo(&mut self, edit: &Edit) -> bool {
        let keys: Vec<&str> = edit.keys.iter().map(String::as_str).collect();
        let Some((last, tables)) = keys.split_last() else { return true };
        let Some(table) = find_table(self.document.as_table_mut(), tables) else { return true };
        match table.get_mut(last) {
            None => {}
            Some(Item::Value(there)) => {
                let decor = std::mem::take(there.decor_mut());
                let is_ours = there.to_string() == edit.after;
                *there.decor_mut() = decor.clone();
                let before = edit.before.as_ref().map(|before| before.parse::<Value>());
                match (is_ours, before) {
                    (false, _) | (_, Some(Err(_))) => return false,
                    (true, None) => drop(table.remove(last)),
                    (true, Some(Ok(before))) => {
                        *there = before;
                        *there.decor_mut() = decor;
                    }
                }
            }
            Some(Item::ArrayOfTables(list)) => {
                let ours = list.iter().position(|entry| plain(entry) == edit.after);
                let Some(ours) = ours else { return false };
                list.remove(ours);
                if list.is_empty() {
                    table.remove(last);
                }
            }
            Some(_) => return false,
        }
        self.prune(tables);
        true
    }

    /// Removes tables that have nothing in them any more, the innermost first.
    fn prune(&mut self, tables: &[&str]) {
        for depth in (1..=tables.len()).rev() {
            let (last, outer) = (tables[depth - 1], &tables[..depth - 1]);
            let Some(table) = find_table(self.document.as_table_mut(), outer) else { continue };
            let is_empty = table.get(last).and_then(Item::as_table_like).is_some_and(TableLike::is_empty);
            if !is_empty {
                return;
            }
            let removed = table.remove(last);
            // Comments that stood before our heading are somebody's.
            let heading = removed.as_ref().and_then(Item::as_table).and_then(|table| table.decor().prefix()?.as_str());
            let ours = |line: &&str| !self.remark.is_empty() && line.trim_start_matches('#').trim() == self.remark;
            let theirs: Vec<&str> = heading.unwrap_or_default().lines().filter(|line| !ours(line)).collect();
            if theirs.iter().any(|line| !line.trim().is_empty()) {
                let trailing = self.document.trailing().as_str().unwrap_or_default().to_owned();
                self.document.set_trailing(format!("{}\n{trailing}", theirs.join("\n").trim_end()));
            }
        }
    }
}

/// A table as this module would write it, whatever stands around it.
fn plain(table: &Table) -> String {
    let mut plain = Table::new();
    for (key, item) in table {
        let mut item = item.clone();
        if let Some(value) = item.as_value_mut() {
            value.decor_mut().clear();
        }
        plain.insert(key, item);
    }
    plain.to_string()
}

fn find_table<'a>(root: &'a mut Table, keys: &[&str]) -> Option<&'a mut dyn TableLike> {
    keys.iter().try_fold(root as &mut dyn TableLike, |table, key| table.get_mut(key)?.as_table_like_mut())
}

/// Returns a table, and makes it where it is not there.
fn table_at<'a>(root: &'a mut Table, keys: &[&str]) -> Result<&'a mut dyn TableLike, String> {
    let mut table: &mut dyn TableLike = root;
    for (depth, key) in keys.iter().enumerate() {
        if !table.contains_key(key) {
            let mut made = Table::new();
            // Only the innermost has a heading of its own.
            made.set_implicit(depth + 1 < keys.len());
            table.insert(key, Item::Table(made));
        }
        let item = table.get_mut(key).ok_or_else(|| format!("{key} is gone"))?;
        table = item.as_table_like_mut().ok_or_else(|| format!("{} is not a table", keys[..=depth].join(".")))?;
    }
    Ok(table)
}

/// The spaces before the keys of a table.
fn indent_of(table: &dyn TableLike) -> Option<String> {
    let (first, _) = table.iter().next()?;
    let prefix = table.key(first)?.leaf_decor().prefix()?.as_str()?;
    let spaces = prefix.rsplit('\n').next()?;
    spaces.chars().all(char::is_whitespace).then(|| spaces.to_owned())
}

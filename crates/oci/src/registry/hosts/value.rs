//! Values of a TOML file, taken out by key, with errors that say where they stand and what they should be.

use std::path::Path;

use toml::{Table, Value};

use crate::place::Error;

/// A table of a file.
#[derive(Clone)]
pub(super) struct Section<'a> {
    path: &'a Path,
    /// The keys that lead to it, for messages.
    name: String,
    table: &'a Table,
}

/// Reads a file.
pub(super) fn parse(path: &Path, text: &str) -> Result<Table, Error> {
    text.parse().map_err(|error: toml::de::Error| {
        let place = error.span().map(|span| {
            let before = &text.as_bytes()[..span.start.min(text.len())];
            format!("line {}: ", before.iter().filter(|byte| **byte == b'\n').count() + 1)
        });
        let detail = format!("{}{}; correct the file, or remove it", place.unwrap_or_default(), error.message());
        Error::Invalid { what: path.display().to_string(), detail }
    })
}

impl<'a> Section<'a> {
    pub(super) fn root(path: &'a Path, table: &'a Table) -> Self {
        Self { path, name: String::new(), table }
    }

    /// Returns the error that `key` is wrong here.
    pub(super) fn error(&self, key: &str, detail: impl std::fmt::Display) -> Error {
        let what = self.path.display().to_string();
        Error::Invalid { what, detail: format!("{}: {detail}; correct the file, or remove it", self.named(key)) }
    }

    fn named(&self, key: &str) -> String {
        let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        let key = if plain { key.to_owned() } else { format!("{key:?}") };
        if self.name.is_empty() { key } else { format!("{}.{key}", self.name) }
    }

    /// Returns a table's members, in the order of the file; none where there is no such key.
    pub(super) fn sections(&self, key: &str) -> Result<Vec<(&'a str, Section<'a>)>, Error> {
        let Some(section) = self.section(key)? else { return Ok(Vec::new()) };
        let members = section.table.keys();
        members
            .map(|member| {
                let inner = section.section(member)?;
                // The key is there.
                inner.map(|inner| (member.as_str(), inner)).ok_or_else(|| section.error(member, "it is gone"))
            })
            .collect()
    }

    pub(super) fn section(&self, key: &str) -> Result<Option<Section<'a>>, Error> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(Section { path: self.path, name: self.named(key), table })),
            Some(other) => Err(self.error(key, format!("a table is expected, not {}", kind(other)))),
        }
    }

    /// Returns the tables of a list of tables; none where there is no such key.
    pub(super) fn list(&self, key: &str) -> Result<Vec<Section<'a>>, Error> {
        let items = match self.table.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(items)) => items,
            Some(other) => return Err(self.error(key, format!("a list of tables is expected, not {}", kind(other)))),
        };
        let sections = items.iter().enumerate().map(|(number, item)| match item {
            Value::Table(table) => {
                Ok(Section { path: self.path, name: format!("{}[{number}]", self.named(key)), table })
            }
            other => Err(self.error(key, format!("a list of tables is expected, not one with {}", kind(other)))),
        });
        sections.collect()
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.table.keys().map(String::as_str)
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.table.get(key)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.error(key, format!("a string is expected, not {}", kind(other)))),
        }
    }

    pub(super) fn boolean(&self, key: &str) -> Result<Option<bool>, Error> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Boolean(value)) => Ok(Some(*value)),
            Some(other) => Err(self.error(key, format!("true or false is expected, not {}", kind(other)))),
        }
    }

    pub(super) fn integer(&self, key: &str) -> Result<Option<i64>, Error> {
        match self.table.get(key) {
            None => Ok(None),
            Some(Value::Integer(value)) => Ok(Some(*value)),
            Some(other) => Err(self.error(key, format!("a whole number is expected, not {}", kind(other)))),
        }
    }

    /// Returns a list of strings, which may be written as one string where `or_one` says so.
    pub(super) fn texts(&self, key: &str, or_one: bool) -> Result<Vec<&'a str>, Error> {
        let expected = if or_one { "a string or a list of strings" } else { "a list of strings" };
        let wrong = |found: &str| self.error(key, format!("{expected} is expected, not {found}"));
        match self.table.get(key) {
            None => Ok(Vec::new()),
            Some(Value::String(text)) if or_one => Ok(vec![text]),
            Some(Value::Array(items)) => {
                let texts =
                    items.iter().map(|item| item.as_str().ok_or_else(|| wrong(&format!("one with {}", kind(item)))));
                texts.collect()
            }
            Some(other) => Err(wrong(kind(other))),
        }
    }
}

/// Returns what a value is, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number with a fraction",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a time",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
    }
}

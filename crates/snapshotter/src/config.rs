//! The configuration of the snapshotter: from the text of a file, flags and variables to settings, and where each came from.
//!
//! ```text
//!  keys      every key of ours: what it takes, which setting it is
//!  stargz    every key of stargz-snapshotter: which of ours it is, or why it means nothing here
//!  mirrors   [[resolver.host."REGISTRY".mirrors]], which is theirs and ours
//!  print     what is in force, as a file that says the same
//! ```
//!
//! Later ones win: defaults, stargz-snapshotter's keys of the file, our keys of the file, variables, flags.
//!
//! What this module must not know: the file system, the command line, how settings are carried out.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

pub mod keys;
mod mirrors;
mod nearest;
mod print;
mod settings;
mod stargz;
mod value;

#[cfg(test)]
mod tests;

pub use keys::{KEYS, Key};
pub use settings::{Cache, Credentials, Log, Mirror, Registries, Settings, When};
pub use value::{Kind, Value};

use stargz::{FOREIGN, Foreign, Meaning};

/// Where the mirrors stand.
const MIRRORS: &str = "resolver.host";
/// The key of stargz-snapshotter that counts more than one of ours, whose name is theirs too.
const OFF: &str = "no_prometheus";
/// Most warnings: what is beyond is not a configuration.
const MOST_WARNINGS: usize = 100;

/// A file that was read.
#[derive(Clone, Copy, Debug)]
pub struct File<'a> {
    /// Its path, for messages.
    pub path: &'a Path,
    /// What it says.
    pub text: &'a str,
}

/// Where a value came from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// Nobody said anything.
    Default,
    /// A line of the file.
    File {
        /// The line, counted from 1.
        line: usize,
        /// stargz-snapshotter's name of the key, where that is what stands there.
        named: Option<&'static str>,
    },
    /// A variable of the environment.
    Environment(&'static str),
    /// A flag.
    Flag(String),
}

/// What a flag or a variable says.
#[derive(Clone, Debug)]
pub struct Given {
    /// Of which key.
    pub key: &'static Key,
    /// What.
    pub value: Value,
    /// Where.
    pub origin: Origin,
}

/// Something that is not as its writer may think.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Warning {
    /// The line, counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub text: String,
}

/// Something that is wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Problem {
    /// The line, counted from 1.
    pub line: usize,
    /// The column, counted from 1.
    pub column: usize,
    /// What is wrong there.
    pub text: String,
}

/// A file that can't be used: all that is wrong with it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ConfigError {
    /// The file.
    pub path: PathBuf,
    /// What is wrong; at least one.
    pub problems: Vec<Problem>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, Problem { line, column, text }) in self.problems.iter().enumerate() {
            let separator = if number == 0 { "" } else { "\n" };
            write!(f, "{separator}{}:{line}:{column}: {text}", self.path.display())?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}

/// What is in force.
#[derive(Clone, Debug)]
pub struct Settled {
    /// The settings.
    pub settings: Settings,
    /// What should be said of the file.
    pub warnings: Vec<Warning>,
    /// The file, where there is one.
    pub file: Option<(PathBuf, String)>,
    origins: BTreeMap<&'static str, Origin>,
    mirror_lines: BTreeMap<String, usize>,
}

impl Settled {
    /// Says where the value of a key came from.
    #[must_use]
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// Says it in words: `/etc/loris/snapshotter.toml:3`.
    #[must_use]
    pub fn place(&self, key: &str) -> String {
        self.said(&self.origin(key))
    }

    fn said(&self, origin: &Origin) -> String {
        let path = self.file.as_ref().map_or_else(String::new, |(path, _)| path.display().to_string());
        match origin {
            Origin::Default => "default".to_owned(),
            Origin::File { line, named: None } => format!("{path}:{line}"),
            Origin::File { line, named: Some(named) } => format!("{path}:{line}, {named}"),
            Origin::Environment(name) => name_of_variable(name),
            Origin::Flag(name) => format!("flag {name}"),
        }
    }

    /// Says for each warning where, and what.
    pub fn warned(&self) -> impl Iterator<Item = String> + '_ {
        let path = self.file.as_ref().map_or_else(String::new, |(path, _)| path.display().to_string());
        self.warnings.iter().map(move |Warning { line, text }| format!("{path}:{line}: {text}"))
    }
}

fn name_of_variable(name: &str) -> String {
    format!("environment {name}")
}

/// Puts defaults, a file, and what was given beside it together.
///
/// # Errors
/// Where the file is not TOML, or has something of a wrong type: all of that at once, with line and column.
pub fn settle(file: Option<File<'_>>, given: &[Given]) -> Result<Settled, ConfigError> {
    let mut settled = Settled {
        settings: Settings::default(),
        warnings: Vec::new(),
        file: file.map(|file| (file.path.to_owned(), file.text.to_owned())),
        origins: BTreeMap::new(),
        mirror_lines: BTreeMap::new(),
    };
    if let Some(file) = file {
        let mut reading = Reading { text: file.text, settled: &mut settled, problems: Vec::new(), ours: Vec::new() };
        reading.file();
        let problems = reading.problems;
        if !problems.is_empty() {
            return Err(ConfigError { path: file.path.to_owned(), problems });
        }
    }
    for Given { key, value, origin } in given {
        (key.set)(&mut settled.settings, value.clone());
        settled.origins.insert(key.name, origin.clone());
    }
    settled.warnings.sort_by_key(|warning| warning.line);
    Ok(settled)
}

/// Says which keys of a new configuration differ, and whether each counts without a restart. Mirrors do.
#[must_use]
pub fn changed(old: &Settings, new: &Settings) -> Vec<(&'static str, bool)> {
    let mut changed: Vec<_> =
        KEYS.iter().filter(|key| key.value(old) != key.value(new)).map(|key| (key.name, key.reloads)).collect();
    if old.registries.mirrors != new.registries.mirrors {
        changed.push((MIRRORS, true));
    }
    changed
}

/// A file that is being read.
struct Reading<'a> {
    text: &'a str,
    settled: &'a mut Settled,
    problems: Vec<Problem>,
    /// Values of keys of ours, which come after all of theirs.
    ours: Vec<(&'static Key, Value, usize)>,
}

impl Reading<'_> {
    fn file(&mut self) {
        match DeTable::parse(self.text) {
            Ok(table) => self.table("", table.get_ref()),
            Err(error) => {
                let at = error.span().map_or(self.text.len(), |span| span.start);
                self.problem(at, error.message().to_owned());
            }
        }
        for (key, value, line) in std::mem::take(&mut self.ours) {
            if let Some(Origin::File { line, named: Some(named) }) = self.settled.origins.get(key.name) {
                if *named == OFF {
                    continue;
                }
                let text = format!("{named} is not used: {} says the same, and is there too", key.name);
                let line = *line;
                self.warn_line(line, text);
            }
            (key.set)(&mut self.settled.settings, value);
            self.settled.origins.insert(key.name, Origin::File { line, named: None });
        }
    }

    fn table(&mut self, prefix: &str, table: &DeTable<'_>) {
        for (key, value) in table {
            let name = joined(prefix, key.get_ref());
            let at = key.span().start;
            if name == MIRRORS {
                self.mirrors(value);
            } else if let Some(key) = keys::key(&name) {
                if let Some(value) = self.value(&name, key.kind, value) {
                    let line = self.place(at).0;
                    self.ours.push((key, value, line));
                }
            } else if let Some(foreign) = FOREIGN.iter().find(|foreign| foreign.name == name) {
                self.foreign(foreign, at, value);
            } else if is_table(&name) {
                match value.get_ref() {
                    DeValue::Table(inner) => self.table(&name, inner),
                    other => {
                        let text = format!("{name}: expected a table, found {}", value::kind(other));
                        self.problem(value.span().start, text);
                    }
                }
            } else {
                self.unknown(&name, at);
            }
        }
    }

    fn value(&mut self, name: &str, kind: Kind, value: &Spanned<DeValue<'_>>) -> Option<Value> {
        match kind.of_file(value.get_ref()) {
            Ok(value) => Some(value),
            Err(detail) => {
                self.problem(value.span().start, format!("{name}: {detail}"));
                None
            }
        }
    }

    fn foreign(&mut self, foreign: &'static Foreign, at: usize, value: &Spanned<DeValue<'_>>) {
        let name = foreign.name;
        let Some(value) = self.value(name, foreign.kind, value) else { return };
        let line = self.place(at).0;
        let (key, map) = match &foreign.meaning {
            Meaning::Nothing(why) => return self.warn_line(line, format!("{name} means nothing here: {why}")),
            Meaning::Is(key, map) => (*key, map),
            Meaning::Nearly(key, map, note) => {
                if map(&value).is_some() {
                    self.warn_line(line, format!("{name} is {note}"));
                }
                (*key, map)
            }
        };
        if let (Some(key), Some(value)) = (keys::key(key), map(&value)) {
            (key.set)(&mut self.settled.settings, value);
            self.settled.origins.insert(key.name, Origin::File { line, named: Some(name) });
        }
    }

    fn mirrors(&mut self, value: &Spanned<DeValue<'_>>) {
        let DeValue::Table(hosts) = value.get_ref() else {
            let text = format!("{MIRRORS}: expected a table, found {}", value::kind(value.get_ref()));
            return self.problem(value.span().start, text);
        };
        for (registry, host) in hosts {
            let read = mirrors::read(registry.get_ref(), host);
            for (at, text) in read.unknown {
                self.warn(at, text);
            }
            for (at, text) in read.wrong {
                self.problem(at, text);
            }
            let line = self.place(registry.span().start).0;
            self.settled.mirror_lines.insert(registry.get_ref().to_string(), line);
            self.settled.settings.registries.mirrors.insert(registry.get_ref().to_string(), read.mirrors);
        }
    }

    fn unknown(&mut self, name: &str, at: usize) {
        let known = KEYS.iter().map(|key| key.name).chain(FOREIGN.iter().map(|foreign| foreign.name));
        let tables = known.clone().filter_map(|known| known.split_once('.')).map(|(table, _)| table);
        let near = nearest::nearest(name, known.chain(tables));
        let meant = near.map_or_else(String::new, |near| format!("; did you mean {near}?"));
        self.warn(at, format!("there is no key {name}{meant}"));
    }

    fn problem(&mut self, at: usize, text: String) {
        let (line, column) = self.place(at);
        if self.problems.len() < MOST_WARNINGS {
            self.problems.push(Problem { line, column, text });
        }
    }

    fn warn(&mut self, at: usize, text: String) {
        self.warn_line(self.place(at).0, text);
    }

    fn warn_line(&mut self, line: usize, text: String) {
        if self.settled.warnings.len() < MOST_WARNINGS {
            self.settled.warnings.push(Warning { line, text });
        }
    }

    /// Line and column of a byte, counted from 1.
    fn place(&self, at: usize) -> (usize, usize) {
        let before = self.text.get(..at).unwrap_or(self.text);
        let line = before.bytes().filter(|byte| *byte == b'\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        (line, column)
    }
}

/// Whether something is known that stands in a table of this name.
fn is_table(name: &str) -> bool {
    let inside = |known: &str| known.strip_prefix(name).is_some_and(|rest| rest.starts_with('.'));
    inside(MIRRORS) || KEYS.iter().any(|key| inside(key.name)) || FOREIGN.iter().any(|foreign| inside(foreign.name))
}

/// A key's name with those of its tables, as it would be written.
fn joined(prefix: &str, key: &str) -> String {
    let bare = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    let key = if bare { key.to_owned() } else { format!("{:.80}", format!("{key:?}")) };
    if prefix.is_empty() { key } else { format!("{prefix}.{key}") }
}

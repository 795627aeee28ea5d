//! containerd's filter language, as far as snapshots go: `name==x,labels."a.b"==y`, `kind~=^act`, `labels.foo`.
//!
//! A filter is a list of selectors that must all match, separated by commas; a snapshot is wanted where any filter matches,
//! or where there is none. The grammar is that of `pkg/filters/parser.go`:
//!
//! ```text
//! selector  := path (operator value)?        operator := "==" | "!=" | "~="
//! path      := part ("." part)*              part     := [A-Za-z][A-Za-z0-9_]* | quoted
//! value     := quoted | anything but , and space and quotes
//! ```
//!
//! `~=` wants a regular expression, in RE2's syntax, which is also that of the crate used here.

use regex::Regex;

use crate::metadata::{Kind, Snapshot};

/// Memory that a compiled regular expression may take.
const PATTERN_BYTES: usize = 1 << 20;

/// A filter that can't be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("filter {filter:?} can't be understood at byte {at}: {reason}")]
pub struct FilterError {
    filter: String,
    at: usize,
    reason: &'static str,
}

/// Filters, any of which may match.
#[derive(Debug, Default)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    Unequal(String),
    Like(Regex),
}

impl Filters {
    /// Reads filters.
    ///
    /// # Errors
    /// The first that can't be read.
    pub fn parse(filters: &[String]) -> Result<Self, FilterError> {
        filters.iter().map(|filter| parse(filter)).collect::<Result<_, _>>().map(Self)
    }

    /// Says whether a snapshot is wanted.
    #[must_use]
    pub fn match_snapshot(&self, snapshot: &Snapshot) -> bool {
        self.0.is_empty() || self.0.iter().any(|all| all.iter().all(|selector| selector.matches(snapshot)))
    }
}

impl Selector {
    fn matches(&self, snapshot: &Snapshot) -> bool {
        let found = field(snapshot, &self.path);
        match (&self.test, found) {
            (Test::Present, found) => found.is_some_and(|value| !value.is_empty()),
            (Test::Equal(wanted), found) => found.is_some_and(|value| value == wanted),
            (Test::Unequal(wanted), found) => found.is_none_or(|value| value != wanted),
            (Test::Like(pattern), found) => found.is_some_and(|value| pattern.is_match(value)),
        }
    }
}

/// As in containerd's `snapshots` adaptor: what can be asked for.
fn field<'a>(snapshot: &'a Snapshot, path: &[String]) -> Option<&'a str> {
    match path.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["name"] => Some(&snapshot.name),
        ["parent"] => Some(snapshot.parent.as_deref().unwrap_or_default()),
        ["kind"] => Some(match snapshot.kind {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }),
        ["labels", key @ ..] if !key.is_empty() => snapshot.labels.get(&key.join(".")).map(String::as_str),
        _ => None,
    }
}

/// Compiles a regular expression, which a client may have made to take all memory.
fn pattern(text: &str) -> Result<Regex, &'static str> {
    let compiled = regex::RegexBuilder::new(text).size_limit(PATTERN_BYTES).build();
    compiled.map_err(|_| "a regular expression that is wrong, or too large")
}

fn parse(filter: &str) -> Result<Vec<Selector>, FilterError> {
    let mut reader = Reader { filter, at: 0 };
    let mut selectors = Vec::new();
    loop {
        selectors.push(reader.selector()?);
        match reader.peek() {
            None => return Ok(selectors),
            Some(',') => reader.at += 1,
            Some(_) => return Err(reader.wrong("a comma was expected")),
        }
    }
}

struct Reader<'a> {
    filter: &'a str,
    at: usize,
}

impl Reader<'_> {
    fn rest(&self) -> &str {
        &self.filter[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn wrong(&self, reason: &'static str) -> FilterError {
        FilterError { filter: self.filter.chars().take(200).collect(), at: self.at, reason }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.part()?];
        while self.peek() == Some('.') {
            self.at += 1;
            path.push(self.part()?);
        }
        let operator = self.rest().get(..2).unwrap_or_default().to_owned();
        let make: fn(String) -> Result<Test, &'static str> = match operator.as_str() {
            "==" => |value| Ok(Test::Equal(value)),
            "!=" => |value| Ok(Test::Unequal(value)),
            "~=" => |value| pattern(&value).map(Test::Like),
            _ => return Ok(Selector { path, test: Test::Present }),
        };
        self.at += 2;
        let value = self.value()?;
        let test = make(value).map_err(|reason| self.wrong(reason))?;
        Ok(Selector { path, test })
    }

    fn part(&mut self) -> Result<String, FilterError> {
        if matches!(self.peek(), Some('"')) {
            return self.quoted();
        }
        let length = self.rest().find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(self.rest().len());
        if length == 0 || self.rest().starts_with(|c: char| c.is_ascii_digit()) {
            return Err(self.wrong("the name of a field was expected"));
        }
        let part = self.rest()[..length].to_owned();
        self.at += length;
        Ok(part)
    }

    fn value(&mut self) -> Result<String, FilterError> {
        if matches!(self.peek(), Some('"' | '|' | '/')) {
            return self.quoted();
        }
        let length = self.rest().find([',', ' ', '"']).unwrap_or(self.rest().len());
        let value = self.rest()[..length].to_owned();
        self.at += length;
        Ok(value)
    }

    fn quoted(&mut self) -> Result<String, FilterError> {
        let Some(quote) = self.peek() else { return Err(self.wrong("a quote was expected")) };
        self.at += quote.len_utf8();
        let mut text = String::new();
        loop {
            let Some(next) = self.peek() else { return Err(self.wrong("a quote is not closed")) };
            self.at += next.len_utf8();
            match next {
                next if next == quote => return Ok(text),
                '\\' if quote == '"' => {
                    let Some(escaped) = self.peek() else { return Err(self.wrong("a quote is not closed")) };
                    self.at += escaped.len_utf8();
                    text.push(match escaped {
                        'n' => '\n',
                        't' => '\t',
                        'r' => '\r',
                        '"' | '\\' | '\'' => escaped,
                        _ => return Err(self.wrong("an escape that is not understood")),
                    });
                }
                next => text.push(next),
            }
        }
    }
}

#[cfg(test)]
mod tests;

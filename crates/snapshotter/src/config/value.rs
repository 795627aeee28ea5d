//! Values, as a file, a flag or a variable gives them, and what a key takes.

use loris_format::amounts;
use toml::de::DeValue;

/// Longest text, in bytes.
const MOST_TEXT: usize = 64 << 10;

/// A value that fits its key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Value {
    /// Yes or no.
    Boolean(bool),
    /// Words, or one of several.
    Text(String),
    /// A number, of bytes and seconds too.
    Number(i64),
    /// A list.
    Texts(Vec<String>),
}

/// What a key takes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Yes or no.
    Boolean,
    /// Words.
    Text,
    /// A file, directory or socket.
    Path,
    /// A list of words.
    Texts,
    /// A whole number of at least and at most so much.
    Number(i64, i64),
    /// A time: a number of seconds, of at least and at most so many, or text such as `2m`.
    Seconds(i64, i64),
    /// Bytes: a number, or text such as `20G`.
    Size,
    /// One of these.
    Choice(&'static [&'static str]),
    /// Several of these.
    Choices(&'static [&'static str]),
}

impl Kind {
    /// Says what is expected, behind "expected".
    #[must_use]
    pub fn expected(self) -> String {
        match self {
            Self::Boolean => "true or false".to_owned(),
            Self::Text => "text in quotes".to_owned(),
            Self::Path => "a path in quotes".to_owned(),
            Self::Texts => "a list of texts, such as [\"one\", \"another\"]".to_owned(),
            Self::Number(least, most) if (least, most) == (i64::MIN, i64::MAX) => "a whole number".to_owned(),
            Self::Number(least, most) => format!("a whole number from {least} to {most}"),
            Self::Seconds(least, most) => format!("{least} to {most} seconds, as a number or a text such as \"2m\""),
            Self::Size => "a size, as a number of bytes or a text such as \"20G\"".to_owned(),
            Self::Choice(words) => format!("one of {}", quoted(words)),
            Self::Choices(words) => format!("a list of at least one of {}", quoted(words)),
        }
    }

    /// Reads a value of a file.
    ///
    /// # Errors
    /// What is there instead of what is expected.
    pub(super) fn of_file(self, value: &DeValue<'_>) -> Result<Value, String> {
        let number = |most: &toml::de::DeInteger<'_>| i64::from_str_radix(most.as_str(), most.radix()).ok();
        let read = match (self, value) {
            (Self::Boolean, DeValue::Boolean(value)) => Some(Value::Boolean(*value)),
            (Self::Number(..) | Self::Seconds(..) | Self::Size, DeValue::Integer(value)) => {
                number(value).map(Value::Number)
            }
            (Self::Texts | Self::Choices(_), DeValue::Array(items)) => {
                let texts = items.iter().map(|item| item.get_ref().as_str().map(str::to_owned));
                texts.collect::<Option<Vec<_>>>().map(Value::Texts)
            }
            (Self::Boolean | Self::Number(..) | Self::Texts | Self::Choices(_), _) => None,
            (_, DeValue::String(text)) => return self.of_text(text),
            _ => None,
        };
        let there = match value {
            DeValue::Array(_) if matches!(self, Self::Texts | Self::Choices(_)) => "a list with something else in it",
            other => kind(other),
        };
        self.bounded(read.ok_or_else(|| format!("expected {}, found {there}", self.expected()))?)
    }

    /// Reads a value of a flag or variable. A list has a comma between two.
    ///
    /// # Errors
    /// What is there instead of what is expected.
    pub fn of_text(self, text: &str) -> Result<Value, String> {
        let wrong = || format!("expected {}, found {text:?}", self.expected());
        let value = match self {
            Self::Boolean => Value::Boolean(text.parse().map_err(|_| wrong())?),
            Self::Text | Self::Path | Self::Choice(_) => Value::Text(text.to_owned()),
            Self::Texts | Self::Choices(_) => {
                Value::Texts(text.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect())
            }
            Self::Number(..) => Value::Number(text.parse().map_err(|_| wrong())?),
            Self::Seconds(..) => match text.parse() {
                Ok(seconds) => Value::Number(seconds),
                Err(_) => Value::Number(whole(amounts::duration(text).map_err(|_| wrong())?.as_secs())),
            },
            Self::Size => Value::Number(whole(amounts::size(text).map_err(|_| wrong())?)),
        };
        self.bounded(value)
    }

    fn bounded(self, value: Value) -> Result<Value, String> {
        let within = |number, least, most| (least..=most).contains(&number);
        let is_short = |text: &String| text.len() <= MOST_TEXT && !text.contains('\0');
        let fits = match (self, &value) {
            (Self::Number(least, most) | Self::Seconds(least, most), Value::Number(number)) => {
                within(*number, least, most)
            }
            (Self::Size, Value::Number(number)) => within(*number, 0, i64::MAX),
            (Self::Choice(words), Value::Text(text)) => words.contains(&text.as_str()),
            (Self::Choices(words), Value::Texts(texts)) => {
                !texts.is_empty() && texts.iter().all(|text| words.contains(&text.as_str()))
            }
            (Self::Path, Value::Text(text)) => !text.is_empty() && is_short(text),
            (_, Value::Text(text)) => is_short(text),
            (_, Value::Texts(texts)) => texts.iter().all(is_short),
            _ => true,
        };
        let found = || match &value {
            Value::Text(text) => format!("{text:.80?}"),
            Value::Number(number) => number.to_string(),
            Value::Boolean(value) => value.to_string(),
            Value::Texts(texts) => format!("{texts:?}"),
        };
        if fits { Ok(value) } else { Err(format!("expected {}, found {}", self.expected(), found())) }
    }
}

impl std::fmt::Display for Value {
    /// As in a TOML file.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Boolean(value) => write!(f, "{value}"),
            Self::Number(value) => write!(f, "{value}"),
            Self::Text(text) => write!(f, "{}", toml_edit::Value::from(text.as_str())),
            Self::Texts(texts) => {
                let texts = texts.iter().map(|text| toml_edit::Value::from(text.as_str()).to_string());
                write!(f, "[{}]", texts.collect::<Vec<_>>().join(", "))
            }
        }
    }
}

/// Says what a value is.
pub(super) fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a point",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn quoted(words: &[&str]) -> String {
    words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ")
}

fn whole(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

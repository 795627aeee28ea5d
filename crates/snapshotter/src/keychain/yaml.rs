//! YAML, as far as Kubernetes' tools write it: into serde's types, by way of JSON's values.
//!
//! Scalars are text, but for `true`, `false` and `null` without quotes; no field that is read here is a number. Aliases are
//! refused, so that a text means no more than it has bytes. Errors say where, and quote nothing: texts hold secrets.

use saphyr_parser::{Event, Parser, ScalarStyle};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Deepest nesting.
const DEPTH: usize = 32;

/// What is being read: a list, or a map with the key whose value comes next.
enum Open {
    List(Vec<Value>),
    Map(Map<String, Value>, Option<String>),
}

/// Reads the first document.
pub(super) fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let value = value(text)?;
    serde_json::from_value(value).map_err(|_| "a field is missing, or is not of the kind that it must be".to_owned())
}

fn value(text: &str) -> Result<Value, String> {
    let mut open: Vec<Open> = Vec::new();
    let mut whole = None;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| {
            format!("not YAML (line {}, column {})", error.marker().line(), error.marker().col() + 1)
        })?;
        let wrong = |what: &str| format!("{what} (line {})", span.start.line());
        let done = match event {
            Event::Scalar(text, style, _, tag) => {
                let is_text = style != ScalarStyle::Plain || tag.is_some();
                if is_text { Value::String(text.into_owned()) } else { plain(&text) }
            }
            Event::SequenceStart(..) => {
                open.push(Open::List(Vec::new()));
                continue;
            }
            Event::MappingStart(..) => {
                open.push(Open::Map(Map::new(), None));
                if open.len() > DEPTH {
                    return Err(wrong("nested too deeply"));
                }
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(Open::List(list)) => Value::Array(list),
                Some(Open::Map(map, None)) => Value::Object(map),
                _ => return Err(wrong("a key without a value")),
            },
            Event::Alias(_) => return Err(wrong("aliases are not read")),
            Event::DocumentStart(_) if whole.is_some() => return Err(wrong("a second document")),
            Event::Nothing | Event::StreamStart | Event::StreamEnd | Event::DocumentStart(_) | Event::DocumentEnd => {
                continue;
            }
        };
        if open.len() > DEPTH {
            return Err(wrong("nested too deeply"));
        }
        match open.last_mut() {
            None => whole = Some(done),
            Some(Open::List(list)) => list.push(done),
            Some(Open::Map(map, key @ None)) => {
                let Value::String(text) = done else { return Err(wrong("a key that is no text")) };
                if map.contains_key(&text) {
                    return Err(wrong("a key that is there twice"));
                }
                *key = Some(text);
            }
            Some(Open::Map(map, key)) => {
                map.insert(key.take().unwrap_or_default(), done);
            }
        }
    }
    Ok(whole.unwrap_or(Value::Null))
}

fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => Value::Null,
        "true" | "True" | "TRUE" => Value::Bool(true),
        "false" | "False" | "FALSE" => Value::Bool(false),
        text => Value::String(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn what_tools_write_is_read() {
        let text = "# a comment\napiVersion: v1\nusers:\n- name: \"a b\"\n  user: {token: 'x: y', n: 12, no: null}\n- name: b\n  \
                    user:\n    text: |\n      one\n      two\n    is: true\n    quoted: \"true\"\nempty: []\nnone:\n";
        let expected = json!({
            "apiVersion": "v1",
            "users": [
                {"name": "a b", "user": {"token": "x: y", "n": "12", "no": null}},
                {"name": "b", "user": {"text": "one\ntwo\n", "is": true, "quoted": "true"}},
            ],
            "empty": [],
            "none": null,
        });
        assert_eq!(value(text), Ok(expected.clone()));
        // JSON is YAML, and some have their files so.
        assert_eq!(value(&serde_json::to_string_pretty(&expected).unwrap()), Ok(expected));
        assert_eq!(value(""), Ok(Value::Null));
    }

    #[test]
    fn what_is_odd_is_refused_without_a_quote() {
        let deep = "[".repeat(100) + &"]".repeat(100);
        let maps = "{a: ".repeat(100) + &"}".repeat(100);
        for (text, expected) in [
            ("a: &x hunter2\nb: *x", "aliases"),
            ("a: hunter2\na: b", "twice"),
            ("a: 'hunter2", "not YAML (line"),
            ("a: b\n---\nc: hunter2", "second document"),
            ("{hunter2: b}: c", "no text"),
            (&deep, "too deeply"),
            (&maps, "too deeply"),
        ] {
            let error = value(text).unwrap_err();
            assert!(error.contains(expected) && !error.contains("hunter2"), "{text}: {error}");
        }
        let error = parse::<Vec<bool>>("hunter2").unwrap_err();
        assert!(!error.contains("hunter2"), "{error}");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[ -~\n]{0,80}") {
            let _ = value(&text);
        }
    }
}

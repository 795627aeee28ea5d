//! Members put into a JSON object and taken out again, while everything else in the text stays as it is.
//!
//! What this module must not know: whose file it is.

use std::{fmt, ops::Range};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::toml::Edit;

/// A text with an object, and what was done to it.
pub(super) struct Edited {
    text: String,
    edits: Vec<Edit>,
}

/// The members of an object, in their order, each where its value stands in the text.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// Where an object stands, and its members' values.
struct Object {
    at: Range<usize>,
    members: Vec<(String, Range<usize>)>,
}

impl Edited {
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let text = if text.trim().is_empty() { "{}\n".to_owned() } else { text.to_owned() };
        let edited = Self { text, edits: Vec::new() };
        edited.object(&[])?.ok_or("it is not an object")?;
        Ok(edited)
    }

    pub(super) fn finish(self) -> (String, Vec<Edit>) {
        (self.text, self.edits)
    }

    /// Gives a member a value, which is JSON.
    pub(super) fn set(&mut self, keys: &[&str], value: &str) -> Result<(), String> {
        let Some((last, outer)) = keys.split_last() else { return Ok(()) };
        let edit =
            |before| Edit { keys: keys.iter().map(|key| (*key).to_owned()).collect(), before, after: value.to_owned() };
        let Some(object) = self.object(outer)? else {
            let (outermost, inner) = outer.split_last().ok_or("it is not an object")?;
            let depth = inner.len() + 1;
            let object = self.object(inner)?.ok_or_else(|| format!("{} is not there", inner.join(".")))?;
            let (pad, end) = (self.indent(depth + 1), self.indent(depth));
            let text = format!("{{{pad}{last:?}: {value}{end}}}");
            self.insert(&object, outermost, &text, depth);
            self.edits.push(edit(None));
            return Ok(());
        };
        match object.members.iter().find(|(name, _)| name == last) {
            None => {
                self.insert(&object, last, value, outer.len() + 1);
                self.edits.push(edit(None));
            }
            Some((_, at)) if self.text[at.clone()] == *value => {}
            Some((_, at)) => {
                let before = self.text[at.clone()].to_owned();
                self.text.replace_range(at.clone(), value);
                self.edits.push(edit(Some(before)));
            }
        }
        Ok(())
    }

    /// Takes an edit back. Says `false` where the member has another value by now, which somebody else gave it.
    pub(super) fn undo(&mut self, edit: &Edit) -> bool {
        let keys: Vec<&str> = edit.keys.iter().map(String::as_str).collect();
        let Some((last, outer)) = keys.split_last() else { return true };
        let Ok(Some(object)) = self.object(outer) else { return true };
        let Some((number, (_, at))) = object.members.iter().enumerate().find(|(_, (name, _))| name == last) else {
            return true;
        };
        if self.text[at.clone()] != edit.after {
            return false;
        }
        if let Some(before) = &edit.before {
            self.text.replace_range(at.clone(), before);
            return true;
        }
        self.remove(&object, number);
        for depth in (0..outer.len()).rev() {
            let Ok(Some(object)) = self.object(&outer[..=depth]) else { return true };
            if !object.members.is_empty() {
                return true;
            }
            let Ok(Some(parent)) = self.object(&outer[..depth]) else { return true };
            if let Some(number) = parent.members.iter().position(|(name, _)| name == outer[depth]) {
                self.remove(&parent, number);
            }
        }
        true
    }

    /// Finds an object; `None` where it is not there.
    fn object(&self, keys: &[&str]) -> Result<Option<Object>, String> {
        let mut at = 0..self.text.len();
        for depth in 0..=keys.len() {
            let part = &self.text[at.clone()];
            let name = || if depth == 0 { "the file".to_owned() } else { keys[..depth].join(".") };
            let Members(members) = serde_json::from_str(part).map_err(|error| format!("{}: {error}", name()))?;
            let place = |value: &RawValue| {
                let start = at.start + (value.get().as_ptr() as usize - part.as_ptr() as usize);
                start..start + value.get().len()
            };
            let members: Vec<_> = members.into_iter().map(|(name, value)| (name, place(value))).collect();
            let Some(key) = keys.get(depth) else { return Ok(Some(Object { at, members })) };
            match members.into_iter().find(|(name, _)| name == key) {
                Some((_, inner)) => at = inner,
                None => return Ok(None),
            }
        }
        Ok(None)
    }

    /// Puts a member at the end of an object.
    fn insert(&mut self, object: &Object, name: &str, value: &str, depth: usize) {
        let pad = self.indent(depth);
        let member = format!("{pad}{name:?}: {value}");
        match object.members.last() {
            Some((_, last)) => self.text.insert_str(last.end, &format!(",{member}")),
            None => {
                let open = object.at.start + self.text[object.at.clone()].find('{').unwrap_or_default();
                let close = object.at.start + self.text[object.at.clone()].rfind('}').unwrap_or_default();
                let end = self.indent(depth - 1);
                self.text.replace_range(open..=close, &format!("{{{member}{end}}}"));
            }
        }
    }

    /// Takes a member out, with the comma and the space that are there for it.
    fn remove(&mut self, object: &Object, number: usize) {
        let end = object.members[number].1.end;
        let start = match number.checked_sub(1) {
            Some(before) => object.members[before].1.end,
            None => object.at.start + self.text[object.at.clone()].find('{').unwrap_or_default() + 1,
        };
        if number == 0 && object.members.len() > 1 {
            // What is behind the comma moves up.
            let comma = self.text[end..].find(',').map_or(end, |comma| end + comma + 1);
            self.text.replace_range(start..comma, "");
        } else if number == 0 {
            let close = object.at.start + self.text[object.at.clone()].rfind('}').unwrap_or_default();
            self.text.replace_range(start..close, "");
        } else {
            self.text.replace_range(start..end, "");
        }
    }

    /// A new line with the space that its members have at a depth.
    fn indent(&self, depth: usize) -> String {
        let unit = self.text.lines().skip(1).find_map(|line| {
            let spaces = &line[..line.len() - line.trim_start().len()];
            (!spaces.is_empty()).then(|| spaces.to_owned())
        });
        let unit = unit.unwrap_or_else(|| "  ".to_owned());
        format!("\n{}", unit.repeat(depth))
    }
}

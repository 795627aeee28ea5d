//! Refuses JSON that two readers could understand differently: an object with one key twice.
//!
//! Serde takes the first of two equal keys for an error in known fields only and the last one elsewhere; Go takes the
//! last, and takes `Layers` for `layers`. A document in which these differ could be signed as one thing and run as
//! another.

use std::{collections::HashSet, fmt};

use serde::{
    Deserialize,
    de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor},
};

/// Checks a whole document: JSON, nothing behind it, no object with a key twice, and on the top level no two keys that
/// differ in case only, and none that differs from one of `known` in case only. Nesting is bounded by serde_json (128).
pub(super) fn check(bytes: &[u8], known: &[&str]) -> Result<(), serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    Value { top: Some(known) }.deserialize(&mut deserializer)?;
    deserializer.end()
}

struct Value<'a> {
    /// The known keys, on the top level.
    top: Option<&'a [&'a str]>,
}

impl<'de> DeserializeSeed<'de> for Value<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Value { top: None })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut keys = HashSet::new();
        while let Some(mut key) = map.next_key::<Key>()?.map(|key| key.0) {
            if let Some(known) = self.top {
                if let Some(meant) = known.iter().find(|known| known.eq_ignore_ascii_case(&key) && **known != key) {
                    return Err(A::Error::custom(format_args!("key {key:?} is {meant:?} to some readers only")));
                }
                key.make_ascii_lowercase();
            }
            if let Some(twice) = keys.replace(key) {
                return Err(A::Error::custom(format_args!("key {twice:?} stands twice in one object")));
            }
            map.next_value_seed(Value { top: None })?;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(transparent)]
struct Key(String);

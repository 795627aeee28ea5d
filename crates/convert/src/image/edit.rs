//! Documents changed in places, everything else byte for byte as it was.
//!
//! A document is read into its keys, in order, with the text of each value; what is not touched is written as it was
//! read, with numbers and escapes that our parser would have written otherwise. Only white space between keys is lost.

use std::fmt;

use loris_format::digest::{DiffId, Digest};
use loris_oci::{Document, document::media_type};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{MapAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::value::{RawValue, to_raw_value};

use crate::Error;

/// A JSON object: keys in order, values as text.
#[derive(Clone)]
pub(crate) struct Object(Vec<(String, Box<RawValue>)>);

impl Object {
    fn get(&self, key: &str) -> Option<&RawValue> {
        self.0.iter().find(|(own, _)| own == key).map(|(_, value)| value.as_ref())
    }

    fn set(&mut self, key: &str, value: &impl Serialize) -> serde_json::Result<()> {
        let value = to_raw_value(value)?;
        match self.0.iter_mut().find(|(own, _)| own == key) {
            Some((_, old)) => *old = value,
            None => self.0.push((key.to_owned(), value)),
        }
        Ok(())
    }

    fn remove(&mut self, key: &str) {
        self.0.retain(|(own, _)| own != key);
    }
}

impl Serialize for Object {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, value) in &self.0 {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry::<String, Box<RawValue>>()? {
                    fields.push(field);
                }
                Ok(Object(fields))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// What a descriptor is to lead to instead.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(crate) struct Target {
    /// The new type; `None` leaves it.
    pub(crate) media_type: Option<String>,
    /// The new content; `None` leaves it.
    pub(crate) content: Option<(Digest, u64)>,
    /// Annotations that are set; those with `None` are removed.
    pub(crate) annotations: Vec<(String, Option<String>)>,
}

impl Target {
    /// A document that takes another one's place.
    pub(crate) fn document(document: &Document) -> Self {
        Self {
            media_type: Some(document.media_type.clone()),
            content: Some((document.digest, document.bytes.len() as u64)),
            annotations: Vec::new(),
        }
    }

    fn apply(&self, descriptor: &RawValue) -> serde_json::Result<Box<RawValue>> {
        let mut object: Object = serde_json::from_str(descriptor.get())?;
        let mut changed = false;
        if let Some(media_type) = &self.media_type
            && text(&object, "mediaType").as_ref() != Some(media_type)
        {
            object.set("mediaType", media_type)?;
            changed = true;
        }
        if let Some((digest, size)) = &self.content
            && text(&object, "digest") != Some(digest.to_string())
        {
            object.set("digest", digest)?;
            object.set("size", size)?;
            // These are of the old content.
            object.remove("data");
            object.remove("urls");
            changed = true;
        }
        changed |= self.annotate(&mut object)?;
        if changed { to_raw_value(&object) } else { Ok(descriptor.to_owned()) }
    }

    fn annotate(&self, object: &mut Object) -> serde_json::Result<bool> {
        if self.annotations.is_empty() {
            return Ok(false);
        }
        let old = object.get("annotations").filter(|value| value.get() != "null");
        let mut annotations: Object = match old {
            Some(value) => serde_json::from_str(value.get())?,
            None => Object(Vec::new()),
        };
        let mut changed = false;
        for (key, value) in &self.annotations {
            if text(&annotations, key) == *value {
                continue;
            }
            match value {
                Some(value) => annotations.set(key, value)?,
                None => annotations.remove(key),
            }
            changed = true;
        }
        if changed {
            object.set("annotations", &annotations)?;
        }
        Ok(changed)
    }
}

fn text(object: &Object, key: &str) -> Option<String> {
    serde_json::from_str(object.get(key)?.get()).ok()
}

/// A document that is being changed.
pub(crate) struct Edit<'a> {
    document: &'a Document,
    object: Object,
    media_type: String,
}

impl<'a> Edit<'a> {
    pub(crate) fn new(document: &'a Document) -> Result<Self, Error> {
        let object = serde_json::from_slice(&document.bytes).map_err(|error| failed(document, &error))?;
        Ok(Self { document, object, media_type: document.media_type.clone() })
    }

    /// Changes the document's own type.
    pub(crate) fn media_type(mut self, media_type: &str) -> Result<Self, Error> {
        if self.media_type != media_type {
            self.object.set("mediaType", &media_type).map_err(|error| failed(self.document, &error))?;
            media_type.clone_into(&mut self.media_type);
        }
        Ok(self)
    }

    /// Changes the descriptor under a key.
    pub(crate) fn descriptor(mut self, key: &str, target: &Target) -> Result<Self, Error> {
        if let Some(old) = self.object.get(key) {
            let new = target.apply(old).map_err(|error| failed(self.document, &error))?;
            self.object.set(key, &new).map_err(|error| failed(self.document, &error))?;
        }
        Ok(self)
    }

    /// Changes the list of descriptors under a key: `None` removes an element.
    pub(crate) fn descriptors(mut self, key: &str, targets: &[Option<Target>]) -> Result<Self, Error> {
        let Some(old) = self.object.get(key).filter(|value| value.get() != "null") else { return Ok(self) };
        let change = |old: &RawValue| -> serde_json::Result<Option<Box<RawValue>>> {
            let list: Vec<Box<RawValue>> = serde_json::from_str(old.get())?;
            let mut new = Vec::with_capacity(list.len());
            for (element, target) in list.iter().zip(targets) {
                if let Some(target) = target {
                    new.push(target.apply(element)?);
                }
            }
            let same = new.len() == list.len() && new.iter().zip(&list).all(|(new, old)| new.get() == old.get());
            if same { Ok(None) } else { to_raw_value(&new).map(Some) }
        };
        if let Some(new) = change(old).map_err(|error| failed(self.document, &error))? {
            self.object.set(key, &new).map_err(|error| failed(self.document, &error))?;
        }
        Ok(self)
    }

    /// Changes a configuration's list of DiffIDs.
    pub(crate) fn diff_ids(mut self, diff_ids: &[DiffId]) -> Result<Self, Error> {
        let change = |rootfs: &RawValue| -> serde_json::Result<Object> {
            let mut rootfs: Object = serde_json::from_str(rootfs.get())?;
            rootfs.set("diff_ids", &diff_ids)?;
            Ok(rootfs)
        };
        if let Some(old) = self.object.get("rootfs") {
            let new = change(old).map_err(|error| failed(self.document, &error))?;
            self.object.set("rootfs", &new).map_err(|error| failed(self.document, &error))?;
        }
        Ok(self)
    }

    /// Returns the new document, or the old one where nothing was changed.
    pub(crate) fn finish(self) -> Result<Document, Error> {
        let old: Object =
            serde_json::from_slice(&self.document.bytes).map_err(|error| failed(self.document, &error))?;
        let same = self.media_type == self.document.media_type
            && old.0.len() == self.object.0.len()
            && old.0.iter().zip(&self.object.0).all(|(old, new)| old.0 == new.0 && old.1.get() == new.1.get());
        if same {
            return Ok(self.document.clone());
        }
        let bytes = serde_json::to_vec(&self.object).map_err(|error| failed(self.document, &error))?;
        Ok(Document::new(&self.media_type, bytes.into())?)
    }
}

fn failed(document: &Document, error: &serde_json::Error) -> Error {
    Error::Document { what: document.digest.to_string(), detail: format!("cannot be changed: {error}") }
}

/// Returns OCI's name for one of Docker's types, and any other as it is.
pub(crate) fn oci_type(name: &str) -> String {
    match name {
        media_type::DOCKER_INDEX => media_type::OCI_INDEX.to_owned(),
        media_type::DOCKER_MANIFEST => media_type::OCI_MANIFEST.to_owned(),
        media_type::DOCKER_CONFIG => media_type::OCI_CONFIG.to_owned(),
        other => match media_type::LayerType::parse(other) {
            Some(layer) => media_type::LayerType { family: media_type::Family::Oci, ..layer }.as_str().to_owned(),
            None => other.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(text: &str) -> Document {
        Document {
            media_type: media_type::OCI_MANIFEST.to_owned(),
            digest: Digest::sha256_of(text.as_bytes()),
            bytes: text.to_owned().into(),
        }
    }

    fn shown(document: &Document) -> &str {
        std::str::from_utf8(&document.bytes).unwrap()
    }

    #[test]
    fn only_what_is_changed_changes() {
        let digest = Digest::sha256_of(b"new");
        let old = document(concat!(
            r#"{ "schemaVersion": 2, "x": [1.50, 1e400, "\u00e4"], "config": {"digest":"sha256:aa","size":1,"y":1.0},"#,
            r#" "layers": [ {"size":1,"digest":"sha256:bb","data":"eA==","annotations":{"k":"v","old":"x"}},"#,
            r#" {"digest": "sha256:cc"} ] }"#
        ));
        let target = Target {
            media_type: Some("m".into()),
            content: Some((digest, 7)),
            annotations: vec![("new".into(), Some("n".into())), ("old".into(), None)],
        };
        let new = Edit::new(&old)
            .unwrap()
            .descriptors("layers", &[Some(target), Some(Target::default())])
            .unwrap()
            .finish()
            .unwrap();
        let want = format!(
            concat!(
                r#"{{"schemaVersion":2,"x":[1.50, 1e400, "\u00e4"],"config":{{"digest":"sha256:aa","size":1,"y":1.0}},"#,
                r#""layers":[{{"size":7,"digest":"{}","annotations":{{"k":"v","new":"n"}},"mediaType":"m"}},"#,
                r#"{{"digest": "sha256:cc"}}]}}"#
            ),
            digest
        );
        assert_eq!(shown(&new), want);
    }

    #[test]
    fn nothing_changed_is_the_same_document() {
        let digest = Digest::sha256_of(b"same");
        let old = document(&format!(
            r#"{{ "config" : {{"mediaType":"c", "digest":"{digest}","size":4,"annotations":{{"a":"b"}}}}, "layers":[ ] }}"#
        ));
        let target = Target {
            media_type: Some("c".into()),
            content: Some((digest, 4)),
            annotations: vec![("a".into(), Some("b".into())), ("z".into(), None)],
        };
        let new = Edit::new(&old)
            .unwrap()
            .media_type(media_type::OCI_MANIFEST)
            .unwrap()
            .descriptor("config", &target)
            .unwrap()
            .descriptors("layers", &[])
            .unwrap()
            .descriptor("subject", &target)
            .unwrap()
            .finish()
            .unwrap();
        assert_eq!(new, old);
    }

    #[test]
    fn diff_ids_are_replaced_in_their_place() {
        let id = DiffId(Digest::sha256_of(b"x"));
        let config = Document {
            media_type: media_type::OCI_CONFIG.to_owned(),
            ..document(r#"{"os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:aa"]},"history":[{"x":1}]}"#)
        };
        let new = Edit::new(&config).unwrap().diff_ids(&[id]).unwrap().finish().unwrap();
        let want =
            format!(r#"{{"os":"linux","rootfs":{{"type":"layers","diff_ids":["{}"]}},"history":[{{"x":1}}]}}"#, id.0);
        assert_eq!(shown(&new), want);
        assert_eq!(new.media_type, media_type::OCI_CONFIG);
    }

    #[test]
    fn docker_types_have_an_oci_name() {
        for (docker, oci) in [
            (media_type::DOCKER_INDEX, media_type::OCI_INDEX),
            (media_type::DOCKER_LAYER_GZIP, media_type::OCI_LAYER_GZIP),
            (
                "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            ),
            (media_type::OCI_LAYER_ZSTD, media_type::OCI_LAYER_ZSTD),
            ("text/plain", "text/plain"),
        ] {
            assert_eq!(oci_type(docker), oci);
        }
    }
}

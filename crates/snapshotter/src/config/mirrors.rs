//! `[[resolver.host."REGISTRY".mirrors]]`: checked here, so that what is wrong is said with its line when the daemon starts,
//! and read again by who asks registries (`loris_oci::registry`).

use toml::{Spanned, de::DeValue};

use super::{
    joined,
    settings::Mirror,
    value::{Kind, Value, kind},
};

/// What was found, with the places of what is not as it should be.
#[derive(Default)]
pub(super) struct Read {
    pub(super) mirrors: Vec<Mirror>,
    pub(super) wrong: Vec<(usize, String)>,
    pub(super) unknown: Vec<(usize, String)>,
}

/// Reads what is said of a registry.
pub(super) fn read(registry: &str, host: &Spanned<DeValue<'_>>) -> Read {
    let mut read = Read::default();
    let name = joined(super::MIRRORS, registry);
    let DeValue::Table(host) = host.get_ref() else {
        read.wrong(host, format!("{name}: expected a table, found {}", kind(host.get_ref())));
        return read;
    };
    for (key, value) in host {
        if key.get_ref() != "mirrors" {
            read.unknown.push((key.span().start, format!("there is no key {}", joined(&name, key.get_ref()))));
            continue;
        }
        let name = format!("{name}.mirrors");
        match value.get_ref() {
            DeValue::Array(mirrors) => mirrors.iter().for_each(|mirror| read.mirror(&name, mirror)),
            other => read.wrong(value, format!("{name}: expected a list of tables, found {}", kind(other))),
        }
    }
    read
}

impl Read {
    fn wrong(&mut self, value: &Spanned<DeValue<'_>>, text: String) {
        self.wrong.push((value.span().start, text));
    }

    fn mirror(&mut self, name: &str, written: &Spanned<DeValue<'_>>) {
        let DeValue::Table(table) = written.get_ref() else {
            return self.wrong(written, format!("{name}: expected a table, found {}", kind(written.get_ref())));
        };
        let mut mirror = Mirror::default();
        for (key, value) in table {
            let name = joined(name, key.get_ref());
            let wanted = match key.get_ref().as_ref() {
                "host" => Kind::Path,
                "insecure" => Kind::Boolean,
                "request_timeout_sec" => Kind::Number(i64::MIN, i64::MAX),
                "header" => {
                    self.headers(&name, value, &mut mirror);
                    continue;
                }
                _ => {
                    self.unknown.push((key.span().start, format!("there is no key {name}")));
                    continue;
                }
            };
            match wanted.of_file(value.get_ref()) {
                Ok(Value::Text(host)) => mirror.host = host,
                Ok(Value::Boolean(insecure)) => mirror.insecure = insecure,
                Ok(Value::Number(seconds)) => mirror.request_timeout_sec = seconds,
                Ok(Value::Texts(_)) => {}
                Err(detail) => self.wrong(value, format!("{name}: {detail}")),
            }
        }
        if mirror.host.is_empty() {
            self.wrong(written, format!("{name}: a mirror must have a host"));
        }
        self.mirrors.push(mirror);
    }

    /// A header has one value, or several.
    fn headers(&mut self, name: &str, value: &Spanned<DeValue<'_>>, mirror: &mut Mirror) {
        let DeValue::Table(headers) = value.get_ref() else {
            return self.wrong(value, format!("{name}: expected a table, found {}", kind(value.get_ref())));
        };
        for (header, value) in headers {
            let is_text = value.get_ref().is_str();
            if !is_text && let Err(detail) = Kind::Texts.of_file(value.get_ref()) {
                self.wrong(value, format!("{}: {detail}", joined(name, header.get_ref())));
            }
            mirror.headers.push(header.get_ref().to_string());
        }
    }
}

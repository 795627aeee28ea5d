//! What is in force, as a file that says the same, with where each value came from behind it.

use std::fmt::Write as _;

use toml_edit::Value as Written;

use super::{KEYS, Origin, Settled};

/// Where comments begin, unless a line is longer.
const COLUMN: usize = 56;

impl Settled {
    /// Returns the text.
    #[must_use]
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        let mut table = "";
        for key in KEYS {
            let (of, name) = key.name.split_once('.').unwrap_or(("", key.name));
            if of != table {
                table = of;
                let _ = write!(text, "\n[{table}]\n");
            }
            let origin = self.place(key.name);
            let line = match key.value(&self.settings) {
                Some(value) => format!("{name} = {value}"),
                // TOML has no word for nothing.
                None => format!("# {name} is not set"),
            };
            let _ = writeln!(text, "{line:COLUMN$} # {origin}");
        }
        self.print_mirrors(&mut text);
        text
    }

    fn print_mirrors(&self, text: &mut String) {
        for (registry, mirrors) in &self.settings.registries.mirrors {
            let line = self.mirror_lines.get(registry).copied().unwrap_or_default();
            let origin = self.said(&Origin::File { line, named: None });
            for mirror in mirrors {
                let registry = Written::from(registry.as_str()).to_string();
                let header = format!("[[resolver.host.{registry}.mirrors]]");
                let _ = writeln!(text, "\n{header:COLUMN$} # {origin}");
                let _ = writeln!(text, "host = {}", Written::from(mirror.host.as_str()));
                let _ = writeln!(text, "insecure = {}", mirror.insecure);
                let _ = writeln!(text, "request_timeout_sec = {}", mirror.request_timeout_sec);
                for header in &mirror.headers {
                    let _ = writeln!(text, "# header {header:?} is not shown");
                }
            }
        }
    }
}

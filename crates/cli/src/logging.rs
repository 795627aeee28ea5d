//! What is logged on standard error, and how; both can change while the process runs.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    io::IsTerminal as _,
    sync::{
        OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::{Format, Full, Writer},
        time::{FormatTime as _, SystemTime},
    },
    registry::LookupSpan,
};

/// Whether a line is a JSON object.
static JSON: AtomicBool = AtomicBool::new(false);
/// Replaces the filter.
static FILTER: OnceLock<Box<dyn Fn(EnvFilter) + Send + Sync>> = OnceLock::new();

/// Checks what is to be logged. A word alone may name a part of this program, but not of any other: it is a level that
/// was spelled wrongly.
pub(crate) fn filter(text: &str) -> Result<String, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    EnvFilter::try_new(text).map_err(|error| error.to_string())?;
    let is_known = |word: &str| {
        word.is_empty() || word.contains(['=', '[']) || word.starts_with("loris") || {
            let word = word.to_ascii_lowercase();
            LEVELS.contains(&&*word) || word.parse::<u8>().is_ok()
        }
    };
    match text.split(',').map(str::trim).find(|word| !is_known(word)) {
        Some(word) => Err(format!("{word:?} is none of {}", LEVELS.join(", "))),
        None => Ok(text.to_owned()),
    }
}

/// Begins, with a filter that was checked.
pub(crate) fn start(filter: &str) {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let builder = tracing_subscriber::fmt()
        .with_env_filter(parsed(filter))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && !no_color)
        .event_format(Lines { text: Format::default().without_time() })
        .with_filter_reloading();
    let handle = builder.reload_handle();
    let _ = FILTER.set(Box::new(move |filter| drop(handle.reload(filter))));
    builder.init();
}

/// Logs something else from now on, by a filter that was checked, and in another form.
pub(crate) fn change(filter: &str, json: bool) {
    JSON.store(json, Ordering::Relaxed);
    if let Some(change) = FILTER.get() {
        change(parsed(filter));
    }
}

fn parsed(filter: &str) -> EnvFilter {
    EnvFilter::try_new(filter).unwrap_or_else(|_| EnvFilter::new("warn"))
}

/// Lines of text, or JSON objects.
struct Lines {
    text: Format<Full, ()>,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        if !JSON.load(Ordering::Relaxed) {
            return self.text.format_event(context, writer, event);
        }
        let mut time = String::new();
        SystemTime.format_time(&mut Writer::new(&mut time))?;
        let metadata = event.metadata();
        let mut members = Members::default();
        event.record(&mut members);
        // In this order, and what the event says behind it.
        let head = [("time", &*time), ("level", &metadata.level().to_string()), ("target", metadata.target())]
            .map(|(name, text)| format!("{}:{}", quoted(name), quoted(text)));
        writeln!(writer, "{{{}{}}}", head.join(","), members.text())
    }
}

/// What an event says, as members of a JSON object.
#[derive(Default)]
struct Members(BTreeMap<&'static str, serde_json::Value>);

impl Members {
    fn text(&self) -> String {
        let mut text = String::new();
        for (name, value) in &self.0 {
            // A name that is taken gets another one.
            let taken = matches!(*name, "time" | "level" | "target");
            let _ = write!(text, ",{}:{value}", quoted(&format!("{name}{}", if taken { "_" } else { "" })));
        }
        text
    }
}

impl Visit for Members {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}").into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.0.insert(field.name(), value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.0.insert(field.name(), value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.0.insert(field.name(), value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.0.insert(field.name(), value.into());
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_of_logs_are_checked() {
        for good in ["warn", "DEBUG", "off", "3", "loris_lazy=debug", "info,hyper=trace", "loris_oci"] {
            assert!(filter(good).is_ok(), "{good}");
        }
        for bad in ["bogus", "warn,bogus", "verbose", "loris=loud"] {
            assert!(filter(bad).is_err(), "{bad}");
        }
    }
}

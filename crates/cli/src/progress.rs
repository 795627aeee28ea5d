//! Progress on standard error: bars on a terminal, a line when a blob begins and ends elsewhere, nothing with `--quiet`.

use std::{
    collections::HashMap,
    io::IsTerminal as _,
    sync::{Arc, Mutex, PoisonError},
};

use futures_util::StreamExt as _;
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use loris_convert::progress::{Action, Outcome, Progress};
use loris_format::digest::Digest;
use loris_oci::{BlobStream, Descriptor};
use loris_snapshotter::containerd::whole::News;

use crate::{
    Global,
    table::{bytes, printable, short_digest},
};

/// The progress of one verb.
pub(crate) struct Bars {
    style: Style,
    running: Mutex<HashMap<Digest, ProgressBar>>,
}

enum Style {
    None,
    Lines,
    Bars(MultiProgress),
}

impl Bars {
    pub(crate) fn new(global: &Global) -> Self {
        let style = if global.quiet {
            Style::None
        } else if std::io::stderr().is_terminal() {
            Style::Bars(MultiProgress::new())
        } else {
            Style::Lines
        };
        Self { style, running: Mutex::default() }
    }

    /// Returns a bar for all of an image; on a terminal only.
    pub(crate) fn whole(&self, total: u64) -> ProgressBar {
        let Style::Bars(bars) = &self.style else { return ProgressBar::hidden() };
        let bar = bars.add(ProgressBar::new(total));
        let template = "[{bar:40}] {bytes:>10}/{total_bytes:10} {binary_bytes_per_sec}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar
    }

    /// Shows that work on a blob begins.
    fn begin(&self, digest: &Digest, what: &str, total: u64) {
        match &self.style {
            Style::None => {}
            Style::Lines => eprintln!("{what} {} ({})", short_digest(&digest.to_string()), bytes(total)),
            Style::Bars(bars) => {
                let bar = bars.add(ProgressBar::new(total));
                let template = "{prefix:12} {msg:10} [{bar:30}] {bytes:>10}/{total_bytes:10} {binary_bytes_per_sec}";
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style.progress_chars("=> "));
                }
                bar.set_prefix(short_digest(&digest.to_string()));
                bar.set_message(what.to_owned());
                self.lock().insert(*digest, bar);
            }
        }
    }

    /// Shows that so many more bytes of it are done.
    fn advance(&self, digest: &Digest, count: u64) {
        if let Style::Bars(_) = &self.style
            && let Some(bar) = self.lock().get(digest)
        {
            bar.inc(count);
        }
    }

    /// Shows that work on a blob has ended, and how.
    fn end(&self, digest: &Digest, outcome: &str) {
        match &self.style {
            Style::None => {}
            Style::Lines => eprintln!("{outcome} {}", short_digest(&digest.to_string())),
            Style::Bars(_) => {
                if let Some(bar) = self.lock().remove(digest) {
                    bar.finish_with_message(outcome.to_owned());
                }
            }
        }
    }

    /// Shows a blob's bytes as they pass.
    pub(crate) fn watch(self: Arc<Self>, blob: &Descriptor, stream: BlobStream) -> BlobStream {
        let digest = blob.digest;
        self.begin(&digest, "pulling", blob.size);
        Box::pin(stream.inspect(move |chunk| {
            if let Ok(chunk) = chunk {
                self.advance(&digest, chunk.len() as u64);
            }
        }))
    }

    /// Takes the bars off the terminal.
    pub(crate) fn finish(&self) {
        for (_, bar) in self.lock().drain() {
            bar.finish_and_clear();
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, ProgressBar>> {
        // A panic elsewhere leaves nothing half-done in a table of bars.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl News for Bars {
    fn began(&self, layer: &Descriptor) {
        self.begin(&layer.digest, "fetching", layer.size);
    }

    fn advanced(&self, layer: &Descriptor, count: u64) {
        self.advance(&layer.digest, count);
    }

    fn ended(&self, layer: &Descriptor) {
        self.end(&layer.digest, "done");
    }
}

impl Progress for Bars {
    fn began(&self, action: Action, blob: &Digest, total: u64) {
        let what = match action {
            Action::Convert => "converting",
            Action::Copy => "copying",
            Action::Send => "sending",
            Action::Verify => "verifying",
        };
        self.begin(blob, what, total);
    }

    fn advanced(&self, _: Action, blob: &Digest, count: u64) {
        self.advance(blob, count);
    }

    fn ended(&self, _: Action, blob: &Digest, outcome: Outcome) {
        self.end(blob, if outcome == Outcome::Done { "done" } else { "there already" });
    }

    fn warned(&self, warning: &str) {
        let warning = format!("loris: {}", printable(warning.as_bytes()));
        match &self.style {
            Style::None => {}
            Style::Lines => eprintln!("{warning}"),
            // A terminal that can't be written to shows no bars either.
            Style::Bars(bars) => drop(bars.println(warning)),
        }
    }
}

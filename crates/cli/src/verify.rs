//! `verify`: whether an image is what its digests, tables of contents and annotations say.

use anyhow::Context as _;
use clap::Args;
use loris_convert::verify::{Severity, Verified, VerifyOptions, verify_image};
use serde::Serialize;

use crate::{
    Global,
    access::{self, Selection},
    failure::{self, Outcome},
    progress::Bars,
    table::printable,
};

/// Check an image: digests, tables of contents, annotations.
#[derive(Args)]
pub(crate) struct VerifyArguments {
    /// The image
    image: String,
    #[command(flatten)]
    selection: Selection,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    name: &'a str,
    #[serde(flatten)]
    verified: &'a Verified,
}

impl VerifyArguments {
    pub(crate) async fn run(self, global: &Global) -> failure::Result {
        let source = global.access.source(&self.image).await?;
        let options = VerifyOptions { platforms: self.selection.platforms(), ..VerifyOptions::default() };
        let bars = Bars::new(global);
        let verified =
            verify_image(&*source, &options, &bars).await.with_context(|| access::doing("verifying", &self.image))?;
        bars.finish();
        let findings = &verified.problems;
        let faults = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
        if global.json {
            println!("{}", serde_json::to_string_pretty(&Report { name: &self.image, verified: &verified })?);
        } else {
            for finding in findings {
                let severity = if finding.severity == Severity::Error { "error" } else { "warning" };
                println!("{severity}: {}", printable(finding.to_string().as_bytes()));
            }
            if !global.quiet {
                match (faults, findings.len()) {
                    (0, 0) => eprintln!("{} is sound", self.image),
                    (0, warnings) => eprintln!("{} is sound, with {warnings} warning(s)", self.image),
                    (faults, _) => eprintln!("{}: {faults} error(s)", self.image),
                }
            }
        }
        Ok(if faults == 0 { Outcome::Done } else { Outcome::FoundFaults })
    }
}

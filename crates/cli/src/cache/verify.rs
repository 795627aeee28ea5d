//! `cache verify`.

use clap::Args;
use loris_format::limits::Limits;
use loris_lazy::{Checked, StoreError, StoredLayer};
use serde::Serialize;

use super::{Place, pick};
use crate::{
    Global,
    failure::{self, Outcome},
    table::{bytes, printable},
};

/// Hash what is there again; what is wrong will be fetched anew.
///
/// Ends with status 1 where something was wrong. A mount that is in use may have shown it.
#[derive(Args)]
pub(crate) struct VerifyArguments {
    /// Images or layers; all of them where none is given
    #[arg(value_name = "REF|DIGEST")]
    names: Vec<String>,
    #[command(flatten)]
    place: Place,
}

#[derive(Serialize)]
struct Report<'a> {
    layers: Vec<LayerReport<'a>>,
    faults: usize,
}

#[derive(Serialize)]
struct LayerReport<'a> {
    digest: &'a str,
    directory: String,
    in_use: bool,
    extents: u64,
    bytes: u64,
    without_digest: u64,
    faults: Vec<FaultReport>,
    /// Why it was not checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    unchecked: Option<String>,
}

#[derive(Serialize)]
struct FaultReport {
    path: String,
    offset: u64,
    length: u64,
    expected: String,
}

impl VerifyArguments {
    pub(super) fn run(self, global: &Global) -> failure::Result {
        let store = self.place.open()?;
        let layers = store.census()?;
        let mut picked: Vec<&StoredLayer> = if self.names.is_empty() { layers.iter().collect() } else { Vec::new() };
        for name in &self.names {
            picked.extend(pick(&layers, name)?);
        }
        picked.sort_by(|one, other| one.directory.cmp(&other.directory));
        picked.dedup();
        let limits = Limits::default();
        let mut reports = Vec::new();
        let mut failed = false;
        for layer in picked {
            let (checked, unchecked) = match store.verify(layer, &limits) {
                Ok(checked) => (checked, None),
                Err(error) => {
                    // What nobody has opened since is no fault; a disk that can't be read is.
                    failed |= !matches!(error, StoreError::NoTableOfContents { .. });
                    (Checked::default(), Some(error.to_string()))
                }
            };
            if !global.json {
                print!("{}", to_text(layer, &checked, unchecked.as_deref()));
            }
            reports.push(LayerReport::new(layer, checked, unchecked));
        }
        let faults = reports.iter().map(|report| report.faults.len()).sum();
        if global.json {
            println!("{}", serde_json::to_string_pretty(&Report { layers: reports, faults })?);
        } else if !global.quiet {
            let (extents, sum) =
                reports.iter().fold((0, 0), |(extents, sum), layer| (extents + layer.extents, sum + layer.bytes));
            eprintln!("{} layers, {extents} extents, {}: {faults} wrong", reports.len(), bytes(sum));
        }
        Ok(if faults == 0 && !failed { Outcome::Done } else { Outcome::FoundFaults })
    }
}

impl<'a> LayerReport<'a> {
    fn new(layer: &'a StoredLayer, checked: Checked, unchecked: Option<String>) -> Self {
        let Checked { extents, bytes, without_digest, faults } = checked;
        let fault = |fault: loris_lazy::Fault| FaultReport {
            path: fault.path,
            offset: fault.offset,
            length: fault.length,
            expected: fault.expected.to_string(),
        };
        Self {
            digest: &layer.blob,
            directory: layer.directory.display().to_string(),
            in_use: layer.in_use,
            extents,
            bytes,
            without_digest,
            faults: faults.into_iter().map(fault).collect(),
            unchecked,
        }
    }
}

fn to_text(layer: &StoredLayer, checked: &Checked, unchecked: Option<&str>) -> String {
    let mut text = String::new();
    for fault in &checked.faults {
        let in_use = if layer.in_use { ", and a process that has it open may have shown it" } else { "" };
        let (path, offset, length) = (printable(fault.path.as_bytes()), fault.offset, fault.length);
        text += &format!(
            "error: layer {}: {path} at offset {offset}: {length} bytes were wrong; they will be fetched again{in_use}\n",
            layer.blob
        );
    }
    if let Some(reason) = unchecked {
        text += &format!("warning: layer {}: not checked: {}\n", layer.blob, printable(reason.as_bytes()));
    }
    text
}

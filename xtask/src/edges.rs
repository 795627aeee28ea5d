//! The allowed edges between our crates. A new edge is a decision: it needs a line here, and a word in ARCHITECTURE.md.

use anyhow::{Context, Result, bail};

use crate::run::cargo;

/// Each crate and those of ours that it may depend on.
const ALLOWED: &[(&str, &[&str])] = &[
    ("loris-format", &[]),
    ("loris-oci", &["loris-format"]),
    ("loris-lazy", &["loris-oci", "loris-format"]),
    ("loris-mount", &["loris-lazy", "loris-format"]),
    ("loris-container", &["loris-oci"]),
    ("loris-convert", &["loris-oci", "loris-format"]),
    ("loris-serve", &["loris-oci", "loris-format"]),
    ("loris-snapshotter", &["loris-mount", "loris-lazy", "loris-oci", "loris-format"]),
    (
        "loris",
        &[
            "loris-snapshotter",
            "loris-serve",
            "loris-container",
            "loris-convert",
            "loris-mount",
            "loris-lazy",
            "loris-oci",
            "loris-format",
        ],
    ),
    ("loris-testkit", &[]),
    ("loris-benches", &["loris-format"]),
    ("xtask", &[]),
];

/// Fails where a crate of ours depends on another that it must not know. Dependencies for tests are free, but
/// `loris-testkit` is for tests only.
pub fn check() -> Result<()> {
    let output = cargo().args(["metadata", "--format-version", "1", "--no-deps"]).output()?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let mut wrong = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().unwrap_or_default();
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            wrong.push(format!("{name} is not in xtask/src/edges.rs"));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let ours = ALLOWED.iter().any(|(known, _)| *known == to);
            if ours && dependency["kind"].as_str() != Some("dev") && !allowed.contains(&to) {
                wrong.push(format!("{name} must not depend on {to}"));
            }
        }
    }
    if !wrong.is_empty() {
        bail!("edges between crates:\n  {}", wrong.join("\n  "));
    }
    eprintln!("edges between crates: as allowed");
    Ok(())
}

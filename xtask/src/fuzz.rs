//! `cargo xtask fuzz`: every parser against libFuzzer, from the corpus in `fuzz/corpus`.

use std::{path::Path, process::Command};

use anyhow::{Context, Result, bail};

use crate::run::{cargo, run, workspace};

/// Runs targets for some seconds each; stops at the first crash and says where its input is.
pub fn fuzz(seconds: u64, targets: &[String]) -> Result<()> {
    let folder = workspace().join("fuzz");
    let all = all_targets(&folder)?;
    let targets = if targets.is_empty() { all.as_slice() } else { targets };
    if let Some(unknown) = targets.iter().find(|target| !all.contains(target)) {
        bail!("no fuzz target {unknown}; there are: {}", all.join(", "));
    }
    if !cargo().args(["fuzz", "--version"]).output()?.status.success() {
        run(cargo().args(["install", "--locked", "cargo-fuzz"]))?;
    }
    for target in targets {
        // Sanitizers are a nightly feature; this lets the one tested toolchain build them.
        run(Command::new("cargo")
            .args(["fuzz", "run", target, "--", "-rss_limit_mb=2048", "-timeout=20"])
            .arg(format!("-max_total_time={seconds}"))
            .env("RUSTC_BOOTSTRAP", "1")
            .current_dir(&folder))
        .with_context(|| format!("fuzz target {target}; the input that broke it is in fuzz/artifacts/{target}"))?;
    }
    Ok(())
}

fn all_targets(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder.join("fuzz_targets"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "rs")
            && let Some(name) = path.file_stem()
        {
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

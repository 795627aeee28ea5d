//! `cargo xtask lint`: everything that can be said about the code without running it.

use anyhow::{Context, Result, bail};

use crate::{
    edges, protos,
    run::{cargo, run, workspace},
};

/// Checks format, clippy, documentation, edges, generated code, spelling rules of the source, and licences where cargo-deny is there.
pub fn lint() -> Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    edges::check()?;
    protos::listed()?;
    sources()?;
    run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    run(cargo().args(["doc", "--quiet", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    let deny = cargo().args(["deny", "--version"]).output();
    if deny.is_ok_and(|output| output.status.success()) {
        run(cargo().args(["deny", "--offline", "check", "bans", "licenses", "sources"]))?;
    } else {
        eprintln!("skipped: licences and bans of dependencies: cargo-deny is not installed (cargo install cargo-deny)");
    }
    Ok(())
}

/// Fails on source files that are not ASCII, or are longer than a file should be.
fn sources() -> Result<()> {
    let output = std::process::Command::new("git").args(["ls-files", "*.rs"]).current_dir(workspace()).output()?;
    let mut wrong = Vec::new();
    for file in String::from_utf8(output.stdout)?.lines() {
        let path = workspace().join(file);
        let text = std::fs::read_to_string(&path).with_context(|| file.to_owned())?;
        // Trees and arrows are drawn in a few module documents; code itself stays ASCII.
        let code = text.lines().enumerate().find(|(_, line)| !line.trim_start().starts_with("//") && !line.is_ascii());
        if let Some((number, _)) = code {
            wrong.push(format!("{file}:{}: not ASCII", number + 1));
        }
        // What is generated is nobody's to read.
        let is_generated = text.starts_with("// This file is @generated");
        if text.lines().count() > LONGEST_FILE && !is_generated {
            wrong.push(format!("{file}: more than {LONGEST_FILE} lines"));
        }
    }
    if !wrong.is_empty() {
        bail!("source files:\n  {}", wrong.join("\n  "));
    }
    Ok(())
}

/// A file beyond this is two files.
const LONGEST_FILE: usize = 800;

//! `cargo xtask test`: peers, then every test, then one line that counts them.
//!
//! A test that can't run here (no root, no such peer) says so in the file that `LORIS_SKIPPED` names, and returns; such
//! tests are counted as skipped, not as passed, and listed with what they lack.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader},
    process::Stdio,
};

use anyhow::{Context, Result, bail};

use crate::{
    peers,
    run::{cargo, run},
};

/// Runs all tests of the workspace and prints `N passed, N failed, N skipped`.
pub fn test(no_install: bool, arguments: &[String]) -> Result<()> {
    if !no_install {
        peers::install()?;
    }
    // Tests of the command line and of real peers run this binary.
    run(cargo().args(["build", "--quiet", "--package", "loris"]))?;
    let skipped_file = tempfile::NamedTempFile::new()?;
    let mut child = cargo()
        .args(["test", "--workspace", "--no-fail-fast"])
        .args(arguments)
        .env("LORIS_SKIPPED", skipped_file.path())
        .stdout(Stdio::piped())
        .spawn()
        .context("can't start cargo test")?;
    let output = child.stdout.take().context("cargo test has no output")?;
    let mut counts = Counts::default();
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!("{line}");
        counts.take(&line);
    }
    let status = child.wait()?;
    let skipped: BTreeSet<String> = std::fs::read_to_string(skipped_file.path())?.lines().map(str::to_owned).collect();
    for line in &skipped {
        println!("skipped: {line}");
    }
    let skipped_here = skipped.len();
    println!(
        "{} passed, {} failed, {} skipped",
        counts.passed.saturating_sub(skipped_here),
        counts.failed,
        counts.ignored + skipped_here
    );
    if !status.success() || counts.failed > 0 {
        bail!("tests failed");
    }
    if counts.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

#[derive(Default)]
struct Counts {
    passed: usize,
    failed: usize,
    ignored: usize,
}

impl Counts {
    /// Takes a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; ...`.
    fn take(&mut self, line: &str) {
        let Some(rest) = line.trim_start().strip_prefix("test result: ") else { return };
        for part in rest.split([';', '.']) {
            let mut words = part.split_whitespace();
            let (Some(number), Some(word)) = (words.next(), words.next()) else { continue };
            let Ok(number) = number.parse::<usize>() else { continue };
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_add_up_over_binaries() {
        let mut counts = Counts::default();
        counts.take("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s");
        counts.take("test result: FAILED. 2 passed; 5 failed; 0 ignored; 0 measured; 7 filtered out");
        counts.take("running 5 tests");
        assert_eq!((counts.passed, counts.failed, counts.ignored), (5, 5, 1));
    }
}

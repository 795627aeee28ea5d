//! `cargo xtask protos`: the code of the protocols in `crates/snapshotter/proto`, and whether it is up to date.
//!
//! The generator is a package of its own (`protos/`), which takes a minute or two to build. So the folder of generated code
//! has a list of what it was made of and of what was made, each with git's hash of it; `cargo xtask lint` compares that,
//! which costs nothing, and `cargo xtask protos --check` generates again.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::run::{cargo, run, target_folder, workspace};

/// The protocols.
const SOURCES: &str = "crates/snapshotter/proto";
/// The generated code.
const GENERATED: &str = "crates/snapshotter/src/proto";
/// What decides about the generated code beside the protocols.
const GENERATOR: [&str; 2] = ["protos/Cargo.lock", "protos/src/main.rs"];
/// The list, in the folder of the generated code.
const LIST: &str = "SOURCES";

/// Generates the code; with `check` elsewhere, and fails where it differs.
pub fn protos(check: bool) -> Result<()> {
    if !check {
        generate(&workspace().join(GENERATED))?;
        return Ok(fs::write(workspace().join(GENERATED).join(LIST), list()?)?);
    }
    let folder = tempfile::tempdir()?;
    generate(folder.path())?;
    let names = |folder: &Path| -> Result<Vec<_>> {
        Ok(files(folder)?.iter().filter_map(|file| file.file_name()).map(|name| name.to_owned()).collect())
    };
    let kept = workspace().join(GENERATED);
    let made = names(folder.path())?;
    let mut expected = names(&kept)?;
    expected.retain(|name| name != LIST);
    let differs = made != expected
        || made.iter().any(|name| fs::read(folder.path().join(name)).ok() != fs::read(kept.join(name)).ok());
    if differs {
        bail!("{GENERATED} is not what {SOURCES} leads to: run `cargo xtask protos`");
    }
    listed()
}

/// Fails where the list is not of what is there.
pub fn listed() -> Result<()> {
    let kept = fs::read_to_string(workspace().join(GENERATED).join(LIST)).context(LIST)?;
    if kept != list()? {
        bail!("{SOURCES} or {GENERATED} has changed since the code was generated: run `cargo xtask protos`");
    }
    eprintln!("generated code: as listed");
    Ok(())
}

fn generate(to: &Path) -> Result<()> {
    let manifest = workspace().join("protos/Cargo.toml");
    // Beside what the workspace builds, whose lock it would wait for.
    let target = target_folder().join("protos");
    run(cargo()
        .args(["run", "--quiet", "--locked", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(target)
        .args(["--", SOURCES])
        .arg(to))
}

/// One line for each file: git's hash, a space, the path.
fn list() -> Result<String> {
    let mut paths: Vec<PathBuf> = GENERATOR.iter().map(PathBuf::from).collect();
    for folder in [SOURCES, GENERATED] {
        let names = files(&workspace().join(folder))?;
        paths.extend(names.iter().filter_map(|file| file.file_name()).map(|name| Path::new(folder).join(name)));
    }
    paths.retain(|path| !path.ends_with(LIST));
    let output = Command::new("git")
        .args(["hash-object", "--no-filters", "--"])
        .args(&paths)
        .current_dir(workspace())
        .output()?;
    let hashes = String::from_utf8(output.stdout)?;
    if !output.status.success() || hashes.lines().count() != paths.len() {
        bail!("git hash-object: {}", String::from_utf8_lossy(&output.stderr));
    }
    let mut list = String::new();
    for (hash, path) in hashes.lines().zip(paths) {
        writeln!(list, "{hash} {}", path.display())?;
    }
    Ok(list)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    /// Also in `cargo xtask test`, for who does not run `lint`.
    #[test]
    fn the_generated_code_is_of_these_protocols() {
        super::listed().unwrap();
    }
}

//! Running programs, and the demo, which is little more than that.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, bail};

/// Prints what is about to be run, runs it, and fails where it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let shown = shown(command);
    eprintln!("+ {shown}");
    let status = command.status().with_context(|| format!("can't start {shown}"))?;
    if !status.success() {
        bail!("{shown}: {status}");
    }
    Ok(())
}

/// Returns the cargo that runs us, in the folder of the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    command
}

/// Returns the workspace's folder.
pub fn workspace() -> PathBuf {
    let mut folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    folder.pop();
    folder
}

/// Returns the folder that cargo builds into.
pub fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Builds Loris with optimisation and runs its demo.
pub fn demo(arguments: &[String]) -> Result<()> {
    crate::peers::install_for_demo();
    run(cargo().args(["build", "--quiet", "--release", "--package", "loris"]))?;
    run(Command::new(target_folder().join("release/loris")).arg("demo").args(arguments))
}

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}

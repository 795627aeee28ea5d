//! The last steps of a container's first process: finding the program and becoming it.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    io::Write,
    os::unix::{ffi::OsStrExt, fs::PermissionsExt, process::CommandExt},
    path::PathBuf,
    process::{Command, exit},
};

use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use oci_spec::runtime::Spec;
use rustix::process::{Signal, set_parent_process_death_signal};

use crate::runtime::{NOT_EXECUTABLE, NOT_FOUND};

/// How the message of a failure tells that the program isn't there.
pub const NOT_FOUND_WORDS: &str = "program not found in the container";
/// How it tells that the program can't be executed.
pub const NOT_EXECUTABLE_WORDS: &str = "program of the container can't be executed";

/// Becomes the program of a specification.
#[derive(Clone)]
pub struct Program;

impl Executor for Program {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        // Only an executable that gives privileges would take this back, and none can be gained.
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(|errno| ExecutorError::Other(errno.to_string()))?;
        let args = args(spec);
        let Some((name, rest)) = args.split_first() else { return Err(ExecutorError::InvalidArg) };
        let program = find(spec, name).map_err(ExecutorError::Other)?;
        let error = Command::new(program).arg0(name).args(rest).exec();
        // The runtime believes by now that the container runs, so nobody but us can tell.
        let code = match error.kind() {
            // The program is there, so what isn't is its interpreter.
            io::ErrorKind::NotFound => NOT_FOUND,
            _ => NOT_EXECUTABLE,
        };
        let _ = writeln!(io::stderr(), "execute {name}: {error}");
        exit(i32::from(code));
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let args = args(spec);
        let Some(name) = args.first() else {
            return Err(ExecutorValidationError::ArgValidationError("there is no program".to_owned()));
        };
        find(spec, name).map(|_| ()).map_err(ExecutorValidationError::ArgValidationError)
    }
}

fn args(spec: &Spec) -> Vec<String> {
    spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default()
}

/// Finds a program as a shell does: a name with a slash is a path, another is looked for in the container's `PATH`.
fn find(spec: &Spec, name: &str) -> Result<PathBuf, String> {
    let env = spec.process().as_ref().and_then(|process| process.env().as_ref());
    let path = env.into_iter().flatten().find_map(|variable| variable.strip_prefix("PATH="));
    let candidates: Vec<PathBuf> = match name.contains('/') {
        true => vec![PathBuf::from(name)],
        false => std::env::split_paths(OsStr::from_bytes(path.unwrap_or_default().as_bytes()))
            .filter(|directory| !directory.as_os_str().is_empty())
            .map(|directory| directory.join(OsString::from(name)))
            .collect(),
    };
    let mut unusable = None;
    for candidate in candidates {
        match fs::metadata(&candidate) {
            Ok(found) if found.is_file() && found.permissions().mode() & 0o111 != 0 => return Ok(candidate),
            Ok(_) => unusable = Some(candidate),
            Err(_) => {}
        }
    }
    match unusable {
        Some(path) => Err(format!("{NOT_EXECUTABLE_WORDS}: {} is no executable file", path.display())),
        None => Err(format!("{NOT_FOUND_WORDS}: {name:?}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn programs() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        fs::create_dir(at("bin")).unwrap();
        fs::create_dir(at("bin2")).unwrap();
        for (name, mode) in [("bin/tool", 0o644), ("bin2/tool", 0o755), ("bin/text", 0o644)] {
            fs::write(at(name), "").unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "process": { "user": {}, "cwd": "/", "env": [format!("PATH={}:{}", at("bin"), at("bin2"))] },
        }))
        .unwrap();
        assert_eq!(find(&spec, "tool").unwrap(), PathBuf::from(at("bin2/tool")));
        assert_eq!(find(&spec, &at("bin2/tool")).unwrap(), PathBuf::from(at("bin2/tool")));
        assert!(find(&spec, "text").unwrap_err().contains(NOT_EXECUTABLE_WORDS));
        assert!(find(&spec, &at("bin")).unwrap_err().contains(NOT_EXECUTABLE_WORDS));
        assert!(find(&spec, "none").unwrap_err().contains(NOT_FOUND_WORDS));
        assert!(find(&spec, &at("bin/none")).unwrap_err().contains(NOT_FOUND_WORDS));
    }
}

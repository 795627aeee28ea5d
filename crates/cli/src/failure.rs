//! How a verb ends: exit statuses, and errors as a person reads them.
//!
//! | status | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | failed, `verify` found faults, or `fs` one of its paths not |
//! | 2 | the command line is wrong |
//! | 3 | a policy said no: content that nothing vouches for |
//! | 129, 130, 143 | SIGHUP, SIGINT or SIGTERM came first; what was under way is cleaned up |
//! | other | of `run`: the container's, or as `docker run` has it 125 (not started), 126 (not executable), 127 (not found) |

use std::process::ExitCode;

/// What a verb came to, where it did not fail.
pub(crate) enum Outcome {
    /// Status 0.
    Done,
    /// Status 1, with everything said already (the findings of `verify`, a path of `fs` that is not there).
    FoundFaults,
    /// Status 3, with everything said already (by a process in the background).
    SaidRefused,
    /// The status of a container.
    Container(u8),
    /// A signal came, and what was under way was given up: 128 and its number.
    Interrupted(u8),
}

/// A failure that is a decision of a policy, not an accident: status 3.
#[derive(Debug)]
pub(crate) struct Refused(pub String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

/// A command line that clap could not see to be wrong: status 2.
#[derive(Debug)]
pub(crate) struct Usage(pub String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// What every verb answers with.
pub(crate) type Result = anyhow::Result<Outcome>;

/// Prints an error and returns the exit status.
pub(crate) fn exit(outcome: Result) -> ExitCode {
    match outcome {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::FoundFaults) => ExitCode::FAILURE,
        Ok(Outcome::SaidRefused) => ExitCode::from(3),
        Ok(Outcome::Container(status) | Outcome::Interrupted(status)) => ExitCode::from(status),
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            print(&error);
            if error.is::<Usage>() {
                ExitCode::from(2)
            } else if error.is::<Refused>() {
                ExitCode::from(3)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Prints an error to standard error.
pub(crate) fn print(error: &anyhow::Error) {
    eprintln!("loris: {}", sentence(error));
}

/// Joins an error and its causes; a cause that the message before it already tells is not told again.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.ends_with(&cause) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause);
    }
    // Names in images are an attacker's: nothing of them may steer a terminal.
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// `loris fs ls | head` ends when `head` does; that is no failure.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<std::io::Error>())
        .any(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn causes_are_told_once_and_without_control_characters() {
        let inner = std::io::Error::other("disk\x1b[31m on fire");
        let error = anyhow::Error::new(inner).context("reading: disk\x1b[31m on fire").context("opening");
        assert_eq!(sentence(&error), "opening: reading: disk\u{fffd}[31m on fire");
    }

    #[test]
    fn a_refusal_is_seen_through_its_context() {
        let error = anyhow::Error::new(Refused("no".into()));
        assert!(error.is::<Refused>());
        let wrapped: anyhow::Result<()> = Err(error).context("while");
        assert!(wrapped.unwrap_err().is::<Refused>());
    }
}

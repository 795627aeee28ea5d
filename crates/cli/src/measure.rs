//! Timing a program as a whole: what a user waits for, and what it costs.

use std::{
    fs,
    io::Read as _,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// What one run of a program took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Measured {
    /// From the start to the end, in seconds.
    pub seconds: f64,
    /// From the start to the first byte on standard output, in seconds; of a program that prints nothing, to the end.
    pub first_output_seconds: f64,
    /// Processor time of the process and of its children that have ended, in seconds, as last seen (sampled).
    pub cpu_seconds: f64,
    /// The largest resident set of the process, in bytes, as last seen (sampled; the kernel keeps the maximum).
    pub peak_bytes: u64,
}

/// How often a running process is looked at.
const SAMPLE: Duration = Duration::from_millis(5);
/// A program that prints more than this is not what is measured here.
const MOST_OUTPUT: u64 = 64 << 20;

/// Runs a program to its end.
///
/// # Errors
/// Where it can't be started or ends with another status than 0; the message holds the end of its standard error.
pub(crate) fn measure(command: &mut Command) -> Result<Measured> {
    let program = command.get_program().to_string_lossy().into_owned();
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let (first_seen, first) = mpsc::channel();
    let output = child.stdout.take().context("no standard output")?;
    let errors = child.stderr.take().context("no standard error")?;
    let reader = thread::spawn(move || {
        let mut output = output.take(MOST_OUTPUT);
        let mut buffer = [0; 4096];
        let mut seen = false;
        while let Ok(1..) = output.read(&mut buffer) {
            if !seen {
                // The receiver outlives this thread; were it gone, nobody would care.
                let _ = first_seen.send(Instant::now());
                seen = true;
            }
        }
    });
    let error_reader = thread::spawn(move || {
        let mut text = String::new();
        // Text that is not UTF-8 is not shown.
        let _ = errors.take(MOST_OUTPUT).read_to_string(&mut text);
        text
    });
    let mut measured = Measured::default();
    let status = loop {
        measured.sample(child.id());
        if let Some(status) = child.try_wait().with_context(|| format!("waiting for {program}"))? {
            break status;
        }
        thread::sleep(SAMPLE);
    };
    let end = Instant::now();
    let _ = reader.join();
    let errors = error_reader.join().unwrap_or_default();
    if !status.success() {
        let tail: Vec<&str> = errors.lines().rev().take(5).collect();
        bail!("{program} ended with {status}: {}", tail.into_iter().rev().collect::<Vec<_>>().join("; "));
    }
    measured.seconds = (end - start).as_secs_f64();
    measured.first_output_seconds = first.try_recv().map_or(measured.seconds, |first| (first - start).as_secs_f64());
    Ok(measured)
}

impl Measured {
    fn sample(&mut self, process: u32) {
        if let Ok(status) = fs::read_to_string(format!("/proc/{process}/status"))
            && let Some(line) = status.lines().find(|line| line.starts_with("VmHWM:"))
            && let Some(kibibytes) = line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok())
        {
            self.peak_bytes = self.peak_bytes.max(kibibytes << 10);
        }
        // proc_pid_stat(5): the name stands in brackets and may hold anything; behind it, fields 14 to 17 are the times of
        // the process and of its waited-for children, in ticks of 1/100 s on every Linux that Rust runs on.
        if let Ok(stat) = fs::read_to_string(format!("/proc/{process}/stat"))
            && let Some((_, fields)) = stat.rsplit_once(')')
        {
            let ticks: u64 =
                fields.split_whitespace().skip(11).take(4).filter_map(|field| field.parse::<u64>().ok()).sum();
            self.cpu_seconds = self.cpu_seconds.max(ticks as f64 / 100.0);
        }
    }
}

/// Returns the middle of some figures.
pub(crate) fn median(figures: impl IntoIterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.into_iter().collect();
    figures.sort_by(f64::total_cmp);
    match figures.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => figures[count / 2],
        count => f64::midpoint(figures[count / 2 - 1], figures[count / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_output_comes_before_the_end() {
        let measured = measure(Command::new("sh").args(["-c", "echo hi; sleep 0.2"])).unwrap();
        assert!(measured.first_output_seconds < measured.seconds);
        assert!(measured.peak_bytes > 0);
    }

    #[test]
    fn a_failure_shows_what_the_program_said() {
        let error = measure(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("broken") && error.contains('3'), "{error}");
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median([4.0, 1.0]), 2.5);
    }
}

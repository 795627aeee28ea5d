//! `daemon install` and `daemon uninstall`: what changes is shown, asked about, and done.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::Context as _;
use clap::Args;
use loris_snapshotter::install::{self, Plan, Wanted};

use super::configured::{self, FILE};
use crate::failure::{self, Outcome, Usage};

const UNITS: [&str; 2] = ["loris-snapshotter.socket", "loris-snapshotter.service"];

/// How things are installed.
#[derive(Args)]
pub(crate) struct InstallArguments {
    #[command(flatten)]
    how: How,
    /// The configuration that the service reads, where it is not /etc/loris/snapshotter.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The program that the service runs, where it is not this one
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Leave containerd's configuration alone
    #[arg(long)]
    no_containerd: bool,
    /// Leave Kubernetes' images to the snapshotter that they have
    #[arg(long)]
    no_cri: bool,
    /// Leave Docker's configuration alone
    #[arg(long)]
    no_docker: bool,
}

/// How things are taken back.
#[derive(Args)]
pub(crate) struct UninstallArguments {
    #[command(flatten)]
    how: How,
}

#[derive(Args)]
struct How {
    /// Only show what would change
    #[arg(long)]
    dry_run: bool,
    /// Don't ask
    #[arg(long, short)]
    yes: bool,
    /// Where the machine's files are: for a machine's image
    #[arg(long, value_name = "DIR", default_value = "/")]
    root_dir: PathBuf,
    /// Change files only: neither start nor stop the service
    #[arg(long)]
    no_start: bool,
}

impl InstallArguments {
    pub(crate) fn run(self) -> failure::Result {
        let root_dir = self.how.root_dir()?;
        let inside = |path: &Path| root_dir.join(path.strip_prefix("/").unwrap_or(path));
        let file = inside(self.config.as_deref().unwrap_or(Path::new(FILE)));
        let named = (self.config.is_some() || file.exists()).then_some(&*file);
        let settings = match named {
            Some(named) => configured::settle(Some(named), &[])?.settings,
            None => loris_snapshotter::config::Settings::default(),
        };
        let program = match self.program {
            Some(program) => program,
            None => program(&root_dir)?,
        };
        let wanted = Wanted {
            program,
            config: self.config,
            address: settings.address,
            root: settings.root,
            containerd: !self.no_containerd,
            cri: !self.no_cri,
            docker: !self.no_docker,
            is_two: root_dir == Path::new("/") && has_containerd_two(),
            root_dir,
        };
        let plan = install::plan(&wanted)?;
        self.how.carry_out(plan, |how| {
            how.systemctl(&["daemon-reload"])?;
            how.systemctl(&["enable", "--now", UNITS[0], UNITS[1]])?;
            how.say("then, when it suits: systemctl restart containerd (and docker, where it is told too)")
        })
    }
}

impl UninstallArguments {
    pub(crate) fn run(self) -> failure::Result {
        let plan = install::removal(&self.how.root_dir()?)?;
        if !plan.is_empty() && !self.how.dry_run && self.how.is_agreed(&plan)? {
            // While there are units to speak of. Mounts of running containers stay.
            self.how.systemctl(&["disable", "--now", UNITS[1], UNITS[0]])?;
            plan.carry_out()?;
            self.how.systemctl(&["daemon-reload"])?;
            self.how.say("then, when it suits: systemctl restart containerd (and docker, where it was told too)")?;
        } else {
            self.how.show(&plan)?;
        }
        Ok(Outcome::Done)
    }
}

impl How {
    fn root_dir(&self) -> anyhow::Result<PathBuf> {
        self.root_dir.canonicalize().with_context(|| format!("looking into {}", self.root_dir.display()))
    }

    fn carry_out(&self, plan: Plan, then: impl FnOnce(&Self) -> anyhow::Result<()>) -> failure::Result {
        if plan.is_empty() || self.dry_run {
            self.show(&plan)?;
        } else if self.is_agreed(&plan)? {
            plan.carry_out()?;
            then(self)?;
        }
        Ok(Outcome::Done)
    }

    fn show(&self, plan: &Plan) -> anyhow::Result<()> {
        if plan.is_empty() {
            return self.say("nothing changes");
        }
        io::stdout().write_all(plan.diff().as_bytes())?;
        io::stdout().flush()?;
        plan.notes.iter().try_for_each(|note| self.say(note))
    }

    /// Shows what changes, and asks.
    fn is_agreed(&self, plan: &Plan) -> anyhow::Result<bool> {
        self.show(plan)?;
        if self.yes {
            return Ok(true);
        }
        if !io::stdin().is_terminal() {
            return Err(
                Usage("nobody can be asked here: say --yes, or --dry-run to only see what changes".into()).into()
            );
        }
        eprint!("change this? [y/N] ");
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    }

    #[allow(clippy::unused_self)] // as the others
    fn say(&self, text: &str) -> anyhow::Result<()> {
        writeln!(io::stderr(), "loris: {text}").map_err(Into::into)
    }

    /// Tells systemd, where this is its machine; else says what has to be told.
    fn systemctl(&self, arguments: &[&str]) -> anyhow::Result<()> {
        let text = format!("systemctl {}", arguments.join(" "));
        let is_here = self.root_dir().is_ok_and(|root| root == Path::new("/"));
        if self.no_start || !is_here || !Path::new("/run/systemd/system").exists() {
            return self.say(&format!("left to you: {text}"));
        }
        self.say(&text)?;
        let status = Command::new("systemctl").args(arguments).stdin(Stdio::null()).status().context(text.clone())?;
        anyhow::ensure!(status.success(), "{text}: {status}");
        Ok(())
    }
}

/// This program, as the machine has it.
fn program(root_dir: &Path) -> anyhow::Result<PathBuf> {
    let here = std::env::current_exe().context("finding this program")?;
    Ok(match here.strip_prefix(root_dir) {
        Ok(inside) => Path::new("/").join(inside),
        // It is not of that machine.
        Err(_) => "/usr/local/bin/loris".into(),
    })
}

fn has_containerd_two() -> bool {
    let output = Command::new("containerd").arg("--version").stdin(Stdio::null()).stderr(Stdio::null()).output();
    output.is_ok_and(|output| install::is_two(&String::from_utf8_lossy(&output.stdout)))
}

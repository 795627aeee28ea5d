//! `doctor`: what this machine allows, which engine mounts would get, and what to change for a better one.

use clap::Args;
use loris_mount::{
    engine::{self, Engine, EngineReport},
    probe::{Ability, probe},
};
use serde::Serialize;

use crate::{
    Global,
    failure::{self, Outcome},
    opened::StorePlace,
    table::{printable, table},
};

/// Show what this machine allows, which engine mounts would get, and what to change for a better one.
///
/// Each engine is tried with a tiny image; nothing is left behind.
#[derive(Args)]
pub(crate) struct DoctorArguments {
    #[command(flatten)]
    place: StorePlace,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    kernel: String,
    store: String,
    /// What was looked at.
    checks: Vec<Check>,
    /// What was tried, the best first.
    engines: Vec<Check>,
    cases: Vec<Case>,
}

/// One thing, and whether it is there.
#[derive(Serialize)]
struct Check {
    name: String,
    works: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// One way of mounting.
#[derive(Serialize)]
struct Case {
    name: &'static str,
    /// What it gets; not there where it can't be had at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    engine: Option<&'static str>,
    /// Why it gets nothing, or nothing better; what to do.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    advice: Vec<String>,
}

impl DoctorArguments {
    pub(crate) fn run(self, global: &Global) -> failure::Result {
        let store = self.place.open()?;
        let abilities = probe();
        let report = Report::new(&Found {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            store: store.root().display().to_string(),
            checks: abilities.all().map(|(name, ability)| (name, ability.clone())).into(),
            engines: (*engine::probe(store.root())).clone(),
            admin: abilities.admin,
            overlay: abilities.overlay,
            users: abilities.users,
        });
        if global.json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print!("{}", report.to_text());
        }
        Ok(Outcome::Done)
    }
}

/// What was found out about this machine.
struct Found {
    kernel: String,
    store: String,
    checks: Vec<(&'static str, Ability)>,
    engines: EngineReport,
    admin: Ability,
    overlay: Ability,
    users: Ability,
}

impl Report {
    fn new(found: &Found) -> Self {
        let engines = &found.engines;
        let as_root = |needed: &[&Ability]| {
            if !found.admin.is_present() {
                return (None, vec!["run `loris doctor` as root to see".to_owned()]);
            }
            let missing: Vec<String> =
                needed.iter().filter(|ability| !ability.is_present()).map(ToString::to_string).collect();
            let best = engines.usable().first().copied().filter(|_| missing.is_empty());
            let better = Engine::ALL.into_iter().take_while(|&engine| Some(engine) != best);
            let advice = better.map(|engine| format!("{engine}: {}", engines.ability(engine)));
            let advice = if missing.is_empty() { advice.collect() } else { missing };
            (best.map(Engine::name), advice)
        };
        let as_user = match &found.users {
            Ability::Present => (Some(Engine::Fuse.name()), Vec::new()),
            missing => (None, vec![missing.to_string()]),
        };
        let cases = [
            ("mount, as root", as_root(&[])),
            ("mount --rw and run, as root", as_root(&[&found.overlay])),
            ("mount, as a user", as_user),
        ];
        Self {
            kernel: found.kernel.clone(),
            store: found.store.clone(),
            checks: found.checks.iter().map(|(name, ability)| Check::new(name, ability)).collect(),
            engines: Engine::ALL.map(|engine| Check::new(engine.name(), engines.ability(engine))).into(),
            cases: cases.map(|(name, (engine, advice))| Case { name, engine, advice }).into(),
        }
    }

    fn to_text(&self) -> String {
        let mut text = format!("kernel  {}\nstore   {}\n\n", self.kernel, printable(self.store.as_bytes()));
        let rows = |head: &str, checks: &[Check]| {
            let mut rows = vec![vec![head.to_owned(), "works".to_owned(), "why not".to_owned()]];
            rows.extend(checks.iter().map(Check::row));
            table(&rows)
        };
        text.push_str(&rows("needed", &self.checks));
        text.push('\n');
        text.push_str(&rows("engine", &self.engines));
        text.push('\n');
        let mut lines = vec![["case", "engine"].map(str::to_owned).to_vec()];
        lines.extend(self.cases.iter().map(|case| vec![case.name.to_owned(), case.engine.unwrap_or("-").to_owned()]));
        text.push_str(&table(&lines));
        let mut advice: Vec<&str> = Vec::new();
        for line in self.cases.iter().flat_map(|case| &case.advice) {
            if !advice.contains(&line.as_str()) {
                advice.push(line);
            }
        }
        if !advice.is_empty() {
            text.push_str("\nfor more, or better:\n");
        }
        for line in advice {
            text.push_str(&format!("  {}\n", printable(line.as_bytes())));
        }
        text
    }
}

impl Check {
    fn new(name: &str, ability: &Ability) -> Self {
        let (reason, remedy) = match ability {
            Ability::Missing { reason, remedy } => (Some(reason.clone()), Some((*remedy).to_owned())),
            _ => (None, None),
        };
        Self { name: name.to_owned(), works: ability.is_present(), reason, remedy }
    }

    fn row(&self) -> Vec<String> {
        let works = if self.works { "yes" } else { "no" };
        let reason = self.reason.as_deref().unwrap_or_default();
        vec![self.name.clone(), works.to_owned(), printable(reason.as_bytes())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(reason: &str, remedy: &'static str) -> Ability {
        Ability::Missing { reason: reason.to_owned(), remedy }
    }

    fn found(engines: EngineReport) -> Found {
        let admin = Ability::Present;
        Found {
            kernel: "6.18.1".to_owned(),
            store: "/var/lib/loris".to_owned(),
            checks: vec![("right to mount", admin.clone()), ("overlayfs", Ability::Present)],
            engines,
            admin,
            overlay: Ability::Present,
            users: Ability::Present,
        }
    }

    #[test]
    fn a_machine_that_has_everything() {
        let everything = EngineReport::new(Ability::Present, Ability::Present, Ability::Present, Ability::Present);
        insta::assert_snapshot!(Report::new(&found(everything)).to_text(), @r"
        kernel  6.18.1
        store   /var/lib/loris

        needed          works  why not
        right to mount  yes
        overlayfs       yes

        engine      works  why not
        fanotify    yes
        erofs-fuse  yes
        erofs-loop  yes
        fuse        yes

        case                         engine
        mount, as root               fanotify
        mount --rw and run, as root  fanotify
        mount, as a user             fuse
        ");
    }

    #[test]
    fn an_older_machine_without_fusermount() {
        let fanotify = missing("the kernel gives no group: EINVAL", "use Linux 6.15 or newer");
        let mut found = found(EngineReport::new(fanotify, Ability::Present, Ability::Present, Ability::Present));
        found.users = missing("fusermount3 is not installed", "`apt install fuse3` installs it");
        found.overlay = missing("the kernel has no overlayfs", "load it with `modprobe overlay`");
        let report = Report::new(&found);
        insta::assert_snapshot!(report.to_text(), @r"
        kernel  6.18.1
        store   /var/lib/loris

        needed          works  why not
        right to mount  yes
        overlayfs       yes

        engine      works  why not
        fanotify    no     the kernel gives no group: EINVAL
        erofs-fuse  yes
        erofs-loop  yes
        fuse        yes

        case                         engine
        mount, as root               erofs-fuse
        mount --rw and run, as root  -
        mount, as a user             -

        for more, or better:
          fanotify: the kernel gives no group: EINVAL; use Linux 6.15 or newer
          the kernel has no overlayfs; load it with `modprobe overlay`
          fusermount3 is not installed; `apt install fuse3` installs it
        ");
        insta::assert_snapshot!(serde_json::to_string_pretty(&report.cases).unwrap_or_default(), @r#"
        [
          {
            "name": "mount, as root",
            "engine": "erofs-fuse",
            "advice": [
              "fanotify: the kernel gives no group: EINVAL; use Linux 6.15 or newer"
            ]
          },
          {
            "name": "mount --rw and run, as root",
            "advice": [
              "the kernel has no overlayfs; load it with `modprobe overlay`"
            ]
          },
          {
            "name": "mount, as a user",
            "advice": [
              "fusermount3 is not installed; `apt install fuse3` installs it"
            ]
          }
        ]
        "#);
    }

    #[test]
    fn a_user_sees_what_a_user_gets() {
        let admin = missing("no right to mount (CAP_SYS_ADMIN)", "run as root");
        let mut found = found(EngineReport::new(admin.clone(), admin.clone(), admin.clone(), Ability::Present));
        found.admin = admin;
        let report = Report::new(&found);
        let engines: Vec<_> = report.cases.iter().map(|case| case.engine).collect();
        assert_eq!(engines, [None, None, Some("fuse")]);
        assert_eq!(report.cases[0].advice, ["run `loris doctor` as root to see"]);
    }
}

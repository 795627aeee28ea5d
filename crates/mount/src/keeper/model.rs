//! All interleavings of daemons, keepers and deaths: somebody holds the group at any time, two daemons never serve at once, and
//! in the end there are one daemon and one keeper again.
//!
//! What is killed here is never the last one who *cares* for the group: a daemon, and its keeper before a successor has one of
//! its own, are the one hole that is left. But whoever else is there may be killed at any step, so that what must not happen is
//! that a process *ends by itself* as the last holder, or stays where nobody needs it. A packet that was sent arrives, also when its sender is dead. To show that the model sees mistakes, it is
//! also run with each rule broken.

use std::collections::{HashSet, VecDeque};

/// Deaths, and hand-overs that fail for other reasons, in one history.
const FAULTS: u8 = 3;

#[derive(Clone, Copy)]
struct Rules {
    /// A keeper whose successor died with packets unread (`ECONNRESET`) takes it for a death.
    forgives_resets: bool,
    /// A keeper whose daemon died before it had said everything ends, unless it is in charge.
    hears_the_end: bool,
    /// Only the keeper whose generation the journal has acts.
    heeds_generation: bool,
    /// A keeper that replaces a dead one is in charge from its first packet on.
    replaces_at_once: bool,
    /// No two keepers have the same generation.
    counts_keepers: bool,
    /// A daemon takes the charge back before it closes the socket of such a keeper.
    revokes_first: bool,
}

const RULES: Rules = Rules {
    forgives_resets: true,
    hears_the_end: true,
    heeds_generation: true,
    replaces_at_once: true,
    counts_keepers: true,
    revokes_first: true,
};

/// Packets: State, and End.
const ALL: u8 = 2;

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Doing {
    /// A successor that takes what its keeper gives.
    Inherits,
    /// It tells a new keeper everything.
    Tells,
    Serves,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Daemon {
    lives: bool,
    doing: Doing,
    /// Who has started it as a successor, until it was dismissed.
    from: Option<usize>,
    taken: u8,
    keeper: Option<usize>,
    told: u8,
    /// Its keeper has no predecessor that lives.
    replaces: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Keeper {
    lives: bool,
    generation: u8,
    heard: u8,
    /// Whom it is connected to.
    daemon: usize,
    /// That one is a successor, which it gives everything.
    gives: Option<u8>,
    is_dismissed: bool,
    /// Its socket was closed though the daemon lives.
    is_cut: bool,
    /// There is no other one.
    replaces: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    daemons: Vec<Daemon>,
    keepers: Vec<Keeper>,
    generation: u8,
    last_generation: u8,
    faults: u8,
}

type Next = Result<State, String>;

impl State {
    fn start() -> Self {
        let daemon = Daemon {
            lives: true,
            doing: Doing::Serves,
            from: None,
            taken: ALL,
            keeper: Some(0),
            told: ALL,
            replaces: false,
        };
        let keeper = Keeper {
            lives: true,
            generation: 1,
            heard: ALL,
            daemon: 0,
            gives: None,
            is_dismissed: false,
            is_cut: false,
            replaces: false,
        };
        Self { daemons: vec![daemon], keepers: vec![keeper], generation: 1, last_generation: 1, faults: 0 }
    }

    fn is_held(&self) -> bool {
        self.daemons.iter().any(|daemon| daemon.lives && daemon.taken > 0)
            || self.keepers.iter().any(|keeper| keeper.lives && keeper.heard > 0)
    }

    /// Whether one of the holders goes on whatever happens to the others. A successor does not: where it does not come up, it
    /// ends, and its keeper starts another one.
    fn is_cared_for(&self) -> bool {
        self.daemons.iter().any(|daemon| daemon.lives && daemon.doing != Doing::Inherits && daemon.from.is_none())
            || self.keepers.iter().any(|keeper| {
                let is_in_charge = keeper.generation == self.generation && !keeper.is_dismissed;
                keeper.lives && keeper.heard > 0 && (is_in_charge || keeper.replaces && !keeper.is_cut)
            })
    }

    fn checked(self, what: &str) -> Next {
        if !self.is_held() {
            return Err(format!("{what}, and nobody holds the group"));
        }
        let serving = self.daemons.iter().filter(|daemon| daemon.lives && daemon.doing == Doing::Serves).count();
        if serving > 1 { Err(format!("{what}, and two daemons serve")) } else { Ok(self) }
    }

    fn keeper_ends(mut self, number: usize) -> Next {
        self.keepers[number].lives = false;
        self.checked("a keeper ends")
    }

    fn next_generation(&mut self, rules: Rules) -> u8 {
        let last = if rules.counts_keepers { self.last_generation.max(self.generation) } else { self.generation };
        self.last_generation = last + 1;
        last + 1
    }

    fn start_keeper(&mut self, daemon: usize, rules: Rules) {
        let generation = self.next_generation(rules);
        let replaces = self.daemons[daemon].from.is_none();
        if replaces && rules.replaces_at_once {
            self.generation = generation;
        }
        self.keepers.push(Keeper {
            lives: true,
            generation,
            heard: 0,
            daemon,
            gives: None,
            is_dismissed: false,
            is_cut: false,
            replaces,
        });
        let number = self.keepers.len() - 1;
        let daemon = &mut self.daemons[daemon];
        (daemon.keeper, daemon.told, daemon.doing, daemon.replaces) = (Some(number), 0, Doing::Tells, replaces);
    }

    /// The next step of a daemon.
    fn daemon_step(&self, number: usize, rules: Rules) -> Option<Next> {
        let daemon = &self.daemons[number];
        if !daemon.lives {
            return None;
        }
        let mut next = self.clone();
        let keeper = daemon.keeper.map(|keeper| &self.keepers[keeper]);
        match daemon.doing {
            Doing::Inherits => {
                let from = &self.keepers[daemon.from?];
                if daemon.taken < from.gives.unwrap_or(0) {
                    next.daemons[number].taken += 1;
                } else if daemon.taken == ALL {
                    next.start_keeper(number, rules);
                } else if !from.lives {
                    next.daemons[number].lives = false;
                } else {
                    return None;
                }
            }
            Doing::Tells => {
                let keeper = keeper?;
                if !keeper.lives {
                    next.failed(number, rules);
                } else if daemon.told < ALL {
                    next.daemons[number].told += 1;
                } else if keeper.heard == ALL {
                    next.generation = keeper.generation;
                    next.daemons[number].doing = Doing::Serves;
                } else {
                    return None;
                }
            }
            Doing::Serves => {
                if let Some(from) = daemon.from {
                    next.keepers[from].is_dismissed = true;
                    next.daemons[number].from = None;
                } else if keeper.is_none_or(|keeper| !keeper.lives) {
                    next.start_keeper(number, rules);
                } else {
                    return None;
                }
            }
        }
        Some(next.checked("a daemon goes on"))
    }

    /// A hand-over has failed. A successor ends; a daemon tries again.
    fn failed(&mut self, number: usize, rules: Rules) {
        if self.daemons[number].replaces && rules.revokes_first {
            self.generation = self.next_generation(rules);
        }
        let daemon = &mut self.daemons[number];
        if let Some(keeper) = daemon.keeper.take() {
            self.keepers[keeper].is_cut = true;
        }
        match daemon.from {
            Some(_) => daemon.lives = false,
            None => daemon.doing = Doing::Serves,
        }
    }

    /// The next step of a keeper.
    fn keeper_step(&self, number: usize, rules: Rules) -> Option<Next> {
        let keeper = &self.keepers[number];
        if !keeper.lives {
            return None;
        }
        let mut next = self.clone();
        let daemon = &self.daemons[keeper.daemon];
        let is_gone = !daemon.lives || keeper.is_cut;
        if let Some(given) = keeper.gives {
            if keeper.is_dismissed {
                return Some(next.keeper_ends(number));
            }
            if is_gone && given < ALL && daemon.taken < given && !rules.forgives_resets {
                return Some(next.keeper_ends(number));
            }
            if !is_gone && given < ALL {
                next.keepers[number].gives = Some(given + 1);
                return Some(next.checked("a keeper gives"));
            }
        } else if keeper.heard < daemon.told && daemon.keeper.is_none_or(|keeper| keeper == number) {
            next.keepers[number].heard += 1;
            return Some(next.checked("a keeper hears"));
        }
        if !is_gone {
            return None;
        }
        if keeper.heard == 0 {
            return Some(next.keeper_ends(number));
        }
        if keeper.heard < ALL && !rules.hears_the_end {
            return None;
        }
        let is_in_charge = keeper.generation == self.generation || (!rules.heeds_generation && keeper.heard == ALL);
        if !is_in_charge {
            return Some(next.keeper_ends(number));
        }
        next.daemons.push(Daemon {
            lives: true,
            doing: Doing::Inherits,
            from: Some(number),
            taken: 0,
            keeper: None,
            told: 0,
            replaces: false,
        });
        let successor = next.daemons.len() - 1;
        let keeper = &mut next.keepers[number];
        (keeper.daemon, keeper.gives, keeper.is_cut) = (successor, Some(0), false);
        Some(next.checked("a keeper starts a successor"))
    }

    /// What may go wrong: anybody is killed who is not the last one to care, or a hand-over fails.
    fn faults(&self, rules: Rules) -> Vec<Self> {
        if self.faults == FAULTS {
            return Vec::new();
        }
        let mut next = Vec::new();
        let mut add = |change: &dyn Fn(&mut Self)| {
            let mut state = self.clone();
            state.faults += 1;
            change(&mut state);
            if state.is_cared_for() {
                next.push(state);
            }
        };
        for number in (0..self.daemons.len()).filter(|&number| self.daemons[number].lives) {
            add(&|state| state.daemons[number].lives = false);
            if self.daemons[number].doing == Doing::Tells {
                add(&|state| state.failed(number, rules));
            }
        }
        for number in (0..self.keepers.len()).filter(|&number| self.keepers[number].lives) {
            add(&|state| state.keepers[number].lives = false);
        }
        next
    }

    /// Whether all is as it was in the beginning.
    fn is_well(&self) -> bool {
        let mut daemons = (0..self.daemons.len()).filter(|&number| self.daemons[number].lives);
        let mut keepers = self.keepers.iter().filter(|keeper| keeper.lives);
        let (Some(daemon), Some(keeper)) = (daemons.next(), keepers.next()) else { return false };
        let are_alone = daemons.next().is_none() && keepers.next().is_none();
        let serves = self.daemons[daemon].doing == Doing::Serves && keeper.daemon == daemon;
        are_alone && serves && keeper.heard == ALL && keeper.generation == self.generation
    }
}

/// Goes through all histories; returns how many states there are, or what went wrong in one of them.
fn explore(rules: Rules) -> Result<usize, String> {
    let mut seen = HashSet::from([State::start()]);
    let mut waiting = VecDeque::from([State::start()]);
    while let Some(state) = waiting.pop_front() {
        let daemons = (0..state.daemons.len()).filter_map(|number| state.daemon_step(number, rules));
        let keepers = (0..state.keepers.len()).filter_map(|number| state.keeper_step(number, rules));
        let steps: Vec<Next> = daemons.chain(keepers).collect();
        if steps.is_empty() && !state.is_well() {
            return Err(format!("it ends with {state:?}"));
        }
        let steps = steps.into_iter().collect::<Result<Vec<_>, _>>();
        let steps = steps.map_err(|problem| format!("{problem}: after {state:?}"))?;
        for next in steps.into_iter().chain(state.faults(rules)) {
            if seen.insert(next.clone()) {
                waiting.push_back(next);
            }
        }
    }
    Ok(seen.len())
}

#[test]
fn somebody_holds_the_group_and_one_daemon_serves() {
    let states = explore(RULES).unwrap_or_else(|problem| panic!("{problem}"));
    assert!(states > 1000, "only {states} states were looked at");
}

#[test]
fn each_rule_is_needed() {
    let broken = [
        ("successor that dies over its inheritance", Rules { forgives_resets: false, ..RULES }),
        ("keeper that waits for ever", Rules { hears_the_end: false, ..RULES }),
        ("two keepers that act", Rules { heeds_generation: false, ..RULES }),
        ("daemon that dies over a new keeper", Rules { replaces_at_once: false, ..RULES }),
        ("two keepers of one generation", Rules { counts_keepers: false, ..RULES }),
        ("keeper that is given up", Rules { revokes_first: false, ..RULES }),
    ];
    for (what, rules) in broken {
        assert!(explore(rules).is_err(), "{what}: the model does not see what the rule is for");
    }
}

//! All interleavings of kernel, daemon and death, for a few events: nobody reads what is not there, nobody waits for ever.
//!
//! The kernel's side is written down from `fs/notify/fanotify/fanotify_user.c`: an event that was read stands in a list
//! under the descriptor number that its reader was given; an answer goes to the first in the list with that number,
//! whoever writes it. The daemon's side is the order of steps of `answering` and `slots`. Each step may be the last one
//! before the daemon is killed. To show that the model sees mistakes, it is also run with each rule of the order broken.

use std::collections::{BTreeSet, HashSet, VecDeque};

/// Readers, each of which wants a page of its own.
const EVENTS: usize = 3;
const SLOTS: usize = 2;
/// Deaths that are tried in one history.
const DEATHS: u8 = 2;

/// How the daemon goes about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Rules {
    /// A slot is cleared before its descriptor is closed.
    clear_before_close: bool,
    /// A successor takes the numbers of unanswered events before it reads new ones.
    park_numbers: bool,
    /// The kernel writes into the shared memory, not into the daemon's own from which it is copied.
    read_into_journal: bool,
    /// An event whose file is not noted is answered when that range of all files is filled.
    fill_all_where_unknown: bool,
}

const RULES: Rules =
    Rules { clear_before_close: true, park_numbers: true, read_into_journal: true, fill_all_where_unknown: true };

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Reader {
    Waiting,
    /// Its event stands in the kernel's list under a number.
    Listed(u8),
    Answered,
}

/// What a slot of the journal says.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Entry {
    number: u8,
    page: usize,
    /// Whether the file's key was noted.
    key: bool,
}

/// How far the daemon is with a slot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Step {
    Free,
    /// Only where the kernel does not write into the journal: what was read is not there yet.
    Copying(Entry),
    Read,
    Noted,
    Filled,
    Answered(u8),
    /// One of the two that follow an answer is done.
    Half(u8),
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct State {
    readers: [Reader; EVENTS],
    /// The kernel's list, in the order of reading.
    list: Vec<(u8, usize)>,
    filled: [bool; EVENTS],
    journal: [Option<Entry>; SLOTS],
    steps: [Step; SLOTS],
    /// Open descriptors of the daemon.
    open: BTreeSet<u8>,
    deaths: u8,
}

impl State {
    fn start() -> Self {
        Self {
            readers: [Reader::Waiting; EVENTS],
            list: Vec::new(),
            filled: [false; EVENTS],
            journal: [None; SLOTS],
            steps: [Step::Free; SLOTS],
            open: BTreeSet::new(),
            deaths: 0,
        }
    }

    /// Answers the first event with a number. An error is a reader who goes on without its page.
    fn answer(&mut self, number: u8) -> Result<(), String> {
        let Some(place) = self.list.iter().position(|&(listed, _)| listed == number) else { return Ok(()) };
        let (_, event) = self.list.remove(place);
        self.readers[event] = Reader::Answered;
        if self.filled[event] { Ok(()) } else { Err(format!("reader {event} goes on without its page")) }
    }

    /// Does the next step of a slot, if there is one.
    fn step(&self, slot: usize, rules: Rules) -> Option<Result<Self, String>> {
        let mut next = self.clone();
        next.steps[slot] = match self.steps[slot] {
            Step::Free => {
                if self.journal[slot].is_some() {
                    return None;
                }
                let event = self.readers.iter().position(|reader| *reader == Reader::Waiting)?;
                let number = (0..).find(|number| !self.open.contains(number))?;
                next.open.insert(number);
                next.list.push((number, event));
                next.readers[event] = Reader::Listed(number);
                let entry = Entry { number, page: event, key: false };
                if rules.read_into_journal {
                    next.journal[slot] = Some(entry);
                    Step::Read
                } else {
                    Step::Copying(entry)
                }
            }
            Step::Copying(entry) => {
                next.journal[slot] = Some(entry);
                Step::Read
            }
            Step::Read => {
                next.journal[slot].as_mut()?.key = true;
                Step::Noted
            }
            Step::Noted => {
                let entry = self.journal[slot]?;
                if entry.key || rules.fill_all_where_unknown {
                    next.filled[entry.page] = true;
                }
                Step::Filled
            }
            Step::Filled => {
                let number = self.journal[slot]?.number;
                if let Err(problem) = next.answer(number) {
                    return Some(Err(problem));
                }
                Step::Answered(number)
            }
            Step::Answered(number) => {
                if rules.clear_before_close {
                    next.journal[slot] = None;
                } else {
                    next.open.remove(&number);
                }
                Step::Half(number)
            }
            Step::Half(number) => {
                if rules.clear_before_close {
                    next.open.remove(&number);
                } else {
                    next.journal[slot] = None;
                }
                Step::Free
            }
        };
        Some(Ok(next))
    }

    /// The daemon is killed, and a successor takes over what stands in the journal.
    fn die(&self, rules: Rules) -> Option<Self> {
        if self.deaths == DEATHS {
            return None;
        }
        let mut next = self.clone();
        next.deaths += 1;
        next.open.clear();
        for slot in 0..SLOTS {
            next.steps[slot] = match self.journal[slot] {
                // The key is not noted again: what is there is all that is known.
                Some(entry) => {
                    if rules.park_numbers {
                        next.open.insert(entry.number);
                    }
                    Step::Noted
                }
                None => Step::Free,
            };
        }
        Some(next)
    }
}

/// Goes through all histories; returns how many states there are, or what went wrong in one of them.
fn explore(rules: Rules) -> Result<usize, String> {
    let mut seen = HashSet::from([State::start()]);
    let mut waiting = VecDeque::from([State::start()]);
    while let Some(state) = waiting.pop_front() {
        let mut moved = false;
        for slot in 0..SLOTS {
            let Some(next) = state.step(slot, rules) else { continue };
            moved = true;
            let next = next.map_err(|problem| format!("{problem}: {state:?}"))?;
            if seen.insert(next.clone()) {
                waiting.push_back(next);
            }
        }
        if let Some(next) = state.die(rules)
            && seen.insert(next.clone())
        {
            waiting.push_back(next);
        }
        if !moved && !state.readers.iter().all(|reader| *reader == Reader::Answered) {
            return Err(format!("a reader waits for ever: {state:?}"));
        }
    }
    Ok(seen.len())
}

#[test]
fn nobody_reads_what_is_not_there_and_nobody_waits_for_ever() {
    let states = explore(RULES).unwrap();
    assert!(states > 1000, "only {states} states were looked at");
}

#[test]
fn each_rule_is_needed() {
    let broken = [
        ("number of a stale event", Rules { clear_before_close: false, ..RULES }),
        ("number given out twice", Rules { park_numbers: false, ..RULES }),
        ("event known to the dead alone", Rules { read_into_journal: false, ..RULES }),
        ("file not known", Rules { fill_all_where_unknown: false, ..RULES }),
    ];
    for (what, rules) in broken {
        assert!(explore(rules).is_err(), "{what}: the model does not see what the rule is for");
    }
}

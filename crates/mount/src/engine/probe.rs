//! Which engines work here: found by using them, not by the numbers of versions.
//!
//! A tiny image is mounted as the engine would mount it, over files on the file system of the store, and its one file is
//! read. Neither the files nor the mounts ever have a name, so that nothing of it can be left behind, however this
//! process ends. It takes some milliseconds, once for each store and process.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::FileExt as _,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{Mode, OFlags},
    io::Errno,
};

use super::{Engine, tiny};
use crate::{
    erofs::{ErofsOptions, create},
    fsopen::Refusal,
    fuse::devices::{Device, DeviceMount},
    pager::{
        event::{Answer, Event},
        group::Group,
    },
    probe::Ability,
};

/// Which engines work for a store. [`probe`] makes it.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct EngineReport {
    /// [`Engine::Fanotify`].
    pub fanotify: Ability,
    /// [`Engine::ErofsFuse`].
    pub erofs_fuse: Ability,
    /// [`Engine::ErofsLoop`].
    pub erofs_loop: Ability,
    /// [`Engine::Fuse`].
    pub fuse: Ability,
}

impl EngineReport {
    /// Puts a report together.
    #[must_use]
    pub fn new(fanotify: Ability, erofs_fuse: Ability, erofs_loop: Ability, fuse: Ability) -> Self {
        Self { fanotify, erofs_fuse, erofs_loop, fuse }
    }

    /// Returns whether an engine works, or why not and what to do.
    #[must_use]
    pub fn ability(&self, engine: Engine) -> &Ability {
        match engine {
            Engine::Fanotify => &self.fanotify,
            Engine::ErofsFuse => &self.erofs_fuse,
            Engine::ErofsLoop => &self.erofs_loop,
            Engine::Fuse => &self.fuse,
        }
    }

    /// Returns those that work, the best first.
    #[must_use]
    pub fn usable(&self) -> Vec<Engine> {
        Engine::ALL.into_iter().filter(|&engine| self.ability(engine).is_present()).collect()
    }
}

/// Finds out which engines work for a store in a directory, which must exist. Asks once for each directory and process.
/// Blocks for some milliseconds.
#[must_use]
pub fn probe(store: &Path) -> Arc<EngineReport> {
    static KNOWN: Mutex<Option<HashMap<PathBuf, Arc<EngineReport>>>> = Mutex::new(None);
    // Held meanwhile: whoever asks at the same time wants the same answer.
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let report = known.get_or_insert_default().entry(store.to_owned()).or_insert_with(|| Arc::new(look(store)));
    Arc::clone(report)
}

fn look(store: &Path) -> EngineReport {
    let abilities = crate::probe::probe();
    let missing = abilities.missing_for(crate::probe::Wish::ReadOnly);
    let fuse = missing.first().map_or(Ability::Present, |&ability| ability.clone());
    if !abilities.is_admin() {
        let [one, other] = [abilities.admin.clone(), abilities.admin.clone()];
        return EngineReport::new(one, other, abilities.admin, fuse);
    }
    let plain = ability(try_erofs_fuse(store, Over::Files));
    let looped = ability(try_erofs_fuse(store, Over::Loops));
    EngineReport::new(ability(try_fanotify(store)), plain, looped, fuse)
}

/// Why an engine does not work.
struct Missing {
    reason: String,
    remedy: &'static str,
}

fn ability(tried: Result<(), Missing>) -> Ability {
    match tried {
        Ok(()) => Ability::Present,
        Err(Missing { reason, remedy }) => Ability::missing(reason, remedy),
    }
}

const UPDATE: &str = "use Linux 6.15 or newer, built with CONFIG_FANOTIFY_ACCESS_PERMISSIONS";
const ROOT: &str = "run as root of the machine, outside of any user namespace";
const PLACE: &str = "put the store on ext4, XFS or btrfs (`--cache-dir`)";
const FILE_BACKED: &str = "use Linux 6.12 or newer, built with CONFIG_EROFS_FS and CONFIG_EROFS_FS_BACKED_BY_FILE";
const BLOCK_BACKED: &str = "use a kernel built with CONFIG_EROFS_FS and CONFIG_BLK_DEV_LOOP";
const REPORT: &str = "this was not expected: please report it, with the kernel's version";

fn try_fanotify(store: &Path) -> Result<(), Missing> {
    let group = Group::new().map_err(|error| {
        let remedy = match error.raw_os_error() {
            Some(libc::EPERM) => ROOT,
            Some(libc::EINVAL | libc::ENOSYS) => UPDATE,
            Some(libc::EMFILE) => "raise /proc/sys/fs/fanotify/max_user_groups",
            _ => REPORT,
        };
        Missing { reason: format!("the kernel gives no fanotify group that is asked before reads: {error}"), remedy }
    })?;
    let image = Image::write(store)?;
    let device = sparse(store)?;
    group.mark(&device).map_err(|error| {
        let remedy = match error.raw_os_error() {
            Some(libc::EOPNOTSUPP) => PLACE,
            Some(libc::EINVAL) => UPDATE,
            Some(libc::EPERM) => ROOT,
            _ => REPORT,
        };
        let store = store.display();
        Missing { reason: format!("the kernel does not ask before files in {store} are read: {error}"), remedy }
    })?;
    let mount = image.mount(&path_of(&device), Over::Files)?;
    let content = tiny::content();
    let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(unexpected)?;
    let (asked, read) = std::thread::scope(|scope| {
        // Dropped at the thread's end, so that a reader whose question was not answered goes on.
        let answering = scope.spawn(|| {
            let group = group;
            answer_one(&group, &device, &content, &stop)
        });
        let read = read_file(&mount);
        // Where the kernel never asked.
        let _ = rustix::io::write(&stop, &1_u64.to_ne_bytes());
        (answering.join(), read)
    });
    match (asked, read) {
        (Ok(Ok(true)), Ok(found)) if found == content => Ok(()),
        (Ok(Ok(false)), _) => Err(Missing {
            reason: "EROFS reads its devices without the kernel asking before".to_owned(),
            remedy: UPDATE,
        }),
        (Ok(Err(error)), _) | (_, Err(error)) => Err(unexpected(error)),
        (Ok(Ok(true)), Ok(_)) => Err(Missing {
            reason: "EROFS does not show what was filled when the kernel asked".to_owned(),
            remedy: REPORT,
        }),
        (Err(_), _) => Err(unexpected("the thread that answers has failed")),
    }
}

/// How long the kernel may take to ask. It takes microseconds; a machine may be busy.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

/// Waits for a question, writes the content that is asked for into the file, and lets the reader go on. Returns whether
/// there was a question. The reader goes on in any case once the group is dropped.
fn answer_one(group: &Group, file: &File, content: &[u8], stop: &OwnedFd) -> io::Result<bool> {
    let mut wanted = [PollFd::new(group, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
    poll(&mut wanted, Some(&PATIENCE))?;
    let mut bytes = [0; 256];
    let length = match rustix::io::read(group, &mut bytes) {
        Ok(length) => length,
        Err(Errno::AGAIN) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    let event = Event::parse(&bytes[..length]).map_err(io::Error::other)?;
    if event.descriptor < 0 {
        return Err(Errno::MFILE.into());
    }
    // SAFETY: the kernel opened it for this process when the event was read, and nobody else knows of it.
    let _asked = unsafe { OwnedFd::from_raw_fd(event.descriptor) };
    let filled = file.write_all_at(content, 0);
    group.answer(event.descriptor, Answer::Allow)?;
    filled.map(|()| true)
}

fn try_erofs_fuse(store: &Path, over: Over) -> Result<(), Missing> {
    let image = Image::write(store)?;
    let content = tiny::content();
    let devices =
        DeviceMount::serve(vec![Device::Bytes(content.clone())], 1).map_err(|Refusal { source, detail }| {
            let remedy = match source.raw_os_error() {
                Some(libc::EPERM) => ROOT,
                Some(libc::ENOSYS) => over.remedy(),
                _ => crate::probe::fuse_device_remedy(&source),
            };
            Missing { reason: format!("FUSE cannot be mounted: {source}{detail}"), remedy }
        })?;
    let mount = image.mount(&devices.path(0), over)?;
    match read_file(&mount).map_err(unexpected)? {
        found if found == content => Ok(()),
        _ => Err(Missing { reason: "EROFS does not show what FUSE serves".to_owned(), remedy: REPORT }),
    }
}

fn unexpected(error: impl std::fmt::Display) -> Missing {
    Missing { reason: error.to_string(), remedy: REPORT }
}

/// What EROFS is mounted over.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Over {
    Files,
    Loops,
}

impl Over {
    fn name(self) -> &'static str {
        match self {
            Self::Files => "plain files",
            Self::Loops => "loop devices",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Files => FILE_BACKED,
            Self::Loops => BLOCK_BACKED,
        }
    }
}

/// The bootstrap of the tiny image, in a file without a name.
struct Image(File);

impl Image {
    fn write(store: &Path) -> Result<Self, Missing> {
        let bytes = tiny::bootstrap().map_err(unexpected)?;
        let mut file = nameless(store)?;
        file.write_all(&bytes).map_err(|error| not_writable(store, &error))?;
        Ok(Self(file))
    }

    /// Mounts it over a device, nowhere.
    fn mount(&self, device: &Path, over: Over) -> Result<OwnedFd, Missing> {
        let options = ErofsOptions { loops: over == Over::Loops, ..ErofsOptions::default() };
        create(&path_of(&self.0), &[device.to_owned()], &options).map_err(|Refusal { source, detail }| {
            let remedy = match (source.raw_os_error(), over) {
                (Some(libc::ENODEV | libc::ENOSYS | libc::ENOTBLK | libc::EINVAL), over) => over.remedy(),
                (Some(libc::ENOENT | libc::ENXIO), Over::Loops) => {
                    "load the kernel module with `modprobe loop`; in a container, give it /dev/loop-control and /dev/loop*"
                }
                (Some(libc::EPERM | libc::EACCES), _) => ROOT,
                _ => REPORT,
            };
            let over = over.name();
            Missing { reason: format!("EROFS over {over} cannot be mounted: {source}{detail}"), remedy }
        })
    }
}

/// A file of one block, all of it missing.
fn sparse(store: &Path) -> Result<File, Missing> {
    let file = nameless(store)?;
    file.set_len(tiny::LENGTH as u64).map_err(|error| not_writable(store, &error))?;
    Ok(file)
}

fn nameless(store: &Path) -> Result<File, Missing> {
    tempfile::tempfile_in(store).map_err(|error| not_writable(store, &error))
}

fn not_writable(store: &Path, error: &io::Error) -> Missing {
    let remedy = match error.kind() {
        io::ErrorKind::StorageFull => "make room there",
        _ => "choose another directory for the store (`--cache-dir`)",
    };
    Missing { reason: format!("{} cannot be written: {error}", store.display()), remedy }
}

fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Reads the tiny image's file.
fn read_file(mount: &OwnedFd) -> Result<Vec<u8>, io::Error> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(mount.as_fd(), tiny::NAME, flags, Mode::empty());
    let mut content = Vec::new();
    File::from(file.map_err(io::Error::from)?).read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_best_engine_comes_first() {
        let report = |works: [bool; 4]| {
            let ability = |works| if works { Ability::Present } else { Ability::missing("x", "y") };
            let [fanotify, erofs_fuse, erofs_loop, fuse] = works.map(ability);
            EngineReport::new(fanotify, erofs_fuse, erofs_loop, fuse)
        };
        let cases = [
            (report([true; 4]), &Engine::ALL[..]),
            (report([false, true, true, true]), &Engine::ALL[1..]),
            (report([false, false, true, true]), &Engine::ALL[2..]),
            (report([true, false, false, false]), &[Engine::Fanotify]),
            (report([false; 4]), &[]),
        ];
        for (report, usable) in cases {
            assert_eq!(report.usable(), usable, "{report:?}");
        }
    }

    #[test]
    fn a_probe_leaves_nothing_behind() {
        let store = tempfile::tempdir().unwrap();
        let before = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let report = look(store.path());
        assert_eq!(std::fs::read_dir(store.path()).unwrap().count(), 0);
        // Other tests mount at the same time, but nothing in this place.
        let after = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let fresh = after.lines().filter(|line| !before.contains(line) && line.contains("/proc/self/fd/")).count();
        assert_eq!(fresh, 0, "{after}");
        for engine in Engine::ALL {
            if let Ability::Missing { reason, remedy } = report.ability(engine) {
                assert_ne!(*remedy, REPORT, "{engine}: {reason}");
            }
        }
        // What is asked again is not tried again.
        assert!(Arc::ptr_eq(&probe(store.path()), &probe(store.path())));
    }

    #[test]
    fn a_store_that_is_not_there() {
        let report = look(Path::new("/no/such/place"));
        for engine in [Engine::Fanotify, Engine::ErofsFuse, Engine::ErofsLoop] {
            assert!(matches!(report.ability(engine), Ability::Missing { .. }), "{engine}");
        }
    }
}

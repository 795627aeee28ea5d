//! What lets devices outlive the process that serves them: a keeper that holds the connection, and a register.
//!
//! While nobody serves, readers wait; a successor asks the kernel for what was read and not answered, and goes on. Where
//! both processes are killed, the last copy of the connection's descriptor is closed, and the kernel fails all reads: no
//! hole ever shows.

use std::{
    fs::File,
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use loris_lazy::LazyLayer;
use rustix::event::{EventfdFlags, eventfd};

use super::wire::Connection;
use crate::{
    keeper::{Asks, Keeper, Kept},
    pager::{PagerError, PagerOptions, journal::Journal},
    register::Register,
};

/// See the module's documentation. Dropped, it lets the devices end with this process.
#[derive(Debug)]
pub(super) struct Survival {
    inner: Arc<Inner>,
    keeping: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inner {
    connection: Arc<Connection>,
    /// Of no events: it counts the keepers.
    journal: Journal,
    register: Mutex<Register>,
    layers: Vec<Arc<LazyLayer>>,
    keeper: Keeper,
    /// Readable when the thread is to end.
    stop: OwnedFd,
    stopping: AtomicBool,
}

impl Survival {
    /// Starts a keeper.
    pub(super) fn start(
        connection: &Arc<Connection>,
        layers: &[Arc<LazyLayer>],
        options: &PagerOptions,
    ) -> Result<Self, PagerError> {
        let journal = Journal::create(1).map_err(PagerError::Journal)?;
        let register = Register::create(&options.register)?;
        if let Some(note) = &options.note {
            register.note(note)?;
        }
        Self::run(connection, journal, register, layers, options).map_err(|(register, error)| {
            register.remove();
            error
        })
    }

    /// Starts a keeper in the place of the one that was inherited from.
    pub(super) fn resume(
        connection: &Arc<Connection>,
        journal: Journal,
        register: OwnedFd,
        layers: &[Arc<LazyLayer>],
        options: &PagerOptions,
    ) -> Result<Self, PagerError> {
        let register = Register::attach(&options.register, register)?;
        Self::run(connection, journal, register, layers, options).map_err(|(_, error)| error)
    }

    fn run(
        connection: &Arc<Connection>,
        journal: Journal,
        register: Register,
        layers: &[Arc<LazyLayer>],
        options: &PagerOptions,
    ) -> Result<Self, (Register, PagerError)> {
        let start = || {
            let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
            let stop = stop.map_err(|errno| PagerError::Threads(errno.into()))?;
            let files = kept_files(layers).map_err(PagerError::DataFile)?;
            Ok((stop, Keeper::start(&kept(connection, &journal, &register), files, options)?))
        };
        let (stop, keeper) = match start() {
            Ok(started) => started,
            Err(error) => return Err((register, error)),
        };
        let inner = Arc::new(Inner {
            connection: Arc::clone(connection),
            journal,
            register: Mutex::new(register),
            layers: layers.to_vec(),
            keeper,
            stop,
            stopping: AtomicBool::new(false),
        });
        let mut survival = Self { inner: Arc::clone(&inner), keeping: None };
        let thread = std::thread::Builder::new().name("loris-keeping".to_owned());
        match thread.spawn(move || inner.keep_keeper()) {
            Ok(thread) => survival.keeping = Some(thread),
            // Mounts survive one of the two; that the other is not started again is no reason to refuse them.
            Err(error) => tracing::warn!(%error, "a keeper that is killed will not be started again"),
        }
        Ok(survival)
    }

    /// Notes at which directories the mount over the devices is to be found, for those who have to take it down where
    /// all processes were killed.
    pub(super) fn attached(&self, mountpoints: &[PathBuf]) -> Result<(), PagerError> {
        let mut register = self.inner.register();
        Ok(mountpoints.iter().try_for_each(|mountpoint| register.add(mountpoint))?)
    }
}

impl Drop for Survival {
    fn drop(&mut self) {
        self.inner.stopping.store(true, Ordering::SeqCst);
        // Whoever still reads is served for as long as this process lives, and refused by the kernel after that.
        self.inner.keeper.leave(false);
        self.inner.register().remove();
        let _ = rustix::io::write(&self.inner.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.keeping.take() {
            let _ = thread.join();
        }
    }
}

impl Inner {
    /// Is the thread that starts a new keeper where the old one was killed.
    fn keep_keeper(&self) {
        self.keeper.attend(&self.stop, &self.stopping, || {
            let register = self.register();
            self.keeper.replace(&kept(&self.connection, &self.journal, &register), || kept_files(&self.layers))
        });
    }

    fn register(&self) -> MutexGuard<'_, Register> {
        self.register.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn kept<'a>(connection: &'a Connection, journal: &'a Journal, register: &'a Register) -> Kept<'a> {
    Kept { asks: Asks::Requests { connection: connection.as_fd() }, journal, register: register.descriptor() }
}

/// The files that hold the layers' places in the store while nobody serves them.
fn kept_files(layers: &[Arc<LazyLayer>]) -> io::Result<Vec<(u64, [File; 2])>> {
    let clone = |(key, layer): (u64, &Arc<LazyLayer>)| {
        let [data, lock] = layer.kept_files();
        Ok((key, [data.try_clone()?, lock.try_clone()?]))
    };
    (1..).zip(layers).map(clone).collect()
}

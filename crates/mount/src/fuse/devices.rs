//! The data files of layers, as files of a FUSE mount that stands nowhere: what EROFS reads where the kernel has no way
//! to wait for a range of a local file.
//!
//! | path | content |
//! |---|---|
//! | `/0`, `/1`, ... | a device each, in the order in which they were given |
//!
//! The mount is never attached: EROFS opens the files through a descriptor ([`DeviceMount::path`]), and holds the mount
//! by them. So it is in nobody's list of mounts, needs no directory, and goes with the EROFS, whoever unmounts that, also
//! where this process was killed. What the kernel reads after that fails; it never reads zeros. Where it is to
//! [survive](survival) that, readers wait for a successor.
//!
//! A device is read past its page cache ([`FopenFlags::FOPEN_DIRECT_IO`]), since EROFS has one of its own in front. The
//! kernel asks for what EROFS reads at once: at most 128 KiB, its default readahead.
//!
//! A device ends at a multiple of [`BLOCK`], with zeros behind the data: EROFS reads whole blocks, and takes a short
//! answer for zeros.

use std::{
    cell::RefCell,
    fs::OpenOptions,
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use loris_format::position::{DataOffset, DataRange};
use loris_lazy::{LazyLayer, ReadError};
use rustix::{io::Errno, mount::MountAttrFlags};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};

use self::{
    survival::Survival,
    wire::{Attributes, Connection, Question, REQUEST_BYTES, Request},
};
use super::{
    DEVICE, GOODBYE, MAX_BACKGROUND, MAX_FETCHES, MAX_READ,
    content::{BLOCK, errno},
};
use crate::{
    MOUNT_NAME,
    fsopen::{Context, Refusal},
    keeper::{Asking, Inherited, dismiss},
    pager::{OnDeath, PagerError, PagerOptions},
};

mod survival;
pub(crate) mod wire;

/// What a device holds.
pub(crate) enum Device {
    /// The data file of a layer, filled by tasks on the runtime.
    Layer(Arc<LazyLayer>, Handle),
    /// These bytes.
    Bytes(Vec<u8>),
}

impl Device {
    fn length(&self) -> u64 {
        let length = match self {
            Self::Layer(layer, _) => layer.index().data_length(),
            Self::Bytes(bytes) => bytes.len() as u64,
        };
        // Data files end far below 2^64; EROFS itself counts blocks in 32 or 48 bits.
        length.next_multiple_of(u64::from(BLOCK))
    }
}

/// Devices that are served. Dropping it ends that, see [`DeviceMount::stop`].
#[derive(Debug)]
pub(crate) struct DeviceMount {
    /// `None` once nobody is to open a device any more.
    root: Option<OwnedFd>,
    connection: Arc<Connection>,
    /// Whether a successor could go on.
    can_resend: bool,
    stop: watch::Sender<bool>,
    ended: watch::Receiver<bool>,
    survival: Option<Survival>,
}

impl DeviceMount {
    /// Serves devices on so many threads. Needs the right to mount.
    pub(crate) fn serve(devices: Vec<Device>, threads: usize) -> Result<Self, Refusal> {
        let device = OpenOptions::new().read(true).write(true).open(DEVICE).map_err(|source| Refusal {
            detail: format!("; {DEVICE}: {}", crate::probe::fuse_device_remedy(&source)),
            source,
        })?;
        let context = Context::open("fuse")?;
        context.set("source", MOUNT_NAME.as_bytes())?;
        context.set("subtype", MOUNT_NAME.as_bytes())?;
        context.set("fd", device.as_raw_fd().to_string().as_bytes())?;
        // S_IFDIR: what stands at the root.
        context.set("rootmode", b"40000")?;
        context.set("user_id", rustix::process::getuid().as_raw().to_string().as_bytes())?;
        context.set("group_id", rustix::process::getgid().as_raw().to_string().as_bytes())?;
        // Whoever reads the EROFS reads through its open files, on behalf of whomever.
        context.set_flag("allow_other")?;
        context.set_flag("ro")?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let root = context.mount(attributes)?;
        let connection = Connection::new(device.into());
        let failed = |source| Refusal { source, detail: "; handshake of FUSE".to_owned() };
        let agreed = connection.handshake(MAX_READ, MAX_BACKGROUND).map_err(failed)?;
        Self::start(Some(root), connection, agreed.resend, devices, threads).map_err(failed)
    }

    /// Goes on where a killed process was. `layers` are those that it served, as its devices, in the same order.
    ///
    /// # Errors
    /// The old keeper stays as it is then, and starts another successor when this process ends.
    pub(crate) fn resume(
        inherited: Inherited,
        layers: &[Arc<LazyLayer>],
        options: &PagerOptions,
        threads: usize,
        runtime: &Handle,
    ) -> Result<Self, PagerError> {
        let Inherited { asking, journal, register, files: _, keeper } = inherited;
        let Asking::Requests { connection } = asking else {
            return Err(PagerError::Keeper(io::Error::new(io::ErrorKind::InvalidData, "it kept no devices")));
        };
        let devices = layers.iter().map(|layer| Device::Layer(Arc::clone(layer), runtime.clone())).collect();
        let connection = Connection::new(connection);
        // Before anything is read by this process, which would be sent to it twice.
        connection.resend().map_err(PagerError::Connection)?;
        let mut mount = Self::start(None, connection, true, devices, threads).map_err(PagerError::Threads)?;
        mount.survival = Some(Survival::resume(&mount.connection, journal, register, layers, options)?);
        // Only now does the old keeper know of nobody to care for.
        dismiss(&keeper);
        Ok(mount)
    }

    fn start(
        root: Option<OwnedFd>,
        connection: Connection,
        can_resend: bool,
        devices: Vec<Device>,
        threads: usize,
    ) -> io::Result<Self> {
        let connection = Arc::new(connection);
        let (stop, stopped) = watch::channel(false);
        let (alive, ended) = watch::channel(false);
        let devices = Arc::new(Devices { devices, fetches: Semaphore::new(MAX_FETCHES), stop: stopped });
        let alive = Arc::new(Alive(alive));
        for number in 0..threads.max(1) {
            let (connection, devices, alive) = (Arc::clone(&connection), Arc::clone(&devices), Arc::clone(&alive));
            let thread = std::thread::Builder::new().name(format!("loris-devices-{number}"));
            thread.spawn(move || {
                if let Err(error) = serve(&connection, &devices) {
                    tracing::error!(%error, "a thread that serves devices has ended");
                }
                drop(alive);
            })?;
        }
        Ok(Self { root, connection, can_resend, stop, ended, survival: None })
    }

    /// Lets the devices outlive this process, where `options` say that a successor is to be started, and the kernel can
    /// ask it again what it had asked this process. `layers` are the devices.
    pub(crate) fn survive(&mut self, layers: &[Arc<LazyLayer>], options: &PagerOptions) -> Result<(), PagerError> {
        if !matches!(options.on_death, OnDeath::Restart(_)) {
            return Ok(());
        }
        if !self.can_resend {
            tracing::info!("the mount will not outlive this process: that takes Linux 6.9, or another engine");
            return Ok(());
        }
        self.survival = Some(Survival::start(&self.connection, layers, options)?);
        Ok(())
    }

    /// Notes at which directories what is mounted over the devices is to be found, the uppermost first.
    pub(crate) fn attached(&self, mountpoints: &[PathBuf]) -> Result<(), PagerError> {
        self.survival.as_ref().map_or(Ok(()), |survival| survival.attached(mountpoints))
    }

    /// Returns a way to a device: for this process, and before [`DeviceMount::seal`]; afterwards it leads nowhere.
    pub(crate) fn path(&self, number: usize) -> PathBuf {
        let root = self.root.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        format!("/proc/self/fd/{root}/{number}").into()
    }

    /// Lets go of the mount: from now on it lives for as long as somebody has a device open.
    pub(crate) fn seal(&mut self) {
        self.root = None;
    }

    /// Waits until nobody has a device open any more.
    pub(crate) async fn ended(&self) {
        // An error means that the threads have ended.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Ends the serving of content that is not here: such reads fail from now on. What is here is served for as long as
    /// somebody has a device open. Waits a moment for the last user to let go, where `whole` says that there is none.
    pub(crate) fn stop(&self, whole: bool) {
        let end = Instant::now() + GOODBYE;
        while whole && !*self.ended.borrow() {
            if Instant::now() > end {
                tracing::debug!("devices are still in use");
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.stop.send_replace(true);
    }
}

impl Drop for DeviceMount {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// Says that all threads have ended, when the last of them has.
struct Alive(watch::Sender<bool>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

struct Devices {
    devices: Vec<Device>,
    fetches: Semaphore,
    stop: watch::Receiver<bool>,
}

impl Devices {
    /// Returns a device and the part of it that a read covers; `None` behind its end.
    fn part(&self, node: u64, offset: u64, size: u32) -> Result<Option<(&Device, DataRange)>, Errno> {
        let device = self.device(node).ok_or(Errno::NOENT)?;
        let end = offset.saturating_add(size.into()).min(device.length());
        Ok((offset < end).then_some((device, DataOffset(offset)..DataOffset(end))))
    }

    fn device(&self, node: u64) -> Option<&Device> {
        self.devices.get(usize::try_from(node.checked_sub(FIRST)?).ok()?)
    }

    fn attributes(&self, node: u64) -> Result<Attributes, Errno> {
        if node == ROOT {
            return Ok(Attributes { node, size: 0, mode: libc::S_IFDIR | 0o500, links: 2 });
        }
        let size = self.device(node).ok_or(Errno::NOENT)?.length();
        Ok(Attributes { node, size, mode: libc::S_IFREG | 0o400, links: 1 })
    }

    /// Returns what stands at a name of a directory.
    fn lookup(&self, directory: u64, name: &[u8]) -> Result<Attributes, Errno> {
        let number = std::str::from_utf8(name).ok().and_then(|name| name.parse::<u64>().ok());
        let node = number.filter(|_| directory == ROOT).and_then(|number| number.checked_add(FIRST));
        self.attributes(node.ok_or(Errno::NOENT)?)
    }

    /// Fills a range of a layer and reads it: waits for the network, and fails when the mount is being taken down.
    async fn fetch(&self, layer: &Arc<LazyLayer>, range: DataRange) -> Result<Vec<u8>, Errno> {
        let mut stop = self.stop.clone();
        let read = async {
            // Never closed: an error would only let one more fetch begin.
            let _permit = self.fetches.acquire().await;
            layer.ensure(range.clone()).await?;
            // Not before here, so that there are few of these at any time.
            let mut buffer = Vec::new();
            match read_if_filled(layer, &range, &mut buffer) {
                Some(_) => Ok(buffer),
                // A stranger cut the data file. The layer repairs it, or says why not.
                None => repair(layer, &range).await,
            }
        };
        tokio::select! {
            buffer = read => buffer.map_err(|error| {
                let ends = format!("{}..{}", range.start.0, range.end.0);
                tracing::error!(layer = %layer.digest(), range = ends, %error, "a read failed");
                errno(&error)
            }),
            _ = stop.wait_for(|stop| *stop) => Err(Errno::IO),
        }
    }
}

/// Reads a range of a layer's data file where all of it is there, zeros behind the end of the data. Blocks for the disk
/// alone.
fn read_if_filled<'a>(layer: &LazyLayer, range: &DataRange, buffer: &'a mut Vec<u8>) -> Option<&'a [u8]> {
    if !layer.is_filled(range) {
        return None;
    }
    let length = usize::try_from(range.end.0 - range.start.0).ok()?;
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    let bytes = &mut buffer[..length];
    let data = layer.index().data_length().saturating_sub(range.start.0);
    let data = usize::try_from(data).map_or(length, |data| data.min(length));
    // An error of the disk is met again, and told, where it is waited for.
    let read = layer.read_filled(range.start, &mut bytes[..data]).ok()?;
    bytes[data..].fill(0);
    (read == data).then_some(bytes)
}

/// Reads a range file by file, as the layer does where its data file is not to be trusted.
async fn repair(layer: &Arc<LazyLayer>, range: &DataRange) -> Result<Vec<u8>, ReadError> {
    let start = range.start.0;
    let mut buffer = vec![0; usize::try_from(range.end.0 - start).unwrap_or(0)];
    for extent in layer.index().extents_in(range).map(|number| &layer.index().extents()[number]) {
        let first = extent.data.0.max(start);
        let last = extent.data.0.saturating_add(extent.length).min(range.end.0);
        let at = loris_format::position::FileOffset(extent.file_offset.0 + (first - extent.data.0));
        // Both are inside the range, whose length is that of the buffer.
        let place = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
        if let Some(part) = buffer.get_mut(place(first)..place(last)) {
            layer.read(extent.node, at, part).await?;
        }
    }
    Ok(buffer)
}

/// The node of the root.
const ROOT: u64 = 1;
/// The node of the first device.
const FIRST: u64 = 2;

/// A request that was read. Dropped without an answer, it is refused: no reader waits for ever.
struct Reply {
    connection: Arc<Connection>,
    unique: u64,
    is_answered: bool,
}

impl Reply {
    fn send(mut self, answer: Result<&[u8], Errno>) {
        self.is_answered = true;
        if let Err(error) = self.connection.answer(self.unique, answer) {
            tracing::error!(%error, "a reader could not be answered");
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.is_answered {
            let _ = self.connection.answer(self.unique, Err(Errno::IO));
        }
    }
}

thread_local! {
    /// Where content is read to: at most [`MAX_READ`] bytes for each thread.
    static CONTENT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Is a thread that answers requests until the connection ends.
fn serve(connection: &Arc<Connection>, devices: &Arc<Devices>) -> io::Result<()> {
    // Written to now: a page fault inside the kernel's copy, while this process is being killed, would make it refuse
    // the request.
    let mut buffer = vec![0xff; REQUEST_BYTES];
    while let Some(length) = connection.read(&mut buffer)? {
        match Request::parse(&buffer[..length]) {
            Ok(request) => answer(connection, devices, &request),
            // It has no number that an answer could have.
            Err(error) => tracing::error!(%error, "the kernel sent what is not understood"),
        }
    }
    Ok(())
}

fn answer(connection: &Arc<Connection>, devices: &Arc<Devices>, request: &Request<'_>) {
    let Request { unique, node, question } = *request;
    if question == Question::Notice {
        return;
    }
    let reply = Reply { connection: Arc::clone(connection), unique, is_answered: false };
    let write_access = (libc::O_WRONLY | libc::O_RDWR).cast_unsigned();
    let answer = match question {
        Question::Lookup(name) => devices.lookup(node, name).map(Attributes::entry),
        Question::Attributes => devices.attributes(node).map(Attributes::answer),
        Question::Open(flags) if flags & write_access != 0 => Err(Errno::ROFS),
        Question::Open(_) => Ok(wire::opened()),
        Question::Release => Ok(Vec::new()),
        Question::Read { offset, size } => return read(devices, node, (offset, size.min(MAX_READ)), reply),
        // In FUSE, this says that the kernel need not ask again.
        Question::Init { .. } | Question::Notice | Question::Other => Err(Errno::NOSYS),
    };
    reply.send(answer.as_deref().map_err(|errno| *errno));
}

fn read(devices: &Arc<Devices>, node: u64, (offset, size): (u64, u32), reply: Reply) {
    let (device, range) = match devices.part(node, offset, size) {
        Ok(Some(part)) => part,
        Ok(None) => return reply.send(Ok(&[])),
        Err(errno) => return reply.send(Err(errno)),
    };
    let (layer, runtime) = match device {
        Device::Layer(layer, runtime) => (layer, runtime),
        Device::Bytes(bytes) => return reply.send(Ok(&slice(bytes, &range))),
    };
    let unanswered = CONTENT.with_borrow_mut(|buffer| match read_if_filled(layer, &range, buffer) {
        Some(bytes) => {
            reply.send(Ok(bytes));
            None
        }
        None => Some(reply),
    });
    if let Some(reply) = unanswered {
        let (devices, layer) = (Arc::clone(devices), Arc::clone(layer));
        // Where the runtime is gone, the task is dropped at once, and the reply with it.
        runtime.spawn(async move {
            let read = devices.fetch(&layer, range).await;
            reply.send(read.as_deref().map_err(|errno| *errno));
        });
    }
}

/// A range of bytes, with zeros behind their end.
fn slice(bytes: &[u8], range: &DataRange) -> Vec<u8> {
    let place = |offset: DataOffset| usize::try_from(offset.0).unwrap_or(usize::MAX).min(bytes.len());
    let mut part = bytes[place(range.start)..place(range.end)].to_vec();
    part.resize(usize::try_from(range.end.0 - range.start.0).unwrap_or(0), 0);
    part
}

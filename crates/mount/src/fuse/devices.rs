//! The data files of layers, as files of a FUSE mount that stands nowhere: what EROFS reads where the kernel has no way
//! to wait for a range of a local file.
//!
//! | path | content |
//! |---|---|
//! | `/0`, `/1`, ... | a device each, in the order in which they were given |
//!
//! The mount is never attached: EROFS opens the files through a descriptor ([`DeviceMount::path`]), and holds the mount
//! by them. So it is in nobody's list of mounts, needs no directory, and goes with the EROFS, whoever unmounts that, also
//! where this process was killed. What the kernel reads after that fails; it never reads zeros.
//!
//! A device is read past its page cache ([`FopenFlags::FOPEN_DIRECT_IO`]), since EROFS has one of its own in front. The
//! kernel asks for what EROFS reads at once: at most 128 KiB, its default readahead.
//!
//! A device ends at a multiple of [`BLOCK`], with zeros behind the data: EROFS reads whole blocks, and takes a short
//! answer for zeros.

use std::{
    ffi::OsStr,
    fs::OpenOptions,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::PathBuf,
    sync::{Arc, mpsc},
    time::UNIX_EPOCH,
};

use fuser::{
    FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};
use loris_format::position::{DataOffset, DataRange};
use loris_lazy::{LazyLayer, ReadError};
use rustix::{io::Errno, mount::MountAttrFlags};
use tokio::{
    runtime::Handle,
    sync::{Semaphore, watch},
};

use super::{
    DEVICE, FOR_EVER, GOODBYE, MAX_BACKGROUND, MAX_FETCHES, MAX_READ,
    content::{BLOCK, errno},
    start,
};
use crate::{
    MOUNT_NAME,
    fsopen::{Context, Refusal},
};

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
    stop: watch::Sender<bool>,
    session: mpsc::Receiver<()>,
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
        let (stop, stopped) = watch::channel(false);
        let served = Arc::new(Devices { devices, fetches: Semaphore::new(MAX_FETCHES), stop: stopped });
        let session = super::protocol::session(Served(served), device.into(), threads).and_then(start);
        let (_, session) = session.map_err(|source| Refusal { source, detail: "; handshake of FUSE".to_owned() })?;
        Ok(Self { root: Some(root), stop, session })
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

    /// Ends the serving of content that is not here: such reads fail from now on. What is here is served for as long as
    /// somebody has a device open. Waits a moment for the last user to let go, where `whole` says that there is none.
    pub(crate) fn stop(&mut self, whole: bool) {
        self.seal();
        // Nobody ever sends: this waits for the other end to go.
        if whole && self.session.recv_timeout(GOODBYE) == Err(mpsc::RecvTimeoutError::Timeout) {
            tracing::debug!("devices are still in use");
        }
        self.stop.send_replace(true);
    }
}

impl Drop for DeviceMount {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

struct Devices {
    devices: Vec<Device>,
    fetches: Semaphore,
    stop: watch::Receiver<bool>,
}

impl Devices {
    /// Returns a device and the part of it that a read covers; `None` behind its end.
    fn part(&self, number: INodeNo, offset: u64, size: u32) -> Result<Option<(&Device, DataRange)>, Errno> {
        let device = self.device(number).ok_or(Errno::NOENT)?;
        let end = offset.saturating_add(size.into()).min(device.length());
        Ok((offset < end).then_some((device, DataOffset(offset)..DataOffset(end))))
    }

    fn device(&self, number: INodeNo) -> Option<&Device> {
        self.devices.get(usize::try_from(number.0.checked_sub(FIRST)?).ok()?)
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

/// The inode number of the first device; the root is 1.
const FIRST: u64 = 2;

struct Served(Arc<Devices>);

impl Served {
    fn attributes(&self, number: INodeNo) -> Option<FileAttr> {
        let (kind, size, perm, nlink) = match number {
            INodeNo::ROOT => (FileType::Directory, 0, 0o500, 2),
            _ => (FileType::RegularFile, self.0.device(number)?.length(), 0o400, 1),
        };
        Some(FileAttr {
            ino: number,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: BLOCK,
            flags: 0,
        })
    }
}

impl Filesystem for Served {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // What the kernel offers: reads past the page cache that do not wait for one another.
        if config.capabilities().contains(InitFlags::FUSE_ASYNC_DIO) {
            let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        }
        // Errors tell of values that are too large or too small. The kernel bounds these again by itself.
        let _ = config.set_max_write(MAX_READ);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3);
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let number = (parent == INodeNo::ROOT)
            .then(|| std::str::from_utf8(name.as_bytes()).ok()?.parse::<u64>().ok()?.checked_add(FIRST))
            .flatten();
        match number.and_then(|number| self.attributes(INodeNo(number))) {
            Some(attributes) => reply.entry(&FOR_EVER, &attributes, Generation(0)),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(number) {
            Some(attributes) => reply.attr(&FOR_EVER, &attributes),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }

    fn open(&self, _request: &Request, _number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() == OpenAccMode::O_RDONLY {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
        } else {
            reply.error(fuser::Errno::EROFS);
        }
    }

    fn read(
        &self,
        _request: &Request,
        number: INodeNo,
        _handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let (device, range) = match self.0.part(number, offset, size) {
            Ok(Some(part)) => part,
            Ok(None) => return reply.data(&[]),
            Err(errno) => return reply.error(fuser::Errno::from_i32(errno.raw_os_error())),
        };
        let (layer, runtime) = match device {
            Device::Layer(layer, runtime) => (layer, runtime),
            Device::Bytes(bytes) => return reply.data(&slice(bytes, &range)),
        };
        let answered = super::protocol::with_buffer(|buffer| match read_if_filled(layer, &range, buffer) {
            Some(bytes) => {
                reply.data(bytes);
                None
            }
            None => Some(reply),
        });
        if let Some(reply) = answered {
            let (devices, layer) = (Arc::clone(&self.0), Arc::clone(layer));
            // Where the runtime is gone, the task is dropped at once, and the reply, dropped with it, answers `EIO`.
            runtime.spawn(async move {
                match devices.fetch(&layer, range).await {
                    Ok(bytes) => reply.data(&bytes),
                    Err(errno) => reply.error(fuser::Errno::from_i32(errno.raw_os_error())),
                }
            });
        }
    }
}

/// A range of bytes, with zeros behind their end.
fn slice(bytes: &[u8], range: &DataRange) -> Vec<u8> {
    let place = |offset: DataOffset| usize::try_from(offset.0).unwrap_or(usize::MAX).min(bytes.len());
    let mut part = bytes[place(range.start)..place(range.end)].to_vec();
    part.resize(usize::try_from(range.end.0 - range.start.0).unwrap_or(0), 0);
    part
}

//! The FUSE protocol: the kernel's questions, answered out of a tree. The only file that knows the FUSE crate.
//!
//! The protocol is described in fuse(4) and the kernel's `include/uapi/linux/fuse.h`. `ENOSYS` is an answer of its own
//! there: the kernel does not ask again, and does what makes sense without.

use std::{
    cell::RefCell,
    ffi::OsStr,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    sync::Arc,
};

use fuser::{
    AccessFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
    Session, SessionACL,
};
use loris_format::tree::{Inode, InodeId, InodeKind};

use super::{
    FOR_EVER, MAX_BACKGROUND, MAX_READ, attributes,
    content::{BLOCK, Piece, Served},
};

/// Longest name, in bytes: `NAME_MAX`.
const NAME_BYTES: u32 = 255;
/// Inode numbers are never given to a second inode.
const GENERATION: Generation = Generation(0);

thread_local! {
    /// Where a FUSE thread reads content to: at most [`MAX_READ`] bytes for each thread.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Lends the buffer of a FUSE thread.
fn with_buffer<T>(work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    BUFFER.with_borrow_mut(work)
}

/// Agrees with the kernel about the protocol. What is returned serves a tree until it is unmounted, on `threads`
/// threads.
pub(super) fn handshake(
    served: Arc<Served>,
    device: OwnedFd,
    threads: usize,
) -> io::Result<impl FnOnce() -> io::Result<()> + Send + 'static> {
    let mut config = Config::default();
    config.n_threads = Some(threads);
    // Not one descriptor a thread: requests that such a clone has read die with it, and a later version hands the
    // connection over to another process.
    config.clone_fd = false;
    // Who may enter is the kernel's to check, by `allow_other` and `default_permissions`.
    let session = Session::from_fd(Protocol { served, kernel: InitFlags::empty() }, device, SessionACL::All, config)?;
    Ok(move || session.run())
}

struct Protocol {
    served: Arc<Served>,
    /// What the kernel can do.
    kernel: InitFlags,
}

impl Protocol {
    fn inode(&self, number: INodeNo) -> Option<(InodeId, &Inode)> {
        let id = InodeId(number.0);
        Some((id, self.served.tree.inode(id)?))
    }

    /// Calls `add` with the entries of a directory from the cookie `offset` on, until it returns `true` (full): number,
    /// next cookie, name, inode. A cookie is a place in `.`, `..` and the sorted children, so that it stays valid for
    /// as long as the tree does.
    fn each_entry(
        &self,
        directory: INodeNo,
        offset: u64,
        mut add: impl FnMut(InodeId, u64, &OsStr, &Inode) -> bool,
    ) -> Result<(), Errno> {
        let tree = &self.served.tree;
        let (id, inode) = self.inode(directory).ok_or(Errno::ENOENT)?;
        if !matches!(inode.kind, InodeKind::Directory) {
            return Err(Errno::ENOTDIR);
        }
        let dots = [(&b"."[..], id), (b"..", tree.parent(id))];
        let children = tree.children(id).iter().map(|(name, child)| (name.as_ref(), *child));
        let place = usize::try_from(offset).unwrap_or(usize::MAX);
        // `skip` on the slices, not one by one: a directory of 10^5 entries is read in hundreds of pieces.
        let entries = dots.into_iter().skip(place).chain(children.skip(place.saturating_sub(dots.len())));
        for (cookie, (name, child)) in (offset.saturating_add(1)..).zip(entries) {
            // The tree is sound: the name leads somewhere.
            let Some(inode) = tree.inode(child) else { continue };
            if add(child, cookie, OsStr::from_bytes(name), inode) {
                break;
            }
        }
        Ok(())
    }
}

impl Filesystem for Protocol {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        self.kernel = config.capabilities();
        let mut wanted = InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_EXPLICIT_INVAL_DATA
            // overlayfs remembers where a file came from by its handle, and finds its inode number again by it.
            | InitFlags::FUSE_EXPORT_SUPPORT;
        if self.served.totals.acls {
            wanted |= InitFlags::FUSE_POSIX_ACL;
        }
        for feature in (wanted & self.kernel).iter() {
            // Offered, as was just looked up.
            let _ = config.add_capabilities(feature);
        }
        // Errors tell of values that are too large or too small. The kernel bounds these again by itself.
        let _ = config.set_max_write(MAX_READ);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let _ = config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3);
        // Readahead stays what the kernel offers (128 KiB): a page fault in a shared library reads that much around
        // it, and all of it would have to be fetched. Going ahead further is the lazy layer's policy.
        Ok(())
    }

    fn lookup(&self, _request: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let tree = &self.served.tree;
        let found = match name.as_bytes() {
            // Only asked where a handle is resolved (FUSE_EXPORT_SUPPORT).
            b"." => Some(InodeId(parent.0)),
            b".." => Some(tree.parent(InodeId(parent.0))),
            name => tree.child(InodeId(parent.0), name),
        };
        match found.and_then(|id| Some((id, tree.inode(id)?))) {
            Some((id, inode)) => reply.entry(&FOR_EVER, &file_attributes(id, inode), GENERATION),
            // Inode number 0 says that there is nothing, and that this may be cached too.
            None => reply.entry(&FOR_EVER, &NOTHING, GENERATION),
        }
    }

    fn getattr(&self, _request: &Request, number: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        match self.inode(number) {
            Some((id, inode)) => reply.attr(&FOR_EVER, &file_attributes(id, inode)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readlink(&self, _request: &Request, number: INodeNo, reply: ReplyData) {
        match self.inode(number).map(|(_, inode)| &inode.kind) {
            Some(InodeKind::Symlink { target }) => reply.data(target),
            Some(_) => reply.error(Errno::EINVAL),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _request: &Request, _number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            reply.error(Errno::EROFS);
        } else if self.kernel.contains(InitFlags::FUSE_NO_OPEN_SUPPORT) {
            // From now on the kernel opens and closes by itself, and keeps what it has cached.
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
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
        let served = &self.served;
        let piece = match served.piece(InodeId(number.0), offset, size) {
            Ok(Some(piece)) => piece,
            Ok(None) => return reply.data(&[]),
            Err(errno) => return reply.error(errno_of(errno)),
        };
        with_buffer(|buffer| match piece.read_if_filled(buffer) {
            Some(bytes) => reply.data(bytes),
            None => answer_later(served, piece, reply),
        });
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn opendir(&self, _request: &Request, _number: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.kernel.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT) {
            // As for open; the kernel caches listings then.
            reply.error(Errno::ENOSYS);
        } else {
            reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
        }
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let listed = self.each_entry(number, offset, |id, cookie, name, inode| {
            reply.add(INodeNo(id.0), cookie, file_type(inode), name)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn readdirplus(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectoryPlus) {
        let listed = self.each_entry(number, offset, |id, cookie, name, inode| {
            reply.add(INodeNo(id.0), cookie, name, &FOR_EVER, &file_attributes(id, inode), GENERATION)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn statfs(&self, _request: &Request, _number: INodeNo, reply: ReplyStatfs) {
        let totals = self.served.totals;
        reply.statfs(totals.blocks, 0, 0, totals.inodes, 0, BLOCK, NAME_BYTES, BLOCK);
    }

    fn getxattr(&self, _request: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.served.totals.xattrs {
            // The kernel asks for some at every look-up through overlayfs, and for one at every exec. Where no file
            // has any, it is told never to ask again.
            return reply.error(Errno::ENOSYS);
        }
        let Some((_, inode)) = self.inode(number) else { return reply.error(Errno::ENOENT) };
        match inode.xattrs.binary_search_by(|(other, _)| other.as_ref().cmp(name.as_bytes())) {
            Ok(place) => answer_xattr(&inode.xattrs[place].1, size, reply),
            Err(_) => reply.error(Errno::ENODATA),
        }
    }

    fn listxattr(&self, _request: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        if !self.served.totals.xattrs {
            return reply.error(Errno::ENOSYS);
        }
        let Some((_, inode)) = self.inode(number) else { return reply.error(Errno::ENOENT) };
        let names = inode.xattrs.iter().flat_map(|(name, _)| name.iter().copied().chain([0]));
        answer_xattr(&names.collect::<Vec<u8>>(), size, reply);
    }

    fn access(&self, _request: &Request, _number: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        // `default_permissions`: the kernel decides by mode and owner.
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _request: &Request,
        _number: INodeNo,
        _handle: FileHandle,
        _flags: IoctlFlags,
        _command: u32,
        _input: &[u8],
        _output_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _offset: i64, _whence: i32, reply: ReplyLseek) {
        // Files have no holes; the kernel answers so by itself.
        reply.error(Errno::ENOSYS);
    }
}

/// Answers a read when its content is there. Where the runtime is gone, the task is dropped at once, and the reply,
/// dropped with it, answers `EIO`.
fn answer_later(served: &Arc<Served>, piece: Piece, reply: ReplyData) {
    let served = Arc::clone(served);
    let runtime = served.runtime.clone();
    runtime.spawn(async move {
        match served.fetch(&piece).await {
            Ok(bytes) => reply.data(&bytes),
            Err(errno) => reply.error(errno_of(errno)),
        }
    });
}

/// Answers as getxattr(2) and listxattr(2) do: the length where `size` is 0.
fn answer_xattr(bytes: &[u8], size: u32, reply: ReplyXattr) {
    match u32::try_from(bytes.len()) {
        Ok(length) if size == 0 => reply.size(length),
        Ok(length) if length <= size => reply.data(bytes),
        _ => reply.error(Errno::ERANGE),
    }
}

fn errno_of(errno: rustix::io::Errno) -> Errno {
    Errno::from_i32(errno.raw_os_error())
}

fn file_type(inode: &Inode) -> FileType {
    match inode.kind {
        InodeKind::Directory => FileType::Directory,
        InodeKind::Regular { .. } => FileType::RegularFile,
        InodeKind::Symlink { .. } => FileType::Symlink,
        InodeKind::CharDevice { .. } => FileType::CharDevice,
        InodeKind::BlockDevice { .. } => FileType::BlockDevice,
        InodeKind::Fifo => FileType::NamedPipe,
    }
}

/// Images have one time a file; all times of an inode are that one.
fn file_attributes(id: InodeId, inode: &Inode) -> FileAttr {
    let time = attributes::time(inode.mtime);
    FileAttr {
        ino: INodeNo(id.0),
        size: attributes::size(inode),
        blocks: attributes::blocks(inode),
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(inode),
        perm: inode.permissions & 0o7777,
        nlink: inode.link_count,
        uid: inode.uid,
        gid: inode.gid,
        rdev: attributes::device(inode),
        blksize: BLOCK,
        flags: 0,
    }
}

/// No inode.
const NOTHING: FileAttr = FileAttr {
    ino: INodeNo(0),
    size: 0,
    blocks: 0,
    atime: std::time::UNIX_EPOCH,
    mtime: std::time::UNIX_EPOCH,
    ctime: std::time::UNIX_EPOCH,
    crtime: std::time::UNIX_EPOCH,
    kind: FileType::RegularFile,
    perm: 0,
    nlink: 0,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: 0,
    flags: 0,
};

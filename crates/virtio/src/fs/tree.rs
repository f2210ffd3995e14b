//! A directory tree of the host, read-only, as a FUSE file system.
//!
//! # Theory of operation
//!
//! `fuse-backend-rs` speaks the protocol and calls one method here for each request. Its own pass-through file
//! system is not used: it holds a descriptor for each file that the guest knows, changes the umask of the whole
//! process, fails a whole listing for one bad entry, and serves `/proc`, in which the guest would find the
//! memory of the process that runs it.
//!
//! **Read-only.** Each request that would change something is answered with EROFS, here, before any system
//! call. Nothing is ever opened for writing.
//!
//! **No way out.** A file is reached from the root by one name after the other, never through a symbolic link:
//! links are given to the guest as text, and the guest follows them in its own tree. Names with a slash, `.`
//! and `..` are refused. Only regular files and directories are opened; the type is checked on an `O_PATH`
//! descriptor, which is then the very file opened.
//!
//! **Rights** are those of the user who runs the process, as the host says; inside, the guest's kernel applies
//! owner and mode on top.
//!
//! **Other file systems** below the root are part of the tree, except those that are windows into the kernel
//! (`/proc`, `/sys`, automounts and the like): they look like empty directories. Reading there may block,
//! never end, or reveal what is not the guest's.
//!
//! Locks: `nodes`, `handles` and `devices` are each held only for a table access, never two at once and never
//! across a system call. The mutex inside a handle is held while its file or directory is read, and taken
//! before any of them.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FsOptions, OpenOptions, SetattrValid, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawDir, SeekFrom, Stat, fstat, fstatfs, fstatvfs, openat, readlinkat,
    seek, statat,
};
use rustix::io::Errno;

use super::nodes::{FileId, Nodes};

/// Most bytes of one read or listing, as negotiated with the guest (`MAX_REQ_PAGES`).
const MAX_TRANSFER: u32 = 1 << 20;
/// Bytes of directory entries taken from the host at once.
const DIR_BUFFER: usize = 32 << 10;
/// The index of a device lies in the inode number from this bit on, so that numbers differ between devices.
const DEVICE_SHIFT: u32 = 48;

/// The type bits of a mode (`S_IFMT`).
const TYPE_BITS: u32 = 0o170_000;

/// Superblock magics (`linux/magic.h`) of file systems that are windows into the kernel.
const KERNEL_FILE_SYSTEMS: [u64; 20] = [
    0x9fa0,      // proc
    0x6265_6572, // sysfs
    0x0027_e0eb, // cgroup
    0x6367_7270, // cgroup2
    0x6462_6720, // debugfs
    0x7472_6163, // tracefs
    0x7363_6673, // securityfs
    0xcafe_4a11, // bpf
    0x6265_6570, // configfs
    0x6165_676c, // pstore
    0xde5e_81e4, // efivarfs
    0x4249_4e4d, // binfmt_misc
    0xf97c_ff8c, // selinux
    0x4341_5d53, // smack
    0x6573_5543, // fusectl
    0x1cd1,      // devpts
    0x1980_0202, // mqueue
    0x6e73_6673, // nsfs
    0x0187,      // autofs
    0x0765_5821, // resctrl
];

#[derive(Debug, Clone, Copy)]
struct Device {
    /// Order in which the device was met; the root's is 0.
    index: u64,
    /// A window into the kernel.
    kernel: bool,
}

#[derive(Debug)]
enum Handle {
    File(Mutex<File>),
    Directory(Mutex<OwnedFd>),
    /// The directory of a kernel file system.
    Empty,
}

#[derive(Debug, Default)]
struct Handles {
    open: HashMap<u64, (u64, Arc<Handle>)>,
    next: u64,
}

/// The file system.
#[derive(Debug)]
pub(super) struct Tree {
    proc_self_fd: OwnedFd,
    timeout: Duration,
    max_handles: usize,
    nodes: Mutex<Nodes>,
    handles: Mutex<Handles>,
    devices: Mutex<HashMap<u64, Device>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read_only<T>() -> io::Result<T> {
    Err(Errno::ROFS.into())
}

impl Tree {
    /// The tree below `root`, an open directory. The guest may keep what it learns for `timeout`. At most
    /// about `max_fds` descriptors are open at a time.
    pub(super) fn new(root: OwnedFd, timeout: Duration, max_fds: usize) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc_self_fd = openat(rustix::fs::CWD, "/proc/self/fd", flags, Mode::empty())?;
        let stat = fstat(&root)?;
        let id = file_id(&stat);
        let device = Device { index: 0, kernel: is_kernel_fs(&root)? };
        Ok(Tree {
            proc_self_fd,
            timeout,
            max_handles: max_fds / 2,
            nodes: Mutex::new(Nodes::new(Arc::new(root), id, max_fds / 2)),
            handles: Mutex::new(Handles::default()),
            devices: Mutex::new(HashMap::from([(id.dev, device)])),
        })
    }

    /// Runs something that needs a descriptor; when the host has none left, once more without the cache.
    fn with_fds<T>(&self, mut open: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) => {
                lock(&self.nodes).evict(true);
                open()
            }
            result => result,
        }
    }

    /// An `O_PATH` descriptor of a node.
    fn path_fd(&self, node: u64) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(fd) = lock(&self.nodes).cached(node) {
            return Ok(fd);
        }
        let place = lock(&self.nodes).place(node)?;
        let fd = self.with_fds(|| {
            let mut fd = Arc::clone(&place.base);
            for name in &place.names {
                fd = Arc::new(open_path(&fd, name)?);
            }
            Ok(fd)
        });
        let fd = fd.map_err(gone)?;
        if file_id(&fstat(&*fd)?) != place.id {
            return Err(Errno::STALE);
        }
        lock(&self.nodes).cache(node, &fd);
        Ok(fd)
    }

    /// Attributes of a node.
    fn stat(&self, node: u64) -> Result<Stat, Errno> {
        if let Some(fd) = lock(&self.nodes).cached(node) {
            return fstat(&*fd);
        }
        let ((parent, name), id) = {
            let nodes = lock(&self.nodes);
            (nodes.parent(node)?, nodes.id(node)?)
        };
        let stat = stat_name(&*self.path_fd(parent)?, &name).map_err(gone)?;
        if file_id(&stat) == id { Ok(stat) } else { Err(Errno::STALE) }
    }

    /// What is known of the device of a file in a directory.
    fn device(&self, stat: &Stat, dir: &OwnedFd, name: &CStr) -> Result<Device, Errno> {
        if let Some(device) = lock(&self.devices).get(&stat.st_dev) {
            return Ok(*device);
        }
        let fd = self.with_fds(|| open_path(dir, name))?;
        if fstat(&fd)?.st_dev != stat.st_dev {
            return Err(Errno::STALE);
        }
        let kernel = is_kernel_fs(&fd)?;
        let mut devices = lock(&self.devices);
        let index = devices.len() as u64;
        Ok(*devices.entry(stat.st_dev).or_insert(Device { index, kernel }))
    }

    /// A node is part of a window into the kernel.
    fn in_kernel_fs(&self, node: u64) -> Result<bool, Errno> {
        let dev = lock(&self.nodes).id(node)?.dev;
        Ok(lock(&self.devices).get(&dev).is_none_or(|device| device.kernel))
    }

    fn find(&self, parent: u64, dir: &OwnedFd, name: &CStr) -> Result<Entry, Errno> {
        let stat = stat_name(dir, name)?;
        let device = self.device(&stat, dir, name)?;
        let inode = lock(&self.nodes).refer(file_id(&stat), parent, name)?;
        Ok(Entry {
            inode,
            attr: attributes(&stat, device),
            attr_timeout: self.timeout,
            entry_timeout: self.timeout,
            ..Entry::default()
        })
    }

    /// Opens a node for reading, if it is of this type.
    fn open_node(&self, node: u64, kind: FileType) -> Result<OwnedFd, Errno> {
        let path = self.path_fd(node)?;
        let found = FileType::from_raw_mode(fstat(&*path)?.st_mode);
        match (found == kind, kind) {
            (true, _) => {}
            (false, FileType::Directory) => return Err(Errno::NOTDIR),
            (false, _) if found == FileType::Directory => return Err(Errno::ISDIR),
            (false, _) => return Err(Errno::ACCESS),
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let number = path.as_raw_fd().to_string();
        self.with_fds(|| openat(&self.proc_self_fd, &*number, flags, Mode::empty()))
    }

    fn add_handle(&self, node: u64, handle: Handle) -> Result<u64, Errno> {
        let mut handles = lock(&self.handles);
        if handles.open.len() >= self.max_handles {
            return Err(Errno::NFILE);
        }
        handles.next += 1;
        let number = handles.next;
        handles.open.insert(number, (node, Arc::new(handle)));
        Ok(number)
    }

    fn handle(&self, node: u64, number: u64) -> Result<Arc<Handle>, Errno> {
        let handles = lock(&self.handles);
        let (_, handle) = handles.open.get(&number).filter(|(of, _)| *of == node).ok_or(Errno::BADF)?;
        Ok(Arc::clone(handle))
    }

    fn close_handle(&self, node: u64, number: u64) -> io::Result<()> {
        self.handle(node, number)?;
        lock(&self.handles).open.remove(&number);
        Ok(())
    }

    /// Calls `add` for the entries of an open directory from `offset` on, until it says `false`.
    fn list(
        &self,
        node: u64,
        handle: u64,
        offset: u64,
        add: &mut dyn FnMut(&OwnedFd, DirEntry<'_>, &CStr) -> io::Result<bool>,
    ) -> io::Result<()> {
        let handle = self.handle(node, handle)?;
        let dir = match &*handle {
            Handle::Directory(dir) => lock(dir),
            Handle::Empty => return Ok(()),
            Handle::File(_) => return Err(Errno::NOTDIR.into()),
        };
        seek(&*dir, SeekFrom::Start(offset))?;
        let mut buffer = Vec::with_capacity(DIR_BUFFER);
        let mut entries = RawDir::new(&*dir, buffer.spare_capacity_mut());
        let mut first = true;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name();
            let kind = match entry.file_type() {
                FileType::Unknown => 0,
                // DT_* are the file types of the mode, shifted.
                kind => kind.as_raw_mode() >> 12,
            };
            let dirent = DirEntry {
                ino: entry.ino(),
                offset: entry.next_entry_cookie(),
                type_: kind,
                name: name.to_bytes(),
            };
            match add(&dir, dirent, name) {
                Ok(true) => {}
                Ok(false) => break,
                // What is written already must reach the guest.
                Err(error) if first => return Err(error),
                Err(_) => break,
            }
            first = false;
        }
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn open_counts(&self) -> (usize, usize, usize) {
        let (nodes, cached) = lock(&self.nodes).counts();
        (nodes, cached, lock(&self.handles).open.len())
    }
}

fn open_path(dir: &OwnedFd, name: &CStr) -> Result<OwnedFd, Errno> {
    openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn stat_name(dir: &OwnedFd, name: &CStr) -> Result<Stat, Errno> {
    statat(dir, name, AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT)
}

/// A file is no longer where it was found: the guest shall look it up anew.
fn gone(error: Errno) -> Errno {
    if matches!(error, Errno::NOENT | Errno::NOTDIR) { Errno::STALE } else { error }
}

fn file_id(stat: &Stat) -> FileId {
    FileId { dev: stat.st_dev, ino: stat.st_ino, kind: stat.st_mode & TYPE_BITS }
}

fn is_kernel_fs(fd: &OwnedFd) -> Result<bool, Errno> {
    // The field's type differs between architectures; magics have 32 bits.
    let magic = fstatfs(fd)?.f_type as u64 & 0xffff_ffff;
    Ok(KERNEL_FILE_SYSTEMS.contains(&magic))
}

fn attributes(stat: &Stat, device: Device) -> stat64 {
    // All zero, which this type gives only as part of an entry.
    let mut out = Entry::default().attr;
    out.st_ino = stat.st_ino ^ device.index << DEVICE_SHIFT;
    out.st_dev = stat.st_dev;
    out.st_mode = stat.st_mode;
    out.st_nlink = stat.st_nlink;
    out.st_uid = stat.st_uid;
    out.st_gid = stat.st_gid;
    out.st_rdev = stat.st_rdev;
    out.st_size = stat.st_size;
    out.st_blksize = stat.st_blksize;
    out.st_blocks = stat.st_blocks;
    out.st_atime = stat.st_atime;
    out.st_mtime = stat.st_mtime;
    out.st_ctime = stat.st_ctime;
    out.st_atime_nsec = stat.st_atime_nsec as i64;
    out.st_mtime_nsec = stat.st_mtime_nsec as i64;
    out.st_ctime_nsec = stat.st_ctime_nsec as i64;
    out
}

/// Gives the protocol layer's own answer to statfs, which is otherwise not to be had.
struct Defaults;

impl FileSystem for Defaults {
    type Inode = u64;
    type Handle = u64;
}

impl FileSystem for Tree {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        Ok(FsOptions::ASYNC_READ
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::CACHE_SYMLINKS
            // Pages are dropped when the host changed the file, which is seen when attributes time out.
            | FsOptions::AUTO_INVAL_DATA)
    }

    fn destroy(&self) {
        *lock(&self.handles) = Handles::default();
        lock(&self.nodes).clear();
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let bytes = name.to_bytes();
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(Errno::INVAL.into());
        }
        let found = if self.in_kernel_fs(parent)? {
            Err(Errno::NOENT)
        } else {
            let dir = self.path_fd(parent)?;
            self.find(parent, &dir, name)
        };
        match found {
            // Node 0: the guest remembers that there is nothing.
            Err(Errno::NOENT) => Ok(Entry { entry_timeout: self.timeout, ..Entry::default() }),
            result => Ok(result?),
        }
    }

    fn forget(&self, _ctx: &Context, inode: u64, count: u64) {
        lock(&self.nodes).forget(inode, count);
    }

    fn batch_forget(&self, _ctx: &Context, requests: Vec<(u64, u64)>) {
        let mut nodes = lock(&self.nodes);
        for (inode, count) in requests {
            nodes.forget(inode, count);
        }
    }

    fn getattr(&self, _ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        let handle = handle.and_then(|number| self.handle(inode, number).ok());
        let stat = match handle.as_deref() {
            Some(Handle::File(file)) => fstat(&*lock(file))?,
            Some(Handle::Directory(dir)) => fstat(&*lock(dir))?,
            Some(Handle::Empty) | None => self.stat(inode)?,
        };
        let device = lock(&self.devices).get(&stat.st_dev).copied();
        Ok((attributes(&stat, device.unwrap_or(Device { index: 0, kernel: false })), self.timeout))
    }

    fn readlink(&self, _ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        if self.in_kernel_fs(inode)? {
            return Err(Errno::ACCESS.into());
        }
        let fd = self.path_fd(inode)?;
        Ok(readlinkat(&*fd, c"", Vec::new())?.into_bytes())
    }

    fn open(
        &self,
        _ctx: &Context,
        inode: u64,
        flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = OFlags::from_bits_retain(flags);
        if flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            return read_only();
        }
        if self.in_kernel_fs(inode)? {
            return Err(Errno::ACCESS.into());
        }
        let file = self.open_node(inode, FileType::RegularFile)?;
        let handle = self.add_handle(inode, Handle::File(Mutex::new(file.into())))?;
        Ok((Some(handle), OpenOptions::KEEP_CACHE, None))
    }

    fn read(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        w: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let handle = self.handle(inode, handle)?;
        let Handle::File(file) = &*handle else { return Err(Errno::ISDIR.into()) };
        let size = usize::try_from(size.min(MAX_TRANSFER)).unwrap_or(0);
        w.write_from(&mut *lock(file), size, offset)
    }

    fn flush(&self, _ctx: &Context, _inode: u64, _handle: u64, _lock_owner: u64) -> io::Result<()> {
        // The guest takes this as success and does not ask again.
        Err(Errno::NOSYS.into())
    }

    fn release(
        &self,
        _ctx: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.close_handle(inode, handle)
    }

    fn opendir(&self, _ctx: &Context, inode: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let handle = if self.in_kernel_fs(inode)? {
            Handle::Empty
        } else {
            Handle::Directory(Mutex::new(self.open_node(inode, FileType::Directory)?))
        };
        let handle = self.add_handle(inode, handle)?;
        Ok((Some(handle), OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list(inode, handle, offset, &mut |_, entry, _| Ok(add_entry(entry)? > 0))
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        self.list(inode, handle, offset, &mut |dir, dirent, name| {
            // An entry with node 0 is a name without attributes: for the dots, and for what cannot be had.
            let dots = matches!(name.to_bytes(), b"." | b"..");
            let found = if dots { None } else { self.find(inode, dir, name).ok() };
            let node = found.as_ref().map(|entry| entry.inode);
            let added = add_entry(dirent, found.unwrap_or_default());
            if let (Some(node), false) = (node, matches!(added, Ok(1..))) {
                lock(&self.nodes).forget(node, 1);
            }
            Ok(added? > 0)
        })
    }

    fn releasedir(&self, _ctx: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.close_handle(inode, handle)
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        let mut out = Defaults.statfs(ctx, inode)?;
        let stat = fstatvfs(&*self.path_fd(inode)?)?;
        out.f_bsize = stat.f_bsize;
        out.f_frsize = stat.f_frsize;
        out.f_blocks = stat.f_blocks;
        out.f_bfree = stat.f_bfree;
        out.f_bavail = stat.f_bavail;
        out.f_files = stat.f_files;
        out.f_ffree = stat.f_ffree;
        out.f_favail = stat.f_favail;
        out.f_namemax = stat.f_namemax;
        Ok(out)
    }

    // From here on, everything that would change the tree.

    fn setattr(
        &self,
        _ctx: &Context,
        _inode: u64,
        _attr: stat64,
        _handle: Option<u64>,
        _valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        read_only()
    }

    fn symlink(&self, _ctx: &Context, _linkname: &CStr, _parent: u64, _name: &CStr) -> io::Result<Entry> {
        read_only()
    }

    fn mknod(
        &self,
        _ctx: &Context,
        _parent: u64,
        _name: &CStr,
        _mode: u32,
        _rdev: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        read_only()
    }

    fn mkdir(
        &self,
        _ctx: &Context,
        _parent: u64,
        _name: &CStr,
        _mode: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        read_only()
    }

    fn unlink(&self, _ctx: &Context, _parent: u64, _name: &CStr) -> io::Result<()> {
        read_only()
    }

    fn rmdir(&self, _ctx: &Context, _parent: u64, _name: &CStr) -> io::Result<()> {
        read_only()
    }

    fn rename(
        &self,
        _ctx: &Context,
        _olddir: u64,
        _oldname: &CStr,
        _newdir: u64,
        _newname: &CStr,
        _flags: u32,
    ) -> io::Result<()> {
        read_only()
    }

    fn link(&self, _ctx: &Context, _inode: u64, _newparent: u64, _newname: &CStr) -> io::Result<Entry> {
        read_only()
    }

    fn create(
        &self,
        _ctx: &Context,
        _parent: u64,
        _name: &CStr,
        _args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        read_only()
    }

    fn write(
        &self,
        _ctx: &Context,
        _inode: u64,
        _handle: u64,
        _r: &mut dyn ZeroCopyReader,
        _size: u32,
        _offset: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        _flags: u32,
        _fuse_flags: u32,
    ) -> io::Result<usize> {
        read_only()
    }

    fn fallocate(
        &self,
        _ctx: &Context,
        _inode: u64,
        _handle: u64,
        _mode: u32,
        _offset: u64,
        _length: u64,
    ) -> io::Result<()> {
        read_only()
    }

    fn setxattr(
        &self,
        _ctx: &Context,
        _inode: u64,
        _name: &CStr,
        _value: &[u8],
        _flags: u32,
    ) -> io::Result<()> {
        read_only()
    }

    fn removexattr(&self, _ctx: &Context, _inode: u64, _name: &CStr) -> io::Result<()> {
        read_only()
    }
}

#[cfg(test)]
mod tests;

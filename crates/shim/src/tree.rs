//! Files of sysfs and debugfs that the machine does not have: a directory tree, made when a program first looks.
//!
//! # Theory of operation
//!
//! Programs look at these files in every way that there is (`openat` below a directory, `readdir`, `readlink`), so they are real
//! files, in a temporary directory, and only absolute paths are redirected. What the tree does not have is not there.
//!
//! What is read is what is in the files. What is written is not: who opens an [`Attribute`] to write gets a file of
//! [`crate::nodes::attribute`], and what is written to that changes the tree, which the attribute knows how.
//!
//! The tree is the state. All processes that `ring3 shim` and its program start share one, by the name that they have in their
//! environment, so that what one writes is so for all, as in sysfs. Who changes it holds a [`Locked`]; what a process
//! keeps in its memory beside, it brings up to date from the tree before it uses it. The process that the name was made
//! for removes the tree when it exits.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink},
        },
    },
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use iommufd::{Errno, Result};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};

/// One entry of the tree.
#[derive(Clone, Debug)]
pub(crate) enum Entry {
    /// A directory; those above any other entry need not be named.
    Directory,
    /// A file with these contents and permissions.
    File(Vec<u8>, u32),
    /// A symbolic link.
    Link(String),
}

/// What somebody adds to the tree.
pub(crate) type Entries = fn() -> Vec<(String, Entry)>;

/// What writing to the file at a path means; none for a file that just keeps what is written.
pub(crate) type Attributes = fn(&str) -> Option<Arc<dyn Attribute>>;

/// What a write to a file means.
pub(crate) trait Attribute: Send + Sync {
    /// The program writes `text` to it.
    fn store(&self, tree: &Locked, text: &[u8]) -> Result<()>;
}

/// Directories that are looked for in the tree, and what is in it.
#[derive(Default, Debug)]
pub(crate) struct Plan {
    /// Paths at or below these are redirected.
    pub tops: Vec<String>,
    /// What is in it at first, asked when no process has looked yet.
    pub entries: Vec<Entries>,
    /// Which of its files are attributes.
    pub attribute: Option<Attributes>,
    /// Where it is: the directory that all processes share. None for one of this process and its children.
    pub place: Option<Place>,
}

/// Where a tree is, and whose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// An absolute path without links.
    pub root: PathBuf,
    /// The process that removes it.
    pub owner: u32,
}

impl Place {
    /// One for this process.
    fn own() -> Self {
        let mut random = [0; 8];
        // Without random bytes two processes of one number share a tree, in two namespaces.
        let _ = rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty());
        let owner = std::process::id();
        let name = format!("ring3-shim-{owner}-{:016x}", u64::from_ne_bytes(random));
        let above = std::env::temp_dir();
        Self { root: above.canonicalize().unwrap_or(above).join(name), owner }
    }
}

/// What a path is in the tree, to who opens it.
pub(crate) enum Found {
    /// A file, directory or link.
    File(CString),
    /// A file whose writing means something, and where it is.
    Attribute(Arc<dyn Attribute>, PathBuf),
    /// It cannot be opened so.
    Refused(Errno),
}

static PLAN: OnceLock<(Plan, Place)> = OnceLock::new();
static MADE: OnceLock<bool> = OnceLock::new();

/// The file that is there when all others are.
const COMPLETE: &str = ".complete";

/// What the tree will have. Later calls change nothing.
pub(crate) fn set(mut plan: Plan) {
    if plan.tops.is_empty() {
        return;
    }
    let place = plan.place.take().unwrap_or_else(Place::own);
    let _ = PLAN.set((plan, place));
}

/// Whether there may be a tree at all.
pub(crate) fn is_planned() -> bool {
    PLAN.get().is_some()
}

/// The tree's root, which this makes when nobody has.
fn root() -> Option<&'static Path> {
    let (plan, place) = PLAN.get()?;
    let made = MADE.get_or_init(|| match make(plan, place) {
        Ok(()) => true,
        Err(error) => {
            let root = place.root.display();
            crate::complain(&format!("the device's files cannot be made in {root}: {error}"));
            false
        }
    });
    made.then_some(place.root.as_path())
}

/// Where in the tree `path` is, if that is below one of the tops. It need not exist.
fn inside(path: &str) -> Option<PathBuf> {
    let (plan, _) = PLAN.get()?;
    let below = |top: &String| {
        path.strip_prefix(top.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if !plan.tops.iter().any(below) {
        return None;
    }
    Some(root()?.join(path.trim_start_matches('/')))
}

fn c_string(path: PathBuf) -> Option<CString> {
    CString::new(path.into_os_string().into_encoded_bytes()).ok()
}

/// Where the file that the program calls `path` is, to who looks at it. None for what the tree has nothing to do with.
pub(crate) fn find(path: &str) -> Option<CString> {
    c_string(inside(path)?)
}

/// What the file that the program calls `path` is to who opens it with `flags`. None as above.
pub(crate) fn find_to_open(path: &str, flags: i32) -> Option<Found> {
    let there = inside(path)?;
    let is_there = |path: &Path| rustix::fs::lstat(path).is_ok();
    let as_file = |there| c_string(there).map(Found::File);
    if !is_there(&there) {
        // Nobody makes files in sysfs.
        let refused = flags & libc::O_CREAT != 0 && there.parent().is_some_and(is_there);
        return if refused { Some(Found::Refused(Errno::ACCESS)) } else { as_file(there) };
    }
    let (Ok(stat), Ok(target)) = (rustix::fs::stat(&there), fs::canonicalize(&there)) else {
        return as_file(there);
    };
    let Some(name) = outside(target.as_os_str().as_bytes()) else { return as_file(there) };
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || flags & libc::O_PATH != 0 {
        return as_file(there);
    }
    let access = flags & libc::O_ACCMODE;
    let (reads, writes) = (access != libc::O_WRONLY, access != libc::O_RDONLY || flags & libc::O_TRUNC != 0);
    // To nobody, whatever else he may do.
    if reads && stat.st_mode & 0o444 == 0 || writes && stat.st_mode & 0o222 == 0 {
        return Some(Found::Refused(Errno::ACCESS));
    }
    let (plan, _) = PLAN.get()?;
    let attribute =
        || plan.attribute.and_then(|attribute| core::str::from_utf8(name).ok().and_then(attribute));
    match writes.then(attribute).flatten() {
        Some(attribute) => Some(Found::Attribute(attribute, target)),
        None => as_file(there),
    }
}

/// The path by which the program knows a file of the tree.
pub(crate) fn outside(path: &[u8]) -> Option<&[u8]> {
    let (_, place) = PLAN.get()?;
    path.strip_prefix(place.root.as_os_str().as_bytes()).filter(|rest| rest.starts_with(b"/"))
}

fn make(plan: &Plan, place: &Place) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(&place.root) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let about = fs::symlink_metadata(&place.root)?;
    if !about.is_dir() || about.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "it is another user's"));
    }
    let tree = Locked::new(&place.root)?;
    if place.root.join(COMPLETE).exists() {
        return Ok(());
    }
    for (path, entry) in plan.entries.iter().flat_map(|entries| entries()) {
        tree.add(&path, &entry)?;
    }
    fs::write(place.root.join(COMPLETE), [])
}

/// The tree, which nobody else changes meanwhile. A thread has one at a time.
pub(crate) struct Locked {
    root: PathBuf,
    _lock: OwnedFd,
}

/// Locks the tree. EIO where there is none.
pub(crate) fn lock() -> Result<Locked> {
    Locked::new(root().ok_or(Errno::IO)?)
}

impl Locked {
    fn new(root: &Path) -> rustix::io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::open(root, flags, Mode::empty())?;
        loop {
            match rustix::fs::flock(&lock, FlockOperation::LockExclusive) {
                Err(Errno::INTR) => {}
                done => return done.map(|()| Self { root: root.to_owned(), _lock: lock }),
            }
        }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn add(&self, path: &str, entry: &Entry) -> io::Result<()> {
        let there = self.at(path);
        fs::create_dir_all(there.parent().unwrap_or(Path::new("/")))?;
        match entry {
            Entry::Directory => fs::create_dir_all(there),
            Entry::File(contents, mode) => {
                // In place, for who has it open; and first the new text, so that nobody finds it empty.
                let file = fs::OpenOptions::new()
                    .write(true)
                    .create(true)
                    .truncate(false)
                    .mode(0o600)
                    .open(&there)?;
                io::Write::write_all(&mut &file, contents)?;
                file.set_len(contents.len() as u64)?;
                file.set_permissions(fs::Permissions::from_mode(*mode))
            }
            Entry::Link(target) => match symlink(target, there) {
                // Who began to make the tree may have ended in the middle.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                done => done,
            },
        }
    }

    /// Adds an entry, or replaces a file's contents. EIO, and what the machine's kernel says.
    pub(crate) fn put(&self, path: &str, entry: &Entry) -> Result<()> {
        self.add(path, entry).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }

    /// Removes a file, a link, or a directory with all that is in it. What is not there is not missed.
    pub(crate) fn remove(&self, path: &str) {
        let there = self.at(path);
        let is_directory = fs::symlink_metadata(&there).is_ok_and(|about| about.is_dir());
        // What cannot be removed is a file that does nothing.
        let _ = if is_directory { fs::remove_dir_all(there) } else { fs::remove_file(there) };
    }

    /// Whether there is such a file, directory or link.
    pub(crate) fn has(&self, path: &str) -> bool {
        rustix::fs::lstat(self.at(path)).is_ok()
    }

    /// What a file has, without the line's end.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        let mut text = fs::read_to_string(self.at(path)).ok()?;
        text.truncate(text.trim_end_matches('\n').len());
        Some(text)
    }
}

/// The process ends: if the tree is its own, it goes with it.
pub(crate) extern "C" fn remove() {
    if let Some((_, place)) = PLAN.get()
        && place.owner == std::process::id()
    {
        let _ = fs::remove_dir_all(&place.root);
    }
}

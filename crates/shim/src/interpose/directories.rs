//! Listings of directories: `readdir` and its relatives, `scandir`, and `glob`.
//!
//! A stream that shows more than the machine's kernel does ([`listing`]) has a slot here; most programs have none, and their
//! `readdir` is one load more. The slots are few and without a lock, so that a child after a fork finds none held; when all are in
//! use, further streams show what the machine has.

use core::{
    cell::UnsafeCell,
    ffi::{c_char, c_int, c_long, c_void},
    mem::offset_of,
    ptr,
    sync::atomic::{AtomicPtr, AtomicUsize, Ordering},
};

use libc::{DIR, dirent64, size_t};

use super::{descriptors, open, paths};
use crate::{
    errno, inside,
    listing::{self, Directory},
    real::{self, Compare, GlobError, Select},
};

/// A stream that shows a [`Directory`].
struct Slot {
    /// Null while nobody has the slot.
    stream: AtomicPtr<DIR>,
    /// What it shows; null while the slot is being taken.
    directory: AtomicPtr<Directory>,
    /// How much of what is added it has shown.
    shown: AtomicUsize,
    /// What `readdir` returned last of it.
    entry: UnsafeCell<dirent64>,
}

// SAFETY: needed because `readdir` returns a pointer to memory of the stream. It writes the cell only for the stream that has
// the slot, and a program reads a stream in one thread at a time, as it must with libc's own.
unsafe impl Sync for Slot {}

static SLOTS: [Slot; 16] = [const {
    Slot {
        stream: AtomicPtr::new(ptr::null_mut()),
        directory: AtomicPtr::new(ptr::null_mut()),
        shown: AtomicUsize::new(0),
        // SAFETY: numbers and an array of bytes, which may be zero.
        entry: UnsafeCell::new(unsafe { core::mem::zeroed() }),
    }
}; 16];

/// How many slots are taken.
static TAKEN: AtomicUsize = AtomicUsize::new(0);

/// The slot of `stream`, and what it shows.
fn slot(stream: *mut DIR) -> Option<(&'static Slot, &'static Directory)> {
    if TAKEN.load(Ordering::Relaxed) == 0 || stream.is_null() {
        return None;
    }
    let slot = SLOTS.iter().find(|slot| slot.stream.load(Ordering::Acquire) == stream)?;
    // SAFETY: needed because a slot is taken without a lock. It is null, or was made from a `&'static` in `opened`.
    unsafe { slot.directory.load(Ordering::Relaxed).as_ref() }.map(|directory| (slot, directory))
}

/// `stream` was opened: it gets a slot if it shows more than it has.
fn opened(stream: *mut DIR) -> *mut DIR {
    if stream.is_null() || inside::is() || !listing::any() {
        return stream;
    }
    // SAFETY: a stream that libc has just made.
    let Some(directory) = listing::of(unsafe { libc::dirfd(stream) }) else { return stream };
    let free = |slot: &&Slot| {
        let taken =
            slot.stream.compare_exchange(ptr::null_mut(), stream, Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok()
    };
    if let Some(slot) = SLOTS.iter().find(free) {
        slot.shown.store(0, Ordering::Relaxed);
        slot.directory.store(ptr::from_ref(directory).cast_mut(), Ordering::Relaxed);
        TAKEN.fetch_add(1, Ordering::Relaxed);
    }
    stream
}

/// The program goes to a place in `stream`. What is added comes behind all places.
fn rewound(stream: *mut DIR) {
    if let Some((slot, _)) = slot(stream) {
        slot.shown.store(0, Ordering::Relaxed);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn opendir(path: *const c_char) -> *mut DIR {
    let refuse = |_| {
        errno::set(libc::ENOTDIR);
        ptr::null_mut()
    };
    // SAFETY: the caller's arguments, or a path of ours, for the function that it meant to call.
    opened(paths::look(path, refuse, |path| unsafe { real::opendir()(path) }))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn fdopendir(fd: c_int) -> *mut DIR {
    // SAFETY: the caller's argument, for the function that it meant to call.
    opened(unsafe { real::fdopendir()(fd) })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn closedir(stream: *mut DIR) -> c_int {
    // Before the address can be another stream's.
    if let Some((slot, _)) = slot(stream) {
        TAKEN.fetch_sub(1, Ordering::Relaxed);
        slot.directory.store(ptr::null_mut(), Ordering::Relaxed);
        slot.stream.store(ptr::null_mut(), Ordering::Release);
    }
    // SAFETY: the caller's argument, for the function that it meant to call.
    unsafe { real::closedir()(stream) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn rewinddir(stream: *mut DIR) {
    rewound(stream);
    // SAFETY: the caller's argument, for the function that it meant to call.
    unsafe { real::rewinddir()(stream) };
}

#[unsafe(no_mangle)]
unsafe extern "C" fn seekdir(stream: *mut DIR, to: c_long) {
    rewound(stream);
    // SAFETY: the caller's arguments, for the function that it meant to call.
    unsafe { real::seekdir()(stream, to) };
}

/// The next entry that is added to what libc has of the stream, in the slot.
fn next_added(slot: &'static Slot, directory: &Directory) -> Option<*mut dirent64> {
    let (shown, name, kind) = directory.added(slot.shown.load(Ordering::Relaxed))?;
    let name = name.to_bytes_with_nul();
    // SAFETY: the stream's own entry (see `Slot`), which is used until the end of this function.
    let entry = unsafe { &mut *slot.entry.get() };
    slot.shown.store(shown, Ordering::Relaxed);
    entry.d_ino = u64::MAX;
    entry.d_type = kind;
    let to = entry.d_name.get_mut(..name.len())?;
    to.iter_mut().zip(name).for_each(|(to, from)| *to = from.cast_signed());
    entry.d_reclen = u16::try_from((offset_of!(dirent64, d_name) + name.len()).next_multiple_of(8)).ok()?;
    Some(slot.entry.get())
}

/// What the stream shows after libc's function returned `entry`: null at the end.
///
/// # Safety
/// `entry` is null or libc's, of the stream that has the slot.
unsafe fn shown(slot: &'static Slot, directory: &Directory, entry: *mut dirent64) -> *mut dirent64 {
    // SAFETY: see above; nobody else has it until this returns.
    match unsafe { entry.as_mut() } {
        Some(entry) => {
            if directory.devices && entry.d_type == libc::DT_REG {
                entry.d_type = libc::DT_CHR;
            }
            entry
        }
        None => next_added(slot, directory).unwrap_or(ptr::null_mut()),
    }
}

/// Defines `readdir` under the names that it has.
macro_rules! readdir {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(stream: *mut DIR) -> *mut dirent64 {
            let Some((slot, directory)) = slot(stream) else {
                // SAFETY: the caller's argument, for the function that it meant to call.
                return unsafe { real::$name()(stream) };
            };
            let before = errno::get();
            errno::set(0);
            // SAFETY: as above.
            let entry = unsafe { real::$name()(stream) };
            if entry.is_null() && errno::get() != 0 {
                return entry;
            }
            errno::set(before);
            // SAFETY: what libc returned.
            unsafe { shown(slot, directory, entry) }
        }
    )*};
}

/// The same for `readdir_r`, which returns an error and copies to the caller's entry.
macro_rules! readdir_r {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(stream: *mut DIR, to: *mut dirent64, result: *mut *mut dirent64) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            let error = unsafe { real::$name()(stream, to, result) };
            let Some((slot, directory)) = slot(stream).filter(|_| error == 0) else { return error };
            // SAFETY: the function has succeeded: it has set `result` to null or to `to`, which it has written.
            unsafe {
                let entry = shown(slot, directory, *result);
                if !entry.is_null() && entry != to {
                    ptr::copy_nonoverlapping(entry.cast::<u8>(), to.cast(), usize::from((*entry).d_reclen));
                    *result = to;
                }
            }
            0
        }
    )*};
}

readdir!(readdir readdir64);
readdir_r!(readdir_r readdir64_r);

/// `scandir` of a directory whose listing is not libc's alone. None for any other.
fn scan(
    directory: c_int,
    path: *const c_char,
    list: *mut *mut *mut dirent64,
    select: Select,
    compare: Compare,
) -> Option<c_int> {
    if inside::is() || !listing::any() {
        return None;
    }
    let before = errno::get();
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NONBLOCK | libc::O_CLOEXEC;
    // SAFETY: the caller's path, as it would be opened below.
    let fd = unsafe { open::openat(directory, path, flags, 0) };
    if fd < 0 || listing::of(fd).is_none() {
        if fd >= 0 {
            // SAFETY: the number that was opened above, which nobody has.
            unsafe { descriptors::close(fd) };
        }
        errno::set(before);
        return None;
    }
    // SAFETY: the descriptor from above, which becomes the stream's.
    let stream = unsafe { fdopendir(fd) };
    if stream.is_null() {
        // SAFETY: it did not become the stream's.
        unsafe { descriptors::close(fd) };
        return Some(-1);
    }
    let mut found = Found(Vec::new());
    let done = loop {
        errno::set(0);
        // SAFETY: the stream from above.
        let entry = unsafe { readdir64(stream) };
        if entry.is_null() {
            break if errno::get() == 0 { found.hand_out(list, compare) } else { None };
        }
        // SAFETY: the program's function, and an entry, which it may read.
        if select.is_none_or(|select| unsafe { select(entry) } != 0) && found.add(entry).is_none() {
            break None;
        }
    };
    let problem = errno::get();
    // SAFETY: the stream from above, which nobody else has.
    unsafe { closedir(stream) };
    errno::set(if done.is_some() { before } else { problem });
    Some(done.unwrap_or(-1))
}

/// Copies of entries that the program will free.
struct Found(Vec<*mut dirent64>);

impl Found {
    /// None without memory for it, with errno set.
    fn add(&mut self, entry: *const dirent64) -> Option<()> {
        // SAFETY: needed because the program frees the copy. The entry is as long as it says.
        let copy = unsafe {
            let length = usize::from((*entry).d_reclen);
            let copy = libc::malloc(length);
            if copy.is_null() {
                return None;
            }
            ptr::copy_nonoverlapping(entry.cast::<u8>(), copy.cast(), length);
            copy
        };
        inside::run(|| self.0.push(copy.cast()));
        Some(())
    }

    /// Sorts them and gives them to the program: how many. None as above.
    fn hand_out(&mut self, list: *mut *mut *mut dirent64, compare: Compare) -> Option<c_int> {
        const EACH: size_t = size_of::<*mut dirent64>();
        let count = c_int::try_from(self.0.len()).ok()?;
        // SAFETY: needed because the program frees the array, which has room for all; `compare` is the program's function, of a
        // type that differs from qsort's in what its pointers point to. `list` is where the program wants it.
        unsafe {
            let array = libc::malloc(EACH * self.0.len().max(1)).cast::<*mut dirent64>();
            if array.is_null() {
                return None;
            }
            ptr::copy_nonoverlapping(self.0.as_ptr(), array, self.0.len());
            if let Some(compare) = compare {
                let compare = core::mem::transmute::<
                    unsafe extern "C" fn(*mut *const dirent64, *mut *const dirent64) -> c_int,
                    unsafe extern "C" fn(*const c_void, *const c_void) -> c_int,
                >(compare);
                libc::qsort(array.cast(), self.0.len(), EACH, Some(compare));
            }
            *list = array;
        }
        self.0.clear();
        Some(count)
    }
}

impl Drop for Found {
    fn drop(&mut self) {
        for entry in self.0.drain(..) {
            // SAFETY: from `malloc` in `add`, and not given to the program.
            unsafe { libc::free(entry.cast()) };
        }
    }
}

/// Defines `scandir` under the names that it has.
macro_rules! scandir {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            path: *const c_char,
            list: *mut *mut *mut dirent64,
            select: Select,
            compare: Compare,
        ) -> c_int {
            scan(libc::AT_FDCWD, path, list, select, compare).unwrap_or_else(|| {
                let refuse = |_| {
                    errno::set(libc::ENOTDIR);
                    -1
                };
                // SAFETY: the caller's arguments, or a path of ours, for the function that it meant to call.
                paths::look(path, refuse, |path| unsafe { real::$name()(path, list, select, compare) })
            })
        }
    )*};
}

/// The same for `scandirat`.
macro_rules! scandirat {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            directory: c_int,
            path: *const c_char,
            list: *mut *mut *mut dirent64,
            select: Select,
            compare: Compare,
        ) -> c_int {
            scan(directory, path, list, select, compare).unwrap_or_else(|| {
                let refuse = |_| {
                    errno::set(libc::ENOTDIR);
                    -1
                };
                // SAFETY: as above.
                let real = |path| unsafe { real::$name()(directory, path, list, select, compare) };
                paths::look(path, refuse, real)
            })
        }
    )*};
}

scandir!(scandir scandir64);
scandirat!(scandirat scandirat64);

/// `glob_t`, as far as it is looked at: crate libc does not show what the functions are.
#[repr(C)]
pub(super) struct Glob {
    _found: [usize; 3],
    flags: c_int,
    functions: Functions,
}

/// How `glob` looks at directories when it is not to do so itself (`GLOB_ALTDIRFUNC`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Functions {
    closedir: Option<unsafe extern "C" fn(*mut DIR) -> c_int>,
    readdir: Option<unsafe extern "C" fn(*mut DIR) -> *mut dirent64>,
    opendir: Option<unsafe extern "C" fn(*const c_char) -> *mut DIR>,
    lstat: Option<unsafe extern "C" fn(*const c_char, *mut libc::stat) -> c_int>,
    stat: Option<unsafe extern "C" fn(*const c_char, *mut libc::stat) -> c_int>,
}

const OURS: Functions = Functions {
    closedir: Some(closedir),
    readdir: Some(readdir64),
    opendir: Some(opendir),
    lstat: Some(paths::lstat),
    stat: Some(paths::stat),
};

/// Defines `glob` under the names that it has. It looks by the functions here, if the program has none of its own for it.
macro_rules! glob {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(
            pattern: *const c_char,
            flags: c_int,
            on_error: GlobError,
            to: *mut Glob,
        ) -> c_int {
            let whole: *mut c_void = to.cast();
            // SAFETY: the caller's arguments, or what is set here, for the function that it meant to call.
            let glob = |flags| unsafe { real::$name()(pattern, flags, on_error, whole) };
            if to.is_null() || flags & libc::GLOB_ALTDIRFUNC != 0 || inside::is() || !listing::any() {
                return glob(flags);
            }
            // SAFETY: the caller's structure, which libc will write to; it need not be initialised, and is copied as bytes.
            let functions = unsafe { &raw mut (*to).functions }.cast::<core::mem::MaybeUninit<Functions>>();
            // SAFETY: as above.
            let before = unsafe { functions.replace(core::mem::MaybeUninit::new(OURS)) };
            let result = glob(flags | libc::GLOB_ALTDIRFUNC);
            // SAFETY: as above. The flags were written by libc, unless it refused its arguments, and a flag less is no harm then.
            unsafe {
                functions.write(before);
                (*to).flags &= !libc::GLOB_ALTDIRFUNC;
            }
            result
        }
    )*};
}

glob!(glob glob64);

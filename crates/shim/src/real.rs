//! The functions that this library stands in front of: libc's own, or those of the next library that was loaded before it.
//!
//! Each is looked up once, with `dlsym(RTLD_NEXT)`, when it is first called: another library's constructor may open files
//! before ours has run. The look-up takes no lock of ours, and two threads that make it at once find the same.

#![allow(unsafe_code, reason = "calling C functions through pointers that dlsym found")]

use core::{
    ffi::{CStr, c_char, c_int, c_long, c_uint, c_ulong, c_void},
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use libc::{DIR, FILE, dirent64, iovec, off_t, size_t, ssize_t};

/// Which entries `scandir` lists.
pub(crate) type Select = Option<unsafe extern "C" fn(*const dirent64) -> c_int>;

/// In which order it does.
pub(crate) type Compare = Option<unsafe extern "C" fn(*mut *const dirent64, *mut *const dirent64) -> c_int>;

/// What `glob` calls for a directory that it cannot read.
pub(crate) type GlobError = Option<unsafe extern "C" fn(*const c_char, c_int) -> c_int>;

/// One function's address, null until it was looked up.
struct Symbol(AtomicPtr<c_void>);

impl Symbol {
    const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    fn address(&self, name: &CStr) -> *mut c_void {
        let known = self.0.load(Ordering::Relaxed);
        if !known.is_null() {
            return known;
        }
        // SAFETY: needed because the next definition of a symbol has no other way to be found; the name is a C string, and
        // RTLD_NEXT asks for no handle.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
        let address = if found.is_null() { absent as *mut c_void } else { found };
        self.0.store(address, Ordering::Relaxed);
        address
    }
}

/// Stands for a function that this libc does not have.
extern "C" fn absent() -> c_long {
    crate::errno::set(libc::ENOSYS);
    -1
}

/// Declares each function with the address of the next definition of its name. `..` ends the arguments of a variadic one.
macro_rules! functions {
    ($($name:ident: fn($($argument:ty),* $(; $dots:tt)?) -> $result:ty;)*) => {$(
        #[doc = concat!("`", stringify!($name), "` of the library below.")]
        #[allow(non_snake_case, reason = "libc names it so")]
        pub(crate) fn $name() -> functions!(@type ($($argument),*) $result $(; $dots)?) {
            static SYMBOL: Symbol = Symbol::new();
            const NAME: &CStr = match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("a name has no zero byte"),
            };
            // SAFETY: needed to call what dlsym found; sound because the address is that of libc's function of this name, whose
            // C declaration is the type here (or of `absent`, which takes nothing and can be called with anything).
            unsafe { core::mem::transmute::<*mut c_void, functions!(@type ($($argument),*) $result $(; $dots)?)>(SYMBOL.address(NAME)) }
        }
    )*};
    (@type ($($argument:ty),*) $result:ty) => { unsafe extern "C" fn($($argument),*) -> $result };
    (@type ($($argument:ty),*) $result:ty; ..) => { unsafe extern "C" fn($($argument),*, ...) -> $result };
}

functions! {
    open: fn(*const c_char, c_int; ..) -> c_int;
    open64: fn(*const c_char, c_int; ..) -> c_int;
    __open_2: fn(*const c_char, c_int) -> c_int;
    __open64_2: fn(*const c_char, c_int) -> c_int;
    openat: fn(c_int, *const c_char, c_int; ..) -> c_int;
    openat64: fn(c_int, *const c_char, c_int; ..) -> c_int;
    __openat_2: fn(c_int, *const c_char, c_int) -> c_int;
    __openat64_2: fn(c_int, *const c_char, c_int) -> c_int;
    fopen: fn(*const c_char, *const c_char) -> *mut FILE;
    fopen64: fn(*const c_char, *const c_char) -> *mut FILE;

    close: fn(c_int) -> c_int;
    close_range: fn(c_uint, c_uint, c_int) -> c_int;
    closefrom: fn(c_int) -> ();
    dup: fn(c_int) -> c_int;
    dup2: fn(c_int, c_int) -> c_int;
    dup3: fn(c_int, c_int, c_int) -> c_int;
    fcntl: fn(c_int, c_int; ..) -> c_int;
    fcntl64: fn(c_int, c_int; ..) -> c_int;

    ftruncate: fn(c_int, off_t) -> c_int;
    ftruncate64: fn(c_int, off_t) -> c_int;
    fsync: fn(c_int) -> c_int;
    fdatasync: fn(c_int) -> c_int;
    fallocate: fn(c_int, c_int, off_t, off_t) -> c_int;
    fallocate64: fn(c_int, c_int, off_t, off_t) -> c_int;

    ioctl: fn(c_int, c_ulong; ..) -> c_int;
    read: fn(c_int, *mut c_void, size_t) -> ssize_t;
    __read_chk: fn(c_int, *mut c_void, size_t, size_t) -> ssize_t;
    write: fn(c_int, *const c_void, size_t) -> ssize_t;
    pread: fn(c_int, *mut c_void, size_t, off_t) -> ssize_t;
    pread64: fn(c_int, *mut c_void, size_t, off_t) -> ssize_t;
    __pread_chk: fn(c_int, *mut c_void, size_t, off_t, size_t) -> ssize_t;
    __pread64_chk: fn(c_int, *mut c_void, size_t, off_t, size_t) -> ssize_t;
    pwrite: fn(c_int, *const c_void, size_t, off_t) -> ssize_t;
    pwrite64: fn(c_int, *const c_void, size_t, off_t) -> ssize_t;
    readv: fn(c_int, *const iovec, c_int) -> ssize_t;
    writev: fn(c_int, *const iovec, c_int) -> ssize_t;
    preadv: fn(c_int, *const iovec, c_int, off_t) -> ssize_t;
    preadv64: fn(c_int, *const iovec, c_int, off_t) -> ssize_t;
    pwritev: fn(c_int, *const iovec, c_int, off_t) -> ssize_t;
    pwritev64: fn(c_int, *const iovec, c_int, off_t) -> ssize_t;
    lseek: fn(c_int, off_t, c_int) -> off_t;
    lseek64: fn(c_int, off_t, c_int) -> off_t;

    mmap: fn(*mut c_void, size_t, c_int, c_int, c_int, off_t) -> *mut c_void;
    mmap64: fn(*mut c_void, size_t, c_int, c_int, c_int, off_t) -> *mut c_void;
    munmap: fn(*mut c_void, size_t) -> c_int;
    mremap: fn(*mut c_void, size_t, size_t, c_int; ..) -> *mut c_void;
    madvise: fn(*mut c_void, size_t, c_int) -> c_int;
    mprotect: fn(*mut c_void, size_t, c_int) -> c_int;

    sigaction: fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int;
    __sigaction: fn(c_int, *const libc::sigaction, *mut libc::sigaction) -> c_int;
    signal: fn(c_int, libc::sighandler_t) -> libc::sighandler_t;
    bsd_signal: fn(c_int, libc::sighandler_t) -> libc::sighandler_t;
    sysv_signal: fn(c_int, libc::sighandler_t) -> libc::sighandler_t;
    __sysv_signal: fn(c_int, libc::sighandler_t) -> libc::sighandler_t;

    access: fn(*const c_char, c_int) -> c_int;
    faccessat: fn(c_int, *const c_char, c_int, c_int) -> c_int;
    opendir: fn(*const c_char) -> *mut DIR;
    fdopendir: fn(c_int) -> *mut DIR;
    closedir: fn(*mut DIR) -> c_int;
    rewinddir: fn(*mut DIR) -> ();
    seekdir: fn(*mut DIR, c_long) -> ();
    readdir: fn(*mut DIR) -> *mut dirent64;
    readdir64: fn(*mut DIR) -> *mut dirent64;
    readdir_r: fn(*mut DIR, *mut dirent64, *mut *mut dirent64) -> c_int;
    readdir64_r: fn(*mut DIR, *mut dirent64, *mut *mut dirent64) -> c_int;
    scandir: fn(*const c_char, *mut *mut *mut dirent64, Select, Compare) -> c_int;
    scandir64: fn(*const c_char, *mut *mut *mut dirent64, Select, Compare) -> c_int;
    scandirat: fn(c_int, *const c_char, *mut *mut *mut dirent64, Select, Compare) -> c_int;
    scandirat64: fn(c_int, *const c_char, *mut *mut *mut dirent64, Select, Compare) -> c_int;
    glob: fn(*const c_char, c_int, GlobError, *mut c_void) -> c_int;
    glob64: fn(*const c_char, c_int, GlobError, *mut c_void) -> c_int;
    stat: fn(*const c_char, *mut libc::stat) -> c_int;
    stat64: fn(*const c_char, *mut libc::stat) -> c_int;
    lstat: fn(*const c_char, *mut libc::stat) -> c_int;
    lstat64: fn(*const c_char, *mut libc::stat) -> c_int;
    fstat: fn(c_int, *mut libc::stat) -> c_int;
    fstat64: fn(c_int, *mut libc::stat) -> c_int;
    fstatat: fn(c_int, *const c_char, *mut libc::stat, c_int) -> c_int;
    fstatat64: fn(c_int, *const c_char, *mut libc::stat, c_int) -> c_int;
    statx: fn(c_int, *const c_char, c_int, c_uint, *mut libc::statx) -> c_int;
    readlink: fn(*const c_char, *mut c_char, size_t) -> ssize_t;
    readlinkat: fn(c_int, *const c_char, *mut c_char, size_t) -> ssize_t;
    daemon: fn(c_int, c_int) -> c_int;
    _exit: fn(c_int) -> ();
    _Exit: fn(c_int) -> ();
    chdir: fn(*const c_char) -> c_int;
    getcwd: fn(*mut c_char, size_t) -> *mut c_char;
    realpath: fn(*const c_char, *mut c_char) -> *mut c_char;
}

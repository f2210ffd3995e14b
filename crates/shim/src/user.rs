//! The program's memory, read and written without trusting its pointers.
//!
//! A bad pointer must end in EFAULT and not in a crash, and asking the kernel to copy (`process_vm_readv` on oneself) costs
//! more than most ioctls do. But nearly always the argument lies on the caller's own stack, above the frame that we run in,
//! and that memory is mapped and writable as surely as the caller will return to it. So this is copied directly, and the
//! kernel copies the rest.

#![allow(unsafe_code, reason = "copying to and from addresses that the program gave")]

use core::{cell::Cell, ffi::c_void, ptr};

use iommufd::{Errno, Result, process::UserAddr};

thread_local! {
    /// The lowest and the first address past the highest of this thread's stack; (0, 0) before it was asked for.
    static STACK: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// The bounds of the calling thread's stack. (1, 0), which holds nothing, when libc does not know.
fn stack() -> (usize, usize) {
    STACK.with(|stack| {
        if stack.get() == (0, 0) {
            stack.set(crate::errno::preserved(ask_stack).unwrap_or((1, 0)));
        }
        stack.get()
    })
}

fn ask_stack() -> Option<(usize, usize)> {
    let mut attributes = core::mem::MaybeUninit::uninit();
    let (mut lowest, mut size) = (ptr::null_mut::<c_void>(), 0);
    // SAFETY: needed because only libc knows the bounds. The attributes are initialised by the first call, used when it
    // succeeded, and destroyed once; the other pointers are to locals.
    let known = unsafe {
        libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) == 0 && {
            let known = libc::pthread_attr_getstack(attributes.as_ptr(), &raw mut lowest, &raw mut size) == 0;
            libc::pthread_attr_destroy(attributes.as_mut_ptr());
            known
        }
    };
    known.then_some((lowest as usize, (lowest as usize).checked_add(size)?))
}

/// Whether `length` bytes at `at` lie in frames of this thread's stack that are older than this function's.
#[inline(never)]
fn on_stack(at: usize, length: usize) -> bool {
    let marker = 0_u8;
    let here = &raw const marker as usize;
    let (lowest, end) = stack();
    // On another stack (a coroutine's, a signal handler's) we know nothing.
    (lowest..end).contains(&here) && here < at && at.checked_add(length).is_some_and(|past| past <= end)
}

fn address(at: UserAddr) -> Result<usize> {
    usize::try_from(at.0).map_err(|_| Errno::FAULT)
}

/// Copies out of the program's memory. EFAULT when any byte cannot be read.
pub(crate) fn read(from: UserAddr, to: &mut [u8]) -> Result<()> {
    let at = address(from)?;
    if on_stack(at, to.len()) {
        // SAFETY: needed for speed (see above). The source is in older frames of this thread's stack, which are mapped and
        // readable as long as it runs on that stack; `to` is a Rust slice of the same length. They do not overlap: `to` is the
        // library's own memory, and what the program lets be copied is not.
        unsafe { ptr::copy(at as *const u8, to.as_mut_ptr(), to.len()) };
        return Ok(());
    }
    let local = libc::iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let remote = libc::iovec { iov_base: at as *mut c_void, iov_len: to.len() };
    crate::errno::preserved(|| {
        // SAFETY: needed because only the kernel can read an address that may not exist. It writes `to.len()` bytes to `to` and
        // only reads the other address.
        let done =
            unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
        if usize::try_from(done) == Ok(to.len()) { Ok(()) } else { Err(Errno::FAULT) }
    })
}

/// Copies into the program's memory. EFAULT when any byte cannot be written.
pub(crate) fn write(to: UserAddr, from: &[u8]) -> Result<()> {
    let at = address(to)?;
    if on_stack(at, from.len()) {
        // SAFETY: as in `read`; stacks are writable. The bytes are the program's variable, which it gave to be written to.
        unsafe { ptr::copy(from.as_ptr(), at as *mut u8, from.len()) };
        return Ok(());
    }
    let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let remote = libc::iovec { iov_base: at as *mut c_void, iov_len: from.len() };
    crate::errno::preserved(|| {
        // SAFETY: as in `read`: the kernel checks the address, and writes what the program gave to be written to.
        let done =
            unsafe { libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
        if usize::try_from(done) == Ok(from.len()) { Ok(()) } else { Err(Errno::FAULT) }
    })
}

/// Where [`c_string`] asks whether to go on.
const HEAD: usize = 4;

/// Whether the byte at `at` can be read, asked of a system call that every sandbox allows: `rt_sigprocmask` looks at its new mask
/// before it looks at what to do with it, and refuses to do anything.
fn readable(at: usize) -> bool {
    const NOTHING_TO_DO: i32 = -1;
    let word = at & !7;
    if word == 0 {
        // A null mask is no mask.
        return false;
    }
    crate::errno::preserved(|| {
        // SAFETY: needed because a program may give libc a bad path and get EFAULT for it. The kernel reads eight bytes at an
        // aligned address, so within one page, or refuses; it changes nothing, because there is no such operation.
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, NOTHING_TO_DO, word, 0_usize, 8_usize) };
        crate::errno::get() != libc::EFAULT
    })
}

/// The C string at `path`, up to `to.len()` bytes of it and without its end. None when it is longer or cannot be read, or when
/// `interesting` says no to what it begins with, which is asked once.
pub(crate) fn c_string(
    path: *const core::ffi::c_char,
    to: &mut [u8],
    interesting: impl Fn(&[u8]) -> bool,
) -> Option<&[u8]> {
    let start = path as usize;
    let mut checked = None;
    for index in 0..to.len() {
        let at = start.checked_add(index)?;
        let page = at / 4096;
        if checked != Some(page) {
            if !(on_stack(at, 1) || readable(at)) {
                return None;
            }
            checked = Some(page);
        }
        // SAFETY: needed to see which file the program opens. The page was found readable, and the program keeps its path in
        // place while libc looks at it.
        let value = unsafe { (at as *const u8).read() };
        if value == 0 {
            return to.get(..index);
        }
        *to.get_mut(index)? = value;
        if index == HEAD && !interesting(to.get(..=HEAD)?) {
            return None;
        }
    }
    None
}

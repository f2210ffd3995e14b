//! `close`, `dup` and the other functions that change which descriptor is what.

use core::ffi::{c_int, c_uint, c_void};

use libc::off_t;

use crate::{errno, kept, real, table};

/// What the kernel says of a number that is just being given away.
fn in_use() -> c_int {
    errno::set(libc::EBUSY);
    -1
}

/// `copy` is a new descriptor for what `fd` is; it may have been something served before.
fn copied(fd: c_int, copy: c_int) {
    errno::preserved(|| {
        match table::get_full(fd) {
            // A number past the table's end stays an ordinary descriptor of the stand-in.
            Some(description) => drop(table::insert(copy, description)),
            None => drop(table::remove(copy)),
        }
    });
}

#[unsafe(no_mangle)]
pub(super) unsafe extern "C" fn close(fd: c_int) -> c_int {
    if kept::is(fd) {
        errno::set(libc::EBADF);
        return -1;
    }
    // Before the number can be given to another thread's open; what was served is released when the number is free.
    let description = table::remove(fd);
    // SAFETY: the caller's argument, for the function that it meant to call.
    let result = unsafe { real::close()(fd) };
    if description.is_some() {
        errno::preserved(|| {
            drop(description);
            crate::share::settle();
        });
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    let closes = c_int::try_from(libc::CLOSE_RANGE_CLOEXEC).is_ok_and(|cloexec| flags & cloexec == 0);
    let closed = if closes && first <= last { take(first, last) } else { Vec::new() };
    let result = close_ranges(first, last, flags);
    if result == 0 {
        errno::preserved(|| drop(closed));
    } else {
        for (fd, description) in closed {
            drop(table::insert(fd, description));
        }
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C" fn closefrom(first: c_int) {
    let from = c_uint::try_from(first).unwrap_or(0);
    let closed = take(from, c_uint::MAX);
    if kept::within(from, c_uint::MAX).next().is_none() || close_ranges(from, c_uint::MAX, 0) != 0 {
        // SAFETY: the caller's argument, for the function that it meant to call.
        unsafe { real::closefrom()(first) };
    }
    errno::preserved(|| drop(closed));
}

/// `close_range` for all but the library's own descriptors.
fn close_ranges(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    // SAFETY: numbers, for the function that the caller meant to call, in one call or in several.
    let close = |first, last| unsafe { real::close_range()(first, last, flags) };
    let mut from = first;
    for kept in kept::within(first, last) {
        if from < kept {
            let result = close(from, kept - 1);
            if result != 0 {
                return result;
            }
        }
        from = kept.saturating_add(1);
    }
    // Ranges that are none are refused there.
    if from <= last || from == first { close(from, last) } else { 0 }
}

/// Takes all served descriptors of a range out of the table.
fn take(first: c_uint, last: c_uint) -> Vec<(c_int, std::sync::Arc<table::Description>)> {
    if !table::serves_any() {
        return Vec::new();
    }
    let bound = |number| c_int::try_from(number).unwrap_or(c_int::MAX);
    table::range(bound(first), bound(last)).filter_map(|(fd, _)| Some((fd, table::remove(fd)?))).collect()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup(fd: c_int) -> c_int {
    // SAFETY: the caller's argument, for the function that it meant to call.
    let copy = unsafe { real::dup()(fd) };
    if copy >= 0 && table::serves_any() {
        copied(fd, copy);
    }
    copy
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    if kept::is(to) {
        return in_use();
    }
    // SAFETY: the caller's arguments, for the function that it meant to call.
    let copy = unsafe { real::dup2()(fd, to) };
    if copy >= 0 && copy != fd && table::serves_any() {
        copied(fd, copy);
    }
    copy
}

#[unsafe(no_mangle)]
unsafe extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    if kept::is(to) {
        return in_use();
    }
    // SAFETY: the caller's arguments, for the function that it meant to call.
    let copy = unsafe { real::dup3()(fd, to, flags) };
    if copy >= 0 && table::serves_any() {
        copied(fd, copy);
    }
    copy
}

/// Defines `fcntl` under the names that it has.
macro_rules! fcntl {
    ($($name:ident)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
            // SAFETY: the caller's arguments, for the function that it meant to call.
            let result = unsafe { real::$name()(fd, command, argument) };
            let duplicates = matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC);
            if duplicates && result >= 0 && table::serves_any() {
                copied(fd, result);
            }
            result
        }
    )*};
}

fcntl!(fcntl fcntl64);

/// Defines calls that a device has no operation for: `errno` when the descriptor is a device's, nothing when it is a file's, else
/// the real function.
macro_rules! refused {
    ($($name:ident($($argument:ident: $type:ty),*): $errno:ident;)*) => {$(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(fd: c_int $(, $argument: $type)*) -> c_int {
            if let Some(description) = table::get_full(fd) {
                if description.file.is_regular() {
                    return 0;
                }
                errno::set(libc::$errno);
                return -1;
            }
            // SAFETY: the caller's arguments, for the function that it meant to call.
            unsafe { real::$name()(fd $(, $argument)*) }
        }
    )*};
}

refused! {
    ftruncate(length: off_t): EINVAL;
    ftruncate64(length: off_t): EINVAL;
    fsync(): EINVAL;
    fdatasync(): EINVAL;
    fallocate(mode: c_int, offset: off_t, length: off_t): ENODEV;
    fallocate64(mode: c_int, offset: off_t, length: off_t): ENODEV;
}

//! Whether a thread is in the library's own work. Its memory comes from the program's allocator, which may be any, and which
//! may call `mmap` and `munmap` through the exported functions: these must not look into tables that are locked just then.

use core::cell::Cell;

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Whether it is.
pub(crate) fn is() -> bool {
    INSIDE.get()
}

/// Does `work` inside.
pub(crate) fn run<T>(work: impl FnOnce() -> T) -> T {
    let before = INSIDE.replace(true);
    let result = work();
    INSIDE.set(before);
    result
}

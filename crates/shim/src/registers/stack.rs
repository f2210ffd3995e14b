//! Stacks of the library's own, for work in a signal handler.
//!
//! The handler runs on the program's alternate stack, where it has one. That may have no more room than the kernel's frame and a
//! small handler need (Rust and glibc give 8 KiB), and a device's model needs more.

#![allow(unsafe_code, reason = "another stack is a change of the stack pointer")]

use core::{
    arch::asm,
    ffi::c_void,
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags};

/// What work may need, many times over.
const SIZE: usize = 256 << 10;
/// Below it, so that an overflow is seen.
const GUARD: usize = 4096;

/// Stacks that nobody is on. More threads at once than there are places make stacks for themselves.
static FREE: [AtomicPtr<c_void>; 16] = [const { AtomicPtr::new(ptr::null_mut()) }; 16];

/// A stack: where it begins, with the guard.
fn take() -> Option<*mut c_void> {
    let free = FREE.iter().map(|slot| slot.swap(ptr::null_mut(), Ordering::AcqRel)).find(|it| !it.is_null());
    if free.is_some() {
        return free;
    }
    let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: needed because a stack is memory that no allocator may be asked for in a signal handler. It is a new mapping; its
    // first page becomes the guard.
    unsafe {
        let stack = rustix::mm::mmap_anonymous(ptr::null_mut(), SIZE, prot, flags).ok()?;
        let _ = rustix::mm::mprotect(stack, GUARD, MprotectFlags::empty());
        Some(stack)
    }
}

fn give(stack: *mut c_void) {
    let kept = FREE.iter().any(|slot| {
        slot.compare_exchange(ptr::null_mut(), stack, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    });
    if !kept {
        // SAFETY: needed to give the memory back. It was mapped by `take` with this size, and nobody is on it any more.
        let _ = unsafe { rustix::mm::munmap(stack, SIZE) };
    }
}

/// Does `work` on a stack of its own; where there is no memory for one, on the one that there is.
pub(super) fn on_another<T>(work: impl FnOnce() -> T) -> T {
    let Some(stack) = take() else { return work() };
    let mut result = None;
    call(stack, || result = Some(work()));
    give(stack);
    match result {
        Some(result) => result,
        // The call above returns when the work is done, or not at all.
        None => std::process::abort(),
    }
}

fn call<F: FnOnce()>(stack: *mut c_void, work: F) {
    extern "C" fn run<F: FnOnce()>(work: *mut c_void) {
        // SAFETY: needed because the address is all that a register carries. It is that of the option below, which nobody else uses
        // until this returns.
        if let Some(work) = unsafe { &mut *work.cast::<Option<F>>() }.take() {
            work();
        }
    }
    let function: extern "C" fn(*mut c_void) = run::<F>;
    let mut work = Some(work);
    // SAFETY: needed because Rust has no call on another stack. The stack pointer is put aside in a register that functions
    // preserve, and is back when the instructions end; the stack is mapped, nobody else's, and its end is aligned to 16 bytes as
    // the ABI wants it at a call. `run` is a C function and never unwinds: a panic in it ends the process.
    unsafe {
        asm!(
            "mov r12, rsp",
            "mov rsp, r13",
            "call r14",
            "mov rsp, r12",
            out("r12") _,
            in("r13") stack.byte_add(SIZE),
            in("r14") function,
            inlateout("rdi") ptr::from_mut(&mut work) => _,
            clobber_abi("C"),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As much as would overflow what the thread had left.
    #[inline(never)]
    fn deep(depth: usize) -> usize {
        let frame = core::hint::black_box([depth; 128]);
        if depth == 0 { 0 } else { deep(depth - 1) + usize::from(frame[127] == depth) }
    }

    #[test]
    fn work_is_done_on_another_stack() {
        let here = ptr::from_ref(&0).addr();
        let (there, depth) = on_another(|| (ptr::from_ref(&core::hint::black_box(0)).addr(), deep(100)));
        assert_eq!(depth, 100);
        assert!(here.abs_diff(there) > GUARD, "{here:x} {there:x}");
        // Within another, and more at once than are kept.
        fn nested(levels: usize) -> usize {
            if levels == 0 { 0 } else { 1 + on_another(|| nested(levels - 1)) }
        }
        assert_eq!(nested(20), 20);
    }
}
